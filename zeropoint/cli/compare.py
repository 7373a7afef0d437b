"""`zeropoint compare`: what separates a model from its original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from zeropoint.cli.options import Debug, Json
from zeropoint.cli.screen import Screen, megabytes, silence_libraries, table

WINDOW = 512  # tokens that both models see at once
LABELS = {
    "delta_nll": "delta NLL (nats per token)",
    "kl": "KL divergence (nats)",
    "top1_agreement": "top-1 agreement",
    "cosine": "cosine of embeddings",
    "rank_agreement": "rank agreement",
}
"""What is shown below the sizes, for whatever kind of model has it."""


def compare(
    reference: Annotated[
        str,
        typer.Argument(metavar="REFERENCE", help="The original, as any MODEL.", show_default=False),
    ],
    candidate: Annotated[
        str, typer.Argument(metavar="CANDIDATE", help="What was made of it.", show_default=False)
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text to compare on.",
            show_default="Python's own documentation",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(metavar="N", min=4, help="Read at most so many tokens of it.")
    ] = 12288,
    json_to: Json = None,
    debug: Debug = False,
) -> None:
    """Measure how far a model's answers are from the original's."""
    screen = Screen(json_to)
    with screen.spinner("starting"):
        from zeropoint.evaluate.compare import compare
        from zeropoint.evaluate.text import read_text

        silence_libraries()
    words = None if text is None else read_text(text)
    with screen.progress("comparing") as on_step:
        comparison = compare(reference, candidate, words, tokens=tokens, on_step=on_step)
    result = comparison.to_dict()
    for role, model in (("reference", reference), ("candidate", candidate)):
        result[role] = {"model": model, **result[role]}
    screen.json(result)
    _show(screen, result)


def _show(screen: Screen, result: dict[str, Any]) -> None:
    language = "perplexity" in result["reference"]
    models = table("", "model", ">size", ">bits per weight", *([">perplexity"] if language else []))
    for role in ("reference", "candidate"):
        row = result[role]
        bits = f"{row['bits_per_weight']:.2f}" if "bits_per_weight" in row else ""
        perplexity = [f"{row['perplexity']:.3f}"] if language else []
        models.add_row(role, row["model"], megabytes(row["bytes"]), bits, *perplexity)
    screen.results.print(models)
    screen.line()
    measures = table("", ">", "")
    measures.show_header = False
    for key, label in LABELS.items():
        if key in result:
            measures.add_row(label, *_measure(key, result[key]))
    screen.results.print(measures)
    sample = f"{result['tokens']:,} tokens" if language else f"{result['sentences']:,} sentences"
    screen.line((f"\non {sample}", "dim"))


def _measure(key: str, value: Any) -> tuple[str, str]:
    """The number to look at first, and the others."""
    if key == "delta_nll":
        known = value["low"] is not None and value["high"] is not None
        interval = f"95 % interval {value['low']:+.4f} to {value['high']:+.4f}" if known else ""
        return f"{value['mean']:+.4f}", interval
    if key == "kl":
        rest = ", ".join(f"{name} {value[name]:.4f}" for name in ("median", "p99", "max"))
        return f"{value['mean']:.4f}", f"mean; {rest}"
    if key == "cosine":
        return f"{value['mean']:.4f}", f"mean; 1st percentile {value['p01']:.4f}"
    return f"{value:.1%}" if key == "top1_agreement" else f"{value:.4f}", ""
