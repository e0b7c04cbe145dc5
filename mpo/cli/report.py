"""``mpo report``: a result folder as one HTML page and one Markdown table."""

from __future__ import annotations

import argparse
from typing import Any


def register(commands: Any) -> None:
    """Adds ``report`` to the sub-parsers of ``mpo``."""
    report = commands.add_parser(
        "report",
        help="turn measurements into one HTML page and one Markdown table",
        description="Write FOLDER/report.html, which opens from disk and loads nothing, and FOLDER/report.md.",
        allow_abbrev=False,
    )
    report.add_argument("folder", metavar="FOLDER", help="result folder, as `mpo evaluate suite` makes it")
    report.add_argument("--out", metavar="FOLDER", help="write the two files there")
    report.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help="show these models, the one to compare with first (default: all)",
    )
    report.add_argument("--title", default="Safety in every language", help="heading of the page")
    report.add_argument(
        "--examples",
        type=int,
        default=2,
        metavar="N",
        help="prompts with their answers per language, folded away (default 2; 0 for none)",
    )
    report.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mpo.report.page import write_report

    page, table = write_report(
        arguments.folder,
        out=arguments.out,
        models=arguments.models,
        title=arguments.title,
        examples=arguments.examples,
    )
    print(f"Written: {page}, {table}")
    return 0
