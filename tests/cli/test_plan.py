"""zeropoint plan: what it says, and that quantize then takes what it wrote."""

from __future__ import annotations

from pathlib import Path

import zeropoint as zp
from cli.conftest import Cli


def test_it_says_what_quantize_will_do_and_writes_its_recipe(
    cli: Cli, llama: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    planned = cli("plan", llama, "--weights", "int4", "--save-recipe", recipe, "--json", "-")
    assert planned.code == 0, planned.err
    assert "4 bits by rounding" in planned.err and "bits per weight" in planned.err
    ran = cli("quantize", llama, "-o", tmp_path / "out", "--recipe", recipe, "--json", "-")
    assert ran.code == 0, ran.err
    for key in ("bytes_before", "bytes_after", "bits_per_weight", "recipe", "modules"):
        assert planned.json[key] == ran.json[key], key
    assert zp.verify(tmp_path / "out") == []


def test_a_budget_names_the_format_it_chose(cli: Cli, llama: Path) -> None:
    ran = cli("plan", llama, "--budget", "1GB", "--context", "1000")
    assert ran.code == 0, ran.err
    assert "by int8" in ran.out and "keys and values of 1,000 tokens" in ran.out
    assert "of memory" in ran.out and "of disk" in ran.out


def test_a_trial_says_how_long_it_takes(cli: Cli, llama: Path) -> None:
    ran = cli("plan", llama, "--algorithm", "gptq", "--effort", "low", "--trial", "--json", "-")
    assert ran.code == 0, ran.err
    assert ran.json["quantize_seconds"] > 0 and ran.json["tried"] == ["model.layers.0"]
    assert "from a trial on model.layers.0" in ran.err
    assert cli("plan", llama, "--json", "-").json["quantize_seconds"] is None


def test_mistakes(cli: Cli, llama: Path, checkpoint: Path) -> None:
    for arguments, says in (
        ((llama, "--budget", "12 parsecs"), "is no size"),
        ((llama, "--budget", "1KB"), "nothing fits"),
        ((llama, "--weights", "int9"), "int9"),
        ((llama, "--effort", "low"), "uses no calibration data"),
        ((checkpoint,), "quantized already"),
    ):
        ran = cli("plan", *arguments)
        assert ran.code == 2 and says in ran.err, arguments
