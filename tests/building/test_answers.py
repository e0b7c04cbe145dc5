"""The model's own answers to harmless prompts in a target language."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpo.building.answers import DATA, MODEL, REFUSALS, PairMaker, own_answer, sample
from mpo.building.prompts import PromptRow
from mpo.building.recipe import AnswerSettings
from mpo.building.refusals import Refusals
from mpo.building.starter import starter_openings, starter_refusals
from mpo.building.targets import Target
from mpo.building.translation import TranslationChoice
from mpo.evaluation.engines import Answer
from tests.evaluation.probe.said import REFUSAL, TEXT


def said(text: str) -> dict[str, Any]:
    return {"text": text, "finished": True, "fault": None}


def test_a_refusal_in_the_target_language_is_no_answer() -> None:
    assert own_answer([said(REFUSAL["sw"])], "sw", AnswerSettings()) == (None, "the model refuses")
    assert own_answer([said(REFUSAL["sw"]), said(TEXT["sw"])], "sw", AnswerSettings()) == (TEXT["sw"], None)


def test_any_answer_is_taken_as_it_was_said_where_it_is_held_and_not_taught() -> None:
    any_answer = AnswerSettings(harmless="any")
    cut = {**said("Samaki ni"), "finished": False}
    for answer in (said(REFUSAL["sw"]), said("no no no no no no no no no no no no"), cut):
        assert own_answer([answer], "sw", any_answer) == (answer["text"], None)
        assert own_answer([answer], "sw", AnswerSettings())[0] is None
    nothing = {"text": "", "finished": True, "fault": "no text"}
    assert own_answer([nothing], "sw", any_answer) == (None, "no text")


def test_what_the_model_could_not_answer_is_not_translated_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, str] = {}
    monkeypatch.setattr(Target, "_translate", lambda self, texts, kept: asked.update(texts) or {})
    target = Target("sw", "en", None, TranslationChoice(), Refusals(), AnswerSettings())
    prompt = PromptRow("p", "harmless", {"en": "Name a fish.", "sw": "Taja samaki."})
    pair = {
        "chosen": "A perch.",
        "rejected": "No.",
        "fault": None,
        "from": {"chosen": MODEL, "rejected": DATA},
    }
    given = {"text": "Taja samaki.", "from": DATA, "fault": None}
    (row,) = target.texts([(prompt, pair, given, {"answers": [said(REFUSAL["sw"])]})], {})
    assert row["faults"] == {"chosen": "the model refuses"} and row["chosen"] is None
    assert asked == {"0 rejected": "No."}


def test_an_own_answer_that_is_the_lists_refusal_is_held_beside_another_refusal(tmp_path: Path) -> None:
    file = tmp_path / "refusals.json"
    own = {code: starter_refusals(code)[3] for code in ("en", "sw")}
    file.write_text(json.dumps({code: [text] for code, text in own.items()}), encoding="utf-8")
    refusals, settings = Refusals(str(file)), AnswerSettings(harmless="any", chosen="refusal", samples=1)
    prompt = PromptRow("p", "harmless", {"en": "Name a fish.", "sw": "Taja samaki."})
    verdicts, nothing = {"verdicts": ["refusal"]}, {"answers": []}
    maker = PairMaker(settings, "en", refusals, Refusals(package=starter_openings), None)
    (pair,) = maker.make([(prompt, {"answers": [said(f"{own['en']} ")]}, verdicts, nothing)], {})
    assert pair["fault"] is None and pair["chosen"].strip() == own["en"]
    assert pair["rejected"] in starter_refusals("en") and pair["rejected"] != own["en"]
    (other,) = maker.make([(prompt, {"answers": [said("A perch.")]}, verdicts, nothing)], {})
    assert other["rejected"] == own["en"]

    target = Target("sw", "en", None, TranslationChoice(), {REFUSALS: refusals}, settings)
    given = {"text": "Taja samaki.", "from": DATA, "fault": None}
    for answer, same in ((own["sw"], False), ("Samaki.", True)):
        (row,) = target.texts([(prompt, pair, given, {"answers": [said(answer)]})], {})
        assert (row["chosen"], row["rejected"] == own["sw"]) == (answer, same)
        assert row["rejected"] in starter_refusals("sw")


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Answer("\n" * 24, finished=False), "no text"),
        (Answer("", finished=True), "no text"),
        (Answer("<think>A fish", finished=False), "still reasoning when it was cut off"),
        (Answer("<think>A fish.</think>\n", finished=False), "still reasoning when it was cut off"),
        (Answer("", finished=False, reasoning="A fish"), "still reasoning when it was cut off"),
        (Answer("", finished=True, reasoning="A fish"), "no text"),
        (Answer("A perch.", finished=False), None),
    ],
)
def test_only_what_has_begun_to_reason_was_still_reasoning(answer: Answer, fault: str | None) -> None:
    class Engine:
        def generate(self, conversations: Any, done: Any) -> Any:
            yield 0, answer

    class Rows(dict[str, Any]):
        keep = dict.__setitem__

    (((row,)),) = sample(Engine(), [("Name a fish.", 1)], Rows())  # type: ignore[arg-type]
    assert row["fault"] == fault
