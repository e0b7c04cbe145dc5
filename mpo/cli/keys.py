"""``mpo keys``: explains the keys of recipes."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from mpo.common.key_help import KeyHelp, described_keys, found_text, key_lines
from mpo.common.words import nearest, show_name
from mpo.errors import ConfigError

_TRAINING = "training"
# What a recipe that is not for training is made of, and the fields of it that are no keys.
_OTHERS = {
    "build": ("a build", "mpo.building.recipe", "BuildRecipe"),
    "suite": ("a suite", "mpo.jobs.suite_recipe", "SuiteRecipe"),
    "analysis": ("an analysis", "mpo.hidden_space.recipe", "AnalysisRecipe"),
    "comparison": ("a comparison", "mpo.jobs.compare.recipe", "CompareRecipe"),
}


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
    title, module, name = _OTHERS[kind]
    found = described_keys(getattr(import_module(module), name), title, hidden=("source_path",))
    return {key.name: key for key in found}


def _run(arguments: argparse.Namespace) -> int:
    word = arguments.word
    if arguments.of in _OTHERS:
        print(_other_text(arguments.of, word))
        return 0
    from mpo.training.key_help import keys_text

    try:
        text = keys_text(word, everything=arguments.all)
    except ConfigError:
        found = {} if word is None or arguments.of else {kind: _found(kind, word) for kind in _OTHERS}
        texts = [
            f"Not a key of a training recipe; of {_OTHERS[kind][0]}:\n\n{text}"
            for kind, text in found.items()
            if text
        ]
        if not texts:
            raise
        text = "\n\n".join(texts)
    print(text)
    return 0


def _found(kind: str, word: str) -> str | None:
    return found_text(keys_of_kind(kind), word, f"mpo keys --of {kind}")


def _other_text(kind: str, word: str | None) -> str:
    keys = keys_of_kind(kind)
    if word is None:
        return f"Keys of {_OTHERS[kind][0]}\n{key_lines([*keys.values()])}\n\nOne of them explained: mpo keys --of {kind} NAME"
    if text := _found(kind, word):
        return text
    near = nearest(word, keys)
    raise ConfigError(
        f"No key of {_OTHERS[kind][0]} is called `{show_name(word)}` or speaks of it."
        + (f" Did you mean `{near}`?" if near else f" `mpo keys --of {kind}` shows every key.")
    )
