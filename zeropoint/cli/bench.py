"""`zeropoint bench`: how fast a model runs here."""

from __future__ import annotations

from typing import Annotated

import typer

from zeropoint.cli.options import Debug, Json, Model
from zeropoint.cli.screen import Screen, silence_libraries, table


def bench(
    model: Model,
    prompt_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens read at once.")
    ] = 512,
    new_tokens: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens written one by one.")
    ] = 128,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Threads to compute with.", show_default="torch's choice"
        ),
    ] = None,
    json_to: Json = None,
    debug: Debug = False,
) -> None:
    """Time a language model: reading, writing, loading; and its memory."""
    screen = Screen(json_to)
    with screen.spinner("starting"):
        from zeropoint.evaluate.speed import bench

        silence_libraries()
    with screen.progress("timing") as on_step:
        speed = bench(
            model,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            threads=threads,
            on_step=on_step,
        )
    screen.json({"model": model} | speed.to_dict())
    result = table("", ">", "")
    result.show_header = False
    kernels = ", ".join(f"{name} ({count} modules)" for name, count in speed.kernels.items())
    rows = (
        (
            "prefill",
            f"{speed.prefill_tokens_per_second:,.1f}",
            f"tokens/s, {speed.prompt_tokens} at once",
        ),
        (
            "decode",
            f"{speed.decode_tokens_per_second:,.1f}",
            f"tokens/s, {speed.new_tokens} one by one",
        ),
        ("load", f"{speed.load_seconds:,.1f}", "s"),
        ("peak memory", f"{speed.peak_rss_bytes / 1e6:,.1f}", "MB, loading included"),
        ("threads", str(speed.threads), ""),
        ("kernels", "", kernels),
        *(("refused", "", reason) for reason in speed.refused),
    )
    for row in rows:
        result.add_row(*row)
    screen.line((model, "bold"))
    screen.results.print(result)
