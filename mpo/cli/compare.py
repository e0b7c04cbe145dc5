"""``mpo compare``: objectives and settings on the same data and budget, measured alike, on one page."""

from __future__ import annotations

import argparse
from typing import Any

from mpo.cli.options import add_recipe_command, overrides_of

_CHANGES = """\
  --seeds 0 1 2            a list               --budget.pairs 600       an entry
  --keep none              a value              --out runs/compare/mine  the folder of everything
"""


def register(commands: Any) -> None:
    """Adds ``compare`` to the sub-parsers of ``mpo``."""
    compare = add_recipe_command(
        commands,
        "mpo compare",
        "recipes/compare/paper.yaml",
        help="train several objectives or settings alike, measure and compare them",
        description="Train every run of a comparison, measure it with one suite, and write index.html and compare.json. What "
        "is done is skipped by a second call.",
        changes=_CHANGES,
        docs="`mpo keys --of comparison` explains the keys.",
        dry_run="check every run, print what would be trained and measured, stop",
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
