"""What it takes to load a model, each way in a process of its own."""

from __future__ import annotations

import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers

from tests.models import build
from zeropoint.errors import SourceError, UnknownNameError
from zeropoint.evaluate import loading
from zeropoint.evaluate.loading import LOADS, Loading, Loadings, bench_loading

# What the model's classes and the libraries add to a process beside the weights: 14.1 to 14.3 MB in
# 8 runs; twice that for other versions and machines.
BESIDE = 30e6


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a float32 model of 162 MB, 70 % of it linear layers, with a tied head."""
    folder = tmp_path_factory.mktemp("big")
    config = transformers.LlamaConfig(
        vocab_size=16000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rows_of(found: Loadings) -> dict[str, Loading]:
    assert all(row.refused is None for row in found.rows), found
    return {row.loaded_as: row for row in found.rows}


def check(row: Loading, tensor_bytes: float) -> None:
    """The process has grown by the tensors and little else."""
    assert row.tensor_bytes == pytest.approx(tensor_bytes, rel=0.03)
    assert row.resident_bytes is not None and row.peak_bytes is not None
    assert 0.97 * tensor_bytes < row.resident_bytes < tensor_bytes + BESIDE
    assert row.resident_bytes <= row.peak_bytes
    assert row.seconds is not None and row.seconds > 0


def test_float_rows_say_what_the_weights_take(big: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    found = bench_loading(
        str(big),
        kinds=("float32", "bfloat16"),
        threads=1,
        on_step=lambda *step: steps.append(step),
    )
    weights = sum(f.stat().st_size for f in big.glob("*.safetensors"))
    rows = rows_of(found)
    assert steps == [("float32", 0, 2), ("bfloat16", 1, 2), ("", 2, 2)]
    check(rows["float32"], weights)
    check(rows["bfloat16"], weights / 2)
    assert rows["float32"].peak_bytes < 1.1 * weights + BESIDE
    assert 150e6 < found.idle_bytes < 900e6
    assert found.to_dict() == {
        "idle_bytes": found.idle_bytes,
        "rows": [asdict(rows["float32"]), asdict(rows["bfloat16"])],
    }


def test_quantized_rows_take_their_share_and_never_the_float_model(big: Path) -> None:
    weights = sum(f.stat().st_size for f in big.glob("*.safetensors"))
    rows = rows_of(bench_loading(str(big), kinds=("int8", "nf4", "int4"), threads=1))
    linears = 1 - 16000 * 768 * 4 / weights
    for kind, bits in (("int8", 8), ("nf4", 4.5), ("int4", 4.75)):
        check(rows[kind], weights * (linears * bits + (1 - linears) * 8) / 32)
        assert rows[kind].peak_bytes < weights


def test_the_ways_are_pinned() -> None:
    assert list(LOADS) == ["float32", "bfloat16", "int8", "nf4", "int4"]


def test_a_source_that_cannot_be_found_is_the_error_of_load() -> None:
    with pytest.raises(SourceError, match="'./nowhere' does not exist"):
        bench_loading("./nowhere", kinds=("float32",))


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="'int9' is not a way to load; close: 'int8'"):
        bench_loading("./nowhere", kinds=("int9",))


@pytest.mark.parametrize(
    ("returncode", "stderr", "reason"),
    [
        (-9, "", "the process ended by SIGKILL, as it does when memory runs out"),
        (-11, "x", "the process ended by SIGSEGV"),
        (1, "Traceback\nMemoryError: no\n", "MemoryError: no"),
        (3, "", "exit code 3"),
    ],
)
def test_a_row_that_kills_its_process_says_how(
    monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str, reason: str
) -> None:
    good = '{"idle_bytes": 5, "row": {"resident_bytes": 1, "peak_bytes": 2, "seconds": 3.0}}\n'
    ends = iter([(returncode, "", stderr), (0, f"noise\n{good}", "")])
    monkeypatch.setattr(
        loading.subprocess, "run", lambda run, **_: subprocess.CompletedProcess(run, *next(ends))
    )
    found = bench_loading("x", kinds=("float32", "int8"))
    assert found.rows[0] == Loading(loaded_as="float32", refused=reason)
    assert found.rows[1].peak_bytes == 2 and found.idle_bytes == 5


def test_reading_touches_every_tensor_and_changes_none() -> None:
    model = build("llama-tied")
    model.register_buffer("odd", torch.arange(10.0)[::2])
    model.register_buffer("none", torch.empty(0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loading.read(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
