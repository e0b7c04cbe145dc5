"""``mpo data check``: a summary of preference data, with the rows to look at."""

from __future__ import annotations

import argparse
from typing import Any

from mpo.cli.options import add_data_options, one_or_many, show_help


def register(commands: Any) -> None:
    """Adds ``data`` to the sub-parsers of ``mpo``."""
    data = commands.add_parser("data", help="look at preference data")
    data.set_defaults(run=lambda _: show_help(data))
    check = data.add_subparsers(title="commands", metavar="COMMAND").add_parser(
        "check", help="summarise a data set and point at doubtful rows", allow_abbrev=False
    )
    check.add_argument(
        "data", metavar="FILE", nargs="+", help="JSON, JSONL, CSV or Parquet file(s), or a name on the Hub"
    )
    check.add_argument("--model", help="folder or Hub name of the model in whose tokens lengths are counted")
    check.add_argument("--json", metavar="OUT", help="also write the report as JSON")
    check.add_argument("--show_texts", action="store_true", help="show the beginning of each flagged text")
    check.add_argument(
        "--chat_template", help="chat template for a tokenizer that has none: Jinja text or a file"
    )
    add_data_options(check)
    check.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.data import check_data

    tokenizer = None
    if arguments.model is not None:
        from mpo.modeling.loading import ModelSource, load_tokenizer

        tokenizer = load_tokenizer(ModelSource(arguments.model), arguments.chat_template)
    report = check_data(
        one_or_many(arguments.data),
        tokenizer=tokenizer,
        source_language=arguments.source_language,
        max_length=arguments.max_length,
        split=arguments.dataset_split,
        limit=arguments.limit,
        languages=arguments.languages,
        show_texts=arguments.show_texts,
    )
    print(report.to_text())
    if arguments.json:
        from mpo.common.files import write_json

        print(f"\nWritten to {write_json(arguments.json, report.to_dict())}")
    return 0
