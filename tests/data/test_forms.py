"""Forms that people have: each file is understood, or refused with its file, row and field."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from mpo import cli
from mpo.building.prompts import PromptRow, read_prompts
from mpo.building.recipe import PromptSource, load_build
from mpo.data import check_data, convert, load_groups
from mpo.data.contract import KINDS
from mpo.data.forms import FORMS, form_of
from mpo.data.forms.recognition import as_columns
from mpo.errors import ConfigError, DataError
from tests.data.rows import TEXTS, flat, group

PROMPT, NO, YES = TEXTS["en"]
SYSTEM = "You are kind."


def user(text: str = PROMPT) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str = NO) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def said(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


def dialog(*turns: str) -> str:
    return "".join(f"\n\n{'Human' if n % 2 == 0 else 'Assistant'}: {turn}" for n, turn in enumerate(turns))


def safe_rlhf(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": PROMPT,
        "response_0": YES,
        "response_1": NO,
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "better_response_id": 0,
        "safer_response_id": 1,
    }
    row.update(changes)
    return {key: value for key, value in row.items() if value is not ...}


def completion(text: str, score: float | None) -> dict[str, Any]:
    return {"model": "some", "response": text, "overall_score": score, "custom_system_prompt": SYSTEM}


TRL = {"prompt": PROMPT, "chosen": NO, "rejected": YES}
PAIR = {"prompt": PROMPT, "chosen": NO, "rejected": YES}
TURNS = [user("Hello!"), answer("Hello."), user()]
LONG = {"prompt": TURNS, "chosen": NO, "rejected": YES}

# name, form, row, what is made of it
UNDERSTOOD: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("TRL, texts", "trl", TRL, PAIR),
    (
        "TRL, id and kind stay",
        "trl",
        {"id": 7, "kind": "harmful", **TRL},
        {"id": 7, "kind": "harmful", **PAIR},
    ),
    ("TRL, other columns go", "trl", {**TRL, "source_dataset": "x", "model": "y"}, PAIR),
    (
        "TRL, a question column",
        "trl",
        {"question": PROMPT, "chosen": NO, "rejected": YES, "system": ""},
        PAIR,
    ),
    (
        "TRL, conversational",
        "trl",
        {"prompt": [user()], "chosen": [answer()], "rejected": [answer(YES)]},
        PAIR,
    ),
    ("TRL, several turns", "trl", {"prompt": TURNS, "chosen": [answer()], "rejected": [answer(YES)]}, LONG),
    (
        "TRL, a system column",
        "trl",
        {**TRL, "system": SYSTEM},
        {**PAIR, "prompt": [{"role": "system", "content": SYSTEM}, user()]},
    ),
    (
        "TRL, implicit",
        "trl-implicit",
        {"chosen": [user(), answer()], "rejected": [user(), answer(YES)]},
        PAIR,
    ),
    (
        "TRL, implicit, several turns",
        "trl-implicit",
        {"chosen": [*TURNS, answer()], "rejected": [*TURNS, answer(YES)]},
        LONG,
    ),
    (
        "TRL, implicit, one answer goes on",
        "trl-implicit",
        {"chosen": [user(), answer()], "rejected": [user(), answer(), answer(YES)]},
        {**PAIR, "rejected": [answer(), answer(YES)]},
    ),
    (
        "TRL, implicit text with lines",
        "trl-implicit-text",
        {"chosen": f"{PROMPT}\nI can't do it.", "rejected": f"{PROMPT}\nI can do it."},
        {"prompt": PROMPT, "chosen": "I can't do it.", "rejected": "I can do it."},
    ),
    (
        "TRL, implicit text",
        "trl-implicit-text",
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"prompt": "The sky is", "chosen": "blue.", "rejected": "green."},
    ),
    (
        "TRL, unpaired good",
        "trl-unpaired",
        {"prompt": PROMPT, "completion": NO, "label": True},
        {"prompt": PROMPT, "chosen": NO},
    ),
    (
        "TRL, unpaired bad",
        "trl-unpaired",
        {"prompt": [user()], "completion": [answer(YES)], "label": 0},
        {"prompt": PROMPT, "rejected": YES},
    ),
    (
        "BeaverTails, unsafe",
        "beavertails",
        {"prompt": PROMPT, "response": YES, "category": {"privacy": True}, "is_safe": False},
        {"prompt": PROMPT, "rejected": YES},
    ),
    (
        "BeaverTails, safe",
        "beavertails",
        {"prompt": PROMPT, "response": NO, "is_safe": True},
        {"prompt": PROMPT, "chosen": NO},
    ),
    (
        "LLaMA-Factory, unpaired",
        "sharegpt-unpaired",
        {"messages": [*TURNS, answer(YES)], "label": False},
        {"prompt": TURNS, "rejected": YES},
    ),
    (
        "LLaMA-Factory, unpaired ShareGPT",
        "sharegpt-unpaired",
        {"conversations": [said("human", PROMPT), said("gpt", NO)], "kto_tag": True, "system": SYSTEM},
        {"prompt": [{"role": "system", "content": SYSTEM}, user()], "chosen": NO},
    ),
    (
        "a label that is no verdict",
        "conversations",
        {"messages": [user(), answer(YES)], "label": "spying"},
        {"prompt": PROMPT},
    ),
    (
        "TRL, capital columns",
        "trl",
        {"Id": 4, "Prompt": PROMPT, "Chosen": NO, " REJECTED": YES},
        {"id": 4, **PAIR},
    ),
    (
        "JailbreakBench",
        "prompts",
        {"Index": 0, "Goal": PROMPT, "Target": "Sure", "Behavior": "Spying"},
        {"prompt": PROMPT},
    ),
    (
        "StrongREJECT",
        "prompts",
        {"category": "x", "source": "y", "forbidden_prompt": PROMPT},
        {"prompt": PROMPT},
    ),
    ("Aya", "prompts", {"prompt": PROMPT, "targets": YES, "language": "English"}, {"prompt": PROMPT}),
    (
        "HH, an answer that quotes a dialog",
        "hh",
        {
            "chosen": dialog(PROMPT, "As in:\nHuman: Hi\nAssistant: Hello."),
            "rejected": dialog(PROMPT, YES),
        },
        {**PAIR, "chosen": "As in:\nHuman: Hi\nAssistant: Hello."},
    ),
    (
        "HH, a line break between turns",
        "hh",
        {"chosen": f"Human: {PROMPT}\nAssistant: {NO}", "rejected": f"Human: {PROMPT}\nAssistant: {YES}\n"},
        PAIR,
    ),
    (
        "PKU-SafeRLHF, numbers for marks",
        "safe-rlhf",
        safe_rlhf(is_response_0_safe=0, is_response_1_safe=1, safer_response_id=1.0),
        PAIR,
    ),
    ("HH", "hh", {"chosen": dialog(PROMPT, NO), "rejected": dialog(PROMPT, YES)}, PAIR),
    (
        "HH, several turns",
        "hh",
        {
            "chosen": dialog("Hello!", "Hello.", PROMPT, NO),
            "rejected": dialog("Hello!", "Hello.", PROMPT, YES),
        },
        LONG,
    ),
    (
        "HH, lines in a turn",
        "hh",
        {"chosen": dialog(PROMPT, "No:\n\n1. No"), "rejected": dialog(PROMPT, YES)},
        {**PAIR, "chosen": "No:\n\n1. No"},
    ),
    (
        "HH, prompt apart",
        "trl",
        {"prompt": dialog("Hello!", "Hello.", PROMPT) + "\n\nAssistant:", "chosen": NO, "rejected": YES},
        LONG,
    ),
    (
        "UltraFeedback",
        "ultrafeedback",
        {
            "prompt": PROMPT,
            "prompt_id": "a1",
            "chosen": [user(), answer()],
            "rejected": [user(), answer(YES)],
            "messages": [user(), answer()],
            "score_chosen": 8.5,
            "score_rejected": 2.0,
        },
        {"prompt_id": "a1", **PAIR},
    ),
    (
        "UltraFeedback, completions",
        "ultrafeedback-completions",
        {
            "source": "x",
            "instruction": PROMPT,
            "completions": [completion(YES, 1), completion("?", 3), completion(NO, 9)],
        },
        PAIR,
    ),
    (
        "UltraFeedback, completions of one score",
        "ultrafeedback-completions",
        {"instruction": PROMPT, "completions": [completion(YES, 5), completion(NO, 5)]},
        {"prompt": PROMPT},
    ),
    (
        "ShareGPT ranking",
        "sharegpt-ranking",
        {"conversations": [said("human", PROMPT)], "chosen": said("gpt", NO), "rejected": said("gpt", YES)},
        PAIR,
    ),
    (
        "ShareGPT ranking, turns and system",
        "sharegpt-ranking",
        {
            "conversations": [said("human", "Hello!"), said("gpt", "Hello."), said("human", PROMPT)],
            "system": SYSTEM,
            "tools": "[]",
            "chosen": said("gpt", NO),
            "rejected": said("gpt", YES),
        },
        {**LONG, "prompt": [{"role": "system", "content": SYSTEM}, *TURNS]},
    ),
    (
        "ShareGPT, no preference",
        "conversations",
        {"id": "c1", "conversations": [said("human", PROMPT), said("gpt", YES)]},
        {"id": "c1", "prompt": PROMPT},
    ),
    ("messages, no preference", "conversations", {"messages": [*TURNS, answer()]}, {"prompt": TURNS}),
    (
        "LLaMA-Factory, list of outputs",
        "alpaca-ranking",
        {"instruction": PROMPT, "input": "", "output": [NO, YES]},
        PAIR,
    ),
    (
        "LLaMA-Factory, chosen and rejected",
        "alpaca-pairs",
        {"instruction": "Answer this:", "input": PROMPT, "chosen": NO, "rejected": YES},
        {**PAIR, "prompt": f"Answer this:\n{PROMPT}"},
    ),
    (
        "LLaMA-Factory, history",
        "alpaca-pairs",
        {"instruction": PROMPT, "history": [["Hello!", "Hello."]], "chosen": NO, "rejected": YES},
        LONG,
    ),
    (
        "LLaMA-Factory, no preference",
        "prompts",
        {"instruction": PROMPT, "input": "", "output": YES},
        {"prompt": PROMPT},
    ),
    ("PKU-SafeRLHF", "safe-rlhf", safe_rlhf(), PAIR),
    (
        "PKU-SafeRLHF, the first is safe",
        "safe-rlhf",
        safe_rlhf(
            response_0=NO,
            response_1=YES,
            is_response_0_safe=True,
            is_response_1_safe=False,
            safer_response_id=0,
        ),
        PAIR,
    ),
    (
        "PKU-SafeRLHF, both unsafe",
        "safe-rlhf",
        safe_rlhf(is_response_1_safe=False),
        {"prompt": PROMPT, "rejected": YES},
    ),
    (
        "PKU-SafeRLHF, both safe",
        "safe-rlhf",
        safe_rlhf(is_response_0_safe=True),
        {"prompt": PROMPT, "chosen": NO},
    ),
    ("PKU-SafeRLHF, no safer one named", "safe-rlhf", safe_rlhf(safer_response_id=...), PAIR),
    ("prompts", "prompts", {"prompt": PROMPT}, {"prompt": PROMPT}),
    ("prompts of turns", "prompts", {"prompt": TURNS}, {"prompt": TURNS}),
    ("prompts as goals", "prompts", {"goal": PROMPT, "target": "Sure"}, {"prompt": PROMPT}),
    (
        "prompts with half a pair",
        "half-pairs",
        {"prompt": PROMPT, "rejected": YES},
        {"prompt": PROMPT, "rejected": YES},
    ),
    (
        "prompts in columns",
        "wide-prompts",
        {"id": 3, "en": PROMPT, "bn": TEXTS["bn"][0]},
        {"id": 3, "prompt": PROMPT},
    ),
]

# name, a sound row before it, the broken row, field, a piece of the reason
BROKEN: list[tuple[str, dict[str, Any], Any, str | None, str]] = [
    ("rejected missing", TRL, {"prompt": PROMPT, "chosen": NO}, "rejected", "missing"),
    ("rejected null", TRL, {**TRL, "rejected": None}, "rejected", "null"),
    ("column misspelt", TRL, {"prompt": PROMPT, "choosen": NO, "rejected": YES}, "chosen", "`choosen`"),
    ("prompt empty", TRL, {**TRL, "prompt": " \u200b"}, "prompt", "is empty"),
    ("chosen a number", TRL, {**TRL, "chosen": 3}, "chosen", "a number"),
    ("chosen equal", TRL, {**TRL, "rejected": NO + " "}, "rejected", "equal to chosen"),
    ("no object", TRL, [1], None, "no object"),
    ("half a character", TRL, {**TRL, "chosen": "no \ud83d"}, "chosen", "surrogate"),
    ("half a character in a column that stays", TRL, {**TRL, "id": "\ud83d"}, "id", "half a character"),
    (
        "messages as text",
        TRL,
        {**TRL, "prompt": "[{'role': 'user', 'content': 'x'}]"},
        "prompt",
        "written as a text",
    ),
    ("prompt ends with an answer", TRL, {**TRL, "prompt": [user(), answer()]}, "prompt[1]", "'user'"),
    (
        "another conversation",
        TRL,
        {**TRL, "chosen": [user("Else?"), answer()]},
        "chosen[0]",
        "not the row's prompt",
    ),
    ("unknown role", TRL, {**TRL, "prompt": [{"role": "bot", "content": "x"}]}, "prompt[0].role", "'bot'"),
    (
        "implicit, no prompt shared",
        {"chosen": [user(), answer()], "rejected": [user(), answer(YES)]},
        {"chosen": [user(), answer()], "rejected": [user("Else?"), answer(YES)]},
        "rejected",
        "another message",
    ),
    (
        "implicit, nothing behind the prompt",
        {"chosen": [user(), answer()], "rejected": [user(), answer(YES)]},
        {"chosen": [user(), answer()], "rejected": [user()]},
        "rejected",
        "ends with the prompt",
    ),
    (
        "implicit, parts too early",
        {"chosen": [user(), answer()], "rejected": [user(), answer(YES)]},
        {
            "chosen": [user(), answer("a"), user(), answer()],
            "rejected": [user(), answer("b"), user(), answer()],
        },
        "chosen",
        "before its last answer",
    ),
    (
        "implicit, equal",
        {"chosen": [user(), answer()], "rejected": [user(), answer(YES)]},
        {"chosen": [user(), answer()], "rejected": [user(), answer()]},
        "rejected",
        "equal to chosen",
    ),
    (
        "implicit text, nothing shared",
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "Blue.", "rejected": "Green."},
        "rejected",
        "shares no beginning",
    ),
    (
        "HH, last answer empty",
        {"chosen": dialog(PROMPT, NO), "rejected": dialog(PROMPT, YES)},
        {"chosen": dialog(PROMPT, ""), "rejected": dialog(PROMPT, YES)},
        "chosen",
        "turn 2",
    ),
    (
        "HH, no dialog",
        {"chosen": dialog(PROMPT, NO), "rejected": dialog(PROMPT, YES)},
        {"chosen": dialog(PROMPT, NO), "rejected": YES},
        "rejected",
        "is no dialog",
    ),
    (
        "HH, text before the dialog",
        {"chosen": dialog(PROMPT, NO), "rejected": dialog(PROMPT, YES)},
        {"chosen": "Look:" + dialog(PROMPT, NO), "rejected": dialog(PROMPT, YES)},
        "chosen",
        "begin with",
    ),
    (
        "SafeRLHF, says and marks differ",
        safe_rlhf(),
        safe_rlhf(safer_response_id=0),
        "safer_response_id",
        "marked unsafe",
    ),
    (
        "SafeRLHF, no such response",
        safe_rlhf(),
        safe_rlhf(safer_response_id=2),
        "safer_response_id",
        "0 or 1",
    ),
    (
        "SafeRLHF, mark missing",
        safe_rlhf(),
        safe_rlhf(is_response_1_safe=...),
        "is_response_1_safe",
        "missing",
    ),
    (
        "SafeRLHF, mark no boolean",
        safe_rlhf(),
        safe_rlhf(is_response_1_safe="maybe"),
        "is_response_1_safe",
        "true or false",
    ),
    (
        "UltraFeedback, scores the wrong way round",
        {**TRL, "chosen": [user(), answer()], "rejected": [user(), answer(YES)]},
        {**TRL, "score_chosen": 1, "score_rejected": 2},
        "score_chosen",
        "lower",
    ),
    (
        "UltraFeedback, no score",
        {"instruction": PROMPT, "completions": [completion(YES, 1), completion(NO, 2)]},
        {"instruction": PROMPT, "completions": [completion(YES, 1), completion(NO, None)]},
        "completions[1].overall_score",
        "no number",
    ),
    (
        "UltraFeedback, no completions",
        {"instruction": PROMPT, "completions": [completion(YES, 1), completion(NO, 2)]},
        {"instruction": PROMPT, "completions": []},
        "completions",
        "empty",
    ),
    (
        "BeaverTails, no verdict",
        {"prompt": PROMPT, "response": YES, "is_safe": False},
        {"prompt": PROMPT, "response": YES, "is_safe": None},
        "is_safe",
        "null",
    ),
    (
        "unpaired, no answer",
        {"messages": [user(), answer()], "label": True},
        {"messages": [user()], "label": True},
        "messages",
        "does not end with an answer",
    ),
    ("answers in a list", TRL, {**TRL, "rejected": [YES, YES + "!"]}, "rejected[0]", "is a text"),
    ("TRL, nothing in a row", TRL, {}, "prompt", "missing"),
    (
        "one output only",
        {"instruction": PROMPT, "output": [NO, YES]},
        {"instruction": PROMPT, "output": [NO]},
        "output",
        "a list of 1",
    ),
    (
        "tool calls",
        {"conversations": [said("human", PROMPT)], "chosen": said("gpt", NO), "rejected": said("gpt", YES)},
        {
            "conversations": [said("human", PROMPT)],
            "tools": '[{"name": "f"}]',
            "chosen": said("gpt", NO),
            "rejected": said("gpt", YES),
        },
        "tools",
        "not supported",
    ),
    (
        "an observation among the turns",
        {"conversations": [said("human", PROMPT)], "chosen": said("gpt", NO), "rejected": said("gpt", YES)},
        {
            "conversations": [said("observation", "x")],
            "chosen": said("gpt", NO),
            "rejected": said("gpt", YES),
        },
        "conversations[0].from",
        "unknown role",
    ),
    (
        "no question in a conversation",
        {"messages": [user(), answer()]},
        {"messages": [answer()]},
        "messages",
        "no message of the user",
    ),
    (
        "label no boolean",
        {"prompt": PROMPT, "completion": NO, "label": True},
        {"prompt": PROMPT, "completion": NO, "label": 3},
        "label",
        "true or false",
    ),
    (
        "history no pairs",
        {"instruction": PROMPT, "chosen": NO, "rejected": YES},
        {"instruction": PROMPT, "history": ["Hello!"], "chosen": NO, "rejected": YES},
        "history[0]",
        "a pair",
    ),
    ("a hole in a column", {"en": PROMPT, "bn": "x"}, {"en": "", "bn": "x"}, "en", "is empty"),
]


def written(path: Path, *rows: Any) -> Path:
    if path.suffix == ".parquet":
        Dataset.from_list(list(rows)).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def made(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("form", "row", "expected"), [case[1:] for case in UNDERSTOOD], ids=[c[0] for c in UNDERSTOOD]
)
def test_a_form_is_understood(
    tmp_path: Path, form: str, row: dict[str, Any], expected: dict[str, Any], suffix: str
) -> None:
    found = form_of(as_columns(row))
    assert found is not None and found.name == form
    path = written(tmp_path / f"given.{suffix}", row, row)
    result = convert(str(path), tmp_path / "plain.jsonl")
    assert made(tmp_path / "plain.jsonl") == [expected, expected]
    assert result.files[0].form == found.title and result.files[0].rows == result.written == 2
    # What was made is a form itself, and stays as it is.
    convert(str(tmp_path / "plain.jsonl"), tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("sound", "broken", "field", "reason"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN]
)
def test_a_broken_row_is_refused_with_its_place(
    tmp_path: Path, sound: dict[str, Any], broken: Any, field: str | None, reason: str
) -> None:
    path, output = written(tmp_path / "given.jsonl", sound, sound, broken, sound), tmp_path / "plain.jsonl"
    with pytest.raises(DataError) as caught:
        convert(str(path), output)
    assert (caught.value.file, caught.value.row, caught.value.field) == ("given.jsonl", 2, field)
    assert reason in str(caught.value) and not output.exists()
    result = convert(str(path), output, bad_rows="drop")
    assert len(made(output)) == result.written == 3
    ((file, row, where),) = [(bad.file, bad.row, bad.field) for bad in result.dropped]
    assert (file, row, where) == ("given.jsonl", 2, field)


def test_every_form_stands_among_the_examples() -> None:
    assert {form.name for form in FORMS} == {case[1] for case in UNDERSTOOD}
    assert len(UNDERSTOOD) + len(BROKEN) >= 60


@pytest.mark.parametrize(
    "row", [flat("bn"), group("bn"), {"source": {}, "targets": []}, {"a": 1}, 3, None, {}]
)
def test_groups_and_other_things_are_no_such_form(row: Any) -> None:
    assert form_of(row) is None


@pytest.mark.parametrize(
    ("content", "piece"),
    [
        (json.dumps([flat("bn")]), "holds groups already"),
        (json.dumps([{"a": 1, "b": "x"}]), "The columns found are `a`, `b`"),
        (json.dumps([1, 2]), "no objects"),
        ("[]", "empty list"),
        ('{"version": 1, "rows": []}', "holds one object with the keys"),
        (json.dumps([{"prompt": ""}]), "is not known"),
    ],
)
def test_a_file_of_no_known_form_is_refused_as_a_whole(tmp_path: Path, content: str, piece: str) -> None:
    path = tmp_path / "given.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"given\.json") as caught:
        convert(str(path), tmp_path / "plain.jsonl", bad_rows="drop")
    assert piece in str(caught.value) and not (tmp_path / "plain.jsonl").exists()


def test_prompts_come_from_text_files_and_csv_and_rows_that_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"\ufeff{PROMPT}\n\n  Why? \n", encoding="utf-8")
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["prompt", "chosen", "rejected"], ["Why?", NO, YES]])
    (tmp_path / "b.csv").write_text(text.getvalue(), encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps(TRL) + "\n" + json.dumps(TRL), encoding="utf-8")
    result = convert(
        [str(tmp_path / name) for name in ("a.txt", "b.csv", "c.json")], tmp_path / "plain.jsonl"
    )
    assert made(tmp_path / "plain.jsonl") == [
        {"prompt": PROMPT},
        {"prompt": "Why?"},
        {**PAIR, "prompt": "Why?"},
        PAIR,
        PAIR,
    ]
    assert result.parts == {"prompts": 2, "pairs": 3}


def test_a_list_of_texts_is_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([PROMPT, "Why?", 3]), encoding="utf-8")
    result = convert(str(path), tmp_path / "plain.jsonl", bad_rows="drop")
    assert made(tmp_path / "plain.jsonl") == [{"prompt": PROMPT}, {"prompt": "Why?"}]
    assert [(bad.row, bad.reason) for bad in result.dropped] == [(2, "is no object; expected named fields.")]


def test_what_is_left_out_or_hard_to_use_is_said(tmp_path: Path) -> None:
    rows = [
        {"prompt": "<|im_start|>user\nHi", "chosen_response": NO, "topic": "x", "id": 1},
        {"prompt": TURNS, "chosen_response": NO, "topic": "x", "id": 2},
    ]
    path = str(written(tmp_path / "given.jsonl", *rows))
    columns, turns, marks = convert(path, tmp_path / "plain.jsonl", keep=["topic"]).notes
    assert columns.startswith("given.jsonl: columns left out: `chosen_response`.")
    assert "1 prompt with a system message or several turns" in turns and "bad_rows drop" in turns
    assert "marks of a chat template" in marks and "1 row" in marks
    path = str(written(tmp_path / "given.jsonl", {"ID": 1, **TRL}))
    convert(path, tmp_path / "plain.jsonl", keep=["ID"])
    assert made(tmp_path / "plain.jsonl") == [{"ID": 1, **PAIR}]
    assert convert(path, tmp_path / "plain.jsonl").notes == [] and made(tmp_path / "plain.jsonl") == [
        {"id": 1, **PAIR}
    ]


def test_rows_in_other_languages_are_left_out_of_plain_rows(tmp_path: Path) -> None:
    rows = [{"language": code, "prompt": TEXTS["en"][0]} for code in ("en", "bn", "English", "ko")]
    result = convert(str(written(tmp_path / "given.jsonl", *rows)), tmp_path / "plain.jsonl")
    assert made(tmp_path / "plain.jsonl") == [{"prompt": PROMPT}] * 2
    assert result.left_out == {"in another language than English": 2}
    close = [
        {"language": code, "prompt": PROMPT} for code in ("id", "ms", "vi")
    ]  # the first two are told apart by nobody
    result = convert(
        str(written(tmp_path / "close.jsonl", *close)), tmp_path / "c.jsonl", source_language="id"
    )
    assert result.written == 2
    with pytest.raises(DataError, match="unknown language"):
        convert(
            str(written(tmp_path / "given.jsonl", *rows, {"language": "?", "prompt": "x"})),
            tmp_path / "b.jsonl",
        )


def translated(code: str, *ids: Any, **changes: Any) -> list[dict[str, Any]]:
    prompt, chosen, rejected = TEXTS[code]
    return [
        {"id": n, "prompt": f"{prompt} {n}", "chosen": chosen, "rejected": rejected, **changes} for n in ids
    ]


def test_files_by_language_become_groups(tmp_path: Path) -> None:
    files = {
        code: str(written(tmp_path / f"{code}.jsonl", *translated(code, *ids)))
        for code, ids in (("bn", (3, 1)), ("en", (1, 2, 3)), ("ko", (1,)))
    }
    result = convert(files, tmp_path / "groups.jsonl", key="id")
    assert result.parts == {"groups": 2, "translations": 3} and result.left_out == {
        "without a translation": 1
    }
    groups = load_groups(tmp_path / "groups.jsonl").groups
    assert [[t["language"] for t in g["targets"]] for g in groups] == [["bn", "ko"], ["bn"]]
    assert groups[1]["source"]["prompt"] == [user(f"{PROMPT} 3")]
    assert groups[1]["targets"][0]["prompt"] == [user(f"{TEXTS['bn'][0]} 3")]


def test_languages_come_from_file_names_and_columns_and_rows_may_be_the_key(tmp_path: Path) -> None:
    en = written(tmp_path / "pairs_en.jsonl", *translated("en", 1, 2))
    bn = written(tmp_path / "pairs_bn.parquet", *translated("bn", "x", "y"))
    convert([str(en), str(bn)], tmp_path / "groups.jsonl", key="row")
    assert [len(g["targets"]) for g in load_groups(tmp_path / "groups.jsonl").groups] == [1, 1]
    rows = [
        row
        for code in ("en", "bn", "sw")
        for row in translated(code, 1.0 if code == "bn" else 1, language=code)
    ]
    convert(str(written(tmp_path / "long.jsonl", *rows)), tmp_path / "long_groups.jsonl", key="id")
    (only,) = load_groups(tmp_path / "long_groups.jsonl").groups
    assert [target["language"] for target in only["targets"]] == ["bn", "sw"]


@pytest.mark.parametrize(
    ("rows", "row", "field", "reason"),
    [
        (translated("bn", 1, 1), 1, "id", "stands twice"),
        (translated("bn", 1, 9), 1, "id", "no row in English"),
        ([*translated("bn", 1), {"prompt": "x", "chosen": "y", "rejected": "z"}], 1, "id", "missing"),
        ([*translated("bn", 1), *translated("bn", None)], 1, "id", "is empty"),
        ([*translated("bn", 1), *translated("bn", 2, rejected=None)], 1, "rejected", "null"),
    ],
)
def test_rows_that_cannot_be_joined_are_refused_with_their_place(
    tmp_path: Path, rows: list[dict[str, Any]], row: int, field: str, reason: str
) -> None:
    files = {
        "en": str(written(tmp_path / "one.jsonl", *translated("en", 1, 2))),
        "bn": str(written(tmp_path / "two.jsonl", *rows)),
    }
    with pytest.raises(DataError, match=reason) as caught:
        convert(files, tmp_path / "groups.jsonl", key="id")
    assert (caught.value.file, caught.value.row, caught.value.field) == ("two.jsonl", row, field)
    result = convert(files, tmp_path / "groups.jsonl", key="id", bad_rows="drop")
    assert [(bad.row, bad.field) for bad in result.dropped] == [(row, field)] and result.written == 1


def test_files_that_make_no_groups_say_why(tmp_path: Path) -> None:
    en = str(written(tmp_path / "one.jsonl", *translated("en", 1)))
    bn = str(written(tmp_path / "two.jsonl", *translated("bn", 1)))
    output = tmp_path / "groups.jsonl"
    with pytest.raises(ConfigError, match="--key id"):
        convert({"en": en, "bn": bn}, output)
    with pytest.raises(DataError, match="Languages found: bn"):
        convert({"bn": bn}, output, key="id")
    with pytest.raises(DataError, match="which language this row is in"):
        convert([en, bn], output, key="id")
    prompts = str(written(tmp_path / "prompts_en.jsonl", {"id": 1, "prompt": "x"}))
    with pytest.raises(DataError, match=r"prompts alone\. Groups need"):
        convert(prompts, output, key="id")
    with pytest.raises(DataError, match="1 without a translation"):
        convert({"en": en}, output, key="id")
    with pytest.raises(ConfigError, match="is an input"):
        convert(en, en)
    with pytest.raises(ConfigError, match=r"expected a \.jsonl file"):
        convert(en, tmp_path / "plain.json")
    assert not output.exists()


@pytest.mark.parametrize(
    ("row", "piece"),
    [
        (TRL, "`prompt`, `chosen`, `rejected`"),
        ({"chosen": dialog(PROMPT, NO), "rejected": dialog(PROMPT, YES)}, "HH-RLHF"),
        (safe_rlhf(), "PKU-SafeRLHF"),
        ({"prompt": PROMPT}, "prompts alone"),
        ({"en": PROMPT, "bn": TEXTS["bn"][0]}, "a column per language"),
    ],
)
@pytest.mark.parametrize("bad_rows", ["error", "drop"])
def test_where_groups_are_needed_a_file_of_another_form_is_named_once(
    tmp_path: Path, row: dict[str, Any], piece: str, bad_rows: str
) -> None:
    path = written(tmp_path / "given.jsonl", *[row] * 5)
    for load in (lambda: load_groups(path, bad_rows=bad_rows), lambda: check_data(path)):
        with pytest.raises(DataError) as caught:
            load()
        message = str(caught.value)
        assert message.startswith("given.jsonl: holds ") and piece in message
        assert "missing" not in message and PROMPT not in message
        # The command that it names takes the file.
        if "`mpo data convert given.jsonl --output pairs.jsonl`" in message:
            with pytest.raises(DataError, match="Make plain rows of it first"):
                list(read_prompts(PromptSource([str(path)], kind="harmful"), "en", ["bn"]))
            continue
        (command,) = re.findall(r"`mpo data build (.*?)`", message)
        recipe, *words = shlex.split(command)
        build = load_build(recipe, [str(path) if word == path.name else word for word in words])
        found = list(read_prompts(build.prompts, "en", ["bn"]))
        assert isinstance(found[0], PromptRow)
        assert "chosen" in row or {prompt.kind for prompt in found if isinstance(prompt, PromptRow)} == {
            *KINDS
        }
        assert (build.translation.engine == "none") == ("bn" in row)
        assert ("chosen" in row) == (build.answers.chosen == "column")


def test_a_row_of_another_form_among_groups_stays_a_bad_row(tmp_path: Path) -> None:
    report = check_data(written(tmp_path / "given.jsonl", flat("bn"), TRL))
    assert [(bad.row, bad.field) for bad in report.bad_rows] == [(1, "source_prompt")]


def test_the_check_lists_identical_faults_once_and_returns_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [flat("bn", number=n, target_chosen="") for n in range(40)]
    other = [
        flat("bn", number=n, target_prompt=[user(), answer(), {"role": "bot", "content": "x"}])
        for n in range(2)
    ]
    path = written(tmp_path / "pairs.jsonl", flat("bn"), *bad, *other)
    assert cli.main(["data", "check", str(path)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "Bad rows: 42." in shown
    assert shown.count("is empty. Expected text.") == 1
    assert (
        "pairs.jsonl, 40 rows (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 28 more), field `target_chosen`:"
        in shown
    )
    assert "pairs.jsonl, 2 rows (41, 42), field `target_prompt[2].role`:" in shown
    assert cli.main(["data", "check", str(written(tmp_path / "good.jsonl", flat("bn")))]) == 0


def test_the_command_converts_and_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "given.jsonl", TRL, *[{**TRL, "chosen": ""}] * 3, {**TRL, "topic": "locks"})
    output = tmp_path / "plain.jsonl"
    words = ["data", "convert", str(path), "--output", str(output)]
    assert cli.main(words) == 2
    assert "given.jsonl, row 1, field `chosen`: is empty" in capsys.readouterr().err
    assert cli.main([*words, "--bad_rows", "drop", "--keep", "topic"]) == 0
    shown = capsys.readouterr().out
    assert (
        "given.jsonl holds preference pairs with a prompt" in shown
        and f"Written to {output}: 2 pairs." in shown
    )
    assert "given.jsonl, 3 rows (1, 2, 3), field `chosen`: is empty" in shown
    assert made(output) == [PAIR, {"topic": "locks", **PAIR}]
    written(tmp_path / "one.jsonl", TRL)
    assert convert(str(tmp_path / "one.jsonl"), output).to_text().endswith(": 1 pair.")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["a.jsonl", "--language", "en=b.jsonl"],
        ["--language", "en"],
        ["--language", "en=a.jsonl", "--language", "en=b.jsonl"],
    ],
)
def test_the_command_refuses_inputs_given_in_two_ways(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "convert", *words, "--output", "x.jsonl"]) == 2
    assert "CODE=FILE" in capsys.readouterr().err
