from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpo.common.statistics import paired_difference, wilson_interval
from mpo.common.typed_json import read_typed, write_typed
from mpo.evaluation.answers import AnswerRow
from mpo.evaluation.results import SafetyResult
from mpo.evaluation.wording import measure_wording
from mpo.report import build
from mpo.report.build import measurements
from mpo.report.folder import read_results
from mpo.report.page import write_report
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
    found = build.answer_language(read_results(folder), "over_refusal", "set")[0]
    assert found.better == "higher"
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


def test_refusals_elsewhere_unknown_languages_and_loops_have_intervals_and_paired_changes(
    folder: Path,
) -> None:
    found = {m.anchor: m for m in build.answer_language(read_results(folder), "over_refusal", "set")}
    shown = {  # of the second model: English, Bengali; the first has none but one answer in twenty of unknown language
        "language-over-refusal-1-refusal": (0, 12),
        "language-over-refusal-1-unknown": (1, 1),
        "language-over-refusal-1-repetitive": (5, 0),
    }
    assert list(found) == ["language-over-refusal-1", *shown]
    for anchor, counts in shown.items():
        *rows, mean = found[anchor].rows
        start = 1 if anchor.endswith("unknown") else 0
        total = PROMPTS - anchor.endswith("repetitive")  # "7" is too short to repeat itself
        for row, count in zip(rows, counts, strict=True):
            before, after = row.cells
            assert before is not None and after is not None and after.change is not None
            assert before.value.value == start / total and after.value.value == count / total
            assert (after.value.low, after.value.high) == wilson_interval(count, total)
            pair = paired_difference([False] * total, [n < count - start for n in range(total)])
            assert after.change.change == pytest.approx((count - start) / total)
            assert (after.change.low, after.change.high) == (pair.low, pair.high)
            assert found[anchor].verdict(after.change) == ("worse" if count == 12 else None)
        last = mean.cells[1]
        assert mean.is_average and last is not None and last.change is not None and last.value.low is not None
        assert last.value.value == pytest.approx(sum(counts) / 2 / total)
    page, table = (path.read_text("utf-8") for path in write_report(folder))
    assert "Refused in another language: set, tuned: 0.0\N{NO-BREAK SPACE}%" in page
    assert "Repetitive, set (%)" in table and "Language unknown, set (%)" in table


def test_in_the_row_of_the_mean_every_language_weighs_the_same(tmp_path: Path) -> None:
    write_model(tmp_path / "m", elsewhere=0, looping=8)
    place = tmp_path / "m" / "over_refusal" / "set"
    for name in ("answers", "verdicts.refusal-phrases"):
        lines = (place / f"{name}.jsonl").read_text("utf-8").splitlines(keepends=True)
        (place / f"{name}.jsonl").write_text(
            "".join(lines[10:]), encoding="utf-8"
        )  # half of the Bengali ones
    values = json.loads((place / "result.json").read_text("utf-8"))
    values["wording"]["bn"] |= {"count": 10, "asked": 9}
    values["languages"]["bn"] |= {"count": 10, "verdicts": {"answer": 5, "refusal": 5}}
    (place / "result.json").write_text(json.dumps(values), encoding="utf-8")
    results = read_results(tmp_path)
    loops = build.answer_language(results, "over_refusal", "set")[-1].rows[-1]
    assert loops.is_average and loops.cells[0] is not None
    assert loops.cells[0].value.value == pytest.approx((8 / 19 + 0) / 2)  # 8 of 28 answers would be 0.29
    rates = build.safety(results, "over_refusal", "set")
    assert rates is not None and rates.detail[:2] == ("Answer", "Refusal")
    assert rates.rows[-1].detail[:2] == ("75", "25")


def test_of_mixed_prompts_no_answer_is_in_an_unknown_language(folder: Path) -> None:
    for name in ("base", "tuned"):
        file = folder / name / "over_refusal" / "set" / "result.json"
        values = json.loads(file.read_text("utf-8"))
        values["wording"]["mul"] = {"language": "mul", "count": 9, "asked": 0}
        file.write_text(json.dumps(values), encoding="utf-8")
    found = {m.anchor: m for m in build.answer_language(read_results(folder), "over_refusal", "set")}
    rows = {row.label: row.cells for row in found["language-over-refusal-1-unknown"].rows}
    assert len(rows) == 4 and list(rows.values())[2] == (None, None)


def test_it_follows_the_rates_and_is_left_out_of_older_results(folder: Path) -> None:
    anchors = [found.anchor for found in measurements(read_results(folder))]
    assert anchors[:2] == ["over-refusal-1", "language-over-refusal-1"]
    for name in ("base", "tuned"):
        file = folder / name / "over_refusal" / "set" / "result.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        del values["wording"]
        file.write_text(json.dumps(values), encoding="utf-8")
    assert [found.anchor for found in measurements(read_results(folder))] == ["over-refusal-1"]


def test_without_the_answers_the_shares_are_shown_and_no_change(folder: Path) -> None:
    (folder / "tuned" / "over_refusal" / "set" / "answers.jsonl").unlink()
    found = build.answer_language(read_results(folder), "over_refusal", "set")[0]
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
