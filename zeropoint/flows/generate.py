"""Greedy continuation of a text, refused in words where the model has no room or no head for it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.errors import SourceError, TextError
from zeropoint.progress import OnStep, no_progress

# What configurations call the longest sequence that their positions reach.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a model wrote.

    text: prompt and continuation; of an encoder-decoder, which does not continue, the answer alone.
    prompt_tokens, new_tokens: their numbers. seconds: prefill and decode together.
    """

    text: str
    continuation: str
    prompt_tokens: int
    new_tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `zeropoint generate --json` writes it."""
        return asdict(self)


def context_length(model: nn.Module) -> int | None:
    """The longest sequence, in tokens, that the model's configuration allows; None: no limit."""
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", lambda: config)()
    found = (getattr(text_config, key, None) for key in _CONTEXT_KEYS)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 50,
    on_step: OnStep = no_progress,
) -> Generation:
    """Continue `prompt` by the likeliest token, again and again.

    Until the model ends, or has written max_new_tokens. Raises SourceError (a model that does not
    write text, no tokenizer), TextError (the prompt is empty, or has no room in the model's context
    beside max_new_tokens).
    """
    if max_new_tokens < 1:
        raise TextError(f"max_new_tokens={max_new_tokens}: ask for at least 1")
    writer: Any = model  # a transformers model, whose `generate` its stubs do not describe
    if not getattr(writer, "can_generate", lambda: False)():
        raise SourceError(
            f"a {type(model).__name__} does not write text; generate needs a causal or an "
            "encoder-decoder language model"
        )
    if tokenizer is None:
        raise SourceError("the model comes without a tokenizer, so a prompt cannot be read")
    inputs = tokenizer(prompt, return_tensors="pt", verbose=False)
    prompt_tokens = inputs.input_ids.shape[1]
    answers = bool(writer.config.is_encoder_decoder)
    _check_room(context_length(model), prompt_tokens, max_new_tokens, answers)
    device = next(t.device for t in (*model.parameters(), *model.buffers()))
    start = time.perf_counter()
    with torch.inference_mode():
        tokens: Tensor = writer.generate(
            input_ids=inputs.input_ids.to(device),
            attention_mask=inputs.attention_mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,  # of sampling; set in a configuration, they only cause warnings
            top_p=None,
            top_k=None,
            streamer=_Counter(max_new_tokens, on_step),
        )[0]
    seconds = time.perf_counter() - start
    head = 1 if answers else prompt_tokens  # an encoder-decoder's output has its start token first
    continuation = text = _decode(tokenizer, tokens[head:])
    if not answers:
        text = _decode(tokenizer, tokens)
        before = _decode(tokenizer, tokens[:head])
        if text.startswith(before):  # decoded alone, it may lose the space between the two
            continuation = text.removeprefix(before)
    return Generation(
        text=text,
        continuation=continuation,
        prompt_tokens=prompt_tokens,
        new_tokens=len(tokens) - head,
        seconds=seconds,
    )


def _check_room(limit: int | None, prompt_tokens: int, max_new_tokens: int, answers: bool) -> None:
    if prompt_tokens == 0:
        raise TextError("the prompt is empty; give some text to continue")
    if limit is None:
        return
    if prompt_tokens > limit:
        raise TextError(
            f"the prompt has {prompt_tokens:,} tokens, but the model's context is {limit:,}; "
            "shorten the prompt"
        )
    needed = max_new_tokens if answers else prompt_tokens + max_new_tokens
    if needed > limit:
        raise TextError(
            f"the prompt's {prompt_tokens:,} tokens leave no room for {max_new_tokens:,} new ones: "
            f"the model's context is {limit:,}; "
            f"ask for at most {limit - (0 if answers else prompt_tokens):,}"
        )


def _decode(tokenizer: Any, tokens: Tensor) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


class _Counter:
    """What transformers calls a streamer: told the prompt first, then every new token."""

    def __init__(self, total: int, on_step: OnStep) -> None:
        self._done, self._total, self._on_step = -1, total, on_step

    def put(self, tokens: Tensor) -> None:
        self._done += 1
        self._on_step("writing", self._done, self._total)

    def end(self) -> None:
        self._on_step("writing", self._total, self._total)
