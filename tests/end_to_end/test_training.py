"""Live models under what people train with: Trainer, a plain loop, checkpointing, autocast, several
processes. The answer is always the same as without.
"""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
import transformers
from torch import distributed

import zeropoint as zp
from tests.helpers import in_child
from tests.models import llama
from zeropoint.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("torch_kernel")


def live(**options):
    torch.manual_seed(0)
    model = llama(tied=True)
    zp.quantize(model, **({"weights": "int4", "group_size": 32, "learned_scale": True} | options))
    return model


def rows(count=24, length=16):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 99, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def batch(count=4):
    ids = torch.stack([row["input_ids"] for row in rows()[:count]])
    return {"input_ids": ids, "labels": ids}


def state(model):
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


# --- Trainer --------------------------------------------------------------------------------------


def trainer(model, folder, steps=6, **options):
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return transformers.Trainer(model, arguments, train_dataset=rows())


def test_trainer_trains_saves_and_resumes_to_the_same_bits(tmp_path):
    model, before = live(), state(live())
    trainer(model, tmp_path).train()
    changed = {n for n, t in state(model).items() if not torch.equal(t, before[n])}
    assert {
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight_scale",
    } <= changed

    again = live()
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(state(again), state(model))

    ids = batch()["input_ids"]
    y = model(input_ids=ids).logits
    zp.freeze(model)
    bound = 1e-5 * y.abs().max().item()  # only the order of sums differs
    assert torch.allclose(model(input_ids=ids).logits, y, atol=bound, rtol=0)
    model.save_pretrained(tmp_path / "frozen")
    loaded, _ = zp.load(tmp_path / "frozen")
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_checkpoint_from_the_middle_is_not_mistaken_for_a_quantized_model(tmp_path):
    trainer(live(), tmp_path, steps=3).train()
    for load in (zp.load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(
            CheckpointError, match="float weights of a model that was being trained"
        ):
            load(tmp_path / "checkpoint-3")
    assert "being trained" in zp.verify(tmp_path / "checkpoint-3")[0]


# --- a plain loop ---------------------------------------------------------------------------------


def gradients(model, context=None):
    model.train()
    if context is None:
        model(**batch()).loss.backward()
    else:
        with context:
            loss = model(**batch()).loss
        loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing():
    expected = gradients(live(activations="int8"))
    model = live(activations="int8")
    model.gradient_checkpointing_enable()
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("learned", [True, None])
def test_autocast_multiplies_in_bfloat16_and_keeps_float32_parameters(learned):
    expected = gradients(live(learned_scale=learned))
    model = live(learned_scale=learned)
    found = gradients(model, torch.autocast("cpu", torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.model.layers[0].mlp.up_proj(torch.ones(1, 64)).dtype == torch.bfloat16
    assert {g.dtype for g in found.values()} == {torch.float32}
    for name, gradient in found.items():
        # bfloat16 keeps 8 bits, through some ten roundings one after the other.
        distance = (gradient - expected[name]).norm() / expected[name].norm()
        assert distance < 10 * 2**-8, name
        assert name.endswith("zero_point") or distance > 0 or "norm" in name


def test_a_state_and_its_optimizer_are_saved_and_resumed(tmp_path):
    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(**batch()).loss.backward()
            optimizer.step()

    model = live()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps(model, optimizer, 2)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "state.pt")
    steps(model, optimizer, 2)

    again = live()
    other = torch.optim.AdamW(again.parameters(), lr=1e-3)
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(loaded["model"])
    other.load_state_dict(loaded["optimizer"])
    steps(again, other, 2)
    assert_same(state(again), state(model))


# --- several processes ----------------------------------------------------------------------------


def _join(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=100),
    )


def _with_accelerate(say, rank, folder):
    """Two steps on two halves of every batch."""
    from accelerate import Accelerator

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true"}
    _join(rank, folder)
    accelerator = Accelerator(cpu=True)
    model = live()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert type(prepared).__name__ == "DistributedDataParallel"
    half = {n: t[2 * rank : 2 * rank + 2] for n, t in batch().items()}
    for _ in range(2):
        optimizer.zero_grad()
        accelerator.backward(prepared(**half).loss)
        optimizer.step()
    found = {n: t.numpy() for n, t in state(accelerator.unwrap_model(prepared)).items()}
    distributed.destroy_process_group()
    return found


def _with_fsdp(say, rank, folder):
    """The same, with every parameter in two shards."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    _join(rank, folder)
    mesh = distributed.init_device_mesh("cpu", (2,))
    model = live()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    half = {n: t[2 * rank : 2 * rank + 2] for n, t in batch().items()}
    for _ in range(2):
        optimizer.zero_grad()
        model(**half).loss.backward()
        optimizer.step()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    distributed.destroy_process_group()
    return {n: t.numpy() for n, t in whole.items()}


@pytest.mark.parametrize("run", [_with_accelerate, _with_fsdp])
def test_two_processes_train_as_one_does(tmp_path, run):
    from concurrent.futures import ThreadPoolExecutor

    expected = live()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        expected(**batch()).loss.backward()
        optimizer.step()
    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(lambda rank: in_child(run, rank, tmp_path), range(2)))
    wanted = state(expected)
    start = state(live())
    for name in ranks[0]:
        found = torch.from_numpy(ranks[0][name])
        # Gradients are summed in another order; a step is lr times them.
        moved = (wanted[name] - start[name]).abs().max()
        assert (found - wanted[name]).abs().max() <= 1e-3 * moved + 1e-7, name
    assert ranks[0].keys() == wanted.keys()
    model = live()
    model.load_state_dict({n: torch.from_numpy(a) for n, a in ranks[0].items()})
    zp.freeze(model)
