"""`ZeropointConfig`: how a model is quantized while it loads. Importing this file imports little of
transformers; `integrations.transformers` registers the class there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from zeropoint.algorithms import get_algorithm
from zeropoint.checkpoints import native
from zeropoint.errors import CheckpointError, RecipeError, ZeropointError
from zeropoint.flows.planned import Patterns, dtype_name
from zeropoint.scheme import Recipe, Scheme

_OPTIONS = (
    "weights",
    "group_size",
    "symmetric",
    "float_zero_point",
    "double_quant",
    "activations",
    "outlier_threshold",
    "compute_dtype",
    "include",
    "exclude",
)


class ZeropointConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How `from_pretrained` quantizes a model while it loads it.

    weights to exclude, recipe, strict: as `zp.quantize` takes them. modules_to_not_convert: another
    name of exclude; like it, it adds to what is kept anyway. algorithm: one that needs no
    calibration data ("rtn", "mse", "hqq"). Raises RecipeError, UnknownNameError.
    """

    def __init__(
        self,
        weights: str | None = None,
        *,
        group_size: int | None = None,
        symmetric: bool | None = None,
        float_zero_point: bool | None = None,
        double_quant: bool | None = None,
        activations: str | None = None,
        outlier_threshold: float | None = None,
        compute_dtype: str | torch.dtype | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
        modules_to_not_convert: Patterns = None,
        recipe: Recipe | Mapping[str, Any] | None = None,
        strict: bool = True,
        algorithm: str = "rtn",
        format_version: int = native.FORMAT_VERSION,
        quant_method: str = native.QUANT_METHOD,
    ) -> None:
        if quant_method != native.QUANT_METHOD:
            raise RecipeError(f"quant_method={quant_method!r} is not {native.QUANT_METHOD!r}")
        if format_version > native.FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint was written by a newer zeropoint (format {format_version}, this "
                f"one reads up to {native.FORMAT_VERSION}); upgrade: pip install -U zeropoint"
            )
        if exclude is not None and modules_to_not_convert is not None:
            raise RecipeError("exclude and modules_to_not_convert are one thing; give one")
        chosen = get_algorithm(algorithm)
        if chosen.needs != "nothing":
            raise RecipeError(
                f"algorithm={algorithm!r} needs calibration data, and a model that is still being "
                "loaded cannot run; load it, then zp.quantize and "
                f"zp.freeze(model, {algorithm!r}, data=...)"
            )
        self.quant_method = native.QUANT_METHOD
        self.weights = weights
        self.group_size = group_size
        self.symmetric = symmetric
        self.float_zero_point = float_zero_point
        self.double_quant = double_quant
        self.activations = activations
        self.outlier_threshold = outlier_threshold
        self.compute_dtype = None if compute_dtype is None else dtype_name(compute_dtype)
        self.include = include
        self.exclude = exclude if modules_to_not_convert is None else modules_to_not_convert
        self.recipe = Recipe.from_dict(recipe) if isinstance(recipe, Mapping) else recipe
        self.strict = strict
        self.algorithm = algorithm
        self.advised: tuple[str, ...] = ()  # patterns to exclude where they match anything
        self.error: ZeropointError | None = None  # of a weight, which transformers does not raise
        if self.recipe is None and weights is not None:
            Scheme.of(weights)  # an unknown name is refused here, not after the download

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `zp.quantize` that are no recipe."""
        return {name: getattr(self, name) for name in _OPTIONS}

    @property
    def given(self) -> dict[str, Any]:
        """Those that are not None."""
        return {name: value for name, value in self.options.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the recipe once it is known, as config.json has it; the arguments before."""
        if self.recipe is not None:
            return native.quantization_config(self.recipe)
        return {"quant_method": self.quant_method, **self.given}
