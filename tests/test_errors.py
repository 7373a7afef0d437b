import inspect
import re

import pytest

from zeropoint import errors
from zeropoint.errors import ZeropointError, nearest

CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and kind.__module__ == errors.__name__
}


def documented_parents():
    """{class: parent} as the tree in the module's docstring draws it."""
    parents, stack = {}, []
    for line in errors.__doc__.splitlines():
        found = re.match(r"^([│├└─ ]*)([A-Z]\w+Error)\b", line)
        if found:
            depth = len(found[1]) // 4
            parents[found[2]] = stack[depth - 1] if depth else "Exception"
            stack[depth:] = [found[2]]
    return parents


def test_the_tree_in_the_docstring_is_the_tree_of_classes():
    assert documented_parents() == {name: k.__base__.__name__ for name, k in CLASSES.items()}


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
def test_every_error_can_be_caught_as_a_zeropoint_error_and_remade_with_context(kind):
    with pytest.raises(ZeropointError, match="^layers.0: too big$"):
        try:
            raise kind("too big")
        except ZeropointError as e:
            raise type(e)(f"layers.0: {e}") from e
    assert kind.__doc__.endswith(".")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int9", "close: 'int8', 'int4'"),
        ("zzz", "known: 'int8', 'int4', 'nf4'"),
        ("", "known: 'int8', 'int4', 'nf4'"),
    ],
)
def test_nearest_offers_the_close_names_or_all_of_them(name, expected):
    assert nearest(name, iter(["int8", "int4", "nf4"])) == expected
