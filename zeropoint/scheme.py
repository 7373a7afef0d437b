"""How one weight is stored (`Scheme`), and which weights get which scheme (`Recipe`)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from zeropoint.errors import RecipeError, UnknownNameError, nearest
from zeropoint.numerics import (
    FORMATS,
    LEVELS_DTYPE,
    Format,
    get_format,
    get_scale_dtype,
    rows_and_columns,
    scale_shape,
)
from zeropoint.numerics.formats import SMALL_SCALE_DTYPES
from zeropoint.numerics.granularity import GRANULARITIES, Granularity
from zeropoint.numerics.packing import row_bytes
from zeropoint.numerics.two_level import CODINGS, Coding

ACTIVATIONS = ("int8", "float8_e4m3fn", "float8_e5m2")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
PER_CHANNEL = -1  # group_size=-1, the field's spelling of "one scale per output channel"

Role = Literal["linear", "embedding", "head"]
ROLES: tuple[Role, ...] = ("linear", "embedding", "head")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Format + granularity + symmetric or not + scale dtype: how one weight is stored and computed.

    format: a name of `zeropoint.numerics.FORMATS`. granularity: "tensor", "channel" (axis 0) or
    "group".
    group_size: values along K that share a scale, for "group" only. symmetric: zero_point = 0.
    float_zero_point: it is a float16, in code units, in place of an int8; integer formats that are
    not symmetric only. Then 0 need not be on the grid, which spans the values alone.
    scale_dtype: "float32", "float16" or "bfloat16", or that of the format; codes are chosen against
    the scale rounded to it.
    double_quant: codebooks only; the scales of groups are stored in 8 bits themselves
    (`numerics.two_level`): as bitsandbytes does those of float32, as NVFP4 those of float8_e4m3fn.
    activations: None (inputs stay float), or "int8", "float8_e4m3fn", "float8_e5m2": the input of a
    linear layer is rounded before it is multiplied, each token with its own scale, or the whole
    tensor with the range that `zp.calibrate` has seen.
    outlier_threshold: input channels in which any |x| reaches it stay float, the others are int8
    (LLM.int8(), arXiv:2208.07339); for activations="int8" only.
    compute_dtype: a linear layer's input is cast to it, and its output back; None leaves it alone.
    learned_scale: while live, the scales and zero points are parameters, trained with the weights
    (LSQ, arXiv:1902.08153); of a frozen weight it says nothing.
    Raises UnknownNameError, RecipeError. `Scheme.of` fills in the format's defaults.
    """

    format: str
    granularity: Granularity = "channel"
    group_size: int | None = None
    symmetric: bool = True
    float_zero_point: bool = False
    scale_dtype: str = "float32"
    double_quant: bool = False
    activations: str | None = None
    outlier_threshold: float | None = None
    compute_dtype: str | None = None
    learned_scale: bool = False

    def __post_init__(self) -> None:
        fmt = get_format(self.format)
        get_scale_dtype(self.scale_dtype)
        if self.granularity not in GRANULARITIES:
            raise UnknownNameError(
                f"granularity={self.granularity!r} is unknown; "
                f"{nearest(str(self.granularity), GRANULARITIES)}"
            )
        if not isinstance(self.symmetric, bool):
            raise RecipeError(f"symmetric={self.symmetric!r} is not true or false")
        for field, known in (("activations", ACTIVATIONS), ("compute_dtype", COMPUTE_DTYPES)):
            value = getattr(self, field)
            if value is not None and value not in known:
                raise UnknownNameError(
                    f"{field}={value!r} is unknown; {nearest(str(value), known)}, or none"
                )
        if self.scale_dtype in SMALL_SCALE_DTYPES and self.scale_dtype != fmt.scale_dtype:
            raise RecipeError(
                f"scale_dtype={self.scale_dtype!r} is not for {fmt.name}; use float16, bfloat16 or "
                f"float32, or one of {', '.join(_made_for(self.scale_dtype))}"
            )
        self._check_outliers()
        self._check_float_zero_point()
        self._check_double_quant()
        self._check_learned_scale()
        if self.granularity == "group":
            _check_group_size(self.group_size)
        elif self.group_size is not None:
            raise RecipeError(
                f"group_size={self.group_size} with granularity={self.granularity!r}; "
                "use granularity='group' or leave group_size out"
            )
        if not self.symmetric and fmt.kind != "integer":
            raise RecipeError(f"symmetric=False: {fmt.name} has no zero point; leave symmetric out")
        if fmt.kind == "downcast" and self.granularity == "group":
            raise RecipeError(
                f"group_size={self.group_size}: {fmt.name} has no scales; leave it out"
            )

    def _check_outliers(self) -> None:
        threshold = self.outlier_threshold
        if threshold is None:
            return
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not number or not 0 < threshold < float("inf"):
            raise RecipeError(
                f"outlier_threshold={threshold!r} is not a positive number; use 6.0, or none"
            )
        if self.activations != "int8":
            raise RecipeError(
                f"outlier_threshold={threshold} needs activations='int8', not {self.activations!r}"
            )

    def _check_float_zero_point(self) -> None:
        if not isinstance(self.float_zero_point, bool):
            raise RecipeError(f"float_zero_point={self.float_zero_point!r} is not true or false")
        if self.float_zero_point and self.fmt.kind != "integer":
            raise RecipeError(
                f"float_zero_point=True: {self.format} has no zero point; leave it out"
            )
        if self.float_zero_point and self.symmetric:
            raise RecipeError("float_zero_point=True needs symmetric=False; leave symmetric out")

    def _check_double_quant(self) -> None:
        if not isinstance(self.double_quant, bool):
            raise RecipeError(f"double_quant={self.double_quant!r} is not true or false")
        stored = (self.fmt.kind, self.granularity, self.scale_dtype)
        wanted = self.fmt.scale_dtype if self.fmt.double_quant else "float32"
        if self.double_quant and stored != ("codebook", "group", wanted):
            raise RecipeError(
                f"double_quant=True is for codebooks with a group_size and scale_dtype={wanted!r}, "
                f"not {self.format} per {self.granularity} with {self.scale_dtype} scales; "
                "leave it out"
            )

    def _check_learned_scale(self) -> None:
        if not isinstance(self.learned_scale, bool):
            raise RecipeError(f"learned_scale={self.learned_scale!r} is not true or false")
        reasons = (
            (self.fmt.kind == "downcast", f"{self.format} has no scales"),
            (self.double_quant, "scales of double_quant=True are 8-bit numbers"),
            (self.fmt.learns_levels, f"{self.format} learns its levels anew for every weight"),
        )
        what = next((reason for applies, reason in reasons if applies), None)
        if self.learned_scale and what is not None:
            raise RecipeError(f"learned_scale=True: {what}; leave it out")

    @classmethod
    def of(
        cls,
        format: str,
        *,
        group_size: int | None = None,
        symmetric: bool | None = None,
        float_zero_point: bool = False,
        scale_dtype: str | None = None,
        double_quant: bool | None = None,
        activations: str | None = None,
        outlier_threshold: float | None = None,
        compute_dtype: str | None = None,
        learned_scale: bool = False,
    ) -> Scheme:
        """The scheme that `format` has by default, changed where an argument is given.

        group_size: None for the format's default, -1 for one scale per channel. symmetric: None for
        the default, which a float zero point makes False. scale_dtype: None for the format's where
        groups share a scale, else float32. double_quant: None for the format's.

        >>> str(Scheme.of("int4"))
        'int4 g32 asymmetric'
        >>> str(Scheme.of("int4", group_size=-1, symmetric=True))
        'int4 per channel'
        """
        if isinstance(format, Scheme):
            raise RecipeError(
                f"{format} is a Scheme, which belongs in a recipe's rules; write "
                f"weights='{format.format}', with options such as group_size= beside it"
            )
        fmt = get_format(format)
        size = fmt.group_size if group_size is None else group_size
        if size == PER_CHANNEL:
            size = None
        if scale_dtype is None:
            scale_dtype = "float32"
            if size is not None and (fmt.double_quant or not double_quant):
                narrow = "float32" if fmt.kind == "codebook" else "float16"
                scale_dtype = fmt.scale_dtype or narrow
        in_units = fmt.double_quant and scale_dtype == fmt.scale_dtype
        if in_units and double_quant is False:
            raise RecipeError(
                f"double_quant=False: scales of {format} are in units of a float of the tensor; "
                "leave it out, or use scale_dtype='float16'"
            )
        if double_quant is None:
            double_quant = in_units
        return cls(
            format=format,
            granularity="channel" if size is None else "group",
            group_size=size,
            symmetric=fmt.symmetric and not float_zero_point if symmetric is None else symmetric,
            float_zero_point=float_zero_point,
            scale_dtype=scale_dtype,
            double_quant=double_quant,
            activations=activations,
            outlier_threshold=outlier_threshold,
            compute_dtype=compute_dtype,
            learned_scale=learned_scale,
        )

    @property
    def stored(self) -> Scheme:
        """What is left of the scheme when the weight is frozen: how it got its scale is past."""
        return dataclasses.replace(self, learned_scale=False) if self.learned_scale else self

    @property
    def fmt(self) -> Format:
        """The format's row in the table."""
        return get_format(self.format)

    @property
    def zero_point_dtype(self) -> torch.dtype | None:
        """In what the zero points are stored; None where there are none."""
        if self.symmetric:
            return None
        return torch.float16 if self.float_zero_point else torch.int8

    @property
    def coding(self) -> Coding:
        """How scales in 8 bits are stored. For double_quant only."""
        return CODINGS[self.scale_dtype]

    @property
    def with_float_scales(self) -> Scheme:
        """The scheme of the same weight once scales in 8 bits are the floats they stand for."""
        if not self.double_quant:
            return self
        return dataclasses.replace(self, double_quant=False, scale_dtype="float32")

    @property
    def of_some_rows(self) -> Scheme | None:
        """The scheme in which rows can be rounded some at a time, to be put together and given this
        one; None where all rows of a weight share a number.
        """
        if self.granularity == "tensor" or (self.double_quant and self.fmt.double_quant):
            return None
        return dataclasses.replace(self, double_quant=False)

    def storage_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of codes, scales, zero points and levels of a weight of this shape.

        Raises GroupSizeError.
        """
        n, k = rows_and_columns(shape)
        codes = n * row_bytes(k, self.fmt.bits)
        if self.fmt.kind == "downcast":
            return codes
        rows, groups = scale_shape(shape, self.granularity, self.group_size, self.fmt.width)
        count = rows * groups
        if self.double_quant:
            scales = self.coding.stored_bytes(count)
        else:
            scales = count * get_scale_dtype(self.scale_dtype).itemsize
        zero_point = self.zero_point_dtype
        zeros = 0 if zero_point is None else count * zero_point.itemsize
        levels = rows << self.fmt.bits if self.fmt.learns_levels else 0
        return codes + scales + zeros + levels * LEVELS_DTYPE.itemsize

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, leaving out what is not used. `Scheme(**d)` is the inverse."""
        fields = dataclasses.asdict(self)
        for option in ("float_zero_point", "double_quant", "learned_scale"):
            if not fields[option]:
                del fields[option]
        return {k: v for k, v in fields.items() if v is not None}

    def __str__(self) -> str:
        name = self.format
        if self.fmt.kind != "downcast":
            group = self.granularity == "group"
            name += f" g{self.group_size}" if group else f" per {self.granularity}"
            if not self.symmetric:
                name += " float zero point" if self.float_zero_point else " asymmetric"
            if group and self.scale_dtype != self.fmt.scale_dtype in SMALL_SCALE_DTYPES:
                name += f" with {self.scale_dtype} scales"
        name += " double quant" if self.double_quant and not self.fmt.double_quant else ""
        name += " learned" if self.learned_scale else ""
        if self.activations is not None:
            name += f", {self.activations} activations"
        if self.outlier_threshold is not None:
            name += f" below {self.outlier_threshold:g}"
        return name + (f", computed in {self.compute_dtype}" if self.compute_dtype else "")


def _made_for(scale_dtype: str) -> list[str]:
    return [fmt.name for fmt in FORMATS.values() if fmt.scale_dtype == scale_dtype]


def _check_group_size(value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RecipeError(
            f"group_size={value!r} is not a positive integer; use 32, 64 or 128, or -1 for per "
            "channel"
        )


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`match` -> scheme, or keep. First match wins.

    match: `fnmatch` pattern on the module's full name. role: only modules of this role, or any.
    scheme: how to store the weight; None keeps it as it is.
    """

    match: str
    role: Role | None = None
    scheme: Scheme | None = None

    def __post_init__(self) -> None:
        if self.role is not None and self.role not in ROLES:
            raise UnknownNameError(
                f"role={self.role!r} is unknown; {nearest(str(self.role), ROLES)}"
            )

    def matches(self, name: str, role: Role) -> bool:
        """Whether this rule speaks about the module `name` of this role."""
        return self.role in (None, role) and fnmatchcase(name, self.match)

    def __str__(self) -> str:
        return repr(self.match) + (f" ({self.role})" if self.role else "")


_RULE_KEYS = (
    "match",
    "role",
    "weights",
    "granularity",
    "group_size",
    "symmetric",
    "float_zero_point",
    "scale_dtype",
    "double_quant",
    "activations",
    "outlier_threshold",
    "compute_dtype",
    "learned_scale",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Ordered rules; the first that matches a module decides.
    A module that no rule matches is kept.

    min_coverage: share of the weight elements that no rule keeps which must end up quantized (0 to
    1); `zp.quantize(strict=True)` refuses less. Serializes to YAML or JSON; `docs/recipes.md` shows
    the file.
    """

    rules: tuple[Rule, ...]
    min_coverage: float = 0.9

    def __post_init__(self) -> None:
        if not self.rules:
            raise RecipeError(
                "a recipe without rules quantizes nothing; add {match: '*', weights: int8}"
            )
        if not 0 <= self.min_coverage <= 1:
            raise RecipeError(f"min_coverage={self.min_coverage} is not a share between 0 and 1")

    def first_match(self, name: str, role: Role) -> Rule | None:
        """The rule that decides about this module, or None."""
        return next((rule for rule in self.rules if rule.matches(name, role)), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `{min_coverage, rules: [{match, role?, weights, ...}]}`;

        `from_dict` is the inverse.
        """
        rules = []
        for rule in self.rules:
            row: dict[str, Any] = {"match": rule.match}
            if rule.role:
                row["role"] = rule.role
            if rule.scheme is None:
                row["weights"] = "keep"
            else:
                fields = rule.scheme.to_dict()
                row |= {"weights": fields.pop("format"), **fields}
            rules.append(row)
        return {"min_coverage": self.min_coverage, "rules": rules}

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Inverse of `to_dict`; fields left out take the format's defaults.

        Raises RecipeError, UnknownNameError.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("rules"), list):
            raise RecipeError("a recipe is a mapping with a list called 'rules'")
        _check_keys(data, ("min_coverage", "rules"), "recipe")
        coverage = data.get("min_coverage", 0.9)
        if not isinstance(coverage, (int, float)):
            raise RecipeError(f"min_coverage={coverage!r} is not a number between 0 and 1")
        return cls(rules=tuple(_rule(row) for row in data["rules"]), min_coverage=coverage)

    def to_yaml(self) -> str:
        """The recipe as YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Inverse of `to_yaml`; also reads JSON. Raises RecipeError."""
        try:
            data = json.loads(text)  # first: YAML 1.1 reads some of JSON's numbers as text
        except ValueError:
            try:
                data = yaml.safe_load(text)
            except yaml.YAMLError as e:
                raise RecipeError(f"neither YAML nor JSON: {e}") from e
        return cls.from_dict(data)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file (YAML or JSON). Raises RecipeError naming the file."""
        try:
            return cls.from_yaml(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as e:
            raise RecipeError(f"{path}: cannot be read: {e}") from e
        except (RecipeError, UnknownNameError) as e:
            raise type(e)(f"{path}: {e}") from e

    def save(self, path: str | Path) -> None:
        """Write the recipe as YAML, or as JSON when the name ends in .json. Raises RecipeError."""
        is_json = str(path).endswith(".json")
        text = json.dumps(self.to_dict(), indent=2) + "\n" if is_json else self.to_yaml()
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as e:
            missing = not Path(path).parent.is_dir()
            why = f"the folder {Path(path).parent} does not exist" if missing else str(e)
            raise RecipeError(f"{path}: cannot be written: {why}") from e


def _check_keys(data: Mapping[Any, Any], known: tuple[str, ...], what: str) -> None:
    for key in data:
        if key not in known:
            raise RecipeError(f"{what} has no field {key!r}; {nearest(str(key), known)}")


def _rule(row: Any) -> Rule:
    if not isinstance(row, Mapping) or not isinstance(row.get("match"), str):
        raise RecipeError(f"a rule is a mapping with a pattern called 'match', not {row!r}")
    _check_keys(row, _RULE_KEYS, "a rule")
    weights = row.get("weights")
    options = {k: row[k] for k in _RULE_KEYS[3:] if row.get(k) is not None}
    if weights == "keep":
        if options:
            raise RecipeError(
                f"rule {row['match']!r} keeps its modules; remove {', '.join(options)}"
            )
        return Rule(match=row["match"], role=row.get("role"))
    if not isinstance(weights, str):
        raise RecipeError(f"rule {row['match']!r} needs weights: a format name, or keep")
    if options.get("group_size") == PER_CHANNEL:
        del options["group_size"]
        options.setdefault("granularity", "channel")
    per_block = options.get("granularity") in ("tensor", "channel")
    default = Scheme.of(
        weights,
        group_size=PER_CHANNEL if per_block else options.get("group_size"),
        float_zero_point=options.get("float_zero_point", False),
        scale_dtype=options.get("scale_dtype"),
        double_quant=options.get("double_quant"),
    )
    return Rule(
        match=row["match"], role=row.get("role"), scheme=dataclasses.replace(default, **options)
    )
