"""A list of tensors that need not be in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import overload

from safetensors.torch import load_file, save_file
from torch import Tensor


class Shelf(Sequence[Tensor]):
    """Tensors, of which the first ones are in memory and each of the others in a file.

    folder: for the files; made when the first is. memory_bytes: how much may be in memory.
    """

    def __init__(self, folder: Path, memory_bytes: int) -> None:
        self._folder = folder
        self._limit = memory_bytes
        self._held: list[Tensor | None] = []  # None: in a file

    def append(self, tensor: Tensor) -> None:
        """Put a tensor at the end. Raises OSError."""
        self._held.append(None)
        self[len(self) - 1] = tensor

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        self._held[index] = None
        held = sum(t.nbytes for t in self._held if t is not None)
        if held + tensor.nbytes <= self._limit:
            self._held[index] = tensor
            self._file(index).unlink(missing_ok=True)
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({"x": tensor.contiguous()}, self._file(index))

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        held = self._held[index]
        if held is not None:
            return held
        # A copy: the file is written again while what was read from it may still be in use.
        stored: Tensor = load_file(self._file(range(len(self))[index]))["x"]
        return stored.clone()

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def clear(self) -> None:
        """Remove everything, and the folder if nothing else is in it."""
        for index in range(len(self)):
            self._file(index).unlink(missing_ok=True)
        self._held = []
        with suppress(OSError):
            self._folder.rmdir()

    def _file(self, index: int) -> Path:
        return self._folder / f"hidden-{index:06d}.safetensors"
