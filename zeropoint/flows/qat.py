"""Training with quantization in the loop: a live model learns to answer as its float model does.

    float  --quantize-->  live  --finetune-->  live  --freeze-->  frozen  --finetune-->  frozen

The forward already uses the quantized weights and inputs, so freezing changes nothing but the
order of sums. Gradients pass straight through the rounding (arXiv:1308.3432) to the float weights,
and to scales and zero points where they are learned (arXiv:1902.08153).

Of a frozen model the codes stay, whatever algorithm has chosen them; scales, norms and biases learn
(the second phase of arXiv:2407.11062).
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zeropoint.checkpoints.journal import check_identity
from zeropoint.checkpoints.shard import as_bytes
from zeropoint.checkpoints.training import make_folder, read_state, write_state
from zeropoint.errors import NonFiniteError, RecipeError, StateError
from zeropoint.flows.activations import calibrate, layers_with_ranges
from zeropoint.flows.data import Calibration, Data, Prepared, prepare
from zeropoint.flows.dequantize import dequantize
from zeropoint.flows.distance import distance
from zeropoint.flows.report import TrainingReport
from zeropoint.model.capture import Batch, run_model
from zeropoint.model.save import recipe_of
from zeropoint.model.walk import quantized_modules
from zeropoint.nn import QLinear, QModule
from zeropoint.nn.inputs import InputRange
from zeropoint.progress import OnStep, no_progress

BETAS = (0.9, 0.95)  # short runs: the usual 0.999 would remember more steps than there are
MAX_NORM = 1.0  # of the gradient of all parameters together
WARM_UP = 0.1  # share of the steps in which the learning rate rises from 0
LAST_RATE = 0.1  # of the learning rate is left at the end of the cosine
TUNING_BATCHES = 4  # of calibration data, at least: fewer say nothing about what is better
TUNING_CHECKS = 8  # looks at the held-out data while scales are tuned
# What rounding has lost falls by 4 for every bit, and so must what a step of training changes. Of
# scales, as shares of their mean: the most, and the rate at 3 bits; of norms and biases a share.
TUNING_RATE, TUNING_RATE_OF_3, TUNING_SHARE = 4e-3, 3e-3, 0.25


@dataclass(frozen=True, kw_only=True)
class Training:
    """How `zp.finetune` trains.

    steps: optimizer steps, each of one batch of at most `batch_tokens` tokens in windows of
    `window`; of the data at most `tokens` tokens are used, drawn and ordered by `seed`.
    learning_rate: of AdamW, for weights; it rises, then falls along a cosine.
    scale_learning_rate: for learned scales, relative to their size. parameters: "all", or "scales"
    to leave weights, norms and biases as they are. held_out: share of the batches that is not
    trained on, but tried every `check_every` steps; the best state seen there is the result.
    patience: stop after so many tries without a better one; None never stops early. observer,
    observer_steps: inputs that the scheme rounds get static ranges, seen by this observer of
    `zp.calibrate` in the first steps, and fixed from then on. save_every: steps between two saved
    states. Raises RecipeError.
    """

    steps: int = 200
    learning_rate: float = 5e-5
    scale_learning_rate: float = 1e-3
    parameters: Literal["all", "scales"] = "all"
    tokens: int = 1 << 18
    window: int = 512
    batch_tokens: int = 2048
    seed: int = 0
    held_out: float = 0.05
    check_every: int = 20
    patience: int | None = None
    observer: str | None = None
    observer_steps: int = 20
    save_every: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "check_every", "observer_steps", "save_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name}={value}: use at least 1")
        for name in ("learning_rate", "scale_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise RecipeError(f"{name}={getattr(self, name)} is not a positive number")
        if not 0 <= self.held_out < 1:
            raise RecipeError(f"held_out={self.held_out} is not a share, 0 or more and less than 1")
        if self.parameters not in ("all", "scales"):
            raise RecipeError(f"parameters={self.parameters!r}: use 'all' or 'scales'")
        if self.observer is not None and self.observer_steps >= self.steps:
            raise RecipeError(
                f"observer_steps={self.observer_steps} leaves none of steps={self.steps} to train "
                "with the ranges; use fewer"
            )

    @property
    def calibration(self) -> Calibration:
        """The part of it that says which data are used."""
        return Calibration(
            tokens=self.tokens, window=self.window, batch_tokens=self.batch_tokens, seed=self.seed
        )


def finetune(
    model: nn.Module,
    data: Data,
    *,
    tokenizer: Any = None,
    teacher: nn.Module | None = None,
    training: Training | None = None,
    folder: str | Path | None = None,
    fresh: bool = False,
    on_step: OnStep = no_progress,
) -> TrainingReport:
    """Train a live or frozen model to answer as its float model does: distillation. In place.

    The loss is the Kullback-Leibler divergence of the model's next-token distribution from the
    teacher's (Hinton et al., arXiv:1503.02531), and where there are no logits, the squared distance
    of the outputs relative to their size. The model is trained as it is: call `model.train()`
    first for dropout, enable transformers' activation checkpointing to save memory.

    Of a frozen model the codes stay as they are, and scales, norms and biases learn.

    data: texts (with tokenizer=), token ids, batches or "self", as for `zp.freeze`. teacher: the
    model to follow; None for a copy with the float weights that a live model has now. training: how
    much, how fast, what. folder: where the state is saved every `save_every` steps; the same call
    on the same model goes on from there, with the same result, bit by bit on one thread; fresh
    begins anew.

    Raises StateError (the model is not quantized, or it is frozen and has no teacher, or the
    teacher answers in another shape), RecipeError
    (nothing to train), TextError (unusable data), NonFiniteError (the loss is no number),
    CheckpointError (a folder that holds another run, or cannot be written).
    """
    options = training or Training()
    modules = _modules(model, teacher)
    if teacher is None:
        teacher = float_copy(model)
    elif teacher is model:
        raise StateError("the model cannot be its own teacher; leave teacher out for a float copy")
    prepared = prepare(teacher, data, tokenizer, options.calibration, on_step)
    count = min(len(prepared.batches) - 1, math.ceil(options.held_out * len(prepared.batches)))
    with _free_scales(modules):
        trained = _trained(model, modules, options)
        run = _Run(
            model=model,
            teacher=teacher,
            options=options,
            trained=trained,
            optimizer=_optimizer(modules, trained, options),
            batches=prepared.batches[count:],
            held_out=prepared.batches[:count],
        )
        store = None if folder is None else _Store(Path(folder), run)
        with _only_these_train(model, trained):
            if store is not None and not fresh:
                store.resume()
            _train(run, store, on_step)
    return TrainingReport(
        losses=tuple(run.losses),
        held_out=tuple(run.checks),
        best_step=run.best_step if run.held_out else run.step,
        tokens=prepared.tokens,
        source=prepared.source,
        warnings=prepared.warnings,
    )


def tune(
    model: nn.Module, teacher: nn.Module, prepared: Prepared, options: Calibration, on_step: OnStep
) -> TrainingReport:
    """Let scales, norms and biases of a frozen model learn on its calibration data. In place.

    Raises RecipeError: no batch is left to hold out, so that nothing could say what is best.
    """
    batches: Any = [part for batch in prepared.batches for part in _halves(batch)]
    if len(batches) < TUNING_BATCHES:
        raise RecipeError(
            f"{prepared.tokens} calibration tokens are {len(batches)} batches, too few to train on "
            f"some and hold others out; give more data, or a smaller batch_tokens"
        )
    modules = [m for m in quantized_modules(model).values() if m.tied_to is None]
    linears = [m for m in modules if m.role == "linear"] or modules
    sizes = [math.prod(m.shape) for m in linears]
    noise = sum(n * 4.0 ** (3 - m.scheme.fmt.bits) for n, m in zip(sizes, linears, strict=True))
    fall = noise / sum(sizes)
    rate = min(TUNING_RATE, TUNING_RATE_OF_3 * fall)
    training = Training(
        steps=options.tune_steps,
        learning_rate=rate * TUNING_SHARE * min(1.0, fall),
        scale_learning_rate=rate,
        check_every=max(1, options.tune_steps // TUNING_CHECKS),
        seed=options.seed,
    )
    return finetune(model, batches, teacher=teacher, training=training, on_step=on_step)


def _halves(batch: Batch) -> list[Batch]:
    """Two batches of half the examples: more steps for the same work."""
    size = len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))
    cuts = (slice(0, size // 2), slice(size // 2, size)) if size > 1 else (slice(0, size),)
    if isinstance(batch, Tensor):
        return [batch[cut] for cut in cuts]
    return [{name: value[cut] for name, value in batch.items()} for cut in cuts]


@dataclass(kw_only=True)
class _Run:
    """A training run. losses, checks: (steps done, loss) on training and held-out batches.
    best: the trained tensors as they were at `best_step`; empty before the first check.
    """

    model: nn.Module
    teacher: nn.Module
    options: Training
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    batches: list[Batch]
    held_out: list[Batch]
    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    checks: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    best_loss: float = math.inf


# --- what is trained ---


def _modules(model: nn.Module, teacher: nn.Module | None) -> dict[str, QModule]:
    modules = quantized_modules(model)
    if not modules:
        raise StateError(
            "the model is not quantized, and a float one has nothing to learn from itself; call "
            "zp.quantize(model, ...) first"
        )
    frozen = next((name for name, m in modules.items() if m.frozen), None)
    if frozen is not None and teacher is None:
        raise StateError(
            f"{frozen} is frozen, so the model has no float weights to learn from; give the float "
            "model as teacher="
        )
    return modules


@contextmanager
def _free_scales(modules: dict[str, QModule]) -> Iterator[None]:
    """Scales of frozen linear layers as parameters, meanwhile. In place."""
    freed = [m for m in modules.values() if m.role == "linear" and m.scale_trains]
    for module in freed:
        module.free_scale()
    try:
        yield
    finally:
        for module in freed:
            module.fix_scale()


@contextmanager
def _only_these_train(model: nn.Module, trained: dict[str, nn.Parameter]) -> Iterator[None]:
    """No other parameter requires a gradient, meanwhile; none has one left afterwards. In place."""
    chosen = {id(p) for p in trained.values()}
    kept = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in kept:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, required in kept:
            parameter.requires_grad_(required)
            if id(parameter) in chosen:
                parameter.grad = None


def _trained(
    model: nn.Module, modules: dict[str, QModule], options: Training
) -> dict[str, nn.Parameter]:
    if options.parameters == "all":
        chosen = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not chosen:
            raise RecipeError("no parameter of the model requires a gradient; unfreeze some")
        return chosen
    grids = {id(part) for m in modules.values() for part in m.grid or () if part is not None}
    if not grids:
        raise RecipeError(
            "parameters='scales', but no layer learns its scale; call "
            "zp.quantize(model, ..., learned_scale=True)"
        )
    return {n: p for n, p in model.named_parameters() if id(p) in grids}


def _optimizer(
    modules: dict[str, QModule], trained: dict[str, nn.Parameter], options: Training
) -> torch.optim.Optimizer:
    """AdamW, whose steps do not depend on the size of a gradient: scales of all sizes need rates of
    their own. A scale moves by a share of its mean, a zero point by the same share of the codes.
    """
    rates: dict[int, float] = {}
    for module in modules.values():
        if module.grid is not None:
            scale, zero_point, _ = module.grid
            rates[id(scale)] = options.scale_learning_rate * float(scale.detach().abs().mean())
            if zero_point is not None:
                rates[id(zero_point)] = options.scale_learning_rate * module.scheme.fmt.real_max
    groups = [
        {"params": [p], "lr": rates.get(id(p), options.learning_rate)} for p in trained.values()
    ]
    for group in groups:
        group["rate"] = group["lr"]
    return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)


def float_copy(model: nn.Module) -> nn.Module:
    """The float model that a live one comes from. Doubles the memory of the weights."""
    teacher = copy.deepcopy(model)
    dequantize(teacher)
    return teacher.requires_grad_(False).eval()


# --- the loop ---


def _train(run: _Run, store: _Store | None, on_step: OnStep) -> None:
    options = run.options
    if options.observer is not None and run.step == 0:
        _check(run)
        with calibrate(run.model, options.observer):
            while run.step < options.observer_steps:
                _step(run, on_step)
        run.best, run.best_loss = {}, math.inf  # the model computes otherwise from here on
    while run.step < options.steps:
        if run.step % options.check_every == 0 and _check(run):
            break
        _step(run, on_step)
        if store is not None and run.step % options.save_every == 0:
            store.save()
    if run.held_out:
        if not run.checks or run.checks[-1][0] != run.step:
            _check(run)
        with torch.no_grad():
            for name, parameter in run.trained.items():
                parameter.copy_(run.best[name])
    on_step("", options.steps, options.steps)


def _step(run: _Run, on_step: OnStep) -> None:
    last = f"training, loss {run.losses[-1][1]:.4g}" if run.losses else "training"
    on_step(last, run.step, run.options.steps)
    loss = _loss(run, _batch(run))
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the loss is {value} at step {run.step}; use a smaller learning_rate than "
            f"{run.options.learning_rate:g}, or look at the data"
        )
    run.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.trained.values(), MAX_NORM)
    for group in run.optimizer.param_groups:
        group["lr"] = group["rate"] * _share(run.step, run.options.steps)
    run.optimizer.step()
    run.step += 1
    run.losses.append((run.step, value))


def _share(step: int, steps: int) -> float:
    """Of the learning rate, in the step after `step` steps: it rises, then falls along a cosine."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    way = (step - warm_up) / max(1, steps - warm_up)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * way)) / 2


def _batch(run: _Run) -> Batch:
    """Every batch once, in an order of its own each time around."""
    around, index = divmod(run.step, len(run.batches))
    generator = torch.Generator().manual_seed(run.options.seed + around)
    order = torch.randperm(len(run.batches), generator=generator)
    return run.batches[int(order[index])]


def _loss(run: _Run, batch: Batch) -> Tensor:
    with torch.no_grad():
        target = run_model(run.teacher, batch)
    return distance(run_model(run.model, batch), target, batch)


def _check(run: _Run) -> bool:
    """Try the held-out batches, without dropout; keep the state if it is the best. Returns whether
    to stop.
    """
    if not run.held_out:
        return False
    training = [(m, m.training) for m in run.model.modules()]
    run.model.eval()
    try:
        with torch.no_grad():
            losses = [float(_loss(run, batch)) for batch in run.held_out]
    finally:
        for module, was_training in training:
            module.training = was_training
    loss = sum(losses) / len(losses)
    run.checks.append((run.step, loss))
    if loss < run.best_loss or not run.best:
        run.best_loss, run.best_step = loss, run.step
        run.best = {name: p.detach().clone() for name, p in run.trained.items()}
    patience = run.options.patience
    since = sum(step > run.best_step for step, _ in run.checks)
    return patience is not None and since >= patience


# --- killed at any moment, it goes on ---


class _Store:
    """Where the state of a run is kept."""

    def __init__(self, folder: Path, run: _Run) -> None:
        self._folder, self._run = folder, run
        make_folder(folder)
        self._identity = {
            "training": asdict(run.options),
            "recipe": recipe_of(run.model).to_dict(),
            "model": _digest(run.model.state_dict().values()),
            "teacher": _digest(p for _, p in run.teacher.named_parameters()),
            "data": _digest(t for b in (*run.batches, *run.held_out) for t in _tensors(b)),
        }

    def save(self) -> None:
        """Raises CheckpointError."""
        run = self._run
        layers = layers_with_ranges(run.model)
        state = {
            "identity": self._identity,
            "step": run.step,
            "losses": run.losses,
            "checks": run.checks,
            "best_step": run.best_step,
            "best_loss": run.best_loss,
            "ranges": {n: m.input_range and asdict(m.input_range) for n, m in layers.items()},
        }
        tensors = {f"model.{name}": p.detach() for name, p in run.trained.items()}
        tensors |= {f"best.{name}": t for name, t in run.best.items()}
        moments = run.optimizer.state_dict()["state"]
        for number, parts in moments.items():
            tensors |= {f"optimizer.{number}.{name}": part for name, part in parts.items()}
        for name, layer in layers.items():
            assert layer.input_scale is not None
            tensors[f"input_scale.{name}"] = layer.input_scale
            if layer.input_zero_point is not None:
                tensors[f"input_zero_point.{name}"] = layer.input_zero_point
        tensors["random"] = torch.get_rng_state()
        write_state(self._folder, tensors, state)

    def resume(self) -> None:
        """Go on where the state in the folder ends, if there is one. Raises CheckpointError."""
        found = read_state(self._folder)
        if found is None:
            return
        tensors, state = found
        check_identity(self._folder, state["identity"], self._identity)
        run = self._run
        run.step = state["step"]
        run.losses = [(step, loss) for step, loss in state["losses"]]
        run.checks = [(step, loss) for step, loss in state["checks"]]
        run.best_step, run.best_loss = state["best_step"], state["best_loss"]
        run.best = {n.removeprefix("best."): t for n, t in tensors.items() if n.startswith("best.")}
        with torch.no_grad():
            for name, parameter in run.trained.items():
                parameter.copy_(tensors[f"model.{name}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                number, _, part = rest.partition(".")
                moments.setdefault(int(number), {})[part] = tensor
        groups = run.optimizer.state_dict()["param_groups"]
        run.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        modules = quantized_modules(run.model)
        for name, seen in state["ranges"].items():
            layer = modules[name]
            assert isinstance(layer, QLinear)
            zero_point = tensors.get(f"input_zero_point.{name}")
            source = None if seen is None else InputRange(**seen)
            layer.fix_input(tensors[f"input_scale.{name}"], zero_point, source)
        torch.set_rng_state(tensors["random"])


def _tensors(batch: Batch) -> list[Tensor]:
    return [batch] if isinstance(batch, Tensor) else [batch[name] for name in sorted(batch)]


def _digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the tensors' bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(as_bytes(tensor))
    return digest.hexdigest()
