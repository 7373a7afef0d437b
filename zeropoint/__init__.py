"""zeropoint: make a pretrained model smaller and faster by quantization, and prove what it cost.

    real = scale * (codes - zero_point)

Everything here is loaded on first use, so that `import zeropoint` costs nothing and imports neither
torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from zeropoint._on_import import import_after

__version__ = "0.1.0"

__all__ = [
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

if TYPE_CHECKING:
    from zeropoint import numerics, plot
    from zeropoint.errors import ZeropointError
    from zeropoint.evaluate.compare import Comparison, compare
    from zeropoint.evaluate.footprint import Footprint, footprint
    from zeropoint.evaluate.memory import Memory, memory, release
    from zeropoint.evaluate.merging import MergeReport, merge_adapter
    from zeropoint.flows.activations import CalibrationTable, calibrate, calibration_table
    from zeropoint.flows.data import Calibration
    from zeropoint.flows.dequantize import dequantize
    from zeropoint.flows.fuse import FusionReport, fuse, unfuse
    from zeropoint.flows.heads import HeadImportance, head_importance
    from zeropoint.flows.plan import Plan, plan
    from zeropoint.flows.ptq import freeze, quantize
    from zeropoint.flows.qat import Training, finetune
    from zeropoint.flows.report import Report, TrainingReport
    from zeropoint.flows.rotate import rotate
    from zeropoint.flows.stream import compress
    from zeropoint.flows.verify import verify
    from zeropoint.integrations.config import ZeropointConfig
    from zeropoint.integrations.load import load
    from zeropoint.integrations.peft import loftq_init
    from zeropoint.model.embeddings import resize_token_embeddings
    from zeropoint.model.heads import prune_heads
    from zeropoint.model.save import save
    from zeropoint.numerics import formats
    from zeropoint.qtensor import QTensor
    from zeropoint.scheme import Recipe, Rule, Scheme

_HOMES = {
    "Calibration": "zeropoint.flows.data",
    "CalibrationTable": "zeropoint.flows.activations",
    "Comparison": "zeropoint.evaluate.compare",
    "Footprint": "zeropoint.evaluate.footprint",
    "FusionReport": "zeropoint.flows.fuse",
    "HeadImportance": "zeropoint.flows.heads",
    "Memory": "zeropoint.evaluate.memory",
    "MergeReport": "zeropoint.evaluate.merging",
    "Plan": "zeropoint.flows.plan",
    "QTensor": "zeropoint.qtensor",
    "Recipe": "zeropoint.scheme",
    "Report": "zeropoint.flows.report",
    "Rule": "zeropoint.scheme",
    "Scheme": "zeropoint.scheme",
    "Training": "zeropoint.flows.qat",
    "TrainingReport": "zeropoint.flows.report",
    "ZeropointConfig": "zeropoint.integrations.config",
    "ZeropointError": "zeropoint.errors",
    "calibrate": "zeropoint.flows.activations",
    "calibration_table": "zeropoint.flows.activations",
    "compare": "zeropoint.evaluate.compare",
    "compress": "zeropoint.flows.stream",
    "dequantize": "zeropoint.flows.dequantize",
    "finetune": "zeropoint.flows.qat",
    "footprint": "zeropoint.evaluate.footprint",
    "freeze": "zeropoint.flows.ptq",
    "fuse": "zeropoint.flows.fuse",
    "head_importance": "zeropoint.flows.heads",
    "load": "zeropoint.integrations.load",
    "loftq_init": "zeropoint.integrations.peft",
    "memory": "zeropoint.evaluate.memory",
    "merge_adapter": "zeropoint.evaluate.merging",
    "plan": "zeropoint.flows.plan",
    "prune_heads": "zeropoint.model.heads",
    "quantize": "zeropoint.flows.ptq",
    "release": "zeropoint.evaluate.memory",
    "resize_token_embeddings": "zeropoint.model.embeddings",
    "rotate": "zeropoint.flows.rotate",
    "save": "zeropoint.model.save",
    "unfuse": "zeropoint.flows.fuse",
    "verify": "zeropoint.flows.verify",
}
_MODULES = {
    "formats": "zeropoint.numerics.formats",
    "numerics": "zeropoint.numerics",
    "plot": "zeropoint.plot",
}

# So that transformers knows the method "zeropoint" wherever both libraries are imported.
import_after("transformers.quantizers.auto", "zeropoint.integrations.transformers")
# So that peft's LoRA knows quantized layers.
import_after("peft", "zeropoint.integrations.peft")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = importlib.import_module(_MODULES[name])
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'zeropoint' has no attribute {name!r}{_instead(name)}")
    globals()[name] = value
    return value


def _instead(name: str) -> str:
    """What to write instead of another library's name; nothing for other names."""
    if name.startswith("_"):
        return ""
    from zeropoint.integrations.spellings import SPELLINGS

    return f"; write {SPELLINGS[name]}" if name in SPELLINGS else ""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
