"""`zeropoint generate`: let a model continue a text."""

from __future__ import annotations

from typing import Annotated

import typer

from zeropoint.cli.options import Debug, Json, Model
from zeropoint.cli.screen import Screen, silence_libraries


def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What the model is to continue.", show_default=False)
    ],
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Write at most so many tokens.")
    ] = 50,
    json_to: Json = None,
    debug: Debug = False,
) -> None:
    """Continue a text, always by the likeliest token."""
    screen = Screen(json_to)
    with screen.spinner(f"loading {model}"):
        import zeropoint as zp
        from zeropoint.flows.generate import generate

        silence_libraries()
        loaded, tokenizer = zp.load(model)
    with screen.progress("writing") as on_step:
        result = generate(loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, on_step=on_step)
    screen.json({"model": model, "prompt": prompt} | result.to_dict())
    before = result.text.removesuffix(result.continuation)
    screen.line((before, "dim"), result.continuation)
    rate = result.new_tokens / result.seconds
    screen.notes.print(
        f"\n{result.new_tokens} tokens in {result.seconds:.1f} s ({rate:.1f} tokens/s)", style="dim"
    )
