"""What quantizing a model would give and take, before any weight is read (but for a trial)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zeropoint.algorithms import Algorithm, get_algorithm
from zeropoint.checkpoints import native
from zeropoint.checkpoints.floats import Stored, read_headers
from zeropoint.checkpoints.shard import DTYPES
from zeropoint.errors import RecipeError, SourceError, StreamError
from zeropoint.flows.blocks import check_streams
from zeropoint.flows.budget import parse_bytes
from zeropoint.flows.calibrated_memory import calibrated_bytes
from zeropoint.flows.data import Calibration, calibration_of
from zeropoint.flows.job import Job, outline, without_values
from zeropoint.flows.planned import Patterns, dtype_name
from zeropoint.flows.report import Report
from zeropoint.flows.stream import copied_files
from zeropoint.flows.trial import WITHOUT, try_out
from zeropoint.flows.writing import WORKERS
from zeropoint.model.load import float_skeleton
from zeropoint.model.pages import resident_bytes
from zeropoint.model.source import Source, resolve
from zeropoint.numerics import FORMATS
from zeropoint.scheme import Recipe

FOR_BUDGETS = ("int8", "int6", "int5", "int4", "int3", "int2")  # widest first
SMALL_MODEL = 1_000_000_000  # parameters; below it, few bits lose much


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `zp.compress`, or `zeropoint quantize`, would do.

    report: as `zp.quantize` returns it. weights: the format that was asked for, or chosen by the
    budget; None for a recipe. peak_rss_bytes: the most that this process would then occupy, what it
    occupies now included. disk_bytes: of the folder that is written. kv_cache_bytes: of `context`
    tokens of one sequence, in the dtype of the activations; None without a context. whole: why the
    model would have to be loaded as a whole; None when it is read weight by weight, or block by
    block. quantize_seconds: of the quantization, from a trial on the blocks `tried`; None and empty
    without a trial. warnings: what to know before.
    """

    report: Report
    weights: str | None
    peak_rss_bytes: int
    disk_bytes: int
    kv_cache_bytes: int | None
    whole: str | None
    warnings: tuple[str, ...]
    quantize_seconds: float | None = None
    tried: tuple[str, ...] = ()

    @property
    def bytes_before(self) -> int:
        """Of all tensors of the float model."""
        return self.report.bytes_before

    @property
    def bytes_after(self) -> int:
        """Of all tensors of the quantized one."""
        return self.report.bytes_after

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each parameter."""
        return self.report.bits_per_weight

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `zeropoint plan --json` writes it."""
        keys = ("weights", "peak_rss_bytes", "disk_bytes", "kv_cache_bytes", "whole")
        trial = {"quantize_seconds": self.quantize_seconds, "tried": list(self.tried)}
        return {
            **{key: getattr(self, key) for key in ("bytes_before", "bytes_after")},
            "bits_per_weight": self.bits_per_weight,
            **{key: getattr(self, key) for key in keys},
            **trial,
            "warnings": list(self.warnings),
            "recipe": self.report.recipe.to_dict(),
            "modules": [asdict(module) for module in self.report.modules],
        }

    def __str__(self) -> str:
        lines = [
            str(replace(self.report, warnings=())),
            f"  peak memory {self.peak_rss_bytes / 1e6:,.1f} MB, "
            f"disk {self.disk_bytes / 1e6:,.1f} MB",
        ]
        if self.kv_cache_bytes is not None:
            lines.append(f"  keys and values of the context {self.kv_cache_bytes / 1e6:,.1f} MB")
        if self.quantize_seconds is not None:
            lines.append(f"  {duration(self.quantize_seconds)}, from a trial on {self.tried[0]}")
        if self.whole is not None:
            lines.append(f"  loaded as a whole: {self.whole}")
        return "\n".join(lines + [f"  warning: {w}" for w in self.warnings])


def duration(seconds: float) -> str:
    """As a person would say it: about 40 s, about 3 min, about 5 h."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {max(1, seconds):.0f} s"


def plan(
    source: str | Path,
    weights: str | None = None,
    *,
    group_size: int | None = None,
    symmetric: bool | None = None,
    float_zero_point: bool | None = None,
    double_quant: bool | None = None,
    activations: str | None = None,
    outlier_threshold: float | None = None,
    compute_dtype: str | torch.dtype | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    recipe: Recipe | None = None,
    task: str | None = None,
    budget: str | float | None = None,
    context: int | None = None,
    algorithm: str = "rtn",
    effort: str | None = None,
    calibration: Calibration | None = None,
    trial: bool = False,
) -> Plan:
    """Plan a quantization by config.json and the headers of the weights alone.

    source: as `zp.load` takes it, but not quantized yet. weights to recipe: as `zp.quantize` takes
    them; what `strict=True` refuses there is a warning here. budget: bytes, or text like "8GB"
    (10^9) or "8GiB" (2^30), for weights and, with `context` tokens, keys and values: the widest
    integer format that fits is planned. task: as `zp.load` takes it. algorithm, effort,
    calibration: as `zp.freeze` takes them, by data that is given: text that the model writes itself
    takes more time, and the memory of the whole model.

    trial: quantize one block of a local folder (of a quick algorithm several, written into a
    temporary folder), to say how long all of it takes on this machine as busy as it is now.
    Raises SourceError (a trial of what is not in a local folder, too), CheckpointError, RecipeError
    (nothing fits the budget, or weights or a recipe beside it), UnknownNameError, StreamError (a
    trial of what is loaded as a whole, or of calibrating a model that has no blocks or no text).
    """
    options = {
        "weights": weights,
        "group_size": group_size,
        "symmetric": symmetric,
        "float_zero_point": float_zero_point,
        "double_quant": double_quant,
        "activations": activations,
        "outlier_threshold": outlier_threshold,
        "compute_dtype": None if compute_dtype is None else dtype_name(compute_dtype),
        "include": include,
        "exclude": exclude,
    }
    chosen = get_algorithm(algorithm)
    work = _Work(source, chosen, calibration_of(chosen, None, effort, calibration), task, context)
    if trial and work.found.kind == "hub":
        raise SourceError(
            f"{source} is on the hub, and a trial reads weights: download it first, or {WITHOUT}"
        )
    if budget is None:
        return _plan(work, options, recipe, trial)
    if weights is not None or recipe is not None:
        raise RecipeError("a budget chooses the format; leave weights and recipe out")
    limit = parse_bytes(budget)
    for name in FOR_BUDGETS:
        found = _plan(work, options | {"weights": name}, None, False)
        needed = found.bytes_after + (found.kv_cache_bytes or 0)
        if needed <= limit:
            return _plan(work, options | {"weights": name}, None, True) if trial else found
    raise RecipeError(
        f"nothing fits in {limit / 1e6:,.1f} MB: {FOR_BUDGETS[-1]} takes {needed / 1e6:,.1f} MB"
        + ("" if context is None else f" with {context} tokens of context")
    )


class _Work:
    """What is planned, whatever the format. how: None for an algorithm that needs no data."""

    def __init__(
        self,
        source: str | Path,
        algorithm: Algorithm,
        how: Calibration | None,
        task: str | None,
        context: int | None,
    ) -> None:
        self.found = resolve(source)
        if self.found.kind == "native":
            raise SourceError(f"{source} is quantized already; `zeropoint inspect` shows it")
        self.algorithm, self.how = algorithm, how
        self.task, self.context = task, context

    @property
    def where(self) -> str | Path:
        """The hub id, or the folder or file."""
        place = self.found.location
        return place if self.found.kind == "hub" else Path(place)


def _plan(work: _Work, options: Mapping[str, Any], recipe: Recipe | None, trial: bool) -> Plan:
    start = time.perf_counter()
    whole = None
    skeleton: Any = float_skeleton(work.where, work.task)
    config = skeleton.config
    seconds: float | None = None
    tried: tuple[str, ...] = ()
    try:
        if work.how is not None:
            check_streams(work.how)
        stored = _headers(work.found)
        job = outline(work.where, skeleton, stored, options, recipe=recipe, strict=False)
        contents, report = job.contents, job.report
        extra = _streamed_bytes(job)
        if work.how is not None:
            extra = calibrated_bytes(job, skeleton, work.algorithm, work.how, extra)
    except StreamError as e:
        if trial:
            raise StreamError(f"a trial is of what is not loaded as a whole, {WITHOUT}: {e}") from e
        whole = str(e)
        dtype = torch.float32 if work.found.kind == "gguf" else config.dtype
        contents, report, _ = without_values(
            work.where, skeleton, dtype, options, recipe=recipe, strict=False
        )
        largest = max((m.bytes_before for m in report.modules), default=0)
        extra = report.bytes_after + largest
        if work.how is not None:  # its float weights stay, too
            extra += report.bytes_before
    peak = resident_bytes() + extra
    if trial:
        prepared = time.perf_counter() - start
        part, tried = try_out(job, skeleton, work.algorithm, work.how, work.task)
        seconds = prepared + part
    return Plan(
        report=report,
        weights=None if recipe is not None else options["weights"] or "int8",
        peak_rss_bytes=peak,
        disk_bytes=_disk_bytes(replace(contents, algorithm=work.algorithm.name), work.where),
        kv_cache_bytes=None if work.context is None else _kv_cache_bytes(config, work.context),
        whole=whole,
        warnings=_warnings(report, work.how is not None),
        quantize_seconds=seconds,
        tried=tried,
    )


def _streamed_bytes(job: Job) -> int:
    """What a few weights that are quantized at the same time take, as they are read and written."""
    names = (*job.contents.qweights, *job.contents.tensors)
    pieces = [
        (job.sources[name].nbytes if name in job.sources else 0, _nbytes(job.contents, name))
        for name in names
    ]
    return max(sum(map(sum, pieces[i : i + WORKERS])) for i in range(len(pieces)))


def _headers(found: Source) -> dict[str, Stored]:
    """Of a folder's files, or of a hub repository's, which sends these ranges only."""
    if found.kind == "gguf":
        raise StreamError("a .gguf file is dequantized while it is read")
    if found.kind != "hub":
        return read_headers(Path(found.location))
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError

    try:
        files = get_safetensors_metadata(found.location).files_metadata
    except (OSError, ValueError, HfHubHTTPError, NotASafetensorsRepoError) as e:
        raise SourceError(f"the headers of {found.location!r} cannot be read: {e}") from e
    dtypes = {code: dtype for dtype, code in DTYPES.items()}
    return {
        name: Stored(file=Path(file), name=name, shape=tuple(info.shape), dtype=dtypes[info.dtype])
        for file, metadata in files.items()
        for name, info in metadata.tensors.items()
    }


def _nbytes(contents: native.Contents, name: str) -> int:
    weight = contents.qweights.get(name)
    return contents.tensors[name].nbytes if weight is None else weight.nbytes


def _disk_bytes(contents: native.Contents, where: str | Path) -> int:
    """Of the output, exactly where it is written from a folder to a folder. Of a hub repository,
    what is beside the tensors is not known; a model that is loaded writes its tokenizer anew.
    """
    local = isinstance(where, Path) and where.is_dir()
    files = copied_files(Path(where)) if local else {}
    return native.disk_bytes(contents, {n: p.stat().st_size for n, p in files.items()})


def _kv_cache_bytes(config: Any, context: int) -> int:
    """Keys and values of one sequence. Raises RecipeError for a model that has none."""
    config = config.get_text_config(decoder=True)
    layers = getattr(config, "num_hidden_layers", None)
    heads = getattr(config, "num_attention_heads", None)
    if layers is None or heads is None:
        raise RecipeError(
            f"context={context}: the configuration of a {config.model_type} does not say how many "
            "layers and heads have keys and values; leave context out"
        )
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    itemsize = (config.dtype or torch.float32).itemsize
    return int(2 * layers * kv_heads * width * context * itemsize)


def _warnings(report: Report, calibrated: bool) -> tuple[str, ...]:
    """What to know before one starts, most important first. calibrated: by data, not rounded."""
    parameters = sum(m.elements for m in report.modules if m.bytes_before)
    widths = {
        rule.scheme.fmt.bits
        for rule in report.recipe.rules
        if rule.scheme is not None and rule.scheme.format in FORMATS
    }
    bits = 32 if calibrated else min(widths, default=32)
    warnings = []
    if bits <= 2:
        warnings.append(
            f"{bits} bits by rounding, on {parameters / 1e6:,.0f} M parameters: expect gibberish; "
            'use algorithm="gptq", and compare'
        )
    elif bits <= 3 or (bits <= 4 and parameters < SMALL_MODEL):
        warnings.append(
            f"{bits} bits by rounding, on {parameters / 1e6:,.0f} M parameters, lose much; "
            'algorithm="gptq" loses several times less'
        )
    kept = [m for m in report.modules if m.action == "kept" and m.reason and m.bytes_before]
    for reason, count in Counter(m.reason for m in kept).items():
        size = sum(m.bytes_before for m in kept if m.reason == reason)
        said = any(warning.endswith(f": {reason}") for warning in report.warnings)
        if size > report.bytes_before / 100 and reason != "no rule matches" and not said:
            warnings.append(
                f"{count} modules, {size / max(1, report.bytes_before):.0%} of the bytes, will be "
                f"kept: {reason}"
            )
    return (*warnings, *_together(report.warnings))


def _together(warnings: Sequence[str]) -> list[str]:
    """Warnings that differ only in the module they begin with, as one."""
    groups: dict[str, list[str]] = {}
    for warning in warnings:
        name, _, rest = warning.partition(": ")
        if not rest or " " in name:
            groups.setdefault(warning, [])
        else:
            groups.setdefault(rest, []).append(name)
    return [
        text
        if not names
        else f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {text}"
        for text, names in groups.items()
    ]
