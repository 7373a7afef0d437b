"""What a run does, as it does it: a line of JSON for each event, for machines.

`docs/json.md` has the keys.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from zeropoint.cli.screen import STDOUT, Screen, finite
from zeropoint.errors import ZeropointError
from zeropoint.progress import OnStep, Unit


class Events:
    """Writes events where `--json-events` said, if anywhere, and shows stages on the screen.

    A line is handed to the system as soon as it is complete. Raises ZeropointError when the file
    cannot be written.
    """

    def __init__(self, to: str | None, screen: Screen) -> None:
        self._screen = screen
        self._to = to
        self._start = time.perf_counter()
        self._file: TextIO | None = None
        if to == STDOUT:
            self._file = sys.stdout
        elif to is not None:
            try:
                self._file = Path(to).open("w", buffering=1, encoding="utf-8")  # noqa: SIM115
            except OSError as e:
                raise _unwritable(to, e) from e

    def event(self, kind: str, **data: Any) -> None:
        """One line."""
        if self._file is None:
            return
        from zeropoint.model.pages import resident_bytes

        line = {
            "event": kind,
            "time": time.time(),
            "seconds": time.perf_counter() - self._start,
            "rss_bytes": resident_bytes(),
            **data,
        }
        try:
            self._file.write(json.dumps(finite(line), ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as e:
            file, self._file = self._file, None
            with suppress(OSError):  # what could not be written is tried once more, and given up
                file.close()
            raise _unwritable(str(self._to), e) from e

    def unit(self, unit: Unit) -> None:
        """A piece of work is finished."""
        data = asdict(unit)
        self.event("unit", unit_seconds=data.pop("seconds"), **data)

    @contextmanager
    def running(self, **data: Any) -> Iterator[None]:
        """The whole of a run: begun with `data`; an error that ends it is an event, and goes on."""
        self.event("started", **data)
        try:
            yield
        except BaseException as e:
            self.event("failed", failure=type(e).__name__, message=str(e))
            raise
        finally:
            if self._file is not None and self._to != STDOUT:
                self._file.close()

    @contextmanager
    def spinner(self, stage: str) -> Iterator[None]:
        """A stage in which nothing can be counted."""
        self.event("stage", stage=stage)
        with self._screen.spinner(stage):
            yield

    @contextmanager
    def progress(self, stage: str) -> Iterator[OnStep]:
        """A stage of steps, each an event when it begins."""
        self.event("stage", stage=stage)
        with self._screen.progress(stage) as draw:
            current = ""

            def on_step(what: str, done: int, total: int) -> None:
                nonlocal current
                draw(what, done, total)
                if what != current:
                    self.event("step", step=what, done=done, total=total)
                current = what

            yield on_step


def _unwritable(to: str, error: OSError) -> ZeropointError:
    return ZeropointError(f"--json-events {to} cannot be written: {error.strerror or error}")
