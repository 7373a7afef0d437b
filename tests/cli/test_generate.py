"""zeropoint generate, and the flow behind it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.conftest import Cli
from tests.models import build, tokenizer
from zeropoint.errors import SourceError, TextError
from zeropoint.flows.generate import Generation, context_length, generate

PROMPT = "w5 w17 w33"


def test_prompt_and_continuation_are_printed(cli: Cli, checkpoint: Path) -> None:
    ran = cli("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 4)
    assert ran.code == 0
    assert ran.out.startswith(f"{PROMPT} ")
    assert len(ran.out.split()) == 3 + 4
    assert ran.err.startswith("\n4 tokens in ")
    data = cli(
        "generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 4, "--json", "-"
    ).json
    assert data["text"] == ran.out.removesuffix("\n") == PROMPT + data["continuation"]
    assert (data["prompt_tokens"], data["new_tokens"]) == (3, 4)


def test_the_models_context(cli: Cli, llama: Path) -> None:
    ran = cli("generate", llama, "--prompt", "w2 " * 70)
    assert ran.code == 2
    assert "the prompt has 70 tokens, but the model's context is 64; shorten" in ran.err
    ran = cli("generate", llama, "--prompt", "w2 " * 60, "--max-new-tokens", 5)
    assert ran.code == 2
    assert "60 tokens leave no room for 5 new ones: the model's context is 64; " in ran.err
    assert "ask for at most 4" in ran.err


def test_models_that_do_not_write(cli: Cli, bert: Path) -> None:
    ran = cli("generate", bert, "--prompt", PROMPT)
    assert (ran.code, ran.out) == (2, "")
    assert "a BertModel does not write text" in ran.err


# --- the flow ------------------------------------------------------------------------------------


def test_it_is_greedy_and_reports_progress() -> None:
    model, steps = build("llama"), []
    result = generate(
        model, tokenizer(), PROMPT, max_new_tokens=3, on_step=lambda *step: steps.append(step)
    )
    ids = torch.tensor([[5, 17, 33]])
    with torch.no_grad():
        for _ in range(3):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert result.text == tokenizer().decode(ids[0], skip_special_tokens=True)
    assert [done for _, done, _ in steps] == [0, 1, 2, 3, 3]
    assert all(total == 3 for _, _, total in steps)
    assert result.to_dict() == dataclasses.asdict(result)


def test_sampling_settings_of_the_model_are_not_followed() -> None:
    model = build("llama")
    greedy = generate(model, tokenizer(), PROMPT, max_new_tokens=8).text
    model.generation_config.update(do_sample=True, temperature=50.0, top_k=50, top_p=0.9)
    assert generate(model, tokenizer(), PROMPT, max_new_tokens=8).text == greedy


def test_an_encoder_decoder_answers() -> None:
    result = generate(build("t5"), tokenizer(), PROMPT, max_new_tokens=4)
    assert isinstance(result, Generation)
    assert result.text == result.continuation
    assert (result.prompt_tokens, result.new_tokens) == (3, 4)


@pytest.mark.parametrize(
    ("name", "limit"), [("llama", 64), ("gpt2", 64), ("opt", 64), ("bert", 64)]
)
def test_context_length(name: str, limit: int) -> None:
    assert context_length(build(name)) == limit


def test_a_model_without_a_limit() -> None:
    model = torch.nn.Linear(2, 2)
    assert context_length(model) is None


class _Stripping:
    """A tokenizer that, like SentencePiece, drops the space before the first word it decodes."""

    def __init__(self) -> None:
        self.plain = tokenizer()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain(*args, **kwargs)

    def decode(self, tokens: Any, **kwargs: Any) -> str:
        return str(self.plain.decode(tokens, **kwargs)).lstrip()


def test_the_space_between_prompt_and_continuation_is_kept() -> None:
    result = generate(build("llama"), _Stripping(), PROMPT, max_new_tokens=2)
    assert result.continuation.startswith(" ")
    assert result.text == PROMPT + result.continuation


def test_refusals() -> None:
    model, words = build("llama"), tokenizer()
    with pytest.raises(TextError, match="the prompt is empty"):
        generate(model, words, "")
    with pytest.raises(TextError, match="max_new_tokens=0: ask for at least 1"):
        generate(model, words, PROMPT, max_new_tokens=0)
    with pytest.raises(SourceError, match="comes without a tokenizer"):
        generate(model, None, PROMPT)
    with pytest.raises(SourceError, match="a Linear does not write text"):
        generate(torch.nn.Linear(2, 2), words, PROMPT)
