"""Weights in large pages: on a Linux CPU a pass reads all of them, and with pages of 4 kB it spends as long looking
them up.

glibc asks the kernel for large pages only where GLIBC_TUNABLES said so before the process began. So its heap is made
as long as the weights here, advised, and handed back to it untouched; what is allocated next comes out of that.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Of malloc.h. Afterwards: where glibc's own rule for what is mapped by itself, and kept once freed, comes to an end.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_MOST, _AFTER = 2**31 - 1, {_MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20, _MMAP_MAX: 65536}


@contextmanager
def large_pages(nbytes: int) -> Iterator[None]:
    """Have so many bytes of what is allocated meanwhile in large pages, if this system has them for who asks."""
    libc = _libc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, _MOST)
    try:
        if start := libc.malloc(nbytes):
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            libc.madvise(first, start + nbytes - first, mmap.MADV_HUGEPAGE)
            libc.free(start)
        yield
    finally:
        for name, value in _AFTER.items():
            libc.mallopt(name, value)


def give_back() -> None:
    """Let the system have what models that are gone have left in the heap."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def _libc() -> ctypes.CDLL | None:
    """glibc, where the kernel gives large pages to a program that asks."""
    try:
        if sys.platform != "linux" or "[never]" in MODE.read_text():
            return None
        libc = ctypes.CDLL(None)
        libc.mallopt.argtypes, libc.malloc_trim.argtypes = (ctypes.c_int, ctypes.c_int), (ctypes.c_size_t,)
    except (OSError, AttributeError):  # a kernel without them, another C library
        return None
    libc.malloc.argtypes, libc.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = (ctypes.c_void_p,), None
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc
