"""zeropoint registers itself in transformers, in whichever order the two are imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

import zeropoint as zp
from tests.models import build, outputs

LOAD = """
import sys, torch
from tests.models import outputs
{imports}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(outputs(model), sys.argv[2])
"""
OURS, THEIRS = "import zeropoint", "from transformers import AutoModelForCausalLM"


@pytest.mark.parametrize("order", [(OURS, THEIRS), (THEIRS, OURS)], ids=["ours", "theirs"])
def test_from_pretrained_knows_the_method(order, tmp_path):
    import torch

    model = build("llama")
    zp.quantize(model, "int4")
    zp.freeze(model)
    model.save_pretrained(tmp_path / "m")
    script = LOAD.format(imports="\n".join(order))
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "m", tmp_path / "out.pt"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "out.pt"), outputs(model))


def test_importing_zeropoint_imports_neither_library():
    script = (
        "import sys, zeropoint; loaded = {'torch', 'transformers'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_module_imported_by_name_later_has_its_own_loader():
    script = (
        "import sys, zeropoint, transformers.quantizers.auto as auto; "
        "assert type(auto.__loader__).__name__ == 'SourceFileLoader', auto.__loader__; "
        "assert 'zeropoint' in auto.AUTO_QUANTIZER_MAPPING; "
        "assert not [f for f in sys.meta_path if getattr(f, '_module', '') == auto.__name__]"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PEFT = """
import sys, importlib.util
{imports}
assert importlib.util.find_spec("peft")  # asking whether it is there, as transformers does
import zeropoint, peft
assert peft.PEFT_TYPE_TO_TUNER_MAPPING["LORA"].__module__ == "zeropoint.integrations.peft"
assert type(peft.__spec__.loader).__name__ == "SourceFileLoader"
assert not [f for f in sys.meta_path if type(f).__module__ == "zeropoint._on_import"
            and f._module == "peft"]
"""


@pytest.mark.parametrize("imports", ["import zeropoint", "import peft", "import zeropoint.cli"])
def test_peft_knows_our_layers(imports):
    done = subprocess.run(
        [sys.executable, "-c", PEFT.format(imports=imports)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
