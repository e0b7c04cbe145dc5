"""``mpo evaluate suite``: every measurement of a recipe on every model, and the report."""

from __future__ import annotations

import argparse
from typing import Any

from mpo.cli.options import add_recipe, overrides_of

_EPILOG = """\
Any key of the recipe can be changed after it:
  --generation.max_new_tokens 32   an entry           --models.base.dtype bfloat16   one of a named entry
docs/evaluation.md explains the keys.
"""


def register(measurements: Any) -> None:
    """Adds ``suite`` to the sub-parsers of ``mpo evaluate``."""
    suite = measurements.add_parser(
        "suite",
        help="all measurements of a recipe on all its models, and the report",
        usage="mpo evaluate suite RECIPE [--out FOLDER] [--dry_run] [--key value ...]",
        description="Measure what a recipe lists, skipping what is done, and write report.html and report.md.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_recipe(suite, "recipes/evaluation/demo.yaml")
    suite.add_argument("--out", metavar="FOLDER", help="folder of results, in place of the recipe's `out`")
    suite.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="check the recipe and its files, print what is to do, stop",
    )
    suite.add_argument("--no_report", action="store_true", help="measure only, and write no report")
    suite.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    overrides, dry_run = overrides_of(arguments)
    report = not arguments.no_report
    if "--no_report" in overrides:  # behind the recipe
        overrides.remove("--no_report")
        report = False
    if arguments.out is not None:
        overrides = ["--out", arguments.out, *overrides]
    from mpo.jobs.suite_recipe import load_suite

    recipe = load_suite(arguments.recipe, overrides)  # what is misspelt is said before torch is imported
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.jobs.suite import run_suite

    run_suite(recipe, dry_run=dry_run, report=report)
    return 0
