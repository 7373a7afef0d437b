"""A .gguf file: its configuration, and its weights one at a time. What transformers' own reader
does, without ever holding the float model, or the vocabulary as Python objects.
"""

from __future__ import annotations

import mmap
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zeropoint.errors import SourceError
from zeropoint.model.lazy_rows import LazyRows

# Architectures of GGUF whose tensors become those of transformers one by one. The others (experts
# that are stacked, files that transformers reads in another way) are loaded whole.
ONE_BY_ONE = ("TensorProcessor", "LlamaTensorProcessor", "NemotronTensorProcessor")
# Tables of a row per token, the largest tensors by far; transformers takes them as they are stored.
TABLES = ("token_embd.weight", "output.weight")
ROWS_AT_ONCE = 1024


def check_file(path: Path) -> None:
    """Raises SourceError for what is no .gguf file, and for one that was not written to its end."""
    from transformers.integrations.gguf.reader import GgufHeader

    try:
        header = GgufHeader.from_file(str(path))
    except (ArithmeticError, LookupError, TypeError, ValueError, struct.error) as e:
        raise SourceError(f"{path} cannot be read as a .gguf file: {e}") from e
    size = path.stat().st_size
    end = header.data_start + max((t.offset + t.nbytes for t in header.tensors), default=0)
    if size < end:
        raise SourceError(
            f"{path} ends after {size} bytes, but its tensors take {end}; download it again"
        )


def load_config(path: Path) -> Any:
    """The transformers configuration of the file.

    The same metadata and names of tensors without the vocabulary, which transformers would read
    into some 200,000 objects, are written to a file aside, and that is what transformers reads.
    Raises ValueError.
    """
    from gguf import GGUFWriter
    from transformers import AutoConfig
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf import read_gguf_metadata

    metadata, names = read_gguf_metadata(str(path))
    architecture = metadata["general.architecture"]
    vocabulary_size = f"{architecture}.vocab_size"
    if "tokenizer.ggml.tokens" in metadata:  # arrays of strings are read as their lengths
        metadata.setdefault(vocabulary_size, metadata["tokenizer.ggml.tokens"])
    known = GGUF_CONFIG_MAPPING.get(architecture, {})
    if "vocab_size" not in known or vocabulary_size not in metadata:
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with tempfile.TemporaryDirectory(prefix="zeropoint-") as folder:
        writer = GGUFWriter(Path(folder) / path.name, architecture)
        for key, value in metadata.items():
            if key != "general.architecture" and not _is_vocabulary(key, value):
                _write(writer, key, value)
        for name in names:
            writer.add_tensor(name, np.zeros(1, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        config = AutoConfig.from_pretrained(folder, gguf_file=path.name)
    config._name_or_path = str(path.parent)
    return config


def load_tokenizer(path: Path) -> Any:
    """The transformers tokenizer of the file, of the class that `AutoTokenizer` chooses; which, to
    choose it, reads the configuration with the vocabulary. Raises OSError, ValueError, KeyError.
    """
    from transformers import AutoTokenizer, TokenizersBackend
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    config = load_config(path)
    kind: Any = TOKENIZER_MAPPING.get(type(config), TokenizersBackend)
    by_configuration = not (path.parent / "tokenizer_config.json").is_file() and (
        getattr(config, "tokenizer_class", None) is None
    )
    if not by_configuration or kind is None or kind.__name__ == "MistralCommonBackend":
        kind = AutoTokenizer
    return kind.from_pretrained(path.parent, gguf_file=path.name)


def _is_vocabulary(key: str, value: Any) -> bool:
    """Arrays of a value per token or merge; those of strings are read as their lengths."""
    single = isinstance(value, bool | str | float) or key.endswith("_id")
    return key.startswith("tokenizer.") and not single


def _write(writer: Any, key: str, value: Any) -> None:
    """A value as transformers' reader returned it: whole numbers and floats of any size."""
    if isinstance(value, int) and not isinstance(value, bool):
        kind = "int64" if value < 0 else "uint64"
    else:
        kind = {bool: "bool", str: "string", float: "float64", list: "array"}[type(value)]
    getattr(writer, f"add_{kind}")(key, value)


class StoredTensor:
    """A tensor of the file, as safetensors hands out its own: read when it is indexed."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read

    def __getitem__(self, _: Any) -> Tensor:
        return self._read()


def lazy_state_dict(path: Path, model: nn.Module, config: Any) -> dict[str, StoredTensor] | None:
    """The file's tensors under the names of transformers; None when they have to be read at once.

    model: a skeleton on the meta device.
    """
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

    def stored(info: Any) -> StoredTensor:
        rows = _Rows(memory, header.data_start + info.offset, info)
        if info.name in TABLES:
            shape = (info.shape[0], info.shape[1])
            return StoredTensor(lambda: LazyRows(shape, torch.float32, rows.read, ROWS_AT_ONCE))

        def read() -> Tensor:
            values = rows.read(0, rows.count).view(info.shape).numpy()
            result = processor.process(weights=values, name=info.name)
            return torch.from_numpy(np.ascontiguousarray(result.weights))

        return StoredTensor(read)

    return {names[info.name]: stored(info) for info in header.tensors if info.name in names}


class _Rows:
    """A tensor's rows in the file, whose pages are dropped after reading.

    info: of the tensor, as transformers' header has it.
    """

    def __init__(self, memory: np.memmap[Any, Any], start: int, info: Any) -> None:
        from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

        self._memory = memory
        self._format = GGMLQuantizationType(info.ggml_type)
        stored = memory[start : start + info.nbytes]
        self._stored = stored.reshape(-1, quant_shape_to_byte_shape(info.shape, self._format)[-1])
        self._columns = info.shape[-1]
        self.count = len(self._stored)

    def read(self, first: int, end: int) -> Tensor:
        """(end - first, columns) float32."""
        from gguf import dequantize

        values = np.empty((end - first, self._columns), dtype=np.float32)
        for start in range(first, end, ROWS_AT_ONCE):  # `dequantize` holds its result twice
            stop = min(start + ROWS_AT_ONCE, end)
            rows = _as_stored(self._stored[start:stop], self._format)
            values[start - first : stop - first] = dequantize(rows, self._format)
        mapping: Any = getattr(self._memory, "_mmap", None)
        if hasattr(mmap, "MADV_DONTNEED") and mapping is not None:
            mapping.madvise(mmap.MADV_DONTNEED)
        return torch.from_numpy(values)


def _as_stored(data: Any, number: Any) -> Any:
    """Floats as floats: `gguf.dequantize` takes bytes only for its own formats."""
    floats = {"F32": np.float32, "F16": np.float16}
    return data.view(floats[number.name]) if number.name in floats else data
