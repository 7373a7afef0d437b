"""Merging adapters into quantized weights, and what it cost.

A quantized weight cannot take up an adapter exactly: the sum is quantized again. So merging is
measured, in the weights and on text, and can be undone bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from zeropoint.errors import SourceError, StateError, TextError
from zeropoint.evaluate.compare import check_answer, kind_of, logits_of
from zeropoint.evaluate.statistics import token_distances
from zeropoint.progress import OnStep, no_progress

SHORTEST = 2  # tokens of a window: one prediction
MOMENT_BYTES = 1 << 30  # of second moments at a time; more layers than that take several passes


@runtime_checkable
class Mergeable(Protocol):
    """A layer with adapters on a quantized weight, as `integrations.peft` makes them."""

    merged_adapters: list[str]

    def merge(self, safe_merge: bool = False) -> None: ...
    def watching(self) -> AbstractContextManager[None]: ...
    def merged_error(self) -> tuple[float, float]: ...
    def unmerged(self) -> AbstractContextManager[None]: ...


@dataclass(frozen=True, kw_only=True)
class MergedLayer:
    """change: |scaling B A| / |W|, what the adapter does to the weight. error: what quantizing
    again does to the sum S = W + scaling B A, |S - Q| / |S|.
    """

    name: str
    change: float
    error: float


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What merging cost. adapters: their names. tokens: predictions that were compared, 0 without a
    text.

    adapter_kl: mean KL(with adapter || base), nats: what the adapter does. merge_kl: mean KL(with
    adapter || merged), nats: what merging lost of it. None without a text.
    """

    adapters: tuple[str, ...]
    layers: tuple[MergedLayer, ...]
    tokens: int
    adapter_kl: float | None
    merge_kl: float | None

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda layer: layer.error)
        lines = [
            f"{', '.join(self.adapters)} merged into {len(self.layers)} layers; largest error "
            f"{worst.error:.2%} of the weight, of {worst.name}"
        ]
        if self.adapter_kl is not None:
            lines.append(
                f"{self.tokens} tokens: KL of the adapter to the base {self.adapter_kl:.4f}, to "
                f"the merged model {self.merge_kl:.4f}"
            )
        return "\n".join(lines)


def merge_adapter(
    model: nn.Module,
    text: str | Sequence[str] | None = None,
    *,
    tokenizer: Any = None,
    tokens: int = 4096,
    window: int = 512,
    on_step: OnStep = no_progress,
) -> MergeReport:
    """Merge the active adapters of a peft model into its quantized weights, and measure the cost.
    In place; then `model.unload()` returns the merged model without peft's layers, and
    `model.unmerge_adapter()` takes the merge back, bit for bit.

    text: of the kind that the adapter was trained for, whole or in pieces, which makes the merge
    much better: every second window calibrates it, the others measure. At most so many of its first
    `tokens` are read, in windows of at most `window` that do not overlap. Without a text the inputs
    are unknown, and only weights are compared. Raises StateError (no adapter on a quantized layer,
    or merged already; a weight that is shared), SourceError (no tokenizer, not a language model),
    TextError (too short), NonFiniteError (a broken adapter). The model is unchanged when it raises.
    """
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, Mergeable)
    }
    if not layers:
        raise StateError(
            "no quantized layer has an adapter; quantize, freeze, and call peft.get_peft_model "
            "first"
        )
    merged = next((name for name, layer in layers.items() if layer.merged_adapters), None)
    if merged is not None:
        raise StateError(f"{merged} is merged already; call model.unmerge_adapter() first")
    windows = [] if text is None else _windows(model, text, tokenizer, tokens, window)
    calibration, measured = windows[::2], windows[1::2]
    try:
        for part in _parts(list(layers.values())):
            _merge(model, part, calibration, on_step)
        for module in model.modules():  # and adapters on float layers
            if getattr(module, "merged_adapters", None) == []:
                module.merge(safe_merge=True)  # type: ignore[operator]
        layers = {name: layer for name, layer in layers.items() if layer.merged_adapters}
        names = dict.fromkeys(n for layer in layers.values() for n in layer.merged_adapters)
        errors = {name: layer.merged_error() for name, layer in layers.items()}
        kl = _distances(model, list(layers.values()), measured, on_step) if measured else None
    except BaseException:
        for module in model.modules():
            if getattr(module, "merged_adapters", None):
                module.unmerge()  # type: ignore[operator]
        raise
    return MergeReport(
        adapters=tuple(names),
        layers=tuple(MergedLayer(name=n, change=c, error=e) for n, (c, e) in errors.items()),
        tokens=sum(len(ids) - 1 for ids in measured),
        adapter_kl=None if kl is None else float(kl[0].mean()),
        merge_kl=None if kl is None else float(kl[1].mean()),
    )


def _windows(
    model: nn.Module, text: str | Sequence[str], tokenizer: Any, tokens: int, window: int
) -> list[Tensor]:
    """Token ids, (T,) each, T <= window."""
    if kind_of(model) == "encoder":
        raise SourceError(
            f"{type(model).__name__} is not a language model and gives no logits to compare; leave "
            "the text out"
        )
    if tokenizer is None:
        raise SourceError("the text needs a tokenizer; pass tokenizer=, or leave the text out")
    pieces = [text] if isinstance(text, str) else list(text)
    windows: list[Tensor] = []
    left = tokens
    for piece in pieces:
        encoded = tokenizer(piece, return_tensors="pt", add_special_tokens=False, verbose=False)
        ids = encoded.input_ids[0][:left]
        left -= len(ids)
        windows += [part for part in ids.split(window) if len(part) >= SHORTEST]
    if len(windows) == 1:
        windows = list(windows[0].tensor_split(2))
    if not windows or len(windows[-1]) < SHORTEST:
        raise TextError(
            f"the text is too short: no two windows of {SHORTEST} tokens (tokens={tokens}, "
            f"window={window})"
        )
    return windows


def _parts(layers: list[Any]) -> list[list[Any]]:
    """The layers in order, so many at a time that their moments fit `MOMENT_BYTES`."""
    parts: list[list[Any]] = [[]]
    held = 0
    for layer in layers:
        needed = 4 * layer.in_features**2 if layer.lora_A else 0
        if parts[-1] and held + needed > MOMENT_BYTES:
            parts.append([])
            held = 0
        parts[-1].append(layer)
        held += needed
    return parts


@torch.no_grad()
def _merge(
    model: Any, layers: Sequence[Mergeable], windows: Sequence[Tensor], on_step: OnStep
) -> None:
    """Merge some layers by the inputs they get while those before them are merged. In place."""
    training = model.training
    model.eval()
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.watching())
        for ids in windows:
            logits_of(model, ids)
        model.train(training)
        for done, layer in enumerate(layers):
            on_step("merging", done, len(layers))
            layer.merge(safe_merge=True)
    on_step("merging", len(layers), len(layers))


@torch.no_grad()
def _distances(
    model: Any, layers: Sequence[Mergeable], windows: Sequence[Tensor], on_step: OnStep
) -> tuple[Tensor, Tensor]:
    """KL(with adapter || base) and KL(with adapter || merged) for each token."""
    to_base, to_merged = [], []
    training = model.training
    model.eval()
    try:
        for done, ids in enumerate(windows):
            on_step("comparing", done, len(windows))
            merged, targets = logits_of(model, ids)
            with ExitStack() as stack:
                for layer in layers:
                    stack.enter_context(layer.unmerged())
                adapter, _ = logits_of(model, ids)
                with model.disable_adapter():
                    base, _ = logits_of(model, ids)
            for role, logits in (("adapter", adapter), ("base", base), ("merged model", merged)):
                check_answer(role, "logits", logits, f"tokens of piece {done}")
            to_base.append(token_distances(adapter, base, targets).kl)
            to_merged.append(token_distances(adapter, merged, targets).kl)
    finally:
        model.train(training)
    on_step("comparing", len(windows), len(windows))
    return torch.cat(to_base), torch.cat(to_merged)
