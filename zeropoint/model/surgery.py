"""What an operation on a model's structure did: `resize_token_embeddings`, `prune_heads`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from zeropoint.model.walk import named_modules, owned_tensors
from zeropoint.nn import QModule, quantized_type


@dataclass(frozen=True, kw_only=True)
class WeightChange:
    """One weight matrix of another shape. shapes: (N, K). schemes: None for a float weight."""

    name: str
    shape_before: tuple[int, int]
    shape_after: tuple[int, int]
    scheme_before: str | None
    scheme_after: str | None


@dataclass(frozen=True, kw_only=True)
class SurgeryReport:
    """The weights that have changed, and the bytes of the whole model. `print(report)` shows it."""

    changes: tuple[WeightChange, ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        before, after = (f"{n / 1e6:.2f}" for n in (self.bytes_before, self.bytes_after))
        weights = "weight" if len(self.changes) == 1 else "weights"
        lines = [f"{before} -> {after} MB, {len(self.changes)} {weights} changed"]
        for change in self.changes:
            shapes = " -> ".join(f"{n} x {k}" for n, k in (change.shape_before, change.shape_after))
            schemes = [s or "float" for s in (change.scheme_before, change.scheme_after)]
            lines.append(f"  {change.name}: {shapes}, {' -> '.join(dict.fromkeys(schemes))}")
        return "\n".join(lines)

    __repr__ = __str__  # what a bare call shows in a notebook


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A model's weight matrices as they were: shape and scheme by name, and all its bytes."""

    weights: dict[str, tuple[tuple[int, int], str | None]]
    nbytes: int

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """Now."""
        weights = {n[0]: found for m, n in named_modules(model).items() if (found := _weight(m))}
        return cls(weights=weights, nbytes=sum(t.nbytes for _, t in owned_tensors(model)))

    def compared(self, model: nn.Module) -> SurgeryReport:
        """What has become of the model since."""
        now = Snapshot.of(model)
        changes = []
        for name, (shape, scheme) in now.weights.items():
            shape_before, scheme_before = self.weights[name]
            if (shape_before, scheme_before) != (shape, scheme):
                changes.append(
                    WeightChange(
                        name=name,
                        shape_before=shape_before,
                        shape_after=shape,
                        scheme_before=scheme_before,
                        scheme_after=scheme,
                    )
                )
        return SurgeryReport(
            changes=tuple(changes), bytes_before=self.nbytes, bytes_after=now.nbytes
        )


def _weight(module: Any) -> tuple[tuple[int, int], str | None] | None:
    if isinstance(module, QModule):
        return module.shape, str(module.scheme)
    kind = quantized_type(module)
    return None if kind is None else (kind.weight_shape(module), None)
