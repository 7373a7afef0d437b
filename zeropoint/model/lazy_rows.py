"""A weight too large to hold as float, whose rows are made when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

ReadRows = Callable[[int, int], Tensor]
_aten = torch.ops.aten


class LazyRows(Tensor):
    """Behaves as the (N, K) tensor of all rows, which any operation makes at once. Whoever can work
    row by row takes `parts()`, and the whole never exists. A cast stays lazy.

    read: (first row, one past the last) -> the rows, on the CPU.
    """

    _read: ReadRows
    _rows_at_once: int

    @staticmethod
    def __new__(
        cls, shape: tuple[int, int], dtype: torch.dtype, read: ReadRows, rows_at_once: int
    ) -> LazyRows:
        lazy: LazyRows = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        lazy._read, lazy._rows_at_once = read, rows_at_once
        return lazy

    def parts(self) -> Iterator[Tensor]:
        """All rows, in order, some at a time."""
        for start in range(0, self.shape[0], self._rows_at_once):
            yield self._read(start, min(start + self._rows_at_once, self.shape[0]))

    def whole(self) -> Tensor:
        """The plain tensor."""
        rows = torch.empty(self.shape, dtype=self.dtype)
        start = 0
        for part in self.parts():
            rows[start : start + len(part)] = part
            start += len(part)
        return rows

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten.detach.default:  # nn.Parameter asks for it
            return args[0]._cast(args[0].dtype)
        if func is _aten._to_copy.default and "dtype" in kwargs and _on_cpu(kwargs):
            return args[0]._cast(kwargs["dtype"])
        args, kwargs = tree_map_only(LazyRows, LazyRows.whole, (args, kwargs))
        return func(*args, **kwargs)

    def _cast(self, dtype: torch.dtype) -> LazyRows:
        def read(start: int, stop: int) -> Tensor:
            return self._read(start, stop).to(dtype)

        return LazyRows((self.shape[0], self.shape[1]), dtype, read, self._rows_at_once)


def _on_cpu(kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is None or torch.device(device).type == "cpu"


def make_whole(model: nn.Module) -> None:
    """Plain parameters in the places of lazy ones; shared ones stay shared. In place."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, LazyRows):
                key = id(parameter)
                if key not in made:
                    made[key] = nn.Parameter(parameter.whole(), parameter.requires_grad)
                module._parameters[name] = made[key]
