"""What the layers of a model see: blocks found by the shape of the module tree, run one by one.

A *chain* is a ModuleList of modules of one type, each of which takes the output of the one before:
the layers of nearly every transformer. Its blocks can be run alone, so that only the hidden states
between two blocks are kept. Whether a list is a chain is found out by running the model, never by
its name; what is no chain is observed by hooks on the whole model.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.model.shelf import Shelf
from zeropoint.nn import quantized_type

Batch = dict[str, Tensor] | Tensor
"""Keyword arguments of the model, or its only positional one. First axis: examples."""


class _Stop(Exception):
    """Everything that was wanted of a forward pass has been seen."""


class _Hidden:
    """Stands for the hidden states among a block's arguments."""


HIDDEN = _Hidden()


@dataclass(frozen=True)
class Call:
    """A block's arguments for one batch, with HIDDEN where the hidden states go."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Any:
        """block(*args, **kwargs). hidden: (B, T, K)."""
        args = [hidden if a is HIDDEN else a for a in self.args]
        kwargs = {k: hidden if a is HIDDEN else a for k, a in self.kwargs.items()}
        return block(*args, **kwargs)


@dataclass
class Stream:
    """Hidden states in front of a block, batch by batch, and what else the blocks are given.

    hidden: one (B, T, K) float per batch; changed in place as blocks are passed. calls: by batch,
    then by block. keep: by batch, `kept_tokens`.
    """

    hidden: list[Tensor] | Shelf
    calls: list[list[Call]]
    keep: list[list[Tensor]]

    def run(self, batch: int, index: int, block: nn.Module) -> Any:
        """What block number `index` makes of one batch."""
        return self.calls[batch][index].run(block, self.hidden[batch])


def run_model(model: Any, batch: Batch) -> Any:
    """The model's forward, without a cache of keys and values."""
    if isinstance(batch, Tensor):
        return model(batch)
    options = {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    return model(**batch, **options)


def kept_tokens(batch: Batch) -> list[Tensor]:
    """The batch's masks of shape (B, T): true where a token is no padding. None if nothing is."""
    if isinstance(batch, Tensor):
        return []
    names = ("attention_mask", "decoder_attention_mask")
    masks = [batch[name].bool() for name in names if name in batch]
    masks = [m for m in masks if m.dim() == 2]
    return masks if any(not m.all() for m in masks) else []


def tokens_of(x: Tensor, keep: Iterable[Tensor]) -> Tensor:
    """The rows of x that are no padding. x: (..., K); returns (T, K).

    keep: (B, T) bool masks; the first whose shape is that of x's tokens applies.
    """
    rows = x.reshape(-1, x.shape[-1])
    for mask in keep:
        if mask.shape == x.shape[:-1] or (x.dim() == 2 and mask.numel() == len(rows)):
            return rows[mask.reshape(-1).to(rows.device)]
    return rows


def chains(model: nn.Module, wanted: Collection[nn.Module]) -> dict[str, list[str]]:
    """Candidate chains by the list's name: names of blocks, of one type, that hold wanted modules.

    A list inside a block of another is no candidate.
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(name.startswith(f"{other}.") for other in found):
            continue
        blocks = list(module)
        alike = len({type(b) for b in blocks}) == 1 and not isinstance(blocks[0], nn.ModuleList)
        holds = any(m in wanted for b in blocks for m in b.modules() if m is not b)
        if alike and holds:
            found[name] = [f"{name}.{i}" for i in range(len(blocks))]
    return found


@torch.no_grad()
def enter(
    model: nn.Module,
    blocks: list[nn.Module],
    batches: list[Batch],
    hidden: list[Tensor] | Shelf | None = None,
) -> Stream | str:
    """Run the model up to the first block, with every batch. Returns why not, if it is no chain.

    hidden: where the hidden states go, empty.
    """
    probe = _one_example(batches[0])
    seen = _record(model, blocks, probe, outputs=True)
    problem = _why_no_chain(blocks, seen)
    if problem is not None:
        return problem
    where = _hidden_key(
        seen[blocks[-1]][0], first_of(seen[blocks[-2]][0][2]) if blocks[1:] else None
    )
    first = seen[blocks[0]][0]
    if where is None or not isinstance(_get(first, where), Tensor):
        return "its first block does not take hidden states where the others do"
    alike = all(_same_extras(first, seen[b][0], where) for b in blocks)
    problem = _why_not_replayed(blocks, seen, where)
    if problem is not None:
        return problem
    stream = Stream([] if hidden is None else hidden, [], [])
    for batch in batches:
        calls = _record(model, blocks[:1] if alike else blocks, batch, stop=alike)
        first_hidden = _get(calls[blocks[0]][0], where)
        mine = [_call(calls[b][0], where) for b in (blocks[:1] if alike else blocks)]
        stream.hidden.append(first_hidden.detach())
        stream.calls.append(mine * len(blocks) if alike else mine)
        stream.keep.append(kept_tokens(batch))
    return stream


@torch.no_grad()
def sharing(block: nn.Module, run: Callable[[], Any]) -> list[list[nn.Module]]:
    """The block's linear layers in the order in which they run, those with one input together.

    Layers that did not run, or ran more than once, come last, each alone.
    """
    linears = [m for m in block.modules() if is_linear(m)]
    calls: list[tuple[nn.Module, Tensor]] = []
    with _hooks(linears, lambda m, x: calls.append((m, x))):
        run()
    count = Counter(m for m, _ in calls)
    groups: list[tuple[Tensor, list[nn.Module]]] = []
    for module, x in calls:
        if count[module] > 1:
            continue
        mates = next((g for key, g in groups if key is x), None)
        if mates is None:
            groups.append((x, [module]))
        else:
            mates.append(module)
    return [g for _, g in groups] + [[m] for m in linears if count[m] != 1]


@torch.no_grad()
def inputs_of(modules: Collection[nn.Module], run: Callable[[], Any]) -> dict[nn.Module, Tensor]:
    """What each of the modules is given in one pass; those that do not run are left out."""
    seen: dict[nn.Module, Tensor] = {}
    with _hooks(modules, seen.setdefault):
        run()
    return seen


def is_linear(module: nn.Module) -> bool:
    """y = x W^T, whichever way the weight is stored."""
    return isinstance(module, nn.Linear) or (
        quantized_type(module) is not None and not isinstance(module, nn.Embedding)
    )


@torch.no_grad()
def input_of(module: nn.Module, run: Callable[[], Any]) -> Tensor | None:
    """What `run` first gives to the module, or None when it does not reach it."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, x: Tensor) -> None:
        seen.append(x)
        raise _Stop

    with _hooks([module], stop):
        try:
            run()
        except _Stop:
            return seen[0]
    return None


@torch.no_grad()
def observe(
    model: nn.Module,
    modules: Collection[nn.Module],
    batches: list[Batch],
    see: Callable[[nn.Module, Tensor], None],
) -> None:
    """Run the whole model and show `see` every input of every one of `modules`, (T, K)."""
    for batch in batches:
        with _hooks(modules, partial(_show, see, kept_tokens(batch))):
            run_model(model, batch)


def _show(
    see: Callable[[nn.Module, Tensor], None], keep: list[Tensor], module: nn.Module, x: Tensor
) -> None:
    see(module, tokens_of(x, keep))


# --- how it is done ---


@contextmanager
def _hooks(modules: Iterable[nn.Module], see: Callable[[nn.Module, Tensor], Any]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor):
            see(module, x)

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_Seen = tuple[tuple[Any, ...], dict[str, Any], Any]


def _record(
    model: nn.Module,
    blocks: list[nn.Module],
    batch: Batch,
    *,
    outputs: bool = False,
    stop: bool = False,
) -> dict[nn.Module, list[_Seen]]:
    """Arguments (and outputs) of every call of every block."""
    seen: dict[nn.Module, list[_Seen]] = {b: [] for b in blocks}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[module].append((args, kwargs, None))
        if stop:
            raise _Stop

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen[module][-1] = (args, kwargs, output)

    handles: list[Any] = [b.register_forward_pre_hook(before, with_kwargs=True) for b in blocks]
    if outputs:
        handles += [b.register_forward_hook(after, with_kwargs=True) for b in blocks]
    try:
        run_model(model, batch)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _one_example(batch: Batch) -> Batch:
    if isinstance(batch, Tensor):
        return batch[:1]
    return {k: v[:1] for k, v in batch.items()}


def first_of(output: Any) -> Any:
    """The hidden states of a block's output, which may come with others."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _why_no_chain(blocks: list[nn.Module], seen: dict[nn.Module, list[_Seen]]) -> str | None:
    counts = {len(seen[b]) for b in blocks}
    if counts != {1}:
        return f"its blocks run {sorted(counts)} times in one pass, not once each"
    for before, after in zip(blocks, blocks[1:], strict=False):
        hidden = first_of(seen[before][0][2])
        if not isinstance(hidden, Tensor) or _hidden_key(seen[after][0], hidden) is None:
            return "a block does not take the output of the block before it"
    return None


_Key = tuple[str, Any]


def _hidden_key(seen: _Seen, hidden: Tensor | None) -> _Key | None:
    """Where the hidden states are among a block's arguments. None: the first tensor."""
    args, kwargs, _ = seen
    places: list[tuple[_Key, Any]] = [(("args", i), a) for i, a in enumerate(args)]
    places += [(("kwargs", k), a) for k, a in kwargs.items()]
    for key, value in places:
        if isinstance(value, Tensor) and (
            hidden is None
            or value is hidden
            or (value.shape == hidden.shape and torch.equal(value, hidden))
        ):
            return key
    return None


def _get(seen: _Seen, key: _Key) -> Any:
    kind, where = key
    if kind == "args":
        return seen[0][where] if where < len(seen[0]) else None
    return seen[1].get(where)


def _call(seen: _Seen, key: _Key) -> Call:
    kind, where = key
    args, kwargs, _ = seen
    if kind == "args":
        args = (*args[:where], HIDDEN, *args[where + 1 :])
    else:
        kwargs = kwargs | {where: HIDDEN}
    return Call(args, kwargs)


def _same_extras(a: _Seen, b: _Seen, key: _Key) -> bool:
    one, other = _call(a, key), _call(b, key)
    return (
        len(one.args) == len(other.args)
        and one.kwargs.keys() == other.kwargs.keys()
        and all(_same(x, y) for x, y in zip(one.args, other.args, strict=True))
        and all(_same(x, other.kwargs[k]) for k, x in one.kwargs.items())
    )


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, (bool, int, float, str)) and type(a) is type(b) and a == b


def _why_not_replayed(
    blocks: list[nn.Module], seen: dict[nn.Module, list[_Seen]], where: _Key
) -> str | None:
    """Whether the last block, run alone, answers as it did inside the model."""
    last = seen[blocks[-1]][0]
    expected = first_of(last[2])
    again = first_of(_call(last, where).run(blocks[-1], _get(last, where)))
    if again.shape != expected.shape or not torch.allclose(again, expected, rtol=1e-3, atol=1e-5):
        return "a block run alone answers differently than inside the model"
    return None
