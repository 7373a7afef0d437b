import dataclasses
import json

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import GRIDS, PROPERTY, by_threes, defaults, rtn, schemes
from zeropoint.errors import GroupSizeError, RecipeError, UnknownNameError
from zeropoint.numerics import FORMATS
from zeropoint.numerics.formats import SCALE_DTYPES
from zeropoint.scheme import PER_CHANNEL, ROLES, Recipe, Rule, Scheme

INT4 = Scheme.of("int4")
INT8 = Scheme.of("int8")


# --- Scheme ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_default_scheme_is_what_the_table_says(name):
    fmt, scheme = FORMATS[name], Scheme.of(name)
    assert scheme.fmt is fmt
    assert scheme.group_size == fmt.group_size and scheme.symmetric == fmt.symmetric
    assert scheme.granularity == ("group" if fmt.group_size else "channel")
    narrow = fmt.group_size and fmt.kind == "integer"  # codebooks: as bitsandbytes has them
    assert scheme.scale_dtype == (fmt.scale_dtype or ("float16" if narrow else "float32"))


def test_arguments_change_the_default():
    assert Scheme.of("int4", group_size=128, symmetric=True) == Scheme(
        format="int4", granularity="group", group_size=128, symmetric=True, scale_dtype="float16"
    )
    assert Scheme.of("int8", group_size=64, symmetric=False) == Scheme(
        format="int8", granularity="group", group_size=64, symmetric=False, scale_dtype="float16"
    )
    assert Scheme.of("int4", symmetric=True).group_size == 32


@pytest.mark.parametrize("name", FORMATS)
def test_activations_are_float_unless_int8_is_asked_for(name):
    scheme = Scheme.of(name)
    assert scheme.activations is None and "activations" not in scheme.to_dict()
    rounded = Scheme.of(name, activations="int8")
    assert rounded == dataclasses.replace(scheme, activations="int8") != scheme
    assert rounded.to_dict() == scheme.to_dict() | {"activations": "int8"}
    assert Scheme(**json.loads(json.dumps(rounded.to_dict()))) == rounded
    assert rounded.storage_bytes((8, 192)) == scheme.storage_bytes((8, 192))


def test_nvfp4_has_its_unit_and_no_group_of_e4m3_scales_goes_without_one():
    scheme = Scheme.of("nvfp4")
    assert scheme.double_quant and scheme.scale_dtype == "float8_e4m3fn"
    assert scheme.of_some_rows is None, "all rows share the unit"
    assert scheme.with_float_scales == Scheme.of("nvfp4", scale_dtype="float32")
    assert not Scheme.of("nvfp4", group_size=PER_CHANNEL).double_quant
    rule = {"match": "*", "weights": "nvfp4", "double_quant": False}
    for make in (lambda: Scheme.of("nvfp4", double_quant=False), lambda: _from_rule(rule)):
        with pytest.raises(RecipeError, match="double_quant=False: scales of nvfp4 are in units"):
            make()
    floats = _from_rule(rule | {"scale_dtype": "float16"})
    assert str(floats) == "nvfp4 g16 with float16 scales" and not floats.double_quant


def _from_rule(rule):
    recipe = Recipe.from_dict({"rules": [rule]})
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    return recipe.rules[0].scheme


def test_a_learned_scale_is_an_option_of_formats_that_have_scales():
    scheme = Scheme.of("int3", learned_scale=True)
    assert str(scheme) == "int3 g32 asymmetric learned"
    assert scheme.stored == Scheme.of("int3") == Scheme.of("int3").stored
    assert "learned_scale" not in scheme.stored.to_dict()
    assert Scheme(**json.loads(json.dumps(scheme.to_dict()))) == scheme
    rule = Recipe.from_dict({"rules": [{"match": "*", "weights": "int3", "learned_scale": True}]})
    assert rule.rules[0].scheme == scheme and Recipe.from_yaml(rule.to_yaml()) == rule
    with pytest.raises(RecipeError, match="learned_scale=True: bfloat16 has no scales; leave it"):
        Scheme.of("bfloat16", learned_scale=True)
    with pytest.raises(RecipeError, match="learned_scale=True: .*double_quant=True are 8-bit num"):
        Scheme.of("nf4", double_quant=True, learned_scale=True)
    with pytest.raises(RecipeError, match="learned_scale=True: any4 learns its levels anew for ev"):
        Scheme.of("any4", learned_scale=True)
    with pytest.raises(RecipeError, match="learned_scale='yes' is not true or false"):
        Scheme.of("int3", learned_scale="yes")


def test_a_float_zero_point_is_an_option_of_integers_and_makes_them_asymmetric():
    scheme = Scheme.of("int8", group_size=64, float_zero_point=True)
    assert str(scheme) == "int8 g64 float zero point" and not scheme.symmetric
    assert Scheme(**json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert "float_zero_point" not in Scheme.of("int4").to_dict()
    recipe = Recipe.from_yaml(
        "rules: [{match: '*', weights: int8, group_size: 64, float_zero_point: true}]"
    )
    assert recipe.rules[0].scheme == scheme and Recipe.from_yaml(recipe.to_yaml()) == recipe
    integer = dataclasses.replace(scheme, float_zero_point=False)
    assert scheme.storage_bytes((8, 192)) == integer.storage_bytes((8, 192)) + 8 * 3
    with pytest.raises(RecipeError, match="float_zero_point=True: nf4 has no zero point; leave"):
        Scheme.of("nf4", float_zero_point=True)
    with pytest.raises(RecipeError, match="float_zero_point=True needs symmetric=False; leave sym"):
        Scheme.of("int4", symmetric=True, float_zero_point=True)
    with pytest.raises(RecipeError, match="float_zero_point='yes' is not true or false"):
        Scheme.of("int4", float_zero_point="yes")


@pytest.mark.parametrize("name", FORMATS)
def test_group_size_minus_one_is_per_channel_with_a_float32_scale(name):
    scheme = Scheme.of(name, group_size=PER_CHANNEL)
    assert (scheme.granularity, scheme.group_size) == ("channel", None)
    assert scheme.scale_dtype == "float32"


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (INT4, "int4 g32 asymmetric"),
        (INT8, "int8 per channel"),
        (Scheme.of("nf4"), "nf4 g64"),
        (Scheme.of("mxfp4"), "mxfp4 g32"),
        (
            Scheme(format="mxfp4", granularity="group", group_size=64, scale_dtype="float16"),
            "mxfp4 g64 with float16 scales",
        ),
        (Scheme.of("iq4nl", group_size=64), "iq4nl g64"),
        (Scheme.of("bfloat16"), "bfloat16"),
        (
            Scheme(format="int8", granularity="tensor", symmetric=False),
            "int8 per tensor asymmetric",
        ),
        (Scheme.of("int8", activations="int8"), "int8 per channel, int8 activations"),
        (
            Scheme.of("int4", activations="int8"),
            "int4 g32 asymmetric, int8 activations",
        ),
        (Scheme.of("bfloat16", activations="int8"), "bfloat16, int8 activations"),
    ],
)
def test_a_scheme_reads_as_words(scheme, text):
    assert str(scheme) == text


@pytest.mark.parametrize("scheme", schemes(), ids=str)
def test_to_dict_is_undone_by_the_constructor(scheme):
    assert Scheme(**json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert ("group_size" in scheme.to_dict()) == (scheme.granularity == "group")


GROUPED = {"granularity": "group"}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"format": "int9"}, UnknownNameError, "'int9' is not a format; close"),
        ({"scale_dtype": "float8"}, UnknownNameError, "'float8' is not a scale dtype; close"),
        (
            {"scale_dtype": "float8_e8m0fnu"},
            RecipeError,
            "scale_dtype='float8_e8m0fnu' is not for int4; .* or one of mxfp4, mxfp8_e4m3, mxfp8_",
        ),
        (
            {"granularity": "chanel"},
            UnknownNameError,
            "granularity='chanel' is unknown; close: 'channel'",
        ),
        ({"symmetric": "no"}, RecipeError, "symmetric='no' is not true or false"),
        (
            GROUPED,
            RecipeError,
            "group_size=None is not a positive integer; use 32, 64 or 128, or -1",
        ),
        (GROUPED | {"group_size": 0}, RecipeError, "group_size=0 is not a positive integer"),
        (GROUPED | {"group_size": "32"}, RecipeError, "group_size='32' is not a positive integer"),
        (GROUPED | {"group_size": True}, RecipeError, "group_size=True is not a positive integer"),
        (
            {"group_size": 32},
            RecipeError,
            "group_size=32 with granularity='channel'; use granularity='group'",
        ),
        (
            {"format": "nf4", "symmetric": False},
            RecipeError,
            "symmetric=False: nf4 has no zero point",
        ),
        (
            GROUPED | {"format": "bfloat16", "group_size": 32},
            RecipeError,
            "group_size=32: bfloat16 has no scales",
        ),
        (
            {"activations": "int9"},
            UnknownNameError,
            "activations='int9' is unknown; close: 'int8', or none",
        ),
        ({"activations": 8}, UnknownNameError, "activations=8 is unknown; .*'int8'.*, or none"),
    ],
)
def test_a_scheme_that_contradicts_itself_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        Scheme(**{"format": "int4"} | fields)


@pytest.mark.parametrize("size", [0, -2, 32.5, "32"])
def test_of_refuses_a_group_size_that_is_not_positive(size):
    with pytest.raises(RecipeError, match=f"group_size={size!r} is not a positive integer"):
        Scheme.of("int4", group_size=size)


@pytest.mark.parametrize("scheme", by_threes(), ids=str)
def test_storage_bytes_are_the_bytes_of_the_tensors(scheme):
    for n, k, *others in [(1, 3), (3, 27), (5, 33), (4, 2, 3, 3), (7, 3)]:
        shape = (n, k * scheme.fmt.width, *others)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert scheme.storage_bytes(shape) == rtn(weight, scheme).nbytes


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize(("name", "symmetric"), GRIDS)
def test_storage_bytes_count_scales_in_their_dtype(name, symmetric, scale_dtype):
    scheme = Scheme(format=name, symmetric=symmetric, scale_dtype=scale_dtype)
    shape = (3, 5 * scheme.fmt.width)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert scheme.storage_bytes(shape) == rtn(weight, scheme).nbytes


def test_storage_bytes_refuse_a_group_size_that_does_not_divide():
    with pytest.raises(GroupSizeError, match=r"K=100 is not a multiple of group_size=32"):
        INT4.storage_bytes((8, 100))


def test_storage_bytes_refuse_vectors_that_rows_or_groups_tear():
    with pytest.raises(GroupSizeError, match="K=100 is not a multiple of 8, .* another format"):
        Scheme.of("e8p", group_size=-1).storage_bytes((8, 100))
    with pytest.raises(GroupSizeError, match="group_size=12 is not .* of 8, .*use group_size=16"):
        Scheme.of("e8p", group_size=12).storage_bytes((8, 96))
    with pytest.raises(GroupSizeError, match="K=72 is not .* group_size=32; use group_size=24, "):
        Scheme.of("e8p", group_size=32).storage_bytes((8, 72))


# --- Rule and Recipe ------------------------------------------------------------------------------


def test_the_first_rule_that_matches_decides():
    keep, heads, rest = (
        Rule(match="*.gate"),
        Rule(match="*", role="head", scheme=INT8),
        Rule(match="layers.*", scheme=INT4),
    )
    recipe = Recipe(rules=(keep, heads, rest))
    assert recipe.first_match("layers.0.gate", "linear") is keep
    assert recipe.first_match("lm_head", "head") is heads
    assert recipe.first_match("layers.0.up", "linear") is rest
    assert recipe.first_match("embed", "embedding") is None


def test_a_pattern_is_matched_against_the_whole_name_with_its_case():
    rule = Rule(match="layers.?.[qk]_proj")
    assert rule.matches("layers.0.q_proj", "linear")
    assert not rule.matches("layers.10.q_proj", "linear")
    assert not rule.matches("model.layers.0.q_proj", "linear")
    assert not rule.matches("LAYERS.0.q_proj", "linear")


@pytest.mark.parametrize("role", ROLES)
def test_a_rule_with_a_role_matches_only_that_role(role):
    rule = Rule(match="*", role=role)
    assert [r for r in ROLES if rule.matches("x", r)] == [role]
    assert str(rule) == f"'*' ({role})" and str(Rule(match="*")) == "'*'"


def test_an_unknown_role_names_the_known_ones():
    with pytest.raises(UnknownNameError, match="role='heads' is unknown; close: 'head'"):
        Rule(match="*", role="heads")


def test_a_recipe_needs_a_rule_and_a_share():
    with pytest.raises(RecipeError, match="a recipe without rules quantizes nothing; add"):
        Recipe(rules=())
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(RecipeError, match=f"min_coverage={share} is not a share between 0 and"):
            Recipe(rules=(Rule(match="*"),), min_coverage=share)


SCHEMES = st.sampled_from(
    schemes()
    + defaults()
    + [Scheme.of("int3", group_size=48), Scheme.of("int8", activations="int8")]
    + [Scheme.of("nf4", activations="int8")]
)
RULES = st.builds(
    Rule,
    match=st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=12),
    role=st.none() | st.sampled_from(ROLES),
    scheme=st.none() | SCHEMES,
)
RECIPES = st.builds(
    Recipe,
    rules=st.lists(RULES, min_size=1, max_size=4).map(tuple),
    min_coverage=st.integers(0, 1000).map(lambda share: share / 1000),
)


@PROPERTY
@given(recipe=RECIPES)
def test_a_recipe_survives_yaml_json_and_plain_data(recipe):
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_yaml(json.dumps(recipe.to_dict())) == recipe
    assert yaml.safe_load(recipe.to_yaml()) == recipe.to_dict()


@pytest.mark.parametrize(("match", "min_coverage"), [("\N{GRINNING FACE}*", 0.9), ("*", 1e-05)])
def test_json_is_read_where_yaml_1_1_differs_from_it(match, min_coverage):
    """PyYAML reads a \\u pair as two characters, and 1e-05 as text."""
    recipe = Recipe(rules=(Rule(match=match),), min_coverage=min_coverage)
    assert Recipe.from_yaml(json.dumps(recipe.to_dict())) == recipe


@pytest.mark.parametrize("name", ["recipe.yaml", "recipe.json"])
def test_a_saved_recipe_loads(tmp_path, name):
    recipe = Recipe(rules=(Rule(match="é*"), Rule(match="*", scheme=INT4)), min_coverage=0.5)
    path = tmp_path / name
    recipe.save(path)
    assert Recipe.load(path) == recipe == Recipe.load(str(path))
    if name.endswith("json"):
        assert json.loads(path.read_text()) == recipe.to_dict()


def test_a_recipe_that_cannot_be_written_says_so(tmp_path):
    recipe = Recipe(rules=(Rule(match="*", scheme=INT4),))
    missing = tmp_path / "missing" / "recipe.yaml"
    with pytest.raises(RecipeError, match=r"recipe.yaml: cannot be written: the folder .*missing"):
        recipe.save(missing)
    with pytest.raises(RecipeError, match="cannot be written: .*Is a directory"):
        recipe.save(tmp_path)


def test_the_file_reads_as_documented():
    recipe = Recipe.from_yaml(
        """
        rules:
          - {match: "*.gate", weights: keep}
          - {match: "*", role: head, weights: int8}
          - {match: "*.up", weights: int4, group_size: 128, symmetric: true}
          - {match: "*.down", weights: int4, group_size: -1}
          - {match: "*.qkv", weights: int4, granularity: tensor}
          - {match: "*.fc1", weights: int8, activations: int8}
          - {match: "*", weights: nf4, scale_dtype: bfloat16}
        """
    )
    assert recipe.min_coverage == 0.9
    assert [rule.scheme and str(rule.scheme) for rule in recipe.rules] == [
        None,
        "int8 per channel",
        "int4 g128",
        "int4 per channel asymmetric",
        "int4 per tensor asymmetric",
        "int8 per channel, int8 activations",
        "nf4 g64",
    ]
    assert recipe.rules[1].role == "head"
    assert recipe.rules[6].scheme.scale_dtype == "bfloat16"


def test_fields_left_out_take_the_formats_defaults():
    for name in FORMATS:
        recipe = Recipe.from_dict({"rules": [{"match": "*", "weights": name}]})
        assert recipe.rules[0].scheme == Scheme.of(name)


def rules(*rows, **fields):
    return {"rules": list(rows), **fields}


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], RecipeError, "a recipe is a mapping with a list called 'rules'"),
        (None, RecipeError, "a recipe is a mapping with a list called 'rules'"),
        ({"rules": {}}, RecipeError, "a recipe is a mapping with a list called 'rules'"),
        (rules(), RecipeError, "a recipe without rules quantizes nothing"),
        (
            rules({"match": "*"}, min_covrage=1),
            RecipeError,
            "recipe has no field 'min_covrage'; close: 'min_cov",
        ),
        (
            rules({"match": "*"}, min_coverage="a"),
            RecipeError,
            "min_coverage='a' is not a number between",
        ),
        (
            rules("int4"),
            RecipeError,
            "a rule is a mapping with a pattern called 'match', not 'int4'",
        ),
        (
            rules({"weights": "int4"}),
            RecipeError,
            "a rule is a mapping with a pattern called 'match'",
        ),
        (rules({"match": 3}), RecipeError, "a rule is a mapping with a pattern called 'match'"),
        (
            rules({"match": "*", "weight": "int4"}),
            RecipeError,
            "a rule has no field 'weight'; close: 'weights'",
        ),
        (
            rules({"match": "a", "weights": "keep", "group_size": 32}),
            RecipeError,
            "'a' keeps .*remove group_size",
        ),
        (rules({"match": "a"}), RecipeError, "rule 'a' needs weights: a format name, or keep"),
        (rules({"match": "a", "weights": 4}), RecipeError, "rule 'a' needs weights"),
        (rules({"match": "a", "weights": "int9"}), UnknownNameError, "'int9' is not a format"),
        (
            rules({"match": "a", "weights": "keep", "role": "x"}),
            UnknownNameError,
            "role='x' is unknown",
        ),
        (
            rules({"match": "a", "weights": "int4", "group_size": "x"}),
            RecipeError,
            "group_size='x' is not",
        ),
        (
            rules({"match": "a", "weights": "int4", "granularity": "channel", "group_size": 32}),
            RecipeError,
            "group_size=32 with granularity='channel'",
        ),
        (
            rules({"match": "a", "weights": "int4", "symmetric": 1}),
            RecipeError,
            "symmetric=1 is not true or",
        ),
        (
            rules({"match": "a", "weights": "int4", "scale_dtype": "x"}),
            UnknownNameError,
            "'x' is not a scale dtype",
        ),
        (
            rules({"match": "a", "weights": "int4", "activations": "int4"}),
            UnknownNameError,
            "activations='int4' is unknown; close: 'int8'",
        ),
        (
            rules({"match": "a", "weights": "keep", "activations": "int8"}),
            RecipeError,
            "'a' keeps .*remove activations",
        ),
    ],
)
def test_a_recipe_that_is_wrong_says_where(data, error, message):
    with pytest.raises(error, match=message):
        Recipe.from_dict(data)


@pytest.mark.parametrize("field", ["scale_dtype", "granularity", "role", "activations"])
def test_a_list_where_a_name_belongs_is_an_error_of_ours(field):
    with pytest.raises((RecipeError, UnknownNameError), match=r"\['a'\]"):
        Recipe.from_dict(rules({"match": "*", "weights": "int8", field: ["a"]}))


def test_text_that_is_not_yaml_is_refused():
    with pytest.raises(RecipeError, match="neither YAML nor JSON: "):
        Recipe.from_yaml("rules: [")


def test_a_file_that_cannot_be_read_or_is_wrong_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"missing.yaml: cannot be read: .*No such file"):
        Recipe.load(tmp_path / "missing.yaml")
    path = tmp_path / "wrong.yaml"
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RecipeError, match=r"wrong.yaml: cannot be read: "):
        Recipe.load(path)
    path.write_text("rules: []")
    with pytest.raises(RecipeError, match=r"wrong.yaml: a recipe without rules"):
        Recipe.load(path)
    path.write_text("rules: [{match: a, weights: int9}]")
    with pytest.raises(UnknownNameError, match=r"wrong.yaml: 'int9' is not a format"):
        Recipe.load(path)
