"""What a long run has finished, so that the next one goes on where it ended.

A text file, one JSON object a line: first what the run is, then every finished piece with a
checksum of what was written. Nothing has to be on the disk before its line is: a piece counts when
what is found in its place still has the checksum.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zeropoint.errors import CheckpointError


class Journal:
    """An open journal. `add` may be called from several threads.

    done: checksum of each piece that is finished, by this run or earlier ones.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Open the journal of an unfinished run, or begin one.

        identity: what has to be equal for the pieces to be of use, JSON data. fresh: begin anew
        whatever is there. Raises CheckpointError: another process has it open, or it belongs to
        another run, in words that say where they differ.
        """
        self.done: dict[str, int] = {}
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._claim(path)
            earlier = None if fresh else _lines(path)
            if earlier:
                check_identity(path.parent, earlier[0], identity)
                self.done = {line["piece"]: line["checksum"] for line in earlier[1:]}
            os.ftruncate(self._file, 0)
            self._append(identity)
            for piece, checksum in self.done.items():
                self._append({"piece": piece, "checksum": checksum})
        except BaseException:
            os.close(self._file)
            raise

    def add(self, piece: str, checksum: int) -> None:
        """Note that a piece is finished. Raises OSError."""
        with self._lock:
            self._append({"piece": piece, "checksum": checksum})
            self.done[piece] = checksum

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def _claim(self, path: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise CheckpointError(
                f"{path.parent} is being written by another process; wait for it, or choose "
                "another folder"
            ) from e

    def _append(self, line: Mapping[str, Any]) -> None:
        os.lseek(self._file, 0, os.SEEK_END)
        os.write(self._file, json.dumps(line, ensure_ascii=False).encode() + b"\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines that were written whole."""
    lines: list[dict[str, Any]] = []
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break  # the kill came while it was written
        if not isinstance(line, dict) or (lines and not {"piece", "checksum"} <= line.keys()):
            break
        lines.append(line)
    return lines


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
