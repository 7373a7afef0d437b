"""What `quantize` would do to a model: from its arguments to a recipe, from the recipe to a scheme
for every weight, and the report of it. Nothing is changed, and the model may be without values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from zeropoint.errors import (
    CoverageError,
    GroupSizeError,
    RecipeError,
    StateError,
    UnusedRuleError,
    ZeropointError,
    nearest,
)
from zeropoint.flows.report import ModuleReport, Report
from zeropoint.kernels.select import choose
from zeropoint.kernels.spec import Spec
from zeropoint.model.replace import replace_module
from zeropoint.model.walk import (
    Site,
    is_quantized,
    named_modules,
    owned_tensors,
    weight_elements,
    weight_sites,
)
from zeropoint.nn import quantized_type
from zeropoint.scheme import PER_CHANNEL, Recipe, Role, Rule, Scheme

Patterns = str | Sequence[str] | None


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
        recipe = _recipe(linear, as_patterns(include), as_patterns(exclude), model, sites)
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


# --- from arguments to a recipe ---


def as_patterns(value: Patterns) -> tuple[str, ...] | None:
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
