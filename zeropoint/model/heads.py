"""Removing attention heads: `zp.prune_heads`, and the same again when a pruned model is loaded.

What was removed is in `config.pruned_heads`, {layer: [heads]}, as transformers 4 had it. The sizes
in the configuration stay those of the model as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.errors import CheckpointError, RecipeError, StateError, nearest
from zeropoint.model.attention import (
    HEADS,
    KEY_VALUE_HEADS,
    LAYOUTS,
    WIDTHS,
    Attention,
    attentions,
)
from zeropoint.model.replace import replace_module
from zeropoint.model.surgery import Snapshot, SurgeryReport
from zeropoint.nn import QLinear, quantized_type
from zeropoint.nn.exchange import exchange

Heads = Mapping[int | str, Iterable[int]]


def prune_heads(model: nn.Module, heads: Heads) -> SurgeryReport:
    """Remove attention heads from the projections of a float, live or frozen model. In place.

    The logits are then those of the whole model with the outputs of these heads at 0. Codes are
    never rounded again: rows and columns of a frozen weight are taken as they are. Where columns
    tear groups, groups get smaller, each with the scale it had; 8-bit scales become float32. The
    report says where. A live weight finds its grid again, among the values that are left. The heads
    are recorded in `model.config.pruned_heads`, which `zp.load` reads.

    heads: {layer: [heads]}. A layer is its number, or the name of its attention module in the base
    model where one number is not enough (T5: "encoder.block.0.layer.0.SelfAttention"). Heads are
    numbered as in the model before any was pruned, and those that are gone already are passed over.
    Heads that share a key and value head go together.

    Raises StateError (no attention module that is known, or one that cannot be pruned) and
    RecipeError (no such layer or head, all heads of a layer, part of a group). The model is
    unchanged when it raises. Source: Michel et al. 2019, arXiv:1905.10650, section 2.
    """
    before = Snapshot.of(model)
    _prune(model, heads)
    return before.compared(model)


def restore_pruned(model: nn.Module) -> None:
    """Prune a model as its configuration says, which changes nothing where it is pruned already.
    In place. Raises CheckpointError when the model cannot be what the configuration says.
    """
    wanted: Any = getattr(getattr(model, "config", None), "pruned_heads", None)
    if wanted:
        labels = {attention.label for attention in attentions(model)}
        try:
            layers = {int(k) if str(k).isdigit() else k: v for k, v in wanted.items()}
            _prune(model, {k: v for k, v in layers.items() if k in labels})
        except (AttributeError, RecipeError, StateError) as e:
            raise CheckpointError(f"pruned_heads={wanted!r} in the configuration: {e}") from e


def known_attentions(model: nn.Module) -> dict[int | str, Attention]:
    """The attention modules whose heads can be told apart, by label. Raises StateError: none."""
    found = {attention.label: attention for attention in attentions(model)}
    if not found:
        raise StateError(
            f"{type(model).__name__} has no attention module whose heads are known; known are "
            f"those with {'; '.join(str(layout) for layout in LAYOUTS)}"
        )
    return found


def check_understood(attention: Attention) -> None:
    """Raises StateError when an attention module has something that may belong to heads."""
    if attention.obstacle is not None:
        raise StateError(
            f"{attention.names[0]}: heads of this {type(attention.module).__name__} cannot be "
            f"pruned: {attention.obstacle}"
        )


def _prune(model: nn.Module, heads: Heads) -> None:
    found = known_attentions(model)
    kept = {label: _kept(found, label, gone) for label, gone in heads.items()}
    for label, places in kept.items():
        _apply(model, found[label], places)
    config: Any = getattr(model, "config", None)
    pruned = {a.label: list(a.pruned) for a in attentions(model) if a.pruned}
    if config is not None and pruned:
        config.pruned_heads = pruned


def _kept(
    found: Mapping[int | str, Attention], label: int | str, heads: Iterable[int]
) -> list[int]:
    """The places of the heads that a layer keeps, in the order they have now."""
    if label not in found:
        names = [str(known) for known in found]
        raise RecipeError(f"there is no layer {label!r}; {nearest(str(label), names)}")
    if not isinstance(heads, Iterable):
        raise RecipeError(f"layer {label!r}: {heads!r} is not a list of heads; write [{heads!r}]")
    gone = {*heads}
    attention = found[label]
    check_understood(attention)
    count = attention.heads + len(attention.pruned)
    for head in gone:
        if not isinstance(head, int) or isinstance(head, bool) or not 0 <= head < count:
            raise RecipeError(f"layer {label!r} has no head {head!r}; it had 0 to {count - 1}")
    for group in attention.groups:
        if gone & {*group} and not {*group} <= gone:
            raise RecipeError(
                f"layer {label!r}: heads {', '.join(map(str, group))} share a key and value head; "
                "prune all of them, or none"
            )
    places = [place for place, head in enumerate(attention.kept) if head not in gone]
    if not places:
        raise RecipeError(f"layer {label!r} would lose all of its {count} heads; keep one")
    return places


def _apply(model: nn.Module, attention: Attention, places: list[int]) -> None:
    """Keep the heads at these places. In place."""
    module: Any = attention.module
    size, shared = attention.head_dim, attention.shared
    if len(places) == attention.heads:
        return
    width = attention.heads * size
    queries = _spread(places, size)
    key_values = _spread([p // shared for p in places[::shared]], size)
    rows = {
        "apart": (queries, key_values, key_values),
        "thirds": (torch.cat([queries + third * width for third in range(3)]),),
        "heads": (_spread(places, 3 * size),),
    }[attention.layout.rows]
    for projection, indices in zip(attention.inputs, rows, strict=True):
        _take_rows(projection, indices)
    _take_columns(attention.output, queries)
    sizes = dict.fromkeys(HEADS, (attention.heads, len(places)))
    sizes |= dict.fromkeys(KEY_VALUE_HEADS, (attention.heads // shared, len(places) // shared))
    sizes |= dict.fromkeys(WIDTHS, (width, len(queries)))
    for name, (old, new) in sizes.items():
        if getattr(module, name, None) == old:
            setattr(module, name, new)
    remaining = [attention.kept[place] for place in places]
    count = attention.heads + len(attention.pruned)
    module.pruned_heads = tuple(head for head in range(count) if head not in remaining)
    if attention.layout.shares_bias is not None:
        from zeropoint.model.shared_bias import with_some_columns

        replace_module(model, attention.names, with_some_columns(module, remaining, count))


def _spread(places: list[int], size: int) -> Tensor:
    """The indices of what is at these places, `size` each. Returns (len(places) * size,) int."""
    return (torch.tensor(places).unsqueeze(1) * size + torch.arange(size)).view(-1)


def _take_rows(module: Any, indices: Tensor) -> None:
    """Keep these output features of a linear layer, and of its bias. In place."""
    if isinstance(module, QLinear) and module.frozen:
        exchange(module, module.qweight.rows(indices.to(module.qweight.device)))
    else:
        _put(module, _float_weight(module)[indices])
    bias = module.bias
    if bias is not None:
        module.bias = _parameter(bias.detach()[indices], bias)


def _take_columns(module: Any, indices: Tensor) -> None:
    """Keep these input features of a linear layer. In place."""
    if isinstance(module, QLinear) and module.frozen:
        exchange(module, module.qweight.columns(indices.to(module.qweight.device)))
    else:
        _put(module, _float_weight(module)[:, indices])


def _float_weight(module: Any) -> Tensor:
    """(N, K) of a live or float linear layer."""
    if isinstance(module, QLinear):
        return module.float_weight().detach()
    kind = quantized_type(module)
    assert kind is not None
    return kind.from_layout(module.weight.detach())


def _put(module: Any, weight: Tensor) -> None:
    """Give a live or float linear layer another weight. weight: (N, K). In place."""
    kind = type(module) if isinstance(module, QLinear) else quantized_type(module)
    assert kind is not None
    parameter = _parameter(kind.from_layout(weight), module.weight)
    if isinstance(module, QLinear):
        scheme = module.scheme
        if scheme.group_size is not None:
            scheme = replace(scheme, group_size=math.gcd(scheme.group_size, weight.shape[1]))
        exchange(module, parameter, scheme)
        return
    module.weight = parameter
    names = ("out_features", "in_features") if isinstance(module, nn.Linear) else ("nf", "nx")
    for name, size in zip(names, weight.shape, strict=True):
        setattr(module, name, size)


def _parameter(values: Tensor, old: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(values.contiguous(), requires_grad=old.requires_grad)
