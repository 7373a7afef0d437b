"""`zeropoint inspect`: what a model holds, as a tree, or one of its tensors in detail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from zeropoint.cli.drawing import bars
from zeropoint.cli.options import Debug, Json, Model
from zeropoint.cli.screen import Screen, megabytes, silence_libraries, table
from zeropoint.errors import UnknownNameError, nearest

if TYPE_CHECKING:
    from zeropoint.evaluate.histogram import Histogram, TensorSummary


def inspect(
    model: Model,
    tensor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Show one tensor: range, moments, histograms of its values and codes.",
            show_default=False,
        ),
    ] = None,
    json_to: Json = None,
    debug: Debug = False,
) -> None:
    """Show a model's bytes module by module, or what is in one tensor."""
    screen = Screen(json_to)
    with screen.spinner(f"loading {model}"):
        import zeropoint as zp
        from zeropoint.evaluate.histogram import named_tensors, summarize

        silence_libraries()
        loaded, _ = zp.load(model)
    if tensor is None:
        _show_model(screen, model, loaded)
        return
    tensors = named_tensors(loaded)
    if tensor not in tensors:
        raise UnknownNameError(
            f"{tensor!r} is not a tensor of {model}; {_close(tensor, list(tensors))}"
        )
    with screen.spinner(f"counting {tensor}"):
        summary = summarize(tensors[tensor])
    screen.json({"model": model, "tensor": tensor} | summary.to_dict())
    _show_tensor(screen, tensor, summary)


def _close(name: str, known: list[str]) -> str:
    """Tensors of the module of that name, or the nearest names, or where to look them up."""
    inside = [k for k in known if k.startswith(f"{name}.")][:3]
    if inside:
        return "it is a module that holds " + ", ".join(repr(k) for k in inside)
    hint = nearest(name, known)
    return (
        hint
        if hint.startswith("close")
        else "as `zeropoint inspect MODEL` lists them, for example " + repr(known[0])
    )


# --- the whole model ---


def _show_model(screen: Screen, source: str, model: Any) -> None:
    import zeropoint as zp
    from zeropoint.model.walk import quantized_modules

    footprint = zp.footprint(model)
    schemes: dict[tuple[str, str], dict[str, Any]] = {}
    for module in quantized_modules(model).values():
        scheme, kernel = str(module.scheme), module.kernel or "live"
        row = schemes.setdefault(
            (scheme, kernel),
            {"scheme": scheme, "kernel": kernel, "modules": 0, "weights": 0, "bytes": 0},
        )
        row["modules"] += 1
        if module.tied_to is None:
            row["weights"] += module.shape[0] * module.shape[1]
            row["bytes"] += module.qweight.nbytes
    screen.json(
        {"model": source, "footprint": footprint.to_dict(), "schemes": list(schemes.values())}
    )
    screen.line(str(footprint))
    screen.line()
    if not schemes:
        screen.line("nothing in it is quantized")
        return
    result = table("scheme", "kernel", ">modules", ">weights", ">size", ">bits per weight")
    for row in schemes.values():
        result.add_row(
            row["scheme"],
            row["kernel"],
            f"{row['modules']:,}",
            f"{row['weights'] / 1e6:,.1f} M",
            megabytes(row["bytes"]),
            f"{8 * row['bytes'] / max(1, row['weights']):.2f}",
        )
    screen.results.print(result)


# --- one tensor ---


def _show_tensor(screen: Screen, name: str, summary: TensorSummary) -> None:
    shape = " x ".join(f"{n:,}" for n in summary.shape) or "scalar"
    stored = f", stored as {summary.scheme}" if summary.scheme else ""
    screen.line((name, "bold"), f"  {shape} {summary.dtype}{stored}")
    bits = 8 * summary.bytes / max(1, summary.elements)
    screen.line(f"{summary.elements:,} values in {summary.bytes:,} bytes, {bits:.2f} bits each")
    if summary.nonfinite:
        screen.line((f"{summary.nonfinite:,} of them are NaN or Inf, and left out below", "red"))
    if summary.min is None or summary.max is None:
        return
    screen.line(
        f"min {summary.min:.6g}   max {summary.max:.6g}   "
        f"mean {summary.mean:.6g}   std {summary.std:.6g}"
    )
    _show_histogram(screen, "values", summary.values, f"{summary.min:.4g}", f"{summary.max:.4g}")
    if summary.codes is not None:
        edges = summary.codes.edges
        _show_histogram(
            screen, "codes", summary.codes, f"{edges[0] + 0.5:.0f}", f"{edges[-1] - 0.5:.0f}"
        )
        unused = summary.codes.counts.count(0)
        screen.line(
            (
                f"{len(summary.codes.counts) - unused} of {len(summary.codes.counts)} codes in use",
                "dim",
            )
        )


def _show_histogram(screen: Screen, title: str, histogram: Histogram, low: str, high: str) -> None:
    lines = bars(histogram.counts)
    if not lines:
        return
    width = max(len(line) for line in lines)
    screen.line()
    screen.line((title, "bold"))
    for line in lines:
        screen.line((line, "cyan"))
    screen.line(("▔" * width, "dim"))
    screen.line((low + high.rjust(width - len(low)), "dim"))
