"""Static ranges of activations: seen while the model runs on calibration data, then fixed.

    with zp.calibrate(model, observer="mse"):
        model(**batch)
    print(zp.calibration_table(model))

Every input of every linear layer whose scheme rounds activations is seen by the layer itself, so it
does not matter how the model calls it. Tokens of padding are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.errors import NonFiniteError, StateError, ZeropointError
from zeropoint.flows.data import Calibration, Data, Prepared, prepare
from zeropoint.model.capture import run_model
from zeropoint.model.padding import following_masks
from zeropoint.model.walk import quantized_modules
from zeropoint.nn import QLinear
from zeropoint.nn.inputs import InputRange
from zeropoint.numerics import get_format
from zeropoint.numerics.activations import static_parameters
from zeropoint.observers import Range, RangeObserver, make_observer
from zeropoint.progress import OnStep, no_progress


@contextmanager
def calibrate(
    model: nn.Module,
    observer: str = "mse",
    *,
    percentile: float | None = None,
    momentum: float | None = None,
) -> Iterator[None]:
    """Give the linear layers of a quantized model static ranges for their inputs. In place.

    Inside, layers multiply their inputs as they are and show them to observers; run the model on
    data like that of its later use. On leaving, every range becomes the layer's scale and zero
    point, in place of the scales of single tokens, or of the ranges of an earlier calibration. The
    model may be live or frozen. Layers with an outlier threshold stay dynamic: which of their
    columns are outliers is decided anew for every input.

    observer: "mse", "minmax", "moving_average", "percentile" or "kl"; see `docs/calibration.md`.
    percentile: of "percentile", 99.999. momentum: of "moving_average", 0.9.
    Raises StateError (no layer rounds its inputs, or one saw none, or the model is being
    calibrated already), NonFiniteError (NaN or Inf in an input), UnknownNameError, RecipeError,
    ScaleRangeError. When anything is raised inside, or on leaving, the model is as it was before.
    """
    layers = _layers(model)
    observers = {
        name: make_observer(
            observer, layer.scheme.activations or "", percentile=percentile, momentum=momentum
        )
        for name, layer in layers.items()
    }
    if any(layer.watched for layer in layers.values()):
        raise StateError("the model is being calibrated already; leave that `with` first")
    try:
        with following_masks(model) as kept:
            for name, layer in layers.items():
                layer.watch(partial(_see, name, observers[name], kept))
            yield
    finally:
        for layer in layers.values():
            layer.watch(None)
    seen = {name: o.result() for name, o in observers.items()}
    _check_all_seen(seen)
    parts = {name: _parts(name, layer, seen[name]) for name, layer in layers.items()}
    for name, layer in layers.items():
        low, high, samples = seen[name]
        source = InputRange(observer=str(observers[name]), samples=samples, low=low, high=high)
        layer.fix_input(*parts[name], source)


def calibrate_on(
    model: nn.Module,
    observer: str,
    data: Data | None,
    tokenizer: Any,
    options: Calibration,
    on_step: OnStep = no_progress,
) -> Prepared:
    """`calibrate`, with the batches that `zp.freeze` would make of the data. In place.

    Raises TextError (unusable data), and what `calibrate` raises. Returns the batches.
    """
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        prepared = prepare(model, data, tokenizer, options, on_step)
        with calibrate(model, observer), torch.no_grad():
            for done, batch in enumerate(prepared.batches):
                on_step("calibrating activations", done, len(prepared.batches))
                run_model(model, batch)
    finally:
        for module, was_training in training:
            module.training = was_training
    return prepared


def _layers(model: nn.Module) -> dict[str, QLinear]:
    """The layers that can have a static range, by name. Raises StateError when there are none."""
    modules = quantized_modules(model).items()
    rounding = {n: m for n, m in modules if isinstance(m, QLinear) and m.scheme.activations}
    if not rounding:
        raise StateError(
            "no layer of the model rounds its inputs; call zp.quantize(model, ..., "
            'activations="int8") first'
        )
    layers = {n: m for n, m in rounding.items() if m.scheme.outlier_threshold is None}
    if not layers:
        raise StateError(
            "every layer that rounds its inputs has an outlier_threshold, and decides by each "
            "input what to round; there is nothing to calibrate"
        )
    return layers


def _see(name: str, observer: RangeObserver, kept: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Show an input to its observer. x: (..., K) float."""
    tokens = kept(x.detach())
    if not torch.isfinite(tokens).all():
        raise NonFiniteError(
            f"{name}: its input holds NaN or Inf, of which there is no range; look at the "
            "calibration data, or for an overflow in the model (use dtype='float32')"
        )
    observer.update(tokens)


def _check_all_seen(seen: dict[str, Range]) -> None:
    missed = [name for name, found in seen.items() if not found.samples]
    if missed:
        others = f" and {len(missed) - 1} other layers" if missed[1:] else ""
        raise StateError(
            f"{missed[0]}{others} saw no input while calibrating; run the model on data that "
            f"reaches it, or leave it out: zp.quantize(model, ..., exclude={missed[0]!r})"
        )


def _parts(name: str, layer: QLinear, seen: Range) -> tuple[Tensor, Tensor | None]:
    try:
        return static_parameters(seen.low, seen.high, layer.scheme.activations or "")
    except ZeropointError as e:
        raise type(e)(f"{name}: its inputs reach from {seen.low:g} to {seen.high:g}: {e}") from e


# --- what came of it ---


@dataclass(frozen=True, kw_only=True)
class CalibratedLayer:
    """One layer with a static range.

    observer, samples: who chose it, and after how many tokens; None where a checkpoint does not
    say. low, high: the range asked for. scale, zero_point: what stands for it; None for float8.
    """

    module: str
    observer: str | None
    samples: int | None
    low: float
    high: float
    scale: float
    zero_point: int | None


@dataclass(frozen=True, kw_only=True, repr=False)
class CalibrationTable:
    """Every layer with a static range, in the model's order."""

    rows: tuple[CalibratedLayer, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `{"modules": [{module, observer, samples, low, high, scale, ...}]}`."""
        return {"modules": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        lines = [("module", "samples", "low", "high", "scale", "zero point", "observer")]
        for row in self.rows:
            samples = "" if row.samples is None else f"{row.samples:,}"
            zero_point = "" if row.zero_point is None else str(row.zero_point)
            ends = f"{row.low:.4g}", f"{row.high:.4g}", f"{row.scale:.4g}"
            lines.append((row.module, samples, *ends, zero_point, row.observer or ""))
        widths = [max(len(line[i]) for line in lines) for i in range(6)]
        return "\n".join(
            f"{line[0]:{widths[0]}}  "
            + "  ".join(f"{cell:>{w}}" for cell, w in zip(line[1:6], widths[1:], strict=True))
            + f"  {line[6]}".rstrip()
            for line in lines
        )

    __repr__ = __str__  # what a bare call shows in a notebook


def calibration_table(model: nn.Module) -> CalibrationTable:
    """The static ranges of a model's layers: those of `zp.calibrate`, or of its checkpoint.

    Raises StateError when it has none.
    """
    rows = [_row(name, layer) for name, layer in layers_with_ranges(model).items()]
    if not rows:
        raise StateError(
            "no layer of the model has a static range; run it on calibration data inside "
            "`with zp.calibrate(model):`"
        )
    return CalibrationTable(rows=tuple(rows))


def layers_with_ranges(model: nn.Module) -> dict[str, QLinear]:
    """The layers whose inputs have a static range, by name."""
    modules = quantized_modules(model).items()
    return {n: m for n, m in modules if isinstance(m, QLinear) and m.input_scale is not None}


def _row(name: str, layer: QLinear) -> CalibratedLayer:
    assert layer.input_scale is not None and layer.scheme.activations is not None
    scale = float(layer.input_scale)
    zero_point = None if layer.input_zero_point is None else int(layer.input_zero_point)
    fmt = get_format(layer.scheme.activations)
    if fmt.kind == "float8":
        low, high = -scale * fmt.real_max, scale * fmt.real_max
    else:
        low, high = (scale * (q - (zero_point or 0)) for q in (fmt.q_min, fmt.q_max))
    source = layer.input_range
    return CalibratedLayer(
        module=name,
        observer=source.observer if source else None,
        samples=source.samples if source else None,
        low=source.low if source else low,
        high=source.high if source else high,
        scale=scale,
        zero_point=zero_point,
    )
