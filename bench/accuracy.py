"""The accuracy ladder: every rung on one checkpoint, at the same bytes, on text it has not seen.

    python bench/accuracy.py REFERENCE [--rungs medium,hqq] [--settings int4-g64] [--seeds 0,1]

REFERENCE is a full-precision language model (a model whose weights lie on a 4-bit grid already
would flatter every rung). Calibration text is the calibration half of Python's own reference,
or what the model writes itself; the answer is measured on the first windows of the other half,
which no rung sees, and on a text of another kind, the source code of the standard library.
Embedding and head are int8 per row, but for `budget-75MB`, which chooses for them as well, on the
calibration text; peers leave them float. Peers run where they are installed (`pip install
auto-round==0.16 hqq==0.2.8.post1 bitsandbytes==0.50.2 torchao==0.18`, and `pip install --no-deps
llmcompressor==0.14.0.1 compressed-tensors==0.19.0 loguru nvidia-ml-py`, which asks for an older
transformers and AutoRound but runs with these; GPTQModel 7.7 asks for a newer torch). One JSON
line for every rung, setting and seed is appended to bench/results/accuracy.jsonl; `--targets` fails
where the best rung misses its target. `python bench/accuracy.py --plot FILE` measures nothing, it
draws the lines.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import inspect
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _common import RESULTS as FOLDER
from _common import append, circumstances
from torch import Tensor, nn
from torch.utils.data import DataLoader

import zeropoint as zp
from zeropoint.evaluate.statistics import TokenDistances, block_bootstrap, token_distances
from zeropoint.evaluate.text import calibration_text, evaluation_text
from zeropoint.flows.data import EFFORTS, prepare
from zeropoint.plot.canvas import BLUE, GREEN, GREY, INK, RED, SKY, SMALL, figure_of, new_axes, tidy

RESULTS = FOLDER / "accuracy.jsonl"
PACKAGES = (
    "torch", "transformers", "auto-round", "hqq", "bitsandbytes", "llmcompressor", "torchao",
)  # fmt: skip
WINDOW = 512
SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "int4-g64": {"weights": "int4", "group_size": 64},
    "int4-g32": {"weights": "int4", "group_size": 32},
    "int3-g64": {"weights": "int3", "group_size": 64},
    "int3-g32": {"weights": "int3", "group_size": 32},
    "int4": {"weights": "int4", "group_size": -1},
    "int3": {"weights": "int3", "group_size": -1},
    "int2-g64": {"weights": "int2", "group_size": 64},
    "int2-g32": {"weights": "int2", "group_size": 32},
    "e8p-g64": {"weights": "e8p", "group_size": 64},
    "e8p": {"weights": "e8p", "group_size": -1},
    "nf4-g64": {"weights": "nf4", "group_size": 64},
    "any4-g64": {"weights": "any4"},
    "float8": {"weights": "float8_e4m3fn"},
    "budget-75MB": {"budget": "75MB"},  # of the whole model; int3-g64 takes 73.4 MB
}
TARGETS = {
    "int8": 0.004,
    "int4-g64": 0.05,
    "int4-g32": 0.035,
    "int3-g64": 0.24,
    "int3-g32": 0.18,
    "int2-g64": 1.0,
}


@dataclass(frozen=True)
class Rung:
    """algorithm, effort and what differs from it; own: calibrated on text the model writes; rotate:
    rotated first, which unties the head.
    """

    algorithm: str
    effort: str | None = None
    options: dict[str, Any] | None = None
    own: bool = False
    rotate: bool = False


RUNGS = {
    "rtn": Rung("rtn"),
    "mse": Rung("mse"),
    "low": Rung("gptq", "low"),
    "medium": Rung("gptq", "medium"),
    "high": Rung("gptq", "high"),
    "medium, no balance": Rung("gptq", "medium", {"fold": False}),
    "low, propagated": Rung("gptq", "low", {"propagate": 0.5}),
    "medium, no propagation": Rung("gptq", "medium", {"propagate": 0.0}),
    "high, no propagation": Rung("gptq", "high", {"propagate": 0.0}),
    "medium, own text": Rung("gptq", "medium", own=True),
    "high, own text": Rung("gptq", "high", own=True),
    "auto, low": Rung("auto", "low"),
    "auto, medium": Rung("auto", "medium"),
    "rtn, rotated": Rung("rtn", rotate=True),
    "mse, rotated": Rung("mse", rotate=True),
    "low, no balance": Rung("gptq", "low", {"fold": False}),
    "low, rotated": Rung("gptq", "low", rotate=True),
    "low, rotated, no balance": Rung("gptq", "low", {"fold": False}, rotate=True),
}


# --- peers: each gives linear layers the weights its codes stand for, and returns their bits ---


def hqq(model: Any, tokenizer: Any, bits: int, group_size: int, seed: int) -> float:
    """HQQ 0.2.8: calibration-free; float16 scale and zero point."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for layer in linears_of(model).values():
        config = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
        done = HQQLinear(
            copy.deepcopy(layer), config, compute_dtype=torch.float32, device="cpu", del_orig=False
        )
        layer.weight.data.copy_(done.dequantize())
    return bits + 32 / group_size


def auto_round(model: Any, tokenizer: Any, bits: int, group_size: int, seed: int) -> float:
    """AutoRound 0.16, 50 iterations, asymmetric, 64 x 256 tokens of the calibration text."""
    from auto_round import AutoRound

    ids = tokenizer(calibration_text(), return_tensors="pt", verbose=False).input_ids[0]
    windows = list(ids[: len(ids) // 256 * 256].split(256))
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    text = [{"input_ids": windows[i][None]} for i in order[:64].tolist()]
    tuner = AutoRound(
        model, tokenizer, scheme="W4A16", bits=bits, group_size=group_size, sym=False, iters=50,
        seqlen=256, nsamples=64, batch_size=8, dataset=text, device_map="cpu", seed=seed,
        enable_torch_compile=False,
    )  # fmt: skip
    done, _ = tuner.quantize()
    tuned = dict(done.named_modules())
    for name, layer in linears_of(model).items():
        layer.weight.data.copy_(tuned[name].weight.data)
    return bits + (16 + bits) / group_size


def bitsandbytes(model: Any, tokenizer: Any, bits: int, group_size: int, seed: int) -> float:
    """bitsandbytes 0.50.2: nf4 without double quantization; float32 absmax."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for layer in linears_of(model).values():
        codes, state = quantize_4bit(layer.weight.data, blocksize=group_size, quant_type="nf4")
        layer.weight.data.copy_(dequantize_4bit(codes, state))
    return bits + 32 / group_size


def llm_compressor(
    model: Any, tokenizer: Any, bits: int, group_size: int, seed: int, observer: str
) -> float:
    """GPTQ of llm-compressor 0.14, asymmetric, float16 scales, on the tokens of medium effort."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    text = prepare(model, [calibration_text()], tokenizer, replace(EFFORTS["medium"], seed=seed))
    weights = QuantizationArgs(
        num_bits=bits, symmetric=False, strategy="group", group_size=group_size,
        scale_dtype=torch.float16, observer=observer,
    )  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    done = oneshot(
        model=copy.deepcopy(model),  # its layers keep hooks
        processor=tokenizer,
        dataset=DataLoader(text.batches, batch_size=None),
        recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
    )
    rounded = dict(done.named_modules())
    for name, layer in linears_of(model).items():
        layer.weight.data.copy_(rounded[name].weight.data)
    return bits + (16 + bits) / group_size


def torchao(
    model: Any, tokenizer: Any, bits: int, group_size: int | None, seed: int, algorithm: str
) -> float:
    """torchao 0.18, calibration-free. hqq looks for the scales of a symmetric grid; affine rounds,
    asymmetric by group and symmetric by row. Int4WeightOnlyConfig has no CPU format.
    """
    from torchao import quantization as ao

    symmetric = algorithm == "hqq_scale_only" or group_size is None
    mapping = ao.MappingType.SYMMETRIC if symmetric else ao.MappingType.ASYMMETRIC
    config = ao.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=ao.PerGroup(group_size) if group_size else ao.PerAxis(0),
        mapping_type=mapping,
        scale_dtype=torch.float16,
        intx_choose_qparams_algorithm=algorithm,
    )
    layers = linears_of(model)
    for layer in layers.values():
        done = copy.deepcopy(layer)
        ao.quantize_(done, config)
        layer.weight.data.copy_(done.weight.dequantize())
    rows, weights = (sum(f(x.weight) for x in layers.values()) for f in (len, Tensor.numel))
    overhead = 16 if symmetric else 16 + 8  # the zero point is an int8
    return bits + overhead * (1 / group_size if group_size else rows / weights)


PEERS: dict[str, Callable[[Any, Any, int, Any, int], float]] = {
    "hqq": hqq,
    "auto-round": auto_round,
    "bitsandbytes": bitsandbytes,
    "llm-compressor": partial(llm_compressor, observer="memoryless_minmax"),
    "llm-compressor, mse": partial(llm_compressor, observer="memoryless_mse"),
    "torchao": partial(torchao, algorithm="affine"),
    "torchao, hqq": partial(torchao, algorithm="hqq_scale_only"),
}


def fits(name: str, setting: str) -> bool:
    """Whether a peer has the setting's format; every rung of ours has."""
    if name not in PEERS:
        return True
    weights = SETTINGS[setting].get("weights", "")
    if name == "bitsandbytes":
        return bool(weights == "nf4")
    by_group = SETTINGS[setting].get("group_size", -1) > 0
    return weights.startswith("int") and (by_group or (name, setting) == ("torchao", "int8"))


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks, without the head."""
    return {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n
    }


# --- measuring ---


@torch.no_grad()
def logits_of(model: Any, windows: list[Tensor]) -> list[Tensor]:
    """(T, V) float32 for each window."""
    return [model(input_ids=w[None], use_cache=False).logits[0, :-1].float() for w in windows]


def evaluation_windows(tokenizer: Any, count: int) -> list[Tensor]:
    """The first windows of the text that nothing is calibrated or trained on. (T,) int each."""
    return windows_of(evaluation_text(), tokenizer, count)


def windows_of(text: str, tokenizer: Any, count: int) -> list[Tensor]:
    """The first windows of a text. (T,) int each."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
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
    original: Any, tokenizer: Any, name: str, setting: str, tokens: int | None, seed: int
) -> tuple[Any, dict[str, Any]]:
    """Quantize a copy of the model. Returns it, and what that took."""
    model = copy.deepcopy(original)
    scheme = SETTINGS[setting]
    start = time.perf_counter()
    if name in PEERS:
        width, group_size = int(scheme["weights"][-1]), scheme.get("group_size")
        bits = PEERS[name](model, tokenizer, width, group_size, seed)
        return model, {
            "seconds": round(time.perf_counter() - start, 1),
            "bits_per_linear_weight": bits,
        }
    rung = RUNGS[name]
    data = "self" if rung.own else [calibration_text()]
    if rung.rotate:
        zp.rotate(model, seed=seed)
    if "budget" in scheme:
        scheme = scheme | {"data": data, "tokenizer": tokenizer}
    spent = zp.quantize(model, **scheme)
    if rung.effort is None:
        report = zp.freeze(model, rung.algorithm)
    else:
        options = replace(EFFORTS[rung.effort], seed=seed, **(rung.options or {}))
        options = options if tokens is None else replace(options, tokens=tokens)
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
        "tuning": report.tuning and report.tuning.held_out,
        "warnings": list(report.warnings),
    }


def zp_names(report: Any) -> list[str]:
    return sorted({layer.algorithm for layer in report.layers})


def main() -> int:
    """Every rung of every setting. Returns the number of targets missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", nargs="?")
    parser.add_argument("--rungs", default=",".join((*RUNGS, *PEERS)))
    parser.add_argument("--settings", default=",".join(TARGETS))
    parser.add_argument("--tokens", type=int, default=None, help="of calibration")
    parser.add_argument("--windows", type=int, default=24, help="of evaluation, 512 tokens each")
    parser.add_argument("--seeds", default="0", help="of the calibration text, as 0,1,2")
    parser.add_argument("--device", default="cpu", help="where all of it runs; peers: on the CPU")
    parser.add_argument("--targets", action="store_true")
    parser.add_argument("--plot", type=Path, help="draw the figures there are, and no more")
    arguments = parser.parse_args()
    if arguments.plot:
        draw(arguments.plot)
        return 0
    if arguments.reference is None:
        parser.error("REFERENCE, or --plot, is missing")
    original, tokenizer = zp.load(arguments.reference)
    original.to(arguments.device)
    code = inspect.getsource(argparse) + inspect.getsource(difflib)
    texts = {
        "reference manual": evaluation_windows(tokenizer, arguments.windows),
        "source code": windows_of(code, tokenizer, arguments.windows // 3),
    }
    texts = {name: [w.to(arguments.device) for w in windows] for name, windows in texts.items()}
    expected = {name: logits_of(original, windows) for name, windows in texts.items()}
    about = circumstances(PACKAGES) | {"threads": torch.get_num_threads()}
    if arguments.device != "cpu":
        about |= {"device": torch.cuda.get_device_name(arguments.device)}
    missed = 0
    for setting in arguments.settings.split(","):
        best = float("inf")
        for name in re.split(",(?! )", arguments.rungs):  # names have ", " in them
            for seed in map(int, arguments.seeds.split(",") if fits(name, setting) else ()):
                model, took = run(original, tokenizer, name, setting, arguments.tokens, seed)
                found = {t: measure(model, texts[t], expected[t]) for t in texts}
                line = {"setting": setting, "rung": name, "seed": seed, **took}
                line |= found["reference manual"] | {"other_text": found["source code"]}
                best = min(best, line["delta_nll"]["mean"])
                append(RESULTS, [line], about)
                show(line)
        target = TARGETS.get(setting)
        if target is not None and best > target:
            missed += 1
            print(f"{setting}: {best:.4f} misses the target of {target}", flush=True)
    return missed if arguments.targets else 0


def show(line: dict[str, Any]) -> None:
    """One line of the table."""
    d, other = line["delta_nll"], line["other_text"]
    print(
        f"{line['setting']:9} {line['rung']:20} {line['seed']} delta NLL {d['mean']:+.4f} "
        f"({d['low']:+.4f} to {d['high']:+.4f})  KL {line['kl']:.4f}  "
        f"top-1 {line['top1_agreement']:.3f}  code {other['delta_nll']['mean']:+.4f}, "
        f"KL {other['kl']:.4f}  {line['bits_per_linear_weight']:.3f} bits  "
        f"{line['seconds']:.0f} s",
        flush=True,
    )


# --- the picture ---

DRAWN = {  # label, colour, marker
    "rtn": ("rounding to nearest", GREY, "o"),
    "mse": ("mse", SKY, "o"),
    "medium": ("gptq, medium", BLUE, "o"),
    "high, no propagation": ("gptq, high, errors not propagated", INK, "o"),
    "auto-round": ("AutoRound", RED, "s"),
    "hqq": ("HQQ", RED, "D"),
    "llm-compressor, mse": ("GPTQ of llm-compressor", RED, "^"),
    "torchao": ("torchao", GREEN, "D"),
    "bitsandbytes": ("bitsandbytes", GREEN, "s"),
}
MOST_BITS = 5  # int8 would squeeze the others
PLACES = {
    "int4-g64": (-46, -22),
    "int4-g32": (-20, 8),
    "e8p-g64": (-6, -14),
}  # of labels in points, clear of lines


def newest(path: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The last lines by rung and setting, one a seed, of those over the most tokens."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    most = max(line["tokens"] for line in lines)
    last = {(x["rung"], x["setting"], x["seed"]): x for x in lines if x["tokens"] == most}
    found = defaultdict(list)
    for (rung, setting, _), line in last.items():
        found[rung, setting].append(line)
    return found


def draw(path: Path) -> None:
    """KL against bits of the linear layers, a colour a method; means over the seeds there are."""
    ax = new_axes(8, 4.8)
    for rung, (label, color, marker) in DRAWN.items():
        points = [
            (fmean(x["bits_per_linear_weight"] for x in lines), fmean(x["kl"] for x in lines), name)
            for (other, name), lines in newest(RESULTS).items()
            if other == rung and "budget" not in SETTINGS[name]
        ]
        points = [point for point in points if point[0] < MOST_BITS]
        if not points:
            continue
        bits, kl, names = zip(*sorted(points), strict=True)
        line = "-" if rung in RUNGS else ""
        ax.plot(bits, kl, color=color, marker=marker, markersize=5, linestyle=line, label=label)
        if rung == "medium":
            for x, y, name in zip(bits, kl, names, strict=True):
                place = PLACES.get(name, (-4, 6))
                ax.annotate(name, (x, y), place, textcoords="offset points", fontsize=SMALL)
    ax.set_yscale("log")
    y_label = "mean KL divergence (nats per token)"
    tidy(ax, "What a method loses at a size", "bits per weight of linear layers", y_label, "both")
    ax.legend(frameon=False, fontsize=SMALL)
    figure_of(ax).savefig(path)


if __name__ == "__main__":
    raise SystemExit(main())
