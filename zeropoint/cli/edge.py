"""Where errors end: what a verb raises becomes a message and an exit code.

0    done
1    the verb found problems; or a bug of ours, with its traceback
2    the user's mistake
130  Ctrl-C
"""

from __future__ import annotations

import sys
import traceback
import warnings
from typing import Any

import typer
from rich.text import Text
from typer.core import TyperCommand

from zeropoint.cli.options import wants_debug
from zeropoint.cli.screen import stderr_console
from zeropoint.errors import ZeropointError

USER_MISTAKE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Verb(TyperCommand):
    """A typer command that ends in one of the exit codes above."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        debug = wants_debug(ctx)
        try:
            with warnings.catch_warnings():
                if not debug:
                    warnings.simplefilter("ignore")  # of the libraries; ours are in the results
                return super().invoke(ctx)
        except ZeropointError as e:
            if debug:
                traceback.print_exc()
            message = Text.assemble(("error: ", "bold red"), str(e))
            stderr_console().print(message, soft_wrap=True)
            sys.exit(USER_MISTAKE)
        except KeyboardInterrupt:
            if debug:
                traceback.print_exc()
            stderr_console().print("interrupted; nothing was left half written", soft_wrap=True)
            sys.exit(INTERRUPTED)
