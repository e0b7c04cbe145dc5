"""The model's own answers to harmless prompts in a target language."""

from __future__ import annotations

from typing import Any

import pytest

from mpo.building.answers import DATA, MODEL, own_answer
from mpo.building.prompts import PromptRow
from mpo.building.recipe import AnswerSettings
from mpo.building.refusals import Refusals
from mpo.building.targets import Target
from mpo.building.translation import TranslationChoice
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
