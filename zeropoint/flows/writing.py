"""The tensors of a quantized checkpoint, written weight by weight: by threads of this process, or
file by file by the tasks of a cluster.

    each weight: read --> quantize --> its parts, into files laid out before --> read again, hashed
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from zeropoint.algorithms import Algorithm
from zeropoint.checkpoints import native
from zeropoint.checkpoints.atomic import check_space, flush
from zeropoint.checkpoints.journal import Journal, Pieces
from zeropoint.checkpoints.shard import Shard, as_bytes, layout
from zeropoint.errors import ClusterError, ZeropointError
from zeropoint.flows import deleting
from zeropoint.flows.blocks import Calibrated
from zeropoint.flows.job import Job, part_names
from zeropoint.model.pages import drop_pages
from zeropoint.numerics import check_finite
from zeropoint.progress import OnStep, OnUnit, Unit, no_progress, no_units
from zeropoint.qtensor import QTensor

TASKS = "tasks"  # folder beside the journal: files that tasks are writing
WORKERS = 2
SAMPLED_ROWS = 32  # of a weight, whose error is in the log

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A job that is being done. calibrated: chooses codes block by block, before the rest is
    written. workers: weights in work at a time; on a cluster, in each task. cluster: None for this
    process. delete_source, on_step, on_unit: as `zp.compress` takes them. say: for the log.
    """

    job: Job
    algorithm: Algorithm
    journal: Journal
    calibrated: Calibrated | None = None
    workers: int = WORKERS
    cluster: Executor | None = None
    delete_source: bool = False
    on_step: OnStep = no_progress
    on_unit: OnUnit = no_units
    say: Callable[[str], None] = lambda line: None


def write_tensors(run: Run, folder: Path) -> dict[str, str]:
    """Write all of a job's tensors into a folder. Returns the SHA-256 of each file."""
    job = run.job
    present = sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file())
    tensors = native.stored_tensors(job.contents)
    names = [*job.contents.qweights, *job.contents.tensors]
    groups: deleting.Groups = [(None, names)]
    if run.delete_source:
        groups = list(deleting.by_file(job.files, names))
    sizes = {name: sum(tensors[part].nbytes for part in part_names(job, name)) for name in names}
    needed = deleting.needed_bytes(groups, sizes, folder) + native.SLACK_BYTES
    check_space(folder.parent, needed - present)
    files = native.shards(tensors)
    for stale in folder.glob("*.safetensors"):
        if stale.name not in files:
            stale.unlink()
    megabytes, done = job.bytes_to_read // 1_000_000, 0

    def begun(what: str) -> None:
        run.on_step(what, done // 1_000_000, megabytes)

    def finished(unit: Unit) -> None:
        nonlocal done
        done += unit.bytes_before or 0
        run.on_unit(unit)

    counted = replace(run, on_unit=finished)
    if run.cluster is not None and run.calibrated is None:
        hashes = _by_tasks(counted, run.cluster, files, folder, begun)
    else:
        hashes = _in_place(counted, files, groups, folder, begun)
    native.write_index(folder, files)
    return hashes


def _in_place(
    run: Run,
    files: Mapping[str, Mapping[str, Tensor]],
    groups: deleting.Groups,
    folder: Path,
    begun: Callable[[str], None],
) -> dict[str, str]:
    """In this process, weight by weight, whichever files their parts belong to. Returns the
    SHA-256 of each file.
    """
    job, journal = run.job, run.journal
    metadata = native.metadata(job.contents)
    with ExitStack() as opened:
        shards = {file: Shard(folder / file, layout(files[file], metadata)) for file in files}
        for shard in shards.values():
            opened.callback(shard.close)
        homes = {part: shards[file] for file, group in files.items() for part in group}
        missing = {file: set(group) for file, group in files.items()}
        hashes: dict[str, Future[str]] = {}
        hasher = opened.enter_context(ThreadPoolExecutor(run.workers))

        def written(unit: Unit) -> None:
            run.on_unit(unit)
            parts = set(part_names(job, unit.name))
            for file, shard in shards.items():
                missing[file] -= parts
                if not missing[file] and file not in hashes:
                    hashes[file] = hasher.submit(_read_again, job, shard, journal)

        if run.calibrated is not None:  # all weights have codes then; the rest is as it was read
            run.calibrated.run(
                job.sources,
                job.contents,
                homes,
                journal,
                folder.parent,
                run.cluster,
                run.on_step,
                run.on_unit,
            )
        if run.delete_source:
            deleting.note_source(job.folder, job.stored, job.untied, journal)
            for made in (folder, folder.parent, folder.parent.parent):
                flush(made)
        write = partial(_write_one, job, run.algorithm, homes, journal)
        for source, group in groups:
            with ThreadPoolExecutor(run.workers) as pool:
                _call_each(pool, write, group, begun, written, run.workers)
            if source is not None and source.exists():
                parts = [part for name in job.files[source] for part in part_names(job, name)]
                deleting.delete(source, parts, homes, journal)
                run.say(f"deleted {source}")
        begun("")
        run.on_step("hashing and verifying", 1, 1)
        return {file: future.result() for file, future in hashes.items()}


def _by_tasks(
    run: Run,
    cluster: Executor,
    files: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
    begun: Callable[[str], None],
) -> dict[str, str]:
    """On a cluster, file by file, each of which is here when it is complete. Returns the SHA-256
    of each.
    """
    journal = run.journal
    attempts = folder.parent / TASKS
    shutil.rmtree(attempts, ignore_errors=True)  # those of an earlier run
    attempts.mkdir(exist_ok=True)
    groups = {file: list(group) for file, group in files.items()}
    hashes = {}

    def written(result: WrittenFile) -> None:
        result.at.replace(folder / result.file)
        for part, checksum in result.checksums.items():
            if journal.done.get(part) != checksum:
                journal.add(part, checksum)
        hashes[result.file] = result.sha256
        for unit in result.units:
            if unit.name in groups[result.file]:  # else another of its parts is here
                run.on_unit(unit)
        begun(result.file)

    done = dict(journal.done)
    write = partial(_write_file, run.job, run.algorithm, groups, folder, done, run.workers)
    _call_each(cluster, write, files, begun, written, len(files))
    shutil.rmtree(attempts, ignore_errors=True)
    return hashes


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """What a task made. file: of the output. at: where it lies. checksums: of its parts. sha256:
    of all of it. units: weights and tensors of which it has a part.
    """

    file: str
    at: Path
    checksums: Mapping[str, int]
    sha256: str
    units: Sequence[Unit]


def _write_file(
    job: Job,
    algorithm: Algorithm,
    groups: Mapping[str, Sequence[str]],
    folder: Path,
    done: Mapping[str, int],
    workers: int,
    file: str,
) -> WrittenFile:
    """Write one of the output's files, on any node. It lies under a name of its own, because the
    same may be running on a node that was given up; what an earlier run did of it is taken over.
    groups: names of the parts in each file. done: as `Pieces` has it.
    """
    tensors = native.stored_tensors(job.contents)
    plan = layout({p: tensors[p] for p in groups[file]}, native.metadata(job.contents))
    names = [*job.contents.qweights, *job.contents.tensors]
    here = [name for name in names if not plan.spans.keys().isdisjoint(part_names(job, name))]
    _check_shared([folder, *{job.sources[name].file for name in here if name in job.sources}])
    at, earlier = folder.parent / TASKS / f"{uuid.uuid4().hex}-{file}", folder / file
    pieces = Pieces({part: done[part] for part in plan.spans if part in done})
    if earlier.is_file() and len(pieces.done) == len(plan.spans):
        at = earlier  # complete, but for what was damaged since
    elif earlier.is_file() and pieces.done:
        shutil.copyfile(earlier, at)
    units: list[Unit] = []
    shard = Shard(at, plan)
    try:
        write = partial(_write_one, job, algorithm, dict.fromkeys(plan.spans, shard), pieces)
        with ThreadPoolExecutor(workers) as pool:
            _call_each(pool, write, here, lambda _: None, units.append, workers)
        sha256 = _read_again(job, shard, pieces)
    finally:
        shard.close()  # it is on the disk then
    return WrittenFile(file=file, at=at, checksums=pieces.done, sha256=sha256, units=units)


def _check_shared(paths: Iterable[Path]) -> None:
    """Raises ClusterError when this node does not see what the one that began the run saw."""
    missing = next((path for path in paths if not path.exists()), None)
    if missing is not None:
        raise ClusterError(
            f"{missing} is not there on the node {platform.node()}; source and output of a run on "
            "a cluster have to be on a filesystem that all its nodes share, under the same path"
        )


def _read_again(job: Job, shard: Shard, pieces: Pieces) -> str:
    """The SHA-256 of a file that is complete. Raises CheckpointError when a tensor in it is not
    what it was in memory.
    """
    made_of = {p: stored for name, stored in job.sources.items() for p in part_names(job, name)}
    digest = hashlib.sha256(shard.layout.header)
    for part in sorted(shard.layout.spans, key=shard.layout.spans.__getitem__):
        data = shard.get(part)
        digest.update(data)
        deleting.check_part(part, shard, data, pieces, made_of.get(part))
    return digest.hexdigest()


def _call_each(
    pool: Executor,
    work: Callable[[str], T],
    names: Iterable[str],
    begun: Callable[[str], None],
    finished: Callable[[T], None],
    at_once: int,
) -> None:
    """Call it with all names, a few at a time; the first error ends it after those that have
    begun.
    """
    waiting = iter(names)
    running: set[Future[T]] = set()
    while True:
        for name in waiting:
            running.add(pool.submit(work, name))
            begun(name)
            if len(running) >= at_once:
                break
        if not running:
            break
        complete, running = wait(running, return_when=FIRST_COMPLETED)
        for future in complete:
            finished(future.result())


def _write_one(
    job: Job, algorithm: Algorithm, homes: Mapping[str, Shard], pieces: Pieces, name: str
) -> Unit:
    """Read, quantize and write those parts of a weight that have a home, unless an earlier run
    has.
    """
    start = time.perf_counter()
    source = job.sources.get(name)
    nbytes = 0 if source is None else source.nbytes
    wanted = [part for part in part_names(job, name) if part in homes]
    missing = next((part for part in wanted if not _is_there(part, homes, pieces)), None)
    if missing is None:
        return Unit(name=name, bytes_before=nbytes)
    if source is not None and not source.file.exists():
        raise deleting.lost(missing, homes[missing], source)
    # A tensor without a source is a buffer that the model computes for itself.
    values = job.contents.tensors[name] if source is None else source.read()
    with _naming(name):
        parts, error = _parts(job, algorithm, name, values)
    made = {name + suffix: part for suffix, part in parts.items()}
    for part in wanted:
        homes[part].put(part, made[part])
        # CRC-32: what it has to find is a page that never reached the disk, and it is fast.
        pieces.add(part, zlib.crc32(as_bytes(made[part])))
    drop_pages(values)
    return Unit(
        name=name,
        bytes_before=nbytes,
        bytes_after=sum(made[part].nbytes for part in wanted),
        seconds=time.perf_counter() - start,
        error=error,
    )


def _is_there(part: str, homes: Mapping[str, Shard], pieces: Pieces) -> bool:
    return part in pieces.done and zlib.crc32(homes[part].get(part)) == pieces.done[part]


def _parts(
    job: Job, algorithm: Algorithm, name: str, values: Tensor
) -> tuple[Mapping[str, Tensor], float | None]:
    """The tensors to write for a weight or tensor as it is read, by suffix; and of a weight, the
    relative error of some of its rows.
    """
    weight = job.contents.qweights.get(name)
    if weight is None:
        return {"": values.to(job.contents.tensors[name].dtype)}, None
    rows = (values.t() if name in job.transposed else values).to(weight.dtype)
    check_finite(rows)
    chosen = algorithm.choose(rows, None, weight.scheme).weight
    return chosen.parts, _error(chosen, rows)


def _error(chosen: QTensor, values: Tensor) -> float | None:
    """|W - image| / |W| of rows at equal distances; None for what has no rows. For the log: all of
    them would take as long as quantizing does.
    """
    if len(chosen.shape) != 2 or not len(values):
        return None
    rows = torch.arange(0, len(values), -(-len(values) // SAMPLED_ROWS))
    w = values[rows].float()
    lost = torch.linalg.vector_norm(w - chosen.rows(rows).dequantize(torch.float32))
    return float(lost / torch.linalg.vector_norm(w).clamp_min(1e-30))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except ZeropointError as e:
        raise type(e)(f"{name}: {e}") from e
