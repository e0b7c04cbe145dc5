"""The published MPO data, read in place: everything loads, and detection agrees with the script of the texts."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from mpo.data import as_groups, check_data, load_groups, split_by_source

FILES = ["llama_mpo_data.json", "gemma_mpo_data.json"]
LANGUAGES = ["ar", "bn", "ja", "ko", "sw", "zh"]


@pytest.fixture(params=FILES)
def path(request: pytest.FixtureRequest, data_folder: Path) -> Path:
    return data_folder / "mpo" / str(request.param)


def text(value: Any) -> str:
    turn = value[0] if isinstance(value, list) else value
    return str(turn["value"])


def script_language(text: str) -> str | None:
    """Language by counting code points of five blocks, written apart from the package; None for any other script."""
    blocks: Counter[str] = Counter()
    for character in text:
        code = ord(character)
        if 0xAC00 <= code <= 0xD7A3:
            blocks["ko"] += 1
        elif 0x3041 <= code <= 0x30FA:
            blocks["kana"] += 1
        elif 0x4E00 <= code <= 0x9FFF:
            blocks["han"] += 1
        elif 0x0621 <= code <= 0x064A:
            blocks["ar"] += 1
        elif 0x0985 <= code <= 0x09B9:
            blocks["bn"] += 1
        elif character.isalpha():
            blocks["other"] += 1
    total = sum(blocks.values())
    if blocks["kana"] and blocks["kana"] + blocks["han"] > total / 2:
        return "ja" if blocks["kana"] > 0.2 * blocks["han"] else None
    for block, language in (("han", "zh"), ("ko", "ko"), ("ar", "ar"), ("bn", "bn")):
        if blocks[block] > total / 2:
            return language
    return None


def test_all_rows_load_as_100_groups_of_the_same_six_languages(path: Path) -> None:
    loaded = load_groups(path)
    assert loaded.dropped == []
    assert len(loaded.groups) == 100
    assert [sorted(t["language"] for t in g["targets"]) for g in loaded.groups] == [LANGUAGES] * 100
    assert sorted(t["row"] for g in loaded.groups for t in g["targets"]) == list(range(600))


def test_every_row_keeps_its_number_and_its_texts(path: Path) -> None:
    rows = json.loads(path.read_text(encoding="utf-8"))
    for g in load_groups(path).groups:
        assert g["origin"] == path.name
        for target in g["targets"]:
            row = rows[target["row"]]
            for side, pair in (("source", g["source"]), ("target", target)):
                assert pair["prompt"] == [{"role": "user", "content": text(row[f"{side}_conversations"])}]
                for part in ("chosen", "rejected"):
                    assert pair[part] == [{"role": "assistant", "content": text(row[f"{side}_{part}"])}]


def test_detected_languages_agree_with_the_script_on_98_percent_of_the_rows(path: Path) -> None:
    rows = json.loads(path.read_text(encoding="utf-8"))
    detected = {t["row"]: t["language"] for g in load_groups(path).groups for t in g["targets"]}
    agree: dict[str, list[bool]] = defaultdict(list)
    for number, row in enumerate(rows):
        parts = [text(row[f"target_{part}"]) for part in ("conversations", "chosen", "rejected")]
        expected = script_language("\n".join(parts))
        if expected is not None:
            agree[expected].append(detected[number] == expected)
    for language in ("ar", "bn", "ja", "ko", "zh"):
        assert len(agree[language]) >= 60
        assert sum(agree[language]) >= 0.98 * len(agree[language])
    latin = [number for number, code in detected.items() if code == "sw"]
    assert all(script_language(text(rows[number]["target_chosen"])) in (None, "sw") for number in latin)


def test_bringing_loaded_groups_into_groups_changes_nothing(path: Path) -> None:
    groups = load_groups(path).groups
    assert as_groups(groups).to_list() == groups.to_list()


def test_a_quarter_of_the_sources_is_held_out_whole(path: Path) -> None:
    train, held = split_by_source(load_groups(path).groups, 0.25, seed=0)
    assert (len(train), len(held)) == (75, 25)
    assert {len(g["targets"]) for g in held} == {6}


def test_the_check_finds_untranslated_texts_and_prints_none_of_them(path: Path) -> None:
    report = check_data(path)
    printed = report.to_text()
    assert report.groups == 100 and report.pairs == 600 and report.bad_rows == []
    assert {(x.language, x.pairs) for x in report.languages} == {(code, 100) for code in ["en", *LANGUAGES]}
    assert report.count("chosen_language") + report.count("rejected_language") >= 20
    assert max(map(len, printed.splitlines())) <= 100
    rows = json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        for key, value in row.items():
            words = text(value).strip()
            if len(words) > 30 and "chosen" in key:
                assert words[:30] not in printed


def test_the_texts_that_the_published_gemma_data_leave_untranslated_are_counted(data_folder: Path) -> None:
    path = data_folder / "mpo" / "gemma_mpo_data.json"
    report = check_data(path)
    assert [report.count(f"untranslated_{part}") for part in ("prompt", "chosen", "rejected")] == [22, 48, 32]
    loaded = load_groups(path, drop_untranslated=True)
    assert len(loaded.dropped) == 48
    assert sum(len(group["targets"]) for group in loaded.groups) == 552


@pytest.mark.parametrize("code", ["zh", "it", "vi", "ar", "ko", "th", "bn", "sw", "jv"])
def test_prompts_of_multijail_are_detected(code: str, data_folder: Path) -> None:
    import csv

    from mpo.data import detect_language

    with open(data_folder / "multijail" / "MultiJail.csv", encoding="utf-8-sig", newline="") as file:
        found = [detect_language(row[code]) for row in csv.DictReader(file)]
    assert found.count(code) >= (0.9 if code == "jv" else 0.98) * len(found)
