"""`zeropoint quantize`: a model in, a smaller checkpoint out."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zeropoint.cli.events import Events
from zeropoint.cli.options import (
    Activations,
    Algorithm,
    Debug,
    Effort,
    Exclude,
    GroupSize,
    Include,
    Json,
    Model,
    Output,
    Overwrite,
    RecipeFile,
    SaveRecipe,
    Weights,
    check_recipe_file,
    refuse_json_in,
)
from zeropoint.cli.reports import show_report
from zeropoint.cli.screen import Screen, megabytes, silence_libraries, table
from zeropoint.errors import RecipeError
from zeropoint.progress import Unit

if TYPE_CHECKING:
    from torch import nn

    from zeropoint.flows.data import Calibration, Prepared
    from zeropoint.flows.report import FreezeReport, Report
    from zeropoint.scheme import Recipe, Scheme


def quantize(
    model: Model,
    output: Output,
    weights: Weights = None,
    group_size: GroupSize = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Zero point fixed at 0, or free.",
            show_default="the format's own",
        ),
    ] = None,
    float_zero_point: Annotated[
        bool | None,
        typer.Option("--float-zero-point", help="Zero points in float16.", show_default=False),
    ] = None,
    double_quant: Annotated[
        bool | None,
        typer.Option("--double-quant", help="Scales of groups in 8 bits.", show_default=False),
    ] = None,
    activations: Activations = None,
    outlier_threshold: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Input channels that reach X stay float (LLM.int8(): 6).",
            show_default="none",
        ),
    ] = None,
    compute_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="In which linear layers multiply: float32, bfloat16, float16.",
            show_default="that of their input",
        ),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    recipe: RecipeFile = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="75MB, 2GiB ...: for each layer the format with which the model, as large as "
            "that, loses least. Loads the whole model and runs it.",
            show_default=False,
        ),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="For --budget: formats to choose from, as int3,int4,int8.",
            show_default="integers of 2 to 8 bits",
        ),
    ] = None,
    save_recipe: SaveRecipe = None,
    algorithm: Algorithm = "rtn",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Text to calibrate by; self: what the model writes. For gptq, --observer and "
            "--budget.",
            show_default="self",
        ),
    ] = None,
    effort: Effort = None,
    observer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One range for each layer's inputs, found on the data: mse, minmax, percentile "
            "...; not a scale per token.",
            show_default="none",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="How much of it to use.",
            show_default="the effort's, 8192 to spend a budget",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Draws the text; same seed, same codes.", show_default="0"),
    ] = None,
    offload: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="For the hidden states of the calibration text, which are in memory otherwise.",
            show_default=False,
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="2GB ...: how much of them may be in memory.",
            show_default="all, with --offload none",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="Of what stays float, and of activations: float32, bfloat16 ... "
            "auto: the weights' own dtype; for --weights bfloat16 or float16, that.",
        ),
    ] = "auto",
    strict: Annotated[
        bool,
        typer.Option(
            "--strict/--no-strict",
            help="Refuse, or only warn, when rules or sizes do not fit the model.",
        ),
    ] = True,
    overwrite: Overwrite = False,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Start over, where an earlier run that was interrupted left its work."
        ),
    ] = False,
    delete_source: Annotated[
        bool,
        typer.Option(
            "--delete-source",
            help="Delete each of MODEL's files of weights as soon as all that is made of it is on "
            "the disk and was read back: for disks that cannot hold both.",
        ),
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Of a Ray cluster, whose nodes share the disks of MODEL and DIR; auto: the one "
            "this machine is in.",
            show_default=False,
        ),
    ] = None,
    json_to: Json = None,
    json_events: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write a line of JSON for everything that happens, as it does; - for stdout.",
            show_default=False,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Quantize a model's weights and write a checkpoint."""
    start = time.perf_counter()
    screen = Screen(json_to, json_events)
    refuse_json_in(output, json_to)
    check_recipe_file(save_recipe)
    refuse_json_in(output, json_events, "--json-events")
    with screen.spinner("starting"):
        from zeropoint.checkpoints import native
        from zeropoint.checkpoints.atomic import check_writable
        from zeropoint.evaluate.memory import peak_rss_bytes
        from zeropoint.model.load import float_dtype
        from zeropoint.scheme import Scheme

        silence_libraries()
    # What can be refused without the model is refused before the user has waited for it.
    check_writable(output, lambda folder: native.why_not_replace(folder, overwrite))
    texts, options = _calibration(
        algorithm, observer, data, effort, calibration_tokens, seed, spends=budget is not None
    )
    rest = float_dtype(dtype)
    rules = None
    given = {
        "--weights": weights,
        "--group-size": group_size,
        "--symmetric / --asymmetric": symmetric,
        "--float-zero-point": float_zero_point,
        "--double-quant": double_quant,
        "--activations": activations,
        "--outlier-threshold": outlier_threshold,
        "--compute-dtype": compute_dtype,
        "--include": include,
    }
    spending = {}
    if budget is not None:
        others = {"--recipe": recipe, "--observer": observer, "--dtype": rest}
        spending = _spending(budget, formats, given | others, texts, calibration_tokens, options)
    elif formats is not None:
        raise RecipeError("--formats is what --budget chooses from; add --budget, or use --weights")
    elif recipe is not None:
        given["--exclude"] = exclude
        rules = _read_recipe(recipe, [name for name, value in given.items() if value is not None])
    else:
        scheme = Scheme.of(
            weights or "int8",
            group_size=group_size,
            symmetric=symmetric,
            float_zero_point=float_zero_point or False,
            double_quant=double_quant,
            activations=activations,
            outlier_threshold=outlier_threshold,
            compute_dtype=compute_dtype,
        )
        _check_observer(observer, scheme)
        if scheme.fmt.kind == "downcast" and rest is None:
            rest = scheme.fmt.dtype  # a downcast model computes in its own dtype

    how = {
        "weights": weights or ("int8" if rules is None and budget is None else None),
        "group_size": group_size,
        "symmetric": symmetric,
        "float_zero_point": float_zero_point,
        "double_quant": double_quant,
        "activations": activations,
        "outlier_threshold": outlier_threshold,
        "compute_dtype": compute_dtype,
        "include": include or None,
        "exclude": exclude or None,
        "recipe": rules,
        "strict": strict,
    }
    streams = budget is None and observer is None and rest is None and not options.tune_steps
    shelf = {"offload": offload, "max_memory": max_memory}
    if (offload or max_memory) and (texts is None or not streams):
        raise RecipeError(
            "--offload and --max-memory are for the hidden states of a model that is calibrated "
            "block by block: --algorithm gptq or auto, without --budget, --observer, --effort high "
            "and another --dtype; leave them out"
        )
    if fresh and not streams:
        raise RecipeError(
            "--fresh starts over what an interrupted run left, and runs with a budget, --observer, "
            "--effort high or another --dtype leave nothing; leave it out"
        )
    if delete_source and (not streams or texts is not None):
        raise RecipeError(
            "--delete-source deletes files as they are quantized, and with calibration, a budget "
            "or another --dtype the model is loaded as a whole; leave it out"
        )
    if ray is not None and (not streams or delete_source):
        raise RecipeError(
            "--ray spreads weights over a cluster, and reads them again when a node is lost; with "
            "--observer, --effort high, a budget, another --dtype or --delete-source leave it out"
        )
    events = Events(json_events, screen)
    with events.running(model=model, output=str(output), algorithm=algorithm):
        if streams:
            done = _streamed(
                screen,
                events,
                model,
                output,
                how,
                algorithm,
                texts,
                options,
                shelf,
                overwrite=overwrite,
                fresh=fresh,
                delete_source=delete_source,
                ray=ray,
            )
        else:
            done = _in_memory(
                events,
                model,
                output,
                how,
                algorithm,
                rest,
                observer,
                texts,
                options,
                overwrite,
                spending,
            )
        seconds = time.perf_counter() - start
        peak = peak_rss_bytes()
        report = done.report
        events.event(
            "finished",
            bytes_before=report.bytes_before,
            bytes_after=done.total_bytes,
            bits_per_weight=done.bits_per_weight,
            peak_rss_bytes=peak,
        )
    if save_recipe is not None:
        report.recipe.save(save_recipe)
    screen.json(
        {"model": model, "output": str(output), "algorithm": algorithm}
        | {"source_deleted": delete_source}
        | report.to_dict()
        | {"calibration": done.frozen.to_dict(), "inputs": done.inputs}
        | {"bytes_after": done.total_bytes, "bits_per_weight": done.bits_per_weight}
        | {"seconds": seconds, "peak_rss_bytes": peak}
    )
    for warning in dict.fromkeys(
        (*report.warnings, *done.frozen.warnings, *done.inputs["warnings"])
    ):
        screen.warn(warning)
    show_report(screen, report)
    _show_layers(screen, done.frozen)
    screen.line()
    screen.line(
        (f"{megabytes(report.bytes_before)} -> {megabytes(done.total_bytes)}", "bold"),
        f", {done.bits_per_weight:.2f} bits per weight, ",
        f"{report.coverage:.1%} of weight matrices quantized",
    )
    if report.budget_line:
        screen.line(report.budget_line)
    screen.line(
        "wrote ", (str(output), "bold"), f" in {seconds:.1f} s, peak memory {megabytes(peak)}"
    )
    if delete_source:
        screen.line("deleted the weights of ", (model, "bold"))


@dataclass(frozen=True, kw_only=True)
class _Done:
    """What there is to tell. inputs: as JSON has it. The rest is of the result."""

    report: Report
    frozen: FreezeReport
    inputs: dict[str, Any]
    total_bytes: int
    bits_per_weight: float


NO_RANGES: dict[str, Any] = {
    "observer": None,
    "source": None,
    "tokens": 0,
    "warnings": [],
    "modules": [],
}


def _streamed(
    screen: Screen,
    events: Events,
    model: str,
    output: Path,
    how: dict[str, Any],
    algorithm: str,
    texts: str | list[str] | None,
    options: Calibration,
    shelf: dict[str, Any],
    *,
    overwrite: bool,
    fresh: bool,
    delete_source: bool,
    ray: str | None,
) -> _Done:
    """Weight by weight, or block by block: from files to files, or where that cannot be, by way of
    memory.
    """
    import zeropoint as zp
    from zeropoint.errors import StreamError
    from zeropoint.flows.report import data_free

    calibrated = texts is not None
    try:
        with events.progress("quantizing" if calibrated else "quantizing (MB)") as on_step:
            report = zp.compress(
                model,
                output,
                **how,
                algorithm=algorithm,
                data=texts,
                calibration=options if calibrated else None,
                **shelf,
                overwrite=overwrite,
                fresh=fresh,
                delete_source=delete_source,
                ray=ray,
                on_step=on_step,
                on_unit=events.unit,
            )
    except KeyboardInterrupt:
        screen.warn("what is done is kept; the same command goes on with it")
        raise
    except StreamError as e:
        if delete_source:
            raise StreamError(
                f"--delete-source deletes files as they are quantized, and this model has to be "
                f"loaded as a whole: {e}; leave it out"
            ) from e
        if ray is not None:
            raise StreamError(
                f"--ray spreads weights over a cluster, and this model has to be loaded as a "
                f"whole: {e}; leave it out"
            ) from e
        screen.warn(f"the whole model is held in memory: {e}")
        if calibrated:
            return _in_memory(
                events, model, output, how, algorithm, None, None, texts, options, overwrite, {}
            )
        report = _loaded_quantized(events, model, output, how, algorithm, overwrite)
    return _Done(
        report=report,
        frozen=report.calibration or data_free(report, algorithm),
        inputs=NO_RANGES,
        total_bytes=report.bytes_after,
        bits_per_weight=report.bits_per_weight,
    )


def _loaded_quantized(
    events: Events, model: str, output: Path, how: dict[str, Any], algorithm: str, overwrite: bool
) -> Report:
    """Quantized while it is loaded: only the quantized model is held in memory."""
    import zeropoint as zp
    from zeropoint.flows.log import logged

    with logged(Path(os.path.abspath(output)), f"{model} by {algorithm}"):
        with events.spinner(f"loading {model}"):
            report = zp.plan(model, **{k: v for k, v in how.items() if k != "strict"}).report
            loaded, tokenizer = zp.load(model, **how, algorithm=algorithm)
        with events.spinner(f"writing {output}"):
            zp.save(loaded, output, tokenizer=tokenizer, overwrite=overwrite)
    return report


def _in_memory(
    events: Events,
    model: str,
    output: Path,
    how: dict[str, Any],
    algorithm: str,
    rest: Any,
    observer: str | None,
    texts: str | list[str] | None,
    options: Calibration,
    overwrite: bool,
    spending: dict[str, Any],
) -> _Done:
    """The model as a whole: it has to run, or its other weights change their dtype."""
    import zeropoint as zp
    from zeropoint.algorithms import get_algorithm
    from zeropoint.flows.activations import calibrate_on
    from zeropoint.flows.log import logged

    with logged(Path(os.path.abspath(output)), f"{model} by {algorithm}") as log:
        with events.spinner(f"loading {model}"):
            loaded, tokenizer = zp.load(model)
        log.say("loaded")
        stage = "spending the budget" if spending else "checking the weights"
        with events.progress(stage) as on_step:
            told = spending and {"tokenizer": tokenizer, "on_step": log.steps(on_step)}
            report = zp.quantize(loaded, **how, **spending, **told)
        calibrated = get_algorithm(algorithm).needs != "nothing"
        with events.progress("quantizing") as on_step:
            frozen = zp.freeze(
                loaded,
                algorithm,
                data=texts if calibrated else None,
                tokenizer=tokenizer,
                calibration=options if calibrated else None,
                on_step=log.steps(on_step),
            )
        for layer in frozen.layers:
            unit = Unit(name=layer.name, output_error=layer.output_error)
            log.unit(unit)
            events.unit(unit)
        # After freezing: codes are chosen from the stored weights, not from rounded ones.
        loaded.to(rest)
        ranges = None
        if observer is not None:  # last: by the layers as they will be
            with events.progress("calibrating activations") as on_step:
                ranges = calibrate_on(
                    loaded, observer, texts, tokenizer, options, log.steps(on_step)
                )
        log.say("writing")
        with events.spinner(f"writing {output}"):
            zp.save(loaded, output, tokenizer=tokenizer, overwrite=overwrite)
    size = zp.footprint(loaded)
    return _Done(
        report=report,
        frozen=frozen,
        inputs=_inputs(loaded, observer, ranges),
        total_bytes=size.total_bytes,
        bits_per_weight=size.bits_per_weight,
    )


def _calibration(
    algorithm: str,
    observer: str | None,
    data: str | None,
    effort: str | None,
    tokens: int | None,
    seed: int | None,
    *,
    spends: bool,
) -> tuple[str | list[str] | None, Calibration]:
    """Data and how much of it; refused here where it can be, before the model is loaded."""
    from zeropoint.algorithms import get_algorithm
    from zeropoint.evaluate.text import read_text
    from zeropoint.flows.data import SELF, of_effort

    given = {"--data": data, "--effort": effort, "--calibration-tokens": tokens, "--seed": seed}
    named = [name for name, value in given.items() if value is not None]
    default = of_effort(effort or "medium")
    if get_algorithm(algorithm).needs == "nothing" and observer is None and not spends:
        if named:
            raise RecipeError(
                f"{', '.join(named)}: --algorithm {algorithm} uses no calibration data; leave it "
                "out, or use --algorithm gptq, --budget, or --activations with --observer"
            )
        return None, default
    options = replace(
        default,
        tokens=default.tokens if tokens is None else tokens,
        seed=default.seed if seed is None else seed,
    )
    return (SELF if data in (None, SELF) else [read_text(str(data))]), options


def _spending(
    budget: str,
    formats: str | None,
    given: dict[str, Any],
    texts: str | list[str] | None,
    tokens: int | None,
    options: Calibration,
) -> dict[str, Any]:
    """What `zp.quantize` is told of a budget; refused here where it can be."""
    from zeropoint.flows.budget import SCORE_TOKENS, parse_bytes, schemes_of

    named = [name for name, value in given.items() if value is not None]
    if named:
        raise RecipeError(
            f"--budget {budget} chooses the formats, and excludes {', '.join(named)}; name them in "
            "--formats"
        )
    parse_bytes(budget)
    names = None if formats is None else [n.strip() for n in formats.split(",") if n.strip()]
    return {
        "budget": budget,
        "formats": schemes_of(names),
        "data": texts,
        "calibration": options if tokens else replace(options, tokens=SCORE_TOKENS),
    }


def _check_observer(observer: str | None, scheme: Scheme) -> None:
    """Raises what `zp.calibrate` would, before the model is loaded."""
    from zeropoint.observers import make_observer

    if observer is None:
        return
    if scheme.activations is None:
        raise RecipeError(
            f"--observer {observer} finds ranges of rounded activations, and these stay float; "
            "add --activations int8, or leave it out"
        )
    if scheme.outlier_threshold is not None:
        raise RecipeError(
            f"--observer {observer} and --outlier-threshold exclude each other: which channels "
            "are outliers is decided anew for every input"
        )
    make_observer(observer, scheme.activations)


def _inputs(model: nn.Module, observer: str | None, ranges: Prepared | None) -> dict[str, Any]:
    """What is known of static ranges, for JSON."""
    from zeropoint.flows.activations import calibration_table

    if ranges is None:
        return NO_RANGES
    return {
        "observer": observer,
        "source": ranges.source,
        "tokens": ranges.tokens,
        "warnings": list(ranges.warnings),
        **calibration_table(model).to_dict(),
    }


def _read_recipe(path: Path, given: list[str]) -> Recipe:
    from zeropoint.scheme import Recipe

    if given:
        raise RecipeError(
            f"--recipe {path} and {', '.join(given)} exclude each other; write it in the recipe"
        )
    return Recipe.load(path)


WORST = 8  # layers shown; all of them are in the JSON


def _show_layers(screen: Screen, frozen: FreezeReport) -> None:
    """The layers whose output suffers most, and those not done by the algorithm asked for."""
    if not frozen.worst:
        return
    result = table(
        "worst layers", ">output lost", ">above the limit", ">feedback can win", "by", "note"
    )
    for layer in frozen.worst[:WORST]:
        assert layer.output_error is not None
        notes = [layer.reason] if layer.reason else []
        if layer.folded_into:
            notes.append(f"balanced with {layer.folded_into}")
        result.add_row(
            layer.name,
            f"{layer.output_error:.2%}",
            "" if layer.gap_db is None else f"{layer.gap_db:.1f} dB",
            "" if layer.hessian_gain is None else f"{layer.hessian_gain:.1f}x",
            layer.algorithm,
            "; ".join(notes),
        )
    screen.line()
    screen.results.print(result)
    for layer in frozen.layers:
        if layer.reason is not None and layer.algorithm != frozen.algorithm:
            screen.line(f"{layer.name}: {layer.algorithm}, because {layer.reason}")
    if frozen.tuning is not None:
        screen.line(f"scales tuned: {frozen.tuning}")
