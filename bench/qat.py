"""Quantization-aware training: what rounding costs, and how much of it training wins back.

    python bench/qat.py REFERENCE [--cases int3,int4-scales] [--steps N]

REFERENCE is a full-precision language model. Each case is rounded to nearest, then trained
(`zp.finetune`: distillation from the float model) on the calibration half of Python's own
reference, frozen, saved, and loaded again; the loss is measured on the first windows of the other
half, before, after, and of what was loaded, which must give the same figure. One JSON line for each
case is appended to bench/results/qat.jsonl. Fails where training wins back less than half of what
rounding costs, takes longer than 30 minutes, or the loaded model differs.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, Figure, append, circumstances
from accuracy import evaluation_windows, logits_of, measure

import zeropoint as zp
from zeropoint.evaluate.text import calibration_text

SECONDS = 30 * 60
SHARE = 0.5  # of what rounding costs, that training has to win back


@dataclass(frozen=True)
class Case:
    """scheme: options of `zp.quantize`. training: options of `zp.Training`."""

    scheme: dict[str, Any]
    training: dict[str, Any]


CASES = {
    "int3": Case(
        {"weights": "int3", "group_size": 64, "learned_scale": True},
        {"steps": 80, "learning_rate": 1e-4},
    ),
    "int4-scales": Case(
        {"weights": "int4", "group_size": 64, "learned_scale": True},
        {"steps": 40, "parameters": "scales", "scale_learning_rate": 1e-2},
    ),
}


def run(
    original: Any, tokenizer: Any, case: Case, options: dict[str, Any], evaluate: Any
) -> Figure:
    """Rounded, trained, frozen, saved, loaded: the figures of each."""
    plain = {name: value for name, value in case.scheme.items() if name != "learned_scale"}
    rounded = copy.deepcopy(original)
    zp.quantize(rounded, **plain)
    zp.freeze(rounded)
    model = copy.deepcopy(original)
    zp.quantize(model, **case.scheme)
    training = zp.Training(**{"window": 256, "batch_tokens": 1024} | case.training | options)
    start = time.perf_counter()
    report = zp.finetune(
        model,
        [calibration_text()],
        tokenizer=tokenizer,
        teacher=original,
        training=training,
        on_step=_say,
    )
    seconds = time.perf_counter() - start
    zp.freeze(model)
    with tempfile.TemporaryDirectory() as folder:
        zp.save(model, Path(folder) / "model")
        loaded, _ = zp.load(Path(folder) / "model")
    return {
        "steps": len(report.losses),
        "best_step": report.best_step,
        "tokens": report.tokens,
        "seconds": round(seconds, 1),
        "held_out": report.held_out,
        "rounded": evaluate(rounded),
        "trained": evaluate(model),
        "loaded": evaluate(loaded),
        "bytes": zp.footprint(model).total_bytes,
    }


def _say(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what} {done}/{total}   ", end="", file=sys.stderr, flush=True)


def main() -> int:
    """Every case. Returns the number of those that fall short."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--windows", type=int, default=24, help="of evaluation, 512 tokens each")
    arguments = parser.parse_args()
    original, tokenizer = zp.load(arguments.reference)
    windows = evaluation_windows(tokenizer, arguments.windows)
    reference = logits_of(original, windows)
    options = {} if arguments.steps is None else {"steps": arguments.steps}
    short = 0
    for name in arguments.cases.split(","):
        figure = run(
            original,
            tokenizer,
            CASES[name],
            options,
            lambda model: measure(model, windows, reference),
        )
        before, after = (figure[k]["delta_nll"]["mean"] for k in ("rounded", "trained"))
        same = figure["loaded"] == figure["trained"]
        passed = before - after >= SHARE * before and figure["seconds"] <= SECONDS and same
        short += not passed
        figure |= {"bench": "qat", "case": name, "model": arguments.reference, "passed": passed}
        figure |= {"threads": torch.get_num_threads(), "training": CASES[name].training | options}
        append(RESULTS / "qat.jsonl", [figure], circumstances(["torch", "transformers"]))
        print(
            f"{name}: rounded {before:+.3f} nats, trained {after:+.3f} in "
            f"{figure['seconds']:.0f} s, loaded {'the same' if same else 'DIFFERS'}; "
            f"{'passed' if passed else 'FELL SHORT'}"
        )
    return short


if __name__ == "__main__":
    raise SystemExit(main())
