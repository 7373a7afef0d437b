"""Libraries that a model belongs to and that have to know when its weights become codes.

They register themselves: the layers below do not know them.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn

from zeropoint.scheme import Recipe


class Framework(Protocol):
    """A library whose models carry the library's own account of their quantization."""

    def adopt(self, model: nn.Module, recipe: Recipe) -> None:
        """The model has been quantized by this recipe. Does nothing to another library's model."""

    def release(self, model: nn.Module) -> None:
        """The model is a float model again."""


FRAMEWORKS: list[Framework] = []
