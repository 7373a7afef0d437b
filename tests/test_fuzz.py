"""Files of strangers: whatever is in them, a reader answers or raises an error of ours, at once and
in little memory. The same cases every time.
"""

import json
import resource
import shutil
import struct
import time
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import zeropoint as zp
from bench._gguf import write_gguf
from tests.checkpoints.cases import write_manifest
from tests.models import build
from zeropoint.checkpoints import foreign, native
from zeropoint.checkpoints.floats import read_headers
from zeropoint.errors import ZeropointError
from zeropoint.model.load import float_skeleton

SECONDS, BYTES = 1.0, 500_000_000


def cases(count):
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,  # of wall time, which on a busy machine says nothing
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@contextmanager
def bounded():
    """Fails for an error that is not ours, a second of this process, or half a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.process_time()
    try:
        yield
    except ZeropointError:
        pass
    assert time.process_time() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < BYTES


numbers = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 32, 2**31, 2**40, 2**63, 2**64, 10**30])
leaves = (
    st.none()
    | st.booleans()
    | numbers
    | st.floats()
    | st.sampled_from(["", "\0", "../x", "/etc/passwd", "int4", "float32", "model.safetensors"])
)
values = leaves | st.lists(leaves, max_size=3) | st.dictionaries(st.text(max_size=3), leaves)


@st.composite
def edits(draw):
    """Where in nested data, and what becomes of it."""
    return draw(st.lists(st.integers(0, 50), max_size=4)), draw(values)


def edited(data, where, value):
    """A copy of nested data with one value in it replaced. where: a choice at every level."""
    if not where or not isinstance(data, (dict, list)) or not data:
        return value
    keys = list(data) if isinstance(data, dict) else list(range(len(data)))
    key = keys[where[0] % len(keys)]
    copy = data.copy()
    copy[key] = edited(data[key], where[1:], value)
    return copy


def written(entries, data):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


# --- safetensors ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """The entries of a file's header, its data, and a folder to write into."""
    folder = tmp_path_factory.mktemp("fuzz-header")
    tensors = {"a.weight": torch.ones(4, 8), "a.scale": torch.ones(4).half(), "n": torch.tensor(3)}
    save_file(tensors, folder / "m.safetensors", {"format": "pt"})
    raw = (folder / "m.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :], folder


def read_all(folder):
    """Every tensor lies in its file."""
    size = (folder / "m.safetensors").stat().st_size
    for stored in read_headers(folder).values():
        assert stored.nbytes <= size
        assert stored.read().nbytes == stored.nbytes


@cases(60)
@given(edit=edits())
def test_an_edited_header(header, edit):
    entries, data, folder = header
    (folder / "m.safetensors").write_bytes(written(edited(entries, *edit), data))
    with bounded():
        read_all(folder)


@cases(60)
@given(at=st.integers(0, 400), byte=st.integers(0, 255), cut=st.booleans())
def test_a_byte_of_a_header(header, at, byte, cut):
    entries, data, folder = header
    raw = bytearray(written(entries, data))
    at %= len(raw) - len(data)
    raw[at] = byte
    (folder / "m.safetensors").write_bytes(raw[:at] if cut else raw)
    with bounded():
        read_all(folder)


@cases(40)
@given(config=edits(), index=edits())
def test_another_librarys_configuration_and_index(header, config, index):
    entries, data, folder = header
    there = folder / "foreign"
    there.mkdir(exist_ok=True)
    (there / "m.safetensors").write_bytes(written(entries, data))
    quantization = {"quant_method": "fp8", "weight_block_size": [2, 2], "bits": 4}
    settings_ = edited({"quantization_config": quantization}, *config)
    (there / "config.json").write_text(json.dumps(settings_))
    listed = edited({"weight_map": dict.fromkeys(("a.weight", "n"), "m.safetensors")}, *index)
    (there / "m.safetensors.index.json").write_text(json.dumps(listed))
    with bounded():
        zp.verify(there)


@pytest.mark.parametrize("method", foreign.METHODS)
def test_every_method_on_tensors_that_are_not_its_own(tmp_path, method):
    """All of its names, none of their shapes."""
    marks = [layout.mark for layout in foreign.METHODS[method].layouts]
    names = [f"a{end}" for end in (*marks, *foreign.METHODS[method].companions, ".weight")]
    for shape in ((), (0,), (3,), (1, 2, 3)):
        save_file({n: torch.ones(shape) for n in names}, tmp_path / "m.safetensors")
        config = {"quant_method": method, "bits": 4, "group_size": 32}
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        with bounded():
            assert zp.verify(tmp_path) != []


# --- ours -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint in several shards, the codes in it, and a copy to be changed."""
    folder = tmp_path_factory.mktemp("fuzz-native")
    build("llama-tied").save_pretrained(folder / "float")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "MAX_SHARD_BYTES", 40_000)
        zp.compress(folder / "float", folder / "sound", "int4", strict=False)
    contents = native.read(folder / "sound")
    shutil.copytree(folder / "sound", folder / "changed")
    return folder, {name: weight.packed for name, weight in contents.qweights.items()}


def restored(folder, name):
    """The copy as it was, but for a file; and that file's JSON."""
    for path in (folder / "sound").glob("*.json"):
        shutil.copyfile(path, folder / "changed" / path.name)
    return json.loads((folder / "sound" / name).read_text())


@cases(30)
@given(edit=edits(), name=st.sampled_from([native.MANIFEST, native.CONFIG, native.INDEX]))
def test_an_edit_is_found(checkpoint, edit, name):
    folder, packed = checkpoint
    before = restored(folder, name)
    after = edited(before, *edit)
    (folder / "changed" / name).write_text(json.dumps(after))
    with bounded():
        contents = native.read(folder / "changed")
        assert after == before or name == native.INDEX, "nobody looks at the index"
        assert all(torch.equal(w.packed, packed[n]) for n, w in contents.qweights.items())


@cases(30)
@given(edit=edits())
def test_an_edit_with_the_right_hashes(checkpoint, edit):
    """By someone who knows the format."""
    folder, _ = checkpoint
    manifest = edited(restored(folder, native.MANIFEST), *edit)
    if isinstance(manifest, dict):
        sign = all(isinstance(row, dict) for row in _values(manifest.get("files")))
        manifest.pop("digest", None)
        write_manifest(folder / "changed", manifest | {"files": manifest.get("files")}, sign=sign)
    else:
        (folder / "changed" / native.MANIFEST).write_text(json.dumps(manifest))
    with bounded():
        zp.verify(folder / "changed")
    with bounded():
        native.read(folder / "changed")


def _values(data):
    return data.values() if isinstance(data, dict) else [None]


@cases(25)
@given(edit=edits().filter(lambda edit: len(edit[0]) == 1))
def test_a_configuration_of_which_no_model_can_be_made(checkpoint, edit):
    """Sizes are those of a small model: a larger one is no mistake."""
    folder, _ = checkpoint
    where, value = edit
    config = json.loads((folder / "float" / "config.json").read_text())
    if isinstance(value, int) and value > 64:
        value = 64
    there = folder / "config"
    there.mkdir(exist_ok=True)
    (there / "config.json").write_text(json.dumps(edited(config, where, value)))
    with bounded():
        float_skeleton(there)


# --- gguf -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A file's bytes up to its tensors' values, all of them, and where to write."""
    path = tmp_path_factory.mktemp("fuzz-gguf") / "m.gguf"
    write_gguf(build("llama-tied"), path)
    return path.read_bytes(), path


@cases(40)
@given(
    at=st.integers(0, 2000),
    number=st.sampled_from([0, 1, 255, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]),
    width=st.sampled_from("BIQ"),
)
def test_numbers_in_a_gguf_file(gguf, at, number, width):
    raw, path = gguf
    patch = struct.pack(f"<{width}", number & (256 ** struct.calcsize(f"<{width}") - 1))
    path.write_bytes(raw[:at] + patch + raw[at + len(patch) :])
    with bounded():
        float_skeleton(path)


@cases(8)
@given(share=st.floats(0, 1))
def test_a_gguf_file_that_was_cut_off(gguf, share):
    raw, path = gguf
    path.write_bytes(raw[: int(share * (len(raw) - 1))])
    with pytest.raises(ZeropointError):
        float_skeleton(path)
