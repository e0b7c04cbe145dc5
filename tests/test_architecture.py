"""The house: rooms in floors, arrows that run down only, files that can be read in one sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mpo"

# From the ground up. A room may import from itself and from the rooms before it.
FLOORS = (
    "errors",
    "common",
    "data",
    "modeling",
    "planning",
    "training",
    "hidden_space",
    "evaluation",
    "report",
    "building",
    "jobs",
    "cli",
)
# Documented old places that only pass on names.
EARLIER_NAMES = ("analysis", "merge", "scoring")
LONGEST_FILE = 700


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of this package, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide which room they lead to"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "mpo"
                else [node.module or ""]
            )
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            names = [str(node.args[0].value)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "mpo" and len(parts) > 1:
                yield node.lineno, parts[1]


def test_every_module_is_in_a_room() -> None:
    rooms = {room_of(path) for path in modules()} - {"__init__", "__main__", *EARLIER_NAMES}

    assert rooms == set(FLOORS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_run_down_only(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__", *EARLIER_NAMES):
        return
    above = set(FLOORS[FLOORS.index(room) + 1 :]) | set(EARLIER_NAMES)

    upwards = [f"line {line}: mpo.{other}" for line, other in imported_rooms(path) if other in above]

    assert not upwards, f"{path.relative_to(PACKAGE)} imports from a higher floor: {', '.join(upwards)}"


def test_no_file_is_too_long_to_read_in_one_sitting() -> None:
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in modules()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    }

    assert not long


def test_no_library_is_mocked_while_it_runs() -> None:
    mocking = [path for path in modules() if "unittest" in path.read_text(encoding="utf-8")]

    assert not mocking


# What these make of a set does not depend on its order.
_ORDERLESS = {"sorted", "any", "all", "min", "max", "sum", "len", "set", "frozenset"}


def is_set(node: ast.expr) -> bool:
    """Whether an expression is a set by its form; text in one has another order in every process."""
    if isinstance(node, ast.Set | ast.SetComp):
        return True
    if isinstance(node, ast.Call):
        return getattr(node.func, "id", "") in ("set", "frozenset")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr | ast.BitXor | ast.Sub):
        keys = [
            side
            for side in (node.left, node.right)
            if isinstance(side, ast.Call) and getattr(side.func, "attr", "") in ("keys", "items")
        ]
        return bool(keys) or is_set(node.left) or is_set(node.right)
    return False


def ordered_by_a_set(tree: ast.AST) -> list[int]:
    """Lines that go through a set where the order may show."""
    harmless = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and (getattr(node.func, "id", "") in _ORDERLESS or getattr(node.func, "attr", "") == "update")
        for argument in node.args
    }
    found = []
    for node in ast.walk(tree):
        if (isinstance(node, ast.For) and is_set(node.iter)) or (
            isinstance(node, ast.ListComp | ast.DictComp | ast.GeneratorExp)
            and id(node) not in harmless
            and any(is_set(part.iter) for part in node.generators)
        ):
            found.append(node.lineno)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("list", "tuple", "enumerate"):
            found += [node.lineno for argument in node.args if is_set(argument)]
    return found


def test_nothing_is_made_in_the_order_of_a_set() -> None:
    sample = (
        "for a in x.keys() & y: pass\nb = [c for c in {1, 2}]\nd = sorted(e for e in {1})\nf = list(set(g))\n"
    )
    assert ordered_by_a_set(ast.parse(sample)) == [1, 2, 4]
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in modules()
        for line in ordered_by_a_set(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert wrong == []
