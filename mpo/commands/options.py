"""What several commands share: options of the same meaning everywhere, and the help of an unfinished command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that read preference pairs."""
    parser.add_argument("--source_language", default="en", help="the dominant language (default en)")
    parser.add_argument("--languages", nargs="+", metavar="CODE", help="keep only these target languages")
    parser.add_argument("--limit", type=int, help="keep the first so many sources")
    parser.add_argument(
        "--max_length", type=int, default=1024, help="longest prompt plus response, in tokens"
    )
    parser.add_argument("--dataset_split", default="train", help="split of a Hub dataset (default train)")


def one_or_many(names: Sequence[str]) -> str | list[str]:
    """A single name as itself, several as a list: what the loaders take."""
    return names[0] if len(names) == 1 else list(names)


def show_help(parser: argparse.ArgumentParser) -> int:
    """What a command does that waits for a sub-command."""
    parser.print_help()
    return 0
