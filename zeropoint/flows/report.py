"""Report: what was quantized, what was left, and why."""

from __future__ import annotations

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
class Report:
    """What `zp.quantize` did to a model.

    bytes_before, bytes_after: all parameters and buffers, tied ones once; after means frozen.
    coverage: share of weight-matrix elements that are quantized. bits_per_weight: 8 * bytes_after /
    parameters.
    warnings: what `strict=True` would have refused.
    """

    modules: tuple[ModuleReport, ...]
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    coverage: float
    recipe: Recipe
    warnings: tuple[str, ...] = ()

    @property
    def kept(self) -> tuple[ModuleReport, ...]:
        """The modules that were not quantized."""
        return tuple(m for m in self.modules if m.action == "kept")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as the command line's JSON has it."""
        data = asdict(self) | {"recipe": self.recipe.to_dict(), "warnings": list(self.warnings)}
        data["modules"] = [asdict(m) for m in self.modules]
        return data

    def __str__(self) -> str:
        lines = [
            f"{self.bytes_before / 1e6:,.1f} MB -> {self.bytes_after / 1e6:,.1f} MB, "
            f"{self.bits_per_weight:.2f} bits per weight, {self.coverage:.1%} of weight matrices "
            "quantized"
        ]
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
