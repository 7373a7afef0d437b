"""Post-training quantization of a model in memory: quantize -> live, freeze -> codes only.

    float  --quantize-->  live  --freeze-->  frozen
      ^-------------------dequantize-----------'

`quantize` plans first and changes the model only when the whole plan holds: a refused call leaves
the model as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from zeropoint.algorithms import ALGORITHMS, Algorithm, get_algorithm
from zeropoint.algorithms.choice import Choice
from zeropoint.algorithms.search import search
from zeropoint.errors import (
    CoverageError,
    GroupSizeError,
    RecipeError,
    StateError,
    UnusedRuleError,
    ZeropointError,
    nearest,
)
from zeropoint.flows.budget import SCORE_TOKENS, Formats, parse_bytes, recipe_of, schemes_of, spend
from zeropoint.flows.calibrate import calibrate
from zeropoint.flows.data import Calibration, Data, of_effort, prepare
from zeropoint.flows.qat import float_copy, tune
from zeropoint.flows.report import FreezeReport, LayerReport, ModuleReport, Report
from zeropoint.kernels.select import choose
from zeropoint.kernels.spec import Spec
from zeropoint.model.replace import replace_module
from zeropoint.model.save import remember_algorithm, remember_recipe
from zeropoint.model.walk import (
    Site,
    is_quantized,
    named_modules,
    owned_tensors,
    quantized_modules,
    weight_elements,
    weight_sites,
)
from zeropoint.nn import QLinear, QModule, quantized_type
from zeropoint.numerics import Grid, check_finite, check_range
from zeropoint.progress import OnStep, no_progress
from zeropoint.scheme import PER_CHANNEL, Recipe, Role, Rule, Scheme

Patterns = str | Sequence[str] | None


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
    kept = tuple(Rule(match=pattern) for pattern in _patterns(exclude) or ())
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


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What `quantize` would do. schemes: of the modules to quantize; report: of all of them."""

    schemes: dict[Site, Scheme]
    report: Report


def planned(
    model: nn.Module,
    options: Mapping[str, Any],
    *,
    recipe: Recipe | None = None,
    strict: bool = True,
) -> Planned:
    """What `quantize` would do to the model, which may be on the meta device. Changes nothing.

    options: arguments of `quantize` from `weights` to `exclude`; None is as good as left out.
    Raises what `quantize` raises, but for errors about values.
    """
    if is_quantized(model):
        raise StateError("the model is quantized already; call zp.dequantize(model) first")
    sites = weight_sites(model)
    given = {name: value for name, value in options.items() if value is not None}
    if recipe is not None and given:
        raise RecipeError(f"give either a recipe, or {' / '.join(options)}; not {', '.join(given)}")
    if recipe is None:
        include, exclude = given.pop("include", None), given.pop("exclude", None)
        linear = Scheme.of(given.pop("weights", "int8"), **given)
        recipe = _recipe(linear, _patterns(include), _patterns(exclude), model, sites)
    plan = _plan(model, sites, recipe)
    root = next((s for s in plan.schemes if s.module is model), None)
    if root is not None:
        replace_module(model, root.names, model)  # raises: there is nothing to put it into
    warnings = [
        *_check_rules(plan, recipe, model, sites),
        *plan.obstacles,
        *_check_coverage(plan, recipe),
    ]
    if strict and warnings:
        raise warnings[0]
    report = _report(model, sites, plan, recipe, tuple(str(w) for w in warnings))
    return Planned(schemes=plan.schemes, report=report)


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


def calibration_of(
    algorithm: Algorithm, data: Data | None, effort: str | None, calibration: Calibration | None
) -> Calibration | None:
    """How an algorithm is to be calibrated, None for one that is not. Raises RecipeError where the
    arguments of `freeze` contradict it or each other.
    """
    if algorithm.needs == "nothing":
        if not (data is None and calibration is None and effort is None):
            known = [a.name for a in ALGORITHMS.values() if a.needs != "nothing"]
            raise RecipeError(
                f"algorithm={algorithm.name!r} uses no calibration data; leave data, effort and "
                f"calibration out, or use {' or '.join(repr(n) for n in known)}"
            )
        return None
    if effort is not None and calibration is not None:
        raise RecipeError(f"effort={effort!r} stands for a calibration; give one of the two")
    return calibration or of_effort(effort or "medium")


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


# --- from arguments to a recipe ---


def _patterns(value: Patterns) -> tuple[str, ...] | None:
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str) else tuple(value)
    if not patterns:
        raise UnusedRuleError(
            "an empty list of patterns matches nothing; leave include / exclude out"
        )
    return patterns


def dtype_name(dtype: str | torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16; names as they are."""
    return str(dtype).removeprefix("torch.")


def _recipe(
    linear: Scheme,
    include: tuple[str, ...] | None,
    exclude: tuple[str, ...] | None,
    model: nn.Module,
    sites: list[Site],
) -> Recipe:
    """Rules for the arguments of `quantize`: exclusions first, then each included pattern by
    role.
    """
    # Tables are looked up, not multiplied, and a tied head shares the table's scheme: neither has
    # integer activations.
    wide = linear.fmt.bits > 8
    by_row = Scheme.of(linear.format) if wide else Scheme.of("int8", group_size=PER_CHANNEL)
    rules = [Rule(match=pattern) for pattern in exclude or ()]
    for pattern in include or ("*",):
        matched = [s for s in sites if any(fnmatchcase(n, pattern) for n in s.names)]
        taken = Recipe(rules=tuple(rules)) if rules else None
        free = [s for s in matched if taken is None or _rule_of(s, taken) is None]
        schemes: dict[Role, Scheme] = {"embedding": by_row, "head": by_row, "linear": linear}
        new = [
            Rule(match=pattern, role=role, scheme=scheme)
            for role, scheme in schemes.items()
            if any(s.role == role for s in free)
        ]
        if not new:
            if not matched:
                why = _hint(pattern, model, sites)
            elif not free:
                why = "other patterns take everything it matches"
            else:
                why = f"{free[0].name}: {free[0].obstacle}"
            raise UnusedRuleError(f"include={pattern!r} finds no module to quantize; {why}")
        rules += new
    return Recipe(rules=tuple(rules))


def _hint(pattern: str, model: nn.Module, sites: list[Site]) -> str:
    """What to write instead of a pattern that matches nothing."""
    containers = {name for names in named_modules(model).values() for name in names if name}
    if pattern in containers:
        return f"{pattern!r} holds no weight itself, write {pattern + '.*'!r}"
    if not sites:
        return "the model has no weight matrices"
    return nearest(pattern, dict.fromkeys(s.name for s in sites))


# --- from a recipe to a plan ---


@dataclass(frozen=True)
class _Plan:
    """schemes: of the sites to quantize. reasons: why the others are kept. by_rule: those kept
    because a rule says so.

    obstacles: what strict mode refuses. used: rules that decided about at least one site.
    """

    schemes: dict[Site, Scheme]
    reasons: dict[Site, str]
    by_rule: set[Site]
    obstacles: list[ZeropointError]
    used: set[Rule]


def _plan(model: nn.Module, sites: list[Site], recipe: Recipe) -> _Plan:
    plan = _Plan({}, {}, set(), [], set())
    for site in sites:
        rule = _rule_of(site, recipe)
        if rule is not None and (site.role is not None or rule.scheme is None):
            plan.used.add(rule)
        if rule is None or rule.scheme is None:
            plan.reasons[site] = "no rule matches" if rule is None else f"rule {rule} keeps it"
            plan.by_rule.add(site)
        elif site.obstacle is not None:
            plan.reasons[site] = site.obstacle
        else:
            quantized = quantized_type(site.module)
            assert quantized is not None
            try:
                rule.scheme.storage_bytes(quantized.weight_shape(site.module))
                plan.schemes[site] = rule.scheme
            except GroupSizeError as e:
                plan.obstacles.append(GroupSizeError(f"{site.name}: {e}"))
                plan.reasons[site] = str(e)
    _settle_ties(plan, sites)
    return plan


def _rule_of(site: Site, recipe: Recipe) -> Rule | None:
    """The first rule that matches any of the site's names.

    A site without a role is matched by rules for any role.
    """
    for rule in recipe.rules:
        roles: tuple[Role, ...] = (site.role,) if site.role else ("linear", "embedding", "head")
        if any(rule.matches(name, role) for name in site.names for role in roles):
            return rule
    return None


def _settle_ties(plan: _Plan, sites: list[Site]) -> None:
    """Sites that share a weight share its fate: one kept keeps all, and two schemes for one tensor
    are an error.
    """
    groups: dict[int, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.tied, []).append(site)
    for group in groups.values():
        kept = next((s for s in group if s in plan.reasons), None)
        chosen = {plan.schemes[s]: s for s in group if s in plan.schemes}
        if kept is not None:
            for site in group:
                if plan.schemes.pop(site, None):
                    plan.reasons[site] = f"tied to {kept.name}, which is kept: {plan.reasons[kept]}"
                    if kept in plan.by_rule:
                        plan.by_rule.add(site)
        elif len(chosen) > 1:
            (a, first), (b, second) = list(chosen.items())[:2]
            raise RecipeError(
                f"{first.name} and {second.name} are one tied weight, but the rules give {a} and "
                f"{b}; give both one scheme"
            )


def _check_rules(
    plan: _Plan, recipe: Recipe, model: nn.Module, sites: list[Site]
) -> list[ZeropointError]:
    errors: list[ZeropointError] = []
    for rule in recipe.rules:
        if rule in plan.used:
            continue
        names = [
            n for s in sites for n in s.names if rule.matches(n, s.role or rule.role or "linear")
        ]
        if names:
            earlier = any(_rule_of(s, recipe) is not rule for s in sites if names[0] in s.names)
            why = "an earlier rule takes them all" if earlier else "none of them can be quantized"
            errors.append(
                UnusedRuleError(f"rule {rule} decides nothing: of {names[0]!r} and others, {why}")
            )
        else:
            hint = _hint(rule.match, model, sites)
            errors.append(UnusedRuleError(f"rule {rule} matched no module; {hint}"))
    return errors


def _check_coverage(plan: _Plan, recipe: Recipe) -> list[ZeropointError]:
    if not plan.schemes:
        reasons = sorted({*plan.reasons.values()}) or ["the model has no weight matrices"]
        return [CoverageError(f"nothing would be quantized: {'; '.join(reasons[:3])}")]
    done = _elements(plan.schemes)
    missed = {s: s.elements for s in plan.reasons if s not in plan.by_rule}
    coverage = done / (done + _elements(missed))
    if coverage >= recipe.min_coverage:
        return []
    worst = sorted(missed, key=lambda s: -s.elements)[:3]
    listed = "; ".join(f"{s.name} ({s.elements:,} elements): {plan.reasons[s]}" for s in worst)
    return [
        CoverageError(
            f"{coverage:.1%} of the weights that no rule keeps would be quantized, the recipe "
            "promises at least "
            f"{recipe.min_coverage:.1%}: {listed}. Exclude them, lower min_coverage, or use "
            "strict=False"
        )
    ]


def _elements(sites: dict[Site, Scheme] | dict[Site, int]) -> int:
    return sum({s.tied: s.elements for s in sites}.values())


def _report(
    model: nn.Module, sites: list[Site], plan: _Plan, recipe: Recipe, warnings: tuple[str, ...]
) -> Report:
    modules = []
    owners: dict[int, Site] = {}
    for site in sites:
        owner = owners.setdefault(site.tied, site)
        scheme = plan.schemes.get(site)
        reason = plan.reasons.get(site)
        before = after = site.bytes
        kernel = None
        if scheme is not None:
            quantized = quantized_type(site.module)
            assert quantized is not None
            shape = quantized.weight_shape(site.module)
            after = scheme.storage_bytes(shape)
            device = next(site.module.parameters()).device.type
            kernel = choose(
                Spec(
                    op="embedding" if site.role == "embedding" else "linear",
                    scheme=scheme.stored,
                    shape=shape,
                    device="cpu" if device == "meta" else device,  # planned without values
                )
            ).kernel
        if owner is not site:
            before = after = 0
            reason = reason or f"tied to {owner.name}"
        modules.append(
            ModuleReport(
                name=site.name,
                action="kept" if scheme is None else "quantized",
                scheme=None if scheme is None else str(scheme),
                kernel=kernel,
                reason=reason,
                elements=site.elements,
                bytes_before=before,
                bytes_after=after,
            )
        )
    bytes_before = sum(t.nbytes for _, t in owned_tensors(model))
    bytes_after = bytes_before + sum(m.bytes_after - m.bytes_before for m in modules)
    everything = _elements({s: s.elements for s in sites})
    return Report(
        modules=tuple(modules),
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        bits_per_weight=8 * bytes_after / max(1, weight_elements(model)),
        coverage=_elements(plan.schemes) / max(1, everything),
        recipe=recipe,
        warnings=warnings,
    )
