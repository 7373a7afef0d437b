"""Calibration data: from what a user has to batches that a model can run.

Texts and token ids become windows of at most `window` tokens; "self" means text that the model
writes itself, so that no data is needed at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from zeropoint.algorithms import ALGORITHMS, Algorithm
from zeropoint.errors import RecipeError, StateError, TextError, UnknownNameError, nearest
from zeropoint.flows.generate import context_length
from zeropoint.model.capture import Batch
from zeropoint.progress import OnStep, no_progress

SELF = "self"
SHORTEST = 4  # tokens; less says nothing about a model that reads text
_QUANTO = ("momentum", "streamline", "debug")  # options of optimum-quanto's class of this name
Data = str | Sequence[str] | Tensor | Sequence[Tensor] | Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How much calibration data to use, and what to do with it.

    tokens: at most this many, in windows of `window` tokens drawn by `seed`. batch_tokens: tokens
    in one forward pass. fold: balance activations and weights channel by channel first, where a
    norm or linear layer before can absorb the factors. propagate: share of the error of earlier
    layers that each layer's weights make up for, 0 to 1, but for those that run last in a block.
    tune_steps: of distillation afterwards, on
    the same data, in which scales, norms and biases learn the float model's answers while the codes
    stay; the best state on data held out is kept. Raises RecipeError.
    """

    tokens: int = 32768
    window: int = 512
    batch_tokens: int = 2048
    seed: int = 0
    fold: bool = True
    propagate: float = 0.5
    tune_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "window", "batch_tokens"):
            if getattr(self, name) < SHORTEST:
                raise RecipeError(f"{name}={getattr(self, name)}: use at least {SHORTEST}")
        if not 0 <= self.propagate <= 1:
            raise RecipeError(f"propagate={self.propagate} is not a share between 0 and 1")
        if self.tune_steps < 0:
            raise RecipeError(f"tune_steps={self.tune_steps}: use 0 for none, or a number of steps")

    if not TYPE_CHECKING:  # checkers read the dataclass's own signature

        def __new__(cls, *args: Any, **options: Any) -> Calibration:
            if not options.keys().isdisjoint(_QUANTO):
                _not_a_context()
            return super().__new__(cls)

        def __enter__(self) -> NoReturn:
            _not_a_context()

        def __exit__(self, *error: object) -> None:
            """`with` asks for it before it calls `__enter__`."""


def _not_a_context() -> NoReturn:
    raise StateError(
        "zp.Calibration holds the options of zp.freeze; to see the ranges of activations, write "
        "with zp.calibrate(model): model(**batch)"
    )


EFFORTS = {
    "low": Calibration(tokens=4096, propagate=0.0),  # too few to know how inputs have drifted
    "medium": Calibration(),
    "high": Calibration(tune_steps=60),
}
"""How much work a calibrated algorithm does. docs/algorithms.md has what each costs and wins."""


def of_effort(effort: str) -> Calibration:
    """The options behind a name of EFFORTS. Raises UnknownNameError."""
    if effort not in EFFORTS:
        raise UnknownNameError(f"{effort!r} is not an effort; {nearest(effort, EFFORTS)}")
    return EFFORTS[effort]


def calibration_of(
    algorithm: Algorithm, data: Data | None, effort: str | None, calibration: Calibration | None
) -> Calibration | None:
    """How an algorithm is to be calibrated, None for one that is not. Raises RecipeError where the
    arguments of `freeze` contradict it or each other.
    """
    if algorithm.needs == "nothing":
        if not (data is None and calibration is None and effort is None):
            known = [a.name for a in ALGORITHMS.values() if a.needs != "nothing"]
            raise RecipeError(
                f"algorithm={algorithm.name!r} uses no calibration data; leave data, effort and "
                f"calibration out, or use {' or '.join(repr(n) for n in known)}"
            )
        return None
    if effort is not None and calibration is not None:
        raise RecipeError(f"effort={effort!r} stands for a calibration; give one of the two")
    return calibration or of_effort(effort or "medium")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Batches, with what they are: tokens in all, and a warning when they are few."""

    batches: list[Batch]
    tokens: int
    source: str
    warnings: tuple[str, ...] = ()


def prepare(
    model: nn.Module,
    data: Data | None,
    tokenizer: Any,
    options: Calibration,
    on_step: OnStep = no_progress,
) -> Prepared:
    """Batches for the model from whatever was given. data: see `zp.freeze`; None means "self".

    Raises TextError: no tokenizer, nothing usable in it, or a model that cannot write.
    """
    if data is None or is_self(data):
        return of_written(model, write(model, options, on_step), options)
    window = window_of(model, options)
    own = getattr(model, "config", None) is None  # what its tensors mean is its own business
    if isinstance(data, Tensor) and own:
        return _from_batches(model, [data])
    if isinstance(data, Tensor):
        return _from_windows(model, _windows([data], options, window), options, window, "token ids")
    items: list[Any] = [data] if isinstance(data, str) else list(data)
    if not items:
        raise TextError("the calibration data is empty; give texts, token ids or batches")
    if all(isinstance(item, str) for item in items):
        return _from_texts(model, items, tokenizer, options, window)
    if all(isinstance(item, Tensor) for item in items):
        if own or not all(_is_ids(item) for item in items):
            return _from_batches(model, items)
        return _from_windows(model, _windows(items, options, window), options, window, "token ids")
    if all(isinstance(item, Mapping) for item in items):
        return _from_batches(model, [dict(item) for item in items])
    kinds = ", ".join(sorted({type(item).__name__ for item in items}))
    raise TextError(
        f"calibration data of {kinds} is not understood; give strings, tensors of token ids, "
        'batches (dictionaries of tensors), or "self"'
    )


def is_self(data: Data) -> bool:
    """Whether the model is to write the data itself."""
    return isinstance(data, str) and data == SELF


def of_written(model: nn.Module, ids: Tensor, options: Calibration) -> Prepared:
    """Batches of what `write` returned."""
    window = window_of(model, options)
    return _from_windows(model, list(ids), options, window, "text the model wrote itself")


def window_of(model: nn.Module, options: Calibration) -> int:
    """Tokens of a window, of which the model may not take as many as the options say."""
    return min(options.window, context_length(model) or options.window)


@torch.no_grad()
def write(model: Any, options: Calibration, on_step: OnStep) -> Tensor:
    """Text that the model writes after one random token. Returns (windows, window) int.

    The same for the same seed. Raises TextError for a model that does not write.
    """
    if not getattr(model, "can_generate", lambda: False)() or model.config.is_encoder_decoder:
        raise TextError(
            f"a {type(model).__name__} cannot write its own calibration text; give data=[texts] "
            "with tokenizer=, or batches"
        )
    window = window_of(model, options)
    count = max(1, options.tokens // window)
    device = _device(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    at_once = 32
    parts: list[Tensor] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        for start in range(0, count, at_once):
            on_step("writing calibration text", start, count)
            first = torch.randint(vocabulary, (min(at_once, count - start), 1), device=device)
            ids = model.generate(
                input_ids=first,
                attention_mask=torch.ones_like(first),
                min_new_tokens=window - 1,  # the end of a text is not the end of a window
                max_new_tokens=window - 1,
                do_sample=True,
                num_beams=1,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )
            parts.append(ids[:, :window])
    return torch.cat(parts)


def _is_ids(value: Tensor) -> bool:
    return not value.is_floating_point() and value.dim() in (1, 2)


def _device(model: nn.Module) -> torch.device:
    devices = [t.device for t in (*model.parameters(), *model.buffers())]
    return next((d for d in devices if d.type != "meta"), torch.device("cpu"))


def _from_texts(
    model: Any, texts: list[str], tokenizer: Any, options: Calibration, window: int
) -> Prepared:
    if tokenizer is None:
        raise TextError("calibration texts need a tokenizer; pass tokenizer=, or token ids")
    causal = getattr(model, "can_generate", lambda: False)()
    if causal:
        ids = [
            tokenizer(t, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
            for t in texts
            if t.strip()
        ]
        return _from_windows(model, _windows(ids, options, window), options, window, "texts")
    return _from_sentences(model, texts, tokenizer, options, window)


def _from_sentences(
    model: Any, texts: list[str], tokenizer: Any, options: Calibration, window: int
) -> Prepared:
    """Encoders read one passage at a time, with its special tokens: paragraphs, padded."""
    paragraphs = [" ".join(p.split()) for t in texts for p in t.split("\n\n")]
    paragraphs = _drawn([p for p in dict.fromkeys(paragraphs) if p], options.seed)
    chosen: list[str] = []
    tokens = 0
    for paragraph in paragraphs:
        if tokens >= options.tokens:
            break
        length = len(tokenizer(paragraph, truncation=True, max_length=window).input_ids)
        tokens += length
        chosen.append(paragraph)
    if tokens < SHORTEST:
        raise TextError(
            f"the calibration texts have {tokens} tokens; calibrating needs at least {SHORTEST}"
        )
    chosen.sort(key=len)
    batches: list[Batch] = []
    at_once = max(1, options.batch_tokens // window) * 4
    for start in range(0, len(chosen), at_once):
        encoded = tokenizer(
            chosen[start : start + at_once],
            truncation=True,
            max_length=window,
            padding=True,
            return_tensors="pt",
        )
        batches.append({k: v.to(_device(model)) for k, v in encoded.items()})
    return Prepared(batches=batches, tokens=tokens, source="texts", warnings=_few(tokens, window))


def _windows(ids: list[Tensor], options: Calibration, window: int) -> list[Tensor]:
    """Windows of the token sequences laid end to end, drawn at random; the rest only if alone.

    Rows of a (B, T) tensor are sequences of their own. Returns (T,) each, T <= window.
    """
    sequences = [row for t in ids for row in (t if t.dim() == 2 else t.unsqueeze(0))]
    joined = torch.cat(sequences) if sequences else torch.empty(0, dtype=torch.long)
    if len(joined) < SHORTEST:
        raise TextError(
            f"the calibration data has {len(joined)} tokens; calibrating needs at least {SHORTEST}"
        )
    if len(joined) < window:
        return [joined]
    whole = list(joined[: len(joined) // window * window].split(window))
    count = max(1, options.tokens // window)
    return _drawn(whole, options.seed)[:count]


def _drawn(items: list[Any], seed: int) -> list[Any]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[i] for i in order.tolist()]


def _from_windows(
    model: Any, windows: list[Tensor], options: Calibration, window: int, source: str
) -> Prepared:
    """Batches of windows of one length, which is less than `window` for a short text only."""
    length = len(windows[0])
    at_once = max(1, options.batch_tokens // length)
    config = getattr(model, "config", None)
    batches: list[Batch] = []
    for start in range(0, len(windows), at_once):
        ids = torch.stack(windows[start : start + at_once]).to(_device(model))
        if config is None:
            batches.append(ids)
        elif getattr(config, "is_encoder_decoder", False):
            half = length // 2
            batches.append({"input_ids": ids[:, :half], "decoder_input_ids": ids[:, half:]})
        else:
            batches.append({"input_ids": ids})
    tokens = length * len(windows)
    return Prepared(batches=batches, tokens=tokens, source=source, warnings=_few(tokens, window))


def _from_batches(model: nn.Module, items: list[Any]) -> Prepared:
    device = _device(model)
    batches: list[Batch] = []
    tokens = 0
    for item in items:
        moved = item.to(device) if isinstance(item, Tensor) else _moved(item, device)
        batches.append(moved)
        ids = moved if isinstance(moved, Tensor) else moved.get("input_ids")
        tokens += 0 if ids is None else ids.numel()
    return Prepared(batches=batches, tokens=tokens, source="batches")


def _moved(batch: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    return {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}


def _few(tokens: int, window: int) -> tuple[str, ...]:
    if tokens >= window:
        return ()
    return (
        f"only {tokens} calibration tokens, less than one window of {window}: "
        "the codes fit this text more than the model",
    )
