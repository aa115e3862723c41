"""Runs every measurement of `benchmarks.against_transformers` for one device, prints a table, keeps the figures.

    python -m benchmarks.collect              # CPU: fp32 and bf16, one thread and two
    python -m benchmarks.collect --device cuda   # GPU: bf16, with and without torch.compile
    python -m benchmarks.collect --sparse     # sparse attention against DeepseekV32, on either device

Each measurement is a process of its own. The figures go to benchmarks/results, named by date and device, with
device, versions and date. A measurement that fails is kept as its error; the others go on. The last line is one JSON
object: the ratios.
"""

import argparse
import datetime
import json
import platform
import shlex
import subprocess
import sys
from itertools import product

import torch

from train.recipe import REPOSITORY

DECODE = (["--context", "512"], ["--context", "512", "--batch", "8"], ["--context", "8192"])
TASKS = [["train"], ["prefill"], *(["decode", *where] for where in DECODE), ["memory"]]
# Long prefills are measured once; ours goes on alone where the other cannot follow.
SPARSE_TASKS = [
    *(["decode", "--context", context] for context in ("512", "2048", "8192")),
    ["growth"],
    ["prefill", "--context", "2048"],
    ["prefill", "--context", "8192", "--runs", "1"],
    ["prefill", "--context", "131072", "--alone", "--runs", "1"],
]
VARIANTS = {
    "cpu": [["--dtype", dtype, "--threads", n] for dtype, n in product(("float32", "bfloat16"), ("1", "2"))],
    "cuda": [["--device", "cuda", "--dtype", "bfloat16", *c] for c in ([], ["--compile"])],
}


def measurements(args: argparse.Namespace) -> list[list[str]]:
    """The arguments of each measurement."""
    if args.sparse:
        variant = ["--sparse", "--device", args.device]
        variant += ["--dtype", "bfloat16"] if args.device == "cuda" else ["--dtype", "float32", "--threads", "1"]
        return [[*task, *variant] for task in SPARSE_TASKS]
    pairs = product(TASKS, VARIANTS[args.device])
    return [[*task, *variant] for task, variant in pairs if not (task == ["memory"] and "2" in variant)]


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as lines:
        info = dict(line.split(":", 1) for line in lines if ":" in line)
    info = {name.strip(): value.strip() for name, value in info.items()}
    units = [unit for unit in ("avx512f", "avx512_bf16", "amx_tile") if unit in info.get("flags", "").split()]
    return f"{info.get('model name', platform.processor())} ({', '.join(units)})"


def command(benchmark: str) -> str:
    """The command line as it was given, to be kept with the results."""
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]])


def measure(arguments: list[str]) -> dict:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.against_transformers", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=VARIANTS)
    parser.add_argument("--sparse", action="store_true", help="the sparse models instead")
    parser.add_argument("--runs", default="5")
    args = parser.parse_args()
    date = datetime.date.today().isoformat()
    kept = {"date": date, "device": processor(args.device), "python": platform.python_version(), "results": {}}
    other = "deepseek_v32" if args.sparse else "transformers"
    file = REPOSITORY / "benchmarks" / "results" / f"{date}-{args.device}-against_{other}.json"
    results = kept["results"]
    for arguments in measurements(args):
        name = " ".join(arguments)
        runs = [] if "--runs" in arguments else ["--runs", "2" if arguments[0] == "memory" else args.runs]
        results[name] = measure([*arguments, *runs])
        print(f"{name:60} {results[name].get('ratio', results[name].get('error', 'alone'))}", flush=True)
        file.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps({name: result.get("ratio") for name, result in results.items()}))


if __name__ == "__main__":
    main()
