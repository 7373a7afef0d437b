"""Which module's output channels can absorb a scale of a linear layer's input channels.

x_j w_j = (x_j / s_j) (w_j s_j). The second factor goes into the columns of the linear layers that
read x; the first into whatever produced x: the weight of a norm, or the rows of a linear layer that
reaches x channel by channel (the values of attention, the up branch of a gated perceptron).

Edges are proposed from the shapes and the data flow of one block and *verified*: the block is run
with random factors folded in, and an edge is one when the output stays the same. So no architecture
is listed, (1 + w) norms and grouped-query attention are found like any other, and what only looks
like an edge (keys and queries behind a softmax, a gate behind a SiLU) is not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zeropoint.nn import QConv1D, quantized_type

TOLERANCE = 1e-3  # of what the block adds to a token; float32 noise is 100 times smaller
FACTOR_RANGE = 0.7  # random factors are exp(-0.7) to exp(0.7): half to double


Run = Callable[[], tuple[Tensor, Tensor]]
"""Runs the block: its input and its output, two of (B, T, C) float32."""
Kind = Literal["weight", "one plus weight", "rows"]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One edge. producer, consumers: names inside the block.

    kind: what is divided: "weight", the weight and bias of a norm; "one plus weight", of a norm
    that multiplies by 1 + w; "rows" and bias of a linear layer. channel: (K,) int, the producer's
    channel behind each input column of the consumers.
    """

    producer: str
    consumers: tuple[str, ...]
    kind: Kind
    channel: Tensor


def matrix(module: nn.Module) -> Tensor:
    """The weight of a float linear layer as (N, K), sharing its memory."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if quantized_type(module) is QConv1D else weight


@torch.no_grad()
def apply(block: nn.Module, fold: Fold, factors: Tensor) -> Tensor:
    """Divide the producer's channels by `factors` and multiply the consumers' columns. In place.

    factors: (channels of the producer,) float > 0. Returns those of the columns, (K,).
    """
    producer: Any = block.get_submodule(fold.producer)
    s = factors.to(producer.weight)
    if fold.kind == "rows":
        matrix(producer).div_(s.unsqueeze(1))
    elif fold.kind == "weight":
        producer.weight.div_(s)
    else:
        producer.weight.copy_((producer.weight + 1) / s - 1)
    bias = getattr(producer, "bias", None)
    if isinstance(bias, Tensor):
        bias.div_(s)
    columns = s[fold.channel]
    for name in fold.consumers:
        matrix(block.get_submodule(name)).mul_(columns)
    return columns


@torch.no_grad()
def find_folds(
    block: nn.Module,
    groups: list[list[nn.Module]],
    run: Run,
    allowed: Callable[[nn.Module], bool],
    *,
    seed: int = 0,
) -> list[Fold]:
    """The verified edges of a block, at most one for each group of layers with one input.

    groups: from `capture.sharing`.
    allowed: whether a module may change; all of an edge's must. The block is as it was afterwards.
    """
    names = {m: n for n, m in block.named_modules()}
    made = _outputs(block, groups, run)
    expected = run()
    folds = []
    for number, group in enumerate(groups):
        if not all(allowed(m) for m in group):
            continue
        earlier = [m for g in groups[:number] for m in g if allowed(m)]
        norms = [m for m in made[group[0]] if allowed(m)]
        consumers = tuple(names[m] for m in group)
        for fold in _proposals(names, group, consumers, earlier, norms, block):
            if _holds(block, [fold], run, expected, seed):
                folds.append(fold)
                break
    return folds


@torch.no_grad()
def hold(block: nn.Module, folds: Sequence[Fold], run: Run, *, seed: int = 0) -> bool:
    """Whether edges found in another block are edges of this one: all of them verified at once."""
    return _holds(block, folds, run, run(), seed)


def _holds(
    block: nn.Module, folds: Sequence[Fold], run: Run, expected: tuple[Tensor, Tensor], seed: int
) -> bool:
    generator = torch.Generator().manual_seed(seed)
    changed = dict.fromkeys(n for f in folds for n in (f.producer, *f.consumers))
    with restored(p for n in changed for p in block.get_submodule(n).parameters(recurse=False)):
        for fold in folds:
            channels = _channels(block.get_submodule(fold.producer), fold.kind)
            factors = torch.rand(channels, generator=generator).mul_(2 * FACTOR_RANGE)
            apply(block, fold, factors.sub_(FACTOR_RANGE).exp_().to(expected[1].device))
        return unchanged(expected, run())


def unchanged(
    expected: tuple[Tensor, Tensor], answer: tuple[Tensor, Tensor], tolerance: float = TOLERANCE
) -> bool:
    """Whether a block's output is what it was. Each: its input and its output, (B, T, C) float."""
    (before, after), (_, found) = expected, answer
    size = (after - before).norm(dim=-1).clamp_min(1e-12)
    distance = ((found - after).norm(dim=-1) / size).mean()
    return bool(distance < tolerance)  # NaN is no edge


def shared_factors(fold: Fold, values: Tensor, channels: int) -> Tensor:
    """The mean of a per-column quantity over the columns that one producer channel feeds.

    values: (K,) float; returns (channels,).
    """
    total = torch.zeros(channels, dtype=values.dtype, device=values.device)
    channel = fold.channel.to(values.device)
    count = torch.zeros_like(total).index_add_(0, channel, torch.ones_like(values))
    return total.index_add_(0, channel, values) / count.clamp_min(1)


def _channels(producer: nn.Module, kind: str) -> int:
    assert isinstance(producer.weight, Tensor)
    return matrix(producer).shape[0] if kind == "rows" else len(producer.weight)


def _outputs(
    block: nn.Module, groups: list[list[nn.Module]], run: Callable[[], Any]
) -> dict[nn.Module, list[nn.Module]]:
    """For the first layer of each group, the modules whose output is its very input."""
    outputs: list[tuple[nn.Module, Tensor]] = []
    found: dict[nn.Module, list[nn.Module]] = {g[0]: [] for g in groups}

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((module, output))

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            found[module] = [m for m, out in outputs if out is args[0]]

    handles: list[Any] = [g[0].register_forward_pre_hook(before) for g in groups]
    handles += [m.register_forward_hook(after) for m in block.modules() if is_norm(m)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether it has a weight per channel, and may so multiply its output by it."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def _proposals(
    names: dict[nn.Module, str],
    group: list[nn.Module],
    consumers: tuple[str, ...],
    earlier: list[nn.Module],
    norms: list[nn.Module],
    block: nn.Module,
) -> Iterator[Fold]:
    columns = matrix(group[0]).shape[1]
    identity = torch.arange(columns)
    for norm in norms:
        assert isinstance(norm.weight, Tensor)
        if len(norm.weight) == columns:
            kinds: tuple[Kind, ...] = ("weight", "one plus weight")
            for kind in kinds:
                yield Fold(
                    producer=names[norm],
                    consumers=consumers,
                    kind=kind,
                    channel=identity,
                )
    for module in reversed(earlier):
        rows = matrix(module).shape[0]
        if columns % rows:
            continue
        for channel in _channel_maps(rows, columns, block):
            yield Fold(producer=names[module], consumers=consumers, kind="rows", channel=channel)


def _channel_maps(rows: int, columns: int, block: nn.Module) -> Iterator[Tensor]:
    """Channel behind each column: the same one, or with every head of values read by several heads.

    Column (kv * repeats + r) * d + i reads channel kv * d + i, d being the size of a head.
    """
    if rows == columns:
        yield torch.arange(columns)
        return
    sizes = {getattr(m, "head_dim", None) for m in block.modules()}
    for d in sorted(s for s in sizes if isinstance(s, int) and s > 0 and rows % s == 0):
        column = torch.arange(columns)
        yield column // (d * (columns // rows)) * d + column % d


@contextmanager
def restored(parameters: Iterable[Tensor | None]) -> Iterator[None]:
    """Put back the very bits of parameters that are changed meanwhile; None are passed over."""
    saved = [(p, p.detach().clone()) for p in parameters if p is not None]
    try:
        yield
    finally:
        for parameter, value in saved:
            parameter.copy_(value)
