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
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zeropoint.algorithms import Algorithm, get_algorithm
from zeropoint.checkpoints import native
from zeropoint.checkpoints.atomic import check_writable, install_directory
from zeropoint.checkpoints.floats import WEIGHT_SUFFIXES
from zeropoint.checkpoints.journal import NO_RECORD, Journal, Record, read_record
from zeropoint.errors import CheckpointError, RecipeError
from zeropoint.flows import deleting
from zeropoint.flows.blocks import Calibrated
from zeropoint.flows.budget import parse_bytes
from zeropoint.flows.cluster import RayExecutor
from zeropoint.flows.data import Calibration, Data, calibration_of
from zeropoint.flows.job import Job, live_model, local_folder, prepare
from zeropoint.flows.log import logged, working_folder
from zeropoint.flows.planned import Patterns, dtype_name
from zeropoint.flows.report import Report
from zeropoint.flows.writing import TASKS, WORKERS, Run, write_tensors
from zeropoint.model.source import resolve
from zeropoint.progress import OnStep, OnUnit, Unit, no_progress, no_units
from zeropoint.scheme import Recipe

JOURNAL = "journal.jsonl"
INSTALLING = "installing"  # a note: SHA-256 of the manifest of what then takes the output's place
CHECKPOINT = "checkpoint"  # folder beside the journal: the output, until it takes its place


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
    it loads them, a model that is not run block by block, effort "high", which needs the whole
    model: use zp.load(source, weights=...) and zp.save), SourceError, CheckpointError,
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

        with _journal(out, job, chosen, calibrated, earlier, fresh) as journal:
            _do(
                Run(
                    job=job,
                    algorithm=chosen,
                    journal=journal,
                    calibrated=calibrated,
                    workers=workers,
                    cluster=executor,
                    delete_source=delete_source,
                    on_step=log.steps(on_step) if calibrated else on_step,
                    on_unit=finished,
                    say=log.say,
                ),
                out,
                fresh,
            )
        _tidy(working_folder(out), calibrated is not None)
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


# --- doing it ---


@contextmanager
def _journal(
    out: Path,
    job: Job,
    algorithm: Algorithm,
    calibrated: Calibrated | None,
    earlier: Record,
    fresh: bool,
) -> Iterator[Journal]:
    """Of a run that writes `out`. An OSError is a CheckpointError that says what is kept."""
    working = working_folder(out)
    try:
        identity = _identity(job, algorithm, earlier) | (calibrated.identity if calibrated else {})
        journal = Journal(working / JOURNAL, identity, fresh=fresh)
    except OSError as e:
        raise CheckpointError(f"{out} cannot be written: {e}") from e
    try:
        yield journal
    except OSError as e:
        raise CheckpointError(
            f"{out} cannot be written: {e}; what is done lies in {working}, and the same call goes "
            "on with it"
        ) from e
    finally:
        journal.close()


def _do(run: Run, out: Path, fresh: bool) -> None:
    """Write the checkpoint, unless an earlier run has, and put it in its place."""
    working = working_folder(out)
    written = working / CHECKPOINT
    if fresh:
        shutil.rmtree(written, ignore_errors=True)
    if not _installed(run.journal.notes, out):
        written.mkdir(exist_ok=True)
        _keep_only_tensors(written)
        hashes = write_tensors(run, written)
        _copy_files(run.job.folder, written)
        native.write_config(written, run.job.contents)
        native.write_manifest(written, run.job.contents, hashes)
        problems = native.verify_contents(written)
        if problems:
            raise CheckpointError(f"{written} was written, but {problems[0]}")
        run.journal.note(INSTALLING, _sha256(written / native.MANIFEST))
        install_directory(written, out)
    elif run.calibrated is not None:
        run.calibrated.recall(run.journal)
    if run.delete_source:
        deleting.delete_index(run.job.folder, run.say)


def _tidy(working: Path, calibrated: bool) -> None:
    """Remove what a run that has come to its end leaves, the journal last."""
    shutil.rmtree(working / CHECKPOINT, ignore_errors=True)  # what `out` was before
    shutil.rmtree(working / TASKS, ignore_errors=True)
    if calibrated:
        Calibrated.forget(working)
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
