"""Tiny models on disk, and the command line run inside the test's process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import zeropoint as zp
from tests.models import build, tokenizer
from zeropoint.cli import main


@dataclass(frozen=True)
class Ran:
    """code: exit code. out, err: what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its stdout, parsed."""
        return json.loads(self.out)


Cli = Callable[..., Ran]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`cli("verify", folder)` runs the command line and returns what it did."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TQDM_DISABLE", "1")  # which `main` sets: undone after the test

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(a) for a in arguments])
        printed = capsys.readouterr()
        assert isinstance(exit_.value.code, int)
        return Ran(exit_.value.code, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint of a Llama with a context of 64 tokens, K = 64 and 128."""
    folder = tmp_path_factory.mktemp("llama") / "float"
    build("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint of an encoder."""
    folder = tmp_path_factory.mktemp("bert") / "float"
    build("bert").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(llama: Path, tmp_path: Path) -> Path:
    """The Llama in int8, to be damaged at will."""
    model, words = zp.load(llama)
    zp.quantize(model, "int8")
    zp.freeze(model)
    zp.save(model, tmp_path / "int8", tokenizer=words)
    return tmp_path / "int8"


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A text whose words the tiny tokenizer knows: 20 paragraphs of 30."""
    paragraphs = [" ".join(f"w{2 + (7 * i + j * j) % 97}" for j in range(30)) for i in range(20)]
    path = tmp_path / "words.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path
