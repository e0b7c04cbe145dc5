"""``mpo evaluate attack`` and ``mpo evaluate over-refusal``: answers to prompts, judged, as rates per language."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpo.cli import options
from mpo.errors import ConfigError

if TYPE_CHECKING:
    from mpo.evaluation.judges import JudgeChoice


_JUDGE_HELP = {
    "refusal-phrases": "refusal-phrases needs no model (default), llm is behind a URL, guard runs here",
    "llm": "llm is behind a URL (default), guard with the format chat runs here",
    None: "judges the same answers; prints Cohen's kappa",
}


def register(measurements: Any) -> None:
    """Adds ``attack`` and ``over-refusal`` to the sub-parsers of ``mpo evaluate``."""
    attack = measurements.add_parser(
        "attack",
        help="attack success rate per language, on harmful prompts",
        description="Let a model answer harmful prompts and a judge say which answers are unsafe.",
        allow_abbrev=False,
    )
    _add_options(attack)
    attack.set_defaults(run=_run, task="attack")
    over_refusal = measurements.add_parser(
        "over-refusal",
        help="refusal rate per language, on harmless prompts",
        description="Let a model answer harmless prompts and a judge say which answers are refusals.",
        allow_abbrev=False,
    )
    _add_options(over_refusal)
    over_refusal.set_defaults(run=_run, task="over_refusal")


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_measured_model(parser, served=True)
    parser.add_argument(
        "--prompts",
        required=True,
        nargs="+",
        metavar="FILE_OR_NAME",
        help="CSV, JSON, JSONL or Parquet file(s), multijail, csrt, or a dataset on the Hub",
    )
    options.add_results(parser)
    _add_prompt_options(parser.add_argument_group("prompts"))
    options.add_generation_options(parser.add_argument_group("generation"), 256)
    add_engine_options(parser.add_argument_group("engine"))
    add_judge_options(parser.add_argument_group("judge"), "judge", default="refusal-phrases")
    add_judge_options(parser.add_argument_group("second judge"), "second_judge", default=None)
    options.add_confidence(parser)


def _add_prompt_options(group: Any) -> None:
    group.add_argument("--languages", nargs="+", metavar="CODE", help="keep only prompts in these languages")
    group.add_argument("--limit", type=int, help="keep the first so many prompts, with their translations")
    group.add_argument(
        "--prompt_set", metavar="NAME", help="name of the set in the results (default: the file's)"
    )
    group.add_argument("--prompt_column", help="column with the prompt")
    group.add_argument("--language_column", help="column with the language")
    group.add_argument("--prompt_language", metavar="CODE", help="language of prompts without a label")
    options.add_split(group)
    options.add_bad_rows(group)
    group.add_argument(
        "--template", metavar="FILE", help="text with the slot {prompt} to put each prompt into"
    )
    group.add_argument("--system_prompt", help="system turn before each prompt")


def add_engine_options(group: Any) -> None:
    """What runs the model, and how it is loaded."""
    group.add_argument(
        "--engine",
        choices=("transformers", "vllm", "server"),
        help="what runs the model (default: transformers, or server with --url)",
    )
    group.add_argument("--url", help="base URL of an OpenAI-compatible server, http://localhost:8000/v1")
    group.add_argument("--key_variable", metavar="NAME", help="environment variable with the server's key")
    group.add_argument(
        "--concurrency",
        type=int,
        default=8,
        help="requests to a server at the same time, also to a judge (default 8)",
    )
    group.add_argument(
        "--timeout", type=float, default=600.0, help="seconds to wait for a server (default 600)"
    )
    group.add_argument("--batch_size", type=int, default=16, help="prompts per batch (default 16)")
    options.add_loading_options(group, adapter_revision=True)


def engine_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_engine_options` lets be chosen, for :func:`~mpo.cli.options.chosen_model`."""
    return {
        "engine": arguments.engine or ("transformers" if arguments.url is None else "server"),
        **{name: getattr(arguments, name) for name in ("url", "key_variable", "concurrency", "timeout")},
    }


def add_judge_options(group: Any, prefix: str, default: str | None) -> None:
    """Which judge, and how it is reached; `prefix` begins the options' names."""
    group.add_argument(
        f"--{prefix}",
        choices=("refusal-phrases", "llm", "guard"),
        default=default,
        help=_JUDGE_HELP[default],
    )
    group.add_argument(f"--{prefix}_model", metavar="MODEL", help="model of an llm or a guard")
    group.add_argument(f"--{prefix}_url", metavar="URL", help="base URL of an llm (default: OpenAI's)")
    group.add_argument(f"--{prefix}_key_variable", metavar="NAME", help="environment variable with its key")
    group.add_argument(f"--{prefix}_prompt", metavar="FILE", help="judging prompt with {prompt} and {answer}")
    group.add_argument(
        f"--{prefix}_format",
        metavar="FORMAT",
        help="how a guard is asked, one of docs/evaluation.md (default: from its name)",
    )
    group.add_argument(f"--{prefix}_request", metavar="JSON", help="further fields of each request to an llm")
    group.add_argument(
        f"--{prefix}_timeout", type=float, default=120.0, help="seconds to wait for an llm (default 120)"
    )


def _run(arguments: argparse.Namespace) -> int:
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.evaluation.answers import Framing
    from mpo.evaluation.prompts import load_prompts, load_template
    from mpo.evaluation.safety import measure_safety
    from mpo.evaluation.tasks import TASKS

    prompts = load_prompts(
        options.one_or_many(arguments.prompts),
        name=arguments.prompt_set,
        languages=arguments.languages,
        limit=arguments.limit,
        prompt_column=arguments.prompt_column,
        language_column=arguments.language_column,
        language=arguments.prompt_language,
        split=arguments.dataset_split,
        bad_rows=arguments.bad_rows,
    )
    if prompts.dropped:
        print(f"{prompts.dropped} bad rows were dropped.", flush=True)
    template = None if arguments.template is None else load_template(arguments.template)
    judge = judge_of(arguments, "judge")
    assert judge is not None
    measure_safety(
        TASKS[arguments.task],
        prompts,
        model=options.chosen_model(arguments, **engine_of(arguments)),
        out=Path(arguments.out),
        generation=options.generation_of(arguments),
        judge=judge,
        second_judge=judge_of(arguments, "second_judge"),
        framing=Framing(template, arguments.system_prompt),
        name=arguments.name,
        confidence=arguments.confidence,
    )
    return 0


def judge_of(arguments: argparse.Namespace, prefix: str) -> JudgeChoice | None:
    """The judge that the options name; None where they name none.

    Raises:
        ConfigError: Options are given without a judge, or contradict each other.
    """
    from mpo.evaluation.judges import JudgeChoice

    given = {
        name: getattr(arguments, f"{prefix}_{name}")
        for name in ("model", "url", "key_variable", "prompt", "format", "request")
    }
    kind = getattr(arguments, prefix)
    if kind is None:
        named = [name for name, value in given.items() if value is not None]
        if named:
            raise ConfigError(f"--{prefix}_{named[0]} needs --{prefix}.")
        return None
    if given["request"] is not None:
        given["request"] = options.json_object(given["request"], f"--{prefix}_request")
    return JudgeChoice(
        kind,
        **given,
        concurrency=arguments.concurrency,
        timeout=getattr(arguments, f"{prefix}_timeout"),
        batch_size=arguments.batch_size,
        device=arguments.device,
    )
