"""The public surface is a list, and importing it is cheap."""

import subprocess
import sys

import pytest

import zeropoint as zp


def test_exported_names_are_pinned():
    assert sorted(zp.__all__) == [
        "Calibration",
        "CalibrationTable",
        "Comparison",
        "Footprint",
        "QTensor",
        "Recipe",
        "Report",
        "Rule",
        "Scheme",
        "ZeropointError",
        "__version__",
        "calibrate",
        "calibration_table",
        "compare",
        "dequantize",
        "footprint",
        "formats",
        "freeze",
        "load",
        "numerics",
        "quantize",
        "save",
        "verify",
    ]


@pytest.mark.parametrize("name", zp.__all__)
def test_every_exported_name_resolves(name):
    assert getattr(zp, name) is not None
    assert name in dir(zp)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'zeropoint' has no attribute 'quantise'"):
        zp.quantise  # noqa: B018


@pytest.mark.parametrize("module", ["zeropoint", "zeropoint.cli"])
def test_import_loads_neither_torch_nor_transformers(module):
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
