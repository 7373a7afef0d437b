"""THE table of number formats. To add one, add a row: everything else reads from here.

Integer and codebook formats store a code per value and a scale per block of values:

    integer:   real = scale * (code - zero_point)
    codebook:  real = scale * levels[code]      (levels of the format, or of the row of the weight)
    vector:    real = scale * codewords[codes]  (of 8 codes together, 8 values: `e8p`)
    float8:    real = scale * code            (the code is itself a small float)
    downcast:  real = code                    (no scale: bfloat16, float16)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from zeropoint.errors import UnknownNameError, nearest

Kind = Literal["integer", "codebook", "vector", "float8", "downcast"]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One number format.

    bits: storage bits of a code. kind: which of the equations above applies.
    levels: real values of the codes of a codebook, in code order; None where they are learned for
    each row of a weight. ties: the code of a value halfway between two levels: of the lower one, or
    the even one, as small floats with the sign in their highest bit round.
    width: how many codes side by side have a meaning together, and largest: the largest value among
    their meanings, of a vector format. dtype: the torch dtype of a float8 or downcast code.
    group_size: values that share a scale unless the user says otherwise; None means one scale per
    channel.
    scale_dtype: of the scales of groups, unless the user says otherwise; None means float16, and
    float32 for codebooks, as bitsandbytes has them. double_quant: scales of that dtype have a float
    of the tensor beside them (`numerics.tensor_scale`), unless the user says otherwise.
    symmetric: zero_point = 0 unless the user says otherwise. Always True for kinds without a zero
    point.
    """

    name: str
    bits: int
    kind: Kind
    levels: tuple[float, ...] | None = None
    ties: Literal["lower", "even"] = "lower"
    width: int = 1
    largest: float | None = None
    dtype: torch.dtype | None = None
    group_size: int | None = None
    scale_dtype: str | None = None
    double_quant: bool = False
    symmetric: bool = True

    @property
    def q_min(self) -> int:
        """Smallest code of an integer format: -2^(bits - 1)."""
        return -(1 << (self.bits - 1))

    @property
    def q_max(self) -> int:
        """Largest code of an integer format: 2^(bits - 1) - 1."""
        return (1 << (self.bits - 1)) - 1

    @property
    def learns_levels(self) -> bool:
        """Whether the levels are learned for each row of a weight, and stored with it."""
        return self.kind == "codebook" and self.levels is None

    @property
    def signed_scale(self) -> bool:
        """Whether the scale of a symmetric grid may be negative, which puts the one code more that
        there is below 0 on the side of the largest value. Of 256 codes one is nothing.
        """
        return self.kind == "integer" and self.bits <= 4

    @property
    def real_max(self) -> float:
        """Largest magnitude a code stands for at scale 1."""
        return max(self.reach)

    @cached_property
    def reach(self) -> tuple[float, float]:
        """How far the grid goes below and above 0 at scale 1. Integers: without q_min, which a
        symmetric grid does not use. Levels that are learned are those of values within [-1, 1].
        """
        if self.learns_levels:
            return 1.0, 1.0
        if self.largest is not None:
            return self.largest, self.largest
        if self.levels is not None:
            levels = torch.tensor(self.levels, dtype=torch.float32)
            return -levels.min().item(), levels.max().item()
        if self.kind == "integer":
            return float(self.q_max), float(self.q_max)
        assert self.dtype is not None
        largest = torch.finfo(self.dtype).max
        return largest, largest


# Appendix E of QLoRA, arXiv:2305.14314: quantiles of N(0, 1) with an exact zero, normalised to [-1,
# 1].
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# bitsandbytes' fp4 (sign, 2 exponent bits, 1 mantissa bit), in its code order; 0.0625 / 12 is its
# one subnormal.
_FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
FP4_LEVELS = _FP4_MAGNITUDES + tuple(0.0 - m for m in _FP4_MAGNITUDES)  # two zeros, no -0.0

# llama.cpp, ggml-common.h, kvalues_iq4nl. There is no zero, and more room below than above.
_IQ4NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
IQ4NL_LEVELS = tuple(level / 127 for level in _IQ4NL)


# E2M1 of OCP Microscaling Formats (MX) 1.0, table 5: sign, 2 exponent bits, 1 mantissa bit.
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_LEVELS = _E2M1_MAGNITUDES + tuple(-m for m in _E2M1_MAGNITUDES)


def _mx(name: str, element: torch.dtype) -> Format:
    return Format(
        name=name,
        bits=8,
        kind="float8",
        dtype=element,
        group_size=32,
        scale_dtype="float8_e8m0fnu",
    )


def _integer(bits: int, group_size: int | None) -> Format:
    return Format(
        name=f"int{bits}", bits=bits, kind="integer", group_size=group_size, symmetric=bits == 8
    )


_ROWS = (
    _integer(2, 32),
    _integer(3, 32),
    _integer(4, 32),
    _integer(5, 64),
    _integer(6, 64),
    _integer(7, 64),
    _integer(8, None),
    Format(name="nf4", bits=4, kind="codebook", levels=NF4_LEVELS, group_size=64),
    Format(name="fp4", bits=4, kind="codebook", levels=FP4_LEVELS, group_size=64),
    Format(
        name="iq4nl",
        bits=4,
        kind="codebook",
        levels=IQ4NL_LEVELS,
        group_size=32,
        scale_dtype="float16",
    ),
    Format(
        name="mxfp4",
        bits=4,
        kind="codebook",
        levels=E2M1_LEVELS,
        ties="even",
        group_size=32,
        scale_dtype="float8_e8m0fnu",
    ),
    Format(
        name="nvfp4",
        bits=4,
        kind="codebook",
        levels=E2M1_LEVELS,
        ties="even",
        group_size=16,
        scale_dtype="float8_e4m3fn",
        double_quant=True,
    ),
    Format(
        name="e8p",
        bits=2,
        kind="vector",
        width=8,
        largest=2.75,  # of numerics.e8p: 5/2 + 1/4
        group_size=64,
        scale_dtype="float16",
    ),
    Format(name="any4", bits=4, kind="codebook", group_size=64, scale_dtype="float16"),
    _mx("mxfp8_e4m3", torch.float8_e4m3fn),
    _mx("mxfp8_e5m2", torch.float8_e5m2),
    Format(name="float8_e4m3fn", bits=8, kind="float8", dtype=torch.float8_e4m3fn),
    Format(name="float8_e5m2", bits=8, kind="float8", dtype=torch.float8_e5m2),
    Format(name="bfloat16", bits=16, kind="downcast", dtype=torch.bfloat16),
    Format(name="float16", bits=16, kind="downcast", dtype=torch.float16),
)
FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}

_INT8_INPUTS = "int8', activations='int8"
ELSEWHERE = {
    # optimum-quanto
    "qint2": "int2",
    "qint4": "int4",
    "qint8": "int8",
    "qfloat8": "float8_e4m3fn",
    "qfloat8_e4m3fn": "float8_e4m3fn",
    "qfloat8_e5m2": "float8_e5m2",
    # torchao
    "int8_weight_only": "int8",
    "int4_weight_only": "int4",
    "float8_weight_only": "float8_e4m3fn",
    "int8_dynamic_activation_int8_weight": _INT8_INPUTS,
    "uint4": "int4",
    "uint8": "int8",
    # bitsandbytes, HQQ and others that count bits
    "llm_int8": _INT8_INPUTS,
    **{f"{bits}bit": f"int{bits}" for bits in (2, 3, 4, 8)},
    **{f"{bits}": f"int{bits}" for bits in (2, 3, 4, 5, 6, 8)},
    # llama.cpp
    "iq4_nl": "iq4nl",
    "iq4_xs": "iq4nl",
    **{f"q{bits}_0": f"int{bits}" for bits in (4, 5, 8)},
    **{f"q{bits}_k": f"int{bits}" for bits in (2, 3, 4, 5, 6)},
    "q4_k_m": "int4",
    "mxfp4_moe": "mxfp4",
    # llm-compressor
    "w8a8": _INT8_INPUTS,
    "w8a16": "int8",
    "w4a16": "int4",
    # SqueezeLLM, Core ML: a table of levels that is learned
    "squeezellm": "any4",
    "palettization": "any4",
    # QuIP#
    "e8p12": "e8p",
    "quip#": "e8p",
    # torchao, microxcaling, compressed-tensors
    "mxfp8": "mxfp8_e4m3",
    "mxfp8_e4m3fn": "mxfp8_e4m3",
    "fp4_e2m1": "mxfp4",
    "e2m1": "mxfp4",
    "nvfp4a16": "nvfp4",
    # short names of dtypes
    "fp8": "float8_e4m3fn",
    "float8": "float8_e4m3fn",
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}
"""What formats of other libraries are called here. Errors quote it; none of them is accepted."""

LEVELS_DTYPE = torch.float16
"""In what levels that are learned are stored."""

SCALE_DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
"""For scales of any format."""

SMALL_SCALE_DTYPES: dict[str, torch.dtype] = {
    "float8_e8m0fnu": torch.float8_e8m0fnu,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
"""For the formats that are specified with them (`microscaling`, `tensor_scale`)."""


def get_format(name: str) -> Format:
    """The row called `name`. Raises UnknownNameError with the name it has here, or the nearest."""
    if not isinstance(name, str) or name not in FORMATS:
        raise UnknownNameError(f"{name!r} is not a format; {_instead(name)}")
    return FORMATS[name]


def _instead(name: object) -> str:
    """What to write for an unknown name, or for an object that has a name: a dtype, a qtype."""
    plain = str(getattr(name, "name", name)).removeprefix("torch.").lower()
    known = plain if plain in FORMATS else ELSEWHERE.get(plain)
    return nearest(str(name), FORMATS) if known is None else f"write weights='{known}'"
