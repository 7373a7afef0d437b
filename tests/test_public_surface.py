"""The public surface is a list, and importing it is cheap."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import zeropoint as zp
from zeropoint.errors import StateError, UnknownNameError
from zeropoint.integrations.spellings import SPELLINGS


def test_exported_names_are_pinned():
    assert sorted(zp.__all__) == [
        "Calibration",
        "CalibrationTable",
        "Comparison",
        "Footprint",
        "FusionReport",
        "HeadImportance",
        "Memory",
        "MergeReport",
        "Plan",
        "QTensor",
        "Recipe",
        "Report",
        "Rule",
        "Scheme",
        "Training",
        "TrainingReport",
        "ZeropointConfig",
        "ZeropointError",
        "__version__",
        "calibrate",
        "calibration_table",
        "compare",
        "compress",
        "dequantize",
        "finetune",
        "footprint",
        "formats",
        "freeze",
        "fuse",
        "head_importance",
        "load",
        "loftq_init",
        "memory",
        "merge_adapter",
        "numerics",
        "plan",
        "plot",
        "prune_heads",
        "quantize",
        "release",
        "resize_token_embeddings",
        "rotate",
        "save",
        "unfuse",
        "verify",
    ]


@pytest.mark.parametrize("name", zp.__all__)
def test_every_exported_name_resolves(name):
    assert getattr(zp, name) is not None
    assert name in dir(zp)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'zeropoint' has no attribute 'quantise'"):
        zp.quantise  # noqa: B018


@pytest.mark.parametrize("name", SPELLINGS)
def test_another_librarys_name_is_an_attribute_error_that_translates_it(name):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'; write ") as caught:
        getattr(zp, name)
    assert SPELLINGS[name] in str(caught.value)
    assert not hasattr(zp, name)


CALLED = {called for text in SPELLINGS.values() for called in re.findall(r"zp\.(\w+)", text)}


@pytest.mark.parametrize("name", sorted(CALLED))
def test_what_is_to_be_written_instead_exists(name):
    assert name in zp.__all__


@pytest.mark.parametrize("format", [t for t in SPELLINGS.values() if t.startswith("weights=")])
def test_formats_to_be_written_instead_exist(format):
    assert zp.Scheme.of(format.split("'")[1])


def test_quantize_translates_formats_of_other_libraries():
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    for name in ("qint8", SimpleNamespace(name="qint8")):
        with pytest.raises(UnknownNameError, match="is not a format; write weights='int8'"):
            zp.quantize(model, weights=name)


def test_calibration_is_not_the_context_of_optimum_quanto():
    with (
        pytest.raises(StateError, match=r"with zp.calibrate\(model\): model\(\*\*batch\)"),
        zp.Calibration(),
    ):
        pass
    with pytest.raises(StateError, match="holds the options of zp.freeze"):
        zp.Calibration(momentum=0.9)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tokenz'"):
        zp.Calibration(tokenz=1)
    assert zp.Calibration(tokens=8, window=4).tokens == 8


def test_a_translation_needs_neither_torch_nor_transformers():
    code = (
        "import sys, zeropoint as zp\n"
        "try: zp.quantize_\n"
        "except AttributeError as e: print(e, [m for m in ('torch', 'transformers') if m in "
        "sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "write zp.quantize(model" in shown.stdout
    assert shown.stdout.strip().endswith("[]")


@pytest.mark.parametrize("module", ["zeropoint", "zeropoint.cli"])
def test_import_loads_neither_torch_nor_transformers(module):
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
