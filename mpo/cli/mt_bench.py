"""``mpo evaluate mt-bench``: dialogues of two turns, graded by an LLM judge."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mpo.cli.attack import add_engine_options, add_judge_options, engine_of, judge_of
from mpo.cli.options import add_confidence, add_measured_model, add_results, chosen_model


def register(measurements: Any) -> None:
    """Adds ``mt-bench`` to the sub-parsers of ``mpo evaluate``."""
    parser = measurements.add_parser(
        "mt-bench",
        help="answers in two turns, graded 1 to 10 by an LLM judge, per language and category",
        description="Let a model answer MT-Bench's questions and an LLM judge grade the answers.",
        allow_abbrev=False,
    )
    add_measured_model(parser, served=True)
    parser.add_argument(
        "--questions",
        required=True,
        nargs="+",
        metavar="FILE",
        help="question.jsonl as published, one per language or all in one",
    )
    parser.add_argument(
        "--language",
        metavar="CODE",
        help="language of files that name none (default: from their names, or en)",
    )
    parser.add_argument("--limit", type=int, help="keep the first so many questions of each language")
    add_results(parser)
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="longest answer (default 1024)")
    add_engine_options(parser.add_argument_group("engine"))
    add_judge_options(parser.add_argument_group("judge"), "judge", default="llm")
    add_confidence(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    judge = judge_of(arguments, "judge")
    assert judge is not None
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.evaluation.engines import Generation
    from mpo.evaluation.mt_bench import load_questions, measure_mt_bench, shown_origin

    questions = load_questions(arguments.questions, language=arguments.language, limit=arguments.limit)
    measure_mt_bench(
        questions,
        model=chosen_model(arguments, **engine_of(arguments)),
        judge=judge,
        out=Path(arguments.out),
        generation=Generation(arguments.max_new_tokens),
        name=arguments.name,
        origin=shown_origin(arguments.questions),
        confidence=arguments.confidence,
    )
    return 0
