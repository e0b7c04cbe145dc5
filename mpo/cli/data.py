"""``mpo data``: look at preference data, bring the forms that people have into one, and build groups from prompts."""

from __future__ import annotations

import argparse
from typing import Any

from mpo.cli import options
from mpo.errors import ConfigError

_CHANGES = "  --answers.samples 8   an entry           --prompts.data prompts.jsonl   another file\n"


def register(commands: Any) -> None:
    """Adds ``data`` to the sub-parsers of ``mpo``."""
    data = commands.add_parser("data", help="look at preference data, convert it, or build it from prompts")
    data.set_defaults(run=lambda _: options.show_help(data))
    kinds = data.add_subparsers(title="commands", metavar="COMMAND")
    _register_build(kinds)
    _register_check(kinds)
    _register_convert(kinds)
    _register_leak(kinds)


def _register_check(kinds: Any) -> None:
    check = kinds.add_parser(
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
    options.add_data_options(check)
    check.add_argument("--max_response_length", type=int, help="longest response, in tokens")
    check.set_defaults(run=_check)


def _register_convert(kinds: Any) -> None:
    convert = kinds.add_parser(
        "convert",
        help="bring prompts and pairs, as they are published, into the project's form",
        allow_abbrev=False,
    )
    convert.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="*",
        help="JSON, JSONL, CSV or Parquet file(s), a .txt with a prompt a line, or a name on the Hub",
    )
    convert.add_argument("--output", required=True, metavar="FILE", help="the .jsonl file to write")
    convert.add_argument(
        "--language",
        dest="by_language",
        metavar="CODE=FILE",
        action="append",
        default=[],
        help="a file of translations and the language it is in; once for each language",
    )
    convert.add_argument(
        "--key",
        metavar="COLUMN",
        help="make groups: join files by this column (`row`: row n of every file is the same)",
    )
    convert.add_argument(
        "--source_language", default="en", metavar="CODE", help="the dominant language (default en)"
    )
    convert.add_argument(
        "--keep", nargs="+", default=[], metavar="COLUMN", help="further columns to keep beside the pairs"
    )
    options.add_split(convert)
    options.add_bad_rows(convert)
    convert.set_defaults(run=_convert)


def _register_leak(kinds: Any) -> None:
    leak = kinds.add_parser(
        "leak", help="find evaluation prompts that stand in training data", allow_abbrev=False
    )
    leak.add_argument(
        "train", metavar="TRAIN", nargs="+", help="training file(s) in any form, or names on the Hub"
    )
    leak.add_argument(
        "--against",
        metavar="EVAL",
        nargs="+",
        required=True,
        help="prompt sets or files of pairs to look for; `probe` is the set that comes with the package",
    )
    leak.add_argument("--output", metavar="FILE", help="write all pairs as .json or .csv")
    leak.add_argument("--show_texts", action="store_true", help="show the beginning of both texts")
    leak.add_argument(
        "--characters", type=float, default=0.5, help="least similarity of letters (default 0.5)"
    )
    leak.add_argument("--words", type=float, default=0.6, help="least similarity of words (default 0.6)")
    leak.add_argument(
        "--embeddings",
        metavar="MODEL",
        help="compare by meaning, too, with this model of sentence-transformers",
    )
    leak.add_argument(
        "--meaning", type=float, default=0.9, help="least cosine of two embeddings (default 0.9)"
    )
    leak.add_argument("--device", help="where the embedding model runs: cpu, cuda, ...")
    options.add_split(leak)
    leak.set_defaults(run=_leak)


def _register_build(actions: Any) -> None:
    build = options.add_recipe_command(
        actions,
        "mpo data build",
        "recipes/data/demo.yaml",
        help="make preference groups in every language from prompts",
        description="Answer prompts with the model to be trained, translate, filter, and write preference groups.",
        changes=_CHANGES,
        docs="A run that was stopped goes on where it was. `mpo keys --of build` explains the keys.",
        out="the results",
        dry_run="check the recipe and its files, print what would be asked how often, stop",
    )
    build.set_defaults(run=_build)


def _build(arguments: argparse.Namespace) -> int:
    overrides, dry_run = options.overrides_of(arguments)
    from mpo.building.recipe import load_build

    recipe = load_build(arguments.recipe, overrides)  # what is misspelt is said before torch is imported
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.jobs.build import build_data

    build_data(recipe, dry_run=dry_run)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from mpo.common.files import refuse_input
    from mpo.common.progress import quiet_libraries

    if arguments.json:
        refuse_input(arguments.json, arguments.data, setting="--json")
    quiet_libraries()
    from mpo.data import check_data

    tokenizer = None
    if arguments.model is not None:
        from mpo.modeling.loading import ModelSource, load_tokenizer

        tokenizer = load_tokenizer(ModelSource(arguments.model), arguments.chat_template)
    report = check_data(
        options.one_or_many(arguments.data),
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
    return 1 if report.bad_rows else 0


def _convert(arguments: argparse.Namespace) -> int:
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.data import convert

    result = convert(
        _inputs(arguments),
        arguments.output,
        key=arguments.key,
        source_language=arguments.source_language,
        keep=arguments.keep,
        split=arguments.dataset_split,
        bad_rows=arguments.bad_rows,
    )
    print(result.to_text())
    return 0


def _inputs(arguments: argparse.Namespace) -> list[str] | dict[str, str]:
    """What is to be converted: files, or files by language.

    Raises:
        ConfigError: There is none, or both are given.
    """
    by_language = options.files_by_language(arguments.by_language, "--language")
    if bool(arguments.inputs) == bool(by_language):
        raise ConfigError("expected files to convert, or `--language CODE=FILE` for each, and not both.")
    return by_language or list(arguments.inputs)


def _leak(arguments: argparse.Namespace) -> int:
    from mpo.common.files import refuse_input
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.data.leaks import check_output
    from mpo.jobs.leak import measure_leaks

    if arguments.output:
        check_output(arguments.output)
        refuse_input(arguments.output, [*arguments.train, *arguments.against], setting="--output")
    leaks = measure_leaks(
        arguments.train,
        arguments.against,
        split=arguments.dataset_split,
        characters=arguments.characters,
        words=arguments.words,
        embeddings=arguments.embeddings,
        meaning=arguments.meaning,
        device=arguments.device,
    )
    print(leaks.to_text(texts=arguments.show_texts))
    if arguments.output:
        print(f"\nWritten to {leaks.write(arguments.output, texts=arguments.show_texts)}")
    return 1 if leaks.pairs else 0
