"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zeropoint.errors import ZeropointError


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
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", help="The folder to write.", show_default=False),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the checkpoint that is in DIR.")
]
Weights = Annotated[
    str | None,
    typer.Option(metavar="FORMAT", help="int8, int4, nf4, bfloat16 ...", show_default="int8"),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Weights that share a scale; -1: one scale per output channel.",
        show_default="the format's own",
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT",
        help="int8, float8_e4m3fn ...: round the inputs of linear layers too, one scale per token.",
        show_default="float",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Only modules with such names, as '*.mlp.*'. Repeatable.",
        show_default="all",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN", help="Leave these modules alone. Repeatable.", show_default="none"
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A recipe (YAML or JSON) instead of weights, include and the like.",
        show_default=False,
    ),
]
SaveRecipe = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write the recipe (YAML), to be edited and given to quantize --recipe.",
        show_default=False,
    ),
]
Algorithm = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="How codes are chosen: rtn (fastest), mse, hqq; gptq, auto (calibrated).",
    ),
]
Effort = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How much work calibrating is: low, medium, or high, which also tunes scales.",
        show_default="medium",
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


def refuse_json_in(output: Path, json_to: str | None, option: str = "--json") -> None:
    """Raises ZeropointError for such a file inside the folder that will be a checkpoint."""
    if json_to is not None and output.resolve() in Path(json_to).resolve().parents:
        raise ZeropointError(
            f"{option} {json_to} lies in {output}, which will hold the checkpoint and nothing "
            "else; write it beside"
        )


def check_recipe_file(path: Path | None) -> None:
    """Raises ZeropointError for a `--save-recipe` in a folder that is not there."""
    if path is not None and not path.parent.is_dir():
        raise ZeropointError(
            f"--save-recipe {path} cannot be written: the folder {path.parent} does not exist"
        )
