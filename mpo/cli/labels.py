"""``mpo evaluate label`` and ``mpo evaluate judge``: answers to label by hand, and judges measured against the labels."""

from __future__ import annotations

import argparse
from typing import Any

from mpo.cli.options import add_confidence


def register(measurements: Any) -> None:
    """Adds ``label`` and ``judge`` to the sub-parsers of ``mpo evaluate``."""
    label = measurements.add_parser(
        "label",
        help="a sample of judged answers to label by hand, without the judge's verdicts",
        description="Draw answers at random, as many of each language and verdict as there are, and write them to a file "
        "with an empty column `label`.",
        allow_abbrev=False,
    )
    label.add_argument(
        "folder", metavar="FOLDER", help="folder of results, of all models, one, or one prompt set"
    )
    label.add_argument("--out", required=True, metavar="FILE", help="file to write, .csv or .jsonl")
    label.add_argument("--sample", type=int, default=200, help="number of answers (default 200)")
    label.add_argument(
        "--task", choices=("attack", "over_refusal"), help="only one of the two (default: both)"
    )
    label.add_argument("--languages", nargs="+", metavar="CODE", help="only answers to prompts in these")
    label.add_argument("--seed", type=int, default=0, help="seed of the sample and its order (default 0)")
    label.set_defaults(run=_run_label)

    judge = measurements.add_parser(
        "judge",
        help="sensitivity and specificity of the judges against labels, and rates corrected for them",
        description="Measure every judge of a folder against labels of people, per language.",
        allow_abbrev=False,
    )
    judge.add_argument("folder", metavar="FOLDER", help="the folder that the sample was drawn from")
    judge.add_argument(
        "--gold", required=True, metavar="FILE", help="the filled-in file of `mpo evaluate label`"
    )
    add_confidence(judge)
    judge.set_defaults(run=_run_judge)


def _run_label(arguments: argparse.Namespace) -> int:
    from mpo.evaluation.labels import write_sample

    rows = write_sample(
        arguments.folder,
        arguments.out,
        sample=arguments.sample,
        seed=arguments.seed,
        task=arguments.task,
        languages=arguments.languages,
    )
    print(
        f"Written: {arguments.out}, {rows} answers. Write one of the `choices` into the column `label`; rows may stay empty. Then:"
        f"\n  mpo evaluate judge {arguments.folder} --gold {arguments.out}"
    )
    return 0


def _run_judge(arguments: argparse.Namespace) -> int:
    from mpo.evaluation.judge_quality import measure_judge

    measure_judge(arguments.folder, arguments.gold, confidence=arguments.confidence)
    return 0
