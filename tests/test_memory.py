"""Host memory: freed tensors stay with the process until it gives them back."""

import subprocess
import sys

import pytest

from calibquant.solver.memory import _of_glibc

PROGRAM = """
import gc, torch
from calibquant.solver.memory import keep_freed_memory, return_freed_memory

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024  # MiB

keep_freed_memory()
gc.disable()
tensors = [torch.ones(2**24) for _ in range(8)]  # 64 MiB each
full = resident()
cycle = tensors[::2]
cycle.append(cycle)
tensors = tensors[1::2]  # holes between what stays
held = resident()
del cycle
gc.collect()
kept = resident()
cycle = tensors[::2]
cycle.append(cycle)
tensors = tensors[1::2]
del cycle
return_freed_memory()
print(full - held, full - kept, full - resident())
"""


@pytest.mark.skipif(_of_glibc("malloc_trim") is None, reason="needs glibc")
def test_freed_memory_is_kept_until_it_is_given_back():
    """In a process of its own: what is asked of malloc holds for all of it."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    held, kept, returned = map(float, ended.stdout.split())
    assert abs(held) < 32 and abs(kept) < 32
    assert returned > 6 * 64 - 32
