"""Writing a folder: the old one or the new one, never a mixture, and nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import zeropoint as zp
from zeropoint.checkpoints import atomic, native
from zeropoint.checkpoints.atomic import replace_directory
from zeropoint.errors import CheckpointError

from .cases import INPUT, output_of, small


def replace(path, text, may_replace=lambda existing: None):
    """Write a folder with one file."""
    with replace_directory(path, may_replace=may_replace, needed_bytes=0) as folder:
        (folder / "file").write_text(text)


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def put(path, name="file", text="x"):
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(text)


# --- the folder appears whole ---------------------------------------------------------------------


def test_the_folder_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "deep" / "new"
    with replace_directory(target, may_replace=lambda p: None, needed_bytes=0) as folder:
        put(folder / "sub")
        assert not target.exists() and folder.parent == target.parent
    assert names(target) == ["sub"] and names(target.parent) == ["new"]


def test_an_existing_folder_is_replaced_as_a_whole(tmp_path):
    put(tmp_path / "m", "old")
    replace(tmp_path / "m", "new")
    assert names(tmp_path / "m") == ["file"] and names(tmp_path) == ["m"]


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "m").mkdir()
    replace(tmp_path / "m", "new", may_replace=lambda existing: "never")
    assert names(tmp_path) == ["m"] and (tmp_path / "m" / "file").read_text() == "new"


def test_a_relative_path_is_one_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    replace(Path("m"), "new")
    assert (tmp_path / "m" / "file").read_text() == "new"


@pytest.mark.parametrize("old", ["nothing", "empty", "full"])
def test_a_link_goes_on_pointing_to_the_folder_that_is_replaced(old, tmp_path):
    if old != "nothing":
        (tmp_path / "real").mkdir()
    if old == "full":
        put(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    replace(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "real").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"
    assert names(tmp_path) == ["link", "real"]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        replace(tmp_path / "m", "new")
        assert os.umask(0o027) == 0o027, "left as it was"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o750


def test_where_folders_cannot_be_exchanged_they_are_renamed(tmp_path, monkeypatch):
    put(tmp_path / "m", "old")
    put(tmp_path / ".m.old", "older")  # what a kill between two renames leaves

    def without_renameat2(name, use_errno):
        return object()

    monkeypatch.setattr(atomic.ctypes, "CDLL", without_renameat2)
    replace(tmp_path / "m", "new")
    assert names(tmp_path / "m") == ["file"] and names(tmp_path) == ["m"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_exchange_is_no_error(code, tmp_path, monkeypatch):
    put(tmp_path / "m", "old")
    monkeypatch.setattr(atomic.ctypes, "CDLL", failing_exchange(code))
    replace(tmp_path / "m", "new")
    assert names(tmp_path / "m") == ["file"] and names(tmp_path) == ["m"]


def failing_exchange(code):
    """A C library whose renameat2 fails with `code`."""

    class Library:
        def __init__(self, name, use_errno):
            pass

        @staticmethod
        def renameat2(*arguments):
            atomic.ctypes.set_errno(code)
            return -1

    return Library


# --- errors leave everything as it was ------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("old", [False, True])
def test_an_exception_in_the_middle_leaves_the_old_folder_alone(old, error, tmp_path):
    if old:
        put(tmp_path / "m", "old")
    with pytest.raises(type(error)):
        with replace_directory(
            tmp_path / "m", may_replace=lambda p: None, needed_bytes=0
        ) as folder:
            put(folder)
            raise error
    assert names(tmp_path) == (["m"] if old else [])
    assert not old or names(tmp_path / "m") == ["old"]


def test_an_exchange_that_is_not_allowed_leaves_the_old_folder(tmp_path, monkeypatch):
    put(tmp_path / "m", "old")
    monkeypatch.setattr(atomic.ctypes, "CDLL", failing_exchange(errno.EACCES))
    with pytest.raises(CheckpointError, match="m cannot be written: .*Permission denied"):
        replace(tmp_path / "m", "new")
    assert names(tmp_path) == ["m"] and names(tmp_path / "m") == ["old"]


def test_a_folder_that_must_not_be_replaced_is_refused_with_the_reason(tmp_path):
    put(tmp_path / "m", "old")
    with pytest.raises(CheckpointError, match="m exists and is not empty; because"):
        replace(tmp_path / "m", "new", may_replace=lambda existing: "because")
    assert names(tmp_path) == ["m"] and names(tmp_path / "m") == ["old"]


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(CheckpointError, match="m is a file, not a folder; choose another name"):
        replace(tmp_path / "m", "new")
    assert (tmp_path / "m").read_text() == "mine"


def test_a_folder_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"m cannot be written: .*file"):
        replace(tmp_path / "file" / "m", "new")


def test_a_read_only_place_is_refused(tmp_path, monkeypatch):
    def read_only(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(atomic.tempfile, "mkdtemp", read_only)
    with pytest.raises(CheckpointError, match="m cannot be written: .*Read-only file system"):
        replace(tmp_path / "m", "new")


# --- what killed runs left ------------------------------------------------------------------------


def test_what_a_killed_run_left_is_removed_and_a_running_ones_is_not(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    put(tmp_path / f".m.partial-{gone.pid}-abc")
    put(tmp_path / f".m.partial-{os.getpid()}-abc")
    put(tmp_path / f".other.partial-{gone.pid}-abc")
    put(tmp_path / ".m.partial-notes")
    replace(tmp_path / "m", "new")
    assert names(tmp_path) == [
        f".m.partial-{os.getpid()}-abc",
        ".m.partial-notes",
        f".other.partial-{gone.pid}-abc",
        "m",
    ]


def test_a_process_of_another_user_is_running(monkeypatch):
    def not_ours(pid, signal):
        raise PermissionError

    monkeypatch.setattr(atomic.os, "kill", not_ours)
    assert atomic._alive(12345)


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_folder_that_is_no_checkpoint_is_never_replaced(tmp_path):
    put(tmp_path / "m", "thesis.tex")
    message = "m exists and is not empty; it holds no zeropoint.json, so it is not a checkpoint"
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=message):
            zp.save(small(), tmp_path / "m", overwrite=overwrite)
    assert names(tmp_path / "m") == ["thesis.tex"]


def test_a_checkpoint_is_replaced_only_when_asked(path, tmp_path):
    expected = output_of(path)
    new = small(seed=1)
    with pytest.raises(CheckpointError, match=r"not empty; use overwrite=True \(--overwrite\)"):
        zp.save(new, path)
    assert torch.equal(output_of(path), expected)
    zp.save(new, path, overwrite=True)
    assert torch.equal(output_of(path), new(INPUT)) and not torch.equal(new(INPUT), expected)
    assert names(tmp_path) == ["saved"] and zp.verify(path) == []


def test_overwriting_may_write_what_was_loaded_from_the_same_place(path):
    """The tensors of a loaded model are mapped from the files that are being replaced."""
    from .cases import Small

    model, _ = zp.load(path, model=Small())
    expected = model(INPUT)
    zp.save(model, path, overwrite=True)
    assert torch.equal(output_of(path), expected) and torch.equal(model(INPUT), expected)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    path, tmp_path, monkeypatch
):
    expected = output_of(path)
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 5_000, 5_000)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda folder: usage)
    message = "saved needs 32.0 MB, but .* has 0.0 MB free; free some space or write to another"
    with pytest.raises(CheckpointError, match=message):
        zp.save(small(seed=1), path, overwrite=True)
    assert torch.equal(output_of(path), expected) and names(tmp_path) == ["saved"]


FULL = "No space left on device (os error 28)"


def test_a_disk_that_fills_up_leaves_the_old_checkpoint(path, tmp_path, monkeypatch):
    expected = output_of(path)

    def fill_up(file, tensors, metadata):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, FULL)

    monkeypatch.setattr(native, "write_file", fill_up)
    for target in (path, tmp_path / "fresh"):
        with pytest.raises(CheckpointError, match="cannot be written: .*No space left on device"):
            zp.save(small(seed=1), target, overwrite=True)
    monkeypatch.undo()
    assert torch.equal(output_of(path), expected) and names(tmp_path) == ["saved"]


def test_a_tokenizer_that_cannot_be_written_leaves_no_folder(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise ValueError("no words")

    with pytest.raises(ValueError, match="no words"):
        zp.save(small(), tmp_path / "m", tokenizer=Broken())
    assert names(tmp_path) == []


KILLED = """
    import os, signal, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)  # no threads: the children are forks
    import zeropoint as zp
    from zeropoint.checkpoints import atomic, native
    from tests.checkpoints.cases import Small, INPUT, small, output_of

    path = Path(sys.argv[1])
    models = [small(0), small(1)]
    outputs = [m(INPUT) for m in models]
    zp.save(models[0], path)
    WATCHED = (atomic.__file__, native.__file__)

    def save_and_die(model, line):
        "Save; be killed after `line` lines of the writing code. Returns how many there are."
        seen = 0

        def trace(frame, event, argument):
            nonlocal seen
            if frame.f_code.co_filename not in WATCHED:
                return None
            if event == "line":
                seen += 1
                if seen == line:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        zp.save(model, path, overwrite=True)
        sys.settrace(None)
        return seen

    lines = save_and_die(models[1], -1)
    moments = int(sys.argv[2])
    old, news, left = 1, 0, 0
    for i in range(moments):
        new = 1 - old
        # half of the moments in the last 60 lines, where the folders change places
        line = 1 + i * lines // moments if i % 2 else lines - i
        child = os.fork()
        if child == 0:
            save_and_die(models[new], max(1, line))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        assert zp.verify(path) == [], zp.verify(path)
        found = output_of(path)
        is_old, is_new = torch.equal(found, outputs[old]), torch.equal(found, outputs[new])
        assert is_old or is_new, line
        news += is_new
        old = new if is_new else old
        left += len(list(path.parent.iterdir())) > 1
    zp.save(models[0], path, overwrite=True)
    assert [p.name for p in path.parent.iterdir()] == [path.name], list(path.parent.iterdir())
    print(lines, news, left)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="fork and renameat2")
def test_a_kill_at_any_moment_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    """SIGKILL after 40 different lines of the code that writes; a later save tidies up."""
    moments = 40
    folder = tmp_path / "alone"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), folder / "m", str(moments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    lines, new, left = map(int, done.stdout.split())
    assert lines > 100 and 0 < new < moments, "some were killed before the exchange, some after"
    assert left > moments // 2, "the kills did happen while a folder was being written"


def test_a_signal_that_python_handles_leaves_no_folder(tmp_path):
    """Ctrl-C while a checkpoint is being written."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    class Interrupts:
        def save_pretrained(self, folder):
            os.kill(os.getpid(), signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            zp.save(small(), tmp_path / "m", tokenizer=Interrupts())
    finally:
        signal.signal(signal.SIGINT, before)
    assert names(tmp_path) == []
