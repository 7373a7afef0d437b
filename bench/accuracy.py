"""The accuracy ladder: every rung on one checkpoint, at the same bytes, on text it has not seen.

    python bench/accuracy.py REFERENCE [--rungs rtn,gptq] [--settings int4-g64] [--tokens N]

REFERENCE is a full-precision language model (a model whose weights lie on a 4-bit grid already
would flatter every rung). Calibration text is the calibration half of Python's own reference,
or what the model writes itself; the answer is measured on the first windows of the other half,
which no rung sees. Embedding and head are int8 per row, but for `budget-75MB`, which chooses for
them as well, on the calibration text; its own losses are in the line. One JSON line for every rung
and setting is appended to bench/results/accuracy.jsonl; `--targets` fails where the best rung
misses its target.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zeropoint as zp
from zeropoint.evaluate.statistics import TokenDistances, block_bootstrap, token_distances
from zeropoint.evaluate.text import calibration_text, evaluation_text
from zeropoint.flows.data import Calibration

RESULTS = Path(__file__).parent / "results" / "accuracy.jsonl"
WINDOW = 512
SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "int4-g64": {"weights": "int4", "group_size": 64},
    "int4-g32": {"weights": "int4", "group_size": 32},
    "int3-g64": {"weights": "int3", "group_size": 64},
    "int3-g32": {"weights": "int3", "group_size": 32},
    "int2-g32": {"weights": "int2", "group_size": 32},
    "nf4-g64": {"weights": "nf4"},
    "float8": {"weights": "float8_e4m3fn"},
    "budget-75MB": {"budget": "75MB"},  # of the whole model; int3-g64 takes 73.4 MB
}
TARGETS = {"int8": 0.004, "int4-g64": 0.05, "int4-g32": 0.035, "int3-g64": 0.24, "int3-g32": 0.18}


@dataclass(frozen=True)
class Rung:
    """algorithm and its options; own: calibrated on text the model writes itself."""

    algorithm: str
    options: dict[str, Any] | None = None
    own: bool = False


RUNGS = {
    "rtn": Rung("rtn"),
    "mse": Rung("mse"),
    "gptq": Rung("gptq", {"fold": False}),
    "gptq+fold": Rung("gptq", {"fold": True}),
    "gptq+fold+qep": Rung("gptq", {"fold": True, "propagate": 0.5}),
    "gptq+fold self": Rung("gptq", {"fold": True}, own=True),
    "gptq+fold+qep self": Rung("gptq", {"fold": True, "propagate": 0.5}, own=True),
}


@torch.no_grad()
def logits_of(model: Any, windows: list[Tensor]) -> list[Tensor]:
    """(T, V) float32 for each window."""
    return [model(input_ids=w[None], use_cache=False).logits[0, :-1].float() for w in windows]


def evaluation_windows(tokenizer: Any, count: int) -> list[Tensor]:
    """The first windows of the text that nothing is calibrated or trained on. (T,) int each."""
    ids = tokenizer(
        evaluation_text(), return_tensors="pt", add_special_tokens=False, verbose=False
    ).input_ids[0]
    return list(ids.split(WINDOW))[:count]


def measure(model: Any, windows: list[Tensor], reference: list[Tensor]) -> dict[str, Any]:
    """Paired distances from the reference over all windows, one window in memory at a time."""
    parts = []
    for window, expected in zip(windows, reference, strict=True):
        parts.append(token_distances(expected, logits_of(model, [window])[0], window[1:]))
    d = TokenDistances(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return {
        "tokens": len(d.kl),
        "reference_perplexity": float(d.reference_nll.mean().exp()),
        "delta_nll": block_bootstrap(d.candidate_nll - d.reference_nll)._asdict(),
        "kl": float(d.kl.mean()),
        "top1_agreement": float(d.same_top.double().mean()),
    }


def run(
    original: Any, tokenizer: Any, rung: Rung, setting: str, arguments: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """Quantize a copy of the model. Returns it, and what that took."""
    model = copy.deepcopy(original)
    start = time.perf_counter()
    how = SETTINGS[setting]
    data = "self" if rung.own else [calibration_text()]
    if "budget" in how:
        how = how | {"data": data, "tokenizer": tokenizer}
    spent = zp.quantize(model, **how)
    if rung.options is None:
        report = zp.freeze(model, rung.algorithm)
    else:
        options = Calibration(tokens=arguments.tokens, seed=arguments.seed, **rung.options)
        report = zp.freeze(
            model, rung.algorithm, data=data, tokenizer=tokenizer, calibration=options
        )
    seconds = time.perf_counter() - start
    linears = [m for n, m in model.named_modules() if hasattr(m, "qweight") and m.role == "linear"]
    linears = [m for m in linears if m.tied_to is None and m.scheme.format != "int8"] or linears
    weights = sum(m.shape[0] * m.shape[1] for m in linears)
    gains = [x.hessian_gain for x in report.layers if x.hessian_gain is not None]
    return model, {
        "seconds": round(seconds, 1),
        "calibration": report.calibration,
        "calibration_tokens": report.tokens,
        "bytes": zp.footprint(model).total_bytes,
        "predicted_kl": spent.predicted_kl,
        "measured_kl": spent.measured_kl,
        "bits_per_linear_weight": 8 * sum(m.qweight.nbytes for m in linears) / weights,
        "kept": {a: sum(x.algorithm == a for x in report.layers) for a in zp_names(report)},
        "mean_hessian_gain": sum(gains) / len(gains) if gains else None,
        "worst": [(x.name, x.output_error) for x in report.worst[:3]],
        "warnings": list(report.warnings),
    }


def zp_names(report: Any) -> list[str]:
    return sorted({layer.algorithm for layer in report.layers})


def main() -> int:
    """Every rung of every setting. Returns the number of targets missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference")
    parser.add_argument("--rungs", default=",".join(RUNGS))
    parser.add_argument("--settings", default=",".join(TARGETS))
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration")
    parser.add_argument("--windows", type=int, default=24, help="of evaluation, 512 tokens each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", action="store_true")
    arguments = parser.parse_args()
    original, tokenizer = zp.load(arguments.reference)
    windows = evaluation_windows(tokenizer, arguments.windows)
    reference = logits_of(original, windows)
    missed = 0
    for setting in arguments.settings.split(","):
        best = float("inf")
        for name in arguments.rungs.split(","):
            model, took = run(original, tokenizer, RUNGS[name], setting, arguments)
            line = {
                "setting": setting,
                "rung": name,
                "seed": arguments.seed,
                **measure(model, windows, reference),
                **took,
                "threads": torch.get_num_threads(),
                "machine": platform.processor() or platform.machine(),
                "version": zp.__version__,
            }
            best = min(best, line["delta_nll"]["mean"])
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            d = line["delta_nll"]
            print(
                f"{setting:9} {name:20} delta NLL {d['mean']:+.4f} ({d['low']:+.4f} to "
                f"{d['high']:+.4f})  KL {line['kl']:.4f}  top-1 {line['top1_agreement']:.3f}  "
                f"{line['bits_per_linear_weight']:.3f} bits  {line['seconds']:.0f} s",
                flush=True,
            )
        target = TARGETS.get(setting)
        if target is not None and best > target:
            missed += 1
            print(f"{setting}: {best:.4f} misses the target of {target}", flush=True)
    return missed if arguments.targets else 0


if __name__ == "__main__":
    raise SystemExit(main())
