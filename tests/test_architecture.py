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
