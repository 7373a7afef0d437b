"""The command line: one file per verb, which names the arguments and renders the result.

Nothing here imports torch before a verb runs, so that `zeropoint --help` answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn

import typer

import zeropoint
from zeropoint.cli import (
    bench,
    compare,
    doctor,
    finetune,
    generate,
    inspect,
    plan,
    quantize,
    verify,
)
from zeropoint.cli.edge import Verb
from zeropoint.cli.options import Debug

# To add a verb: one file in this folder, one line here. Its docstring is its help.
VERBS: dict[str, Callable[..., None]] = {
    "plan": plan.plan,
    "quantize": quantize.quantize,
    "finetune": finetune.finetune,
    "inspect": inspect.inspect,
    "compare": compare.compare,
    "generate": generate.generate,
    "bench": bench.bench,
    "verify": verify.verify,
    "doctor": doctor.doctor,
}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"zeropoint {zeropoint.__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Make a pretrained model smaller and faster by quantization, and prove what it cost.

    MODEL is a folder, a hub id (owner/name), a .gguf file, or package:NAME, an installed Python
    package that ships model files.
    """


def app() -> typer.Typer:
    """The command line as a typer application."""
    result = typer.Typer(
        name="zeropoint",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    result.callback()(_options)
    for name, verb in VERBS.items():
        result.command(name, cls=Verb)(verb)
    return result


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (`sys.argv` by default) and exit; `cli.edge` lists the exit codes."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars that libraries draw would cross ours
    typer.main.get_command(app())(args=arguments, prog_name="zeropoint")
    raise SystemExit(0)
