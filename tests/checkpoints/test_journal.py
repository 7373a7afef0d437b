import pytest

from zeropoint.checkpoints.journal import Journal
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
        known = max(0, sum(end - 1 <= size for end in ends) - 1)
        assert list(done(tmp_path / "j")) == ["a", "b"][:known], size


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


@pytest.mark.parametrize("line", [b"[]", b'"x"', b"\xff\xfe", b'{"piece": "a"}', b"{" * 99])
def test_what_is_no_line_of_a_journal_is_the_end_of_it(tmp_path, line):
    written(tmp_path / "j", "a")
    with (tmp_path / "j").open("ab") as file:
        file.write(line + b'\n{"piece": "b", "checksum": 99}\n')
    assert list(done(tmp_path / "j")) == ["a"]
