"""``mpo evaluate utility`` and ``mpo evaluate perplexity``: whether a model has become worse at anything else."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mpo.cli.options import add_loading_options, chosen_model
from mpo.errors import ConfigError


def register(measurements: Any) -> None:
    """Adds ``utility`` and ``perplexity`` to the sub-parsers of ``mpo evaluate``."""
    utility = measurements.add_parser(
        "utility",
        help="scores of lm-evaluation-harness, by default MGSM and Global-MMLU in the paper's languages",
        description='Run tasks of lm-evaluation-harness (pip install "mpo-align[eval]") on a model and its adapter.',
        allow_abbrev=False,
    )
    _add_model_options(utility)
    utility.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks, groups or tags of the harness")
    utility.add_argument("--task_folder", metavar="FOLDER", help="folder with task files (YAML) of your own")
    utility.add_argument(
        "--num_fewshot", type=int, help="examples before each question (default: the task's)"
    )
    utility.add_argument("--limit", type=int, help="take the first so many items of each task")
    utility.add_argument(
        "--apply_chat_template", action="store_true", help="put each question into the model's chat template"
    )
    utility.add_argument("--seed", type=int, default=1234, help="seed of the harness (default 1234)")
    utility.set_defaults(run=_run_utility)

    perplexity = measurements.add_parser(
        "perplexity",
        help="perplexity of text files, per language",
        description="Perplexity of ordinary text per language. A file has one text per line.",
        allow_abbrev=False,
    )
    _add_model_options(perplexity)
    perplexity.add_argument(
        "--texts",
        required=True,
        nargs="+",
        metavar="CODE=FILE",
        help="a text file per language: en=a.txt sw=b.txt",
    )
    perplexity.add_argument("--max_length", type=int, default=1024, help="cut texts to so many tokens")
    perplexity.add_argument("--limit", type=int, help="take the first so many texts of each file")
    perplexity.add_argument(
        "--confidence", type=float, default=0.95, help="coverage of the intervals (default 0.95)"
    )
    perplexity.set_defaults(run=_run_perplexity)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or Hub name of the model")
    parser.add_argument("--adapter", help="folder or Hub name of an adapter to put on it")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="folder of results, one for all models"
    )
    parser.add_argument("--name", help="what the model's folder is called (default: from its name)")
    parser.add_argument("--batch_size", type=int, default=8, help="texts per batch (default 8)")
    add_loading_options(parser, adapter_revision=True)


def _run_utility(arguments: argparse.Namespace) -> int:
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.evaluation.utility import measure_utility
    from mpo.jobs.suite_recipe import PAPER_TASKS

    measure_utility(
        arguments.tasks or PAPER_TASKS,
        model=chosen_model(arguments),
        out=Path(arguments.out),
        name=arguments.name,
        task_folder=arguments.task_folder,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        apply_chat_template=arguments.apply_chat_template,
        seed=arguments.seed,
    )
    return 0


def _run_perplexity(arguments: argparse.Namespace) -> int:
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.evaluation.perplexity import measure_perplexity

    measure_perplexity(
        _texts(arguments.texts),
        model=chosen_model(arguments),
        out=Path(arguments.out),
        name=arguments.name,
        max_length=arguments.max_length,
        limit=arguments.limit,
        confidence=arguments.confidence,
    )
    return 0


def _texts(words: list[str]) -> dict[str, str]:
    out: dict[str, str] = {}
    for word in words:
        code, equals, file = word.partition("=")
        if not (code and equals and file):
            raise ConfigError(f"--texts: expected CODE=FILE such as sw=swahili.txt, got {word!r}.")
        if code in out:
            raise ConfigError(f"--texts: {code} is given twice. Put a language's texts into one file.")
        out[code] = file
    return out
