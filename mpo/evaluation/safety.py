"""Attack success and over-refusal of one model on one prompt set: answers, verdicts, rates, one folder."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpo.common.checks import check_confidence, check_name
from mpo.common.provenance import collect, portable_path
from mpo.common.statistics import Kappa
from mpo.common.typed_json import write_typed
from mpo.errors import ConfigError
from mpo.evaluation.answers import Framing, make_answers
from mpo.evaluation.engines import Generation, ModelChoice, make_engine
from mpo.evaluation.judges import Judge, JudgeChoice, make_judge
from mpo.evaluation.prompts import PromptSet
from mpo.evaluation.rates import RateTable, tabulate
from mpo.evaluation.results import SAFETY, SafetyResult
from mpo.evaluation.tasks import Task
from mpo.evaluation.verdicts import agreement, judge_answers, unparsed

CACHE = "judge_cache"


def measure_safety(
    task: Task,
    prompts: PromptSet,
    *,
    model: ModelChoice,
    out: Path,
    generation: Generation | None = None,
    judge: JudgeChoice | None = None,
    second_judge: JudgeChoice | None = None,
    framing: Framing | None = None,
    name: str | None = None,
    confidence: float = 0.95,
) -> RateTable:
    """Lets a model answer, a judge judge, prints the rates per language and writes them.

    Everything is in ``out/NAME/TASK/PROMPTS``: ``answers.jsonl``, ``verdicts.JUDGE.jsonl`` and ``result.json``. A run
    that was stopped or killed goes on where it was; one that is complete computes nothing anew.

    Args:
        task: :data:`~mpo.evaluation.tasks.ATTACK` or :data:`~mpo.evaluation.tasks.OVER_REFUSAL`.
        prompts: The prompt set.
        model: Which model, where and how.
        out: Folder of results, shared by all models.
        generation: How it answers; greedy by default.
        judge: What judges; refusal phrases by default.
        second_judge: A second opinion on the same answers, for the agreement of the two.
        framing: A template or a system prompt around each prompt.
        name: Name of the model's folder; by default the last part of the adapter's or the model's name.
        confidence: Coverage of the intervals.

    Returns:
        The rates by the first judge.

    Raises:
        MPOError: A model, a judge, a file or a setting cannot be used. What was computed before is kept.
    """
    check_confidence(confidence)
    generation = generation or Generation()
    framing = framing or Framing()
    folder = out / model_folder(model, name) / task.name / prompts.name
    # Judges first: a missing key is better found before the model has answered for an hour.
    choices = [choice for choice in (judge or JudgeChoice(), second_judge) if choice is not None]
    judges = [_make_judge(choice, task, out) for choice in choices]
    try:
        if len({each.label for each in judges}) < len(judges):
            raise ConfigError(f"second_judge: is the same as the first, {judges[0].label}. Take another.")
        engine = make_engine(model, generation)
        try:
            print(f"Answering {len(prompts.prompts)} prompts in {folder}", flush=True)
            answers = make_answers(engine, prompts, folder, framing)
            about_engine = {**engine.describe(), **generation.settings()}
        finally:
            engine.close()  # makes room for a guard
        verdicts = []
        for each in judges:
            verdicts.append(judge_answers(each, task, answers, folder))
            each.close()
    finally:
        for each in judges:
            each.close()
    table = tabulate(task, answers, verdicts[0], confidence)
    second, notes = None, []
    if second_judge is not None:
        kappa = agreement(verdicts[0], verdicts[1], confidence)
        second = {
            **_about_judge(judges[1], verdicts[1]),
            **tabulate(task, answers, verdicts[1], confidence).to_dict(),
            "agreement": None if kappa is None else vars(kappa),
        }
        notes.append(_agreement_note(judges[1], kappa, unparsed(verdicts[1])))
    base = model.model if model.engine != "server" else None
    result = SafetyResult(
        **vars(table),
        measurement=task.name,
        prompt_set=prompts.name,
        prompts=_about_prompts(prompts, framing),
        model=about_model(model, folder.parent.parent.name),
        engine=about_engine,
        judge=_about_judge(judges[0], verdicts[0]),
        second_judge=second,
        provenance=collect(base_model=base, data_fingerprint=prompts.fingerprint),
    )
    written = write_typed(folder / SAFETY, result)
    print()
    table.show(
        f"{task.title}: {folder.parent.parent.name} on {prompts.name}, judged by {judges[0].label}", notes
    )
    print(f"\nWritten: {written}")
    return table


def model_folder(model: ModelChoice, name: str | None = None) -> str:
    """Name of a model's folder in the results.

    Raises:
        ConfigError: The name given is not one of a folder.
    """
    if name is not None:
        check_name(name)
        return name
    source = (model.adapter or model.model).rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.+@-]+", "-", source).strip("-.") or "model"


def _make_judge(choice: JudgeChoice, task: Task, out: Path) -> Judge:
    if choice.name == "llm" and choice.cache is None:
        choice = replace(choice, cache=out / CACHE)
    return make_judge(choice, task)


def _about_prompts(prompts: PromptSet, framing: Framing) -> dict[str, Any]:
    return {
        "origin": prompts.origin,
        "count": len(prompts.prompts),
        "dropped": prompts.dropped,
        "fingerprint": prompts.fingerprint,
        "template": framing.template,
        "system_prompt": framing.system_prompt,
    }


def about_model(model: ModelChoice, name: str) -> dict[str, Any]:
    """What a result says of the model it is of; folders are shown without their users' names."""

    def shown(source: str | None) -> str | None:
        return portable_path(source) if source is not None and Path(source).exists() else source

    return {
        "name": name,
        "model": shown(model.model),
        "adapter": shown(model.adapter),
        "revision": model.revision,
    }


def _about_judge(judge: Judge, verdicts: dict[str, str]) -> dict[str, Any]:
    return {"name": judge.label, "unparsed": unparsed(verdicts), **judge.settings()}


def _agreement_note(judge: Judge, kappa: Kappa | None, unread: int) -> str:
    if kappa is None:
        return f"{judge.label} and the first judge have no readable verdict on the same answer."
    rest = f"; {unread} of its replies name no verdict" if unread else ""
    if kappa.kappa is None:
        return f"{judge.label} gives one and the same verdict to all {kappa.count} answers, as the first does{rest}."
    return (
        f"{judge.label} agrees on {100 * kappa.agreement:.1f} % of {kappa.count} answers; Cohen's kappa "
        f"{kappa.kappa:.2f} [{kappa.low:.2f}, {kappa.high:.2f}]{rest}."
    )
