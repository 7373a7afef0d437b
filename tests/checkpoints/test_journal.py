import fcntl
import os

import pytest

from zeropoint.checkpoints.journal import Journal, read_record
from zeropoint.errors import CheckpointError

IDENTITY = {"recipe": {"rules": [1]}, "algorithm": "rtn"}


def written(path, *pieces, identity=IDENTITY):
    journal = Journal(path, identity)
    for piece in pieces:
        journal.add(piece, ord(piece))
    journal.close()


def done(path, identity=IDENTITY, **options):
    journal = Journal(path, identity, **options)
    journal.close()
    return journal.done


def test_the_next_run_knows_what_is_done(tmp_path):
    assert done(tmp_path / "j") == {}
    written(tmp_path / "j", "a", "é")
    assert done(tmp_path / "j") == {"a": 97, "é": 233}
    written(tmp_path / "j", "b")
    assert list(done(tmp_path / "j")) == ["a", "é", "b"]


def test_a_kill_at_any_byte_loses_at_most_the_last_piece(tmp_path):
    written(tmp_path / "whole", "a", "b")
    text = (tmp_path / "whole").read_bytes()
    ends = [i + 1 for i, byte in enumerate(text) if byte == ord("\n")]
    for size in range(len(text) + 1):
        (tmp_path / "j").write_bytes(text[:size])
        known = max(0, sum(end <= size for end in ends) - 1)
        assert list(done(tmp_path / "j")) == ["a", "b"][:known], size
        written(tmp_path / "j", "c")
        assert list(done(tmp_path / "j")) == [*["a", "b"][:known], "c"], size


def test_another_run_is_refused_in_words_unless_it_starts_over(tmp_path):
    written(tmp_path / "j", "a")
    other = IDENTITY | {"algorithm": "mse"}
    with pytest.raises(CheckpointError, match='another algorithm: "rtn", not "mse"; .*--fresh'):
        Journal(tmp_path / "j", other)
    assert done(tmp_path / "j") == {"a": 97}, "nothing is lost by the attempt"
    assert done(tmp_path / "j", other, fresh=True) == {}


def test_two_at_once_are_refused(tmp_path):
    first = Journal(tmp_path / "j", IDENTITY)
    with pytest.raises(CheckpointError, match="another process"):
        Journal(tmp_path / "j", IDENTITY)
    first.close()
    assert done(tmp_path / "j") == {}


@pytest.mark.parametrize(
    "line",
    [b"[]", b'"x"', b"\xff\xfe", b'{"piece": "a"}', b"{" * 99, b"[" * 100_000, b"\0" * 4096]
    + [b'{"piece": ["a"], "checksum": 1}', b'{"piece": "a", "checksum": "1"}', b'{"value": 3}'],
    ids=lambda line: repr(line[:20]),
)
def test_a_line_that_was_damaged_says_nothing_and_hides_nothing(tmp_path, line):
    """After a power failure a page may be missing before one that is there."""
    written(tmp_path / "j", "a")
    with (tmp_path / "j").open("ab") as file:
        file.write(line + b'\n{"piece": "b", "checksum": 99}\n')
    assert done(tmp_path / "j") == {"a": 97, "b": 99}


def test_a_journal_only_grows(tmp_path):
    """A kill while it is opened loses nothing."""
    written(tmp_path / "j", "a")
    before = (tmp_path / "j").read_bytes()
    written(tmp_path / "j", "b")
    assert (tmp_path / "j").read_bytes().startswith(before)


def test_the_latest_note_counts_and_is_on_the_disk_when_note_returns(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (synced.append(os.fstat(file).st_size), sync(file))
    )
    journal = Journal(tmp_path / "j", IDENTITY)
    journal.note("deleted", ["x"])
    journal.note("deleted", ["x", "y"])
    assert synced[-1] == (tmp_path / "j").stat().st_size
    journal.close()
    again = Journal(tmp_path / "j", IDENTITY)
    assert again.notes == {"deleted": ["x", "y"]} == read_record(tmp_path / "j").notes
    again.close()


def test_a_first_line_that_was_damaged_is_an_error(tmp_path):
    """Not a new beginning: what the notes say may be in no other place."""
    written(tmp_path / "j", "a")
    data = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(b"#" + data[1:])
    with pytest.raises(CheckpointError, match="j is damaged: its first line .* fresh=True"):
        Journal(tmp_path / "j", IDENTITY)
    assert read_record(tmp_path / "j").done == {"a": 97}
    assert done(tmp_path / "j", fresh=True) == {}


def test_a_full_disk_leaves_no_half_of_a_line(tmp_path, monkeypatch):
    """The line after it would be lost with it."""
    journal = Journal(tmp_path / "j", IDENTITY)
    write = os.write

    def half(file, data):
        write(file, bytes(data)[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space left"):
            journal.add("a", 97)
    journal.add("b", 98)
    journal.close()
    assert done(tmp_path / "j") == {"b": 98}


def test_a_journal_that_its_owner_has_just_removed_is_not_claimed(tmp_path, monkeypatch):
    """The run that had it came to its end in that moment; nobody would find this one's."""
    claim = fcntl.flock

    def removed(file, how):
        (tmp_path / "j").unlink()
        claim(file, how)

    monkeypatch.setattr(fcntl, "flock", removed)
    with pytest.raises(CheckpointError, match="another process"):
        Journal(tmp_path / "j", IDENTITY)
