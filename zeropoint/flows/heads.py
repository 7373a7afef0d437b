"""Which attention heads a model needs least: `zp.head_importance`, for `zp.prune_heads`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.errors import NonFiniteError, RecipeError, StateError, TextError
from zeropoint.flows.data import Calibration, Data, prepare
from zeropoint.model.attention import Attention
from zeropoint.model.heads import check_understood, known_attentions
from zeropoint.progress import OnStep, no_progress


@dataclass(frozen=True, kw_only=True)
class HeadImportance:
    """How much the loss depends on each head. `print(importance)` shows the table.

    layers: as `zp.prune_heads` calls them. scores: (layers, heads) float64 >= 0, heads by their
    original numbers, NaN where a layer has no such head. groups: of each layer, the heads that
    share a key and value head. examples: the loss is of so many.
    """

    layers: tuple[int | str, ...]
    scores: Tensor
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    examples: int

    def least(self, n: int) -> dict[int | str, list[int]]:
        """The n least important heads, as `zp.prune_heads` takes them.

        Heads that share a key and value head go together, by their mean; the best of each layer
        stay. Raises RecipeError when there is no such set of n heads.
        """
        mean = [
            [float(row[list(group)].mean()) for group in groups]
            for row, groups in zip(self.scores, self.groups, strict=True)
        ]
        candidates = sorted(
            (score, layer, place)
            for layer, scores in enumerate(mean)
            for place, score in enumerate(scores)
            if place != scores.index(max(scores))
        )
        chosen: dict[int | str, list[int]] = {}
        left = n
        for _, layer, place in candidates:
            group = self.groups[layer][place]
            if len(group) <= left:
                chosen.setdefault(self.layers[layer], []).extend(group)
                left -= len(group)
        if left or not chosen:
            sizes = sorted({len(group) for groups in self.groups for group in groups})
            most = sum(len(self.groups[layer][place]) for _, layer, place in candidates)
            raise RecipeError(
                f"n={n} heads cannot go: they go {' or '.join(map(str, sizes))} at a time, and "
                f"{most} at most, because every layer keeps its best"
            )
        return {layer: sorted(heads) for layer, heads in chosen.items()}

    def __str__(self) -> str:
        width = max(len(str(layer)) for layer in self.layers)
        rows = [
            f"{layer!s:>{width}}  " + " ".join("     -" if s != s else f"{s:6.3f}" for s in scores)
            for layer, scores in zip(self.layers, self.scores.tolist(), strict=True)
        ]
        return "\n".join(rows)

    __repr__ = __str__  # what a bare call shows in a notebook


def head_importance(
    model: nn.Module,
    data: Data | None = None,
    *,
    tokenizer: Any = None,
    calibration: Calibration | None = None,
    normalize: bool = True,
    on_step: OnStep = no_progress,
) -> HeadImportance:
    """How much the loss changes with the share of each head. I_h = E |dL / d mask_h|.

    mask_h multiplies the head's output and is 1; the mean is over examples, one at a time. For
    float, live and frozen models, one backward pass for each example.

    data: for a model that writes, texts (with tokenizer=), token ids, or "self", text of its own,
    which is the default; for others batches with labels. calibration: how much of it is used
    (tokens, window, seed). normalize: divide the scores of each layer by their l2 norm, as the
    paper does.

    Raises StateError (no attention module that is known, one that is not understood, no loss),
    TextError (unusable data, no labels), NonFiniteError. Source: Michel et al. 2019,
    arXiv:1905.10650, section 4.1.
    """
    found = list(known_attentions(model).values())
    for attention in found:
        check_understood(attention)
    prepared = prepare(model, data, tokenizer, calibration or Calibration(), on_step)
    batches = [_with_labels(model, batch) for batch in prepared.batches]
    examples = [example for batch in batches for example in _split(batch)]
    sums = [torch.zeros(a.heads, dtype=torch.float64) for a in found]
    for done, example in enumerate(examples):
        on_step("importance of heads", done, len(examples))
        for total, gradient in zip(sums, _gradients(model, found, example), strict=True):
            total += gradient.double().cpu().abs()
    on_step("", len(examples), len(examples))
    scores = torch.full((len(found), max(max(a.kept) for a in found) + 1), torch.nan).double()
    for row, attention, total in zip(scores, found, sums, strict=True):
        mean = total / len(examples)
        row[list(attention.kept)] = mean / mean.norm().clamp_min(1e-300) if normalize else mean
    return HeadImportance(
        layers=tuple(a.label for a in found),
        scores=scores,
        groups=tuple(a.groups for a in found),
        examples=len(examples),
    )


def _with_labels(model: Any, batch: Any) -> dict[str, Tensor]:
    """The batch with labels: a model that writes is to predict its input."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return dict(batch)
    writes = getattr(model, "can_generate", lambda: False)()
    if not isinstance(batch, Mapping) or not writes or model.config.is_encoder_decoder:
        raise TextError(
            f"the loss of a {type(model).__name__} needs labels; give batches, dictionaries of "
            "tensors, with labels"
        )
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    return {**batch, "labels": ids.masked_fill(mask == 0, -100)}  # -100: not counted


def _split(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    for i in range(len(batch["labels"])):
        yield {name: tensor[i : i + 1] for name, tensor in batch.items()}


def _gradients(
    model: Any, found: Sequence[Attention], example: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    """dL / d mask of each attention module, (heads,)."""
    with torch.enable_grad(), masked(found) as masks:
        loss = getattr(model(**example), "loss", None)
        if loss is None:
            raise StateError(
                f"a {type(model).__name__} computes no loss; load it with a head, by "
                "zp.load(source, task=...)"
            )
        if not torch.isfinite(loss):
            raise NonFiniteError(f"the loss of an example is {loss.item()}; leave it out")
        gradients: tuple[Tensor, ...] = torch.autograd.grad(loss, masks)
    return gradients


@contextmanager
def masked(found: Sequence[Attention]) -> Iterator[list[Tensor]]:
    """Every head's output is multiplied by a mask of ones inside. Yields the masks, (heads,)
    each.
    """
    masks, handles = [], []
    for attention in found:
        device = next(
            t.device for t in (*attention.output.parameters(), *attention.output.buffers())
        )
        mask = torch.ones(attention.heads, device=device, dtype=torch.float64, requires_grad=True)
        masks.append(mask)

        def multiply(
            _: nn.Module, args: tuple[Any, ...], mask: Tensor = mask, size: int = attention.head_dim
        ) -> tuple[Any, ...]:
            x = args[0]
            return (x * mask.to(x.dtype).repeat_interleave(size), *args[1:])

        handles.append(attention.output.register_forward_pre_hook(multiply))
    try:
        yield masks
    finally:
        for handle in handles:
            handle.remove()
