"""What a long run has finished, so that the next one goes on where it ended.

A text file that only grows, one JSON object a line: first what the run is, then every finished
piece with a checksum of what was written, and notes. Nothing has to be on the disk before the line
of its piece is: a piece counts when what is found in its place still has the checksum. A note is on
the disk, with all lines before it, when `note` returns.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zeropoint.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a journal says. run: which run it is of; None where that cannot be read. done: checksum
    of each piece that is finished. notes: the latest of each key. size: bytes of whole lines.
    """

    run: Mapping[str, Any] | None = None
    done: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    size: int = 0


NO_RECORD = Record()
"""Of a run that begins anew; nobody writes into it."""


def read_record(path: Path) -> Record:
    """The journal of an unfinished run; empty where there is none. Raises OSError.

    A last line without an end is one that a kill interrupted; others that make no sense were
    damaged since, and say nothing.
    """
    data = path.read_bytes() if path.is_file() else b""
    size = data.rfind(b"\n") + 1
    lines = [_parsed(text) for text in data[:size].split(b"\n")[:-1]]
    run = lines[0].get("run") if lines else None
    return Record(
        run=run if isinstance(run, dict) else None,
        done={r["piece"]: r["checksum"] for r in lines if isinstance(r.get("checksum"), int)},
        notes={r["note"]: r["value"] for r in lines if "value" in r},
        size=size,
    )


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(line, dict):
        return {}
    key = line.get("piece", line.get("note"))
    return line if "run" in line or isinstance(key, str) else {}


class Pieces:
    """Checksum of each piece that is finished, by this run or earlier ones."""

    def __init__(self, done: Mapping[str, int]) -> None:
        self.done = dict(done)

    def add(self, piece: str, checksum: int) -> None:
        """Note that a piece is finished."""
        self.done[piece] = checksum


class Journal(Pieces):
    """An open journal. `add` and `note` may be called from several threads.

    notes: by key.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Open the journal of an unfinished run, or begin one.

        identity: what has to be equal for the pieces to be of use, JSON data. fresh: begin anew
        whatever is there. Raises CheckpointError: another process has it open, it is damaged, or it
        belongs to another run, in words that say where they differ.
        """
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._claim(path)
            earlier = NO_RECORD if fresh else read_record(path)
            if earlier.run is not None:
                check_identity(path.parent, earlier.run, identity)
                os.ftruncate(self._file, earlier.size)
            elif earlier.done or earlier.notes:
                raise CheckpointError(
                    f"{path} is damaged: its first line does not say which run it is of; start "
                    "over with fresh=True (--fresh)"
                )
            else:
                os.ftruncate(self._file, 0)
                self._append({"run": identity})
                os.fsync(self._file)
        except BaseException:
            os.close(self._file)
            raise
        super().__init__(earlier.done)
        self.notes = dict(earlier.notes)

    def add(self, piece: str, checksum: int) -> None:
        """Note that a piece is finished, in the file. Raises OSError."""
        with self._lock:
            self._append({"piece": piece, "checksum": checksum})
            super().add(piece, checksum)

    def note(self, key: str, value: Any) -> None:
        """Keep JSON data under a key, instead of what was there; it is on the disk when this
        returns. Raises OSError.
        """
        with self._lock:
            self._append({"note": key, "value": value})
            os.fsync(self._file)
            self.notes[key] = value

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def _claim(self, path: Path) -> None:
        busy = CheckpointError(
            f"{path.parent} is being written by another process; wait for it, or choose another "
            "folder"
        )
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = path.stat()  # whoever had it until now may have removed it when it was done
        except (BlockingIOError, FileNotFoundError) as e:
            raise busy from e
        if not os.path.samestat(found, os.fstat(self._file)):
            raise busy

    def _append(self, line: Mapping[str, Any]) -> None:
        """A whole line, or nothing of it: another may follow."""
        end = os.lseek(self._file, 0, os.SEEK_END)
        data = memoryview(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError:
            os.ftruncate(self._file, end)
            raise


def check_identity(folder: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises CheckpointError saying where the run in a folder and the one asked for differ."""
    plain = json.loads(json.dumps(now))
    keys = [k for k in dict.fromkeys((*earlier, *plain)) if earlier.get(k) != plain.get(k)]
    if not keys:
        return
    key = keys[0]
    raise CheckpointError(
        f"{folder} holds an unfinished run with another {key.replace('_', ' ')}: "
        f"{_short(earlier.get(key))}, not {_short(plain.get(key))}; go on with the former, or "
        "start over with fresh=True (--fresh)"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else text[:297] + "..."
