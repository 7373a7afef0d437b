"""Norms, gates and attention of published models as transformers computes them, and by `zp.fuse`.

    python bench/fused.py [--tokens M ...] [--threads N ...] [--isa NAME]

Modules of SmolLM2-135M's and Llama-3.2-1B's sizes, bfloat16 and float32, data in the cache. The
linear layers of gate and attention take no time. A single token comes after 512 others, several
tokens come first. Both answers are compared before they are timed; sides take turns. One JSON line
a figure is appended to bench/results/fused.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from _common import (
    RESULTS,
    Figure,
    Watch,
    append,
    circumstances,
    progress,
    show,
    speedup,
    summary,
    take_turns,
)
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

import zeropoint as zp
from zeropoint import native

FILE = RESULTS / "fused.jsonl"
SECONDS, MOST_CALLS = 0.01, 100  # of one sample, about; a cache grows by a token a call
CACHED = 512  # tokens before a single one


class Sizes(NamedTuple):
    """Of a published model: the stream, the gate, heads of 64, those of keys and values."""

    width: int
    inner: int
    heads: int
    kv_heads: int


MODELS = {
    "SmolLM2-135M": Sizes(width=576, inner=1536, heads=9, kv_heads=3),
    "Llama-3.2-1B": Sizes(width=2048, inner=8192, heads=32, kv_heads=8),
}
Inputs = Callable[[int], tuple[Any, ...]]  # of so many tokens, made anew


class Given(nn.Module):
    """A linear layer that takes no time: N values a token, whatever it is given."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.values = torch.randn(1, CACHED, n).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.values[:, : x.shape[1]]


def subjects(sizes: Sizes, dtype: torch.dtype) -> dict[str, tuple[nn.Module, nn.Module, Inputs]]:
    """What is measured: as transformers computes it, fused, and what it is called with."""
    config = LlamaConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        num_hidden_layers=1,
    )
    config._attn_implementation = "sdpa"
    norm, mlp = LlamaRMSNorm(sizes.width, eps=1e-5), LlamaMLP(config)
    nn.init.normal_(norm.weight)
    attention = LlamaAttention(config, layer_idx=0).eval()
    rotary = LlamaRotaryEmbedding(config)
    plain = {"norm": norm.to(dtype), "gate": mlp, "attention": attention}
    holder = nn.ModuleDict(plain)
    assert zp.fuse(holder).count == len(plain)
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (nn.Identity() for _ in range(3))
    attention.q_proj, attention.o_proj = Given(sizes.heads * 64, dtype), nn.Identity()
    attention.k_proj, attention.v_proj = (Given(sizes.kv_heads * 64, dtype) for _ in range(2))

    def stream(tokens: int) -> tuple[Tensor]:
        return (torch.randn(1, tokens, sizes.width).to(dtype),)

    def gate(tokens: int) -> tuple[Tensor]:
        return (torch.randn(1, tokens, sizes.inner).to(dtype),)

    def cached(tokens: int) -> tuple[Any, ...]:
        past, cache = CACHED if tokens == 1 else 0, DynamicCache(config=config)
        if past:
            cache.update(*torch.randn(2, 1, sizes.kv_heads, past, 64).to(dtype), 0)
        (x,) = stream(tokens)
        positions = rotary(x, torch.arange(past, past + tokens)[None])
        return x, positions, None, cache if past else None

    inputs: dict[str, Inputs] = {"norm": stream, "gate": gate, "attention": cached}
    return {kind: (plain[kind], holder[kind], inputs[kind]) for kind in plain}


def walk(module: nn.Module, inputs: Inputs, tokens: int, times: int) -> float:
    """Seconds of a call."""
    given = inputs(tokens)
    start = time.perf_counter()
    for _ in range(times):
        module(*given)
    return (time.perf_counter() - start) / times


def answer(module: nn.Module, given: tuple[Any, ...]) -> Tensor:
    y = module(*copy.deepcopy(given))
    return y[0] if isinstance(y, tuple) else y


def measure(
    plain: nn.Module, fused: nn.Module, inputs: Inputs, tokens: int, dtype: torch.dtype, rounds: int
) -> Figure:
    """Both sides by turns."""
    given = inputs(tokens)
    expected, found = answer(plain, given), answer(fused, given)
    atol = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    times = min(MOST_CALLS, max(1, int(SECONDS / walk(plain, inputs, tokens, 3))))
    sides = {"torch": plain, "fused": fused}
    turns = {name: partial(walk, side, inputs, tokens, times) for name, side in sides.items()}
    samples = take_turns(turns, rounds)
    figure: Figure = {"tokens": tokens}
    figure |= {f"{name}_seconds": summary(seconds) for name, seconds in samples.items()}
    return figure | {
        "x": str(dtype).removeprefix("torch."),
        "different": float((found != expected).float().mean()),
        "speedup": speedup(samples["fused"], samples["torch"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512], metavar="M")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count()], metavar="N")
    parser.add_argument("--isa", help="instruction set, as zeropoint doctor names it")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if args.isa is not None:
        native.use_instruction_set(args.isa)
    torch.manual_seed(0)
    figures = []
    with torch.inference_mode(), Watch() as watch:
        for threads in args.threads:
            torch.set_num_threads(threads)
            for model, sizes in MODELS.items():
                for dtype in (torch.bfloat16, torch.float32):
                    for kind, subject in subjects(sizes, dtype).items():
                        progress(f"{kind} of {model}, {dtype}, {threads} threads")
                        for tokens in args.tokens:
                            figure = measure(*subject, tokens, dtype, args.rounds)
                            where = {"module": kind, "model": model, "threads": threads}
                            figures.append(where | figure)
    about = circumstances(("torch", "transformers")) | {
        "isa": native.instruction_set(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }
    append(FILE, figures, about | watch.figures)
    rows = [
        [
            f"{f['module']} of {f['model']}, {f['x']}",
            f["tokens"],
            f["threads"],
            *(f"{f[f'{side}_seconds']['median'] * 1e6:.1f}" for side in ("torch", "fused")),
            f"{f['speedup']:.1f}",
            f"{f['different']:.1%}",
        ]
        for f in figures
    ]
    columns = ["", "tokens", "threads", "torch µs", "fused µs", "times as fast", "different values"]
    show(f"{native.instruction_set()}, from the cache", columns, rows)
    print(watch)


if __name__ == "__main__":
    main()
