"""Weights of a .gguf file, one at a time: what transformers' own reader does, without ever holding
the float model.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Architectures of GGUF whose tensors become those of transformers one by one. The others (experts
# that are stacked, files that transformers reads in another way) are loaded whole.
ONE_BY_ONE = ("TensorProcessor", "LlamaTensorProcessor", "NemotronTensorProcessor")
ROWS_AT_ONCE = 1024


class LazyTensor:
    """A tensor of the file, dequantized when it is indexed; its pages are dropped afterwards."""

    def __init__(
        self, memory: np.memmap[Any, Any], name: str, read: Callable[[], np.ndarray[Any, Any]]
    ) -> None:
        self._memory, self._read = memory, read
        self.name = name

    def __getitem__(self, _: Any) -> Tensor:
        values = torch.from_numpy(np.ascontiguousarray(self._read()))
        mapping: Any = getattr(self._memory, "_mmap", None)
        if hasattr(mmap, "MADV_DONTNEED") and mapping is not None:
            mapping.madvise(mmap.MADV_DONTNEED)
        return values


def lazy_state_dict(path: Path, model: nn.Module, config: Any) -> dict[str, LazyTensor] | None:
    """The file's tensors under the names of transformers; None when they have to be read at once.

    model: a skeleton on the meta device.
    """
    from gguf import GGMLQuantizationType, dequantize, quant_shape_to_byte_shape
    from transformers.integrations.gguf.reader import GgufHeader
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    header = GgufHeader.from_file(str(path))
    kind = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
    if kind.__name__ not in ONE_BY_ONE:
        return None
    processor = kind(config=config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    memory = np.memmap(path, mode="r", dtype=np.uint8)

    def reader(info: Any) -> Callable[[], np.ndarray[Any, Any]]:
        def read() -> np.ndarray[Any, Any]:
            start = header.data_start + info.offset
            stored = memory[start : start + info.nbytes]
            number = GGMLQuantizationType(info.ggml_type)
            rows = stored.reshape(-1, quant_shape_to_byte_shape(info.shape, number)[-1])
            values = np.empty(info.shape, dtype=np.float32)
            flat = values.reshape(len(rows), -1)
            for start in range(0, len(rows), ROWS_AT_ONCE):  # `dequantize` holds its result twice
                part = slice(start, start + ROWS_AT_ONCE)
                flat[part] = dequantize(_as_stored(rows[part], number), number)
            result = processor.process(weights=values, name=info.name)
            return np.asarray(result.weights)

        return read

    return {
        names[info.name]: LazyTensor(memory, info.name, reader(info))
        for info in header.tensors
        if info.name in names
    }


def _as_stored(data: Any, number: Any) -> Any:
    """Floats as floats: `gguf.dequantize` takes bytes only for its own formats."""
    floats = {"F32": np.float32, "F16": np.float16}
    return data.view(floats[number.name]) if number.name in floats else data
