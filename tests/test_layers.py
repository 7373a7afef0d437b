"""The house's layers: imports point downward only (docs in CONTRIBUTING.md)."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "zeropoint"

# Lowest first. Rooms on one level do not import each other.
LEVELS = (
    {"errors", "_env", "_on_import", "progress"},
    {"numerics"},
    {"scheme"},
    {"qtensor"},
    {"native"},
    {"kernels", "algorithms", "observers", "checkpoints"},
    {"nn"},
    {"model"},
    {"flows"},
    {"evaluate", "integrations"},
    {"plot"},
    {"cli"},
    {"__init__", "__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(source: str) -> set[str]:
    """Rooms that a module's source imports, inside functions and under TYPE_CHECKING too."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer; write them in full"
            names = [node.module or ""]
            if node.module == "zeropoint":
                names = [f"zeropoint.{alias.name}" for alias in node.names]
        for name in names:
            if name == "zeropoint" or name.startswith("zeropoint."):
                rooms.add((name.split(".") + ["__init__"])[1])
    return rooms


def violations(room: str, source: str) -> list[str]:
    return [
        f"{room} (level {LEVEL[room]}) imports {other} (level {LEVEL.get(other, '?')})"
        for other in imported_rooms(source)
        if other != room and (other not in LEVEL or LEVEL[other] >= LEVEL[room])
    ]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.name))
def test_imports_point_downward(path):
    room = room_of(path)
    if room == "cli":  # the command line is a user of the public surface as well
        assert not [v for v in violations(room, path.read_text()) if "imports __init__" not in v]
    else:
        assert not violations(room, path.read_text())


def test_every_room_has_a_level():
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")}
    assert rooms == set(LEVEL)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("numerics", "from zeropoint.nn import QLinear"),
        ("kernels", "import zeropoint.algorithms.rtn"),
        ("nn", "def f():\n    from zeropoint.flows.ptq import quantize"),
        ("evaluate", "import zeropoint as zp"),
    ],
)
def test_an_upward_or_sideways_import_is_found(room, source):
    assert violations(room, source)
