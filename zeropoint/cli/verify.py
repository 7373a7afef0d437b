"""`zeropoint verify`: is a checkpoint what was written?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from zeropoint.cli.options import Debug, Json
from zeropoint.cli.screen import Screen, silence_libraries

UNSOUND = 1


def verify(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="A zeropoint checkpoint, or a quantized one of another library.",
            show_default=False,
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The float model it was made of: compare every tensor with it, too.",
            show_default=False,
        ),
    ] = None,
    json_to: Json = None,
    debug: Debug = False,
) -> None:
    """Check a checkpoint: hashes, tensors, shapes, finiteness.

    The exit code is 1 when something is wrong, and for another library's method that is not known.
    """
    start = time.perf_counter()
    screen = Screen(json_to)
    with screen.spinner("starting"):
        from zeropoint.flows.verify import examine

        silence_libraries()
    with screen.progress("verifying") as on_step:
        found = examine(directory, against=against, on_step=on_step)
    alike = found.likeness
    screen.json(
        {
            "directory": str(directory),
            "method": found.method,
            "sound": found.sound,
            "files": found.files,
            "tensors": found.tensors,
            "problems": found.problems,
            "checked": found.checked,
            "unchecked": found.unchecked,
            "against": against,
            "compared": None if alike is None else alike.compared,
            "largest_error": None if alike is None else alike.largest_error,
            "largest_error_of": None if alike is None else alike.largest_error_of,
            "balanced": [] if alike is None else alike.balanced,
            "seconds": time.perf_counter() - start,
        }
    )
    for line in found.not_checked:
        screen.warn(line)
    if found.sound is None:
        screen.line(
            (str(directory), "bold"), ": nothing wrong was found, and little is known of it"
        )
        raise typer.Exit(UNSOUND)
    if found.sound:
        screen.line(
            (str(directory), "bold"),
            " is ",
            ("sound", "bold green"),
            f": {found.files} files, {found.tensors} tensors",
        )
        if alike is not None:
            most = f"{alike.largest_error:.2%} of {alike.largest_error_of}"
            screen.line(f"{alike.compared} tensors are those of {against}; most is lost: {most}")
        return
    count = f"{len(found.problems)} problem" + ("s" if len(found.problems) > 1 else "")
    screen.line((str(directory), "bold"), " is ", ("not sound", "bold red"), f": {count}")
    for problem in found.problems:
        screen.line("  ", problem)
    raise typer.Exit(UNSOUND)
