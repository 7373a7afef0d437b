"""zeropoint bench: arguments and rendering."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cli.conftest import Cli
from zeropoint import native
from zeropoint.evaluate import loading
from zeropoint.evaluate.loading import Loading, Loadings

needs_library = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
ARGUMENTS = ("--prompt-tokens", 8, "--new-tokens", 3)


@pytest.mark.usefixtures("torch_kernel")
def test_it_shows_speeds_and_kernels(cli: Cli, checkpoint: Path) -> None:
    ran = cli("bench", checkpoint, *ARGUMENTS)
    assert (ran.code, ran.err) == (0, "")
    assert "prefill" in ran.out
    assert "torch (16 modules)" in ran.out


@needs_library
def test_what_lies_between_is_fused_when_asked(cli: Cli, checkpoint: Path) -> None:
    data = cli("bench", checkpoint, *ARGUMENTS, "--json", "-").json
    assert data["fused"] == 0
    ran = cli("bench", checkpoint, *ARGUMENTS, "--fuse")
    assert ran.code == 0
    assert ["fused", "9", "norms,", "gates", "and", "attentions"] in [
        line.split() for line in ran.out.splitlines()
    ]


def test_without_a_library_there_is_nothing_to_fuse_with(
    cli: Cli, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "why_not", lambda: "no C++ compiler at install")
    ran = cli("bench", checkpoint, *ARGUMENTS, "--fuse")
    assert ran.code == 2
    assert "nothing is fused: no C++ compiler at install" in " ".join(ran.err.split())


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


def test_loading(cli: Cli, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        Loading(
            loaded_as="float32",
            resident_bytes=2_500_000,
            peak_bytes=3_500_000,
            tensor_bytes=2_000_000,
            seconds=1.25,
        ),
        Loading(loaded_as="int4", refused="lm_head: K=20 is not a multiple of group_size=32"),
    )
    seen: dict[str, object] = {}

    def bench_loading(source: str, **options: object) -> Loadings:
        seen.update(options, source=source)
        return Loadings(rows=rows, idle_bytes=300_000_000)

    monkeypatch.setattr(loading, "bench_loading", bench_loading)
    ran = cli("bench", llama, "--load", "--threads", 1)
    assert (ran.code, ran.err) == (0, "")
    assert (seen["source"], seen["threads"]) == (str(llama), 1)
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert "float32 2.5 MB 3.5 MB 2.0 MB 1.2" in lines
    assert "int4 lm_head: K=20 is not a multiple of group_size=32" in lines
    assert "above the 300.0 MB of a process that has loaded nothing" in ran.out


@pytest.mark.parametrize("option", [("--prompt-tokens", 4), ("--new-tokens", 4), ("--fuse",)])
def test_what_loading_would_ignore_is_refused(
    cli: Cli, llama: Path, option: tuple[object, ...]
) -> None:
    ran = cli("bench", llama, "--load", *option)
    assert ran.code == 2
    assert f"{option[0]} is for timing; with --load nothing is run, leave it out" in ran.err
