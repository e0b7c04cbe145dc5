"""``mpo keys``: explains the keys of a training recipe."""

from __future__ import annotations

import argparse
from typing import Any


def register(commands: Any) -> None:
    """Adds ``keys`` to the sub-parsers of ``mpo``."""
    keys = commands.add_parser(
        "keys",
        help="explain the keys of a training recipe",
        description="Without a word: the keys that matter, a line each. With one: the key of that name, or those that speak "
        "of it. Names that other trainers have for a key are translated.",
        allow_abbrev=False,
    )
    keys.add_argument("word", metavar="WORD", nargs="?", help="a key, or a word to look for")
    keys.add_argument("--all", action="store_true", help="every key of TRL and transformers, too")
    keys.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mpo.training.key_help import keys_text

    print(keys_text(arguments.word, everything=arguments.all))
    return 0
