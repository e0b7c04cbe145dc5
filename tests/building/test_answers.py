"""The model's own answers to harmless prompts in a target language."""

from __future__ import annotations

from typing import Any

from mpo.building.answers import own_answer
from tests.evaluation.probe.said import REFUSAL, TEXT


def said(text: str) -> dict[str, Any]:
    return {"text": text, "finished": True, "fault": None}


def test_a_refusal_in_the_target_language_is_no_answer() -> None:
    assert own_answer([said(REFUSAL["sw"])], "sw", "drop") == (None, "the model refuses")
    assert own_answer([said(REFUSAL["sw"]), said(TEXT["sw"])], "sw", "drop") == (TEXT["sw"], None)
