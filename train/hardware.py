"""What this machine can do, and settings that make a CPU train faster."""

import ctypes
import os
import platform
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

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


def sum_dtype(device: torch.device) -> torch.dtype:
    """What many losses are summed in there; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def wait_for(device: torch.device):
    """Until the device has done all it was told; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def name_of(device: torch.device) -> str:
    """What the maker calls the device; of a CPU what Linux says of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    return models[0] if models else platform.machine()


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large square matrix product on this device: the ceiling that utilisation is a share of."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def run() -> float:
        start = time.perf_counter()
        a @ b
        wait_for(device)
        return time.perf_counter() - start

    run()
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds:
        times.append(run())
    return 2 * size**3 / min(times)


@dataclass(frozen=True)
class Device:
    """What one device can do: FLOP/s of dense matrix products by precision, bytes of memory, bytes per second."""

    name: str
    flops: dict[str, float]
    memory: float
    bandwidth: float


# By the makers' data sheets (the SXM forms), products without sparsity.
DEVICES = {
    device.name: device
    for device in (
        Device("a100", {"bf16": 312e12, "fp32": 19.5e12}, 80e9, 2.04e12),
        Device("h100", {"bf16": 989e12, "fp8": 1979e12, "fp32": 67e12}, 80e9, 3.35e12),
        Device("h800", {"bf16": 989e12, "fp8": 1979e12, "fp32": 67e12}, 80e9, 3.35e12),
        Device("h200", {"bf16": 989e12, "fp8": 1979e12, "fp32": 67e12}, 141e9, 4.8e12),
        Device("b200", {"bf16": 2250e12, "fp8": 4500e12, "fp32": 75e12}, 180e9, 7.7e12),
        Device("rtx4090", {"bf16": 165e12, "fp8": 330e12, "fp32": 82.6e12}, 24e9, 1.01e12),
    )
}


def copy_bandwidth(device: torch.device, seconds: float = 0.2) -> float:
    """Bytes per second, read and written, of copying a large tensor on this device."""
    source = torch.ones(2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times, begin = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        target.copy_(source)
        wait_for(device)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() / min(times)


def this_machine(kind: str, precision: str) -> Device:
    """This machine's CPU or GPU (`cpu`, `cuda`), measured."""
    device = torch.device(kind)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    memory = (
        torch.cuda.get_device_properties(device).total_memory
        if kind == "cuda"
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    flops = {"fp32" if precision == "fp32" else "bf16": matmul_peak(device, dtype)}
    return Device(name_of(device), flops, float(memory), copy_bandwidth(device))


def runtime_bytes(kind: str) -> float:
    """What a training process takes before it holds a model: on a CPU Python, torch, transformers and the data's pages
    (0.63 GB measured after all is imported and packed); on a GPU the CUDA context and libraries' workspaces, about as
    much."""
    return 0.63e9 if kind == "cpu" else 0.7e9
