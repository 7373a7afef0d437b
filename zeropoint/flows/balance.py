"""Balance of activations and weights inside one block, before its weights are quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zeropoint.algorithms.fold import balance
from zeropoint.model import capture, graph
from zeropoint.model.capture import first_of, tokens_of
from zeropoint.model.passage import Passage
from zeropoint.observers import MeanSquareObserver

FOLD_TOKENS = 2048  # enough for a mean square of each channel


class Balanced(NamedTuple):
    """An edge, and what the consumers' columns were multiplied by and their inputs divided: (K,)"""

    fold: graph.Fold
    columns: Tensor


@torch.no_grad()
def balance_block(
    passage: Passage,
    groups: list[list[nn.Module]],
    known: Sequence[graph.Fold],
    dtypes: dict[str, torch.dtype],
    *,
    may_change: Callable[[nn.Module], bool],
    helped: Callable[[nn.Module], bool],
    seed: int,
) -> list[Balanced]:
    """Balance activations and weights over the block's edges. In place; the block's function stays.

    groups: layers of one input, from `capture.sharing`. known: edges of the block before, which are
    likely to be this one's. dtypes: that parameters will be stored in. may_change: modules that may
    be an edge's end. helped: layers whose format gains by it. Returns the edges.
    """

    def run() -> tuple[Tensor, Tensor]:
        return passage.example, first_of(passage.run_example())

    block = passage.block
    names = {m: n for n, m in block.named_modules()}
    mine = {tuple(names[m] for m in g): g for g in groups if all(may_change(m) for m in g)}
    modules = dict(block.named_modules())
    alike = known and all(
        f.consumers in mine and f.producer in modules and may_change(modules[f.producer])
        for f in known
    )
    if alike and graph.hold(block, known, run, seed=seed):
        folds = list(known)
    else:
        folds = graph.find_folds(block, groups, run, may_change, seed=seed)
    folds = [f for f in folds if any(helped(m) for m in mine[f.consumers])]
    observers = {
        mine[f.consumers][0]: MeanSquareObserver(len(f.channel), passage.example.device)
        for f in folds
    }
    seen = 0
    for i in range(len(passage)):
        if seen >= FOLD_TOKENS or not folds:
            break
        inputs = capture.inputs_of(observers, partial(passage.run, i))
        for module, x in inputs.items():
            observers[module].update(tokens_of(x, passage.stream.keep[i]))
        seen += passage.stream.hidden[i].shape[:-1].numel()
    done = []
    for fold in folds:
        group = mine[fold.consumers]
        activations = observers[group[0]].result()
        if torch.isfinite(activations).all():
            factors = _factors(block, fold, group, activations)
            producer = block.get_submodule(fold.producer)
            factors = _storable(producer, fold, factors, dtypes[f"{fold.producer}.weight"])
            done.append(Balanced(fold, graph.apply(block, fold, factors)))
    return done


def _factors(
    block: nn.Module, fold: graph.Fold, group: list[nn.Module], activations: Tensor
) -> Tensor:
    """One factor for each channel of the producer. activations: (K,) mean squares."""
    producer: Any = block.get_submodule(fold.producer)
    channels = len(graph.matrix(producer)) if fold.kind == "rows" else len(producer.weight)
    weights = torch.cat([graph.matrix(m).float().square() for m in group]).mean(0).double()
    return balance(
        graph.shared_factors(fold, activations, channels),
        graph.shared_factors(fold, weights, channels),
    )


def _storable(producer: Any, fold: graph.Fold, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Factors for which the norm's new weight is a number of its own dtype: then folding is exact
    in a model of 16 bits, too.
    """
    if fold.kind == "rows" or dtype == torch.float32:
        return factors
    shift = 1.0 if fold.kind == "one plus weight" else 0.0
    old = producer.weight.double() + shift
    new = (old / factors - shift).to(dtype).double() + shift
    return torch.where(new != 0, old / torch.where(new != 0, new, 1.0), 1.0).abs().clamp_min(1e-6)
