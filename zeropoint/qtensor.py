"""QTensor: a quantized weight as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from zeropoint.errors import CheckpointError, GroupSizeError
from zeropoint.numerics import (
    LEVELS_DTYPE,
    Grid,
    Quantized,
    blocked,
    dequantize,
    get_scale_dtype,
    grid_codes,
    in_units,
    pack,
    quantize,
    rows_and_columns,
    scale_shape,
    tensor_scale,
    unpack,
)
from zeropoint.numerics.packing import row_bytes
from zeropoint.scheme import Scheme

PARTS = {"": "packed", "_scale": "scale", "_zero_point": "zero_point", "_levels": "levels"}
"""The tensors of a weight: the suffix each has beside the weight's name, and its field."""


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class QTensor:
    """Codes, scales and zero points of one weight. real = scale * (codes - zero_point).

    packed: (N * row_bytes,) uint8, rows one after the other, low bits first (`numerics.packing`);
    integer codes are
        stored as code - q_min. A downcast is stored as it is: shape `shape`, bfloat16 or float16.
    scale: (R, G) of scheme.scale_dtype; with scheme.double_quant the bytes that
    `numerics.two_level` stores; None for a downcast. zero_point: (R, G) int8, float16 with
    scheme.float_zero_point, or None when symmetric. levels: (R, 2^bits) float16, ascending, where
    the format learns them: real = scale * levels[codes].
    shape: of the weight. dtype: what `dequantize()` returns, the dtype the weight had.
    """

    packed: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    levels: Tensor | None = None
    scheme: Scheme
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def from_parts(
        cls,
        parts: Mapping[str, Tensor | None],
        *,
        scheme: Scheme,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> QTensor:
        """A weight from its parts by suffix, as `QTensor.parts` names them."""
        packed = parts[""]
        assert packed is not None
        return cls(
            packed=packed,
            scale=parts.get("_scale"),
            zero_point=parts.get("_zero_point"),
            levels=parts.get("_levels"),
            scheme=scheme,
            shape=torch.Size(shape),
            dtype=dtype,
        )

    @classmethod
    def from_codes(cls, quantized: Quantized, scheme: Scheme, dtype: torch.dtype) -> QTensor:
        """Pack what `numerics.quantize` returned; the scales too where the scheme says so."""
        codes = quantized.codes
        fmt = scheme.fmt
        if fmt.kind == "downcast":
            packed = codes
        elif fmt.kind == "float8":
            packed = codes.reshape(-1).view(torch.uint8)
        else:
            integer = fmt.kind == "integer"
            unsigned = codes.view(torch.uint8) + -fmt.q_min if integer else codes  # wraps around
            packed = pack(unsigned.reshape(rows_and_columns(codes.shape)), fmt.bits).view(-1)
        scale = quantized.scale
        if scheme.double_quant:
            assert scale is not None
            scale = scheme.coding.compress(scale)
        return cls(
            packed=packed.contiguous(),
            scale=scale,
            zero_point=quantized.zero_point,
            levels=quantized.levels,
            scheme=scheme,
            shape=codes.shape,
            dtype=dtype,
        )

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales and zero points included, per weight."""
        return 8 * self.nbytes / max(1, self.shape.numel())

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors that exist, by the suffix they have beside the weight's name, as in PARTS."""
        parts = {suffix: getattr(self, field) for suffix, field in PARTS.items()}
        return {suffix: part for suffix, part in parts.items() if part is not None}

    @property
    def scales(self) -> Tensor | None:
        """The scales as numbers, (R, G) float, whichever way they are stored."""
        if self.scale is None or not self.scheme.double_quant:
            return self.scale
        return self.scheme.coding.expand(self.scale, self._scale_shape)

    @property
    def grid(self) -> Grid:
        """What gives codes their values, scales as numbers. Not of a downcast, which has none."""
        assert self.scales is not None
        return Grid(self.scales, self.zero_point, self.levels)

    @property
    def _scale_shape(self) -> tuple[int, int]:
        return scale_shape(self.shape, self.scheme.granularity, self.scheme.group_size)

    def with_scheme(self, scheme: Scheme, unit: Tensor | None = None) -> QTensor:
        """The same codes under a scheme that differs in how they are used, or in storing the scales
        in 8 bits. unit: what `numerics.in_units` divided the weight by.
        """
        scale = self.scale
        if scheme.double_quant and not self.scheme.double_quant:
            assert scale is not None
            if unit is None:
                scale = scheme.coding.compress(scale)
            else:
                scale = tensor_scale.compress(scale, unit)
        return replace(self, scheme=scheme, scale=scale)

    @property
    def codes(self) -> Tensor:
        """Unpacked codes, of shape `shape`: int8, uint8 (codebook, vector), float8, or the downcast
        itself.
        """
        fmt = self.scheme.fmt
        if fmt.kind == "downcast":
            return self.packed
        if fmt.kind == "float8":
            assert fmt.dtype is not None
            return self.packed.view(fmt.dtype).view(self.shape)
        n, k = rows_and_columns(self.shape)
        rows = self.packed.view(n, row_bytes(k, fmt.bits))
        codes = unpack(rows, fmt.bits, k).reshape(self.shape)
        if fmt.kind == "integer":
            codes = codes.sub_(-fmt.q_min).view(torch.int8)  # wraps around as two's complement
        return codes

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """real = scale * (codes - zero_point), computed in float32.

        Returns `shape`, in `dtype` or self.dtype.
        """
        if self.scheme.fmt.kind == "downcast":
            return self.packed.to(dtype or self.dtype)
        parts = (self.codes, self.scales, self.zero_point, self.levels)
        real = dequantize(*parts, self.scheme.format)
        return real.to(dtype or self.dtype)

    def rows(self, indices: Tensor) -> QTensor:
        """The rows `indices` (1-D, int) of a 2-D weight, without unpacking the others."""
        n, _ = self.shape
        scale, zero_point, levels = (
            part if part is None or self.scheme.granularity == "tensor" else part[indices]
            for part in (self.scales, self.zero_point, self.levels)
        )
        packed = self.packed.view(n, -1)[indices]
        return replace(
            self,
            packed=packed if self.scheme.fmt.kind == "downcast" else packed.view(-1),
            scale=scale,
            zero_point=zero_point,
            levels=levels,
            scheme=self.scheme.with_float_scales,
            shape=torch.Size((len(indices), self.shape[1])),
        )

    def first_rows(self, n: int) -> QTensor:
        """The first n rows of a 2-D weight, stored as they are: scales in 8 bits stay so."""
        rows = self.rows(torch.arange(n, device=self.device))
        if not self.scheme.double_quant:
            return rows
        assert self.scale is not None and rows.scale is not None
        stored = self.scale[: self.scheme.coding.stored_bytes(rows.scale.numel())].clone()
        return replace(rows, scale=stored, scheme=self.scheme)

    def with_rows(self, values: Tensor) -> QTensor:
        """The rows of this 2-D weight, bit for bit, and after them `values` by the same scheme.

        values: (M, K) float. They are rounded to nearest on grids of their own; with a scale per
        tensor on this one's, and cut off beyond its range. Of scales in 8 bits see `extend` of
        `numerics.double_quant` and `tensor_scale`. Raises NonFiniteError, ScaleRangeError.
        """
        scheme, plain = self.scheme, self.scheme.with_float_scales
        new = quantized(values, plain)
        shape = torch.Size((self.shape[0] + len(values), self.shape[1]))
        parts = self.parts
        if scheme.granularity == "tensor" or scheme.double_quant:
            assert self.scale is not None and new.scale is not None
            if scheme.double_quant:
                parts["_scale"] = scheme.coding.extend(
                    self.scale, math.prod(self._scale_shape), new.scale
                )
            grown = replace(self, scale=parts["_scale"], shape=shape)
            assert grown.scales is not None
            scale = grown.scales[-len(new.scale) :]
            blocks = blocked(values, scheme.granularity, scheme.group_size)
            grid = Grid(scale, self.zero_point, self.levels)
            if scheme.granularity != "tensor" and new.levels is not None:
                assert self.levels is not None
                grid = grid._replace(levels=new.levels)
                grown = replace(grown, levels=torch.cat([self.levels, new.levels]))
            codes = grid_codes(blocks, grid, scheme.fmt).view(values.shape)
            tail = QTensor.from_codes(Quantized(codes, scale, None), plain, self.dtype)
            return replace(grown, packed=torch.cat([self.packed, tail.packed]))
        return QTensor.concatenate([self, QTensor.from_codes(new, scheme, self.dtype)])

    def columns(self, indices: Tensor) -> QTensor:
        """The columns `indices` (1-D, int) of a 2-D weight. Every code keeps its scale.

        Where whole groups are not kept, groups get smaller: to the largest size at which each has
        one scale. Scales in 8 bits become floats. Nothing is rounded again. Codes that have a
        meaning together stay together. Raises GroupSizeError where they would not.
        """
        scheme = self.scheme.with_float_scales
        _check_together(indices, scheme.fmt.width)
        if scheme.fmt.kind == "downcast":
            return replace(
                self,
                packed=self.packed[:, indices].contiguous(),
                shape=torch.Size((self.shape[0], len(indices))),
            )
        scale, zero_point = self.scales, self.zero_point
        if scheme.group_size is not None:
            size, groups = _regrouped(indices // scheme.group_size, scheme.group_size)
            scheme = replace(scheme, group_size=size)
            scale = None if scale is None else scale[:, groups]
            zero_point = None if zero_point is None else zero_point[:, groups]
        quantized = Quantized(self.codes[:, indices], scale, zero_point, self.levels)
        return QTensor.from_codes(quantized, scheme, self.dtype)

    @staticmethod
    def concatenate(parts: Sequence[QTensor]) -> QTensor:
        """The rows of several 2-D weights of one scheme, one after the other.

        Not for a scale per tensor, nor for scales in 8 bits: those blocks cross rows.
        """
        first = parts[0]
        scheme = first.scheme
        assert scheme.granularity != "tensor" and not scheme.double_quant, scheme
        assert all(part.scheme == scheme and part.shape[1:] == first.shape[1:] for part in parts)
        return QTensor.from_parts(
            {suffix: torch.cat([part.parts[suffix] for part in parts]) for suffix in first.parts},
            scheme=scheme,
            shape=(sum(part.shape[0] for part in parts), *first.shape[1:]),
            dtype=first.dtype,
        )

    def to(self, device: torch.device | str) -> QTensor:
        """The same weight on another device."""
        return QTensor.from_parts(
            {suffix: part.to(device) for suffix, part in self.parts.items()},
            scheme=self.scheme,
            shape=self.shape,
            dtype=self.dtype,
        )

    def __getattr__(self, name: str) -> NoReturn:
        """Called for what a QTensor does not have; transformers asks for the size to resize."""
        remedy = "take .dequantize()"
        if name == "size":
            remedy += ", or for another number of tokens zp.resize_token_embeddings(model, n)"
        raise AttributeError(f"a QTensor is no torch.Tensor and has no {name!r}; {remedy}")

    def __repr__(self) -> str:
        lines = [
            f"QTensor({self.scheme}, shape={tuple(self.shape)}, "
            f"{self.bits_per_weight:.2f} bits per weight, dtype={self.dtype}, device={self.device}"
        ]
        if self.device.type != "meta":
            for name, part in (
                ("codes", self.codes),
                ("scale", self.scales),
                ("zero_point", self.zero_point),
                ("levels", self.levels),
            ):
                if part is not None:
                    lines.append(f"  {name}={_indented(part, len(name) + 3)}")
        return ",\n".join(lines) + ")"


def quantized(values: Tensor, scheme: Scheme) -> Quantized:
    """`numerics.quantize` as a scheme says, its double_quant apart. values: (N, K) float."""
    return quantize(
        values,
        scheme.format,
        granularity=scheme.granularity,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        float_zero_point=scheme.float_zero_point,
        scale_dtype=scheme.scale_dtype,
    )


def weight_in_units(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """`numerics.in_units` as a scheme says."""
    return in_units(weight, scheme.format, scheme.scale_dtype, scheme.double_quant)


def _indented(part: Tensor, width: int) -> str:
    return repr(part).replace("\n", "\n" + " " * width)


def _check_together(columns: Tensor, width: int) -> None:
    """Raises GroupSizeError where columns are not runs of `width` from multiples of it. (K,) int"""
    columns = columns.long()
    count = len(columns) // width
    starts = columns[: count * width : width] // width * width
    runs = starts.unsqueeze(1) + torch.arange(width, device=columns.device)
    if not torch.equal(runs.flatten(), columns):
        raise GroupSizeError(
            f"these {len(columns)} columns are not runs of {width} from multiples of {width}, and "
            f"the format's codes stand for {width} values together; take them so, or dequantize"
        )


def _regrouped(groups: Tensor, largest: int) -> tuple[int, Tensor]:
    """The largest size at which consecutive columns come from one group, and that group for each.

    groups: (K,) int, the group that each column comes from. Returns size, (K // size,).
    """
    for size in range(largest, 0, -1):
        if len(groups) % size == 0:
            blocks = groups.view(-1, size)
            if (blocks == blocks[:, :1]).all():
                return size, blocks[:, 0]
    raise AssertionError("blocks of one column come from one group")


def part_specs(
    shape: Sequence[int], scheme: Scheme
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype that each part of a weight of this shape must have, by suffix as in
    `QTensor.parts`.
    """
    fmt = scheme.fmt
    n, k = rows_and_columns(shape)
    if fmt.kind == "downcast":
        assert fmt.dtype is not None
        return {"": (tuple(shape), fmt.dtype)}
    blocks = scale_shape(shape, scheme.granularity, scheme.group_size, fmt.width)
    specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "": ((n * row_bytes(k, fmt.bits),), torch.uint8),
        "_scale": (blocks, get_scale_dtype(scheme.scale_dtype)),
    }
    if scheme.double_quant:
        specs["_scale"] = ((scheme.coding.stored_bytes(math.prod(blocks)),), torch.uint8)
    if scheme.zero_point_dtype is not None:
        specs["_zero_point"] = (blocks, scheme.zero_point_dtype)
    if fmt.learns_levels:
        specs["_levels"] = ((blocks[0], 1 << fmt.bits), LEVELS_DTYPE)
    return specs


def empty(shape: Sequence[int], scheme: Scheme, dtype: torch.dtype) -> QTensor:
    """A weight on the meta device: the shapes and dtypes of its parts, without values."""
    parts = {
        suffix: torch.empty(part_shape, dtype=part_dtype, device="meta")
        for suffix, (part_shape, part_dtype) in part_specs(shape, scheme).items()
    }
    return QTensor.from_parts(parts, scheme=scheme, shape=shape, dtype=dtype)


def check_parts(name: str, parts: dict[str, Tensor], shape: Sequence[int], scheme: Scheme) -> None:
    """Raises CheckpointError when a part is missing, extra, or not of the shape and dtype it must
    have.
    """
    specs = part_specs(shape, scheme)
    for suffix in dict.fromkeys((*specs, *parts)):
        if suffix not in parts:
            raise CheckpointError(f"{name}{suffix} is missing; {scheme} needs it")
        if suffix not in specs:
            raise CheckpointError(f"{name}{suffix} is there, but {scheme} has no such part")
        want_shape, want_dtype = specs[suffix]
        part = parts[suffix]
        if tuple(part.shape) != want_shape or part.dtype != want_dtype:
            raise CheckpointError(
                f"{name}{suffix} is {tuple(part.shape)} {part.dtype}, but {scheme} of shape "
                f"{tuple(shape)} "
                f"needs {want_shape} {want_dtype}"
            )
