"""What a run says while it runs: --json-events for machines, a log that survives it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import zeropoint as zp
from cli.conftest import Cli
from cli.test_json_contract import check, documented


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_for_everything_that_happens(cli: Cli, llama: Path, tmp_path: Path) -> None:
    ran = cli("quantize", llama, "-o", tmp_path / "out", "--json-events", "-")
    assert ran.code == 0 and "bits per weight" in ran.err
    events = lines(ran.out)
    kinds = [event["event"] for event in events]
    assert kinds[0] == "started" and kinds[-1] == "finished"
    units = {e["name"]: e for e in events if e["event"] == "unit"}
    assert len(units) == 16 + 5
    stored = load_file(tmp_path / "out" / "model.safetensors").values()
    assert sum(e["bytes_after"] for e in units.values()) == sum(t.nbytes for t in stored)
    assert 0 < units["model.layers.0.mlp.up_proj.weight"]["error"] < 0.01
    assert units["model.norm.weight"]["error"] is None
    assert [e["seconds"] for e in events] == sorted(e["seconds"] for e in events)
    assert any(e["event"] == "step" and e["step"].startswith("hashing") for e in events)


def test_documented_keys_of_events_are_the_real_ones(
    cli: Cli, llama: Path, words: Path, tmp_path: Path
) -> None:
    """Of a run by way of files, one that calibrates, and one that fails."""
    keys = documented()["quantize --json-events"]
    calibrated = ["--observer", "minmax", "--activations", "int8", "--data", words]
    wrong = ["--weights", "int4", "--group-size", 48]
    events = []
    for i, options in enumerate(([], [*calibrated, "--calibration-tokens", 64], wrong)):
        file = tmp_path / f"{i}.jsonl"
        ran = cli("quantize", llama, "-o", tmp_path / f"out{i}", "--json-events", file, *options)
        assert ran.code == (2 if i == 2 else 0), ran.err
        events += lines(file.read_text())
    assert events[-1]["event"] == "failed" and events[-1]["failure"] == "GroupSizeError"
    check(keys, {key: value for event in events for key, value in event.items()})


def test_what_cannot_be_written(cli: Cli, llama: Path, tmp_path: Path) -> None:
    for options, says in (
        (["--json-events", tmp_path / "no" / "x"], "no/x cannot be written: No such file"),
        (["--json-events", tmp_path / "out" / "x"], "--json-events .*lies in"),
        (["--json-events", "-", "--json", "-"], "both need stdout"),
    ):
        ran = cli("quantize", llama, "-o", tmp_path / "out", *options)
        assert ran.code == 2 and re.search(says, ran.err), ran.err
    if Path("/dev/full").exists():
        ran = cli("quantize", llama, "-o", tmp_path / "out", "--json-events", "/dev/full")
        assert ran.code == 2 and "--json-events /dev/full cannot be written: No space" in ran.err


KILL_ITSELF = """
import os, signal, sys
from zeropoint.flows import stream, writing
put, left = writing.Shard.put, [20]
def counted(self, name, tensor):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
    put(self, name, tensor)
writing.Shard.put = counted
stream.compress(sys.argv[1], sys.argv[2], workers=1)
"""


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_the_log_survives_a_kill_and_ends_beside_the_output(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILL_ITSELF, str(llama), str(out)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    log = tmp_path / ".out.unfinished" / "log.txt"
    killed = log.read_text()
    assert "started: " in killed and "rss " in killed
    done = [line for line in killed.splitlines() if "done " in line]
    assert len(done) >= 8 and all("bytes, " in line for line in done)
    assert any(line.endswith("%") and "error 0." in line for line in done)
    zp.compress(llama, out)
    text = (tmp_path / "out.quantize.log").read_text()
    assert text.startswith(killed) and text.endswith("finished\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.quantize.log"]
    assert zp.verify(out) == []


def test_the_log_of_a_run_in_memory(cli: Cli, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--dtype", "float32", "--weights", "int4", "--group-size", "48"]
    assert cli("quantize", llama, "-o", out, *options).code == 2
    log = tmp_path / ".out.unfinished" / "log.txt"
    assert "failed: GroupSizeError: " in log.read_text()
    assert cli("quantize", llama, "-o", out, *options[:4]).code == 0
    text = (tmp_path / "out.quantize.log").read_text()
    assert "model.layers.1.mlp.down_proj, 1" in text and "done lm_head" in text
    assert text.endswith("finished\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.quantize.log"]


def test_a_log_that_cannot_be_written(tmp_path: Path, llama: Path) -> None:
    (tmp_path / ".out.unfinished").touch()
    with pytest.raises(zp.ZeropointError, match="out cannot be written"):
        zp.compress(llama, tmp_path / "out")
