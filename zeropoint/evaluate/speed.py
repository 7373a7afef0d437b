"""How fast a model runs on this machine: prefill, decode, loading, memory."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch

from zeropoint.errors import KernelError, SourceError, TextError
from zeropoint.evaluate.memory import peak_rss_bytes
from zeropoint.evaluate.text import evaluation_text
from zeropoint.flows.fuse import fuse
from zeropoint.model.load import load
from zeropoint.model.walk import quantized_modules
from zeropoint.progress import OnStep, no_progress

PREFILLS = 5


@dataclass(frozen=True, kw_only=True)
class Speed:
    """prefill: prompt_tokens at once, median of 5 runs after a warm-up. decode: one token at a time
    after the prompt, from the median time of a token. load_seconds: from the call to a model that
    can run. peak_rss_bytes: of the process since it started, loading included. kernels: number of
    modules each kernel serves; "float" is torch's own. refused: kernels that would
    have been faster, why they were not used, and for how many modules. fused: modules that
    `zp.fuse` replaced.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    load_seconds: float
    peak_rss_bytes: int
    threads: int
    kernels: dict[str, int]
    refused: list[str]
    fused: int
    prompt_tokens: int
    new_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `zeropoint bench --json` writes it."""
        return asdict(self)


def bench(
    source: str,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    threads: int | None = None,
    dtype: str = "auto",
    fused: bool = False,
    on_step: OnStep = no_progress,
) -> Speed:
    """Load a causal language model, fuse it where that is asked for (`zp.fuse`), and time it.
    For an honest peak_rss_bytes, call it in a fresh process.

    threads: for torch.set_num_threads, restored afterwards; None leaves it. dtype: as `zp.load`.
    Raises SourceError (not a causal language model), TextError (more tokens than the model's
    context), KernelError (there is no native library to fuse with).
    """
    if prompt_tokens < 1 or new_tokens < 2:
        raise TextError(
            f"prompt_tokens={prompt_tokens}, new_tokens={new_tokens}: need at least 1 and 2 to "
            "time anything"
        )
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        on_step("loading", 0, 1)
        start = time.perf_counter()
        model, tokenizer = load(source, dtype)
        fusion = fuse(model) if fused else None
        if fusion is not None and fusion.refused is not None:
            raise KernelError(str(fusion))
        load_seconds = time.perf_counter() - start
        ids = benchmark_prompt(model, tokenizer, source, prompt_tokens, new_tokens)
        with torch.inference_mode():
            prefill = time_prefill(model, ids, on_step)
            decode = time_decode(model, ids, new_tokens, on_step)
        return Speed(
            prefill_tokens_per_second=prompt_tokens / prefill,
            decode_tokens_per_second=1 / decode,
            load_seconds=load_seconds,
            peak_rss_bytes=peak_rss_bytes(),
            threads=torch.get_num_threads(),
            kernels=_kernels(model),
            refused=_refused(model),
            fused=0 if fusion is None else fusion.count,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
        )
    finally:
        torch.set_num_threads(before)


def benchmark_prompt(
    model: Any, tokenizer: Any, source: str, prompt_tokens: int, new_tokens: int
) -> torch.Tensor:
    if tokenizer is None or not model.can_generate() or model.config.is_encoder_decoder:
        raise SourceError(
            f"{source} is a {type(model).__name__}; bench times causal language models"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise TextError(
            f"prompt_tokens={prompt_tokens} + new_tokens={new_tokens} is more than the model's "
            f"context of {limit}"
        )
    ids = tokenizer(evaluation_text(), return_tensors="pt", verbose=False).input_ids
    repeats = -(-prompt_tokens // ids.shape[1])
    prompt: torch.Tensor = ids.repeat(1, repeats)[:, :prompt_tokens]
    return prompt


def time_prefill(model: Any, ids: torch.Tensor, on_step: OnStep = no_progress) -> float:
    """Median seconds of a forward over the prompt. ids: (1, T) int.

    Only the last logits are computed, as `generate` does it.
    """
    seconds = []
    for run in range(PREFILLS + 1):
        on_step("prefill", run, PREFILLS + 1)
        start = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])  # the first warms up


def time_decode(
    model: Any, ids: torch.Tensor, new_tokens: int, on_step: OnStep = no_progress
) -> float:
    """Median seconds of one greedy step after the prompt. ids: (1, T) int."""
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    seconds = []
    for step in range(new_tokens):
        on_step("decode", step, new_tokens)
        token = output.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _refused(model: torch.nn.Module) -> list[str]:
    modules = quantized_modules(model).values()
    reasons = Counter((name, why) for m in modules for name, why in m.refused.items())
    return [f"{name}: {why} ({count} modules)" for (name, why), count in reasons.items()]


def _kernels(model: torch.nn.Module) -> dict[str, int]:
    modules = quantized_modules(model)
    counts = Counter(m.kernel or "live" for m in modules.values())
    floats = sum(isinstance(m, (torch.nn.Linear, torch.nn.Embedding)) for m in model.modules())
    return dict(counts) | ({"float": floats} if floats else {})
