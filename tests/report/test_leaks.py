"""Rates with and without the prompts that stand in the training data, and what the card says of these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpo.common.files import write_json
from mpo.common.statistics import wilson_interval
from mpo.evaluation.comparison import ComparisonResult
from mpo.report.build import measurements
from mpo.report.card import write_card, write_merged_card
from mpo.report.comparison import write_comparison
from mpo.report.folder import read_results
from mpo.report.page import write_report
from tests.report.result_folder import write_results, write_safety

LEAKED = {"0": "exact", "3": "characters"}
TITLE = "Attack success: multijail, without prompts of the training data"


def leaks(found: dict[str, str], prompts: int = 40) -> dict[str, Any]:
    sets = {"attack/multijail": {"prompts": prompts, "found": found, "pairs": []}}
    return {"version": 1, "training": ["pairs.jsonl"], "rows": 600, "sets": sets}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = write_results(tmp_path / "results")
    write_json(root / "leaks.json", leaks(LEAKED))
    return root


def test_the_rates_without_leaked_prompts_are_those_of_the_others(folder: Path) -> None:
    found = {m.title: m for m in measurements(read_results(folder))}
    whole, rest = found["Attack success: multijail"], found[TITLE]
    order = list(found)
    assert order.index(TITLE) == order.index(whole.title) + 1
    assert [row.label for row in rest.rows] == [row.label for row in whole.rows]
    for number, model in enumerate(("base", "tuned")):
        lines = (folder / model / "attack" / "multijail" / "verdicts.refusal-phrases.jsonl").read_text(
            encoding="utf-8"
        )
        verdicts = [json.loads(line) for line in lines.splitlines()]
        kept = [v["verdict"] for v in verdicts if v["language"] == "en" and v["prompt_id"] not in LEAKED]
        cell = rest.rows[0].cells[number]
        assert len(kept) == rest.rows[0].count == 38 and whole.rows[0].count == 40
        assert cell is not None and cell.value.value == kept.count("unsafe") / 38
        assert (cell.value.low, cell.value.high) == wilson_interval(kept.count("unsafe"), 38)
    (note,) = [note for note in whole.notes if "training data" in note]
    assert note.startswith("2 of 40 prompts stand in the training data, pairs.jsonl (1 characters, 1 exact)")
    assert (
        rest.rows[-1].is_average
        and rest.rows[-1].cells[1] is not None
        and rest.rows[-1].cells[1].change is not None
    )


def test_both_are_in_the_page_and_the_table(folder: Path) -> None:
    page, table = (path.read_text(encoding="utf-8") for path in write_report(folder))
    assert TITLE in page and "2 of 40 prompts stand in the training data" in page
    assert "Attack success, multijail, unseen" in table


def test_where_no_prompt_was_found_the_rates_stand_once_and_the_note_says_so(folder: Path) -> None:
    write_json(folder / "leaks.json", leaks({}))
    found = {m.title: m for m in measurements(read_results(folder))}
    assert TITLE not in found
    assert any(note.startswith("0 of 40 prompts stand") for note in found["Attack success: multijail"].notes)
    assert not any(
        "training data" in note for note in found["Refusals of harmless prompts: polyrefuse"].notes
    )


def test_where_all_prompts_were_found_or_the_answers_are_gone_nothing_is_left_to_show(folder: Path) -> None:
    write_json(folder / "leaks.json", leaks({str(number): "exact" for number in range(40)}))
    assert TITLE not in {m.title for m in measurements(read_results(folder))}
    write_json(folder / "leaks.json", leaks(LEAKED))
    for answers in folder.glob("*/attack/multijail/answers.jsonl"):
        answers.unlink()
    assert TITLE not in {m.title for m in measurements(read_results(folder))}


def test_replies_without_a_verdict_are_in_neither_rate(tmp_path: Path) -> None:
    write_safety(
        tmp_path / "m" / "attack" / "multijail", "attack", {"en": ["unsafe", "safe", "unparsed", "unsafe"]}
    )
    write_json(tmp_path / "leaks.json", leaks({"0": "exact"}, 4))
    rest = {m.title: m for m in measurements(read_results(tmp_path))}[TITLE]
    (row,) = rest.rows
    assert row.count == 3 and row.cells[0] is not None and row.cells[0].value.value == 0.5


@pytest.mark.parametrize("content", ["{", "[]", '{"sets": 3}', '{"sets": {"a": {"prompts": -1}}}'])
def test_a_damaged_file_is_left_out_and_named(folder: Path, content: str) -> None:
    (folder / "leaks.json").write_text(content, encoding="utf-8")
    results = read_results(folder)
    assert results.leaks is None and len(results.left_out) == 1 and "leaks.json" in results.left_out[0]
    assert TITLE not in {m.title for m in measurements(results)}


def test_the_card_says_how_many_prompts_stand_in_the_training_data(tmp_path: Path) -> None:
    sets = {"multijail": {"prompts": 315, "found": {"13": "exact"}}, "probe": {"prompts": 100}}
    write_json(tmp_path / "leaks.json", {"training": ["pairs.jsonl"], "rows": 600, "sets": sets})

    def card() -> str:
        about: dict[str, Any] = {"peft": True, "languages": ["sw"], "source_language": "en"}
        return write_card(tmp_path, base_model="org/base", **about).read_text(encoding="utf-8")

    line = "| Evaluation prompts in the training data | 1 of 315 prompts of multijail, 0 of 100 of probe |"
    assert line in card()
    (tmp_path / "recipe.yaml").write_text("beta: 1\n", encoding="utf-8")
    out = tmp_path / "merged"
    out.mkdir()
    merged = write_merged_card(out, adapter=tmp_path, base_model="org/base", adapter_settings={}, name="mine")
    assert merged is not None and line in merged.read_text(encoding="utf-8")
    (tmp_path / "leaks.json").write_text("{", encoding="utf-8")
    assert "Evaluation prompts" not in card()


def test_the_page_of_a_comparison_says_so_in_a_line(tmp_path: Path) -> None:
    def page(found: dict[str, str] | None) -> str:
        if found is not None:
            write_json(tmp_path / "measured" / "leaks.json", leaks(found))
        comparison = ComparisonResult(title="T", base="m", rows=[], runs=[])
        return write_comparison(comparison, tmp_path)[0].read_text(encoding="utf-8")

    assert "training data" not in page(None) and "training data" not in page({})
    assert page(LEAKED).count("Measured prompts stand in the training data (pairs.jsonl)") == 1
    assert "2 of 40 in attack/multijail." in page(LEAKED)
