"""The recipe that loses least in a given number of bytes.

Storing a weight w as w' costs, to second order and in nats per token,

    KL  ~  1/2 sum_k F_k (w_k - w'_k)^2,    F = E[g^2] per token, the diagonal of Fisher's matrix

g is the gradient of -log p(y) for tokens y that are drawn from the model's own answer: their scores
have no mean and do not correlate, so the square of a window's gradient has the expectation of the
sum of its tokens' squares, and one backward pass serves them all (Martens, arXiv:1412.1193).
A model without logits loses |y - y'|^2 / |y|^2, and there g is the gradient of <noise, y>.

Second order is blind to what errors do together. So the first allocation is stored, one kind of
layer at a time (all `mlp.down_proj`, say), the loss measured, and the kind's predictions scaled by
what was measured. Both allocations are measured as a whole, and the better one kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.algorithms import get_algorithm
from zeropoint.algorithms.allocate import Choice, Option, allocate, totals
from zeropoint.errors import GroupSizeError, NonFiniteError, RecipeError, ZeropointError
from zeropoint.flows.data import Prepared
from zeropoint.flows.distance import answer_of, distance
from zeropoint.model.capture import Batch, kept_tokens, run_model, sharing, tokens_of
from zeropoint.model.walk import Site
from zeropoint.nn import quantized_type
from zeropoint.progress import OnStep
from zeropoint.qtensor import QTensor
from zeropoint.scheme import Recipe, Rule, Scheme

UNITS = {"": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20} | {
    "gib": 2**30,
    "tib": 2**40,
    "b": 1,
}
DEFAULT_FORMATS = (
    Scheme.of("int2", group_size=32),
    Scheme.of("int3", group_size=64),
    Scheme.of("int3", group_size=32),
    Scheme.of("int4", group_size=64),
    Scheme.of("int4", group_size=32),
    Scheme.of("int5", group_size=64),
    Scheme.of("int6", group_size=64),
    Scheme.of("int8"),
)
TABLE_BITS = 4  # of embeddings and heads at least: calibration text sees few of their rows often
SCORE_TOKENS = 8192
MEASURED_TOKENS = 2048
SAMPLE_WEIGHTS = 1 << 15  # of a weight, to find the relative error of a scheme
NOISE = 1e-6  # of a measured loss: a mean of differences of float32 logarithms
ALGORITHM = "mse"  # whose images stand for the scheme: the best without data

Formats = Sequence[str | Scheme] | str | Scheme


def parse_bytes(text: str | float) -> int:
    """Bytes of "8GB", "7.5 GiB", "800" or a number. Raises RecipeError.

    >>> parse_bytes("8GB"), parse_bytes("1.5 KiB")
    (8000000000, 1536)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].lower() not in UNITS:
        raise RecipeError(f"{text!r} is no size; write a number and MB, GB, MiB or GiB")
    return int(float(match[1]) * UNITS[match[2].lower()])


def schemes_of(formats: Formats | None) -> tuple[Scheme, ...] | None:
    """Each scheme once; None stays None. Raises RecipeError, UnknownNameError."""
    if formats is None:
        return None
    given = (formats,) if isinstance(formats, (str, Scheme)) else tuple(formats)
    if not given:
        raise RecipeError("formats=[] leaves nothing to choose from; name some, or leave it out")
    schemes = (f if isinstance(f, Scheme) else Scheme.of(f) for f in given)
    return tuple(dict.fromkeys(schemes))


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What fits the budget. schemes: by site.

    predicted, measured: of the loss, on the same text and the same codes: nats of KL divergence per
    token, or the relative squared error of the answers of a model without logits.
    """

    schemes: dict[Site, Scheme]
    predicted: float
    measured: float
    logits: bool
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Item:
    """Weights that share a choice: one tied weight, or the layers of a module that read one input.

    sites: all modules, tied ones too. weights: one site for each parameter. schemes: to choose
    from; options: what each takes and is predicted to lose.
    """

    sites: tuple[Site, ...]
    weights: tuple[Site, ...]
    schemes: tuple[Scheme, ...]
    options: tuple[Option, ...] = ()

    @property
    def kind(self) -> str:
        """The same for all layers of one place in their block."""
        return _kind(self.weights[0].name)


@dataclass
class _Work:
    """The model while it is tried. images: what a weight becomes, by parameter and scheme."""

    model: nn.Module
    batches: list[Batch]
    targets: list[Any]
    on_step: OnStep
    images: dict[tuple[int, Scheme], QTensor] = field(default_factory=dict)


def spend(
    model: nn.Module,
    sites: Sequence[Site],
    limit: int,
    other_bytes: int,
    formats: tuple[Scheme, ...] | None,
    prepare: Callable[[], Prepared],
    seed: int,
    on_step: OnStep,
) -> Allocation:
    """The schemes with which the sites, beside `other_bytes` that are kept, lose least within the
    limit. The model runs, and is as it was afterwards.

    Raises RecipeError (the smallest choice is too large), GroupSizeError (no scheme fits a weight),
    NonFiniteError, ScaleRangeError, and what `prepare` raises.
    """
    # What can be refused without data is refused before it is prepared.
    items = [_item(group, formats) for group in _tied(sites)]
    _within(items, limit, other_bytes)
    with _evaluating(model):
        prepared = prepare()
        items = [_item(group, formats) for group in _sharing(model, sites, prepared.batches[0])]
        fixed = _within(items, limit, other_bytes)
        items, warnings = _scored(model, items, prepared.batches, seed, on_step)
        allocation = _confirmed(model, items, fixed, limit, prepared.batches, on_step)
    return replace(allocation, warnings=(*prepared.warnings, *warnings))


def _within(items: list[_Item], limit: int, other_bytes: int) -> Option:
    """What is not chosen, as an item's only option. Raises RecipeError when nothing fits."""
    fixed = Option(bytes=other_bytes, loss=0.0)
    sizes = [[Option(bytes=_bytes(i.weights, s), loss=0.0) for s in i.schemes] for i in items]
    allocate([[fixed], *([min(x, key=lambda o: o.bytes)] for x in sizes)], limit)
    return fixed


# --- which weights share a choice ---


def _tied(sites: Iterable[Site]) -> list[list[Site]]:
    groups: dict[int, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.tied, []).append(site)
    return list(groups.values())


def _sharing(model: nn.Module, sites: Sequence[Site], batch: Batch) -> list[list[Site]]:
    """Sites that share a choice: those of one weight, and layers of one module that read one input,
    which a runtime may fuse.
    """
    mates: dict[nn.Module, tuple[int, str]] = {}
    known = {site.module: site for site in sites}
    for number, readers in enumerate(sharing(model, partial(run_model, model, batch))):
        for module in readers:
            if module in known:
                mates[module] = (number, known[module].name.rpartition(".")[0])
    groups: dict[Any, list[Site]] = {}
    for group in _tied(sites):
        alone = len(group) > 1 or group[0].module not in mates
        key = group[0].tied if alone else mates[group[0].module]
        groups.setdefault(key, []).extend(group)
    return list(groups.values())


def _item(sites: list[Site], formats: tuple[Scheme, ...] | None) -> _Item:
    weights = tuple({site.tied: site for site in reversed(sites)}.values())[::-1]
    table = any(site.role in ("embedding", "head") for site in sites)
    given = DEFAULT_FORMATS if formats is None else formats
    if formats is None and table:
        given = tuple(s for s in given if s.fmt.bits >= TABLE_BITS)
    schemes, refusal = [], ""
    for scheme in given:
        try:
            _bytes(weights, scheme)
            schemes.append(scheme)
        except GroupSizeError as e:
            refusal = str(e)
    if not schemes:
        raise GroupSizeError(
            f"{sites[0].name}: {refusal}; or add a format per channel to formats, as int8, or "
            f"exclude={sites[0].name!r}"
        )
    return _Item(sites=tuple(sites), weights=weights, schemes=tuple(schemes))


def _bytes(weights: Iterable[Site], scheme: Scheme) -> int:
    return sum(scheme.storage_bytes(tuple(_matrix(site).shape)) for site in weights)


def _matrix(site: Site) -> Tensor:
    """The site's float weight as (N, K)."""
    return _layout(site, _parameter(site).detach())


def _layout(site: Site, weight: Tensor) -> Tensor:
    """(N, K) of a tensor in the layout of the site's weight, and back."""
    quantized = quantized_type(site.module)
    assert quantized is not None
    return quantized.from_layout(weight)


def _parameter(site: Site) -> nn.Parameter:
    parameter = site.module._parameters["weight"]
    assert parameter is not None
    return parameter


# --- what an option is predicted to lose ---


def _scored(
    model: nn.Module, items: list[_Item], batches: list[Batch], seed: int, on_step: OnStep
) -> tuple[list[_Item], tuple[str, ...]]:
    """The items with their options, and a warning about those that the data did not reach."""
    weights = [site for item in items for site in item.weights]
    squares = _squared_gradients(model, weights, batches, seed, on_step)
    power = {
        site: float((squares[site] * _matrix(site).float().square()).sum(dtype=torch.float64))
        for site in weights
    }
    unreached = [site for site in weights if power[site] == 0]
    reached = [site for site in weights if power[site] > 0]
    if not reached:
        raise RecipeError(
            "the model's answer does not depend on any weight that could be chosen; give data that "
            "it answers to"
        )
    mean = sum(power.values()) / sum(site.elements for site in reached)
    power |= {site: mean * site.elements for site in unreached}
    scored = []
    for done, item in enumerate(items):
        on_step("scoring " + item.weights[0].name, done, len(items))
        options = []
        for scheme in item.schemes:
            loss = sum(
                power[site] * _relative_error(site, squares[site], scheme) for site in item.weights
            )
            options.append(Option(bytes=_bytes(item.weights, scheme), loss=loss))
        scored.append(replace(item, options=tuple(options)))
    if not unreached:
        return scored, ()
    return scored, (
        f"{len(unreached)} weights, such as {unreached[0].name}, do not show in the model's "
        "answers to this data; they count as weights of average sensitivity",
    )


def _squared_gradients(
    model: nn.Module, weights: list[Site], batches: list[Batch], seed: int, on_step: OnStep
) -> dict[Site, Tensor]:
    """E[g^2] of the expected loss, (N, K) float32: the loss of an error e is sum e^2 of it."""
    device = _parameter(weights[0]).device
    generator = torch.Generator(device).manual_seed(seed)
    wanted = {_parameter(site): torch.zeros_like(_matrix(site).float()) for site in weights}
    layouts = {_parameter(site): partial(_layout, site) for site in weights}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def add(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        wanted[parameter] += layouts[parameter](parameter.grad).float().square()
        parameter.grad = None  # one gradient at a time: together they are a second model

    hooks: list[Any] = []
    norm = 0.0
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(parameter in wanted)
        hooks = [p.register_post_accumulate_grad_hook(add) for p in wanted]
        with torch.enable_grad():
            for done, batch in enumerate(batches):
                on_step("gradients", done, len(batches))
                score, size = _score(run_model(model, batch), batch, generator)
                score.backward()
                norm += size
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
    found = {site: wanted[_parameter(site)].div_(norm) for site in weights}
    for site, square in found.items():
        if not bool(square.isfinite().all()):
            raise NonFiniteError(
                f"{site.name}.weight: its gradient has NaN or Inf, as of a model that overflows on "
                "this data; load it as float32"
            )
    return found


def _score(output: Any, batch: Batch, generator: torch.Generator) -> tuple[Tensor, float]:
    """What to differentiate, and by what to divide squared gradients to get the loss.

    Logits: sum of -log p(y) with y ~ p, and 2 tokens. Others: <noise, y>, and |y|^2.
    """
    answer, logits = answer_of(output)
    rows = tokens_of(answer, kept_tokens(batch)).float()
    if not bool(rows.isfinite().all()):
        raise NonFiniteError("the model answers with NaN or Inf on this data; load it as float32")
    if logits:
        with torch.no_grad():
            drawn = torch.multinomial(rows.softmax(-1), 1, generator=generator).squeeze(-1)
        return nn.functional.cross_entropy(rows, drawn, reduction="sum"), 2.0 * len(rows)
    noise = torch.randn(rows.shape, generator=generator, device=rows.device)
    return (noise * rows).sum(), float(rows.detach().square().sum(dtype=torch.float64))


def _relative_error(site: Site, squares: Tensor, scheme: Scheme) -> float:
    """sum F (w - w')^2 / sum F w^2 on evenly spaced rows: it differs little between rows, where
    F and w themselves differ much.
    """
    weight = _matrix(site)
    stride = max(1, weight.numel() // SAMPLE_WEIGHTS)
    rows = weight[::stride].contiguous()
    try:
        image = get_algorithm(ALGORITHM)(rows, scheme).dequantize(torch.float32)
    except ZeropointError as e:
        raise type(e)(f"{site.name}.weight: {e}") from e
    importance = squares[::stride]
    if not bool(importance.any()):
        importance = torch.ones_like(importance)
    power = (importance * rows.float().square()).sum(dtype=torch.float64)
    lost = (importance * (rows.float() - image).square()).sum(dtype=torch.float64)
    return float(lost / power) if power > 0 else 0.0


# --- what it does lose ---


def _confirmed(
    model: nn.Module,
    items: list[_Item],
    fixed: Option,
    limit: int,
    batches: list[Batch],
    on_step: OnStep,
) -> Allocation:
    """Allocate, measure kind by kind, allocate again, and keep what is measured to lose less."""
    few = batches[: _count(batches, MEASURED_TOKENS)]
    with torch.no_grad():
        targets = [run_model(model, batch) for batch in few]
    work = _Work(model, few, targets, on_step)
    first = _choose(items, fixed, limit)
    items = _scaled(work, items, first)
    second = _choose(items, fixed, limit)
    choices = list(dict.fromkeys((first, second)))
    losses = [_measure(work, _chosen(items, choice)) for choice in choices]
    measured = min(losses)
    choice = choices[losses.index(measured)]
    return Allocation(
        schemes={site: s for item, s in _chosen(items, choice) for site in item.sites},
        predicted=totals([item.options for item in items], choice).loss,
        measured=measured,
        logits=answer_of(targets[0])[1],
        warnings=(),
    )


def _choose(items: list[_Item], fixed: Option, limit: int) -> Choice:
    return allocate([(fixed,), *(item.options for item in items)], limit)[1:]


def _chosen(items: list[_Item], choice: Choice) -> list[tuple[_Item, Scheme]]:
    return [(item, item.schemes[i]) for item, i in zip(items, choice, strict=True)]


def _scaled(work: _Work, items: list[_Item], choice: Choice) -> list[_Item]:
    """The items with the losses of every kind scaled to what its choice is measured to lose."""
    kinds: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        kinds.setdefault(item.kind, []).append(i)
    factors = {}
    for done, (kind, members) in enumerate(kinds.items()):
        work.on_step(f"measuring {kind}", done, len(kinds))
        of_kind = [items[i] for i in members], tuple(choice[i] for i in members)
        predicted = totals([item.options for item in of_kind[0]], of_kind[1]).loss
        measured = _measure(work, _chosen(*of_kind))
        factors[kind] = measured / predicted if min(measured, predicted) > NOISE else 1.0
    return [
        replace(
            item,
            options=tuple(replace(o, loss=o.loss * factors[item.kind]) for o in item.options),
        )
        for item in items
    ]


@torch.no_grad()
def _measure(work: _Work, chosen: list[tuple[_Item, Scheme]]) -> float:
    """Mean loss per token while the chosen items are stored so, and all others as they are."""
    with _stored(work, chosen):
        losses = [
            float(distance(run_model(work.model, batch), target, batch))
            for batch, target in zip(work.batches, work.targets, strict=True)
        ]
    loss = sum(losses) / len(losses)
    if loss != loss:
        raise NonFiniteError(
            "the quantized model answers with NaN or Inf on this data; leave the smallest formats "
            "out, or load it as float32"
        )
    return max(loss, 0.0)  # a divergence is never negative, its rounding may be


@contextmanager
def _stored(work: _Work, chosen: list[tuple[_Item, Scheme]]) -> Iterator[None]:
    """The model with images in the place of weights."""
    before = []
    try:
        for item, scheme in chosen:
            for site in item.weights:
                parameter = _parameter(site)
                before.append((parameter, parameter.data))
                image = _image(work, site, scheme).dequantize()
                parameter.data = _layout(site, image).contiguous()
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


def _image(work: _Work, site: Site, scheme: Scheme) -> QTensor:
    key = (site.tied, scheme)
    if key not in work.images:
        try:
            work.images[key] = get_algorithm(ALGORITHM)(_matrix(site), scheme)
        except ZeropointError as e:
            raise type(e)(f"{site.name}.weight: {e}") from e
    return work.images[key]


def _count(batches: list[Batch], tokens: int) -> int:
    """How many batches, from the first, hold that many tokens; at least one."""
    seen = 0
    for i, batch in enumerate(batches):
        ids = batch if isinstance(batch, Tensor) else next(iter(batch.values()))
        seen += ids.shape[0] * (ids.shape[1] if ids.dim() > 1 else 1)
        if seen >= tokens:
            return i + 1
    return len(batches)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training:
            module.training = was_training


# --- from schemes to a recipe ---


def _kind(name: str) -> str:
    """The name with `*` for numbers: what layers of one place in their block have in common."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def recipe_of(schemes: Mapping[Site, Scheme], kept: Sequence[Rule]) -> Recipe:
    """Rules that give every site its scheme: one for each kind with the scheme most of it has,
    before them one for each exception, or for all below one module where they agree.
    """
    kinds: dict[str, Counter[Scheme]] = {}
    for site, scheme in schemes.items():
        kinds.setdefault(_kind(site.name), Counter())[scheme] += 1
    general = [
        Rule(match=kind, scheme=counts.most_common(1)[0][0]) for kind, counts in kinds.items()
    ]
    special: dict[str, Rule] = {}
    for site, scheme in schemes.items():
        if _decides(general, site) != scheme and _decides(special.values(), site) is None:
            match = _widest(site, schemes)
            special[match] = Rule(match=match, scheme=scheme)
    rules = (*kept, *special.values(), *general)
    used = {id(_first(rules, site)) for site in schemes}
    assert all(_decides(rules, site) == scheme for site, scheme in schemes.items())
    return Recipe(rules=tuple(r for r in rules if r in kept or id(r) in used))


def _first(rules: Iterable[Rule], site: Site) -> Rule | None:
    assert site.role is not None
    return next((r for r in rules if any(r.matches(n, site.role) for n in site.names)), None)


def _decides(rules: Iterable[Rule], site: Site) -> Scheme | None:
    rule = _first(rules, site)
    return None if rule is None else rule.scheme


def _widest(site: Site, schemes: Mapping[Site, Scheme]) -> str:
    """A pattern for the largest module around the site below which all have its scheme."""
    parts = site.name.split(".")
    for depth in range(1, len(parts)):
        match = ".".join(parts[:depth]) + ".*"
        rule = Rule(match=match)
        below = [s for s in schemes if any(rule.matches(n, s.role or "linear") for n in s.names)]
        if len(below) > 1 and {schemes[s] for s in below} == {schemes[site]}:
            return match
    return site.name
