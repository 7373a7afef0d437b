"""What is in a tensor: range, moments, histograms of its values and of its codes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.nn import QModule
from zeropoint.qtensor import QTensor

BINS = 64
_CHUNK = 1 << 20  # elements converted to float64 at a time: 8 MB


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """counts[i] elements lie in [edges[i], edges[i + 1]); the last bin includes its right edge.

    Both are empty when there are no elements.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: {edges, counts}."""
        return {"edges": list(self.edges), "counts": list(self.counts)}


@dataclass(frozen=True, kw_only=True)
class TensorSummary:
    """One tensor, in numbers; those of a quantized weight are of what it dequantizes to.

    dtype: what the model computes with. scheme: how it is stored, None for a plain tensor.
    bytes: what it occupies. nonfinite: how many are NaN or Inf; they are left out of what follows.
    min ... std (of the population): None when nothing is left.
    codes: of a quantized weight with integer or codebook codes, one bin per code; else None.
    """

    shape: tuple[int, ...]
    dtype: str
    scheme: str | None
    elements: int
    bytes: int
    nonfinite: int
    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    values: Histogram
    codes: Histogram | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `zeropoint inspect --tensor --json` writes it."""
        codes = None if self.codes is None else self.codes.to_dict()
        lists = {"shape": list(self.shape), "values": self.values.to_dict(), "codes": codes}
        return asdict(self) | lists


def histogram(values: Tensor, bins: int = BINS) -> Histogram:
    """Equal bins from the smallest to the largest finite element. The counts are exact.

    values: any shape and real dtype. All elements equal: one bin of width 0.

    >>> histogram(torch.tensor([0.0, 1.0, 1.0, 4.0]), bins=2)
    Histogram(edges=(0.0, 2.0, 4.0), counts=(3, 1))
    """
    extremes = [(float(c.min()), float(c.max())) for c in _finite_chunks(values)]
    if not extremes:
        return Histogram(edges=(), counts=())
    low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
    if low == high:
        return Histogram(edges=(low, high), counts=(sum(len(c) for c in _finite_chunks(values)),))
    width = high / bins - low / bins  # here and below: high - low could overflow
    counts = torch.zeros(bins, dtype=torch.int64)
    for chunk in _finite_chunks(values):
        index = ((chunk / 2 - low / 2) / (width / 2)).long().clamp(0, bins - 1)
        counts += torch.bincount(index, minlength=bins)
    edges = (*(low + i * width for i in range(bins)), high)
    return Histogram(edges=edges, counts=tuple(counts.tolist()))


def code_histogram(weight: QTensor) -> Histogram | None:
    """How often each code is used. One bin per code, from code - 1/2 to code + 1/2.

    None for float8 and downcasts, whose codes are themselves numbers.
    """
    fmt = weight.scheme.fmt
    if fmt.kind not in ("integer", "codebook"):
        return None
    first = fmt.q_min if fmt.kind == "integer" else 0
    size = 1 << fmt.bits
    counts = torch.zeros(size, dtype=torch.int64)
    for chunk in torch.split(weight.codes.reshape(-1), _CHUNK):
        counts += torch.bincount(chunk.cpu().long() - first, minlength=size)
    edges = tuple(first - 0.5 + i for i in range(size + 1))
    return Histogram(edges=edges, counts=tuple(counts.tolist()))


def summarize(tensor: Tensor | QTensor) -> TensorSummary:
    """Range, moments and histograms of a tensor or of a quantized weight. Computed in float64."""
    values = tensor.dequantize(torch.float32) if isinstance(tensor, QTensor) else tensor.detach()
    count, total = 0, 0.0
    low, high = math.inf, -math.inf
    for chunk in _finite_chunks(values):
        count, total = count + len(chunk), total + float(chunk.sum())
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
    mean = total / count if count else None
    std = None
    if mean is not None:
        squares = sum(float((chunk - mean).square().sum()) for chunk in _finite_chunks(values))
        std = math.sqrt(squares / count)
    return TensorSummary(
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        scheme=str(tensor.scheme) if isinstance(tensor, QTensor) else None,
        elements=values.numel(),
        bytes=tensor.nbytes,
        nonfinite=values.numel() - count,
        min=low if count else None,
        max=high if count else None,
        mean=mean,
        std=std,
        values=histogram(values),
        codes=code_histogram(tensor) if isinstance(tensor, QTensor) else None,
    )


def named_tensors(model: nn.Module) -> dict[str, Tensor | QTensor]:
    """Parameters and buffers under all their names; frozen weights as QTensors."""
    found: dict[str, Tensor | QTensor] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{module_name}." if module_name else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[prefix + name] = tensor
        if isinstance(module, QModule) and module.frozen:
            found[f"{prefix}weight"] = module.qweight
    return found


def _finite_chunks(values: Tensor) -> Iterator[Tensor]:
    """The finite elements, as (n,) float64 on the CPU, a piece at a time; never an empty piece."""
    for chunk in torch.split(values.detach().reshape(-1), _CHUNK):
        finite = chunk.cpu().double()
        finite = finite[finite.isfinite()]
        if len(finite):
            yield finite
