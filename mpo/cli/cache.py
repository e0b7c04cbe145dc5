"""``mpo cache``: shows and clears what runs keep to save work later."""

from __future__ import annotations

import argparse
from typing import Any


def register(commands: Any) -> None:
    """Adds ``cache`` to the sub-parsers of ``mpo``."""
    cache = commands.add_parser("cache", help="show and clear reference and judge caches", allow_abbrev=False)
    cache.add_argument(
        "results",
        metavar="FOLDER",
        nargs="*",
        help="folders of results: judges' replies in and below them count, too",
    )
    cache.add_argument(
        "--reference_cache_dir", metavar="FOLDER", help="reference cache, where a recipe names another"
    )
    cache.add_argument("--clear", action="store_true", help="remove what is shown")
    cache.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mpo.common.words import size
    from mpo.jobs.cache import caches_text, clear_caches, find_caches

    entries = find_caches(arguments.results, arguments.reference_cache_dir)
    print(caches_text(entries))
    if arguments.clear:
        print(f"Removed: {size(clear_caches(entries))}.")
    return 0
