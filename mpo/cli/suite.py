"""``mpo evaluate suite``: every measurement of a recipe on every model, and the report."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any


def register(measurements: Any) -> None:
    """Adds ``suite`` to the sub-parsers of ``mpo evaluate``."""
    suite = measurements.add_parser(
        "suite",
        help="all measurements of a recipe on all its models, and the report",
        description="Measure what a recipe lists, skipping what is done, and write report.html and report.md.",
        allow_abbrev=False,
    )
    suite.add_argument("recipe", metavar="RECIPE", help="YAML file, for example recipes/evaluation/demo.yaml")
    suite.add_argument("--out", metavar="FOLDER", help="folder of results, in place of the recipe's `out`")
    suite.add_argument(
        "--dry_run", action="store_true", help="check the recipe and its files, print what is to do, stop"
    )
    suite.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.jobs.suite import run_suite
    from mpo.jobs.suite_recipe import load_suite

    recipe = load_suite(arguments.recipe)
    if arguments.out is not None:
        recipe = replace(recipe, out=arguments.out)
    run_suite(recipe, dry_run=arguments.dry_run)
    return 0
