"""Where output goes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from zeropoint.cli.screen import Screen
from zeropoint.errors import ZeropointError


def test_json_appears_in_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    screen = Screen(str(path))
    assert list(tmp_path.iterdir()) == []  # nothing there until there is a result
    screen.json({"a": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    Screen(str(path)).json({"a": float("inf"), "b": (float("nan"), 1.0), "c": {"d": -float("inf")}})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.0], "c": {"d": None}}


def test_a_result_replaces_an_older_one_and_a_link_stays_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    link.symlink_to(real)
    Screen(str(link)).json({"new": True})
    assert link.is_symlink()
    assert json.loads(real.read_text()) == {"new": True}


def test_a_device_is_written_to_and_not_replaced() -> None:
    Screen(os.devnull).json({"a": 1})
    assert not Path(os.devnull).is_file()


def test_json_on_stdout_moves_results_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen("-")
    screen.line("for people")
    screen.json({"ä": 1})
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"ä": 1}
    assert printed.err == "for people\n"


def test_without_json_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().json({"a": 1})
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "it is a folder; name a file"),
        ("missing/result.json", "the folder .*missing does not exist"),
        ("n" * 300, "File name too long"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, name: str, reason: str
) -> None:
    with pytest.raises(ZeropointError, match=f"--json .* cannot be written: {reason}"):
        Screen(str(tmp_path / name))


def test_a_file_that_became_unwritable_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    screen = Screen(str(folder / "result.json"))
    folder.rmdir()
    with pytest.raises(ZeropointError, match="cannot be written: No such file"):
        screen.json({"a": 1})


def test_progress_and_spinner_are_silent_where_nobody_watches(
    capsys: pytest.CaptureFixture[str],
) -> None:
    screen = Screen()
    with screen.spinner("loading [x]"), screen.progress("working") as on_step:
        on_step("a [b]", 1, 2)
    assert capsys.readouterr() == ("", "")
