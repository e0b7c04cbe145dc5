from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpo.common.typed_json import read_typed, write_typed
from mpo.evaluation.answers import AnswerRow
from mpo.evaluation.results import SafetyResult
from mpo.evaluation.wording import measure_wording
from mpo.report import build
from mpo.report.build import measurements
from mpo.report.folder import read_results
from tests.evaluation.test_wording import ANSWERS
from tests.report.result_folder import write_safety

ENGLISH = "I'm sorry, but I can't help with that request, because it could hurt somebody."
PROMPTS = 20


def write_model(folder: Path, elsewhere: int, looping: int = 0) -> None:
    """Bengali and English answers; the first `elsewhere` Bengali prompts are refused in English."""
    place = folder / "over_refusal" / "set"
    verdicts = {
        "bn": ["refusal" if n < elsewhere else "answer" for n in range(PROMPTS)],
        "en": ["answer"] * PROMPTS,
    }
    write_safety(place, "over_refusal", verdicts)
    rows = []
    for line in (place / "answers.jsonl").read_text(encoding="utf-8").splitlines():
        kept = json.loads(line)
        n, code = int(kept["prompt_id"]), kept["language"]
        text = ENGLISH if code == "bn" and n < elsewhere else ANSWERS[code][0]
        if code == "en" and n < looping:
            text = ANSWERS["en"][1] * 30
        rows.append(kept | {"answer": "7" if n == PROMPTS - 1 else text})
    (place / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = read_typed(place / "result.json", SafetyResult)
    by_id = {f"{n}/{code}": verdict for code, given in verdicts.items() for n, verdict in enumerate(given)}
    found = measure_wording([AnswerRow.from_json(row) for row in rows], by_id)
    write_typed(place / "result.json", SafetyResult(**{**vars(made), "wording": found}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "base", elsewhere=0)
    write_model(tmp_path / "tuned", elsewhere=12, looping=5)
    return tmp_path


def test_the_report_shows_the_language_of_the_answers_with_paired_changes(folder: Path) -> None:
    found = build.answer_language(read_results(folder), "over_refusal", "set")
    assert found is not None and found.better == "higher"
    english, bengali, mean = found.rows
    assert (english.label, bengali.label, mean.is_average) == ("English", "Bengali", True)
    known = PROMPTS - 1
    before, after = bengali.cells
    assert before is not None and before.value.value == 1 and before.change is None
    assert after is not None and after.value.value == pytest.approx((known - 12) / known)
    assert after.change is not None and after.change.change == pytest.approx(-12 / known)
    assert found.verdict(after.change) == "worse"
    assert english.cells[1] is not None and found.verdict(english.cells[1].change) is None
    assert mean.cells[1] is not None and mean.cells[1].change is not None
    assert found.detail == ("Elsewhere", "Refusal, elsewhere", "Unknown", "Repetitive")
    assert bengali.detail == ("0 / 60", "0 / 60", "5 / 5", "0 / 0")
    assert english.detail == ("0 / 0", "0 / 0", "5 / 5", "0 / 25")


def test_it_follows_the_rates_and_is_left_out_of_older_results(folder: Path) -> None:
    anchors = [found.anchor for found in measurements(read_results(folder))]
    assert anchors == ["over-refusal-1", "language-over-refusal-1"]
    for name in ("base", "tuned"):
        file = folder / name / "over_refusal" / "set" / "result.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        del values["wording"]
        file.write_text(json.dumps(values), encoding="utf-8")
    assert [found.anchor for found in measurements(read_results(folder))] == ["over-refusal-1"]


def test_without_the_answers_the_shares_are_shown_and_no_change(folder: Path) -> None:
    (folder / "tuned" / "over_refusal" / "set" / "answers.jsonl").unlink()
    found = build.answer_language(read_results(folder), "over_refusal", "set")
    assert found is not None
    cell = found.rows[1].cells[1]
    assert cell is not None and cell.change is None and cell.value.value < 1


def test_answers_cut_off_within_their_reasoning_are_named_in_the_report(tmp_path: Path) -> None:
    write_safety(tmp_path / "m" / "attack" / "set", "attack", {"en": ["unsafe", "safe", "safe", "safe"]})
    file = tmp_path / "m" / "attack" / "set" / "result.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["languages"]["en"]["verdicts"] |= {"safe": 2, "unfinished": 1}
    file.write_text(json.dumps(values), encoding="utf-8")
    found = build.safety(read_results(tmp_path), "attack", "set")
    assert found is not None and "Unfinished" in found.detail
    assert any(
        "1 of 4 answers (25.0 %) were cut off within their reasoning" in said for said in found.warnings
    )
