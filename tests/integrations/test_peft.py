"""peft's LoRA on quantized layers, by plain peft code."""

from __future__ import annotations

import copy
import hashlib
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

import zeropoint as zp
from tests.models import build, example_inputs, outputs, perceptron
from zeropoint.algorithms.rtn import rtn
from zeropoint.errors import NonFiniteError, RecipeError, SourceError, StateError
from zeropoint.integrations.peft import QLoraEmbedding, QLoraLinear, loftq_init
from zeropoint.nn import QModule
from zeropoint.numerics import FORMATS

# peft asks transformers for what transformers calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

every_format = pytest.mark.parametrize("weights", FORMATS)
some = pytest.mark.parametrize("name", ["llama-tied", "gpt2", "t5-tied", "bert-masked"])


def quantized(name="llama", weights="nf4", *, frozen=True, **options):
    model = build(name) if isinstance(name, str) else name
    zp.quantize(model, weights, **options)
    if frozen:
        zp.freeze(model)
    return model


def adapted(model, *, noise=0.05, targets="all-linear", **options):
    """With an adapter whose B is noise instead of zero."""
    config = peft.LoraConfig(r=4, target_modules=targets, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, config)
    disturb(wrapped, "default", noise)
    return wrapped.eval()


@torch.no_grad()
def disturb(model, adapter, std, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}" in name and ("lora_B" in name or "lora_embedding_A" in name):
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def lora_layers(model):
    kinds = (QLoraLinear, QLoraEmbedding)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds)}


def base_hash(model):
    """Of everything that is not the adapter's."""
    sha = hashlib.sha256()
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if "lora_" not in name:
            sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def loss_of(model):
    inputs = example_inputs(model.get_base_model())
    out = model(**inputs)
    return (out.logits if "logits" in out else out.last_hidden_state).float().square().mean()


def train(model, steps=2):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    model.eval()


# --- training ---


@every_format
def test_training_reaches_only_the_adapter(weights):
    model = adapted(peft.prepare_model_for_kbit_training(quantized("llama-tied", weights)))
    before, answers = base_hash(model), outputs(model)
    train(model)
    named = dict(model.named_parameters())
    assert {n for n, p in named.items() if p.requires_grad} == {n for n in named if "lora_" in n}
    assert all(p.grad.abs().sum() > 0 for n, p in named.items() if "lora_" in n)
    assert all(p.grad is None for n, p in named.items() if "lora_" not in n)
    assert base_hash(model) == before
    assert not torch.equal(outputs(model), answers)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "live"])
@some
def test_all_linear_takes_quantized_layers_but_not_the_head(name, frozen):
    config = peft.LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=name == "gpt2")
    reference = peft.get_peft_model(build(name), config)
    model = adapted(quantized(name, frozen=frozen))
    assert set(model.targeted_module_names) == set(reference.targeted_module_names)
    assert lora_layers(model).keys() == set(
        f"base_model.model.{n}" for n in model.targeted_module_names
    )
    before = base_hash(model)
    train(model)
    assert base_hash(model) == before


def test_a_new_adapter_changes_nothing():
    model = quantized()
    expected = outputs(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert torch.equal(outputs(wrapped), expected)
    assert len(lora_layers(wrapped)) == 2


@pytest.mark.parametrize("activations", [None, "int8", "float8_e4m3fn"])
def test_the_forward_is_the_base_plus_the_product(activations):
    model = adapted(quantized(weights="int8", activations=activations), targets=["up_proj"])
    name, layer = next(iter(lora_layers(model).items()))
    x = torch.randn(5, layer.in_features, requires_grad=True)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.get_base_layer()(x) + layer.scaling["default"] * x @ a.T @ b.T
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-5)
    layer(x).sum().backward()
    weight = layer.get_base_layer().qweight.dequantize() + layer.get_delta_weight("default")
    assert torch.allclose(x.grad, weight.sum(0).expand_as(x), rtol=0, atol=1e-4)


def test_part_of_the_model_may_be_float():
    model = quantized(exclude="*.mlp.*")
    wrapped = adapted(model)
    assert len(wrapped.targeted_module_names) == 14 and len(lora_layers(wrapped)) == 8
    train(wrapped)


def test_gradient_checkpointing():
    plain, checkpointed = (
        peft.prepare_model_for_kbit_training(quantized("llama-tied")) for _ in range(2)
    )
    checkpointed.gradient_checkpointing_enable()
    grads = []
    for model in (adapted(plain), adapted(checkpointed)):
        model.train()
        loss_of(model).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-8) for a, b in zip(*grads, strict=True))


def test_trainer(tmp_path):
    model = adapted(peft.prepare_model_for_kbit_training(quantized("llama-tied")), noise=0.0)
    before = base_hash(model)
    rows = [{"input_ids": [1, 5, 6, 7], "labels": [1, 5, 6, 7]}] * 8
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert base_hash(model) == before


# --- adapters ---


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@some
def test_an_adapter_is_saved_and_loaded(name, low_cpu_mem_usage, tmp_path):
    model = adapted(quantized(name))
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        quantized(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(outputs(again), expected)
    assert not [p for p in again.parameters() if p.requires_grad]


def test_an_adapter_of_the_float_model_loads(tmp_path):
    model = adapted(build("gpt2"), fan_in_fan_out=True)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized("gpt2", "int8"), tmp_path)
    a, b = outputs(model), outputs(again)
    assert (a - b).norm() <= 0.02 * a.norm()


def test_several_adapters():
    model = quantized()
    base = outputs(model)
    wrapped = adapted(model)
    first = outputs(wrapped)
    wrapped.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    assert torch.equal(outputs(wrapped), first)
    disturb(wrapped, "second", 0.1, seed=1)
    wrapped.set_adapter("second")
    second = outputs(wrapped)
    assert not torch.equal(second, first)
    with wrapped.disable_adapter():
        assert torch.equal(outputs(wrapped), base)
    wrapped.set_adapter("default")
    assert torch.equal(outputs(wrapped), first)
    inputs = example_inputs(model)
    with torch.no_grad():
        mixed = wrapped(**inputs, adapter_names=["second", "__base__"]).logits
    # The adapter of a part of a batch adds up in another order, and a difference of one rounding
    # can move an activation by a step of 16 bits, 3e-5 of the largest beside it.
    assert torch.allclose(mixed[0], second[0], atol=2e-4)
    assert torch.allclose(mixed[1], base[1], atol=1e-5)
    wrapped.delete_adapter("second")
    assert torch.equal(outputs(wrapped), first)


def test_adapters_by_transformers_own_call():
    model = quantized()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert len(lora_layers(model)) == 2


def test_an_embedding():
    model = adapted(quantized("llama"), targets=["embed_tokens", "q_proj"])
    assert [type(m) for m in lora_layers(model).values()].count(QLoraEmbedding) == 1
    layer = model.get_base_model().model.embed_tokens
    indices = torch.tensor([[3, 5]])
    weight = layer.get_base_layer().qweight.dequantize() + layer.get_delta_weight("default")
    assert torch.allclose(layer(indices), weight[indices], atol=1e-5)
    train(model)
    before = outputs(model)
    model.merge_adapter()
    assert not torch.equal(outputs(model), before)
    model.unmerge_adapter()
    assert torch.equal(outputs(model), before)


def test_a_model_that_is_not_of_transformers():
    model = zp_perceptron()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["up", "down"]))
    assert len(lora_layers(wrapped)) == 2


def zp_perceptron():
    model = perceptron()
    zp.quantize(model, "int4")
    zp.freeze(model)
    return model


# --- merging ---


@every_format
def test_merging_keeps_what_rounding_loses_and_comes_back_exactly(weights):
    model = adapted(quantized("llama-tied", weights), noise=0.005)
    expected, before = outputs(model), base_hash(model)
    weights_before = {
        n: m.get_base_layer().qweight.dequantize(torch.float32)
        for n, m in lora_layers(model).items()
    }
    model.merge_adapter()
    for name, layer in lora_layers(model).items():
        wanted = weights_before[name] + layer.get_delta_weight("default").detach()
        base = layer.get_base_layer().qweight
        basis = torch.linalg.qr(layer.lora_A["default"].weight.detach().T).Q
        rounded = rtn(wanted, base.scheme).dequantize(torch.float32)
        lost = (wanted - base.dequantize(torch.float32)) @ basis
        assert lost.norm() <= ((wanted - rounded) @ basis).norm()
    model.unmerge_adapter()
    assert base_hash(model) == before
    assert torch.equal(outputs(model), expected)


def test_merging_without_an_effect_changes_no_value():
    model = adapted(quantized(), noise=0.0)
    expected = outputs(model)
    model.merge_adapter()
    assert torch.equal(outputs(model), expected)


def test_merging_two_adapters_is_merging_their_sum():
    model = adapted(quantized(), targets=["q_proj"])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    disturb(model, "second", 0.05, seed=1)
    before = base_hash(model)
    model.merge_adapter(adapter_names=["default", "second"])
    together = base_hash(model)
    model.unmerge_adapter()
    assert base_hash(model) == before
    model.merge_adapter(adapter_names=["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        model.merge_adapter(adapter_names=["second"])
    assert base_hash(model) == together
    model.unmerge_adapter()
    assert base_hash(model) == before
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@some
def test_merge_and_unload_gives_a_plain_quantized_model(name, tmp_path):
    model = adapted(quantized(name))
    with_adapter = outputs(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert not lora_layers(merged) and not [n for n in merged.state_dict() if "lora" in n]
    assert {type(m) for m in merged.modules() if isinstance(m, QModule)} == {
        type(m) for m in quantized(name).modules() if isinstance(m, QModule)
    }
    zp.save(merged, tmp_path / "m")
    assert zp.verify(tmp_path / "m") == []
    again, _ = zp.load(tmp_path / "m")
    assert torch.equal(outputs(again), outputs(merged))
    base = outputs(quantized(name))
    lost = (outputs(merged) - with_adapter).norm() / (with_adapter - base).norm()
    assert lost < 1  # merged is nearer to the adapter than the base is


def test_merging_into_a_live_model():
    model = adapted(quantized(frozen=False))
    name, layer = next(iter(lora_layers(model).items()))
    weight = layer.get_base_layer().weight.detach().clone()
    delta = layer.get_delta_weight("default").detach()
    model.merge_adapter()
    assert torch.equal(layer.get_base_layer().weight, weight + delta)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, weight)
    merged = model.merge_and_unload()
    zp.freeze(merged)
    assert outputs(merged).isfinite().all()


def test_disabling_a_merged_adapter_takes_it_out():
    model = adapted(quantized())
    base = outputs(quantized())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(outputs(model), base)


def test_a_broken_adapter_is_not_merged_safely():
    model = adapted(quantized())
    before = base_hash(model)
    layer = list(lora_layers(model).values())[3]
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="merging default would give NaN or Inf"):
        layer.merge(safe_merge=True)
    with pytest.raises(NonFiniteError, match="default would give NaN or Inf: the adapter is brok"):
        zp.merge_adapter(model)
    assert base_hash(model) == before and not layer.merged


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word:UserWarning")  # peft's own
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "live"])
@pytest.mark.parametrize(
    ("target", "other"), [("lm_head", "embed_tokens"), ("embed_tokens", "lm_head")]
)
def test_a_shared_weight_is_not_merged(frozen, target, other):
    model = quantized("llama-tied", frozen=frozen)
    wrapped = adapted(model, targets=[target])
    before, answers = base_hash(wrapped), outputs(wrapped)
    with pytest.raises(StateError, match=f"the weight is also that of .*{other}, which merging"):
        wrapped.merge_adapter()
    assert base_hash(wrapped) == before
    assert torch.equal(outputs(wrapped), answers)


# --- what is refused ---


@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
def test_initialisations_that_need_the_float_weight(init):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    config.init_lora_weights = init
    model = quantized()
    with pytest.raises(RecipeError, match=f"init_lora_weights='{init}' reads.*use True$"):
        peft.get_peft_model(model, config)
    config.init_lora_weights = "loftq"
    with pytest.raises(RecipeError, match=r"use True, then call zp.loftq_init\(model"):
        peft.get_peft_model(model, config)


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_variants(option):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], **{option: True})
    with pytest.raises(RecipeError, match=f"{option}=True is not supported.*zp.dequantize"):
        peft.get_peft_model(quantized(), config)
    wrapped = adapted(quantized(), targets=["q_proj"])
    with pytest.raises(RecipeError, match=f"{option}=True is not supported"):
        wrapped.add_adapter("second", config)


def test_a_quantized_weight_is_not_a_parameter_to_target():
    name = "model.layers.0.mlp.up_proj"
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=[f"{name}.weight"])
    with pytest.raises(RecipeError, match=f"names {name}.weight, which is quantized"):
        peft.get_peft_model(quantized(frozen=False), config)


# --- LoftQ ---


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@every_format
@torch.no_grad()
def test_loftq_starts_at_the_best_product_of_its_rank(weights, name):
    floats = build(name)
    model = adapted(quantized(copy.deepcopy(floats), weights), lora_alpha=7)
    before = base_hash(model)
    report = loftq_init(model, floats)
    assert base_hash(model) == before
    assert len(report) == len(lora_layers(model))
    for row in report:
        layer = model.get_base_model().get_submodule(row.name)
        base = layer.get_base_layer()
        weight = base.from_layout(floats.get_submodule(row.name).weight).double()
        error = weight - base.qweight.dequantize(torch.float64)
        singular = torch.linalg.svdvals(error)
        best = singular[row.rank :].norm()  # Eckart and Young
        left = (error - layer.get_delta_weight("default").double()).norm()
        assert row.rank == 4
        assert torch.isclose(left, best, rtol=1e-4, atol=1e-6 * float(weight.detach().norm()))
        assert left < error.norm()
        assert row.after == pytest.approx(float(left / weight.norm()), rel=1e-3, abs=1e-7)
        assert row.before == pytest.approx(float(error.norm() / weight.norm()), rel=1e-3)
    assert sum(r.after for r in report) < sum(r.before for r in report)


def test_loftq_brings_answers_nearer_to_the_float_model():
    floats = build("llama")
    wanted = outputs(floats)
    model = quantized(copy.deepcopy(floats), "int3")
    before = (outputs(model) - wanted).norm()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=32, target_modules="all-linear"))
    zp.loftq_init(wrapped, floats)
    assert (outputs(wrapped) - wanted).norm() < 0.8 * before


def test_loftq_reads_files_and_embeddings_and_any_rank(tmp_path):
    floats = build("llama-tied")
    floats.save_pretrained(tmp_path)
    model = quantized(copy.deepcopy(floats), "int2")
    with warnings.catch_warnings(record=True):
        config = peft.LoraConfig(r=100, target_modules=["k_proj", "embed_tokens"])
        wrapped = peft.get_peft_model(model, config)
    report = zp.loftq_init(wrapped, str(tmp_path))
    assert {r.name.rpartition(".")[2]: r.rank for r in report} == {"k_proj": 32, "embed_tokens": 64}
    assert all(r.after < 1e-4 < r.before for r in report)
    wrapped.eval()
    tokens = torch.arange(99)
    found = wrapped.get_base_model().model.embed_tokens(tokens)
    assert torch.allclose(found, floats.model.embed_tokens.weight, atol=1e-4)


def test_loftq_errors(tmp_path):
    floats = build("llama")
    with pytest.raises(StateError, match="no quantized layer has an adapter called 'default'"):
        loftq_init(quantized(), floats)
    model = adapted(quantized(), targets=["q_proj"])
    with pytest.raises(StateError, match="adapter called 'third'"):
        loftq_init(model, floats, adapter_name="third")
    with pytest.raises(SourceError, match="Perceptron has no model.layers.0.self_attn.q_proj.weig"):
        loftq_init(model, perceptron())
    other = build("llama")
    other.model.layers[0].self_attn.q_proj = nn.Linear(64, 32)
    with pytest.raises(SourceError, match=r"q_proj.weight is \(32, 64\) in the source.*\(64, 64\)"):
        loftq_init(model, other)
    model.merge_adapter()
    with pytest.raises(StateError, match="q_proj is merged; call model.unmerge_adapter"):
        loftq_init(model, floats)
    with pytest.raises(StateError, match="q_proj is live and has no codes yet; call zp.freeze"):
        loftq_init(adapted(quantized(frozen=False), targets=["q_proj"]), floats)
