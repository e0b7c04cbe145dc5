"""Where recipes are: a file in the working folder, or by its bare name one of those that come with the package.

In a wheel they lie beside the modules (``mpo/recipes``), in a checkout and an editable installation at its top level.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

import mpo
from mpo.common.files import write_bytes
from mpo.common.recipe_kinds import KINDS
from mpo.common.words import listed, nearest, shortened, show_name
from mpo.errors import ConfigError, StorageError

_PACKAGE = Path(mpo.__file__).resolve().parent
_SUFFIXES = (".yaml", ".yml")
_DATA = {".jsonl", ".csv", ".tsv", ".parquet", ".arrow"}
_WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt", ".pth"}


@dataclass(frozen=True)
class PackagedRecipe:
    """A recipe that comes with the package.

    Attributes:
        name: Its path below the folder of recipes without the suffix, such as ``evaluation/demo``.
        path: The file.
    """

    name: str
    path: Path

    @property
    def summary(self) -> str:
        """The first sentence of the comment that it opens with."""
        lines: list[str] = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            text = line.removeprefix("#").strip()
            if not line.startswith("#") or not text:
                break
            lines.append(text)
        sentence = re.split(r"(?<=[a-z)])\. ", re.sub(r" \([^)]*\)", "", " ".join(lines)))[0]
        return shortened(sentence.rstrip("."), 88)


@cache
def recipe_folder() -> Path | None:
    """The folder of the recipes that come with the package; None where they were left out of the installation."""
    if (_PACKAGE / "recipes").is_dir():
        return _PACKAGE / "recipes"
    beside = _PACKAGE.parent / "recipes"
    return beside if beside.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file() else None


def packaged_recipes() -> list[PackagedRecipe]:
    """All recipes of the package, those at the top first."""
    folder = recipe_folder()
    found = [] if folder is None else [path for path in folder.rglob("*.yaml") if path.is_file()]
    named = [
        PackagedRecipe(path.relative_to(folder).with_suffix("").as_posix(), path) for path in found if folder
    ]
    return sorted(named, key=lambda recipe: (recipe.name.count("/"), recipe.name))


def packaged_recipe(name: str, home: str = "") -> PackagedRecipe | None:
    """A recipe of the package by its name, or None.

    Args:
        name: ``llama``, ``evaluation/demo``, or ``demo`` with the folder as ``home``.
        home: Folder that is looked in first.
    """
    known = {recipe.name: recipe for recipe in packaged_recipes()}
    if name not in known and f"{home}/{name}" not in known:  # a name of one folder alone is clear, too
        inside = [recipe for recipe in known.values() if recipe.name.rpartition("/")[2] == name]
        return inside[0] if len(inside) == 1 else None
    return known.get(f"{home}/{name}") or known.get(name)


def find_recipe(given: str | Path, home: str = "") -> Path:
    """The file of a recipe.

    A file of that name in the working folder comes first, with or without its suffix. A bare name, without suffix, may
    also be that of a recipe of the package. A name with a suffix never is: an own copy that is looked for in the wrong
    folder must not be replaced by the original without a word.

    Args:
        given: Path or bare name.
        home: Folder of the package's recipes of the wanted kind: ``""`` for training, ``"evaluation"``, ...

    Raises:
        ConfigError: There is no such recipe, or it is a folder, data or weights.
    """
    path = Path(given)
    if not str(given).strip():
        raise ConfigError(f"A recipe has no name.{_suggestion('')}")
    if path.is_file():
        return _readable(path, given)
    bare = path.suffix not in _SUFFIXES
    if bare:
        for suffix in _SUFFIXES:
            if (own := path.with_name(path.name + suffix)).is_file():
                return own
        if recipe := packaged_recipe(str(given), home):
            near = os.path.relpath(recipe.path)
            return recipe.path if near.startswith(os.pardir) else Path(near)
    return _readable(path, given)


def recipes_text() -> str:
    """All recipes of the package with their summaries, under the commands that run them."""
    commands = {kind.home: kind.command for kind in KINDS if kind.home or kind is KINDS[0]}
    folders = dict.fromkeys([*commands, *(recipe.name.rpartition("/")[0] for recipe in packaged_recipes())])
    width = max((len(recipe.name) for recipe in packaged_recipes()), default=0)
    parts = []
    for folder in folders:
        inside = [recipe for recipe in packaged_recipes() if recipe.name.rpartition("/")[0] == folder]
        lines = [f"  {recipe.name.ljust(width)}  {recipe.summary}" for recipe in inside]
        shown = commands.get(folder, f"{folder}/").format(
            path="$(mpo recipes path NAME)" if folder == "accelerate" else "NAME"
        )
        parts += ["\n".join([shown, *lines])] if lines else []
    if not parts:
        return "This installation has no recipes; they are in the project's folder recipes/."
    return "\n\n".join([*parts, "Copy one and change it: mpo recipes copy NAME"])


def copy_recipe(name: str, destination: str | Path | None = None, *, force: bool = False) -> list[Path]:
    """Copies a recipe of the package, with the recipes and small data files that it names beside it.

    Args:
        name: Name of the recipe, as :func:`packaged_recipes` has it.
        destination: File or folder; by default a file of the recipe's last name in the working folder.
        force: Replace files that are there.

    Returns:
        The written files, the recipe first.

    Raises:
        ConfigError: There is no such recipe.
        StorageError: A file is there already, or cannot be written.
    """
    wanted = name.removeprefix("recipes/").removesuffix(".yaml")
    recipe = packaged_recipe(wanted)
    if recipe is None:
        raise ConfigError(f"There is no recipe {show_name(name)} in the package.{_suggestion(wanted)}")
    target = Path(destination or ".")
    if target.is_dir() or str(destination or "").endswith("/"):
        target = target / recipe.path.name
    if target.suffix not in _SUFFIXES:
        target = target.with_name(target.name + ".yaml")
    files = _with_companions(recipe.path, target)
    there = [path for path, content in files.items() if path.exists() and path.read_bytes() != content]
    if target.exists() and target not in there:
        there.insert(0, target)
    if there and not force:
        raise StorageError(
            f"{listed(map(str, there))} is there already, and is kept. Name another place behind the recipe, or "
            "replace it with --force."
        )
    for path, content in files.items():
        write_bytes(path, content)
    return [*files]


def _with_companions(source: Path, target: Path) -> dict[Path, bytes]:
    """Contents by new path: a file and, of a recipe, the files beside it that it names, nothing above its new folder."""
    if source.suffix not in _SUFFIXES:
        return {target: source.read_bytes()}
    text, companions = source.read_text(encoding="utf-8"), dict[Path, bytes]()
    for value in _values(yaml.safe_load(text)):
        if not Path(value).is_absolute() and (source.parent / value).is_file():
            kept = re.sub(r"^(\.\./)+", "", value)
            text = text.replace(value, kept)
            companions |= _with_companions(source.parent / value, target.parent / kept)
    return {target: text.encode("utf-8"), **companions}


def _values(value: object) -> Iterable[str]:
    """All texts in lists and mappings."""
    if isinstance(value, str) and value:
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _values(item)


def _readable(path: Path, given: str | Path) -> Path:
    """The path of a file that may be a recipe.

    Raises:
        ConfigError: It is none; the message says what to do instead.
    """
    name = str(given)
    if path.is_dir():
        inside = [p for suffix in _SUFFIXES for p in sorted(path.glob(f"[!.]*{suffix}"))]
        hint = f" Recipes in it: {', '.join(map(str, inside[:12]))}." if inside else ""
        if not inside and any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            hint = " It holds a model; talk to it with `mpo chat`, measure it with `mpo evaluate`."
        raise ConfigError(f"{name} is a folder; expected a recipe, which is a YAML file.{hint}")
    if path.suffix.lower() in _DATA:
        raise ConfigError(
            f"{name} is a file of data; expected a recipe. Check it with `mpo data check {name}`, and train on it with "
            f"`mpo train RECIPE --dataset {name}`."
        )
    if path.suffix.lower() in _WEIGHTS:
        raise ConfigError(f"{name} is a file of weights; expected a recipe, which is a YAML file.")
    if not path.is_file() and not path.exists():
        here = sorted(path.parent.glob("[!.]*.yaml")) or sorted(Path("recipes").glob("[!.]*.yaml"))
        hint = f" Recipes here: {', '.join(map(str, here[:12]))}." if here else ""
        near = nearest(path.name, [file.name for file in here], 0.8) if path.parent.is_dir() else None
        meant = f" Did you mean {here[0].with_name(near)}?" if near else _suggestion(name)
        raise ConfigError(f"There is no recipe {name}.{hint}{meant}")
    return path


def _suggestion(name: str) -> str:
    """Which recipe of the package was most likely meant, and where all are shown."""
    if not packaged_recipes():
        return ""
    wanted = name.removeprefix("recipes/").removesuffix(".yaml").removesuffix(".yml")
    if recipe := packaged_recipe(wanted):
        return f" One called `{recipe.name}` comes with the package: name it so, without a suffix."
    names = [recipe.name for recipe in packaged_recipes()]
    short = {known.rpartition("/")[2]: known for known in reversed(names)}
    near = nearest(wanted, names) or short.get(nearest(wanted.rpartition("/")[2], short, 0.6) or "")
    meant = f" Did you mean `{near}`, which comes with the package?" if near else ""
    return f"{meant} `mpo recipes` shows those of the package."
