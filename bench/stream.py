"""A checkpoint larger than the memory it takes: `zeropoint quantize` beside copying the same files.

    python bench/stream.py                     # 12 GB of bfloat16, and 3.5 GB of output
    python bench/stream.py --gigabytes 2 --weights nf4 int8

A Llama-shaped checkpoint of random weights (4096 wide) is written to --folder and removed
afterwards; with less free disk than twice its size nothing is measured. Copying (with fsync) and
quantizing take turns, each on a cold page cache as far as one may drop it. Each run of the command
is a new process, whose peak memory is the kernel's own count. One JSON line each is appended to
bench/results/stream.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _common import RESULTS, append, circumstances
from transformers import LlamaConfig

from zeropoint.checkpoints.shard import write_file

FILE = RESULTS / "stream.jsonl"
WIDTH, VOCABULARY = 4096, 32000
LIMIT_BYTES = 400_000_000  # and three times the largest tensor: what is promised


def layer(i: int, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a layer; 436 MB in bfloat16 when 4096 wide."""
    prefix, hidden = f"model.layers.{i}.", 7 * width // 2
    return {
        prefix + "self_attn.q_proj.weight": (width, width),
        prefix + "self_attn.k_proj.weight": (width // 4, width),
        prefix + "self_attn.v_proj.weight": (width // 4, width),
        prefix + "self_attn.o_proj.weight": (width, width),
        prefix + "mlp.gate_proj.weight": (hidden, width),
        prefix + "mlp.up_proj.weight": (hidden, width),
        prefix + "mlp.down_proj.weight": (width, hidden),
        prefix + "input_layernorm.weight": (width,),
        prefix + "post_attention_layernorm.weight": (width,),
    }


def nbytes(shapes: dict[str, tuple[int, ...]]) -> int:
    return 2 * sum(torch.Size(shape).numel() for shape in shapes.values())


def write_checkpoint(folder: Path, gigabytes: float, width: int = WIDTH) -> None:
    """One file a layer. The values are one random block over and over, which costs no time."""
    ends = {
        "model.embed_tokens.weight": (VOCABULARY, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (VOCABULARY, width),
    }
    count = max(1, round((gigabytes * 1e9 - nbytes(ends)) / nbytes(layer(0, width))))
    noise = (0.02 * torch.randn(1 << 20)).bfloat16()
    groups = [ends, *(layer(i, width) for i in range(count))]
    weight_map = {}
    for i, shapes in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            numel = torch.Size(shape).numel()
            tensors[name] = noise.repeat(-(-numel // len(noise)))[:numel].view(shape)
        write_file(folder / file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=7 * width // 2,
        vocab_size=VOCABULARY,
        num_hidden_layers=count,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)


def forget(folder: Path) -> None:
    """Ask the kernel to drop the folder's pages from its cache."""
    os.sync()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(source: Path, target: Path) -> float:
    """Seconds to copy the files, on the disk when it returns."""
    target.mkdir()
    start = time.perf_counter()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        descriptor = os.open(target / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def quantize(source: Path, target: Path, weights: str) -> dict:
    """What the command says of itself, and the seconds it took, Python's start included."""
    report = target.with_suffix(".json")
    command = [sys.executable, "-m", "zeropoint", "quantize", str(source), "-o", str(target)]
    start = time.perf_counter()
    subprocess.run([*command, "--weights", weights, "--json", str(report)], check=True)
    seconds = time.perf_counter() - start
    data = json.loads(report.read_text())
    keys = ("bytes_before", "bytes_after", "bits_per_weight", "peak_rss_bytes")
    return {"wall_seconds": seconds} | {key: data[key] for key in keys}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=12.0)
    parser.add_argument("--weights", nargs="+", default=["int4"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="zeropoint-bench-") as name:
        root = Path(name)
        needed = 2.2e9 * arguments.gigabytes
        free = shutil.disk_usage(root).free
        if free < needed:
            print(f"nothing measured: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} are needed")
            return
        source = root / "source"
        source.mkdir()
        write_checkpoint(source, arguments.gigabytes)
        largest = 2 * VOCABULARY * WIDTH
        figures = []
        for weights in arguments.weights:
            copies, runs = [], []
            for _ in range(arguments.rounds):
                forget(source)
                copies.append(copy(source, root / "copy"))
                shutil.rmtree(root / "copy")
                forget(source)
                runs.append(quantize(source, root / "out", weights))
                shutil.rmtree(root / "out")
            figure = {
                "bench": "stream",
                "weights": weights,
                "bytes_read": runs[0]["bytes_before"],
                "bytes_written": runs[0]["bytes_after"],
                "copy_seconds": copies,
                "quantize_seconds": [run["wall_seconds"] for run in runs],
                "ratio_to_copy": statistics.median(
                    run["wall_seconds"] / seconds for run, seconds in zip(runs, copies, strict=True)
                ),
                "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
                "peak_rss_allowed": 3 * largest + LIMIT_BYTES,
            }
            figures.append(figure)
            read, written, peak, allowed = (
                figure[key] / 1e9
                for key in ("bytes_read", "bytes_written", "peak_rss_bytes", "peak_rss_allowed")
            )
            print(
                f"{weights}: {read:.1f} GB -> {written:.1f} GB, {figure['ratio_to_copy']:.2f} x "
                f"copying ({statistics.median(copies):.0f} s), peak memory {peak:.2f} GB "
                f"(allowed {allowed:.2f})"
            )
        append(FILE, figures, circumstances(("torch", "safetensors")))


if __name__ == "__main__":
    main()
