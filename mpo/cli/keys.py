"""``mpo keys``: explains the keys of recipes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from mpo.common.key_help import (
    KeyHelp,
    as_name,
    described_keys,
    find_key,
    found_text,
    key_lines,
    keys_ending_in,
)
from mpo.common.words import nearest, show_name
from mpo.errors import ConfigError

_TRAINING = "training"


@dataclass(frozen=True)
class _Kind:
    """A recipe that is not for training.

    Attributes:
        title: What it is called.
        module, name: Its dataclass.
        defaults: What is set by its file's name.
    """

    title: str
    module: str
    name: str
    defaults: Mapping[str, str] = field(default_factory=dict)


_OTHERS = {
    "build": _Kind(
        "a build", "mpo.building.recipe", "BuildRecipe", {"out": "runs/data/ and the recipe's name"}
    ),
    "suite": _Kind("a suite", "mpo.jobs.suite_recipe", "SuiteRecipe", {"out": "runs/ and the recipe's name"}),
    "analysis": _Kind("an analysis", "mpo.hidden_space.recipe", "AnalysisRecipe"),
    "comparison": _Kind(
        "a comparison",
        "mpo.jobs.compare.recipe",
        "CompareRecipe",
        {"out": "runs/compare/ and the recipe's name"},
    ),
}
_NO_KEY = ("source_path",)


def register(commands: Any) -> None:
    """Adds ``keys`` to the sub-parsers of ``mpo``."""
    keys = commands.add_parser(
        "keys",
        help="explain the keys of a recipe",
        description="Without a word: the keys that matter, a line each. With one: the key of that name, or those that speak "
        "of it. Names that other trainers have for a key are translated.",
        allow_abbrev=False,
    )
    keys.add_argument("word", metavar="WORD", nargs="?", help="a key, or a word to look for")
    keys.add_argument(
        "--of",
        choices=(_TRAINING, *_OTHERS),
        help="the kind of recipe (default: training; a word that no key of it has is looked for in the others)",
    )
    keys.add_argument("--all", action="store_true", help="every key of TRL and transformers, too")
    keys.set_defaults(run=_run)


def keys_of_kind(kind: str) -> dict[str, KeyHelp]:
    """The keys of a recipe that is not for training, by name.

    Args:
        kind: ``build``, ``suite``, ``analysis`` or ``comparison``.
    """
    of = _OTHERS[kind]
    found = described_keys(getattr(import_module(of.module), of.name), of.title, _NO_KEY, of.defaults)
    return {key.name: key for key in found}


def _run(arguments: argparse.Namespace) -> int:
    word = arguments.word
    if word is not None and not as_name(word):
        word = None
    if arguments.of in _OTHERS:
        print(_other_text(arguments.of, word))
        return 0
    from mpo.training.key_help import keys_text

    others = {} if word is None or arguments.of else {kind: keys_of_kind(kind) for kind in _OTHERS}
    try:
        text = keys_text(word, everything=arguments.all)
    except ConfigError:
        texts = [found_text(keys, word, f"mpo keys --of {kind}") for kind, keys in others.items()]
        found = [each for each in texts if each]
        if not found:
            raise
        text = "\n\n".join(["Not a key of a training recipe, but of others:", *found])
    else:
        text += "".join(
            f"\nOf {_OTHERS[kind].title}: mpo keys --of {kind} {word}"
            for kind, keys in others.items()
            if find_key(keys, as_name(word)) or keys_ending_in(keys, as_name(word))
        )
    print(text)
    return 0


def _other_text(kind: str, word: str | None) -> str:
    keys, title, command = keys_of_kind(kind), _OTHERS[kind].title, f"mpo keys --of {kind}"
    if word is None:
        return f"Keys of {title}\n{key_lines([*keys.values()])}\n\nOne of them explained: {command} NAME"
    if text := found_text(keys, word, command):
        return text
    near = nearest(word, keys)
    meant = f"Did you mean `{near}`?" if near else f"`{command}` shows every key."
    raise ConfigError(f"No key of {title} is called `{show_name(word)}` or speaks of it. {meant}")
