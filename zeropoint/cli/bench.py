"""`zeropoint bench`: how fast a model runs here, or what it takes to load it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from zeropoint.cli.options import Debug, Json, Model
from zeropoint.cli.screen import Screen, megabytes, silence_libraries, table
from zeropoint.errors import RecipeError

if TYPE_CHECKING:
    from zeropoint.evaluate.loading import Loadings
    from zeropoint.evaluate.speed import Speed


def bench(
    context: typer.Context,
    model: Model,
    load: Annotated[
        bool,
        typer.Option(
            "--load", help="Instead, load it as float and quantized: memory, peak and time of each."
        ),
    ] = False,
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
    fuse: Annotated[
        bool,
        typer.Option(
            "--fuse", help="Norms, gates and attentions in one pass each, as zp.fuse makes them."
        ),
    ] = False,
    json_to: Json = None,
    debug: Debug = False,
) -> None:
    """Time a language model: reading, writing, loading; and its memory."""
    screen = Screen(json_to)
    if load:
        _refuse_unused(context, "prompt_tokens", "new_tokens", "fuse")
        _bench_loading(screen, model, threads)
        return
    with screen.spinner("starting"):
        from zeropoint.evaluate.speed import bench

        silence_libraries()
    with screen.progress("timing") as on_step:
        speed = bench(
            model,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            threads=threads,
            fused=fuse,
            on_step=on_step,
        )
    screen.json({"model": model} | speed.to_dict())
    _show_speed(screen, model, speed)


def _show_speed(screen: Screen, model: str, speed: Speed) -> None:
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
        *([("fused", str(speed.fused), "norms, gates and attentions")] if speed.fused else []),
    )
    for row in rows:
        result.add_row(*row)
    screen.line((model, "bold"))
    screen.results.print(result)


def _refuse_unused(context: typer.Context, *names: str) -> None:
    """Options that are given and would be ignored."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise RecipeError(
                f"--{name.replace('_', '-')} is for timing; with --load nothing is run, leave it "
                "out"
            )


def _bench_loading(screen: Screen, model: str, threads: int | None) -> None:
    with screen.spinner("starting"):
        from zeropoint.evaluate.loading import bench_loading
    with screen.progress("loading") as on_step:
        loadings = bench_loading(model, threads=threads, on_step=on_step)
    screen.json({"model": model} | loadings.to_dict())
    _show_loadings(screen, model, loadings)


def _show_loadings(screen: Screen, model: str, loadings: Loadings) -> None:
    result = table("loaded as", ">memory", ">peak", ">tensors", ">seconds", "")
    for row in loadings.rows:
        sizes = (row.resident_bytes, row.peak_bytes, row.tensor_bytes)
        result.add_row(
            row.loaded_as,
            *("" if size is None else megabytes(size) for size in sizes),
            "" if row.seconds is None else f"{row.seconds:,.1f}",
            row.refused or "",
        )
    screen.line((model, "bold"))
    screen.results.print(result)
    idle = megabytes(loadings.idle_bytes)
    screen.line(
        (f"\nmemory and peak: above the {idle} of a process that has loaded nothing", "dim")
    )
