"""From a float checkpoint to a quantized one, weight by weight: memory holds a few weights whatever
the size of the model, and a run that was interrupted goes on where it ended.

    headers --planned--> the output's files, laid out --each weight: read, quantize, write--> verify

An algorithm that calibrates works block by block instead (`blocks`), before the rest is written.
On a cluster each of the output's files is a task, which does the same for the weights in it; of a
calibrated run, each linear is one, and files are written here.
Everything is written into a folder beside the output, which takes its place at the end.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zeropoint.algorithms import Algorithm, get_algorithm
from zeropoint.checkpoints import native
from zeropoint.checkpoints.atomic import check_space, check_writable, flush, install_directory
from zeropoint.checkpoints.floats import WEIGHT_SUFFIXES, Stored
from zeropoint.checkpoints.journal import NO_RECORD, Journal, Pieces, Record, read_record
from zeropoint.checkpoints.shard import Shard, as_bytes, layout
from zeropoint.errors import (
    CheckpointError,
    ClusterError,
    RecipeError,
    SourceError,
    StreamError,
    ZeropointError,
)
from zeropoint.flows import deleting
from zeropoint.flows.blocks import Calibrated
from zeropoint.flows.budget import parse_bytes
from zeropoint.flows.cluster import RayExecutor
from zeropoint.flows.data import Calibration, Data
from zeropoint.flows.log import logged, working_folder
from zeropoint.flows.ptq import Patterns, calibration_of, dtype_name, go_live, planned
from zeropoint.flows.report import Report
from zeropoint.model.load import float_skeleton, install, model_names
from zeropoint.model.pages import drop_pages
from zeropoint.model.save import contents_of, remember_recipe
from zeropoint.model.source import Source, resolve
from zeropoint.model.walk import named_modules
from zeropoint.nn import QModule, quantized_type
from zeropoint.numerics import check_finite
from zeropoint.progress import OnStep, OnUnit, Unit, no_progress, no_units
from zeropoint.qtensor import QTensor, empty
from zeropoint.scheme import Recipe

JOURNAL = "journal.jsonl"
INSTALLING = "installing"  # a note: SHA-256 of the manifest of what then takes the output's place
TASKS = "tasks"  # folder beside the journal: files that tasks are writing
WORKERS = 2
SAMPLED_ROWS = 32  # of a weight, whose error is in the log

T = TypeVar("T")


def compress(
    source: str | Path,
    out: str | Path,
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
    recipe: Recipe | None = None,
    strict: bool = True,
    algorithm: str = "rtn",
    data: Data | None = None,
    tokenizer: Any = None,
    effort: str | None = None,
    calibration: Calibration | None = None,
    offload: str | Path | None = None,
    max_memory: str | float | None = None,
    task: str | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    delete_source: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    on_step: OnStep = no_progress,
    on_unit: OnUnit = no_units,
) -> Report:
    """Quantize a checkpoint that may be larger than memory into another one.

    source: a folder of safetensors, or a hub id. out: the folder to write. weights to strict: as
    `zp.quantize` takes them. algorithm, data, effort, calibration: as `zp.freeze` takes them;
    tokenizer: for texts, that of the source when it is left out. task: as `zp.load` takes it.
    overwrite: replace a zeropoint checkpoint at `out`. workers: weights that are read, quantized
    and written at the same time: 2, and on a cluster 1 in each task that writes a file, which takes
    as many CPUs.
    on_unit: called for every weight and tensor that is finished.

    An algorithm that calibrates has one block of the model in memory at a time, and what is in no
    block: embeddings and heads; but all of it while it writes its own text (data="self", which is
    also the default). Codes are those of `zp.freeze`; the report has its report as `calibration`.
    The hidden states between two blocks, a vector for each token, are in memory too, or with
    max_memory (bytes, or text like "2GB") only so much of them; the others, or with offload alone
    all, in files in the folder `offload`, or beside the output.

    A run that ended early left what it had done beside `out`, and the same call goes on with it;
    the result is the same, byte by byte. fresh: start over instead. Files of the source that hold
    no weights are copied, tensors that the model does not have are carried over as they are. The
    result is read again and verified before it takes its place.

    delete_source: for a disk that cannot hold both, and an algorithm that needs no data. Each of
    the source's files of weights is deleted as soon as all that is made of it is on the disk and
    was read back equal; in the end their index, too. Everything else in the folder stays.

    ray: the address of a Ray cluster, "auto" for the one that this machine is a node of. Each of
    the output's files is a task; source and `out` are on a filesystem that all nodes share. Of an
    algorithm that calibrates, each linear is a task (small ones that read one input are one), with
    as many CPUs as torch has threads here. The result is the same, byte by byte.
    Raises StreamError (a .gguf file, a checkpoint whose tensors transformers merges or casts while
    it loads them, a model that is not run block by block, effort "high" or `propagate`, which need
    the whole model: use zp.load(source, weights=...) and zp.save), SourceError, CheckpointError,
    ClusterError, and what `zp.quantize` and `zp.freeze` raise.
    """
    options = {
        "weights": weights,
        "group_size": group_size,
        "symmetric": symmetric,
        "float_zero_point": float_zero_point,
        "double_quant": double_quant,
        "activations": activations,
        "outlier_threshold": outlier_threshold,
        "compute_dtype": None if compute_dtype is None else dtype_name(compute_dtype),
        "include": include,
        "exclude": exclude,
    }
    chosen = get_algorithm(algorithm)
    how = calibration_of(chosen, data, effort, calibration)
    if how is None and not (offload is None and max_memory is None):
        raise RecipeError(
            f"algorithm={algorithm!r} has no hidden states; leave offload and max_memory out"
        )
    if workers is None:
        workers = WORKERS if ray is None or how is not None else 1
    if workers < 1:
        raise RecipeError(f"workers={workers}: there must be at least 1")
    out = Path(os.path.abspath(out))
    if delete_source and how is not None:
        raise RecipeError(
            f"algorithm={algorithm!r} reads its source more than once; leave delete_source "
            "(--delete-source) out"
        )
    if ray is not None and delete_source:
        raise RecipeError(
            "on a cluster the source is read by tasks that may run again; leave delete_source "
            "(--delete-source) or ray (--ray) out"
        )
    found = resolve(source)
    if delete_source:
        deleting.check_may_delete(source, found, out)
    earlier = _earlier(out, fresh)
    if not _installed(earlier.notes, out):
        check_writable(out, lambda existing: native.why_not_replace(existing, overwrite))
    folder = local_folder(found)
    job = prepare(folder, options, recipe=recipe, strict=strict, task=task, earlier=earlier)
    job = replace(job, contents=replace(job.contents, algorithm=chosen.name))
    calibrated = None
    if how is not None:
        model = live_model(job, options, recipe=recipe, strict=strict, task=task)
        calibrated = Calibrated(
            model,
            chosen,
            how,
            data,
            tokenizer,
            folder,
            task,
            None if offload is None else Path(offload),
            None if max_memory is None else parse_bytes(max_memory),
        )
    cpus = workers if how is None else torch.get_num_threads()
    cluster = nullcontext() if ray is None else RayExecutor(ray, cpus)
    with cluster as executor, logged(out, f"{job.folder} to {out} by {algorithm}") as log:

        def finished(unit: Unit) -> None:
            log.unit(unit)
            on_unit(unit)

        _run(
            job,
            chosen,
            out,
            calibrated,
            earlier,
            fresh=fresh,
            delete_source=delete_source,
            workers=workers,
            cluster=executor,
            on_step=log.steps(on_step) if calibrated else on_step,
            on_unit=finished,
            say=log.say,
        )
    return job.report if calibrated is None else replace(job.report, calibration=calibrated.report)


def _earlier(out: Path, fresh: bool) -> Record:
    """What an unfinished run that wrote `out` did and is of use. Raises CheckpointError."""
    working = working_folder(out)
    try:
        earlier = read_record(working / JOURNAL)
    except OSError as e:
        raise CheckpointError(f"{working / JOURNAL} cannot be read: {e}") from e
    if fresh:
        deleting.check_fresh(working, earlier)
        return NO_RECORD
    return earlier


def _installed(notes: Mapping[str, Any], out: Path) -> bool:
    """Whether the run of these notes has put its result in the place of `out`."""
    manifest = out / native.MANIFEST
    return INSTALLING in notes and manifest.is_file() and notes[INSTALLING] == _sha256(manifest)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- what is to be done ---


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checkpoint to be written. contents: of the output, its tensors without values where a file
    has them. sources: where each weight and tensor of it is read, by its name in the output.
    stored: all tensors of the files, by their names there. files: which weights and tensors each
    file has to be there for, those of which it holds another copy included. untied: the weights
    that the configuration ties, but of which the files hold two.
    """

    folder: Path
    contents: native.Contents
    sources: Mapping[str, Stored]
    stored: Mapping[str, Stored]
    files: Mapping[Path, Sequence[str]]
    untied: Sequence[str]
    transposed: frozenset[str]
    report: Report

    @property
    def bytes_to_read(self) -> int:
        """Of all tensors."""
        return sum(stored.nbytes for stored in self.sources.values())


def local_folder(found: Source) -> Path:
    """The folder of a float checkpoint, downloaded if it is on the hub.

    Raises SourceError; StreamError for a .gguf file.
    """
    if found.kind == "hub":
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        skipped = [f"*{s}" for s in WEIGHT_SUFFIXES if "safetensors" not in s]
        try:
            return Path(snapshot_download(found.location, ignore_patterns=skipped))
        except (OSError, ValueError, HfHubHTTPError) as e:
            raise SourceError(f"{found.location!r} cannot be downloaded: {e}") from e
    if found.kind == "native":
        raise SourceError(f"{found.location} is quantized already; give the float model")
    if found.kind == "gguf":
        raise StreamError(
            f"{found.location} is a .gguf file; a folder of float safetensors is needed"
        )
    return Path(found.location)


def prepare(
    folder: Path,
    options: Mapping[str, Any],
    *,
    recipe: Recipe | None = None,
    strict: bool = True,
    task: str | None = None,
    earlier: Record = NO_RECORD,
) -> Job:
    """What `compress` would write, from config.json and the headers alone. earlier: the unfinished
    run that it goes on with; files that run has deleted are known from it.

    Raises SourceError, CheckpointError, and what `zp.quantize` raises but for errors about values.
    """
    stored, untied = deleting.read_source(folder, earlier)
    skeleton = float_skeleton(folder, task)
    return outline(folder, skeleton, stored, options, recipe=recipe, strict=strict, untied=untied)


def outline(
    where: str | Path,
    skeleton: Any,
    stored: Mapping[str, Stored],
    options: Mapping[str, Any],
    *,
    recipe: Recipe | None = None,
    strict: bool = True,
    untied: Sequence[str] | None = None,
) -> Job:
    """As `prepare`, of headers that have been read. where: the folder, or a hub id, of which no
    tensor is read. skeleton: the float model on the meta device, which becomes the quantized one;
    not when StreamError is raised. untied: as `Job` has it; None to find out.
    """
    names = model_names(skeleton, stored, skeleton.state_dict().keys())
    files = _Files(where, stored, names)
    if untied is None:
        untied = _untied(skeleton, files) if isinstance(where, Path) else ()
    _untie(skeleton, untied)
    contents, report, transposed = without_values(
        where, skeleton, _dtype(skeleton, stored), options, recipe=recipe, strict=strict
    )
    copies: list[tuple[str, Stored]] = []
    for alias, owner in contents.tied.items():  # the files may hold it under any of its names
        if alias in files.left:
            copy = files.left.pop(alias)
            if files.left.setdefault(owner, copy) is not copy:
                copies.append((owner, copy))
    sources: dict[str, Stored] = {}
    for name, weight in contents.qweights.items():
        shape = weight.shape[::-1] if name in transposed else weight.shape
        sources[name] = files.take(name, tuple(shape))
    for name, tensor in contents.tensors.items():
        if tensor.is_meta or name in files.left:
            sources[name] = files.take(name, tuple(tensor.shape))
    carried = {
        name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in files.left.items()
    }
    sources |= files.left
    needs: dict[Path, list[str]] = {}
    for name, tensor_of_file in (*sources.items(), *copies):
        needs.setdefault(tensor_of_file.file, []).append(name)
    return Job(
        folder=Path(where),
        contents=replace(
            contents, tensors=dict(contents.tensors) | carried, carried=tuple(carried)
        ),
        sources=sources,
        stored=stored,
        files=needs,
        untied=untied,
        transposed=transposed,
        report=report,
    )


def without_values(
    where: str | Path,
    skeleton: nn.Module,
    dtype: torch.dtype | None,
    options: Mapping[str, Any],
    *,
    recipe: Recipe | None,
    strict: bool,
) -> tuple[native.Contents, Report, frozenset[str]]:
    """Quantize and freeze a model that is on the meta device; in place. dtype: of its parameters,
    None to leave them. Returns what a checkpoint of it would hold, the report, and the names of
    weights that a float checkpoint holds as (K, N).
    """
    for parameter in skeleton.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    plan = planned(skeleton, options, recipe=recipe, strict=strict)
    transposed = _freeze_without_values(Path(where), skeleton, plan.schemes)
    remember_recipe(skeleton, plan.report.recipe)
    return contents_of(skeleton), plan.report, transposed


def live_model(
    job: Job,
    options: Mapping[str, Any],
    *,
    recipe: Recipe | None,
    strict: bool,
    task: str | None,
) -> nn.Module:
    """The model whose frozen state a job outlines: live, its parameters on the meta device."""
    model = float_skeleton(job.folder, task)
    _untie(model, job.untied)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(_dtype(model, job.stored))
    go_live(model, planned(model, options, recipe=recipe, strict=strict))
    return model


def _dtype(skeleton: Any, stored: Mapping[str, Stored]) -> torch.dtype:
    """What transformers loads the float tensors in: the configuration's dtype, else the first."""
    dtype: torch.dtype | None = getattr(skeleton.config, "dtype", None)
    if dtype is None:
        floats = (s.dtype for s in stored.values() if s.dtype.is_floating_point)
        dtype = next(floats, torch.float32)
    wide = getattr(skeleton, "_keep_in_fp32_modules", None) or ()
    strict = getattr(skeleton, "_keep_in_fp32_modules_strict", None) or ()
    if dtype != torch.float32 and (wide or strict):
        raise StreamError(
            f"transformers loads {', '.join([*wide, *strict])} of a {type(skeleton).__name__} in "
            f"float32 and the rest in {dtype}; quantize it by zp.load(source, weights=...)"
        )
    return dtype


def _freeze_without_values(
    folder: Path, skeleton: nn.Module, schemes: Mapping[Any, Any]
) -> frozenset[str]:
    """Frozen modules in the places of float ones, on the meta device. In place. Returns the names
    of weights whose files hold them as (K, N).
    """
    weights: dict[str, QTensor] = {}
    tied: dict[str, str] = {}
    owners: dict[int, str] = {}
    transposed = set()
    for site, scheme in schemes.items():
        kind = quantized_type(site.module)
        assert kind is not None
        name = f"{site.name}.weight"
        owner = owners.setdefault(site.tied, name)
        if owner != name:
            tied[name] = owner
            continue
        shape = kind.weight_shape(site.module)
        weights[name] = empty(shape, scheme.stored, site.module.weight.dtype)
        marker = torch.empty((1, 2), device="meta")
        if kind.from_layout(marker).shape != marker.shape:
            transposed.add(name)
    install(folder, skeleton, weights, tied)
    names_of = named_modules(skeleton)
    first = {n: names[0] for m, names in names_of.items() for n in names if isinstance(m, QModule)}
    return frozenset(f"{first[n.removesuffix('.weight')]}.weight" for n in transposed)


class _Files:
    """The tensors of the files by the names they have in the model."""

    def __init__(
        self, folder: str | Path, stored: Mapping[str, Stored], names: Mapping[str, str]
    ) -> None:
        self._folder = folder
        self.left = {names[name]: tensor for name, tensor in stored.items()}

    def take(self, name: str, shape: tuple[int, ...]) -> Stored:
        """The tensor of this name, which is not left then. Raises SourceError."""
        stored = self.left.pop(name, None)
        if stored is None:
            raise SourceError(f"{self._folder} is incomplete: it has no {name}")
        if stored.shape != shape:
            raise SourceError(
                f"{self._folder}: {stored.name} is {stored.shape}, but the model has {shape}; is "
                "config.json of this checkpoint?"
            )
        return stored


def _untied(model: Any, files: _Files) -> list[str]:
    """Weights that the configuration ties to others, of which the files hold different ones."""
    pairs = (
        (alias, files.left.get(alias), files.left.get(owner))
        for alias, owner in model.all_tied_weights_keys.items()
    )
    return [a for a, first, second in pairs if first and second and _differ(first, second)]


def _untie(model: Any, untied: Sequence[str]) -> None:
    """Give these weights a parameter each. In place. transformers does so while it loads."""
    for alias in untied:
        module, _, leaf = alias.rpartition(".")
        old = model.get_parameter(alias)
        setattr(model.get_submodule(module), leaf, nn.Parameter(torch.empty_like(old)))


def _differ(first: Stored, second: Stored) -> bool:
    if first.shape != second.shape:
        return True
    tensors = first.read(), second.read()
    equal = torch.equal(*tensors)
    for tensor in tensors:
        drop_pages(tensor)
    return not equal


# --- doing it ---


def _run(
    job: Job,
    algorithm: Algorithm,
    out: Path,
    calibrated: Calibrated | None,
    earlier: Record,
    *,
    fresh: bool,
    delete_source: bool,
    workers: int,
    cluster: Executor | None,
    on_step: OnStep,
    on_unit: OnUnit,
    say: Callable[[str], None],
) -> None:
    working = working_folder(out)
    written = working / "checkpoint"
    try:
        identity = _identity(job, algorithm, earlier) | (calibrated.identity if calibrated else {})
        journal = Journal(working / JOURNAL, identity, fresh=fresh)
    except OSError as e:
        raise CheckpointError(f"{out} cannot be written: {e}") from e
    try:
        if fresh:
            shutil.rmtree(written, ignore_errors=True)
        if not _installed(journal.notes, out):
            written.mkdir(exist_ok=True)
            _keep_only_tensors(written)
            hashes = write_tensors(
                job,
                algorithm,
                calibrated,
                written,
                journal,
                workers,
                cluster,
                on_step,
                on_unit,
                say,
                delete_source=delete_source,
            )
            _copy_files(job.folder, written)
            native.write_config(written, job.contents)
            native.write_manifest(written, job.contents, hashes)
            problems = native.verify_contents(written)
            if problems:
                raise CheckpointError(f"{written} was written, but {problems[0]}")
            journal.note(INSTALLING, _sha256(written / native.MANIFEST))
            install_directory(written, out)
        elif calibrated is not None:
            calibrated.recall(journal)
        if delete_source:
            deleting.delete_index(job.folder, say)
    except OSError as e:
        raise CheckpointError(
            f"{out} cannot be written: {e}; what is done lies in {working}, and the same call goes "
            "on with it"
        ) from e
    finally:
        journal.close()
    shutil.rmtree(written, ignore_errors=True)  # what `out` was before
    shutil.rmtree(working / TASKS, ignore_errors=True)
    if calibrated is not None:
        calibrated.forget(working)
    (working / JOURNAL).unlink()


def _keep_only_tensors(folder: Path) -> None:
    """Remove what an earlier run wrote after the tensors: it is written again."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".safetensors":
            path.unlink()


def _identity(job: Job, algorithm: Algorithm, earlier: Record) -> dict[str, Any]:
    """What has to be equal for a run to go on with another's work."""
    return {
        "zeropoint_version": importlib.metadata.version("zeropoint"),
        "source": {file.name: deleting.stamp(file, earlier) for file in sorted(job.files)},
        "recipe": job.contents.recipe.to_dict(),
        "algorithm": algorithm.name,
        "layout": zlib.crc32(str(native.metadata(job.contents)).encode()),
    }


def write_tensors(
    job: Job,
    algorithm: Algorithm,
    calibrated: Calibrated | None,
    folder: Path,
    journal: Journal,
    workers: int,
    cluster: Executor | None,
    on_step: OnStep,
    on_unit: OnUnit,
    say: Callable[[str], None],
    *,
    delete_source: bool,
) -> dict[str, str]:
    """Write all of a job's tensors into a folder. Returns the SHA-256 of each file."""
    present = sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file())
    tensors = native.stored_tensors(job.contents)
    names = [*job.contents.qweights, *job.contents.tensors]
    groups: deleting.Groups = [(None, names)]
    if delete_source:
        groups = list(deleting.by_file(job.files, names))
    sizes = {name: sum(tensors[part].nbytes for part in _part_names(job, name)) for name in names}
    needed = deleting.needed_bytes(groups, sizes, folder) + native.SLACK_BYTES
    check_space(folder.parent, needed - present)
    files = native.shards(tensors)
    for stale in folder.glob("*.safetensors"):
        if stale.name not in files:
            stale.unlink()
    megabytes, done = job.bytes_to_read // 1_000_000, 0

    def begun(what: str) -> None:
        on_step(what, done // 1_000_000, megabytes)

    def finished(unit: Unit) -> None:
        nonlocal done
        done += unit.bytes_before or 0
        on_unit(unit)

    if cluster is not None and calibrated is None:
        hashes = _by_tasks(
            job, algorithm, files, folder, journal, workers, cluster, begun, finished
        )
    else:
        hashes = _in_place(
            job,
            algorithm,
            calibrated,
            files,
            groups,
            folder,
            journal,
            workers,
            cluster,
            on_step,
            begun,
            finished,
            say,
            delete_source,
        )
    native.write_index(folder, files)
    return hashes


def _in_place(
    job: Job,
    algorithm: Algorithm,
    calibrated: Calibrated | None,
    files: Mapping[str, Mapping[str, Tensor]],
    groups: deleting.Groups,
    folder: Path,
    journal: Journal,
    workers: int,
    cluster: Executor | None,
    on_step: OnStep,
    begun: Callable[[str], None],
    finished: OnUnit,
    say: Callable[[str], None],
    delete_source: bool,
) -> dict[str, str]:
    """In this process, weight by weight, whichever files their parts belong to. Returns the
    SHA-256 of each file.
    """
    metadata = native.metadata(job.contents)
    with ExitStack() as opened:
        shards = {file: Shard(folder / file, layout(files[file], metadata)) for file in files}
        for shard in shards.values():
            opened.callback(shard.close)
        homes = {part: shards[file] for file, group in files.items() for part in group}
        missing = {file: set(group) for file, group in files.items()}
        hashes: dict[str, Future[str]] = {}
        hasher = opened.enter_context(ThreadPoolExecutor(workers))

        def written(unit: Unit) -> None:
            finished(unit)
            parts = set(_part_names(job, unit.name))
            for file, shard in shards.items():
                missing[file] -= parts
                if not missing[file] and file not in hashes:
                    hashes[file] = hasher.submit(_read_again, job, shard, journal)

        if calibrated is not None:  # all weights have their codes then; the rest is as it was read
            calibrated.run(
                job.sources,
                job.contents,
                homes,
                journal,
                folder.parent,
                cluster,
                on_step,
                finished,
            )
        if delete_source:
            deleting.note_source(job.folder, job.stored, job.untied, journal)
            for made in (folder, folder.parent, folder.parent.parent):
                flush(made)
        write = partial(_write_one, job, algorithm, homes, journal)
        for source, group in groups:
            with ThreadPoolExecutor(workers) as pool:
                _call_each(pool, write, group, begun, written, workers)
            if source is not None and source.exists():
                parts = [part for name in job.files[source] for part in _part_names(job, name)]
                deleting.delete(source, parts, homes, journal)
                say(f"deleted {source}")
        begun("")
        on_step("hashing and verifying", 1, 1)
        return {file: future.result() for file, future in hashes.items()}


def _by_tasks(
    job: Job,
    algorithm: Algorithm,
    files: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
    journal: Journal,
    workers: int,
    cluster: Executor,
    begun: Callable[[str], None],
    finished: OnUnit,
) -> dict[str, str]:
    """On a cluster, file by file, each of which is here when it is complete. Returns the SHA-256
    of each.
    """
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
                finished(unit)
        begun(result.file)

    write = partial(_write_file, job, algorithm, groups, folder, dict(journal.done), workers)
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
    here = [name for name in names if not plan.spans.keys().isdisjoint(_part_names(job, name))]
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
    made_of = {p: stored for name, stored in job.sources.items() for p in _part_names(job, name)}
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
    wanted = [part for part in _part_names(job, name) if part in homes]
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


def _part_names(job: Job, name: str) -> list[str]:
    """Under which names the parts of a weight, or a tensor, are stored."""
    weight = job.contents.qweights.get(name)
    return [name] if weight is None else [name + suffix for suffix in weight.parts]


def copied_files(source: Path) -> dict[str, Path]:
    """Everything that holds no weights - tokenizer, generation config, chat template, code - by its
    name in the output.
    """
    written_here = {native.CONFIG, native.MANIFEST}
    weights = (*WEIGHT_SUFFIXES, ".gguf", ".h5", ".msgpack", ".onnx")
    files = {}
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        hidden = any(part.startswith(".") for part in inside.parts)
        if not hidden and path.is_file() and str(inside) not in written_here:
            if not path.name.endswith(weights):
                files[str(inside)] = path
    return files


def _copy_files(source: Path, folder: Path) -> None:
    for name, path in copied_files(source).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
