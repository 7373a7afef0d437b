"""A safetensors file whose layout is known before its tensors are, so that they can be written as
they are made, in any order and from several threads.

The library's own writer wants all tensors of a file in memory. What it would write for the same
tensors differs from this only in the order of the metadata, which it shuffles.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8  # bytes; where the data begins


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything lies in a file. header: its first bytes. spans: first byte and one past the
    last of each tensor, from the beginning of the file. size: of the file.
    """

    header: bytes
    spans: Mapping[str, tuple[int, int]]
    size: int


def layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Layout:
    """The file of these tensors, which may be on the meta device: wide numbers first, then by name,
    so that every tensor is aligned.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    spans: dict[str, tuple[int, int]] = {}
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        end = position + tensor.itemsize * math.prod(tensor.shape)
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        spans[name] = position, end
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    start = len(header)
    return Layout(
        header=header,
        spans={name: (start + a, start + b) for name, (a, b) in spans.items()},
        size=start + position,
    )


class Shard:
    """An open file of a layout. `put` may be called from several threads."""

    def __init__(self, path: Path, plan: Layout) -> None:
        """Create the file, or open one that was begun and keep what it holds: whether that is of
        this layout is known by checksums. Raises OSError.
        """
        self.path, self.layout = path, plan
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if os.fstat(self._file).st_size != plan.size:
            os.ftruncate(self._file, plan.size)
        if self._read(0, len(plan.header)) != plan.header:
            self._write(0, memoryview(plan.header))

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor to its place. Raises OSError."""
        data = as_bytes(tensor)
        start, end = self.layout.spans[name]
        assert len(data) == end - start, f"{name} has {len(data)} bytes, not {end - start}"
        self._write(start, data)

    def get(self, name: str) -> bytes:
        """What lies in a tensor's place."""
        start, end = self.layout.spans[name]
        return self._read(start, end - start)

    def flush(self) -> None:
        """Put the file on the disk, from where `get` then reads it. Raises OSError."""
        os.fsync(self._file)
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Flush the file to the disk, and close it. Raises OSError."""
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)

    def _write(self, position: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._file, data, position)
            position, data = position + written, data[written:]

    def _read(self, position: int, size: int) -> bytes:
        return os.pread(self._file, size, position)


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as they lie in memory, row by row."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """One file of tensors that are all there. Raises OSError."""
    shard = Shard(path, layout(tensors, metadata))
    try:
        for name, tensor in tensors.items():
            shard.put(name, tensor)
    finally:
        shard.close()
