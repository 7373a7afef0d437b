from statistics import NormalDist
from typing import NamedTuple

import pytest
import torch

from tests.helpers import CODEBOOKS, DOWNCASTS, INTEGERS, SCALED, TABLES, has_units
from zeropoint.errors import UnknownNameError
from zeropoint.numerics import FORMATS, get_format
from zeropoint.numerics.formats import ELSEWHERE, FP4_LEVELS, NF4_LEVELS

ids = [f.name for f in FORMATS.values()]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=ids)
def test_a_row_is_found_by_its_name_and_has_what_its_kind_needs(fmt):
    assert get_format(fmt.name) is fmt
    assert (fmt.levels is not None) == (fmt.kind == "codebook" and not fmt.learns_levels)
    assert (fmt.dtype is not None) == (fmt.kind in ("float8", "downcast"))
    if fmt.dtype is not None:
        assert fmt.bits == 8 * fmt.dtype.itemsize
        assert fmt.real_max == torch.finfo(fmt.dtype).max
    assert (fmt.width > 1) == (fmt.largest is not None) == (fmt.kind == "vector")
    if fmt.kind != "integer":
        assert fmt.symmetric, "only integers have a zero point"
    if fmt.kind == "downcast":
        assert fmt.group_size is None, "a downcast has no scale to share"


def test_the_table_has_every_kind_and_the_integers_of_2_to_8_bits():
    kinds = {"integer", "codebook", "vector", "float8", "downcast"}
    assert {f.kind for f in FORMATS.values()} == kinds
    assert [f.bits for f in INTEGERS] == [2, 3, 4, 5, 6, 7, 8]
    assert [f.name for f in DOWNCASTS] == ["bfloat16", "float16"]
    assert len(SCALED) + len(DOWNCASTS) == len(FORMATS)


@pytest.mark.parametrize("fmt", INTEGERS, ids=lambda f: f.name)
def test_integer_codes_fill_twos_complement(fmt):
    assert fmt.q_min == -(2 ** (fmt.bits - 1))
    assert fmt.q_max - fmt.q_min + 1 == 2**fmt.bits
    assert fmt.real_max == fmt.q_max
    assert fmt.q_min >= -128 and fmt.q_max <= 127, "codes are int8"


def test_levels_are_learned_by_any4_alone():
    assert [f.name for f in FORMATS.values() if f.learns_levels] == ["any4"]
    assert [f for f in CODEBOOKS if f not in TABLES] == [get_format("any4")]
    assert get_format("any4").reach == (1.0, 1.0), "of values divided by the largest of their group"


@pytest.mark.parametrize("fmt", TABLES, ids=lambda f: f.name)
def test_a_codebook_has_a_level_per_code_and_reaches_to_both_sides(fmt):
    assert len(fmt.levels) == 2**fmt.bits
    below, above = fmt.reach
    assert min(fmt.levels) == -below < 0 < above == pytest.approx(max(fmt.levels), rel=2**-24)
    assert fmt.real_max == max(below, above) >= 1
    assert has_units(fmt) == (fmt.name != "iq4nl")


def test_iq4nl_levels_are_those_of_llama_cpp():
    # ggml-common.h, kvalues_iq4nl, in units of 1/127
    levels = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    assert [127 * level for level in get_format("iq4nl").levels] == pytest.approx(levels, abs=1e-12)


def test_nf4_levels_are_the_quantiles_of_qlora():
    # bitsandbytes, create_normal_map: offset = 1 - (1/30 + 1/32) / 2; 8 levels above 0, 7 below.
    offset = 0.9677083
    quantile = NormalDist().inv_cdf

    def upper(count):
        step = (offset - 0.5) / count
        return [quantile(offset - i * step) for i in range(count)]

    levels = sorted([-v for v in upper(7)] + [0.0] + upper(8))
    expected = [v / levels[-1] for v in levels]
    # bitsandbytes computed its table in float32 with a float32 linspace: 2e-7 of rounding.
    assert NF4_LEVELS == pytest.approx(expected, abs=2e-7)


def test_fp4_levels_follow_bitsandbytes_order():
    # kernels.cu, dQuantizeFP4: 0b0000 .. 0b0111, in units of 1/12; the high bit is the sign.
    magnitudes = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    assert FP4_LEVELS[:8] == pytest.approx([m / 12 for m in magnitudes], abs=0)
    assert FP4_LEVELS[8:] == tuple(-m for m in FP4_LEVELS[:8])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int9", r"'int9' is not a format; close: 'int\d'"),
        ("q", "'q' is not a format; known: 'int2', .*'float16'"),
        (None, "None is not a format; known: "),
    ],
)
def test_an_unknown_format_names_the_known_ones(name, message):
    with pytest.raises(UnknownNameError, match=message):
        get_format(name)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_another_librarys_name_is_refused_and_translated(name):
    with pytest.raises(UnknownNameError, match=f"^'{name}' is not a format; write weights='") as e:
        get_format(name)
    assert str(e.value).split("'")[3] in FORMATS
    assert name not in FORMATS


class QType(NamedTuple):
    """As optimum-quanto's."""

    name: str


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (QType("qint8"), r"QType\(name='qint8'\) is not a format; write weights='int8'"),
        (torch.int8, "torch.int8 is not a format; write weights='int8'"),
        (torch.bfloat16, "torch.bfloat16 is not a format; write weights='bfloat16'"),
        (torch.float8_e5m2, "write weights='float8_e5m2'"),
        (4, "4 is not a format; write weights='int4'"),
        ("NF4", "'NF4' is not a format; write weights='nf4'"),
        ("IQ4_NL", "'IQ4_NL' is not a format; write weights='iq4nl'"),
        ("Q8_0", "'Q8_0' is not a format; write weights='int8'"),
        ("w8a8", "write weights='int8', activations='int8'"),
        (torch.float32, "torch.float32 is not a format; known: "),
    ],
)
def test_objects_and_capitals_are_refused_and_translated(name, message):
    with pytest.raises(UnknownNameError, match=message):
        get_format(name)
