"""Where errors end: what a verb raises becomes a message and an exit code.

0    done
1    the verb found problems; or a bug of ours, with its traceback
2    the user's mistake
130  Ctrl-C
"""

from __future__ import annotations

import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
        with _watching_for_ctrl_c() as pressed, warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")  # of the libraries; ours are in the results
            try:
                return super().invoke(ctx)
            except typer.Exit:
                raise
            except (Exception, KeyboardInterrupt) as e:
                if pressed or isinstance(e, KeyboardInterrupt):
                    code, message = INTERRUPTED, Text("interrupted; nothing was left half written")
                elif isinstance(e, ZeropointError):
                    code, message = USER_MISTAKE, Text.assemble(("error: ", "bold red"), str(e))
                else:
                    raise
                if debug:
                    traceback.print_exc()
                stderr_console().print(message, soft_wrap=True)
                sys.exit(code)


@contextmanager
def _watching_for_ctrl_c() -> Iterator[list[int]]:
    """Yields a list that is no longer empty once Ctrl-C was pressed.

    A KeyboardInterrupt in the middle of a library's import can come out as another error, or be
    swallowed and cause one later: numpy and torch import each other through C.
    """
    pressed: list[int] = []

    def handler(number: int, frame: Any) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed  # someone else's business, or ignored as in a background job
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
