"""ImageNet's numbers: a feature file of 1.28 M x 1,024 written by several processes, k-means and Sinkhorn at K = 5,000 streamed from it.

    python tests/bench_scale.py                  # eight minutes on two CPU cores, 6 GB of disk in the folder for temporary files; timings of busy machines mean nothing
    python tests/bench_scale.py 128000           # so many rows instead

writing      seconds in write_rows() of two processes that fill one file side by side, against one process that writes the same bytes in order
k-means      one iteration over all rows, and one of Sinkhorn, as a share of the fp32 matrix rate; memory that they take (RssAnon: not the pages of the file)
"""
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from bench_hardware import rates
from bench_sampling import DEVICE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from self_label import lloyd, potentials, rows_of            # noqa: E402
from configs.run import create_rows, write_rows                # noqa: E402

ROWS, D, K, BLOCK, PROCESSES = int(sys.argv[1]) if len(sys.argv) > 1 else 1_280_000, 1024, 5000, 500, 2


def block(i):
    """Rows i ... i + BLOCK - 1: noise whose first number tells the row."""
    x = np.random.default_rng(i // BLOCK % 8).normal(size=(min(BLOCK, ROWS - i), D)).astype(np.float16)
    x[:, 0] = np.arange(i, i + len(x)) % 1000
    return x


def writer(path, rank, took):
    """One process fills its slice of the file, in blocks, as extract_features.py does."""
    first, last, seconds = ROWS * rank // PROCESSES // BLOCK * BLOCK, ROWS * (rank + 1) // PROCESSES // BLOCK * BLOCK if rank + 1 < PROCESSES else ROWS, 0.0
    for i in range(first, last, BLOCK):
        x = block(i)
        tick = time.perf_counter()
        write_rows(path, i, x)
        seconds += time.perf_counter() - tick
    took[rank] = seconds


class Memory:
    """Most memory, in MiB, that this process held besides pages of files, watched from a thread while the context is open."""

    def now(self):
        return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon"))) / 1024

    def __enter__(self):
        self.before, self.most, self.open = self.now(), 0.0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.open:
            self.most = max(self.most, self.now() - self.before)
            time.sleep(0.02)

    def __exit__(self, *_):
        self.open = False
        self.thread.join()


def main():
    out = dict(rows=ROWS, width=D, K=K)
    with tempfile.TemporaryDirectory() as folder:
        path, took = Path(folder) / "features.npy", multiprocessing.Array("d", PROCESSES)
        create_rows(path, np.float16, (ROWS, D))
        workers = [multiprocessing.Process(target=writer, args=(path, rank, took)) for rank in range(PROCESSES)]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
        x, plain = np.load(path, mmap_mode="r"), 0.0
        some = np.random.default_rng(0).choice(ROWS, 1000, replace=False)
        assert (x[some, 0] == some % 1000).all() and np.array_equal(x[-5:], block((ROWS - 1) // BLOCK * BLOCK)[-5:]), "rows are not where they belong"
        with open(Path(folder) / "plain", "wb") as f:
            for i in range(0, ROWS, BLOCK):
                v = block(i).tobytes()
                tick = time.perf_counter()
                f.write(v)
                plain += time.perf_counter() - tick
        (Path(folder) / "plain").unlink()
        out["writing"] = dict(gigabytes=round(x.nbytes / 1e9, 2), seconds=round(max(took), 2), plain_seconds=round(plain, 2))
        print(f"writing {x.nbytes / 1e9:.2f} GB by {PROCESSES} processes: {max(took):.1f} s in write_rows(); {plain:.1f} s by one in order", flush=True)

        rate = rates()["float32"]
        c = rows_of(x, np.arange(K), "cosine", DEVICE)
        chunks = lambda: (rows_of(x, slice(i, i + 8192), "cosine", DEVICE) @ c.T for i in range(0, ROWS, 8192))
        for what, f in (("k-means", lambda: lloyd(x, c, "cosine", 1, 4096)), ("Sinkhorn", lambda: potentials(chunks, 0.05, 1))):
            with Memory() as memory:
                tick = time.perf_counter()
                f()
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()
                each = time.perf_counter() - tick
            out[what] = dict(seconds=round(each, 2), of_matrix_rate=round(2 * ROWS * D * K / each / rate, 3), memory_mb=round(memory.most))
            print(f"{what}, {ROWS:,} x {D:,}, K = {K:,}: {each:.1f} s an iteration, {out[what]['of_matrix_rate']:.2f} of the fp32 matrix rate "
                  f"({2e-12 * ROWS * D * K:.1f} TFLOP), {memory.most:,.0f} MiB (all scores at once: {4 * ROWS * K / 2 ** 20:,.0f})", flush=True)
    print(json.dumps(dict(device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu", threads=torch.get_num_threads(), torch=torch.__version__, **out)))


if __name__ == "__main__":
    main()
