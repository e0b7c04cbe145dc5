"""``mpo evaluate utility`` and ``mpo evaluate perplexity``: whether a model has become worse at anything else."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mpo.cli import options


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
    options.add_confidence(perplexity)
    perplexity.set_defaults(run=_run_perplexity)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    options.add_measured_model(parser)
    options.add_results(parser)
    parser.add_argument("--batch_size", type=int, default=8, help="texts per batch (default 8)")
    options.add_loading_options(parser, adapter_revision=True)


def _run_utility(arguments: argparse.Namespace) -> int:
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.evaluation.utility import measure_utility
    from mpo.jobs.suite_recipe import PAPER_TASKS

    measure_utility(
        arguments.tasks or PAPER_TASKS,
        model=options.chosen_model(arguments),
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
        options.files_by_language(arguments.texts, "--texts"),
        model=options.chosen_model(arguments),
        out=Path(arguments.out),
        name=arguments.name,
        max_length=arguments.max_length,
        limit=arguments.limit,
        confidence=arguments.confidence,
    )
    return 0
