"""Where a verb writes: results to stdout, progress to stderr, JSON to a file.

JSON may go to stdout; then the results go to stderr.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from zeropoint.errors import ZeropointError
from zeropoint.progress import OnStep

STDOUT = "-"


def stderr_console() -> Console:
    """For progress and errors."""
    return Console(stderr=True, highlight=False)


class Screen:
    """The output of one verb. results: for people. notes: progress and warnings.

    Raises ZeropointError at once when the JSON file could not be written at the end, and when both
    it and `events_to`, where a verb writes its events, are stdout.
    """

    def __init__(self, json_to: str | None = None, events_to: str | None = None) -> None:
        if json_to == events_to == STDOUT:
            raise ZeropointError(
                "--json - and --json-events - both need stdout; name a file for one"
            )
        self.notes = stderr_console()
        self.results = self.notes if STDOUT in (json_to, events_to) else Console(highlight=False)
        self._json_to = json_to
        if json_to not in (None, STDOUT):
            with _json_errors(json_to):
                _check_file(Path(json_to))

    @contextmanager
    def spinner(self, what: str) -> Iterator[None]:
        """Turn a wheel while something happens; nothing where stderr is not a terminal."""
        if not self.notes.is_terminal:
            yield
            return
        with self.notes.status(_plain(what)):
            yield

    @contextmanager
    def progress(self, title: str) -> Iterator[OnStep]:
        """Draw a bar, fed by what is yielded; nothing where stderr is not a terminal."""
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.completed}/{task.total}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[what]}", style="dim", markup=False),
        )
        hidden = not self.notes.is_terminal
        with Progress(*columns, console=self.notes, transient=True, disable=hidden) as bar:
            task = bar.add_task(title, total=None, what="")

            def on_step(what: str, done: int, total: int) -> None:
                bar.update(task, completed=done, total=total, what=what)

            yield on_step

    def warn(self, message: str) -> None:
        """A line that begins with "warning:", beside the results."""
        from rich.text import Text

        self.notes.print(Text.assemble(("warning: ", "bold yellow"), message), soft_wrap=True)

    def line(self, *parts: Any) -> None:
        """One line of results, never broken: strings, or (string, style) pairs."""
        from rich.text import Text

        self.results.print(Text.assemble(*parts), soft_wrap=True)

    def json(self, data: Mapping[str, Any]) -> None:
        """Write the result where `--json` said, if anywhere; a file all at once.

        Numbers that are not finite become null.
        """
        if self._json_to is None:
            return
        text = json.dumps(finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        if self._json_to == STDOUT:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        with _json_errors(self._json_to):
            _write(Path(self._json_to), text)


def silence_libraries() -> None:
    """Turn off the bars and warnings of transformers and of what it uses."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the house look. Columns whose name begins with ">" align right."""
    result = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for column in columns:
        right = column.startswith(">")
        result.add_column(
            column.removeprefix(">"),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="fold",
            header_style="dim",
        )
    return result


def megabytes(count: float) -> str:
    """123456789 -> '123.5 MB'. Decimal, as disks and downloads are sold."""
    return f"{count / 1e6:,.1f} MB"


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def finite(data: Any) -> Any:
    """JSON data with null for numbers that are not finite."""
    if isinstance(data, Mapping):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data


@contextmanager
def _json_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise ZeropointError(f"--json {path} cannot be written: {e.strerror or e}") from e


def _check_file(path: Path) -> None:
    """Raises OSError when `_write` would."""
    if path.is_dir():
        raise OSError("it is a folder; name a file")
    if not path.parent.is_dir():
        raise OSError(f"the folder {path.parent} does not exist")
    if path.exists() and not path.is_file():
        return  # a device or pipe
    temporary = _temporary(path.resolve())
    try:
        temporary.touch()
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    """All or nothing: into a file beside it, then renamed. Devices and pipes are never replaced."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    target = path.resolve()  # a link keeps pointing to it
    temporary = _temporary(target)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")
