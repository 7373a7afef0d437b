"""`zeropoint finetune`: a model in, a checkpoint out that was trained with its quantization."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zeropoint.cli.options import (
    Activations,
    Debug,
    Exclude,
    GroupSize,
    Include,
    Json,
    Model,
    Output,
    Overwrite,
    RecipeFile,
    Weights,
    refuse_json_in,
)
from zeropoint.cli.reports import show_report
from zeropoint.cli.screen import Screen, megabytes, silence_libraries
from zeropoint.errors import PlotError

if TYPE_CHECKING:
    from zeropoint.flows.report import TrainingReport


def finetune(
    model: Model,
    output: Output,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Text to train on; self: what the model writes.",
            show_default=False,
        ),
    ],
    weights: Weights = None,
    group_size: GroupSize = None,
    activations: Activations = None,
    include: Include = None,
    exclude: Exclude = None,
    recipe: RecipeFile = None,
    learned_scale: Annotated[
        bool,
        typer.Option(
            "--learned-scale/--no-learned-scale",
            help="Train scales and zero points too, or span the range of the weights.",
        ),
    ] = True,
    scales_only: Annotated[
        bool, typer.Option("--scales-only", help="Leave the weights as they are.")
    ] = False,
    steps: Annotated[int, typer.Option(metavar="N", help="Optimizer steps.")] = 200,
    learning_rate: Annotated[float, typer.Option(metavar="X", help="Of the weights.")] = 5e-5,
    window: Annotated[int, typer.Option(metavar="N", help="Tokens of a sequence.")] = 512,
    batch_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of a step.")] = 2048,
    observer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One range for each layer's inputs, seen in the first steps: mse, minmax ...",
            show_default="none",
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Stop after N looks at held-out text without a better one.",
            show_default="never",
        ),
    ] = None,
    save_every: Annotated[
        int, typer.Option(metavar="N", help="Steps between two saved states.")
    ] = 20,
    seed: Annotated[int, typer.Option(metavar="N", help="Draws and orders the text.")] = 0,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The curve of the losses.", show_default="DIR.losses.png"
        ),
    ] = None,
    overwrite: Overwrite = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Start over, where an interrupted run left DIR.training."),
    ] = False,
    json_to: Json = None,
    debug: Debug = False,
) -> None:
    """Train a model with its quantization in the loop, to answer as it did before."""
    start = time.perf_counter()
    screen = Screen(json_to)
    refuse_json_in(output, json_to)
    with screen.spinner("starting"):
        import zeropoint as zp
        from zeropoint.checkpoints import native
        from zeropoint.checkpoints.atomic import check_writable
        from zeropoint.evaluate.memory import peak_rss_bytes
        from zeropoint.evaluate.text import read_text
        from zeropoint.flows.data import SELF

        silence_libraries()
    check_writable(output, lambda folder: native.why_not_replace(folder, overwrite))
    texts = data if data == SELF else [read_text(data)]
    training = zp.Training(
        steps=steps,
        learning_rate=learning_rate,
        parameters="scales" if scales_only else "all",
        window=window,
        batch_tokens=batch_tokens,
        observer=observer,
        patience=patience,
        save_every=save_every,
        seed=seed,
    )
    rules = None if recipe is None else zp.Recipe.load(recipe)
    with screen.spinner(f"loading {model}"):
        loaded, tokenizer = zp.load(model)
        dtype = loaded.dtype
        loaded.float()  # steps of a training are smaller than what 16 bits tell apart
    report = zp.quantize(
        loaded,
        weights,
        group_size=group_size,
        activations=activations,
        learned_scale=learned_scale if rules is None else None,
        include=include or None,
        exclude=exclude or None,
        recipe=rules,
    )
    folder = output.with_name(f"{output.name}.training")
    try:
        with screen.progress("training") as on_step:
            trained = zp.finetune(
                loaded,
                texts,
                tokenizer=tokenizer,
                training=training,
                folder=folder,
                fresh=fresh,
                on_step=on_step,
            )
    except KeyboardInterrupt:
        screen.warn(f"what was saved is kept in {folder}; the same command goes on from there")
        raise
    zp.freeze(loaded)
    loaded.to(dtype)
    with screen.spinner(f"writing {output}"):
        zp.save(loaded, output, tokenizer=tokenizer, overwrite=overwrite)
    shutil.rmtree(folder)
    drawn = _draw(screen, trained, picture or output.with_name(f"{output.name}.losses.png"))
    size = zp.footprint(loaded)
    seconds, peak = time.perf_counter() - start, peak_rss_bytes()
    screen.json(
        {"model": model, "output": str(output), "picture": drawn and str(drawn)}
        | report.to_dict()
        | {"training": trained.to_dict()}
        | {"bytes_after": size.total_bytes, "bits_per_weight": size.bits_per_weight}
        | {"seconds": seconds, "peak_rss_bytes": peak}
    )
    for warning in (*report.warnings, *trained.warnings):
        screen.warn(warning)
    show_report(screen, report)
    screen.line()
    screen.line((f"{megabytes(report.bytes_before)} -> {megabytes(size.total_bytes)}", "bold"))
    screen.line(str(trained))
    screen.line(
        "wrote ", (str(output), "bold"), f" in {seconds:.1f} s, peak memory {megabytes(peak)}"
    )
    if drawn is not None:
        screen.line("losses in ", (str(drawn), "bold"))


def _draw(screen: Screen, trained: TrainingReport, path: Path) -> Path | None:
    """The picture's path; None, after a warning, where there is no matplotlib to draw it with."""
    import zeropoint as zp

    try:
        zp.plot.losses(trained.losses, trained.held_out).savefig(path)
    except PlotError as e:
        screen.warn(f"no curve of the losses: {e}")
        return None
    return path
