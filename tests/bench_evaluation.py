"""What surrounds the network at both ends: the autoencoder of latents, and resizing for Inception. Prints rates, at the end one line of JSON.

    python tests/bench_evaluation.py             # a minute on two CPU cores; timings of busy machines mean nothing; needs diffusers

encoding     latents of images and of their mirror images (all of encode_latents(): reading, encoding, writing, a hash of the weights), decoding by decode(): operations a second as a share
             of the rate of large matrix products in the precision that is used (GPU: TF32), and of the autoencoder's bare passes. Stable Diffusion's, random weights
resizing     images a second from 32 and 256 pixels to Inception's 299, against clean-fid's own, image by image on the processor
"""
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from bench_sampling import DEVICE, GPU, seconds

try:
    import diffusers  # noqa: F401
    from cleanfid.resize import build_resizer
except ImportError as e:
    raise SystemExit(f"skipped: {e}") from None

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sample_ode import inception_resize                  # noqa: E402
from configs.data import autoencoder_kl, decode, encode_latents, to_latents                # noqa: E402
from configs.run import Data, gpu_flags, write_json                # noqa: E402
from train_diffusion import DECODE, ENCODE                # noqa: E402

SIZE, COUNT = (256, 512) if GPU else (64, 64)


def product_rate():
    """Operations a second of large float32 products under the flags that are set."""
    n = 8192 if GPU else 2048
    a, b = torch.randn(2, n, n, device=DEVICE).unbind()
    a @ b
    return 2 * n ** 3 / min(seconds(lambda: a @ b) for _ in range(5))


def main():
    gpu_flags(training=True)                              # as in train_diffusion.py, which encodes
    out, rate = {}, product_rate()
    torch.manual_seed(0)
    blocks = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    vae = autoencoder_kl()(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=SIZE, down_block_types=blocks[0],
                           up_block_types=blocks[1]).eval().requires_grad_(False).to(DEVICE)
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 3, SIZE, SIZE), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        run = SimpleNamespace(dir=Path(folder), data=Data(latents="bench"), vae=vae, rank=0, world=1, device=DEVICE, agreed=lambda look: look(), wait=lambda: None, say=lambda *_: None, dry_run=False, share=np.arange)
        for split, part in (("train", images), ("test", images[:1])):
            (Path(folder) / "data" / split).mkdir(parents=True)
            np.save(Path(folder) / "data" / split / "images.npy", part)
            write_json(Path(folder) / "data" / split / "info.json", dict(fingerprint="x"))
        x = torch.from_numpy(images).to(DEVICE).float() / 127.5 - 1
        bare = lambda: [to_latents(vae, v) for v in torch.cat([x, x.flip(-1)]).split(16)]
        to_latents(vae, x[:1])                            # the shape is asked for with one image: GPUs choose kernels for every size
        bare()
        alone = min(seconds(bare) for _ in range(2))
        whole = seconds(lambda: encode_latents(run))
        z = torch.randn(COUNT, 4, SIZE // 8, SIZE // 8, device=DEVICE)
        decode(vae, z)
        back = min(seconds(lambda: decode(vae, z)) for _ in range(2))
    flops = SIZE ** 2 * COUNT
    out["encoding"] = dict(images_per_second=round(2 * COUNT / whole, 2), of_matrix_rate=round(2 * ENCODE * flops / whole / rate, 3), bare=round(alone / whole, 3))
    out["decoding"] = dict(images_per_second=round(COUNT / back, 2), of_matrix_rate=round(DECODE * flops / back / rate, 3))
    for what, v in out.items():
        print(f"{what}, {SIZE} x {SIZE}: {v['images_per_second']:.1f} images/s, {v['of_matrix_rate']:.2f} of the matrix rate" + (f", bare passes {v['bare']:.2f} of the time" if "bare" in v else ""))

    gpu_flags(training=False)
    theirs = build_resizer("clean")
    for size in (32, 256):
        x = np.random.default_rng(0).integers(0, 256, (200, 3, size, size), dtype=np.uint8)
        ours = lambda x: [inception_resize(part.to(DEVICE)) for part in torch.from_numpy(x).split(100)]
        peer = lambda x: [theirs(v) for v in x.transpose(0, 2, 3, 1)]
        ours(x), peer(x[:20])
        took = [min(seconds(lambda: f(x)) for _ in range(3)) for f in (ours, peer)]
        out[f"resizing from {size}"] = dict(images_per_second=round(len(x) / took[0]), times_faster=round(took[1] / took[0], 2))
        print(f"resizing {size} to 299 pixels: {len(x) / took[0]:,.0f} images/s, {took[1] / took[0]:.1f} times as fast as clean-fid's")
    print(json.dumps(dict(device=torch.cuda.get_device_name() if GPU else "cpu", threads=torch.get_num_threads(), torch=torch.__version__, size=SIZE, **out)))


if __name__ == "__main__":
    main()
