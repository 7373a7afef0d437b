"""Memory that is free and still counts as the process's: pages of mapped files, and what the C
library keeps for the next allocation.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

_MAPS, _STATUS = Path("/proc/self/maps"), Path("/proc/self/status")


def resident_bytes() -> int:
    """Resident set of this program now, bytes."""
    resident = process_status("VmRSS")
    if resident is not None:
        return resident
    import psutil  # accelerate depends on it

    return int(psutil.Process().memory_info().rss)


def process_status(field: str) -> int | None:
    """A line of /proc/self/status in bytes; None where there is no such file."""
    if not _STATUS.is_file():
        return None
    lines = _STATUS.read_text().splitlines()
    line = next(row for row in lines if row.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def trim() -> None:
    """Ask the C library to give freed memory back to the system. Only glibc can."""
    if sys.platform.startswith("linux"):
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)


def collect() -> None:
    """Free what only refers to itself, and ask the C library to give it back."""
    gc.collect()
    trim()


def drop_pages(tensor: Tensor) -> None:
    """Give back the pages of a tensor that lies in a mapped file and has been read. Reading it
    again reads the file again.

    Does nothing to a tensor in memory of its own, and nothing where there is no /proc (not Linux).
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not _in_file(tensor.data_ptr()):
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > start:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED
        )


def _in_file(address: int) -> bool:
    """Whether an address lies in a file mapped for reading only, or privately and never written."""
    if not _MAPS.is_file():
        return False
    for line in _MAPS.read_text().splitlines():
        span, _, _, _, inode, *path = line.split(maxsplit=5)
        low, high = (int(part, 16) for part in span.split("-"))
        if low <= address < high:
            return inode != "0" and bool(path) and path[0].endswith(".safetensors")
    return False


@torch.no_grad()
def own_memory(module: nn.Module) -> None:
    """Copy parameters and buffers that are parts of a larger memory, so that it can be given back.
    In place.
    """
    for parameter in module._parameters.values():
        if parameter is not None and _is_part(parameter):
            parameter.data = parameter.data.clone()
    for name, buffer in module._buffers.items():
        if buffer is not None and _is_part(buffer):
            module._buffers[name] = buffer.clone()


def _is_part(tensor: Tensor) -> bool:
    if tensor.device.type == "meta":
        return False
    return tensor.untyped_storage().nbytes() > tensor.nbytes
