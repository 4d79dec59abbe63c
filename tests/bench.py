"""All benchmarks, one after the other; writes results/bench-<machine>.json, where <machine> is cpu or the GPU's name.

    python tests/bench.py                        # half an hour or more on two CPU cores that do nothing else; `published` is left out
    python tests/bench.py hardware scale         # only these; the entries of others stay
    python tests/bench.py published --uvit DIR --adm DIR         # words from the first -- on go to this one benchmark
"""
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from configs.run import write_json                # noqa: E402


def machine():
    """The processor, or the GPU, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), platform.processor() or platform.machine())
    return f"{os.cpu_count()} x {name}" + "".join(f", {flag}" for flag in ("avx512_bf16", "amx_bf16") if flag in info)


def main():
    at = next((i for i, w in enumerate(sys.argv) if w.startswith("--")), len(sys.argv))
    names = sys.argv[1:at] or sorted(p.stem.removeprefix("bench_") for p in HERE.glob("bench_*.py"))
    file = HERE.parent / "results" / f"bench-{torch.cuda.get_device_name().lower().replace(' ', '-') if torch.cuda.is_available() else 'cpu'}.json"
    failed = []
    for name in names:
        print(f"--- {name}", flush=True)
        p, last = subprocess.Popen([sys.executable, HERE / f"bench_{name}.py", *(sys.argv[at:] if len(names) == 1 else [])], stdout=subprocess.PIPE, text=True), ""
        for last in p.stdout:
            print(last, end="", flush=True)
        if p.wait():
            failed.append(name)
        elif last.startswith("{"):                          # every benchmark ends with a line of JSON, unless it had nothing to measure
            known = json.loads(file.read_text()) if file.exists() else {}
            write_json(file, known | {name: dict(machine=machine()) | json.loads(last)})
    print(f"numbers in {file}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
