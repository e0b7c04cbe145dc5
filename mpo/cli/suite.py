"""``mpo evaluate suite``: every measurement of a recipe on every model, and the report."""

from __future__ import annotations

import argparse
from typing import Any

from mpo.cli.options import add_recipe_command, overrides_of

_CHANGES = """\
  --generation.max_new_tokens 32   an entry           --models.base.dtype bfloat16   one of a named entry
"""


def register(measurements: Any) -> None:
    """Adds ``suite`` to the sub-parsers of ``mpo evaluate``."""
    suite = add_recipe_command(
        measurements,
        "mpo evaluate suite",
        "recipes/evaluation/demo.yaml",
        help="all measurements of a recipe on all its models, and the report",
        description="Measure what a recipe lists, skipping what is done, and write report.html and report.md.",
        changes=_CHANGES,
        docs="`mpo keys --of suite` explains the keys.",
        out="results",
        dry_run="check the recipe and its files, print what is to do, stop",
    )
    suite.add_argument("--no_report", action="store_true", help="measure only, and write no report")
    suite.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    overrides, dry_run = overrides_of(arguments)
    report = not arguments.no_report
    if "--no_report" in overrides:  # behind the recipe
        overrides.remove("--no_report")
        report = False
    from mpo.jobs.suite_recipe import load_suite

    recipe = load_suite(arguments.recipe, overrides)  # what is misspelt is said before torch is imported
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.jobs.suite import run_suite

    run_suite(recipe, dry_run=dry_run, report=report)
    return 0
