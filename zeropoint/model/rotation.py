"""Rotating a float model, so that it computes the same with its outliers spread.

R1, in the residual stream x: every writer's output is multiplied by R, every reader's input by R^T.
Between them is a norm, which commutes with R once its own weight has gone into its readers:

    W y + b  ->  R^T (W y + b)         writers, by rows; E -> E R for embeddings
    W (norm(x) g + c)  ->  W diag(g) R core(x R)                          readers, by columns

LayerNorm subtracts the mean of its channels, so R has to keep that: 1 R = 1.

R2, per head: what attention mixes are whole rows of values, so the values of a head are multiplied
by a rotation of head_dim entries and the columns of the output projection by it as well.

R1 and R2 as in SpinQuant, arXiv:2405.16406, section 3.1; after QuaRot, arXiv:2404.00456. Its online
rotations, R3 and R4, would change what the model computes with, and are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.errors import StateError
from zeropoint.model.capture import (
    Batch,
    chains,
    enter,
    first_of,
    is_linear,
    sharing,
)
from zeropoint.model.graph import Run, find_folds, is_norm, matrix, restored, unchanged
from zeropoint.model.passage import Passage
from zeropoint.model.residual import Gain, Residual, commutes, gain_of
from zeropoint.numerics.hadamard import Rotation, rotation

SMALLEST_HEAD = 8  # entries; rotating fewer spreads nothing
# Of what a block adds. Heads that attend alike hide that they were mixed: 6e-4 was seen in a model
# with random weights. Float32 noise is 30 times smaller.
MIXED_TOLERANCE = 2e-5


# --- R1 ---


def stream_rotation(
    model: nn.Module, residual: Residual, seed: int
) -> tuple[Rotation, dict[nn.Module, Gain]]:
    """A rotation that all norms of the stream commute with, and what they multiply by.

    Raises StateError: a norm with which none does, or whose bias cannot be carried on.
    """
    names = {m: n for n, m in model.named_modules()}
    gains: dict[nn.Module, Gain] = {}
    for norm in residual.norms:
        if norm is None:
            continue
        gain = gain_of(norm)
        if gain is None:
            raise StateError(f"{names[norm]} does not multiply by its weight, or by 1 + weight")
        bias = getattr(norm, "bias", None)
        if bias is not None and ((gain.gain == 0) & (bias != 0)).any():
            raise StateError(f"{names[norm]} has a weight of 0 where it has a bias")
        gains[norm] = gain
    n = len(next(iter(gains.values())).gain)
    for keeps_mean in (False, True):
        found = rotation(n, seed, keeps_mean=keeps_mean)
        against = [names[norm] for norm, gain in gains.items() if not commutes(norm, gain, found)]
        if not against:
            return found, gains
    raise StateError(f"{against[0]} does not commute with a rotation of its input")


def untie(model: Any, residual: Residual, gains: dict[nn.Module, Gain]) -> list[str]:
    """Give the head a weight of its own where it shares one with a module that is changed in
    another way. In place. Returns the names of modules untied.

    Raises StateError where the model's configuration cannot say so.
    """
    names = {m: n for n, m in model.named_modules()}
    plain = {id(m.weight) for m in residual.writers}
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    untied = []
    for norm, readers in residual.norms.items():
        if norm is None or (gains[norm].gain == 1).all():
            continue
        for module in readers:
            if id(module.weight) not in plain:
                continue
            if module is not head or not hasattr(model, "config"):
                raise StateError(f"{names[module]} shares its weight, and is not the model's head")
            assert isinstance(module.weight, nn.Parameter)
            required = module.weight.requires_grad
            module.weight = nn.Parameter(module.weight.detach().clone(), required)
            for config in (model.config, model.config.get_text_config()):
                config.tie_word_embeddings = False
            untied.append(names[module])
    return untied


@torch.no_grad()
def rotate_stream(residual: Residual, found: Rotation, gains: dict[nn.Module, Gain]) -> None:
    """Rotate the residual stream. In place. Tied weights are changed once."""
    done: set[int] = set()

    def first(parameter: Any) -> bool:
        fresh = parameter is not None and id(parameter) not in done
        done.add(id(parameter))
        return fresh

    for norm, readers in residual.norms.items():
        fresh = [m for m in readers if first(m.weight)]
        if norm is None:
            for module in fresh:
                _set(matrix(module), found(matrix(module)))
        else:
            _fuse(norm, gains[norm], fresh, found)
    for module in residual.writers:
        rows = module.weight if isinstance(module, nn.Embedding) else matrix(module).t()
        if first(module.weight):
            _set(rows, found(rows))
        bias: Any = getattr(module, "bias", None)
        if first(bias):
            _set(bias, found(bias))
    for parameter in residual.parameters:
        if first(parameter):
            _set(parameter, found(parameter))


def _fuse(norm: Any, gain: Gain, readers: list[Any], found: Rotation) -> None:
    """Move what a norm multiplies by into its readers, which then read a rotated vector. In place.

    So does its bias c, where all have a bias; else it stays, as W c = W diag(g) R ((c / g) R)^T.
    """
    shift: Any = getattr(norm, "bias", None)
    into_biases = shift is not None and all(m.bias is not None for m in readers)
    for module in readers:
        weight = matrix(module).double()
        if into_biases:
            _set(module.bias, module.bias.double() + weight @ shift.double())
        _set(matrix(module), found(weight * gain.gain))
    if into_biases:
        shift.zero_()
    elif shift is not None:
        _set(shift, found(torch.where(gain.gain == 0, 0, shift.double() / gain.gain)))
    norm.weight.fill_(gain.neutral)


def _set(parameter: Any, value: Tensor) -> None:
    parameter.copy_(value)


# --- R2 ---


@torch.no_grad()
def rotate_values(
    model: nn.Module, batch: Batch, seed: int
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Rotate the values of every attention head, where a block run by itself shows that its output
    stays. In place. Returns (values, output projection, rotation) by name, and what was not done.
    """
    done: list[tuple[str, str, str]] = []
    warnings = []
    linears = {m for m in model.modules() if is_linear(m)}
    for name, names in chains(model, linears).items():
        blocks = [model.get_submodule(n) for n in names]
        stream = enter(model, blocks, [batch])
        if isinstance(stream, str):
            warnings.append(f"values in {name} are not rotated: {stream}")
            continue
        known: list[_Heads] = []
        for index, block in enumerate(blocks):
            passage = Passage(block, index, stream)
            known = _heads(block, partial(_run, passage), known)
            for values, output, size in known:
                turn = rotation(size, seed + 1 + len(done))
                _turn(block, (values, output, size), turn)
                done.append((f"{names[index]}.{values}", f"{names[index]}.{output}", str(turn)))
            if not known:
                warnings.append(
                    f"values in {names[index]} are not rotated: no linear layer makes them alone"
                )
            passage.advance()
    return done, warnings


def _run(passage: Passage) -> tuple[Tensor, Tensor]:
    """The block's input and its output."""
    return passage.stream.hidden[0], first_of(passage.run(0))


_Heads = tuple[str, str, int]
"""The values and the output projection of an attention, and the entries of a head."""


def _heads(block: nn.Module, run: Run, known: list[_Heads]) -> list[_Heads]:
    """The attentions of a block whose heads can be rotated. known: those of the block before."""
    expected = run()
    modules = dict(block.named_modules())
    if known and all(v in modules and o in modules for v, o, _ in known):
        if _hold(block, known, run, expected):
            return known
    groups = sharing(block, run)
    folds = find_folds(block, groups, run, lambda m: not is_norm(m))
    found = []
    for fold in folds:
        if fold.kind != "rows" or len(fold.consumers) > 1:
            continue
        values = matrix(block.get_submodule(fold.producer)).shape[0]
        sizes = [d for d in range(values, SMALLEST_HEAD - 1, -1) if values % d == 0]
        pairs: Iterable[_Heads] = ((fold.producer, fold.consumers[0], d) for d in sizes)
        pair = next((p for p in pairs if _hold(block, [p], run, expected)), None)
        if pair is not None:  # the largest: a head, whose parts could be rotated as well
            found.append(pair)
    return found


def _hold(block: nn.Module, pairs: list[_Heads], run: Run, expected: tuple[Tensor, Tensor]) -> bool:
    changed = [block.get_submodule(n) for values, output, _ in pairs for n in (values, output)]
    with restored(p for m in changed for p in m.parameters(recurse=False)):
        for pair in pairs:
            _turn(block, pair, rotation(pair[2], 0))
        return unchanged(expected, run(), MIXED_TOLERANCE)


def _turn(block: nn.Module, pair: _Heads, turn: Rotation) -> None:
    """Rotate the values of every head, and the columns that read them. In place."""
    values: Any = block.get_submodule(pair[0])
    columns = matrix(block.get_submodule(pair[1]))
    rows = matrix(values)
    apart = rows.t().reshape(rows.shape[1], -1, turn.n)
    _set(rows, turn(apart).reshape(rows.t().shape).t())
    if values.bias is not None:
        _set(values.bias, turn(values.bias.reshape(-1, turn.n)).reshape(-1))
    _set(columns, turn(columns.reshape(len(columns), -1, turn.n)).reshape(columns.shape))
