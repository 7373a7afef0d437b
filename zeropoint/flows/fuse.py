"""Fewer passes over what lies between a model's linear layers: `zp.fuse`, and back: `zp.unfuse`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from zeropoint import native
from zeropoint.model.formula import gate_of, norm_of
from zeropoint.model.replace import replace_module
from zeropoint.model.rotary import attention_of
from zeropoint.model.walk import named_modules
from zeropoint.nn.fused import FusedAttention, FusedMLP, FusedModule, FusedRMSNorm, has_hooks


@dataclass(frozen=True, kw_only=True, repr=False)
class FusionReport:
    """What `zp.fuse` did, by names of modules. `print(report)` shows it.

    norms, gates, attentions: what is fused now. refused: why nothing could be, or None.
    """

    norms: tuple[str, ...]
    gates: tuple[str, ...]
    attentions: tuple[str, ...]
    refused: str | None = None

    @property
    def count(self) -> int:
        """Modules that are fused."""
        return len(self.norms) + len(self.gates) + len(self.attentions)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        if self.refused is not None:
            return f"nothing is fused: {self.refused}"
        return (
            f"{len(self.norms)} norms, {len(self.gates)} gated perceptrons and "
            f"{len(self.attentions)} attentions fused"
        )

    __repr__ = __str__


def fuse(model: nn.Module) -> FusionReport:
    """Compute RMS norms, the gates of perceptrons, and causal attention with its rotary embedding
    in one pass each where torch makes several; keys and values are cached without being copied for
    each token. In place; on a CPU, without gradients; quantized or not.

    Found by what their forwards compute (`model/formula.py`, `model/rotary.py`). They keep their
    names, parameters and children, so the model is saved, moved and trained as before, and `unfuse`
    brings the float modules back. Answers differ by roundings. Modules with hooks are left as they
    are, and attention with a mask (a padded batch) or without torch's sdpa runs as before.
    """
    if (reason := native.why_not()) is not None:
        return FusionReport(norms=(), gates=(), attentions=(), refused=reason)
    for module, names in named_modules(model).items():
        if "" in names or isinstance(module, FusedModule) or has_hooks(module):
            continue
        if (norm := norm_of(module)) is not None:
            replace_module(model, names, FusedRMSNorm(module, norm))
        elif (gate := gate_of(module)) is not None:
            replace_module(model, names, FusedMLP(module, gate))
        elif (attention := attention_of(module)) is not None:
            replace_module(model, names, FusedAttention(module, attention))
    return FusionReport(
        norms=_names(model, FusedRMSNorm),
        gates=_names(model, FusedMLP),
        attentions=_names(model, FusedAttention),
    )


def unfuse(model: nn.Module) -> None:
    """Bring back the modules that `fuse` replaced. In place."""
    for module, names in named_modules(model).items():
        if isinstance(module, FusedModule):
            replace_module(model, names, module.original)


def _names(model: nn.Module, kind: type[FusedModule]) -> tuple[str, ...]:
    return tuple(names[0] for m, names in named_modules(model).items() if isinstance(m, kind))
