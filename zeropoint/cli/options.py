"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer


def _remember_debug(context: typer.Context, value: bool) -> bool:
    if value:
        context.find_root().meta["debug"] = True
    return value


def wants_debug(context: typer.Context) -> bool:
    """Whether `--debug` was given, before the verb or after it."""
    return bool(context.find_root().meta.get("debug"))


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a hub id, a .gguf file, or package:NAME.",
        show_default=False,
    ),
]
Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Also write the result as JSON; - for stdout.",
        show_default=False,
    ),
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_remember_debug, help="Show the traceback of an error, and warnings."
    ),
]
"""Acted on by `cli.edge.Verb`; the verbs declare it and need not look at it."""
