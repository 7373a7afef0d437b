"""Quantized checkpoints of other libraries, checked as far as their format is known: which tensors
belong together, and the shapes they then have by `quantization_config`.

To add a format: a function from its settings to the parts of one weight, and a row in METHODS.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zeropoint.checkpoints.floats import Stored, read_headers
from zeropoint.checkpoints.native import QUANT_METHOD, read_config
from zeropoint.errors import CheckpointError
from zeropoint.progress import OnStep, no_progress

WORD = 32  # bits of the integers that GPTQ, AWQ and compressed-tensors pack codes into
FLOAT = (torch.float16, torch.bfloat16, torch.float32)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INT32, INT8, UINT8 = (torch.int32,), (torch.int8,), (torch.uint8,)
INDEX = (torch.int32, torch.int64)

Settings = Mapping[str, Any]
Tensors = Mapping[str, Stored]
NONSENSE = (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, RecursionError)
"""What settings and shapes that nobody meant make of the formulas below."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a tensor must be. shape: axes of size 1 do not count; None: any. dtypes: empty: any."""

    shape: tuple[int, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Beside:
    """The tensors whose names begin alike, by the rest of their names."""

    prefix: str
    stored: Tensors

    def __getitem__(self, suffix: str) -> Stored:
        return self.stored[self.prefix + suffix]

    def get(self, suffix: str) -> Stored | None:
        """The tensor, or None."""
        return self.stored.get(self.prefix + suffix)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a method stores a weight. mark: the end of the name by which one is known. parts: by the
    end of their names, of the tensors that are there and one of the settings.
    """

    mark: str
    parts: Callable[[Beside, Settings], dict[str, Part]]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What there is to say. files: of tensors. weights: quantized ones; tensors: all of them.
    checked, unchecked: what was looked at and what was not, in words. known: whether anybody here
    knows the method.
    """

    method: str
    known: bool
    problems: tuple[str, ...]
    checked: tuple[str, ...]
    unchecked: tuple[str, ...]
    files: int
    weights: int
    tensors: int


def method_of(path: Path) -> str | None:
    """The quant_method of another library that config.json names; None where it names none.

    Raises CheckpointError for a config.json that cannot be read.
    """
    if not (path / "config.json").is_file():
        return None
    quantization = read_config(path).get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    method = str(quantization.get("quant_method"))
    return None if method == QUANT_METHOD else method


def verify(path: Path, *, on_step: OnStep = no_progress) -> Found:
    """Everything that can be known to be wrong with another library's checkpoint.

    Files are mapped and one tensor is read at a time. Raises CheckpointError when config.json
    cannot be read.
    """
    config: Settings = read_config(path)["quantization_config"]
    method = str(config.get("quant_method"))
    known = METHODS.get(method, _Method())
    checked = ["index and headers", "every float is finite"]
    unchecked = ["codes: the format has no hashes", *known.unchecked(config)]
    problems: list[str] = []
    stored: Tensors = {}
    weights = 0
    try:
        stored = read_headers(path)
    except CheckpointError as e:
        problems.append(str(e))
    else:
        if known.layouts:
            checked.append("parts of each quantized weight, their shapes and dtypes")
            checked.append("no float twin of a quantized weight")
            weights, found = _weights(stored, config, known)
            problems += found
        problems += _floats(stored, on_step)
    return Found(
        method=method,
        known=method in METHODS,
        problems=tuple(problems),
        checked=tuple(checked),
        unchecked=tuple(unchecked),
        files=len({tensor.file for tensor in stored.values()}),
        weights=weights,
        tensors=len(stored),
    )


def _weights(stored: Tensors, config: Settings, known: _Method) -> tuple[int, list[str]]:
    """How many weights are quantized, and what is wrong with them."""
    try:
        settings = known.settings(config)
    except NONSENSE as e:
        return 0, [f"quantization_config makes no sense: {e!r}"]
    problems = []
    claimed: set[str] = set()
    marked = 0
    for layout in known.layouts:
        for name in stored:
            if name.endswith(layout.mark) and name not in claimed:
                marked += 1
                prefix = name.removesuffix(layout.mark)
                names, found = _weight(Beside(prefix=prefix, stored=stored), layout, settings)
                claimed |= names
                problems += found
    if not marked:
        marks = " or ".join(f"*{layout.mark}" for layout in known.layouts)
        problems.append(f"nothing is quantized: there is no tensor {marks}")
    for name, tensor in stored.items():
        alone = name.endswith(known.companions) or (
            name.endswith(".weight") and tensor.dtype not in (*FLOAT, torch.float64)
        )
        if alone and name not in claimed:
            problems.append(f"{name} belongs to a quantized weight of which the rest is missing")
    return marked, problems


def _weight(
    tensors: Beside, layout: Layout, settings: Sequence[Settings]
) -> tuple[set[str], list[str]]:
    """The names of a weight's tensors, and what is wrong by the settings that fit best."""
    mark = tensors.prefix + layout.mark
    names = {mark}
    tried: list[list[str]] = []
    for setting in settings:
        try:
            parts = layout.parts(tensors, setting)
        except NONSENSE as e:
            tried.append([f"{mark}: what belongs to it cannot be told by the settings: {e!r}"])
            continue
        names |= {tensors.prefix + suffix for suffix in parts}
        problems = list(_differences(parts, tensors))
        twin = tensors.get(".weight")
        if ".weight" not in parts and twin is not None and twin.dtype in FLOAT:
            problems.append(f"{twin.name} is a float twin of {mark}")
        tried.append(problems)
    if not tried:
        return names, [f"{mark}: quantization_config says nothing of weights"]
    return names, min(tried, key=len)


def _differences(parts: Mapping[str, Part], tensors: Beside) -> Iterator[str]:
    for suffix, part in parts.items():
        name, tensor = tensors.prefix + suffix, tensors.get(suffix)
        if tensor is None:
            if not part.optional:
                yield f"{name} is missing"
        elif part.dtypes and tensor.dtype not in part.dtypes:
            yield f"{name} is {tensor.dtype}, not {' or '.join(map(str, part.dtypes))}"
        elif part.shape is not None and _squeezed(tensor.shape) != _squeezed(part.shape):
            yield f"{name} is {tensor.shape}, but {part.shape} is needed"


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _floats(stored: Tensors, on_step: OnStep) -> Iterator[str]:
    for done, (name, tensor) in enumerate(stored.items()):
        on_step(name, done, len(stored))
        if tensor.dtype.is_floating_point and not bool(torch.isfinite(tensor.read().float()).all()):
            yield f"{name} holds NaN or Inf"


# --- the formats ---


def _groups(k: int, size: int) -> int:
    return 1 if size == -1 else math.ceil(k / size)


def _gptq(tensors: Beside, settings: Settings) -> dict[str, Part]:
    """(K * bits / 32, N) words; scales and packed zero points (G, N)."""
    bits, group_size = settings["bits"], settings["group_size"]
    rows, n = tensors[".qweight"].shape
    k = rows * WORD // bits
    groups = _groups(k, group_size)
    return {
        ".qweight": Part(dtypes=INT32),
        ".scales": Part(shape=(groups, n), dtypes=FLOAT),
        ".qzeros": Part(shape=(groups, math.ceil(n * bits / WORD)), dtypes=INT32),
        ".g_idx": Part(shape=(k,), dtypes=INDEX, optional=not settings.get("desc_act")),
    }


def _awq(tensors: Beside, settings: Settings) -> dict[str, Part]:
    """(K, N * bits / 32) words; scales and packed zero points (G, N). The "gemm" layout."""
    bits, group_size = settings["bits"], settings["group_size"]
    k, words = tensors[".qweight"].shape
    groups = _groups(k, group_size)
    return {
        ".qweight": Part(dtypes=INT32),
        ".scales": Part(shape=(groups, words * WORD // bits), dtypes=FLOAT),
        ".qzeros": Part(shape=(groups, words), dtypes=INT32),
    }


def _bitsandbytes_4bit(kind: str, tensors: Beside, settings: Settings) -> dict[str, Part]:
    """Two codes a byte, a scale for each block; the shape is in a JSON text of bytes."""
    text = tensors[f".weight.quant_state.bitsandbytes__{kind}"].read()
    state = json.loads(text.numpy().tobytes())
    elements = math.prod(state["shape"])
    blocks = math.ceil(elements / state["blocksize"])
    storage = getattr(torch, settings.get("bnb_4bit_quant_storage", "uint8"))
    parts = {
        f".weight.quant_state.bitsandbytes__{kind}": Part(dtypes=UINT8),
        ".weight": Part(
            shape=(math.ceil(elements / 2 / storage.itemsize),),
            dtypes=(storage,),
        ),
        ".weight.quant_map": Part(shape=(16,), dtypes=FLOAT),
        ".weight.absmax": Part(shape=(blocks,), dtypes=FLOAT),
    }
    if "nested_blocksize" in state:
        nested = math.ceil(blocks / state["nested_blocksize"])
        parts |= {
            ".weight.absmax": Part(shape=(blocks,), dtypes=UINT8),
            ".weight.nested_absmax": Part(shape=(nested,), dtypes=FLOAT),
            ".weight.nested_quant_map": Part(shape=(256,), dtypes=FLOAT),
        }
    return parts


def _bitsandbytes_8bit(tensors: Beside, settings: Settings) -> dict[str, Part]:
    """A byte for each weight, a scale for each row."""
    n, _ = tensors[".weight"].shape
    return {
        ".SCB": Part(shape=(n,), dtypes=FLOAT),
        ".weight": Part(dtypes=INT8),
        ".weight_format": Part(optional=True),
    }


def _blocks(weight: Stored, block: Sequence[int] | None) -> tuple[int, ...]:
    """Scales of blocks of rows and columns; one for all without blocks."""
    if block is None:
        return ()
    return tuple(math.ceil(size / b) for size, b in zip(weight.shape, block, strict=True))


def _fp8(tensors: Beside, settings: Settings) -> dict[str, Part]:
    """float8 weights, a float scale for each block."""
    shape = _blocks(tensors[".weight"], settings.get("weight_block_size"))
    return {
        ".weight_scale_inv": Part(shape=shape),
        ".weight": Part(dtypes=FLOAT8),
    }


def _fbgemm(tensors: Beside, settings: Settings) -> dict[str, Part]:
    """float8 weights, a float scale for each row."""
    n, _ = tensors[".weight"].shape
    return {".weight_scale": Part(shape=(n,), dtypes=FLOAT), ".weight": Part(dtypes=FLOAT8)}


def _packed(tensors: Beside, settings: Settings) -> dict[str, Part]:
    """compressed-tensors: integers in words, row by row; 4-bit floats in bytes."""
    bits = settings["num_bits"]
    n, width = tensors[".weight_packed"].shape
    if settings["type"] == "float":
        k = width * 8 // bits
        return {
            ".weight_packed": Part(dtypes=UINT8),
            ".weight_scale": Part(shape=(n, _groups(k, settings["group_size"]))),
            ".weight_global_scale": Part(shape=(), dtypes=FLOAT, optional=True),
        }
    rows, k = (int(size) for size in tensors[".weight_shape"].read())
    return {
        ".weight_packed": Part(shape=(rows, math.ceil(k / (WORD // bits))), dtypes=INT32),
        ".weight_shape": Part(shape=(2,), dtypes=INDEX),
        ".weight_scale": Part(shape=_scale_shape(rows, k, settings), dtypes=FLOAT),
        ".weight_zero_point": Part(optional=bool(settings.get("symmetric", True))),
        ".weight_g_idx": Part(shape=(k,), dtypes=INDEX, optional=True),
    }


def _plain(tensors: Beside, settings: Settings) -> dict[str, Part]:
    """compressed-tensors: a byte for each weight."""
    n, k = tensors[".weight"].shape
    return {
        ".weight_scale": Part(shape=_scale_shape(n, k, settings), dtypes=FLOAT),
        ".weight": Part(dtypes=INT8 if settings["type"] == "int" else FLOAT8),
        ".weight_zero_point": Part(optional=bool(settings.get("symmetric", True))),
    }


def _scale_shape(n: int, k: int, settings: Settings) -> tuple[int, ...]:
    """Of compressed-tensors' strategies. Raises KeyError for one that is not known."""
    shapes: dict[str, Callable[[], tuple[int, ...]]] = {
        "tensor": lambda: (),
        "channel": lambda: (n,),
        "group": lambda: (n, _groups(k, settings["group_size"])),
        "block": lambda: tuple(
            math.ceil(size / b) for size, b in zip((n, k), settings["block_structure"], strict=True)
        ),
    }
    return shapes[settings["strategy"]]()


def _mxfp4(tensors: Beside, settings: Settings) -> dict[str, Part]:
    """Blocks of 32 codes in 16 bytes, and an exponent for each."""
    *blocks, _ = tensors["_blocks"].shape
    return {
        "_blocks": Part(shape=(*blocks, 16), dtypes=UINT8),
        "_scales": Part(shape=tuple(blocks), dtypes=UINT8),
    }


def _itself(config: Settings) -> Sequence[Settings]:
    return (config,)


def _config_groups(config: Settings) -> Sequence[Settings]:
    groups = config.get("config_groups")
    if not isinstance(groups, dict):
        return ()
    return [group["weights"] for group in groups.values() if group.get("weights")]


def _all_of_it(config: Settings) -> tuple[str, ...]:
    return ()


def _only_gemm(config: Settings) -> tuple[str, ...]:
    version = str(config.get("version", "gemm")).lower()
    return () if version == "gemm" else (f"AWQ's layout {version!r}: read as gemm",)


def _unknown(config: Settings) -> tuple[str, ...]:
    return (
        f"quant_method {config.get('quant_method')!r} is not known: which tensors belong together, "
        "and their shapes",
    )


@dataclass(frozen=True, kw_only=True)
class _Method:
    """layouts: tried in order. settings: those a weight may be stored by. companions: ends of names
    that never stand alone. unchecked: what is not looked at.
    """

    layouts: tuple[Layout, ...] = ()
    settings: Callable[[Settings], Sequence[Settings]] = _itself
    companions: tuple[str, ...] = ()
    unchecked: Callable[[Settings], tuple[str, ...]] = _unknown


METHODS: dict[str, _Method] = {
    "gptq": _Method(
        layouts=(Layout(mark=".qweight", parts=_gptq),),
        companions=(".qzeros", ".scales", ".g_idx"),
        unchecked=_all_of_it,
    ),
    "awq": _Method(
        layouts=(Layout(mark=".qweight", parts=_awq),),
        companions=(".qzeros", ".scales"),
        unchecked=_only_gemm,
    ),
    "bitsandbytes": _Method(
        layouts=(
            *(
                Layout(
                    mark=f".weight.quant_state.bitsandbytes__{kind}",
                    parts=partial(_bitsandbytes_4bit, kind),
                )
                for kind in ("nf4", "fp4")
            ),
            Layout(mark=".SCB", parts=_bitsandbytes_8bit),
        ),
        companions=(".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"),
        unchecked=_all_of_it,
    ),
    "compressed-tensors": _Method(
        layouts=(
            Layout(mark=".weight_packed", parts=_packed),
            Layout(mark=".weight_scale", parts=_plain),
        ),
        settings=_config_groups,
        companions=(".weight_shape", ".weight_zero_point", ".weight_global_scale"),
        unchecked=_all_of_it,
    ),
    "fp8": _Method(layouts=(Layout(mark=".weight_scale_inv", parts=_fp8),), unchecked=_all_of_it),
    "fbgemm_fp8": _Method(
        layouts=(Layout(mark=".weight_scale", parts=_fbgemm),), unchecked=_all_of_it
    ),
    "mxfp4": _Method(
        layouts=(Layout(mark="_blocks", parts=_mxfp4),),
        companions=("_scales",),
        unchecked=_all_of_it,
    ),
}
