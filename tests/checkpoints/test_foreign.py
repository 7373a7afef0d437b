"""Checkpoints of other libraries: right ones pass, and what is wrong is named."""

import json

import pytest
import torch
from safetensors.torch import save_file

import zeropoint as zp
from zeropoint.checkpoints import foreign
from zeropoint.errors import CheckpointError
from zeropoint.flows.verify import examine

N, K = 24, 64


def words(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def state(**changes):
    """bitsandbytes' description of a weight, as bytes."""
    data = {"quant_type": "nf4", "blocksize": 64, "shape": [N, K], "dtype": "float16"} | changes
    return torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def compressed(**weights):
    group = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32} | weights
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": group}}}


CASES = {
    "gptq": (
        GPTQ,
        {
            "a.qweight": words(K // 8, N),
            "a.qzeros": words(2, N // 8),
            "a.scales": torch.ones(2, N).half(),
            "a.g_idx": words(K),
        },
    ),
    "gptq, 3 bits, a scale per channel": (
        {"quant_method": "gptq", "bits": 3, "group_size": -1},
        {
            "a.qweight": words(K * 3 // 32, N),
            "a.qzeros": words(1, 3),  # 72 bits
            "a.scales": torch.ones(1, N).half(),
        },
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
        {
            "a.qweight": words(K, N // 8),
            "a.qzeros": words(2, N // 8),
            "a.scales": torch.ones(2, N).half(),
        },
    ),
    "bitsandbytes 4-bit": (
        BNB4,
        {
            "a.weight": torch.zeros(N * K // 2, 1, dtype=torch.uint8),
            "a.weight.absmax": torch.ones(N * K // 64),
            "a.weight.quant_map": torch.ones(16),
            "a.weight.quant_state.bitsandbytes__nf4": state(),
        },
    ),
    "bitsandbytes 4-bit, nested": (
        BNB4 | {"bnb_4bit_quant_storage": "bfloat16"},
        {
            "a.weight": torch.zeros(N * K // 4, 1, dtype=torch.bfloat16),
            "a.weight.absmax": torch.ones(N * K // 64, dtype=torch.uint8),
            "a.weight.quant_map": torch.ones(16),
            "a.weight.nested_absmax": torch.ones(1),
            "a.weight.nested_quant_map": torch.ones(256),
            "a.weight.quant_state.bitsandbytes__fp4": state(nested_blocksize=256),
        },
    ),
    "bitsandbytes 8-bit": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {
            "a.weight": torch.zeros(N, K, dtype=torch.int8),
            "a.SCB": torch.ones(N),
            "a.weight_format": torch.tensor(0, dtype=torch.uint8),
        },
    ),
    "compressed-tensors, packed": (
        compressed(),
        {
            "a.weight_packed": words(N, K // 8),
            "a.weight_scale": torch.ones(N, 2).bfloat16(),
            "a.weight_shape": torch.tensor([N, K]),
        },
    ),
    "compressed-tensors, nvfp4": (
        compressed(type="float", strategy="tensor_group", group_size=16),
        {
            "a.weight_packed": torch.zeros(N, K // 2, dtype=torch.uint8),
            "a.weight_scale": torch.ones(N, K // 16).to(torch.float8_e4m3fn),
            "a.weight_global_scale": torch.ones(1),
        },
    ),
    "compressed-tensors, int8": (
        compressed(num_bits=8, strategy="channel", group_size=None),
        {"a.weight": torch.zeros(N, K, dtype=torch.int8), "a.weight_scale": torch.ones(N, 1)},
    ),
    "compressed-tensors, float8": (
        compressed(num_bits=8, type="float", strategy="tensor", group_size=None),
        {
            "a.weight": torch.zeros(N, K).to(torch.float8_e4m3fn),
            "a.weight_scale": torch.ones(1).bfloat16(),
        },
    ),
    "compressed-tensors, float8 in blocks": (
        compressed(num_bits=8, type="float", strategy="block", block_structure=[16, 16]),
        {
            "a.weight": torch.zeros(N, K).to(torch.float8_e4m3fn),
            "a.weight_scale": torch.ones(2, 4),
        },
    ),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [16, 16]},
        {
            "a.weight": torch.zeros(N, K).to(torch.float8_e4m3fn),
            "a.weight_scale_inv": torch.ones(2, 4),
        },
    ),
    "fbgemm_fp8": (
        {"quant_method": "fbgemm_fp8"},
        {
            "a.weight": torch.zeros(N, K).to(torch.float8_e4m3fn),
            "a.weight_scale": torch.ones(N, 1),
        },
    ),
    "mxfp4": (
        {"quant_method": "mxfp4"},
        {
            "a.experts_blocks": torch.zeros(3, N, 2, 16, dtype=torch.uint8),
            "a.experts_scales": torch.zeros(3, N, 2, dtype=torch.uint8),
        },
    ),
}


def write(folder, config, tensors):
    """A checkpoint with a kept layer and a norm beside what is given."""
    folder.mkdir(exist_ok=True)
    rest = {"norm.weight": torch.ones(K), "head.weight": torch.ones(5, K).bfloat16()}
    save_file(rest | tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_sound_one(tmp_path, case):
    config, tensors = CASES[case]
    folder = write(tmp_path / "m", config, tensors)
    found = foreign.verify(folder)
    assert found.problems == () and found.weights == 1 and found.tensors == len(tensors) + 2
    assert found.method == config["quant_method"]
    assert "no float twin of a quantized weight" in found.checked
    assert found.unchecked == ("codes: the format has no hashes",)
    assert zp.verify(folder) == []


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_that_is_missing_or_of_another_shape_or_dtype_is_named(tmp_path, case):
    config, tensors = CASES[case]
    optional = {"a.weight_format", "a.weight_global_scale"}
    for name in tensors.keys() - optional:
        folder = write(tmp_path / "m", config, {n: t for n, t in tensors.items() if n != name})
        assert any("a." in p or "nothing is quantized" in p for p in zp.verify(folder)), name
        folder = write(
            tmp_path / "m", config, tensors | {name: torch.ones(7, 11, dtype=torch.bool)}
        )
        assert any("a." in p for p in zp.verify(folder)), name


def test_parts_without_their_weight(tmp_path):
    config, tensors = CASES["gptq"]
    alone = {"b.scales": torch.ones(2, N).half(), "c.weight": torch.zeros(N, K, dtype=torch.int8)}
    assert zp.verify(write(tmp_path, config, tensors | alone)) == [
        f"{name} belongs to a quantized weight of which the rest is missing"
        for name in ("b.scales", "c.weight")
    ]


def test_a_float_twin(tmp_path):
    config, tensors = CASES["gptq"]
    folder = write(tmp_path, config, tensors | {"a.weight": torch.ones(N, K).half()})
    assert zp.verify(folder) == ["a.weight is a float twin of a.qweight"]


def test_a_scale_that_is_no_number(tmp_path):
    for bad in (torch.nan, torch.inf):
        config, tensors = CASES["awq"]
        scales = torch.full((2, N), bad).half()
        folder = write(tmp_path, config, tensors | {"a.scales": scales})
        assert zp.verify(folder) == ["a.scales holds NaN or Inf"]


def test_shapes_that_the_configuration_does_not_say(tmp_path):
    config, tensors = CASES["gptq"]
    folder = write(tmp_path, config | {"group_size": 16}, tensors)
    assert zp.verify(folder) == [
        f"a.scales is (2, {N}), but (4, {N}) is needed",
        "a.qzeros is (2, 3), but (4, 3) is needed",
    ]
    folder = write(tmp_path, config | {"bits": 8}, tensors)
    assert "a.qzeros is (2, 3), but (1, 6) is needed" in zp.verify(folder)


def test_one_of_several_groups_of_settings(tmp_path):
    config, tensors = CASES["compressed-tensors, packed"]
    other = compressed(num_bits=8, strategy="channel")["config_groups"]["group_0"]
    groups = {"config_groups": {"group_1": other, **config["config_groups"], "none": {}}}
    assert zp.verify(write(tmp_path, config | groups, tensors)) == []


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "gptq"}, "cannot be told by the settings: KeyError('bits')"),
        (GPTQ | {"bits": 0}, "cannot be told by the settings: ZeroDivisionError"),
        (GPTQ | {"bits": "four"}, "cannot be told by the settings: TypeError"),
        (GPTQ | {"group_size": None}, "cannot be told by the settings: TypeError"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, config, says):
    assert says in zp.verify(write(tmp_path, config, CASES["gptq"][1]))[0]


def test_groups_that_make_no_sense(tmp_path):
    config, tensors = CASES["compressed-tensors, packed"]
    folder = write(tmp_path, config | {"config_groups": {"a": 3}}, tensors)
    assert "quantization_config makes no sense: AttributeError" in zp.verify(folder)[0]
    folder = write(tmp_path, config | {"config_groups": []}, tensors)
    assert "quantization_config says nothing of weights" in zp.verify(folder)[0]


def test_one_that_nothing_was_quantized_of(tmp_path):
    (problem,) = zp.verify(write(tmp_path, GPTQ, {}))
    assert problem == "nothing is quantized: there is no tensor *.qweight"


def test_a_truncated_file_and_one_that_is_missing(tmp_path):
    config, tensors = CASES["gptq"]
    folder = write(tmp_path, config, tensors)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (problem,) = zp.verify(folder)
    assert "model.safetensors cannot be read" in problem
    file.unlink()
    assert "holds no .safetensors files" in zp.verify(folder)[0]


def test_a_method_that_nobody_knows_is_checked_as_far_as_it_can_be(tmp_path):
    folder = write(tmp_path, {"quant_method": "squeeze"}, {"a.codes": words(3)})
    found = examine(folder)
    assert found.problems == () and found.checked == ("index and headers", "every float is finite")
    assert "quant_method 'squeeze' is not known" in found.unchecked[1]
    assert zp.verify(folder) == [*found.not_checked] and not found.known, "never an empty list"
    folder = write(tmp_path, {"quant_method": "squeeze"}, {"a.scale": torch.tensor(torch.nan)})
    problem, *unchecked = zp.verify(folder)
    assert problem == "a.scale holds NaN or Inf"
    assert all(line.startswith("not checked: ") for line in unchecked) and len(unchecked) == 2


def test_another_layout_of_awq_is_said(tmp_path):
    config, tensors = CASES["awq"]
    found = examine(write(tmp_path, config | {"version": "gemv"}, tensors))
    assert found.unchecked[1] == "AWQ's layout 'gemv': read as gemm"


def test_it_cannot_be_compared_with_a_source(tmp_path):
    folder = write(tmp_path, *CASES["gptq"])
    with pytest.raises(CheckpointError, match="is of gptq; only zeropoint checkpoints can be comp"):
        zp.verify(folder, against=folder)


def test_a_float_checkpoint_is_no_quantized_one(tmp_path):
    folder = write(tmp_path, None, {})
    with pytest.raises(CheckpointError, match="only zeropoint checkpoints can be verified"):
        zp.verify(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="only zeropoint checkpoints can be verified"):
        zp.verify(folder)
