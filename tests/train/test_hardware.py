"""Threads, memory settings, and the measured peak."""

import torch

from train.hardware import keep_memory, matmul_peak, multiplies_bf16, use_threads


def test_threads_are_shared_between_processes(monkeypatch):
    before = torch.get_num_threads()
    try:
        assert use_threads(1) == 1
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert use_threads() == 2
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
        assert use_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_keep_memory_is_repeatable():
    keep_memory()
    keep_memory()
    assert torch.zeros(1 << 20).sum() == 0


def test_peak_and_bf16():
    cpu = torch.device("cpu")
    assert 1e9 < matmul_peak(cpu, torch.float32, seconds=0.05) < 1e14
    assert isinstance(multiplies_bf16(cpu), bool)
