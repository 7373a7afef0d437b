"""The edge: help, exit codes, --debug, Ctrl-C, what importing costs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import zeropoint
from cli.conftest import Cli
from zeropoint.checkpoints import native
from zeropoint.cli import VERBS, main


def test_help_lists_every_verb(cli: Cli) -> None:
    ran = cli("--help")
    assert ran.code == 0
    for verb in VERBS:
        assert f" {verb} " in ran.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_json_and_debug(cli: Cli, verb: str) -> None:
    ran = cli(verb, "--help")
    assert ran.code == 0
    assert "--json" in ran.out
    assert "--debug" in ran.out


def test_version(cli: Cli) -> None:
    ran = cli("--version")
    assert (ran.code, ran.out) == (0, f"zeropoint {zeropoint.__version__}\n")


def test_importing_the_command_line_imports_no_heavy_library() -> None:
    script = (
        "import sys, zeropoint.cli as cli; cli.app()\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & sys.modules.keys()\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_python_m_zeropoint_runs_the_command_line() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "zeropoint", "--version"], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (0, f"zeropoint {zeropoint.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [("quantise", "m"), ("quantize", "m"), ("bench", "m", "--threads", "many"), ("--nonsense",)],
)
def test_a_command_that_cannot_be_parsed_is_the_users_mistake(
    cli: Cli, arguments: tuple[str, ...]
) -> None:
    ran = cli(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert "Usage: zeropoint" in ran.err


def test_a_mistake_is_one_line_on_stderr(cli: Cli, tmp_path: Path) -> None:
    ran = cli("verify", tmp_path)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        f"error: {tmp_path} holds no zeropoint.json; only zeropoint checkpoints can be verified\n"
    )


@pytest.mark.parametrize("before", [True, False])
def test_debug_shows_the_traceback_of_a_mistake(cli: Cli, tmp_path: Path, before: bool) -> None:
    verb = ("verify", tmp_path)
    ran = cli("--debug", *verb) if before else cli(*verb, "--debug")
    assert ran.code == 2
    assert "Traceback (most recent call last)" in ran.err
    assert "\nerror: " in ran.err


def test_a_bug_of_ours_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> list[str]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(native, "verify", broken)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["verify", str(tmp_path)])


def test_ctrl_c_says_so(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "verify", interrupted)
    ran = cli("verify", tmp_path)
    assert (ran.code, ran.out) == (130, "")
    assert ran.err == "interrupted; nothing was left half written\n"


def test_ctrl_c_that_a_library_turned_into_another_error(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def swallowing(*_: object, **__: object) -> list[str]:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("half imported") from None
        return []

    monkeypatch.setattr(native, "verify", swallowing)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ran = cli("verify", tmp_path, "--debug")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)
    assert ran.code == 130
    assert "ImportError: half imported" in ran.err
    assert ran.err.endswith("\ninterrupted; nothing was left half written\n")


def test_ctrl_c_that_is_ignored_stays_ignored(cli: Cli, checkpoint: Path) -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert cli("verify", checkpoint).code == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


INTERRUPT_BEFORE_THE_RENAME = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored in a background job
def fsync(descriptor):  # the last thing before a finished folder takes its place
    print(*os.listdir(sys.argv[1]), flush=True)
    os.kill(os.getpid(), signal.SIGINT)
os.fsync = fsync
from zeropoint.cli import main
main(sys.argv[2:])
"""


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("replacing", [False, True])
def test_ctrl_c_while_writing_leaves_no_partial_folder(
    llama: Path, checkpoint: Path, tmp_path: Path, replacing: bool
) -> None:
    where = tmp_path / "out"
    where.mkdir()
    if replacing:
        checkpoint.rename(where / "int4")
    before = {p.name: p.read_bytes() for p in where.rglob("*") if p.is_file()}
    # With a dtype to convert to, the model is loaded as a whole.
    options = ["--weights", "int4", "--overwrite", "--dtype", "float32"]
    command = [sys.executable, "-c", INTERRUPT_BEFORE_THE_RENAME, str(where), "quantize"]
    ran = subprocess.run(
        [*command, str(llama), "-o", str(where / "int4"), *options],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 128 + signal.SIGINT, ran.stderr
    assert ran.stderr == "interrupted; nothing was left half written\n"
    assert ".int4.partial-" in ran.stdout  # it had begun to write
    assert "failed: KeyboardInterrupt" in (where / ".int4.unfinished" / "log.txt").read_text()
    shutil.rmtree(where / ".int4.unfinished")
    assert [p.name for p in where.iterdir()] == (["int4"] if replacing else [])
    assert {p.name: p.read_bytes() for p in where.rglob("*") if p.is_file()} == before


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_ctrl_c_while_streaming_keeps_what_is_done_aside(
    cli: Cli, llama: Path, checkpoint: Path, tmp_path: Path
) -> None:
    where = tmp_path / "out"
    where.mkdir()
    checkpoint.rename(where / "int4")
    before = {p.name: p.read_bytes() for p in (where / "int4").iterdir()}
    arguments = ["quantize", str(llama), "-o", str(where / "int4"), "--overwrite"]
    arguments += ["--weights", "nf4"]
    command = [sys.executable, "-c", INTERRUPT_BEFORE_THE_RENAME, str(where)]
    ran = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert ran.returncode == 128 + signal.SIGINT, ran.stderr
    assert "the same command goes on" in ran.stderr
    assert sorted(p.name for p in where.iterdir()) == [".int4.unfinished", "int4"]
    assert {p.name: p.read_bytes() for p in (where / "int4").iterdir()} == before
    assert cli(*arguments).code == 0
    assert sorted(p.name for p in where.iterdir()) == ["int4", "int4.quantize.log"]
    assert zeropoint.verify(where / "int4") == []
    assert (where / "int4" / "model.safetensors").read_bytes() != before["model.safetensors"]
