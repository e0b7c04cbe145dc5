"""``mpo report``: a result folder as one HTML page and one Markdown table."""

from __future__ import annotations

import argparse
from typing import Any


def register(commands: Any) -> None:
    """Adds ``report`` to the sub-parsers of ``mpo``."""
    report = commands.add_parser(
        "report",
        help="turn measurements, or a run, into HTML pages and a Markdown table",
        description="Write FOLDER/report.html and FOLDER/answers.html, which open from disk and load nothing, and FOLDER/report.md.",
        allow_abbrev=False,
    )
    report.add_argument(
        "folder",
        metavar="FOLDER",
        help="result folder, as `mpo evaluate suite` makes it, or the folder of a training run",
    )
    report.add_argument("--out", metavar="FOLDER", help="write the files there")
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
        default=40,
        metavar="N",
        help="prompts with their answers per language and prompt set, on answers.html (default 40; 0 for no such page)",
    )
    report.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mpo.report.answers import PAGE as ANSWERS
    from mpo.report.page import write_report

    page, table = write_report(
        arguments.folder,
        out=arguments.out,
        models=arguments.models,
        title=arguments.title,
        examples=arguments.examples,
    )
    answers = page.with_name(ANSWERS)
    print(f"Written: {page}, {f'{answers}, ' if answers.is_file() else ''}{table}")
    return 0
