"""Report: what was quantized, what was left, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

from zeropoint.scheme import Recipe


@dataclass(frozen=True, kw_only=True)
class ModuleReport:
    """One module that owns weight matrices.

    scheme: as text, None when kept. kernel: what will compute it, None when kept. reason: why it
    was kept, or what it is tied to. bytes_before, bytes_after: of its weight matrices; a tied
    weight counts where it is stored, 0 elsewhere.
    """

    name: str
    action: Literal["quantized", "kept"]
    scheme: str | None
    kernel: str | None
    reason: str | None
    elements: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """How the codes of one weight were found.

    algorithm: the one whose codes were kept. reason: why not the one asked for, or what had to be
    done. output_error: |(W - Q) X|^2 / |W X|^2 over its calibration inputs X, None without them.
    hessian_gain: tr(H) / tr(D), the most that error feedback can win over rounding. limit_gain: the
    most that any order and rotation could. gap_db: how far the error is above the least that as
    many bits allow (`algorithms.choice.error_limit`). damping: share of mean(diag H) added to H.
    tokens: calibration tokens that reached it. folded_into: the module that absorbed the factors of
    its input channels, None where nothing could.
    """

    name: str
    algorithm: str
    reason: str | None = None
    output_error: float | None = None
    hessian_gain: float | None = None
    limit_gain: float | None = None
    gap_db: float | None = None
    damping: float | None = None
    tokens: int = 0
    folded_into: str | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainingReport:
    """What `zp.finetune` did. losses: (steps done, loss of the last) on training batches; held_out:
    (steps done, mean loss) on batches that are not trained on, the first before any step. Losses
    are nats of KL divergence, or relative squared errors for models without logits.

    best_step: the step whose state the model has now. tokens, source: what the data was.
    """

    losses: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    best_step: int
    tokens: int
    source: str
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as the command line's JSON has it under `training`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        lines = [f"{len(self.losses)} steps on {self.tokens:,} tokens of {self.source}"]
        if self.held_out:
            best = dict(self.held_out)[self.best_step]
            lines.append(
                f"  held-out loss {self.held_out[0][1]:.4g} -> {best:.4g} after "
                f"{self.best_step} steps"
            )
        return "\n".join(lines + [f"  warning: {w}" for w in self.warnings])

    __repr__ = __str__  # what a bare call shows in a notebook


@dataclass(frozen=True, kw_only=True, repr=False)
class FreezeReport:
    """What `zp.freeze` did: how the codes of every weight were found.

    calibration: what the data was, None when the algorithm needs none. tokens: how many. tuning:
    what learning scales, norms and biases brought, None where they were left.
    """

    algorithm: str
    layers: tuple[LayerReport, ...]
    calibration: str | None = None
    tokens: int = 0
    tuning: TrainingReport | None = None
    warnings: tuple[str, ...] = ()

    @property
    def worst(self) -> tuple[LayerReport, ...]:
        """The layers with a known output error, largest first."""
        known = [layer for layer in self.layers if layer.output_error is not None]
        return tuple(sorted(known, key=lambda layer: -(layer.output_error or 0.0)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as the command line's JSON has it under `calibration`."""
        return {
            "source": self.calibration,
            "tokens": self.tokens,
            "warnings": list(self.warnings),
            "tuning": self.tuning and self.tuning.to_dict(),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        kept = Counter(layer.algorithm for layer in self.layers)
        lines = [
            f"{self.algorithm}: "
            + ", ".join(f"{count} weights by {name}" for name, count in kept.most_common())
            + (f"; {self.tokens:,} tokens of {self.calibration}" if self.calibration else "")
        ]
        balanced = sum(layer.folded_into is not None for layer in self.layers)
        if self.worst:
            lines.append(f"  {balanced} of {len(self.worst)} balanced with the module before them")
        for layer in self.worst[:5]:
            lines.append(f"  {layer.name}: {layer.output_error:.2%} of the output lost")
        for layer in self.layers:
            if layer.reason is not None and layer.algorithm != self.algorithm:
                lines.append(f"  {layer.name}: {layer.algorithm}, because {layer.reason}")
        if self.tuning is not None:
            lines.append(f"  scales tuned: {self.tuning}")
        return "\n".join(lines + [f"  warning: {w}" for w in self.warnings])

    __repr__ = __str__  # what a bare call shows in a notebook


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `zp.quantize` did to a model.

    bytes_before, bytes_after: all parameters and buffers, tied ones once; after means frozen.
    coverage: share of weight-matrix elements that are quantized. bits_per_weight: 8 * bytes_after /
    parameters.
    warnings: what `strict=True` would have refused.
    budget_bytes: what the whole model had to fit in; None without a budget, as the rest then is.
    predicted_kl, measured_kl: what the recipe costs, in nats per token, by second order and by
    running the model, both with codes on the grid of least squared error (algorithm "mse").
    predicted_error, measured_error: instead of these for a model without logits, the relative
    squared error of its answers.
    calibration: of `zp.compress` with data, how the codes were found.
    """

    modules: tuple[ModuleReport, ...]
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    coverage: float
    recipe: Recipe
    warnings: tuple[str, ...] = ()
    budget_bytes: int | None = None
    predicted_kl: float | None = None
    measured_kl: float | None = None
    predicted_error: float | None = None
    measured_error: float | None = None
    calibration: FreezeReport | None = None

    @property
    def kept(self) -> tuple[ModuleReport, ...]:
        """The modules that were not quantized."""
        return tuple(m for m in self.modules if m.action == "kept")

    @property
    def budget_line(self) -> str:
        """The budget and the losses in words; empty without a budget."""
        if self.budget_bytes is None:
            return ""
        losses = {"nats of KL per token": (self.predicted_kl, self.measured_kl)}
        losses["relative error"] = (self.predicted_error, self.measured_error)
        shown = "".join(
            f": predicted loss {predicted:.4g}, measured {measured:.4g} {unit}"
            for unit, (predicted, measured) in losses.items()
            if predicted is not None and measured is not None
        )
        return f"budget {self.budget_bytes / 1e6:,.1f} MB{shown}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as the command line's JSON has it."""
        data = asdict(self) | {"recipe": self.recipe.to_dict(), "warnings": list(self.warnings)}
        data["modules"] = [asdict(m) for m in self.modules]
        data["calibration"] = self.calibration and self.calibration.to_dict()
        return data

    def __str__(self) -> str:
        lines = [
            f"{self.bytes_before / 1e6:,.1f} MB -> {self.bytes_after / 1e6:,.1f} MB, "
            f"{self.bits_per_weight:.2f} bits per weight, {self.coverage:.1%} of weight matrices "
            "quantized"
        ]
        if self.budget_bytes is not None:
            lines.append("  " + self.budget_line)
        groups: dict[tuple[str, str], list[ModuleReport]] = {}
        for m in self.modules:
            what = m.scheme if m.action == "quantized" else "kept"
            groups.setdefault((what or "", m.reason or ""), []).append(m)
        for (what, reason), members in groups.items():
            size = sum(m.bytes_before for m in members), sum(m.bytes_after for m in members)
            shown = members[0].name + (f" ... ({len(members)} modules)" if len(members) > 1 else "")
            lines.append(
                f"  {what}: {shown}, {size[0] / 1e6:,.2f} -> {size[1] / 1e6:,.2f} MB"
                + (f"; {reason}" if reason else "")
            )
        return "\n".join(lines + [f"  warning: {w}" for w in self.warnings])


def data_free(report: Report, algorithm: str) -> FreezeReport:
    """What there is to say of codes that were found without data: one algorithm for all."""
    layers = [
        LayerReport(name=m.name, algorithm=algorithm, reason=m.reason)
        for m in report.modules
        if m.action == "quantized"
    ]
    return FreezeReport(algorithm=algorithm, layers=tuple(layers))
