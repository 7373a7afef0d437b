"""A block in front of the calibration data, which passes it once for each layer to be quantized.

A pass ends where the layer of interest begins. What lies before that and will not change any more
does the same in every pass. It need not run where it is a *part* of the block, a module that
returns what a linear layer inside it returns, as attentions and feed-forward networks do: once the
input of that layer is known, the part is the layer alone, and after that its output. So all passes
together cost little more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.model import capture
from zeropoint.model.capture import Call, Stream, first_of
from zeropoint.model.shelf import Shelf

KEPT_BYTES = 1 << 28  # of the inputs and outputs of a block's parts


@dataclass(frozen=True)
class Part:
    """A module of a block, and the linear layer in it whose output is the module's. By name.

    others: what the module returns behind that, no tensors; None: it returns nothing else.
    """

    module: str
    linear: str
    others: tuple[Any, ...] | None

    def returns(self, y: Tensor) -> Any:
        """What the module returns when the linear layer returns y."""
        return y if self.others is None else (y, *self.others)


class Passage:
    """Block number `index` of a chain, and the hidden states in front of it.

    parts: of the block, from `find_parts`. From the first pass beyond a part's linear layer on,
    nothing in the block up to the end of the part may change any more.
    """

    def __init__(self, block: nn.Module, index: int, stream: Stream) -> None:
        self.block, self.index, self.stream = block, index, stream
        self.parts: Sequence[Part] = ()
        self._memory = _Memory(0 if isinstance(stream.hidden, Shelf) else KEPT_BYTES)
        self._inputs: dict[tuple[str, int], Tensor] = {}  # of linear layers, by batch
        self._outputs: dict[tuple[str, int], Tensor] = {}  # in the inputs' memory: known first

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self.stream.hidden)

    @property
    def example(self) -> Tensor:
        """The hidden states of the first example of the first batch. (1, T, K) float."""
        return self.stream.hidden[0][:1]

    def run_example(self) -> Any:
        """What the block makes of the example."""
        return _one_example(self.stream, self.index).run(self.block, self.example)

    def run(self, batch: int) -> Any:
        """What the block makes of one batch."""
        with ExitStack() as stack:
            for part in self.parts:
                if (part.linear, batch) in self._inputs:
                    answer = partial(self._output, part.linear, batch)
                    stack.enter_context(_answering(self.block, part, answer))
            return self.stream.run(batch, self.index, self.block)

    def input_of(self, name: str, batch: int) -> Tensor | None:
        """What the layer of that name is given, or None when the batch does not reach it."""
        module = self.block.get_submodule(name)
        x = capture.input_of(module, partial(self.run, batch))
        if x is not None and any(p.linear == name for p in self.parts):
            kept = self._memory.copy(x)
            if kept is not None:
                self._inputs[name, batch] = kept
        return x

    @torch.no_grad()
    def advance(self) -> None:
        """Replace the hidden states by what the block makes of them. In place."""
        for batch in range(len(self)):
            self.stream.hidden[batch] = first_of(self.run(batch))

    def _output(self, linear: str, batch: int) -> Tensor:
        known = self._outputs.get((linear, batch))
        if known is not None:
            return known
        x = self._inputs[linear, batch]
        y: Tensor = self.block.get_submodule(linear)(x)
        if y.numel() <= x.numel() and y.dtype == x.dtype:  # it takes the place of the input
            place = x.view(-1)[: y.numel()].view(y.shape)
            self._outputs[linear, batch] = place.copy_(y)
        return y


class _Memory:
    """One stretch of memory for many tensors: none of them lies between those that come and go,
    which would keep the C library from giving these back.
    """

    def __init__(self, size: int) -> None:
        self._left = size
        self._stretch: Tensor | None = None

    def copy(self, tensor: Tensor) -> Tensor | None:
        """A contiguous copy, or None when there is no room left."""
        if tensor.nbytes > self._left:
            return None
        if self._stretch is None:  # pages that are not written to are never had
            self._stretch = torch.empty(self._left, dtype=torch.uint8, device=tensor.device)
        mine = self._stretch[-self._left :][: tensor.nbytes]
        self._left -= -(-tensor.nbytes // 64) * 64
        return mine.view(tensor.dtype).view(tensor.shape).copy_(tensor)


@torch.no_grad()
def find_parts(
    block: nn.Module, groups: list[list[nn.Module]], run: Callable[[], Any]
) -> list[Part]:
    """The parts of a block, in the order in which they run. None when the block does not return to
    the bit what it does otherwise if its parts answer with the same tensors twice in a row.

    groups: from `capture.sharing`. run: runs the block.
    """
    calls = _outputs(block, run)
    expected = first_of(calls[block][0]).clone()
    parts = []
    for number, group in enumerate(groups):
        part = _part(block, group[0], {m for g in groups[: number + 1] for m in g}, calls)
        if part is not None:
            parts.append(part)
    for _ in range(2):
        with ExitStack() as stack:
            for part in parts:
                (y,) = calls[block.get_submodule(part.linear)]
                stack.enter_context(_answering(block, part, partial(first_of, y)))
            if not torch.equal(first_of(run()), expected):
                return []
    return parts


def _outputs(block: nn.Module, run: Callable[[], Any]) -> dict[nn.Module, list[Any]]:
    """What each module of the block returns, call by call."""
    outputs: dict[nn.Module, list[Any]] = {m: [] for m in block.modules()}
    handles = [
        m.register_forward_hook(lambda module, args, output: outputs[module].append(output))
        for m in outputs
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _part(
    block: nn.Module, linear: nn.Module, passed: set[nn.Module], outputs: dict[nn.Module, list[Any]]
) -> Part | None:
    """The outermost part that returns what a linear layer returns. passed: layers that are
    quantized when this one is; the part has no others.
    """
    names = {m: n for n, m in block.named_modules()}
    for module, name in names.items():
        inside = set(module.modules()) - {module}
        once = len(outputs[module]) == len(outputs[linear]) == 1
        if module is block or linear not in inside or not once:
            continue
        output, (y,) = outputs[module][0], outputs[linear]
        others = output[1:] if type(output) is tuple else None
        alone = all(o is None or isinstance(o, (bool, int, float, str)) for o in others or ())
        finished = all(m in passed for m in inside if capture.is_linear(m))
        if first_of(output) is y and alone and finished:
            return Part(name, names[linear], others)
    return None


@contextmanager
def _answering(block: nn.Module, part: Part, linear: Callable[[], Tensor]) -> Iterator[None]:
    """While this lasts, the part's first call returns what it does when its layer returns this."""
    attributes = vars(block.get_submodule(part.module))
    own = attributes.get("forward")

    def put_back() -> None:
        if own is None:
            attributes.pop("forward", None)
        else:
            attributes["forward"] = own

    def answer(*args: Any, **kwargs: Any) -> Any:
        put_back()
        return part.returns(linear())

    attributes["forward"] = answer
    try:
        yield
    finally:
        put_back()


def _one_example(stream: Stream, index: int) -> Call:
    """The call for the first example of the first batch: tensors of a row per example are cut."""
    size = stream.hidden[0].shape[0]

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == size:
            return value[:1]
        if isinstance(value, tuple):
            return tuple(cut(v) for v in value)
        return value

    call = stream.calls[0][index]
    return Call(tuple(cut(a) for a in call.args), {k: cut(v) for k, v in call.kwargs.items()})
