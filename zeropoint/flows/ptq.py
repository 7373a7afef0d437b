"""Post-training quantization of a model in memory: quantize -> live, freeze -> codes only.

    float  --quantize-->  live  --freeze-->  frozen
      ^-------------------dequantize-----------'

`quantize` plans first and changes the model only when the whole plan holds: a refused call leaves
the model as it was.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from zeropoint.algorithms import Algorithm, get_algorithm
from zeropoint.algorithms.choice import Choice
from zeropoint.algorithms.search import search
from zeropoint.errors import RecipeError, StateError, ZeropointError
from zeropoint.flows.budget import SCORE_TOKENS, Formats, parse_bytes, recipe_of, schemes_of, spend
from zeropoint.flows.calibrate import calibrate
from zeropoint.flows.data import Calibration, Data, calibration_of, prepare
from zeropoint.flows.planned import Patterns, Planned, as_patterns, dtype_name, planned
from zeropoint.flows.qat import float_copy, tune
from zeropoint.flows.report import FreezeReport, LayerReport, Report
from zeropoint.model.replace import replace_module
from zeropoint.model.save import remember_algorithm, remember_recipe
from zeropoint.model.walk import quantized_modules
from zeropoint.nn import QLinear, QModule, quantized_type
from zeropoint.numerics import Grid, check_finite, check_range
from zeropoint.progress import OnStep, no_progress
from zeropoint.scheme import Recipe, Rule


def quantize(
    model: nn.Module,
    weights: str | None = None,
    *,
    group_size: int | None = None,
    symmetric: bool | None = None,
    float_zero_point: bool | None = None,
    double_quant: bool | None = None,
    activations: str | None = None,
    outlier_threshold: float | None = None,
    compute_dtype: str | torch.dtype | None = None,
    learned_scale: bool | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    recipe: Recipe | None = None,
    strict: bool = True,
    budget: str | float | None = None,
    formats: Formats | None = None,
    data: Data | None = None,
    tokenizer: Any = None,
    calibration: Calibration | None = None,
    on_step: OnStep = no_progress,
) -> Report:
    """Put the model into the live state: float weights kept, every forward uses their quantized
    image. In place.

    weights: a format name ("int8" when there is no recipe). group_size: values per scale along the
    input dimension; None for the format's default, -1 for one scale per output channel. symmetric:
    None for the format's default. float_zero_point: zero points of integer formats are float16.
    double_quant: store the scales of codebooks in 8 bits.
    activations: "int8", "float8_e4m3fn" or "float8_e5m2" rounds the inputs of linear layers too,
    every token with a scale of its own, or after `zp.calibrate` with one range for all; None leaves
    them float.
    outlier_threshold: keep input channels in which any |x| reaches it float, 6.0 for LLM.int8().
    compute_dtype: the dtype in which linear layers multiply, whatever the model's own is.
    learned_scale: scales and zero points of linear layers become parameters, to be trained with the
    weights (LSQ); they start on the grid of least squared error.
    include, exclude: `fnmatch` patterns on module names. Embeddings and heads get int8 per row when
    `weights` has 8 bits or fewer, and stay tied where they are. recipe: a Recipe instead of all of
    these. strict=False turns an unused rule, a group size that does not divide K, and a missed
    coverage into warnings.

    budget: bytes, or text like "75MB", for the whole model as stored, instead of `weights`: every
    weight gets one of `formats` (names, or Schemes; by default integers of 2 to 8 bits, 4 and more
    for embeddings and heads), so that the loss of the whole is least. The model runs for that, on
    `data` as `zp.freeze` takes it, 8192 tokens unless `calibration` says otherwise; the report says
    what loss is predicted and what is measured (`zeropoint.flows.budget`).

    Raises StateError (quantized already, or on the meta device), UnusedRuleError, GroupSizeError,
    CoverageError, NonFiniteError, ScaleRangeError, RecipeError, UnknownNameError, and with a budget
    TextError (unusable data). The model is unchanged when it raises.
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
        "learned_scale": learned_scale,
        "include": include,
        "exclude": exclude,
    }
    spending = {
        "formats": formats,
        "data": data,
        "tokenizer": tokenizer,
        "calibration": calibration,
    }
    if budget is None:
        named = [name for name, value in spending.items() if value is not None]
        if named:
            raise RecipeError(f"{', '.join(named)}: only a budget needs that; give budget= as well")
        plan = planned(model, options, recipe=recipe, strict=strict)
        _check_values(plan)
    else:
        given = {k: v for k, v in (options | {"recipe": recipe}).items() if v is not None}
        given.pop("exclude", None)
        if given:
            raise RecipeError(
                f"a budget chooses the formats; leave {', '.join(given)} out, or name Schemes in "
                "formats="
            )
        use = calibration or Calibration(tokens=SCORE_TOKENS)
        plan = _budgeted(model, budget, formats, exclude, data, tokenizer, use, strict, on_step)
    go_live(model, plan)
    return plan.report


def go_live(model: nn.Module, plan: Planned) -> None:
    """Put live modules where the plan wants them. In place."""
    owners: dict[int, QModule] = {}
    for site, scheme in plan.schemes.items():
        quantized = quantized_type(site.module)
        assert quantized is not None
        live = quantized.from_float(site.module, scheme)
        if scheme.learned_scale:
            owner = owners.setdefault(site.tied, live)
            live.learn_scale(owner if owner is not live else _start(live))
        replace_module(model, site.names, live)
    remember_recipe(model, plan.report.recipe)


def _check_values(plan: Planned) -> None:
    """Raises StateError, NonFiniteError, ScaleRangeError naming the weight."""
    for site, scheme in plan.schemes.items():
        try:
            for parameter in site.module.parameters(recurse=False):
                if parameter.device.type == "meta":
                    raise StateError("on the meta device, without values; load the weights first")
                if parameter.dim() >= 2:
                    check_finite(parameter)
                    check_range(parameter, scheme.format)
        except ZeropointError as e:
            raise type(e)(f"{site.name}.weight: {e}") from e


def _budgeted(
    model: nn.Module,
    budget: str | float,
    formats: Formats | None,
    exclude: Patterns,
    data: Data | None,
    tokenizer: Any,
    calibration: Calibration,
    strict: bool,
    on_step: OnStep,
) -> Planned:
    """The plan whose recipe loses least within the budget. The model is as it was afterwards."""
    limit, schemes = parse_bytes(budget), schemes_of(formats)
    # Every weight at int8 shows which there are, and what stands in the way of others.
    everything = planned(model, {"weights": "int8", "exclude": exclude}, strict=strict)
    _check_values(everything)
    sites = list(everything.schemes)
    other = everything.report.bytes_before - sum({s.tied: s.bytes for s in sites}.values())
    # One window at a time: each is a sample of the gradient.
    options = replace(calibration, batch_tokens=calibration.window)
    allocation = spend(
        model,
        sites,
        limit,
        other,
        schemes,
        lambda: prepare(model, data, tokenizer, options, on_step),
        calibration.seed,
        on_step,
    )
    kept = tuple(Rule(match=pattern) for pattern in as_patterns(exclude) or ())
    recipe = recipe_of(allocation.schemes, kept)
    plan = planned(model, {}, recipe=recipe, strict=strict)
    reasons = {m.name: m.reason for m in everything.report.kept}
    report = replace(
        plan.report,
        modules=tuple(
            replace(m, reason=reasons.get(m.name, m.reason)) for m in plan.report.modules
        ),
        warnings=tuple(
            dict.fromkeys(
                (*everything.report.warnings, *plan.report.warnings, *allocation.warnings)
            )
        ),
        budget_bytes=limit,
        **{
            f"{when}_{'kl' if allocation.logits else 'error'}": getattr(allocation, when)
            for when in ("predicted", "measured")
        },
    )
    assert plan.schemes == allocation.schemes and report.bytes_after <= limit
    return Planned(schemes=plan.schemes, report=report)


def _start(live: QModule) -> Grid:
    """The grid of least squared error: nearer than 2 mean |w| / sqrt(q_max), LSQ's section 2.1."""
    return search(live.float_weight().detach(), live.scheme.stored).grid


def freeze(
    model: nn.Module,
    algorithm: str = "rtn",
    *,
    data: Data | None = None,
    tokenizer: Any = None,
    effort: str | None = None,
    calibration: Calibration | None = None,
    on_step: OnStep = no_progress,
) -> FreezeReport:
    """Replace the float weights of a live model by codes, module by module. In place.

    algorithm: how codes are chosen, a name of `zeropoint.algorithms.ALGORITHMS`; weights whose grid
    was learned are rounded on it, with "rtn" only. Tied weights stay tied. data: for an algorithm
    that calibrates: texts (with tokenizer=), tensors of token ids, batches as dictionaries of
    tensors, or "self", text the model writes itself, which is also the default. effort: "low",
    "medium" or "high", how much work that is; or calibration: how much data is used, and how.

    Raises StateError (nothing is live, or inputs have static ranges that the algorithm would make
    wrong), UnknownNameError, RecipeError (data for an algorithm that
    uses none, effort and calibration both), TextError (unusable data), NonFiniteError and
    ScaleRangeError naming the module.
    """
    chosen = get_algorithm(algorithm)
    modules = quantized_modules(model)
    live = {name: m for name, m in modules.items() if not m.frozen}
    if not live:
        state = "frozen already" if modules else "not quantized; call zp.quantize(model) first"
        raise StateError(f"there is nothing to freeze: the model is {state}")
    learned = next((name for name, m in live.items() if m.grid is not None), None)
    if learned is not None and algorithm != "rtn":
        raise RecipeError(
            f"{learned} has learned its grid, and algorithm={algorithm!r} would choose another; "
            "use algorithm='rtn', or quantize without learned_scale"
        )
    options = calibration_of(chosen, data, effort, calibration)
    if options is None:
        report = FreezeReport(algorithm=algorithm, layers=_freeze_each(live, chosen, on_step))
        one_way = len(live) == len(modules) and learned is None
        remember_algorithm(model, algorithm if one_way else None)
        return report
    static = [n for n, m in live.items() if isinstance(m, QLinear) and m.input_scale is not None]
    if static:
        raise StateError(
            f"{static[0]} has a static range, and algorithm={algorithm!r} changes what its inputs "
            "are; freeze first, then run the model inside `with zp.calibrate(model):`"
        )
    teacher = float_copy(model) if options.tune_steps else None
    layers, prepared, warnings = calibrate(
        model,
        chosen,
        options,
        lambda: prepare(model, data, tokenizer, options, on_step),
        on_step,
    )
    tuning = None
    if teacher is not None:
        try:
            tuning = tune(model, teacher, prepared, options, on_step)
        except RecipeError as e:
            warnings.append(f"nothing was tuned: {e}")
    remember_algorithm(model, algorithm if len(live) == len(modules) else None)
    return FreezeReport(
        algorithm=algorithm,
        layers=tuple(layers),
        calibration=prepared.source,
        tokens=prepared.tokens,
        tuning=tuning,
        warnings=tuple(warnings),
    )


def _freeze_each(
    live: dict[str, QModule], algorithm: Algorithm, on_step: OnStep
) -> tuple[LayerReport, ...]:
    groups: dict[int, list[str]] = {}
    for name, module in live.items():
        groups.setdefault(id(module._parameters["weight"]), []).append(name)
    layers = []
    for done, (name, *tied) in enumerate(groups.values()):
        on_step(name, done, len(groups))
        try:
            choice = _chosen(live[name], algorithm)
        except ZeropointError as e:
            raise type(e)(f"{name}.weight: {e}") from e
        live[name].freeze(choice.weight)
        layers.append(LayerReport(name=name, algorithm=choice.algorithm, reason=choice.reason))
        for other in tied:  # at once: a call that stops between groups can be repeated
            live[other].freeze_tied(live[name])
            layers.append(
                LayerReport(name=other, algorithm=choice.algorithm, reason=f"tied to {name}")
            )
    on_step("", len(groups), len(groups))
    return tuple(layers)


def _chosen(live: QModule, algorithm: Algorithm) -> Choice:
    if live.grid is not None:
        reason = "on the grid that was learned"
        return Choice(weight=live.on_learned_grid(), algorithm=algorithm.name, reason=reason)
    return algorithm.choose(live.float_weight().detach(), None, live.scheme)
