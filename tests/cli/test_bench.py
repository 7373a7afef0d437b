"""zeropoint bench: arguments and rendering."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cli.conftest import Cli

ARGUMENTS = ("--prompt-tokens", 8, "--new-tokens", 3)


@pytest.mark.usefixtures("torch_kernel")
def test_it_shows_speeds_and_kernels(cli: Cli, checkpoint: Path) -> None:
    ran = cli("bench", checkpoint, *ARGUMENTS)
    assert (ran.code, ran.err) == (0, "")
    assert "prefill" in ran.out
    assert "torch (16 modules)" in ran.out


def test_threads(cli: Cli, checkpoint: Path) -> None:
    before = torch.get_num_threads()
    data = cli("bench", checkpoint, *ARGUMENTS, "--threads", 1, "--json", "-").json
    assert data["threads"] == 1
    assert (data["prompt_tokens"], data["new_tokens"]) == (8, 3)
    assert torch.get_num_threads() == before


def test_more_tokens_than_the_context(cli: Cli, llama: Path) -> None:
    ran = cli("bench", llama, "--prompt-tokens", 60, "--new-tokens", 10)
    assert ran.code == 2
    assert "64" in ran.err
