"""zeropoint compare: arguments and rendering."""

from __future__ import annotations

from pathlib import Path

import zeropoint as zp
from cli.conftest import Cli


def test_language_models(cli: Cli, llama: Path, checkpoint: Path, words: Path) -> None:
    ran = cli("compare", llama, checkpoint, "--text", words, "--tokens", 200)
    assert (ran.code, ran.err) == (0, "")
    assert "perplexity" in ran.out
    assert "top-1 agreement" in ran.out
    assert str(checkpoint) in ran.out
    data = cli("compare", llama, checkpoint, "--text", words, "--tokens", 200, "--json", "-").json
    assert data["tokens"] == 199
    assert data["reference"]["model"] == str(llama)
    assert data["candidate"]["bytes"] < data["reference"]["bytes"]
    assert 0 < data["kl"]["mean"] < 0.1


def test_encoders(cli: Cli, bert: Path, words: Path, tmp_path: Path) -> None:
    model, tokenizer = zp.load(bert)
    zp.quantize(model, "int8")
    zp.freeze(model)
    zp.save(model, tmp_path / "int8", tokenizer=tokenizer)
    ran = cli("compare", bert, tmp_path / "int8", "--text", words)
    assert (ran.code, ran.err) == (0, "")
    assert "rank agreement" in ran.out
    assert "on 20 sentences" in ran.out


def test_a_text_that_is_not_there(cli: Cli) -> None:
    ran = cli("compare", "package:not_looked_for", "b", "--text", "missing.txt")
    assert ran.code == 2
    assert "missing.txt cannot be read as UTF-8 text" in ran.err


def test_a_candidate_that_is_not_there(cli: Cli, llama: Path) -> None:
    ran = cli("compare", llama, "./missing")
    assert ran.code == 2
    assert "'./missing' does not exist" in ran.err
