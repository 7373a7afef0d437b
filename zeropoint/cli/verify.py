"""`zeropoint verify`: is a checkpoint what was written?"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from zeropoint.cli.options import Debug, Json
from zeropoint.cli.screen import Screen

UNSOUND = 1


def verify(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A zeropoint checkpoint.", show_default=False)
    ],
    json_to: Json = None,
    debug: Debug = False,
) -> None:
    """Check a checkpoint: hashes, tensors, shapes, finiteness.

    The exit code is 1 when something is wrong.
    """
    start = time.perf_counter()
    screen = Screen(json_to)
    with screen.spinner("starting"):
        from zeropoint.checkpoints import native
    with screen.progress("verifying") as on_step:
        problems = native.verify(directory, on_step=on_step)
    files, tensors = _sizes(directory / native.MANIFEST)
    screen.json(
        {
            "directory": str(directory),
            "sound": not problems,
            "files": files,
            "tensors": tensors,
            "problems": problems,
            "seconds": time.perf_counter() - start,
        }
    )
    if not problems:
        screen.line(
            (str(directory), "bold"),
            " is ",
            ("sound", "bold green"),
            f": {files} files, {tensors} tensors",
        )
        return
    count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
    screen.line((str(directory), "bold"), " is ", ("not sound", "bold red"), f": {count}")
    for problem in problems:
        screen.line("  ", problem)
    raise typer.Exit(UNSOUND)


def _sizes(manifest: Path) -> tuple[int | None, int | None]:
    """Numbers of files and tensors that the manifest lists; None where it is too damaged."""
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))
        return len(listed["files"]), len(listed["weights"]) + len(listed["tensors"])
    except (ValueError, KeyError, TypeError):
        return None, None
