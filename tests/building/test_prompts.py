"""Prompts in the forms that people have, right and wrong, and recipes that cannot work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mpo.building import prompts as prompts_module
from mpo.building.prompts import Dropped, PromptRow, read_prompts
from mpo.building.recipe import PromptSource, load_build
from mpo.building.refusals import Refusals
from mpo.errors import ConfigError, DataError, MPOError
from tests.building.test_build import write_recipe, write_rows


def read(path: Path, **settings: Any) -> list[PromptRow | Dropped]:
    return list(read_prompts(PromptSource([str(path)], **settings), "en", ["zh", "sw"]))


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"prompt": "Hello"}, {"en": "Hello"}),
        ({"instruction": "Hello", "zh": "你好", "fr": "Salut"}, {"en": "Hello", "zh": "你好"}),
        ({"en": "Hello", "sw": "Habari"}, {"en": "Hello", "sw": "Habari"}),
        ({"texts": {"English": "Hello", "zh-CN": "你好", "fr": "Salut"}}, {"en": "Hello", "zh": "你好"}),
        ({"prompt": [{"role": "user", "content": "Hello"}]}, {"en": "Hello"}),
        ({"prompt": [{"from": "human", "value": "Hello"}]}, {"en": "Hello"}),
        ({"Prompt": "Hello"}, {"en": "Hello"}),
        ({"forbidden_prompt": "Hello"}, {"en": "Hello"}),
        ({"instruction": "Answer:", "input": "Why?"}, {"en": "Answer:\nWhy?"}),
    ],
)
def test_a_prompt_and_its_translations_are_found(tmp_path: Path, row: dict, texts: dict) -> None:
    (found,) = read(write_rows(tmp_path / "p.jsonl", [{**row, "kind": "harmless"}]))
    assert found == PromptRow("p.jsonl:0", "harmless", texts)


def test_translations_have_the_order_of_the_languages_in_every_process(tmp_path: Path) -> None:
    codes = ["en", "sw", "zh", "ko", "ar", "bn", "de", "fr"]
    row = {"kind": "harmless", **{code: f"Hello in {code}" for code in reversed(codes)}}
    source = PromptSource([str(write_rows(tmp_path / "p.jsonl", [row]))])
    (found,) = read_prompts(source, "en", codes[1:])
    assert isinstance(found, PromptRow) and list(found.texts) == codes


def test_a_table_is_read_and_answers_may_stand_in_it(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text(
        "id,goal,kind,rejected\n7,Break it,harmful,Take a stone\n8,Mend it,looks_harmful,\n", encoding="utf-8"
    )
    assert read(path) == [
        PromptRow("7", "harmful", {"en": "Break it"}, rejected="Take a stone"),
        PromptRow("8", "harmless", {"en": "Mend it"}),
    ]
    pair = {
        "prompt": "Hi",
        "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}],
    }
    (found,) = read(write_rows(tmp_path / "p.jsonl", [pair]), kind="harmful")
    assert isinstance(found, PromptRow) and found.chosen == "Yes?"


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\ufeffBreak it\r\n\n Mend it \n", encoding="utf-8")
    assert read(path, kind="harmful") == [
        PromptRow("p.txt:0", "harmful", {"en": "Break it"}),
        PromptRow("p.txt:2", "harmful", {"en": "Mend it"}),
    ]


def test_a_prompt_that_is_there_twice_is_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "Hello there"}, {"prompt": " hello  There"}, {"prompt": "Other"}]
    found = read(write_rows(tmp_path / "p.jsonl", rows), kind="harmful", limit=2)
    assert [type(each).__name__ for each in found] == ["PromptRow", "Dropped", "PromptRow"]
    assert isinstance(found[1], Dropped) and found[1].reason == "duplicate"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hello"}, "nothing says whether the prompt is harmful or harmless"),
        ({"prompt": "Hello", "kind": "harmfull"}, "Did you mean 'harmful'"),
        ({"promt": "Hello", "kind": "harmful"}, "no prompt was found. Its columns are `promt`, `kind`"),
        ({"prompt": "", "kind": "harmful"}, "no prompt was found"),
        ({"prompt": "\u200b", "kind": "harmful"}, "no prompt was found"),
        ({"prompt": 5, "kind": "harmful"}, "expected a text, got int"),
        ({"prompt": "a\ud800", "kind": "harmful"}, "lone surrogate"),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "kind": "harmful"}, "one turn"),
        ({"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "kind": "harmful"}, "is a written dialog"),
        ({"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}] * 2, "kind": "harmful"}, "several messages"),
        ({"prompt": "a", "chosen": [{"role": "user", "content": "a"}], "kind": "harmful"}, "message of the user"),
        ({"texts": {"klingon": "Hello"}, "kind": "harmful"}, "unknown language"),
        (["Hello"], "expected an object"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_with_its_place_or_dropped(tmp_path: Path, row: Any, message: str) -> None:
    good = {"prompt": "Good", "kind": "harmful"}
    path = write_rows(tmp_path / "p.jsonl", [good, row])
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert "row 1" in str(caught.value)
    kept, dropped = read(path, bad_rows="drop")
    assert isinstance(kept, PromptRow) and isinstance(dropped, Dropped) and message in dropped.value


@pytest.mark.parametrize(
    ("row", "piece"),
    [
        ({"prompt": "a", "response_0": "b", "response_1": "c", "is_response_0_safe": True, "is_response_1_safe": False}, "PKU"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "HH-RLHF"),
        ({"conversations": [{"from": "human", "value": "a"}], "chosen": {"value": "b"}, "rejected": {"value": "c"}}, "ShareGPT"),
        ({"prompt": "a", "response": "b", "is_safe": False}, "BeaverTails"),
        ({"source_prompt": "a", "source_chosen": "b"}, "groups already"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bad_rows", ["error", "drop"])
def test_rows_whose_answers_would_be_lost_are_named_with_the_command_that_reads_them(
    tmp_path: Path, row: dict, piece: str, bad_rows: str
) -> None:
    path = write_rows(tmp_path / "p.jsonl", [row] * 3)
    with pytest.raises(DataError, match=piece) as caught:
        read(path, kind="harmful", bad_rows=bad_rows)
    assert "mpo data convert" in str(caught.value) or "mpo train" in str(caught.value)
    if "prompt" in row:
        assert len(read(path, kind="harmful", prompt_column="prompt")) == 3


def test_an_id_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    rows = [{"id": 1, "prompt": text, "kind": "harmful"} for text in ("one", "two")]
    with pytest.raises(DataError, match="the id '1' is there twice"):
        read(write_rows(tmp_path / "p.jsonl", rows))


def test_the_packages_own_prompts_and_refusals_are_taken_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import dataclass

    @dataclass
    class Own:
        id: str
        kind: str
        texts: dict[str, str]

    rows = [Own(f"{kind}-{n}", kind, {"en": f"{kind} {n}", "sw": "x"}) for kind in ("harmless", "looks_harmful", "harmful") for n in range(20)]  # fmt: skip

    def refusals(language: str) -> tuple[str, ...]:
        if language != "en":
            raise ConfigError("none")
        return ("No.", "Never.")

    monkeypatch.setattr(prompts_module, "starter_rows", lambda: tuple(rows))
    monkeypatch.setattr("mpo.building.refusals.starter_refusals", refusals)
    found = list(read_prompts(PromptSource(["starter"]), "en", ["sw"]))
    assert len(found) == 60 and {row.kind for row in found if isinstance(row, PromptRow)} == {
        "harmful",
        "harmless",
    }
    assert len(list(read_prompts(PromptSource(["demo"]), "en", ["sw"]))) == 16
    assert len(list(read_prompts(PromptSource(["starter-harmless"]), "en", ["sw"]))) == 40
    both = list(read_prompts(PromptSource(["starter-harmless", "starter-everyday"]), "en", ["sw"]))
    assert len(both) == 40 + 299 and {row.kind for row in both if isinstance(row, PromptRow)} == {"harmless"}
    own_refusals = Refusals()
    assert own_refusals.of("en") == ("No.", "Never.") and own_refusals.of("zu") == ()
    assert (
        own_refusals.for_prompt("a", "en") in ("No.", "Never.") and own_refusals.for_prompt("a", "zu") is None
    )


GOOD = "prompts: {data: [p.jsonl]}\nlanguages: [sw]\nanswers: {chosen: column, rejected: [column]}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts: {data: [p.jsonl]}\nlanguages: [en]\nmodel: {model: m}\n", "'en' is the language of the source"),
        ("prompts: {data: [p.jsonl]}\nlanguages: [sw, Swahili]\nmodel: {model: m}\n", "one is there twice"),
        ("prompts: {data: [p.jsonl]}\nlanguages: [sw]\n", "needs the model that will be trained"),
        (GOOD + "translation: {engine: command}\n", "needs a program and its arguments"),
        (GOOD + "translation: {engine: seq2seq, model: {model: m, engine: server, url: 'http://x'}}\n", "take `chat` for a server"),
        (GOOD + "translation: {engine: chat}\n", "need a model"),
        (GOOD + "filters: {copi: 1}\n", "`filters.copi` is not a key.*nearest is `filters.copy`"),
        (GOOD + "filters: {back_translation: 40}\n", "needs what translates back"),
        (GOOD.replace("column, ", "column, samples: 2, generation: {temperature: 0}, "), "are one and the same"),
        (GOOD.replace("[column]", "[column, model]"), "rejecting_model"),
        ("prompts: {data: [p.jsonl]}\nlanguages: [sw]\nmodel: {model: m, engine: server, url: 'http://x'}\n", "`select: first`"),
        ("prompts: {data: []}\nlanguagues: [sw]\nblock: 0\n", "2 settings are wrong.*`languagues` is not a key"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_work_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_build(write_recipe(tmp_path, text))


def test_what_would_show_after_hours_is_said_before_any_work(tmp_path: Path) -> None:
    from mpo.jobs.build import build_data

    write_rows(tmp_path / "p.jsonl", [{"prompt": "Break it", "kind": "harmful"}])
    text = GOOD.replace("p.jsonl", f"{tmp_path}/p.jsonl") + f"out: {tmp_path}/out\n"
    for more, message in (
        ("", "no row of the prompts has a text in `chosen`"),
        ("answers: {chosen: column, rejected: [own]}\n", "no row of the prompts has a text in `chosen`"),
    ):
        recipe = load_build(
            write_recipe(
                tmp_path,
                text.replace("answers: {chosen: column, rejected: [column]}\n", more) if more else text,
            )
        )
        with pytest.raises(MPOError, match=message):
            build_data(recipe, dry_run=True)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_asked_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mpo.jobs.build import build_data

    rows = [
        {"prompt": "Break it", "kind": "harmful", "rejected": "Take a stone"},
        {"prompt": "Mend it", "kind": "harmless", "texts": {"sw": "Itengeneze"}},
    ]
    write_rows(tmp_path / "p.jsonl", rows)
    (tmp_path / "refusals.json").write_text(json.dumps({"en": ["No."]}), encoding="utf-8")
    command = json.dumps([sys.executable, "-c", "pass", "{source}", "{target}"])
    recipe = write_recipe(
        tmp_path,
        f"prompts: {{data: [{tmp_path}/p.jsonl]}}\nlanguages: [sw, zh]\nanswers: {{select: first, samples: 3, refusals: {tmp_path}/refusals.json}}\n"
        f"model: {{model: toy, engine: server, url: 'http://localhost:1'}}\n"
        f"translation: {{engine: command, command: {command}}}\nout: {tmp_path}/out\n",
    )
    assert build_data(load_build(recipe), dry_run=True) is None
    printed = capsys.readouterr().out
    assert "2: 1 harmful and 1 harmless" in printed
    assert "6 from toy, and 3 in each of sw and zh" in printed
    assert "at most 5 into sw and 6 into zh" in printed
    assert not (tmp_path / "out").exists()
