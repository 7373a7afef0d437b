"""Which tokens of a layer's input are padding, however the model is called.

Modules that take an attention mask are watched while the model runs: the masks they are given say
it for the layers inside them. What is called without its hooks (`model.forward`) says nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.model.capture import tokens_of

_STREAMS = ("", "decoder_")  # prefixes of `input_ids`, `inputs_embeds` and `attention_mask`


@contextmanager
def following_masks(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields a function: x (..., K) -> the rows of x that are no padding, (T, K).

    To be called by layers, in the middle of the model's forward.
    """
    open_calls: list[list[Tensor]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        open_calls.append(masks_of(_named(module, args, kwargs)))

    def after(*_: Any) -> None:
        open_calls.pop()

    handles: list[Any] = []
    for module in model.modules():
        if any(f"{s}attention_mask" in _parameters(module) for s in _STREAMS):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield lambda x: tokens_of(x, [m for masks in reversed(open_calls) for m in masks])
    finally:
        for handle in handles:
            handle.remove()


def masks_of(arguments: Mapping[str, Any]) -> list[Tensor]:
    """The (B, T) bool masks of a call: true where a token of the ids or embeddings is no padding.

    A mask that is longer than its tokens reaches back to those before them, in a cache: its last T
    columns apply. Tokens without a mask have one that keeps them all, so that no other mask of the
    same shape is taken for theirs. Masks that are not (B, T) say who sees whom, and are left out.
    """
    masks = []
    for stream in _STREAMS:
        ids = arguments.get(f"{stream}input_ids")
        embeds = arguments.get(f"{stream}inputs_embeds")
        tokens = ids if isinstance(ids, Tensor) else embeds
        shape = tokens.shape[:2] if isinstance(tokens, Tensor) and tokens.dim() > 1 else None
        mask = arguments.get(f"{stream}attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            masks.append((mask if shape is None else mask[:, -shape[1] :]).bool())
        elif mask is None and shape is not None:
            assert isinstance(tokens, Tensor)
            masks.append(torch.ones(shape, dtype=torch.bool, device=tokens.device))
    return masks


def _parameters(module: nn.Module) -> Mapping[str, Any]:
    try:
        return inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # not written in Python
        return {}


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names that the module's forward gives them."""
    return {**dict(zip(_parameters(module), args, strict=False)), **kwargs}
