"""Training steps of our U-ViT and ADM U-Net against the published implementations, which are not shipped: ratios of time and of peak memory.

    git clone https://github.com/baofff/U-ViT && git clone https://github.com/openai/guided-diffusion && pip install einops
    python tests/bench_published.py --uvit U-ViT --adm guided-diffusion              # some minutes on two CPU cores; timings of busy machines mean nothing

Same batch, precision, loss and AdamW; names and shapes of all parameters are equal. Each network lives in a process of its own; they make their steps in turns.
Time is that of the fastest step; memory the process's peak less what it held with the code loaded and no network (GPU: what PyTorch allocated at its peak).
--profile says what a step is made of: matrix products and fused attention are calls to the same library on both sides.
Goals, to two digits: fp32 time and all memory at most theirs; bf16 (autocast) 0.85 of their time.
"""
import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

# A C library that gives memory back after every tensor and asks for it again makes steps of equal networks differ by a fifth: keep it, on both sides
KEEP = dict(MALLOC_MMAP_THRESHOLD_=str(2 ** 30), MALLOC_TRIM_THRESHOLD_=str(2 ** 36), MALLOC_TOP_PAD_=str(2 ** 28))
ROOT = Path(__file__).resolve().parents[1]
SIZE = {"uvit": 32, "adm": 64}                            # U-ViT-S/2 of CIFAR-10; the layout of ImageNet 64 x 64 with 64 channels in place of 192
GOAL = {"fp32": 1.0, "bf16": 0.85}
HOW = "git clone https://github.com/{}, then name the folder by --{}"
WHERE = {"uvit": "baofff/U-ViT", "adm": "openai/guided-diffusion"}


def resident():
    """Peak resident memory of this process so far in MiB; unlike ru_maxrss it does not count the parent's."""
    with contextlib.suppress(OSError):
        return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) / 1024
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def made_of(step, steps=2):
    """Seconds per step of matrix products (convolutions too), of attention and of all else, by PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            step()
    total = dict(matrix=0.0, attention=0.0, other=0.0)
    for e in seen.key_averages():
        kind = "attention" if "attention" in e.key else "matrix" if any(w in e.key for w in ("mm", "matmul", "linear", "conv")) else "other"
        total[kind] += e.self_cpu_time_total / 1e6 / steps
    return total


def worker(kind, folder, precision, batch, profiled):
    """One network: ours if `folder` is empty. Answers every line with the seconds of a training step, the end with the peak memory in MiB and, if asked, a profile."""
    sys.path.insert(0, folder or str(ROOT))
    import torch
    device, size = torch.device("cuda" if torch.cuda.is_available() else "cpu"), SIZE[kind]
    with contextlib.redirect_stdout(sys.stderr):
        if not folder:
            from train_diffusion import UNet, UViT
        elif kind == "uvit":
            from libs.uvit import UViT as Theirs
        else:
            from guided_diffusion.unet import UNetModel as Theirs
    before = resident()
    torch.manual_seed(0)
    if kind == "uvit":
        net = Theirs(img_size=size, patch_size=2, embed_dim=512, depth=12, num_heads=8) if folder else UViT(size, 3, 3, 512, 2, 12, 8)
    else:
        net = (Theirs(size, 3, 64, 3, 3, (2, 4, 8), channel_mult=(1, 2, 3, 4), num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True) if folder
               else UNet(size, 3, 3, 64, [1, 2, 3, 4], 3, [32, 16, 8], 64))
    net.train().to(device)
    opt = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    x, z, t = torch.randn(2, batch, 3, size, size, device=device).unbind() + (1000 * torch.rand(batch, device=device),)
    context = (lambda: torch.autocast(device.type, torch.bfloat16)) if precision == "bf16" else contextlib.nullcontext
    print(json.dumps([[name, list(p.shape)] for name, p in net.named_parameters()]), flush=True)

    def step():
        with context():                                   # their recomputed attention needs it on the way back, too
            (net(x, t).float() - z).square().mean().backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in sys.stdin:
        tick = time.perf_counter()
        step()
        print(time.perf_counter() - tick, flush=True)
    print(torch.cuda.max_memory_allocated() / 2 ** 20 if device.type == "cuda" else resident() - before, flush=True)
    if profiled:
        print(json.dumps(made_of(step)))


def compare(kind, folder, precision, batch, steps, profiled):
    """{ratios of time and memory, ours to theirs; shares of a step, if profiled}; prints them with what they are made of."""
    sides, seconds = {}, {"ours": [], "theirs": []}
    for side, where in (("ours", ""), ("theirs", folder)):
        command = [sys.executable, __file__, "--worker", kind, where, precision, "--batch", str(batch)] + ["--profile"] * profiled
        sides[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | KEEP)
    ours, theirs = (dict(json.loads(p.stdout.readline() or sys.exit(f"{kind}: a network could not be built, for the reason above"))) for p in sides.values())
    assert ours == theirs, f"not the same network: {sorted(set(ours) ^ set(theirs))[:3] or 'shapes differ'}"
    for _ in range(1 + steps):
        for side, p in sides.items():
            print(file=p.stdin, flush=True)
            seconds[side].append(float(p.stdout.readline()))
    peak, parts = {}, {}
    for side, p in sides.items():                         # one after the other: a profile must not disturb the other's
        p.stdin.close()
        peak[side] = float(p.stdout.readline())
        parts[side] = json.loads(p.stdout.readline() or "{}")
        p.wait()
    s = {side: min(v[1:]) for side, v in seconds.items()}                        # the first one warms up: allocations, choice of kernels
    for what, v, goal, unit in (("time", s, GOAL[precision], "s"), ("memory", peak, 1.0, "MiB")):
        ratio = v["ours"] / v["theirs"]
        print(f"{kind:5}{precision:5} {what:7}{ratio:6.3f}  (goal {goal:.2f} {'met' if round(ratio, 2) <= goal else 'MISSED'}; ours / theirs "
              f"{v['ours']:.4g} / {v['theirs']:.4g} {unit})", flush=True)
    out = dict(time=round(s["ours"] / s["theirs"], 3), memory=round(peak["ours"] / peak["theirs"], 3))
    for side, seconds in parts.items() if profiled else ():
        out[f"{side}, share of their step"] = {k: round(v / sum(parts["theirs"].values()), 3) for k, v in seconds.items()}
        print(f"{kind:5}{precision:5} {side:7}" + ", ".join(f"{k} {v:.2f}" for k, v in out[f"{side}, share of their step"].items()) + " of their step")
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, where in WHERE.items():
        parser.add_argument(f"--{kind}", default="", help=f"checkout of github.com/{where}")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="what a step is made of (CPU)")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker, args.batch, args.profile)
    results = {}
    for kind, where in WHERE.items():
        if not getattr(args, kind):
            print(f"{kind}: skipped; {HOW.format(where, kind)}")
        for precision in GOAL if getattr(args, kind) else ():
            results[f"{kind} {precision}"] = compare(kind, getattr(args, kind), precision, args.batch, args.steps, args.profile)
    if results:
        print(json.dumps(dict(batch=args.batch, **results)))


if __name__ == "__main__":
    main()
