from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpo.errors import ConfigError, DataError
from mpo.evaluation import prompts as module
from mpo.evaluation.prompts import MIXED, Prompt, PromptSet, fill_template, load_prompts, load_template
from tests.evaluation.scripts import TEXTS


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows in the format that the file's name asks for."""
    match path.suffix:
        case ".csv":
            with open(path, "w", encoding="utf-8-sig", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case ".jsonl":
            path.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
            )
        case ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        case ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def texts(prompts: PromptSet) -> dict[str, str]:
    return {prompt.id: prompt.text for prompt in prompts.prompts}


# ---- What is published -----------------------------------------------------------------------------------------------


def test_multijail_as_published_has_315_requests_in_ten_languages(data_folder: Path) -> None:
    path = data_folder / "multijail" / "MultiJail.csv"
    found = load_prompts(str(path))
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert found.name == "multijail"
    assert found.languages == ["en", "zh", "it", "vi", "ar", "ko", "th", "bn", "sw", "jv"]
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 315
    assert texts(found) == {f"{row['id']}/{code}": row[code] for row in rows for code in found.languages}


def test_polyrefuse_as_published_gets_its_language_from_the_files_name(data_folder: Path) -> None:
    files = [
        str(data_folder / "polyrefuse" / f"harmless_test_{code}.json") for code in ("en", "de", "fr", "ar")
    ]
    found = load_prompts(files)
    assert found.name == "harmless_test"
    assert {code: sum(p.language == code for p in found.prompts) for code in found.languages} == {
        "en": 500,
        "de": 500,
        "fr": 500,
        "ar": 500,
    }
    german = json.loads(Path(files[1]).read_text(encoding="utf-8"))
    assert texts(found)["7/de"] == german[7]["instruction_translated"]


def test_polyrefuse_in_english_need_not_repeat_itself(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Open it", "category": None},
        {"instruction": "Shut it", "instruction_translated": None},
    ]
    with pytest.raises(DataError, match="which language"):
        load_prompts(write(tmp_path / "x.json", rows))
    path = write(tmp_path / "harmful_test_en.json", rows)
    assert texts(load_prompts(path)) == {"0/en": "Open it", "1/en": "Shut it"}
    translated = [{"instruction": "Open it", "instruction_translated": None}]
    with pytest.raises(DataError, match=r"row 0, field `instruction_translated`"):
        load_prompts(write(tmp_path / "harmful_test_de.json", translated))


def test_advbench_x_is_one_column_per_language(tmp_path: Path) -> None:
    rows = [
        {"en": "Open it now", "zh": "打开", "sw": "Fungua sasa"},
        {"en": "Shut it", "zh": "关上", "sw": "Funga"},
    ]
    found = load_prompts(write(tmp_path / "advbench_x.csv", rows))
    assert texts(found)["1/zh"] == "关上" and len(found.prompts) == 6


def test_csrt_is_one_prompt_of_many_languages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": 3, "category": "c", "en": "How do I open it?", "csrt": "How 打开 কী?"}]
    (prompt,) = load_prompts(write(tmp_path / "csrt.csv", rows)).prompts
    assert prompt == Prompt("3", MIXED, "How 打开 কী?")
    hub = iter([(0, {"prompt": "How 打开 কী?", "harms": ["c"]})])
    monkeypatch.setattr(module, "read_hub", lambda name, split: hub if name == "walledai/CSRT" else None)
    (from_hub,) = load_prompts("csrt").prompts
    assert from_hub == Prompt("0", MIXED, "How 打开 কী?")


def test_names_stand_for_datasets_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read(name: str, split: str) -> Any:
        asked.append((name, split))
        return iter([(0, {"id": 0, "en": "How do I?", "sw": "Nifanyeje?"})])

    monkeypatch.setattr(module, "read_hub", read)
    assert load_prompts("MultiJail").name == "multijail"
    assert load_prompts("someone/Prompts", split="test").name == "someone_prompts"
    assert asked == [("DAMO-NLP-SG/MultiJail", "train"), ("someone/Prompts", "test")]


@pytest.mark.parametrize("name", ["advbench-x", "PolyRefuse"])
def test_a_set_that_is_not_on_the_hub_is_asked_for_as_a_file(name: str) -> None:
    with pytest.raises(DataError, match="pass the file"):
        load_prompts(name)


# ---- A user's own ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("shape", ["long", "wide"])
def test_texts_in_more_than_ten_scripts_round_trip(tmp_path: Path, suffix: str, shape: str) -> None:
    if shape == "long":
        rows = [{"language": code, "prompt": text} for code, text in TEXTS.items()]
    else:
        rows = [dict(TEXTS), {code: text[::-1] for code, text in TEXTS.items()}]
    found = texts(load_prompts(write(tmp_path / f"own{suffix}", rows)))
    assert {name: text for name, text in found.items() if name.startswith("0/")} == {
        f"0/{code}": text for code, text in TEXTS.items()
    }


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    found=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), min_size=1
    )
)
def test_any_text_round_trips(tmp_path: Path, suffix: str, found: list[str]) -> None:
    written = [text for text in found if text.strip()]
    if written:
        path = write(tmp_path / f"any{suffix}", [{"lang": "bn", "prompt": text} for text in written])
        assert [prompt.text for prompt in load_prompts(path).prompts] == written


def test_columns_can_be_named(tmp_path: Path) -> None:
    rows = [{"tongue": "Swahili", "ask": "Nifanyeje?", "prompt": "other", "prompt_id": "a"}]
    path = write(tmp_path / "own.jsonl", rows)
    found = load_prompts(path, prompt_column="ask", language_column="tongue")
    assert found.prompts == (Prompt("a", "sw", "Nifanyeje?"),)
    with pytest.raises(DataError, match="no column 'question'"):
        load_prompts(path, prompt_column="question")


def test_the_language_comes_from_the_file_or_the_setting_where_no_column_has_it(tmp_path: Path) -> None:
    rows = [{"prompt": "Nifanyeje?"}]
    assert load_prompts(write(tmp_path / "own_sw.jsonl", rows)).languages == ["sw"]
    assert load_prompts(write(tmp_path / "own.jsonl", rows), language="Swahili").languages == ["sw"]
    with pytest.raises(DataError, match="nothing says which language"):
        load_prompts(write(tmp_path / "own.jsonl", rows))


def test_without_ids_the_nth_prompts_of_all_languages_belong_together(tmp_path: Path) -> None:
    rows = [{"language": code, "prompt": f"{code} {n}"} for code in ("en", "sw") for n in range(2)]
    assert texts(load_prompts(write(tmp_path / "own.csv", rows))) == {
        "0/en": "en 0",
        "1/en": "en 1",
        "0/sw": "sw 0",
        "1/sw": "sw 1",
    }


def test_an_id_is_no_indonesian_unless_it_holds_text(tmp_path: Path) -> None:
    number = [{"id": "17", "no": "1", "en": "Open it now", "sw": "Fungua"}]
    assert set(texts(load_prompts(write(tmp_path / "a.csv", number)))) == {"17/en", "17/sw"}
    text = [{"id": "Buka itu", "en": "Open it now"}]
    assert load_prompts(write(tmp_path / "b.csv", text)).languages == ["id", "en"]


def test_a_word_of_three_letters_is_no_language(tmp_path: Path) -> None:
    rows = [{"en": "Open it now", "sw": "Fungua", "cat": "theft", "lat": "of locks"}]
    assert load_prompts(write(tmp_path / "own.csv", rows)).languages == ["en", "sw"]


def test_a_limit_keeps_requests_with_their_translations(tmp_path: Path) -> None:
    rows = [{"en": f"Open {n}", "sw": f"Fungua {n}"} for n in range(5)]
    path = write(tmp_path / "own.csv", rows)
    assert set(texts(load_prompts(path, limit=2))) == {"0/en", "0/sw", "1/en", "1/sw"}
    assert set(texts(load_prompts(path, limit=2, languages=["Swahili"]))) == {"0/sw", "1/sw"}
    for languages in (["bn"], ["en", "bn"]):
        with pytest.raises(DataError, match=r"no prompt is in bn\. Languages found: en, sw"):
            load_prompts(path, languages=languages)


def test_the_fingerprint_is_of_the_prompts_and_not_of_the_file(tmp_path: Path) -> None:
    rows = [{"language": "en", "prompt": "Open it"}, {"language": "sw", "prompt": "Fungua"}]
    prints = {load_prompts(write(tmp_path / name, rows)).fingerprint for name in ("a.csv", "b.jsonl")}
    assert len(prints) == 1
    rows[0]["prompt"] += " "
    assert load_prompts(write(tmp_path / "a.csv", rows)).fingerprint not in prints
    alike = [("a", "xenb"), ("aenx", "b")]  # id, language and text read the same when they are joined
    assert len({PromptSet("s", (Prompt(id, "en", text),), "").fingerprint for id, text in alike}) == 2


# ---- What is wrong ---------------------------------------------------------------------------------------------------


def test_a_blank_prompt_stops_the_run_or_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "own.csv", [{"en": "Open", "sw": "Fungua"}, {"en": "Shut", "sw": " "}])
    with pytest.raises(DataError, match=r"own.csv, row 1, field `sw`"):
        load_prompts(path)
    found = load_prompts(path, bad_rows="drop")
    assert found.dropped == 1 and set(texts(found)) == {"0/en", "0/sw", "1/en"}


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_half_a_surrogate_pair_in_a_prompt_is_refused_with_its_place_or_counted(
    tmp_path: Path, suffix: str
) -> None:
    rows = [{"id": 1, "en": "one", "de": "eins"}, {"id": 2, "en": "two", "de": "zwei \ud83d"}]
    path = tmp_path / f"own{suffix}"
    path.write_text(
        json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    )
    with pytest.raises(DataError, match=r"row 1, field `de`: .* lone surrogate \(U\+D83D\) at character 5"):
        load_prompts(str(path))
    found = load_prompts(str(path), bad_rows="drop")
    assert found.dropped == 1 and [p.id for p in found.prompts] == ["1/en", "1/de", "2/en"]


def test_a_blank_first_cell_does_not_hide_its_language(tmp_path: Path) -> None:
    path = write(tmp_path / "own.csv", [{"en": "Open", "sw": ""}, {"en": "Shut", "sw": "Funga"}])
    found = load_prompts(path, bad_rows="drop")
    assert set(texts(found)) == {"0/en", "1/en", "1/sw"}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_language_that_the_first_rows_lack_is_not_lost(tmp_path: Path, suffix: str) -> None:
    for lacking in ({}, {"sw": None}, {"sw": math.nan}, {"sw": ""}):
        path = write(
            tmp_path / f"own{suffix}", [{"en": "Open it", **lacking}, {"en": "Shut it", "sw": "Funga"}]
        )
        with pytest.raises(DataError, match="row 0, field `sw`"):
            load_prompts(path)
        found = load_prompts(path, bad_rows="drop")
        assert texts(found) == {"0/en": "Open it", "1/en": "Shut it", "1/sw": "Funga"} and found.dropped == 1


def test_an_id_that_is_not_a_number_is_none(tmp_path: Path) -> None:
    rows = [{"id": value, "en": "Open it", "sw": "Fungua"} for value in (math.nan, None, " ")]
    found = load_prompts(write(tmp_path / "own.json", rows))
    assert sorted(texts(found)) == [f"{n}/{code}" for n in range(3) for code in ("en", "sw")]


def test_a_bad_prompt_does_not_shift_the_translations_behind_it(tmp_path: Path) -> None:
    english = [{"prompt": f"Open {n}"} for n in range(4)]
    swahili: list[dict[str, Any]] = [{"prompt": f"Fungua {n}"} for n in range(4)]
    swahili[1] = {"prompt": " "}
    files = [write(tmp_path / "own_en.jsonl", english), write(tmp_path / "own_sw.jsonl", swahili)]
    wanted = {f"{n}/en": f"Open {n}" for n in range(4)} | {f"{n}/sw": f"Fungua {n}" for n in (0, 2, 3)}
    assert texts(load_prompts(files, bad_rows="drop")) == wanted
    both = [row | {"language": code} for code, rows in (("en", english), ("sw", swahili)) for row in rows]
    assert texts(load_prompts(write(tmp_path / "long.csv", both), bad_rows="drop")) == wanted
    with open(files[1], "r+", encoding="utf-8") as file:
        file.write("x")  # no row at all any more, where the first was
    wanted.pop("0/sw")
    found = load_prompts(files, bad_rows="drop")
    assert texts(found) == wanted and found.dropped == 2


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("id,en,sw,sw\n1,a b,c d,e f\n")
    with pytest.raises(DataError, match="field `sw`: the column stands twice"):
        load_prompts(str(tmp_path / "own.csv"))
    (tmp_path / "own.csv").write_text("id,sw,Swahili\n1,c d,e f\n")
    with pytest.raises(DataError, match="'1' in sw is there twice"):
        load_prompts(str(tmp_path / "own.csv"))


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "esc\x1b[2J"])
def test_a_prompt_set_is_called_what_a_folder_can_be(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "own_sw.csv", [{"prompt": "Nifanyeje?"}])
    with pytest.raises(ConfigError, match="name: expected"):
        load_prompts(path, name=name)


def test_an_unknown_language_names_its_row(tmp_path: Path) -> None:
    rows = [{"language": "sw", "prompt": "a"}, {"language": "Swahilli", "prompt": "b"}]
    with pytest.raises(DataError, match=r"row 1, field `language`.*Swahili"):
        load_prompts(write(tmp_path / "own.csv", rows))


def test_two_prompts_with_one_id_are_refused(tmp_path: Path) -> None:
    rows = [{"id": 1, "language": "sw", "prompt": "a"}, {"id": 1, "language": "sw", "prompt": "b"}]
    with pytest.raises(DataError, match="'1' in sw is there twice"):
        load_prompts(write(tmp_path / "own.csv", rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1}]', "no column with prompts"),
        ("[1]", "expected an object"),
        ("[]", "no prompt is left|empty"),
        ("{", "the file is truncated"),
    ],
)
def test_a_file_that_holds_no_prompts_is_a_clear_error(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "own.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_prompts(str(path))


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("x")
    with pytest.raises(DataError, match=r"Did you mean 'prompts.csv'"):
        load_prompts(str(tmp_path / "promts.csv"))


# ---- Templates -------------------------------------------------------------------------------------------------------


def test_a_template_takes_a_prompt_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "template.txt"
    path.write_text("\ufeffYou {are} AIM.\nAsk: {prompt}\n{prompt}!", encoding="utf-8")
    template = load_template(str(path))
    assert fill_template(template, "say {prompt} \\1") == (
        "You {are} AIM.\nAsk: say {prompt} \\1\nsay {prompt} \\1!"
    )
    assert load_template("Now: {prompt}") == "Now: {prompt}"
    assert fill_template(None, "x") == "x"


def test_a_template_without_a_slot_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "template.txt"
    path.write_text("no slot")
    with pytest.raises(ConfigError, match="has no slot"):
        load_template(str(path))
    with pytest.raises(ConfigError, match="no file that can be read"):
        load_template(str(tmp_path / "missing.txt"))
