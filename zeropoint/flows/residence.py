"""Where the blocks of a model, and the hidden states between them, are while it is calibrated."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from zeropoint.flows.report import LayerReport
from zeropoint.model import graph
from zeropoint.model.shelf import Shelf
from zeropoint.nn import QModule
from zeropoint.qtensor import QTensor


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What is known of a block whose weights have their codes, beside these. layers: a report for
    each. folds: the edges it was balanced over. weights: the codes by name inside the block, of a
    block that an earlier run passed; the block's other values are there as they were stored.
    """

    layers: Sequence[LayerReport]
    folds: Sequence[graph.Fold]
    weights: Mapping[str, QTensor] = field(default_factory=dict)


class Residence:
    """Where the blocks of a model are while they are not worked on. This one: in memory."""

    def begin(self, blocks: Sequence[nn.Module]) -> None:
        """These are the blocks of all chains of the model. What is in none of them is wanted all
        the time.
        """

    def hold_all(self, why: str) -> None:
        """All blocks are wanted at the same time. why: for the user."""

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While this lasts the whole model can be run."""
        yield

    def hidden(self, *, original: bool = False) -> list[Tensor] | Shelf:
        """Where the hidden states of a chain go. Those of the chain before are wanted no more.

        original: those of the model before it was quantized.
        """
        return []

    def enter(self, block: nn.Module) -> Passed | None:
        """Let the block have its values. In place. Returns what an earlier run made of it."""
        return None

    def original(self, block: nn.Module) -> nn.Module:
        """A copy of a block that was entered, as it was before any run quantized it, in float32."""
        return copy.deepcopy(block)

    def chosen(self, live: QModule) -> None:
        """The codes of a live module are known, and its float weight is wanted no more. In place.

        A model in memory keeps it all the same: a call that fails leaves it as it was.
        """

    def leave(self, block: nn.Module, passed: Passed) -> None:
        """The block is frozen and will be wanted no more, but to run. In place."""
