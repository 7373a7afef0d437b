"""How long a quantization will take, from a trial on one real block.

    seconds = sum over chains, and what is in none:  seconds of the trial * elements / tried

Without data a block is read, quantized and written as `compress` does it, into a folder that is
then removed. Calibrated, one block is quantized on random tokens: what its solves take stays, what
its passes take grows with the tokens. Of a weight in no block some rows are tried.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zeropoint.algorithms import ALGORITHMS, Algorithm
from zeropoint.algorithms.choice import Choice, Moments
from zeropoint.checkpoints.floats import Stored
from zeropoint.checkpoints.journal import Journal
from zeropoint.errors import StreamError
from zeropoint.flows.calibrate import calibrate
from zeropoint.flows.data import Calibration, of_written, window_of
from zeropoint.flows.job import Job, live_model
from zeropoint.flows.parts import chains_of, elements_of, is_embedding
from zeropoint.flows.residence import Passed, Residence
from zeropoint.flows.stream import JOURNAL
from zeropoint.flows.writing import Run, write_tensors
from zeropoint.model.replace import give_values, replace_module
from zeropoint.nn import QEmbedding
from zeropoint.progress import no_progress
from zeropoint.qtensor import empty
from zeropoint.scheme import Rule, Scheme

SOME_ELEMENTS = 1 << 22  # of a weight in no block
ENOUGH_SECONDS = 1.0  # of a trial without data: more blocks are tried where one is too quick
WINDOWS = (2, 6)  # of random tokens; from one to the other grows what depends on their number
WITHOUT = "leave trial (--trial) out"


class Trial(NamedTuple):
    """seconds: of all, from a trial of some. tried: the blocks that were."""

    seconds: float
    tried: tuple[str, ...]


def try_out(
    job: Job, skeleton: nn.Module, algorithm: Algorithm, how: Calibration | None, task: str | None
) -> Trial:
    """Quantize a little of a job and say how long all of it will take, but for preparing it.

    skeleton: the frozen model of the job. how: for an algorithm that calibrates.
    Raises StreamError for one that calibrates a model without blocks, or one that reads no text;
    what `zp.compress` raises about values.
    """
    chains = chains_of(job, skeleton)
    inside = {name for blocks in chains for names in blocks.values() for name in names}
    outside = [n for n in (*job.contents.qweights, *job.contents.tensors) if n not in inside]
    first = next(iter(job.sources))
    _write(_cut(job, first), ALGORITHMS["rtn"])  # what is only slow the first time
    if how is None:
        parts = [_data_free(job, blocks, algorithm) for blocks in chains]
    else:
        parts = [_calibrated(job, skeleton, chains, outside, algorithm, how, task)]
    rest = _outside(job, skeleton, outside, algorithm, how is not None)
    return Trial(
        seconds=rest + sum(part.seconds for part in parts),
        tried=tuple(layer for part in parts for layer in part.tried),
    )


# --- what there is to try ---


def _usual(job: Job, blocks: Mapping[str, Sequence[str]]) -> list[str]:
    """The blocks of the kind of which there are most: of one shape, in one scheme."""

    def kind(block: str) -> tuple[str, ...]:
        weights = ((n, job.contents.qweights.get(n)) for n in blocks[block])
        return tuple(f"{n.removeprefix(block)} {w and (w.scheme, w.shape)}" for n, w in weights)

    kinds = {block: kind(block) for block in blocks}
    ((most, _),) = Counter(kinds.values()).most_common(1)
    return [block for block in blocks if kinds[block] == most]


@dataclass(frozen=True, kw_only=True)
class _Rows(Stored):
    """The first rows of a tensor, as many as `shape` says."""

    def read(self) -> Tensor:
        return super().read()[: self.shape[0]]


def _some(job: Job, names: Sequence[str]) -> Job:
    """The job of these weights and tensors, of those in no block some rows."""
    sources = {name: job.sources[name] for name in names if name in job.sources}
    contents = job.contents
    qweights = {name: contents.qweights[name] for name in names if name in contents.qweights}
    tensors = {name: contents.tensors[name] for name in names if name in contents.tensors}
    return replace(
        job,
        sources=sources,
        contents=replace(contents, qweights=qweights, tensors=tensors, tied={}, carried=()),
    )


def _cut(job: Job, name: str) -> Job:
    """The job of some rows of a weight or tensor."""
    some, stored = _some(job, [name]), job.sources[name]
    rows = max(1, SOME_ELEMENTS * stored.shape[0] // max(1, elements_of(job, [name])))
    if len(stored.shape) != 2 or rows >= stored.shape[0] or name in job.transposed:
        return some
    shape = (rows, stored.shape[1])
    contents = some.contents
    weight = contents.qweights.get(name)
    if weight is not None and weight.scheme.granularity == "tensor":
        return some
    return replace(
        some,
        sources={name: _Rows(file=stored.file, name=stored.name, shape=shape, dtype=stored.dtype)},
        contents=replace(
            contents,
            qweights={}
            if weight is None
            else {name: empty(torch.Size(shape), weight.scheme, weight.dtype)},
            tensors={} if weight is not None else {name: contents.tensors[name][:rows]},
        ),
    )


# --- without data ---


def _data_free(job: Job, blocks: Mapping[str, Sequence[str]], algorithm: Algorithm) -> Trial:
    """Of a chain."""
    usual = _usual(job, blocks)
    tried = usual[:1]
    seconds = _write(_some(job, blocks[tried[0]]), algorithm)
    if seconds < ENOUGH_SECONDS and len(usual) > 1:
        tried = usual[: max(2, int(ENOUGH_SECONDS / seconds))]
        seconds = _write(_some(job, [name for block in tried for name in blocks[block]]), algorithm)
    all_of_it = elements_of(job, [name for names in blocks.values() for name in names])
    share = all_of_it / elements_of(job, [name for block in tried for name in blocks[block]])
    return Trial(seconds=seconds * share, tried=tuple(tried))


def _write(part: Job, algorithm: Algorithm) -> float:
    """Seconds in which a part of a job is read, quantized, written, and read again."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "checkpoint"
        written.mkdir()
        journal = Journal(Path(folder) / JOURNAL, {})
        start = time.perf_counter()
        try:
            write_tensors(Run(job=part, algorithm=algorithm, journal=journal), written)
        finally:
            journal.close()
        return time.perf_counter() - start


# --- what is in no block ---


def _outside(
    job: Job, skeleton: nn.Module, names: Sequence[str], algorithm: Algorithm, calibrated: bool
) -> float:
    """Seconds of what is in no block: of every scheme the largest weight is tried."""
    kinds: dict[Any, list[str]] = {}
    for name in names:
        if name in job.sources:
            weight = job.contents.qweights.get(name)
            multiplied = calibrated and weight is not None and not is_embedding(skeleton, name)
            kinds.setdefault((weight and weight.scheme, multiplied), []).append(name)
    seconds = 0.0
    for (_, multiplied), alike in kinds.items():
        largest = max(alike, key=lambda name: elements_of(job, [name]))
        part = _cut(job, largest)
        if multiplied:
            took = _solve(part, largest, algorithm)
        else:  # an embedding has no inputs to weigh columns by
            took = _write(part, ALGORITHMS["mse"] if calibrated else algorithm)
        seconds += took * elements_of(job, alike) / elements_of(part, [largest])
    return seconds


def _solve(part: Job, name: str, algorithm: Algorithm) -> float:
    """Seconds in which a weight gets its codes by a Hessian of random inputs."""
    weight = part.contents.qweights[name]
    stored = part.sources[name].read()
    values = (stored.t() if name in part.transposed else stored).to(weight.dtype)
    inputs = torch.randn(2 * values.shape[1], values.shape[1])
    hessian = inputs.T @ inputs / len(inputs)
    start = time.perf_counter()
    algorithm.choose(values, Moments(hessian, hessian), weight.scheme)
    return time.perf_counter() - start


# --- calibrated ---


@dataclass(kw_only=True)
class _Times:
    """Seconds of a block: in all, of them by its solves, and of one batch that passes it."""

    all: float = 0.0
    solving: float = 0.0
    passing: float = 0.0


class _Watch(Residence):
    """Takes the time of every block. times: in the order in which they were entered."""

    def __init__(self) -> None:
        self.times: list[_Times] = []
        self._entered = 0.0

    def watched(self, algorithm: Algorithm) -> Algorithm:
        """The algorithm, whose time is taken."""

        def find(weight: Tensor, moments: Moments | None, scheme: Scheme) -> Choice:
            start = time.perf_counter()
            choice = algorithm.find(weight, moments, scheme)
            self.times[-1].solving += time.perf_counter() - start
            return choice

        return replace(algorithm, find=find)

    def watch(self, block: nn.Module) -> None:
        """Take the time of passes, too; those that end in the middle do not count."""
        began = [0.0]

        def before(module: nn.Module, arguments: Any) -> None:
            began[0] = time.perf_counter()

        def after(module: nn.Module, arguments: Any, output: Any) -> None:
            if self.times:
                self.times[-1].passing = time.perf_counter() - began[0]

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)

    def hold_all(self, why: str) -> None:
        raise StreamError(f"{why}; no trial of calibrating it is possible, {WITHOUT}")

    def enter(self, block: nn.Module) -> None:
        self.times.append(_Times())
        self._entered = time.perf_counter()

    def leave(self, block: nn.Module, passed: Passed) -> None:
        self.times[-1].all = time.perf_counter() - self._entered


def _calibrated(
    job: Job,
    skeleton: nn.Module,
    chains: Sequence[Mapping[str, Sequence[str]]],
    outside: Sequence[str],
    algorithm: Algorithm,
    how: Calibration,
    task: str | None,
) -> Trial:
    """Of all chains. Where a head is calibrated, all tokens pass all blocks once more."""
    embeddings = getattr(skeleton, "get_input_embeddings", lambda: None)()
    if not chains or not isinstance(embeddings, (nn.Embedding, QEmbedding)):
        what = "reads no text" if chains else "has no blocks that run one by one"
        raise StreamError(
            f"a {type(skeleton).__name__} {what}; no trial of calibrating it is possible, {WITHOUT}"
        )
    blocks = [_usual(job, chain)[0] for chain in chains]
    kept = [n for n in (*outside, *job.contents.tied) if n.endswith(".weight")]

    def tried(by: Algorithm, windows: int) -> list[_Times]:
        shape = windows, window_of(skeleton, how)
        ids = torch.randint(embeddings.weight.shape[0], shape)
        one_each = replace(how, batch_tokens=shape[1])
        model, watch = _truncated(job, blocks, kept, task), _Watch()
        for block in blocks:
            watch.watch(model.get_submodule(f"{block.rpartition('.')[0]}.0"))
        data = of_written(model, ids, one_each)
        calibrate(model, watch.watched(by), one_each, lambda: data, no_progress, watch)
        return watch.times

    few, many = WINDOWS
    nearest = replace(ALGORITHMS["rtn"], needs=algorithm.needs)
    tried(nearest, few)  # what is only slow the first time
    solved, rounded = tried(algorithm, few), tried(nearest, many)
    windows = how.tokens / window_of(skeleton, how)
    head = any(n in job.contents.qweights and not is_embedding(skeleton, n) for n in outside)
    seconds = 0.0
    for chain, short, long in zip(chains, solved, rounded, strict=True):
        fixed = short.all - short.solving
        more = max(0.0, (long.all - long.solving - fixed) / (many - few))
        one = short.solving + fixed + more * (windows - few) + head * long.passing * windows
        seconds += one * len(chain)
    return Trial(seconds=seconds, tried=tuple(blocks))


def _truncated(job: Job, blocks: Sequence[str], kept: Sequence[str], task: str | None) -> nn.Module:
    """The live model with only one block in each chain; what is in none is kept."""
    keep = (Rule(match=name.removesuffix(".weight")) for name in kept)
    recipe = replace(job.report.recipe, rules=(*keep, *job.report.recipe.rules))
    model = live_model(job, {}, recipe=recipe, strict=False, task=task)
    lists = {block: block.rpartition(".")[0] for block in blocks}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            inside = any(name.startswith(f"{block}.") for block in blocks)
            if inside or not any(name.startswith(f"{chain}.") for chain in lists.values()):
                values = job.sources[job.contents.tied.get(name, name)].read()
                give_values(parameter, values.to(parameter.dtype, copy=inside))
    for block, chain in lists.items():
        replace_module(model, (chain,), nn.ModuleList([model.get_submodule(block)]))
    return model
