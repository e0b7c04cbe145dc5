"""``mpo data check``: a summary of preference data, with the rows to look at. ``mpo data build``: data from prompts."""

from __future__ import annotations

import argparse
from typing import Any

from mpo.cli.options import add_data_options, add_recipe, one_or_many, overrides_of, show_help

_BUILD_EPILOG = """\
Any key of the recipe can be changed after it:
  --answers.samples 8   an entry           --prompts.data prompts.jsonl   another file
A run that was stopped goes on where it was. docs/data.md explains the keys.
"""


def register(commands: Any) -> None:
    """Adds ``data`` to the sub-parsers of ``mpo``."""
    data = commands.add_parser("data", help="look at preference data, or build it from prompts")
    data.set_defaults(run=lambda _: show_help(data))
    actions = data.add_subparsers(title="commands", metavar="COMMAND")
    _register_build(actions)
    check = actions.add_parser(
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
    check.add_argument("--max_response_length", type=int, help="longest response, in tokens")
    check.set_defaults(run=_check)


def _register_build(actions: Any) -> None:
    build = actions.add_parser(
        "build",
        help="make preference groups in every language from prompts",
        usage="mpo data build RECIPE [--out FOLDER] [--dry_run] [--key value ...]",
        description="Answer prompts with the model to be trained, translate, filter, and write preference groups.",
        epilog=_BUILD_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_recipe(build, "recipes/data/demo.yaml")
    build.add_argument(
        "--out", metavar="FOLDER", help="folder of the results, in place of the recipe's `out`"
    )
    build.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="check the recipe and its files, print what would be asked how often, stop",
    )
    build.set_defaults(run=_build)


def _build(arguments: argparse.Namespace) -> int:
    overrides, dry_run = overrides_of(arguments)
    if arguments.out is not None:
        overrides = ["--out", arguments.out, *overrides]
    from mpo.building.recipe import load_build

    recipe = load_build(arguments.recipe, overrides)  # what is misspelt is said before torch is imported
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.jobs.build import build_data

    build_data(recipe, dry_run=dry_run)
    return 0


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
        max_response_length=arguments.max_response_length,
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
