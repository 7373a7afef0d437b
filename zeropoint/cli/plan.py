"""`zeropoint plan`: what quantizing would give and take, before any weight is read."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from zeropoint.cli.options import (
    Algorithm,
    Debug,
    Effort,
    Exclude,
    GroupSize,
    Include,
    Json,
    Model,
    RecipeFile,
    SaveRecipe,
    Weights,
    check_recipe_file,
)
from zeropoint.cli.reports import show_report
from zeropoint.cli.screen import Screen, megabytes, silence_libraries


def plan(
    model: Model,
    weights: Weights = None,
    group_size: GroupSize = None,
    include: Include = None,
    exclude: Exclude = None,
    recipe: RecipeFile = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="8GB, 600MiB ...: plan the widest integer format that fits.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens whose keys and values have to fit the budget, too.",
            show_default="none",
        ),
    ] = None,
    algorithm: Algorithm = "rtn",
    effort: Effort = None,
    trial: Annotated[
        bool,
        typer.Option(
            "--trial",
            help="Quantize one block, in a temporary folder, and say how long all will take.",
        ),
    ] = False,
    save_recipe: SaveRecipe = None,
    json_to: Json = None,
    debug: Debug = False,
) -> None:
    """Say what quantizing a model would give and take. Reads its configuration and headers only,
    and with --trial one block.
    """
    start = time.perf_counter()
    screen = Screen(json_to)
    check_recipe_file(save_recipe)
    with screen.spinner("starting"):
        import zeropoint as zp
        from zeropoint.flows.plan import duration

        silence_libraries()
    with screen.spinner(f"{'trying' if trial else 'reading the headers of'} {model}"):
        found = zp.plan(
            model,
            weights,
            group_size=group_size,
            include=include or None,
            exclude=exclude or None,
            recipe=None if recipe is None else zp.Recipe.load(recipe),
            budget=budget,
            context=context,
            algorithm=algorithm,
            effort=effort,
            trial=trial,
        )
    if save_recipe is not None:
        found.report.recipe.save(save_recipe)
    screen.json({"model": model} | found.to_dict() | {"seconds": time.perf_counter() - start})
    for warning in found.warnings:
        screen.warn(warning)
    show_report(screen, found.report)
    screen.line()
    screen.line(
        (f"{megabytes(found.bytes_before)} -> {megabytes(found.bytes_after)}", "bold"),
        f", {found.bits_per_weight:.2f} bits per weight",
        f" by {found.weights}" if found.weights and budget else "",
    )
    screen.line(
        f"to quantize it: about {megabytes(found.peak_rss_bytes)} of memory, "
        f"{megabytes(found.disk_bytes)} of disk"
        + ("" if found.whole is None else "; it has to be loaded as a whole")
    )
    if found.quantize_seconds is not None:
        screen.line(f"{duration(found.quantize_seconds)}, from a trial on {found.tried[0]}")
    if found.kv_cache_bytes is not None:
        screen.line(f"keys and values of {context:,} tokens: {megabytes(found.kv_cache_bytes)}")
