"""A judge of ten languages against a few labels in each, from made-up counts."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from mpo.evaluation.answers import AnswerRow
from mpo.evaluation.judge_quality import compare_judge
from mpo.evaluation.labels import JudgedRun
from mpo.evaluation.results import MeasuredJudge
from mpo.evaluation.tasks import TASKS

MISTAKES = {
    "en": (1, 0),
    "zh": (1, 0),
    "ja": (1, 0),
    "ko": (1, 0),
    "ar": (0, 2),
    "bn": (2, 0),
    "sw": (2, 0),
    "de": (1, 0),
    "fr": (1, 0),
    "es": (1, 0),
}
"""By language: of twelve labelled refusals by the judge, those that are none; of twelve answers, those that are refusals."""


def measured(mistakes: Mapping[str, tuple[int, int]] = MISTAKES, seed: int = 0) -> MeasuredJudge:
    """Two hundred answers in each language, of which the judge calls 15 % refusals; twelve of either kind are labelled."""
    answers, verdicts, kinds = {}, {}, {}
    for code, (false, missed) in mistakes.items():
        for n in range(200):
            name = f"{n}/{code}"
            answers[name] = AnswerRow(name, str(n), code, "Hello?", "Hello.", True)
            verdicts[name] = "refusal" if n < 30 else "answer"
            if n % 30 < 12 and n < 60:
                wrong = n % 30 < (false if n < 30 else missed)
                kinds[name] = ("answer" if n < 30 else "refusal") if wrong else verdicts[name]
    run = JudgedRun("model", "set", TASKS["over_refusal"], answers, {"judge": verdicts})
    labels = {label_id: kinds[name] for label_id, name in run.label_ids.items() if name in kinds}
    return compare_judge("judge", [run], labels, seed=seed)


def test_estimates_of_many_languages_lie_well_inside_their_intervals() -> None:
    found = measured()
    overall, mean = found.overall, found.means["model/set"]
    assert overall.labels == 240 and overall.answers == 2000
    for value, ends, room in (
        (overall.kappa, overall.kappa_interval, 0.03),
        (overall.sensitivity, overall.sensitivity_interval, 0.03),
        (overall.specificity, overall.specificity_interval, 0.005),
        (mean.corrected, mean.interval, 0.03),
    ):
        assert value is not None and ends is not None
        assert 0 <= ends[0] < value - room and value + room < ends[1] <= 1
    assert measured() == found != measured(seed=1)


def test_a_judge_without_a_mistake_in_any_label_may_still_err() -> None:
    found = measured(dict.fromkeys(MISTAKES, (0, 0)))
    overall, mean = found.overall, found.means["model/set"]
    assert overall.kappa == 1 and overall.kappa_interval is not None and mean.interval is not None
    assert 0.8 < overall.kappa_interval[0] < 0.95 and overall.kappa_interval[1] == 1
    assert mean.corrected == pytest.approx(0.15)
    assert (
        0.09 < mean.interval[0] < 0.13 and 0.17 < mean.interval[1] < 0.22
    )  # of prompts, alike in all languages


def test_all_numbers_of_one_language_alone_are_those_of_all_together() -> None:
    found = measured({"bn": (2, 1)})
    assert found.overall.kappa_interval == found.languages["bn"].kappa_interval
    rate = found.languages["bn"].rates["model/set"]
    assert found.means["model/set"].interval == pytest.approx(rate.interval)
