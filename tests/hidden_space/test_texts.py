"""Reading harmful and harmless texts in the forms in which data sets publish them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mpo.errors import ConfigError, DataError
from mpo.hidden_space.texts import TextSet, TextSource, load_texts


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def shown(texts: TextSet, code: str) -> list[tuple[str, bool]]:
    rows = texts.rows(code)
    return list(zip(texts.texts[rows], texts.harmful[rows].tolist(), strict=True))


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    for code in ("en", "de"):
        rows = [{"text": f"{code} {i}", "toxic": i % 2} for i in range(6)] + [{"text": "?", "toxic": 7}]
        write(tmp_path / f"toxic_{code}.jsonl", rows)
    return tmp_path


def test_a_labelled_set_is_sorted_by_language_and_class(labelled: Path) -> None:
    source = TextSource(dataset="toxic_{language}.jsonl", folder=str(labelled), label="toxic")
    texts = load_texts(source, ["de", "en"])
    assert texts.languages == ["de", "en"]
    assert shown(texts, "en") == [
        ("en 1", True),
        ("en 3", True),
        ("en 5", True),
        ("en 0", False),
        ("en 2", False),
        ("en 4", False),
    ]
    assert texts.left_out == 2
    assert len(set(texts.unit.tolist())) == 12  # nothing belongs together
    fewer = load_texts(TextSource(**{**source.__dict__, "limit": 2}), ["en", "de"])
    kept = [text.split()[1] for text, _ in shown(fewer, "en")]
    assert len(kept) == 4 and set(kept[:2]) <= {"1", "3", "5"} and set(kept[2:]) <= {"0", "2", "4"}
    assert kept == [text.split()[1] for text, _ in shown(fewer, "de")]  # the same rows in both
    assert fewer.fingerprint != load_texts(source, ["en"]).fingerprint


@pytest.mark.parametrize("value", [1, 1.0, True, "1", " 1 "])
def test_a_label_counts_in_every_way_of_writing_it(tmp_path: Path, value: Any) -> None:
    write(tmp_path / "a.jsonl", [{"text": "a", "toxic": value}, {"text": "b", "toxic": 0}])
    texts = load_texts(TextSource(dataset=str(tmp_path / "a.jsonl"), label="toxic"), ["en"])
    assert texts.harmful.tolist() == [True, False]


def test_two_parallel_sets_share_their_units_over_languages(tmp_path: Path) -> None:
    for code in ("en", "de"):
        write(
            tmp_path / f"bad_{code}.jsonl",
            [{"original": f"bad {i}", "own": None if code == "en" else f"böse {i}"} for i in range(3)],
        )
        write(tmp_path / f"good_{code}.jsonl", [{"original": f"good {i}", "own": None} for i in range(2)])
    settings: dict[str, Any] = {
        "harmful_dataset": "bad_{language}.jsonl",
        "harmless_dataset": "good_{language}.jsonl",
        "folder": str(tmp_path),
        "text": ("own", "original"),
    }
    texts = load_texts(TextSource(**settings, parallel=True), ["en", "de"])
    assert shown(texts, "de") == [
        ("böse 0", True), ("böse 1", True), ("böse 2", True), ("good 0", False), ("good 1", False),
    ]  # fmt: skip
    assert texts.unit[texts.rows("en")].tolist() == texts.unit[texts.rows("de")].tolist() == [1, 3, 5, 0, 2]
    alone = load_texts(TextSource(**settings), ["en", "de"])
    assert not set(alone.unit[alone.rows("en")]) & set(alone.unit[alone.rows("de")])
    write(tmp_path / "bad_de.jsonl", [{"own": "böse"}])
    for limit in (None, 1):  # which would take different rows from files of different lengths
        with pytest.raises(DataError, match="en 3 and 2, de 1 and 2"):
            load_texts(TextSource(**settings, parallel=True, limit=limit), ["en", "de"])


def test_units_with_the_same_text_are_kin_in_every_language(tmp_path: Path) -> None:
    bad = {"en": ["a", "b", "c", "d"], "de": ["A", "B", " C\n", "C"]}  # two that differ in English only
    bad["en"][1] = "a"
    for code, found in bad.items():
        write(tmp_path / f"bad_{code}.jsonl", [{"text": text} for text in found])
        write(tmp_path / f"good_{code}.jsonl", [{"text": f"{code} {i}"} for i in range(2)])
    source = TextSource(
        harmful_dataset="bad_{language}.jsonl",
        harmless_dataset="good_{language}.jsonl",
        folder=str(tmp_path),
        parallel=True,
    )
    texts = load_texts(source, ["en", "de"])
    for found in texts.by_language().values():
        assert found.unit.tolist() == [1, 3, 5, 7, 0, 2]
        assert found.kin is not None and found.kin.tolist() == [1, 1, 5, 5, 0, 2]


def test_one_file_is_not_read_as_several_languages(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": "a", "toxic": 1}, {"text": "b", "toxic": 0}])
    source = TextSource(dataset=str(tmp_path / "a.jsonl"), label="toxic")
    assert load_texts(source, ["en"]).languages == ["en"]
    with pytest.raises(ConfigError, match="read for each of en, de"):
        load_texts(source, ["en", "de"])


def test_pairs_share_a_unit_within_a_language(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", [{"toxic": f"t{i}", "neutral": f"n{i}"} for i in range(3)])
    source = TextSource(dataset=str(tmp_path / "pairs.jsonl"), harmful_text="toxic", harmless_text="neutral")
    texts = load_texts(source, ["hi"])
    assert texts.texts == ("t0", "t1", "t2", "n0", "n1", "n2")
    assert texts.unit.tolist() == [0, 1, 2, 0, 1, 2]
    two = load_texts(dataclasses.replace(source, limit=2), ["hi"])
    assert [text[1] for text in two.texts[:2]] == [text[1] for text in two.texts[2:]]
    assert two.unit.tolist() == [int(text[1]) for text in two.texts]


def test_one_file_may_hold_all_languages(tmp_path: Path) -> None:
    write(
        tmp_path / "all.jsonl",
        [
            {"text": f"{code}{i}", "toxic": i, "lang": name}
            for code, name in (("en", "English"), ("de", "de"))
            for i in (0, 1)
        ],
    )
    source = TextSource(dataset=str(tmp_path / "all.jsonl"), label="toxic", language_column="lang")
    texts = load_texts(source, ["en", "de"])
    assert texts.texts == ("en1", "en0", "de1", "de0")
    with pytest.raises(DataError, match=r"no harmful texts in fr.*'de', 'en'"):
        load_texts(source, ["fr"])


def test_a_recipes_own_folder_is_looked_in(labelled: Path) -> None:
    source = TextSource(dataset="toxic_{language}.jsonl", label="toxic")
    assert load_texts(source, ["en"], beside=labelled).texts


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"toxic": 1}, "no such column; there are 'toxic'"),
        ({"text": " \n", "toxic": 1}, "is blank"),
        ({"text": 5, "toxic": 1}, "expected text, found int"),
        ({"text": "a"}, "row 1, field `toxic`"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write(tmp_path / "a.jsonl", [{"text": "fine", "toxic": 1}, row])
    with pytest.raises(DataError, match=message):
        load_texts(TextSource(dataset=str(tmp_path / "a.jsonl"), label="toxic"), ["en"])


def test_labels_that_never_occur_are_told_from_those_that_do(labelled: Path) -> None:
    source = TextSource(
        dataset="toxic_{language}.jsonl", folder=str(labelled), label="toxic", harmful_values=("yes",)
    )
    with pytest.raises(DataError, match=r"has '0', '1', '7'; expected 'yes' for harmful"):
        load_texts(source, ["en"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dataset": "a.jsonl"},
        {"dataset": "a.jsonl", "harmful_text": "a"},
        {"dataset": "a.jsonl", "label": "b", "harmful_text": "a"},
        {"harmful_dataset": "a.jsonl"},
        {"dataset": "a.jsonl", "label": "x", "limit": 0},
        {"dataset": "a.jsonl", "label": "x", "text": ()},
        {"dataset": "a.jsonl", "label": "x", "harmful_values": ("1",), "harmless_values": ("1", "0")},
    ],
)
def test_a_source_must_be_of_one_form(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TextSource(**settings)


@pytest.mark.parametrize("languages", [[], ["en", "en"], ["en", "English"], ["not a language"]])
def test_languages_must_be_known_and_different(labelled: Path, languages: list[str]) -> None:
    with pytest.raises(ConfigError):
        load_texts(
            TextSource(dataset="toxic_{language}.jsonl", folder=str(labelled), label="toxic"), languages
        )


def test_polyrefuse_is_read_as_it_is_published(data_folder: Path) -> None:
    source = TextSource(
        harmful_dataset="harmful_test_{language}.json",
        harmless_dataset="harmless_test_{language}.json",
        folder=str(data_folder / "polyrefuse"),
        text=("instruction_translated", "instruction"),
        parallel=True,
    )
    texts = load_texts(source, ["en", "ar"])
    assert texts.harmful[texts.rows("ar")].sum() == 572 and (~texts.harmful[texts.rows("ar")]).sum() == 500
    assert texts.texts[texts.rows("en")][0] != texts.texts[texts.rows("ar")][0]
