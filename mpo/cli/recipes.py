"""``mpo recipes``: shows and copies the recipes that come with the package."""

from __future__ import annotations

import argparse
from typing import Any


def register(commands: Any) -> None:
    """Adds ``recipes`` to the sub-parsers of ``mpo``."""
    recipes = commands.add_parser(
        "recipes",
        help="show the recipes that come with the package, and copy one",
        description="Without a command: all recipes, a line each. `mpo train NAME` runs one by its name.",
        allow_abbrev=False,
    )
    recipes.set_defaults(run=_list)
    inner = recipes.add_subparsers(title="commands", metavar="COMMAND")
    copy = inner.add_parser("copy", help="copy one, to be changed", allow_abbrev=False)
    copy.add_argument("name", metavar="NAME", help="name of the recipe, as `mpo recipes` shows it")
    copy.add_argument("destination", metavar="DEST", nargs="?", help="file or folder (default: here)")
    copy.add_argument("--force", action="store_true", help="replace files that are there")
    copy.set_defaults(run=_copy)
    path = inner.add_parser("path", help="print the file of one", allow_abbrev=False)
    path.add_argument("name", metavar="NAME", help="name of the recipe")
    path.set_defaults(run=_path)


def _list(_: argparse.Namespace) -> int:
    from mpo.common.recipe_files import recipes_text

    print(recipes_text())
    return 0


def _copy(arguments: argparse.Namespace) -> int:
    from mpo.common.recipe_files import copy_recipe

    recipe, *data = copy_recipe(arguments.name, arguments.destination, force=arguments.force)
    print(f"Written: {recipe}" + (f", and its data in {data[0].parent}" if data else ""))
    return 0


def _path(arguments: argparse.Namespace) -> int:
    from mpo.common.recipe_files import find_recipe

    print(find_recipe(arguments.name))
    return 0
