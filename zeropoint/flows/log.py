"""What a long run did, line by line, in a file that is still there when the run was killed.

It lies in the working folder beside the output, and every line is handed to the system as soon as
it is complete. A run that comes to its end leaves it beside its output, not inside: it has times,
and the output of the same command is the same byte by byte.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from zeropoint.errors import CheckpointError
from zeropoint.model.pages import resident_bytes
from zeropoint.progress import OnStep, Unit

LOG = "log.txt"


def working_folder(out: Path) -> Path:
    """Where a run that writes `out` has its work."""
    return out.with_name(f".{out.name}.unfinished")


def finished_log(out: Path) -> Path:
    """Where the log of a run that came to its end is."""
    return out.with_name(f"{out.name}.quantize.log")


class Log:
    """An open log."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def say(self, what: str) -> None:
        """A line, with the time and the memory in use. Raises OSError."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        text = " ".join(what.splitlines())
        self._file.write(f"{now}  rss {resident_bytes() / 1e6:,.1f} MB  {text}\n")

    def steps(self, on_step: OnStep) -> OnStep:
        """Steps, each with a line when it begins."""
        current = ""

        def step(what: str, done: int, total: int) -> None:
            nonlocal current
            if what and what != current:
                self.say(f"{what}, {done} of {total}")
            current = what
            on_step(what, done, total)

        return step

    def unit(self, unit: Unit) -> None:
        """A line for what is finished."""
        parts = [f"done {unit.name}"]
        if unit.bytes_before is not None and unit.bytes_after is not None:
            parts.append(f"{unit.bytes_before:,} -> {unit.bytes_after:,} bytes")
        if unit.seconds is not None:
            parts.append(f"{unit.seconds:.3f} s")
        if unit.error is not None:
            parts.append(f"error {unit.error:.3%}")
        if unit.output_error is not None:
            parts.append(f"{unit.output_error:.3%} of the output lost")
        self.say(", ".join(parts))


@contextmanager
def logged(out: Path, what: str) -> Iterator[Log]:
    """The log of a run that writes `out`, after those of earlier ones that did not end. what: the
    run, for its first line. Raises CheckpointError when it cannot be written.
    """
    working = working_folder(out)
    try:
        working.mkdir(parents=True, exist_ok=True)
        file = (working / LOG).open("a", buffering=1, encoding="utf-8")
    except OSError as e:
        raise CheckpointError(f"{out} cannot be written: {e}") from e
    with file:
        log = Log(file)
        log.say(f"started: {what}")
        try:
            yield log
        except BaseException as e:
            with suppress(OSError):  # the disk may be full, which is what e says
                log.say(f"failed: {type(e).__name__}: {e}")
            raise
        log.say("finished")
    (working / LOG).replace(finished_log(out))
    with suppress(OSError):  # not empty: the work of another run that did not end
        working.rmdir()
