"""Norms and gates of published models as transformers computes them, and fused by `zp.fuse`.

    python bench/fused.py [--tokens M ...] [--threads N ...] [--isa NAME]

Modules of SmolLM2-135M's and Llama-3.2-1B's widths, bfloat16 and float32, data in the cache. A gate
is the perceptron with linear layers that return what they are given, so that only the activation
and the product are left. Both answers are compared before they are timed; sides take turns. One
JSON line a figure is appended to bench/results/fused.jsonl.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial

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
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import zeropoint as zp
from zeropoint import native

FILE = RESULTS / "fused.jsonl"
WIDTHS = {"SmolLM2-135M": (576, 1536), "Llama-3.2-1B": (2048, 8192)}  # of the stream, of the gate
SECONDS = 0.01  # of one sample, about


def modules(width: int, inner: int, dtype: torch.dtype) -> dict[str, tuple[nn.Module, int]]:
    """What is measured, with the width of its input."""
    config = LlamaConfig(hidden_size=64, intermediate_size=128)
    mlp = LlamaMLP(config)
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (nn.Identity() for _ in range(3))
    norm = LlamaRMSNorm(width, eps=1e-5)
    nn.init.normal_(norm.weight)
    return {"norm": (norm.to(dtype), width), "gate": (mlp, inner)}


def walk(module: nn.Module, x: Tensor, times: int) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    for _ in range(times):
        module(x)
    return (time.perf_counter() - start) / times


def measure(
    kind: str, module: nn.Module, width: int, tokens: int, dtype: torch.dtype, rounds: int
) -> Figure:
    """Both sides by turns."""
    x = torch.randn(1, tokens, width).to(dtype)
    holder = nn.ModuleList([module])
    expected = module(x)
    assert zp.fuse(holder).refused is None
    (fused,) = holder
    assert fused is not module
    torch.testing.assert_close(fused(x), expected)
    times = max(1, int(SECONDS / walk(module, x, 3)))
    sides = {"torch": module, "fused": fused}
    turns = {name: partial(walk, side, x, times) for name, side in sides.items()}
    samples = take_turns(turns, rounds)
    figure: Figure = {"module": kind, "width": width, "tokens": tokens}
    figure |= {f"{name}_seconds": summary(seconds) for name, seconds in samples.items()}
    return figure | {
        "x": str(dtype).removeprefix("torch."),
        "different": float((fused(x) != expected).float().mean()),
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
            for model, (width, inner) in WIDTHS.items():
                for dtype in (torch.bfloat16, torch.float32):
                    for kind, (module, columns) in modules(width, inner, dtype).items():
                        progress(f"{kind} of {model}, {dtype}, {threads} threads")
                        for tokens in args.tokens:
                            figure = measure(kind, module, columns, tokens, dtype, args.rounds)
                            figures.append({"model": model, "threads": threads} | figure)
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
