"""Deleting a checkpoint's files of weights while it is quantized, for disks that cannot hold both.

    all that is made of a file: written, on the disk, read back equal --> noted --> the file deleted

From then on the journal beside the output says what the file held, so that a run that was
interrupted goes on without it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zeropoint.checkpoints.atomic import flush
from zeropoint.checkpoints.floats import INDEX_SUFFIX, Stored, read_headers
from zeropoint.checkpoints.journal import Journal, Pieces, Record
from zeropoint.checkpoints.shard import DTYPES, Shard
from zeropoint.errors import CheckpointError, SourceError
from zeropoint.model.source import PACKAGE, Source

SOURCE, DELETED = "source", "deleted"  # notes: what the files held; names of those that are gone
Group = tuple[Path | None, Sequence[str]]
"""A file, and what is written before it is deleted; None: no file is."""
Groups = Sequence[Group]
_PACKAGES = {"site-packages", "dist-packages"}
_HUB_FOLDER = "models--"  # how the cache of huggingface_hub calls a repository's folder


# --- before ---


def check_may_delete(source: str | Path, found: Source, out: Path) -> None:
    """Raises SourceError unless the weights of a source are the user's own, to be deleted."""
    reason = _why_not_delete(str(source), found, out)
    if reason is not None:
        raise SourceError(f"delete_source=True (--delete-source): {reason}")


def _why_not_delete(source: str, found: Source, out: Path) -> str | None:
    if found.kind not in ("hub", "directory"):
        return None  # it is refused for what it is
    if found.kind == "hub":
        return (
            f"{source} is on the hub, and lies in a cache that other programs read; download it "
            f"into a folder (hf download {source} --local-dir FOLDER), and give that"
        )
    folder = Path(found.location).resolve()
    if source.startswith(PACKAGE) or _PACKAGES & {*folder.parts}:
        return f"{folder} belongs to an installed Python package; copy it, and give the copy"
    if any(part.startswith(_HUB_FOLDER) for part in folder.parts):
        return f"{folder} is the hub's cache, which other programs read; give a copy of it"
    if folder == out.resolve():
        return f"{out} is the source itself; choose another folder to write"
    link = next((f for f in sorted(folder.glob("*.safetensors")) if f.is_symlink()), None)
    if link is not None:
        return (
            f"{link} is a link to {link.readlink()}, which others may use, and deleting it frees "
            "nothing; give the folder it points into, or a copy"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"no permission to delete files in {folder}; leave it out"
    return None


def check_fresh(working: Path, record: Record) -> None:
    """Raises CheckpointError when an unfinished run has deleted what starting over would read."""
    gone = [file for file in _deleted(record) if not file.exists()]
    if gone:
        raise CheckpointError(
            f"{working} holds all there is of {len(gone)} files that have been deleted, {gone[0]} "
            "the first: there is nothing to start over from; go on without fresh=True (--fresh), "
            "or put them back"
        )


def read_source(folder: Path, record: Record) -> tuple[dict[str, Stored], Sequence[str] | None]:
    """As `read_headers`, of a folder from which the run of a record may have deleted files; then
    also what that run found of tied weights, `Job.untied`.

    Raises CheckpointError, also when another file is gone, or the run was of another folder.
    """
    deleted = _deleted(record)
    if not deleted:
        return read_headers(folder), None
    if deleted[0].parent != folder.resolve():
        raise CheckpointError(
            f"the unfinished run has deleted files of {deleted[0].parent}, {deleted[0].name} the "
            f"first; go on with that source, not with {folder}"
        )
    note = record.notes[SOURCE]
    dtypes = {code: dtype for dtype, code in DTYPES.items()}
    stored = {}
    for file, tensors in note["files"].items():
        if file not in record.notes[DELETED] and not (folder / file).is_file():
            raise CheckpointError(
                f"{folder} lacks {file}, which the unfinished run has not deleted; put it back"
            )
        for name, (code, shape) in tensors.items():
            stored[name] = Stored(
                file=folder / file, name=name, shape=tuple(shape), dtype=dtypes[code]
            )
    return stored, note["untied"]


def stamp(file: Path, record: Record) -> list[int]:
    """Size and time of a file, or what they were when it was there. Raises OSError."""
    if not file.exists() and file.name in record.notes.get(DELETED, []):
        assert record.run is not None, "`read_source` has refused it"
        return list(record.run["source"][file.name])
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _deleted(record: Record) -> list[Path]:
    """Files that have been deleted, or were about to be."""
    names = record.notes.get(DELETED, [])
    if names and (SOURCE not in record.notes or record.run is None):
        raise CheckpointError(
            f"the journal of the unfinished run is damaged: it does not say what {names[0]} held, "
            "which has been deleted"
        )
    return [Path(record.notes[SOURCE]["folder"]) / name for name in names]


def needed_bytes(groups: Groups, sizes: Mapping[str, int], beside: Path) -> int:
    """The most that is ever taken by what is written minus what is deleted, which counts when it
    lies on the disk of `beside` and no other name keeps it. groups: as `by_file`; sizes: of what is
    written of each.
    """
    disk = beside.stat().st_dev
    taken = most = 0
    for file, names in groups:
        taken += sum(sizes[name] for name in names)
        most = max(most, taken)
        if file is not None and file.exists():
            found = file.stat()
            taken -= found.st_blocks * 512 * (found.st_dev == disk and found.st_nlink == 1)
    return most


def by_file(files: Mapping[Path, Sequence[str]], names: Sequence[str]) -> Iterator[Group]:
    """What has to be written before each file can be deleted, and was not for one before; in the
    end, with None, what is made of no file.
    """
    before: set[str] = set()
    for file, of_it in sorted(files.items()):
        yield file, [name for name in of_it if name not in before]
        before.update(of_it)
    yield None, [name for name in names if name not in before]


# --- meanwhile ---


def note_source(
    folder: Path, stored: Mapping[str, Stored], untied: Sequence[str], journal: Journal
) -> None:
    """Note what the files hold, before the first is deleted. Raises OSError."""
    if DELETED in journal.notes:
        return
    files: dict[str, dict[str, Any]] = {}
    for name, tensor in stored.items():
        described = DTYPES[tensor.dtype], list(tensor.shape)
        files.setdefault(tensor.file.name, {})[name] = described
    note = {"folder": str(folder.resolve()), "files": files, "untied": list(untied)}
    journal.note(SOURCE, note)


def delete(file: Path, parts: Sequence[str], homes: Mapping[str, Shard], journal: Journal) -> None:
    """Delete a file once everything that was made of it is safe. parts: names of that; homes: the
    open files they are in, whose folders are on the disk.

    Raises CheckpointError when one reads back differently, OSError.
    """
    for shard in {homes[part] for part in parts}:
        shard.flush()
    for part in parts:
        check_part(part, homes[part], homes[part].get(part), journal)
    names = [*journal.notes.get(DELETED, []), file.name]
    journal.note(DELETED, list(dict.fromkeys(names)))
    file.unlink(missing_ok=True)
    flush(file.parent)


def check_part(
    part: str, shard: Shard, data: bytes, pieces: Pieces, made_of: Stored | None = None
) -> None:
    """Raises CheckpointError unless this is what was written. made_of: what it can be made of
    again, if that is still there.
    """
    if zlib.crc32(data) == pieces.done.get(part):
        return
    if made_of is not None and not made_of.file.exists():
        raise lost(part, shard, made_of)
    raise CheckpointError(
        f"{shard.path}: {part} has been written, but reads back differently; is the disk sound? "
        "The same call goes on"
    )


def lost(part: str, shard: Shard, made_of: Stored) -> CheckpointError:
    """What to say of a part that is damaged after the file it was made of has been deleted."""
    return CheckpointError(
        f"{shard.path}: {part} is damaged, and cannot be made again: {made_of.file}, which held "
        f"{made_of.name}, has been deleted; put that file back with its time (cp -p), and the same "
        "call goes on, or put all of them back, and start over with fresh=True (--fresh)"
    )


def delete_index(folder: Path, say: Callable[[str], None]) -> None:
    """Delete the list of the files that are gone. Raises OSError."""
    for index in folder.glob(f"*{INDEX_SUFFIX}"):
        index.unlink()
        say(f"deleted {index}")
