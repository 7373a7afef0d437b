"""Footprint: the bytes a model holds, module by module, tied tensors once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from zeropoint.model.walk import owned_tensors, quantized_modules, weight_elements


@dataclass(kw_only=True)
class Node:
    """One module. bytes: of everything below it. kind: its class. scheme: how it is quantized, or
    None.
    """

    name: str
    kind: str
    scheme: str | None
    bytes: int = 0
    by_dtype: dict[str, int] = field(default_factory=dict)
    children: dict[str, Node] = field(default_factory=dict)

    def add(self, nbytes: int, dtype: str) -> None:
        """Count a tensor."""
        self.bytes += nbytes
        self.by_dtype[dtype] = self.by_dtype.get(dtype, 0) + nbytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data, recursively."""
        children = [child.to_dict() for child in self.children.values()]
        return {k: v for k, v in vars(self).items() if k != "children"} | {"children": children}


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a model. parameter_bytes + buffer_bytes = total_bytes; a frozen module's parts are
    buffers.

    parameters: numbers the model stands for, quantized ones included. bits_per_weight: 8 *
    total_bytes / parameters.
    by_dtype: bytes by torch dtype. root: the tree. `print(footprint)` shows it.
    """

    total_bytes: int
    parameter_bytes: int
    buffer_bytes: int
    parameters: int
    by_dtype: dict[str, int]
    root: Node

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each parameter of the model, everything included."""
        return 8 * self.total_bytes / max(1, self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `zeropoint inspect --json` writes it."""
        return {
            "total_bytes": self.total_bytes,
            "parameter_bytes": self.parameter_bytes,
            "buffer_bytes": self.buffer_bytes,
            "parameters": self.parameters,
            "bits_per_weight": self.bits_per_weight,
            "by_dtype": dict(self.by_dtype),
            "modules": self.root.to_dict(),
        }

    def __str__(self) -> str:
        dtypes = ", ".join(f"{d} {b / 1e6:,.1f}" for d, b in self.by_dtype.items())
        head = (
            f"{self.total_bytes / 1e6:,.1f} MB for {self.parameters / 1e6:,.1f} M parameters, "
            f"{self.bits_per_weight:.2f} bits per weight (MB by dtype: {dtypes})"
        )
        rows = list(_rows(self.root, self.total_bytes, 0))
        width = max(len(label) for label, _ in rows)
        return "\n".join([head, *(f"{label:<{width}}  {size}" for label, size in rows)])


def footprint(model: nn.Module) -> Footprint:
    """Count the bytes a model really holds: parameters and buffers, by dtype, tied tensors once,
    under their first name.
    """
    quantized = quantized_modules(model)
    root = Node(name="", kind=type(model).__name__, scheme=None)
    parameters = {name for name, _ in model.named_parameters()}
    held = {"parameter": 0, "buffer": 0}
    for name, tensor in owned_tensors(model):
        held["parameter" if name in parameters else "buffer"] += tensor.nbytes
        dtype = str(tensor.dtype).removeprefix("torch.")
        node = root
        node.add(tensor.nbytes, dtype)
        path = name.split(".")[:-1]
        for i, leaf in enumerate(path):
            full = ".".join(path[: i + 1])
            if leaf not in node.children:
                scheme = str(quantized[full].scheme) if full in quantized else None
                kind = type(model.get_submodule(full)).__name__
                node.children[leaf] = Node(name=full, kind=kind, scheme=scheme)
            node = node.children[leaf]
            node.add(tensor.nbytes, dtype)
    _sort(root, {name: i for i, (name, _) in enumerate(model.named_modules())})
    return Footprint(
        total_bytes=root.bytes,
        parameter_bytes=held["parameter"],
        buffer_bytes=held["buffer"],
        parameters=weight_elements(model),
        by_dtype=dict(root.by_dtype),
        root=root,
    )


def _sort(node: Node, order: dict[str, int]) -> None:
    """Put children into the order of the model's modules; tensors came parameters first."""
    node.children = dict(sorted(node.children.items(), key=lambda c: order.get(c[1].name, 0)))
    for child in node.children.values():
        _sort(child, order)


def _rows(node: Node, total: int, depth: int) -> Any:
    """(label, size) of a node and what is below it; equal siblings with consecutive numbers are one
    row.
    """
    name = node.name.rpartition(".")[2] or node.kind
    yield _row("  " * depth + name, node, total, 1)
    for names, child in _runs(node):
        if len(names) == 1:
            yield from _rows(child, total, depth + 1)
            continue
        label = "  " * (depth + 1) + f"{names[0]} ... {names[-1]}, each"
        yield _row(label, child, total, len(names))
        for _, grandchild in _runs(child):
            yield from _rows(grandchild, total, depth + 2)


def _row(label: str, node: Node, total: int, times: int) -> tuple[str, str]:
    share = node.bytes * times / max(1, total)
    size = f"{node.bytes / 1e6:>10,.2f} MB {share:>6.1%}  "
    return label, size + (node.scheme or "/".join(node.by_dtype))


def _runs(node: Node) -> list[tuple[list[str], Node]]:
    """Children, with runs of numbered children of the same bytes and kind taken together."""
    runs: list[tuple[list[str], Node]] = []
    for name, child in node.children.items():
        if runs and name.isdigit() and runs[-1][0][-1].isdigit() and _alike(runs[-1][1], child):
            runs[-1][0].append(name)
        else:
            runs.append(([name], child))
    return runs


def _alike(a: Node, b: Node) -> bool:
    same = (a.kind, a.bytes, a.by_dtype, a.scheme) == (b.kind, b.bytes, b.by_dtype, b.scheme)
    return same and list(a.children) == list(b.children)
