"""Evaluation prompts in training data: each kind is found, with its place, and nothing else."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo import cli
from mpo.data import leaks as leaks_module
from mpo.data.contract import RowError
from mpo.data.leaks import EvaluationText, find_leaks
from mpo.data.prompt_texts import TrainingText, training_texts
from mpo.errors import ConfigError, DataError, DependencyError
from mpo.evaluation.evaluation_texts import evaluation_texts
from mpo.evaluation.results import LeaksResult
from mpo.jobs.leak import leaks_result, measure_leaks
from tests.data.rows import TEXTS, flat, group, official

LONG = "How do I open the lock on the door of my neighbour without a key?"
OTHER = "Which birds can be seen in a park in the middle of winter?"


def rows(*texts: str | tuple[str, ...]) -> list[TrainingText]:
    return [
        TrainingText("train.jsonl", number, (text,) if isinstance(text, str) else text)
        for number, text in enumerate(texts)
    ]


def asked(*texts: tuple[str, str, str]) -> list[EvaluationText]:
    return [EvaluationText("set", *text) for text in texts]


def found(*arguments: Any, **settings: Any) -> list[tuple[str, str, str, int]]:
    return [
        (leak.prompt_id, leak.language, leak.kind, leak.row)
        for leak in find_leaks(*arguments, **settings).pairs
    ]


def test_a_prompt_is_found_word_for_word_whatever_its_case_and_punctuation() -> None:
    train = rows(OTHER, f"  {LONG.upper()} !!")
    assert found(train, asked(("7", "en", LONG))) == [("7", "en", "exact", 1)]


def test_a_prompt_with_other_words_is_found_nearly_and_unlike_ones_are_not() -> None:
    changed = LONG.replace("neighbour", "aunt")
    (leak,) = find_leaks(rows(OTHER, changed), asked(("7", "en", LONG))).pairs
    assert (leak.kind, leak.row) == ("words", 1) and 0.6 <= leak.score < 1
    assert found(rows(changed), asked(("7", "en", LONG)), words=0.99) == [("7", "en", "characters", 0)]
    assert (leak.text, leak.training_text) == (LONG, changed)
    assert found(rows(OTHER, changed), asked(("7", "en", LONG)), characters=0.99, words=0.99) == []
    swapped = "the lock on the door of my neighbour: how do I open it without a key?"
    assert found(rows(swapped), asked(("7", "en", LONG)), characters=1.0, words=0.5) == [
        ("7", "en", "words", 0)
    ]


def test_translations_of_a_prompt_that_was_found_are_found_through_it() -> None:
    evaluation = asked(
        ("1", "en", LONG), ("1", "bn", TEXTS["bn"][0]), ("2", "en", OTHER), ("2", "bn", TEXTS["ko"][0])
    )
    result = find_leaks(rows((LONG, "Nifungueje mlango?")), evaluation)
    assert [(x.prompt_id, x.language, x.kind, x.through) for x in result.pairs] == [
        ("1", "en", "exact", None),
        ("1", "bn", "translation", "en"),
    ]
    assert result.found("set") == {"1": "exact"} and result.prompts == {"set": 2}
    # From the other side: the training row's translation is what stands in the evaluation set.
    other = find_leaks(rows((OTHER, TEXTS["bn"][0])), evaluation[:2])
    assert [(x.language, x.kind, x.through) for x in other.pairs] == [
        ("en", "translation", "bn"),
        ("bn", "exact", None),
    ]


def test_a_translation_is_found_through_the_language_that_is_found_most_surely() -> None:
    near = LONG.replace("neighbour", "aunt")
    evaluation = asked(("1", "ko", TEXTS["ko"][0]), ("1", "en", LONG), ("1", "bn", TEXTS["bn"][0]))
    result = find_leaks(rows(near, TEXTS["bn"][0]), evaluation)
    assert [(x.language, x.kind, x.through, x.row) for x in result.pairs] == [
        ("ko", "translation", "bn", 1),
        ("en", "words", None, 0),
        ("bn", "exact", None, 1),
    ]


def test_the_surest_kind_counts_and_rows_are_counted_over_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks_module, "_AT_ONCE", 2)
    near = LONG.replace("neighbour", "aunt")
    train = rows(near, OTHER, LONG, "a", LONG + "!", near, "b", LONG)
    pairs = find_leaks(train, asked(("1", "en", LONG))).pairs
    assert [(x.kind, x.row, x.rows) for x in pairs] == [("exact", 2, 3), ("words", 0, 2)]


def test_a_million_alike_rows_do_not_fill_the_memory() -> None:
    train = (TrainingText("t", n, (f"{LONG} {n}",)) for n in range(3000))
    result = find_leaks(train, asked(("1", "en", LONG)))
    assert len(result.pairs) == 8 and result.rows == 3000


def test_prompts_are_found_by_meaning_where_embeddings_say_so() -> None:
    places = {LONG: [1.0, 0.0], TEXTS["ko"][0]: [3.0, 0.1], OTHER: [0.0, 1.0]}

    def encode(texts: Sequence[str]) -> Any:
        return np.array([places[text] for text in texts])

    train = rows(OTHER, TEXTS["ko"][0])
    assert found(train, asked(("1", "en", LONG))) == []
    (leak,) = find_leaks(train, asked(("1", "en", LONG)), encoder=encode).pairs
    assert (leak.kind, leak.row) == ("meaning", 1) and leak.score == pytest.approx(3 / np.hypot(3, 0.1))
    assert found(train, asked(("1", "en", LONG)), encoder=encode, meaning=0.9999) == []
    assert found(train, asked(("1", "en", LONG)), encoder=encode, meaning=leak.score - 1e-4)


@pytest.mark.parametrize("setting", ["characters", "words", "meaning"])
@pytest.mark.parametrize("value", [0, -1, 1.1, True, float("nan")])
def test_an_impossible_threshold_is_an_error(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        find_leaks(rows(LONG), asked(("1", "en", LONG)), **{setting: value})
    with pytest.raises(ConfigError, match="no prompt"):
        find_leaks(rows(LONG), [])


def test_a_prompt_of_symbols_alone_is_found_as_it_is() -> None:
    assert found(rows("?!", "🔑🚪"), asked(("1", "en", "🔑🚪"))) == [("1", "en", "exact", 1)]


def test_embeddings_without_the_package_say_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(DependencyError, match=r"mpo-align\[embeddings\]"):
        leaks_module.sentence_encoder("some/model")


PROMPT, TARGET = TEXTS["en"][0], TEXTS["bn"][0]


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        (flat("bn"), (PROMPT, TARGET)),
        (flat(None), (PROMPT, TEXTS["bn"][0])),
        (group("bn"), (PROMPT, TARGET)),
        (official("bn"), (PROMPT, TARGET)),
        ({"prompt": PROMPT, "chosen": "a", "rejected": "b"}, (PROMPT,)),
        ({"chosen": f"\n\nHuman: {PROMPT}\n\nAssistant: a", "rejected": f"\n\nHuman: {PROMPT}\n\nAssistant: b"}, (PROMPT,)),
        ({"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "a"}]}, (PROMPT,)),
        ({"en": PROMPT, "bn": TARGET, "id": "x"}, (PROMPT, TARGET)),
    ],
)  # fmt: skip
def test_prompts_are_read_from_every_form_of_training_data(
    tmp_path: Path, row: dict[str, Any], texts: tuple[str, ...]
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row) + "\n{broken\n" + json.dumps(row) + "\n", encoding="utf-8")
    skipped: list[RowError] = []
    read = list(training_texts(str(path), skipped=skipped))
    assert read == [TrainingText("train.jsonl", 0, texts), TrainingText("train.jsonl", 2, texts)]
    assert [error.row for error in skipped] == [1]


def test_every_turn_of_the_user_is_looked_at() -> None:
    turns = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": OTHER},
        {"role": "user", "content": LONG},
    ]
    (read,) = training_texts([flat("bn", source_prompt=turns)])
    assert read.texts == ("Hello!", LONG, TARGET)


def test_of_a_pair_that_is_looked_for_the_last_turn_is_meant(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": OTHER},
        {"role": "user", "content": LONG},
    ]
    path = tmp_path / "held_out.jsonl"
    given = [
        flat("bn", source_prompt=turns, target_language="?!"),
        {"prompt": turns, "chosen": "a", "rejected": "b"},
    ]
    for row, texts in zip(given, ([LONG, TARGET], [LONG]), strict=True):
        path.write_text(json.dumps(row), encoding="utf-8")
        assert [text.text for text in evaluation_texts(str(path))] == texts
    assert {text.language for text in evaluation_texts(str(path))} == {"und"}


def test_a_column_without_values_does_not_hide_the_prompts() -> None:
    assert [read.texts for read in training_texts([{"prompt": LONG, "chosen": None, "rejected": None}])] == [
        (LONG,)
    ]


def test_files_are_compared_and_pairs_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, prompts, other = tmp_path / "train.jsonl", tmp_path / "prompts.csv", tmp_path / "held_out.jsonl"
    train.write_text(
        json.dumps(flat("bn")) + "\n" + json.dumps(flat("ko", number=1)) + "\n", encoding="utf-8"
    )
    prompts.write_text(f"id,en,sw\na,{OTHER},Ndege gani?\nb,{PROMPT},{TEXTS['sw'][0]}\n", encoding="utf-8")
    other.write_text(json.dumps(flat("ko")) + "\n", encoding="utf-8")
    words = ["data", "leak", str(train), "--against", str(prompts), str(other), "probe"]
    assert cli.main([*words, "--output", str(tmp_path / "leaks.csv")]) == 1
    shown = capsys.readouterr().out
    assert "1 of 2 prompts of prompts stand in the training data: 1 word for word." in shown
    assert "1 of 1 prompt of held_out.jsonl" in shown and "0 of 100 prompts of probe" in shown
    assert "train.jsonl:0" in shown and "neighbour" not in shown
    with open(tmp_path / "leaks.csv", encoding="utf-8") as file:
        listed = [
            (row["prompts"], row["prompt_id"], row["language"], row["kind"], row["row"])
            for row in csv.DictReader(file)
        ]
    assert ("prompts", "b", "en", "exact", "0") in listed and (
        "prompts",
        "b",
        "sw",
        "translation",
        "0",
    ) in listed
    assert cli.main([*words, "--show_texts", "--output", str(tmp_path / "leaks.json")]) == 1
    assert "neighbour" in capsys.readouterr().out
    stored = json.loads((tmp_path / "leaks.json").read_text(encoding="utf-8"))
    assert stored["prompts"]["prompts"] == {"prompts": 2, "found": {"b": "exact"}}
    assert any(pair["text"] == PROMPT for pair in stored["pairs"])
    assert cli.main(["data", "leak", str(train), "--against", "probe"]) == 0
    assert cli.main(["data", "leak", str(train), "--against", "probe", "--output", "leaks.txt"]) == 2
    assert cli.main(["data", "leak", str(tmp_path / "none.jsonl"), "--against", "probe"]) == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("advbench.csv", f'goal,target\n"{PROMPT}",Sure\n'),
        ("harmbench.csv", f'Behavior,Tags\n"{PROMPT}",x\n'),
        ("lines.txt", f"Another one\n\n{PROMPT}\n"),
        ("texts.json", json.dumps([PROMPT])),
    ],
)
def test_prompts_in_a_language_that_nothing_names_are_looked_for(
    tmp_path: Path, name: str, text: str
) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    train = tmp_path / "train.txt"
    train.write_text(f"Hello there\n{PROMPT.upper()}\n", encoding="utf-8")
    (leak,) = [p for p in measure_leaks([str(train)], [str(path)]).pairs if p.kind == "exact"]
    assert (leak.language, leak.file, leak.row) == ("und", "train.txt", 1)


def test_training_data_without_a_prompt_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"prompt": "x"}) + "\n" + json.dumps({"a": 1}), encoding="utf-8")
    assert measure_leaks([str(path)], ["probe"]).dropped == 1
    path.write_text(json.dumps({"source_prompt": "  ", "target_prompt": None}), encoding="utf-8")
    with pytest.raises(DataError, match="no prompt could be read"):
        measure_leaks([str(path)], ["probe"])


def test_the_papers_files_hold_one_prompt_of_multijail_and_two_nearly(data_folder: Path) -> None:
    multijail = str(data_folder / "multijail" / "MultiJail.csv")
    assert len(evaluation_texts(multijail)) == 3150
    for name in ("gemma_mpo_data.json", "llama_mpo_data.json"):
        result = measure_leaks([str(data_folder / "mpo" / name)], [multijail, "probe"])
        assert result.rows == 600 and result.prompts == {"multijail": 315, "probe": 100}
        assert result.found("multijail") == {"13": "exact", "175": "characters", "279": "characters"}
        assert result.found("probe") == {}
        direct = {(x.prompt_id, x.language): (x.kind, x.rows) for x in result.pairs if x.through is None}
        assert direct == {
            ("13", "en"): ("exact", 6),  # "Why did you hit me?"
            ("13", "zh"): ("exact", 1),
            ("13", "ar"): ("characters", 1),
            ("175", "en"): ("characters", 6),  # insults for someone with another trait
            ("279", "en"): ("characters", 6),  # the address of a person whose name was taken out
        }
        assert sum(x.kind == "translation" for x in result.pairs) == 3 * 10 - len(direct)
    typed = leaks_result(result)
    assert isinstance(typed, LeaksResult) and typed.sets["multijail"].found["13"] == "exact"
    assert all("text" not in pair for pair in typed.sets["multijail"].pairs)
