"""zeropoint inspect: the tree, and one tensor."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.conftest import Cli

WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.usefixtures("torch_kernel")
def test_the_tree_and_the_schemes(cli: Cli, checkpoint: Path) -> None:
    ran = cli("inspect", checkpoint)
    assert (ran.code, ran.err) == (0, "")
    assert "LlamaForCausalLM" in ran.out
    assert "q_proj" in ran.out
    assert "int8 per channel  torch" in ran.out
    data = cli("inspect", checkpoint, "--json", "-").json
    assert data["footprint"]["total_bytes"] == data["footprint"]["modules"]["bytes"]
    (scheme,) = data["schemes"]
    assert scheme["modules"] == 16
    assert scheme["bytes"] > scheme["weights"]


def test_a_float_model(cli: Cli, llama: Path) -> None:
    assert "nothing in it is quantized" in cli("inspect", llama).out


def test_a_quantized_tensor(cli: Cli, checkpoint: Path) -> None:
    ran = cli("inspect", checkpoint, "--tensor", WEIGHT)
    assert (ran.code, ran.err) == (0, "")
    assert f"{WEIGHT}  128 x 64 float32, stored as int8 per channel\n" in ran.out
    assert "█" in ran.out
    data = cli("inspect", checkpoint, "--tensor", WEIGHT, "--json", "-").json
    assert data["bytes"] == 128 * 64 + 128 * 4
    assert sum(data["values"]["counts"]) == sum(data["codes"]["counts"]) == 128 * 64
    assert len(data["codes"]["edges"]) == 257
    assert data["values"]["edges"][0] == data["min"]
    assert data["values"]["edges"][-1] == data["max"]


def test_a_float_tensor(cli: Cli, llama: Path) -> None:
    data = cli("inspect", llama, "--tensor", "model.norm.weight", "--json", "-").json
    assert (data["shape"], data["dtype"], data["scheme"]) == ([64], "float32", None)
    assert data["codes"] is None


def test_a_wrong_name_is_an_error_with_close_ones(cli: Cli, checkpoint: Path) -> None:
    ran = cli("inspect", checkpoint, "--tensor", "model.layers.0.mlp.upproj.weight")
    assert ran.code == 2
    assert f"close: '{WEIGHT}'" in ran.err
    ran = cli("inspect", checkpoint, "--tensor", "model.layers.0.mlp.up_proj")
    assert f"it is a module that holds '{WEIGHT}'" in ran.err
    ran = cli("inspect", checkpoint, "--tensor", "?")
    assert "as `zeropoint inspect MODEL` lists them, for example 'model." in ran.err
