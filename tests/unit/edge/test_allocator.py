"""Freed memory is kept within bounds, and what is kept apart is a copy of its own."""

from __future__ import annotations

import gc
import math
import subprocess
import sys

import pytest
import torch

from fedra_edge.training.allocator import own_mapping
from fedra_edge.training.torch_keeping import kept_apart

_MEGABYTE = 10**6
_KEEP_AND_GIVE_BACK = f"""
import ctypes, sys
from fedra_edge.memory_meter import resident_bytes
from fedra_edge.training.allocator import (
    keep_freed_memory, return_freed_memory, trim_heap_beyond
)
return_freed_memory()
keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
before = resident_bytes()
buffers = [library.malloc({_MEGABYTE}) for _ in range(64)]
for buffer in buffers:
    ctypes.memset(buffer, 1, {_MEGABYTE})
for buffer in buffers:
    library.free(buffer)
trim_heap_beyond(float(sys.argv[1]) * {_MEGABYTE} + before)
print(resident_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="says how glibc treats its heap")
@pytest.mark.parametrize(
    ("may_grow_mb", "kept_mb"), [(math.inf, (60, 70)), (80.0, (60, 70)), (40.0, (-1, 10))]
)
def test_freed_memory_is_kept_as_long_as_the_process_occupies_what_it_may(
    may_grow_mb: float, kept_mb: tuple[float, float]
) -> None:
    command = [sys.executable, "-c", _KEEP_AND_GIVE_BACK, str(may_grow_mb)]
    grown = int(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    least_mb, most_mb = kept_mb
    assert least_mb <= grown / _MEGABYTE <= most_mb


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_tensor_kept_apart_is_the_same_and_shares_nothing(dtype: torch.dtype) -> None:
    original = torch.arange(24).reshape(2, 3, 4).transpose(0, 2).to(dtype)
    apart = kept_apart(original)
    assert apart.dtype == dtype
    assert torch.equal(apart, original)
    apart.zero_()
    assert original.any()


def test_a_tensor_kept_apart_needs_no_gradient_and_stands_alone() -> None:
    leaf = torch.ones(3, requires_grad=True)
    apart = kept_apart(leaf * 2)
    del leaf
    gc.collect()
    assert not apart.requires_grad
    assert apart.tolist() == [2.0, 2.0, 2.0]


def test_memory_of_its_own_is_zeroed_and_may_be_written() -> None:
    mapping = own_mapping(5000)
    assert mapping[:] == bytes(5000)
    mapping[4999] = 1
    assert mapping[4999] == 1
