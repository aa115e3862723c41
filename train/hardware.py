"""What this machine can do, and settings that make a CPU train faster."""

import ctypes
import os
import sys
import time

import torch

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # M_* of glibc's malloc.h
KEEP = 2**31 - 1


def keep_memory():
    """Makes glibc keep freed memory instead of returning it to the system; does nothing with other C libraries.

    A training step frees and allocates the same large blocks; handed back, each costs page faults anew
    (`benchmarks/training_choices.py` measures it). Call it before training.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(MMAP_THRESHOLD, KEEP)
            mallopt(TRIM_THRESHOLD, KEEP)


def use_threads(count: int | None = None) -> int:
    """Sets torch's CPU threads: `count`, or this process's share of the cores. Launchers often leave it only one."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(count or max(1, cores // processes))
    return torch.get_num_threads()


def resident_bytes(field: str) -> int:
    """Memory of this process on Linux: `VmRSS:` now, `VmHWM:` at its peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively: recent GPUs, and CPUs with AMX. Elsewhere fp32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large square matrix product on this device: the ceiling that utilisation is a share of."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def run() -> float:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    run()
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds:
        times.append(run())
    return 2 * size**3 / min(times)
