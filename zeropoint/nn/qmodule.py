"""What all quantized modules share:

one weight that is live (float, used through its quantized image) or frozen.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zeropoint.errors import StateError
from zeropoint.kernels.select import choose
from zeropoint.kernels.spec import Spec
from zeropoint.numerics import (
    Grid,
    Quantized,
    blocked,
    check_finite,
    get_scale_dtype,
    grid_codes,
)
from zeropoint.numerics.learned import stored_grid
from zeropoint.qtensor import PARTS, QTensor
from zeropoint.scheme import Role, Scheme

PART_NAMES = {suffix: f"weight{suffix}" for suffix in PARTS}


class QModule(nn.Module):
    """A module with one quantized weight of N output rows and K columns.

    Live: `weight` is the float parameter; the forward uses its quantized image and gradients reach
    the parameter; so are weight_scale and weight_zero_point, float32, where the grid is learned.
    Frozen: the parts of a QTensor are buffers called weight, weight_scale, weight_zero_point and
    weight_levels, which are also their names in state_dict and on disk; `.weight` returns the
    QTensor. A frozen module that is tied to another holds no parts and reads the other's, so a tied
    weight is stored, moved and saved once.
    """

    float_type: ClassVar[str]
    """Qualified name of the float module this one replaces."""

    def __init__(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.scheme = scheme
        self.shape = shape
        self.kernel: str | None = None
        self.refused: dict[str, str] = {}  # faster kernels, and why this module does not use them
        self._dtype = dtype
        self._tied_to: tuple[
            QModule, ...
        ] = ()  # in a tuple, so that it is not registered as a child

    @classmethod
    @abstractmethod
    def from_float(cls, module: nn.Module, scheme: Scheme) -> QModule:
        """A live module that uses the same parameters as `module`."""

    @abstractmethod
    def to_float(self) -> nn.Module:
        """A float module. Live: with the same parameters. Frozen: with the dequantized weight."""

    @staticmethod
    def weight_shape(module: Any) -> tuple[int, int]:
        """(N, K) of the float module's weight."""
        n, k = module.weight.shape
        return int(n), int(k)

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """Why this float module cannot be replaced, or None."""
        return None

    @property
    def frozen(self) -> bool:
        """Codes only; no float weight is left."""
        return bool(self._tied_to) or "weight" in self._buffers

    @property
    def tied_to(self) -> QModule | None:
        """The module whose parts this one reads, or None when it holds its own."""
        return self._tied_to[0] if self._tied_to else None

    @property
    def weight(self) -> nn.Parameter | QTensor:
        """Live: the float parameter, in the float module's layout. Frozen: the QTensor, (N, K)."""
        if self.frozen:
            return self.qweight
        parameter = self._parameters["weight"]
        assert parameter is not None
        return parameter

    @weight.setter
    def weight(self, value: Any) -> None:
        """transformers ties weights by assigning one module's to another; ours are tied already."""
        packed = self._parts().get("weight") if self.frozen else None
        if packed is None or packed is not getattr(value, "packed", value):
            raise StateError(
                "the weight of a quantized module cannot be assigned; call zp.dequantize(model) "
                "first, or replace the module"
            )

    @property
    def qweight(self) -> QTensor:
        """The frozen weight, (N, K). A live module has no such attribute."""
        if not self.frozen:
            raise AttributeError("a live module has no codes")
        return self._qweight(self.scheme)

    def _qweight(self, scheme: Scheme) -> QTensor:
        """The frozen weight under a scheme that differs in how its inputs are treated."""
        held = self._parts()
        parts = {suffix: held.get(name) for suffix, name in PART_NAMES.items()}
        return QTensor.from_parts(parts, scheme=scheme, shape=self.shape, dtype=self._dtype)

    def _parts(self) -> dict[str, Tensor | None]:
        """The buffers that hold the frozen weight, and its scale where that is being trained."""
        owner = self._tied_to[0] if self._tied_to else self
        scale = owner._parameters.get("weight_scale")
        return owner._buffers if scale is None else owner._buffers | {"weight_scale": scale}

    @classmethod
    def from_layout(cls, weight: Tensor) -> Tensor:
        """(N, K) of a weight in the float module's layout, and back: its own inverse."""
        return weight

    def float_weight(self) -> Tensor:
        """The live float weight as (N, K)."""
        parameter = self._parameters["weight"]
        assert parameter is not None
        return parameter

    def freeze(self, weight: QTensor) -> None:
        """Hold `weight` instead of the float parameter, and choose the kernel. In place.

        Its scales may still be floats where the scheme stores them in 8 bits.
        """
        if self.frozen:
            raise StateError("the module is frozen already")
        self.scheme = self.scheme.stored
        if (
            weight.scheme != self.scheme
            and replace(self.scheme, double_quant=False) == weight.scheme
        ):
            weight = weight.with_scheme(self.scheme)
        if weight.scheme != self.scheme or tuple(weight.shape) != self.shape:
            raise StateError(
                f"the module needs {self.scheme} of shape {self.shape}, not {weight.scheme} of "
                f"shape {tuple(weight.shape)}"
            )
        self._dtype = weight.dtype
        self._drop_floats()
        for suffix, part in weight.parts.items():
            self._buffers[PART_NAMES[suffix]] = part
        self._choose_kernel()

    def freeze_tied(self, owner: QModule) -> None:
        """Read the parts of `owner`, which is frozen, instead of the float parameter. In place."""
        if self.frozen:
            raise StateError("the module is frozen already")
        self.scheme = self.scheme.stored
        if not owner.frozen or owner.scheme != self.scheme or owner.shape != self.shape:
            raise StateError(
                f"a module of {self.scheme}, shape {self.shape}, cannot be tied to one that is not "
                "frozen or differs from it"
            )
        self.follow(owner)
        self.loaded()

    def _drop_floats(self) -> None:
        for name in PART_NAMES.values():
            self._parameters.pop(name, None)

    @property
    def grid(self) -> Grid | None:
        """What is learned of the grid, (R, G) float32 parameters: of a live weight all of it, of a
        frozen one its scales. None where every forward finds the grid that spans the range.
        """
        scale = self._parameters.get("weight_scale")
        return None if scale is None else Grid(scale, self._parameters.get("weight_zero_point"))

    def learn_scale(self, start: Grid | QModule) -> None:
        """Make the grid of a live weight a parameter. In place.

        start: the grid to begin with, or the module whose parameters to share, as tied weights do.
        """
        if isinstance(start, QModule):
            names = [name for name in list(PART_NAMES.values())[1:] if name in start._parameters]
            self._parameters |= {name: start._parameters[name] for name in names}
            return
        self._parameters["weight_scale"] = nn.Parameter(start.scale.float())
        if start.zero_point is not None:
            self._parameters["weight_zero_point"] = nn.Parameter(start.zero_point.float())

    @property
    def scale_trains(self) -> bool:
        """Whether `free_scale` can be called: scales of the module's own, in 16 bits or more."""
        scale = self._buffers.get("weight_scale")
        return scale is not None and scale.dtype.itemsize > 1

    def free_scale(self) -> None:
        """Make the scales of a frozen weight a float32 parameter, until `fix_scale`. In place."""
        scale = self._buffers["weight_scale"]
        assert scale is not None
        self._buffers["weight_scale"] = None  # its place among the parts is kept
        self._parameters["weight_scale"] = nn.Parameter(scale.float())
        self._unbind()

    def fix_scale(self) -> None:
        """Store the scales of `free_scale` in the scheme's dtype again. In place."""
        scale = self._parameters.pop("weight_scale")
        assert scale is not None
        scheme = self.scheme
        self._buffers["weight_scale"] = stored_grid(
            scale.detach(),
            self._buffers.get("weight_zero_point"),
            scheme.fmt,
            get_scale_dtype(scheme.scale_dtype),
            float_zero_point=scheme.float_zero_point,
        ).scale
        self._unbind()

    def on_learned_grid(self) -> QTensor:
        """The live weight on its learned grid, as the forward uses it. Raises NonFiniteError."""
        assert self.grid is not None
        weight, scheme = self.float_weight().detach(), self.scheme.stored
        for values in (weight, *(part.detach() for part in self.grid if part is not None)):
            check_finite(values)
        dtype, float_zero = get_scale_dtype(scheme.scale_dtype), scheme.float_zero_point
        scale, zero_point, _ = self.grid
        grid = stored_grid(scale, zero_point, scheme.fmt, dtype, float_zero_point=float_zero)
        blocks = blocked(weight, scheme.granularity, scheme.group_size)
        codes = grid_codes(blocks, grid, scheme.fmt).view(weight.shape)
        return QTensor.from_codes(Quantized(codes, *grid), scheme, weight.dtype)

    @property
    @abstractmethod
    def role(self) -> Role:
        """What the module does with its weight."""

    def follow(self, owner: QModule) -> None:
        """Read the parts of `owner`, which may get them later; `loaded` is to be called then.
        In place.
        """
        self._drop_floats()
        self._tied_to = (owner,)

    def loaded(self) -> None:
        """To be called when parts have got their values. In place."""
        if self._tied_to:
            self._dtype = self._tied_to[0]._dtype
        self._choose_kernel()

    def choose_kernel_for(self, device: str) -> None:
        """Choose the kernel for parts that will be on `device` when the module runs. In place."""
        self._choose_kernel(device)

    def _choose_kernel(self, device: str | None = None) -> None:
        spec = Spec(
            op="embedding" if self.role == "embedding" else "linear",
            scheme=self.scheme,
            shape=self.shape,
            device=device or self.qweight.device.type,
        )
        choice = choose(spec)
        self._unbind()
        self.kernel, self.refused = choice.kernel, choice.refused

    def _unbind(self) -> None:
        """Forget what was prepared for the parts that were held. In place."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QModule:
        """`.to(device)` moves the parts; `.to(dtype)` changes what they dequantize to, never the
        parts themselves, nor a learned grid, nor the range of the inputs.
        """
        grid = [part for part in self.grid or () if part is not None]

        def keeping(tensor: Tensor) -> Tensor:
            of_grid = any(tensor is part for part in grid)
            return _moved(tensor, fn) if of_grid else fn(tensor)

        parts = {name: None if t is None else _moved(t, fn) for name, t in self._buffers.items()}
        self._buffers.clear()
        super()._apply(keeping, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(parts)
        if not self.frozen:
            self._dtype = self.float_weight().dtype
            return self
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        self._choose_kernel()
        return self

    def extra_repr(self) -> str:
        n, k = self.shape
        state = "live"
        if self.frozen:
            state = f"frozen, kernel={self.kernel}" + (", tied" if self._tied_to else "")
        return f"{self._sizes(n, k)}, {self.scheme}, {state}"

    @abstractmethod
    def _sizes(self, n: int, k: int) -> str:
        """The sizes as the float module's repr prints them."""


def _moved(part: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """What `fn` makes of a tensor, its dtype apart."""
    new = fn(part)
    return new if new.dtype == part.dtype else part.to(new.device)
