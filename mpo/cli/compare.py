"""``mpo compare``: objectives and settings on the same data and budget, measured alike, on one page."""

from __future__ import annotations

import argparse
from typing import Any

from mpo.cli.options import add_recipe, overrides_of

_EPILOG = """\
Any key of the comparison can be changed after it:
  --seeds 0 1 2            a list               --budget.pairs 600       an entry
  --keep none              a value              --out runs/compare/mine  the folder of everything
docs/compare.md explains the keys.
"""


def register(commands: Any) -> None:
    """Adds ``compare`` to the sub-parsers of ``mpo``."""
    compare = commands.add_parser(
        "compare",
        help="train several objectives or settings alike, measure and compare them",
        usage="mpo compare RECIPE [--dry_run] [--key value ...]",
        description="Train every run of a comparison, measure it with one suite, and write index.html and compare.json. What "
        "is done is skipped by a second call.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_recipe(compare, "recipes/compare/paper.yaml")
    compare.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="check every run, print what would be trained and measured, stop",
    )
    compare.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    overrides, dry_run = overrides_of(arguments)
    from mpo.jobs.compare.recipe import check_early, load_comparison

    recipe = load_comparison(arguments.recipe, overrides)
    check_early(recipe)  # what is misspelt is said before torch is imported
    from mpo.training.compute import keep_to_one_gpu

    keep_to_one_gpu()
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.jobs.compare.job import compare

    compare(recipe, dry_run=dry_run)
    return 0
