"""docs/json.md says what the verbs write: no key is undocumented, none documented is missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import zeropoint as zp
from cli.conftest import Cli
from zeropoint.cli import VERBS

DOCUMENT = Path(__file__).parents[2] / "docs" / "json.md"


def documented() -> dict[str, set[str]]:
    """The keys of every section that has a table."""
    sections: dict[str, set[str]] = {}
    for part in re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        keys = re.findall(r"^\| `([^`]+)` \|", body, flags=re.MULTILINE)
        assert len(keys) == len(set(keys)), f"{title} documents a key twice"
        sections[title] = set(keys)
    return sections


def paths(data: Any, prefix: str = "") -> set[str]:
    """The path of every leaf, as the tables write it."""
    if isinstance(data, dict) and data:
        return set().union(*(paths(v, f"{prefix}.{k}" if prefix else k) for k, v in data.items()))
    if isinstance(data, list):
        return set().union(*(paths(v, f"{prefix}[]") for v in data)) or {f"{prefix}[]"}
    return {prefix}


def check(keys: set[str], data: Any) -> None:
    """Raise unless the documented keys and the real ones are the same."""
    real = paths(data)

    def fits(path: str, key: str) -> bool:
        return path.startswith(key[:-1]) if key.endswith("*") else path == key

    undocumented = {p for p in real if not any(fits(p, k) for k in keys)}
    missing = {k for k in keys if not any(fits(p, k) for p in real)}
    assert not undocumented, f"not in {DOCUMENT.name}: {sorted(undocumented)}"
    assert not missing, f"not in the result: {sorted(missing)}"


def _encoders(cli: Cli, bert: Path, words: Path, tmp_path: Path) -> Any:
    model, tokenizer = zp.load(bert)
    zp.quantize(model, "int8")
    zp.freeze(model)
    zp.save(model, tmp_path / "bert8", tokenizer=tokenizer)
    return cli("compare", bert, tmp_path / "bert8", "--text", words, "--json", "-").json


RUNS: dict[str, Callable[[Path, Path, Path, Path], tuple[object, ...]]] = {
    "quantize": lambda llama, int8, words, out: (
        *("quantize", llama, "-o", out, "--activations", "int8", "--observer", "minmax"),
        *("--data", words, "--calibration-tokens", 64),
    ),
    "finetune": lambda llama, int8, words, out: (
        *("finetune", llama, "-o", out, "--data", words, "--steps", 2, "--window", 16),
        *("--batch-tokens", 64),
    ),
    "plan": lambda llama, int8, words, out: ("plan", llama, "--budget", "1GB", "--context", 8),
    "inspect": lambda llama, int8, words, out: ("inspect", int8),
    "inspect --tensor": lambda llama, int8, words, out: (
        *("inspect", int8, "--tensor", "model.layers.0.mlp.up_proj.weight"),
    ),
    "compare": lambda llama, int8, words, out: ("compare", llama, int8, "--text", words),
    "generate": lambda llama, int8, words, out: ("generate", int8, "--prompt", "w2"),
    "bench": lambda llama, int8, words, out: (
        *("bench", int8, "--prompt-tokens", 4, "--new-tokens", 2),
    ),
    "bench --load": lambda llama, int8, words, out: ("bench", llama, "--load"),
    "verify": lambda llama, int8, words, out: ("verify", int8, "--against", llama),
    "doctor": lambda llama, int8, words, out: ("doctor",),
}


@pytest.mark.parametrize("section", RUNS)
def test_documented_keys_are_the_real_ones(
    cli: Cli, llama: Path, checkpoint: Path, words: Path, tmp_path: Path, section: str
) -> None:
    arguments = RUNS[section](llama, checkpoint, words, tmp_path / "out")
    ran = cli(*arguments, "--json", "-")
    assert ran.code == 0, ran.err
    check(documented()[section], ran.json)


def test_documented_keys_of_encoders(cli: Cli, bert: Path, words: Path, tmp_path: Path) -> None:
    check(documented()["compare (encoders)"], _encoders(cli, bert, words, tmp_path))


def test_every_verb_is_documented() -> None:
    assert documented().keys() == {*RUNS, "compare (encoders)", "quantize --json-events"}
    assert {title.split()[0] for title in documented()} == VERBS.keys()


def test_the_check_can_fail() -> None:
    data = {"a": 1, "b": {"x": [1, 2], "y": []}, "c": [{"d": 1}, {"d": None}]}
    check({"a", "b.x[]", "b.y[]", "c[].d"}, data)
    check({"a", "b.*", "c[].*"}, data)
    with pytest.raises(AssertionError, match=r"not in json.md: \['a'\]"):
        check({"b.*", "c[].d"}, data)
    with pytest.raises(AssertionError, match=r"not in the result: \['e'\]"):
        check({"a", "b.*", "c[].d", "e"}, data)
