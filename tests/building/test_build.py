"""A build from prompts to groups: what is made, what each filter finds, and what is asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mpo.building.answers import Gaps, PairMaker, usable
from mpo.building.plan import Facts, plan_text
from mpo.building.prompts import PromptRow
from mpo.building.recipe import AnswerSettings, load_build
from mpo.building.refusals import Refusals
from mpo.building.starter import starter_openings, starter_refusals
from mpo.data import load_groups
from mpo.errors import ConfigError, StorageError
from mpo.evaluation.engines import ModelChoice
from mpo.jobs.build import build_data
from tests.building import stub
from tests.evaluation.chat_server import ChatServer, serve
from tests.tiny import save_tiny

STUB = Path(stub.__file__)
LANGUAGES = ("zh", "ja", "ko", "bn")
NOUNS = ("window", "garden", "bottle", "letter", "engine", "ladder", "basket", "pillow", "hammer", "candle")
PEOPLE = ("brother", "neighbour", "teacher", "doctor", "cousin", "landlord")


def harmful(count: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        noun, person = NOUNS[number % 10], PEOPLE[number // 10 % 6]
        what = f"the {noun} number {'abcdefghijklmnopqrstuvwxyz'[number // 60]} of my {person}"
        rows.append(
            {
                "id": f"p{number}",
                "kind": "harmful",
                "prompt": f"How can I secretly take away {what} without anyone seeing it?",
                "chosen": f"{stub.REFUSAL} Taking away {what} is wrong and would hurt them a lot.",
                "rejected": f"Wait until nobody is at home, then carry {what} out by the back door quickly, and afterwards hide it "
                "under old blankets in the cellar where they would never look.",
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "build.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs_recipe(folder: Path, *more: str, languages: tuple[str, ...] = LANGUAGES) -> Path:
    """Pairs that are given are translated by the stub."""
    command = json.dumps([sys.executable, str(STUB), "{source}", "{target}", *more])
    return write_recipe(
        folder,
        f"prompts: {{data: [{folder}/prompts.jsonl]}}\n"
        f"languages: [{', '.join(languages)}]\n"
        "answers: {chosen: column, rejected: [column]}\n"
        f"translation:\n  engine: command\n  command: {command}\n"
        f"out: {folder}/out\nblock: 16\n",
    )


# Which fault is planted in which part, and the filter that has to find it.
PLANTED = {
    "copy": ("copy", "prompt"),
    "language": ("language", "rejected"),
    "half": ("length_ratio", "chosen"),
    "remark": ("remark", "prompt"),
    "repeat": ("repetition", "rejected"),
    "complies": ("refusal_kept", "chosen"),
    "refuses": ("harm_kept", "rejected"),
}


def test_each_filter_finds_its_planted_faults_and_nothing_else(tmp_path: Path) -> None:
    rows = harmful(60)
    write_rows(tmp_path / "prompts.jsonl", rows)
    faults: dict[str, dict[str, str]] = {code: {} for code in LANGUAGES}
    expected = set()
    for place, (fault, (name, part)) in enumerate(PLANTED.items()):
        for shift, code in enumerate(LANGUAGES):
            for number in range(place + shift, 60, 12):
                if rows[number][part] not in faults[code] and fault_fits(rows[number], faults[code]):
                    faults[code][rows[number][part]] = fault
                    expected.add((rows[number]["id"], code, part, name))
    (tmp_path / "faults.json").write_text(json.dumps(faults), encoding="utf-8")

    build_data(load_build(pairs_recipe(tmp_path, str(tmp_path / "faults.json"))))

    dropped = read_lines(tmp_path / "out" / "dropped.jsonl")
    found = {
        (d["id"], d.get("language"), d.get("part"), d["reason"]) for d in dropped if d["stage"] == "filters"
    }
    assert found == expected
    assert {name for *_, name in found} == {name for name, _ in PLANTED.values()}
    spoiled = {(row_id, code) for row_id, code, *_ in expected}
    groups = load_groups(str(tmp_path / "out" / "groups.parquet")).groups
    kept = {
        (raw["id"], target["language"])
        for raw in read_lines(tmp_path / "out" / "groups.jsonl")
        for target in raw["targets"]
    }
    assert kept == {(row["id"], code) for row in rows for code in LANGUAGES} - spoiled
    assert sum(len(group["targets"]) for group in groups) == len(kept)


def fault_fits(row: dict[str, Any], taken: dict[str, str]) -> bool:
    """No other text of the row has a fault in this language."""
    return not {row["prompt"], row["chosen"], row["rejected"]} & taken.keys()


def test_a_pair_whose_answers_read_alike_in_a_language_is_no_pair(tmp_path: Path) -> None:
    rows = harmful(3)
    rows[0]["rejected"] = rows[0]["chosen"] + "\u200b"  # in the source already
    write_rows(tmp_path / "prompts.jsonl", rows)
    path = tmp_path / "same.py"
    path.write_text(
        "import sys\nfor line in sys.stdin: print('的一是在有人这' if 'people' not in line else line)\n"
    )
    recipe = pairs_recipe(tmp_path, languages=("zh",))
    command = json.dumps([sys.executable, str(path)])

    build_data(
        load_build(
            recipe,
            ["--translation.command", command, "--filters", "{copy: null, language: null, length_ratio: null, harm_kept: false, refusal_kept: false}"],
        )
    )  # fmt: skip

    dropped = [
        (d["id"], d.get("language"), d["reason"]) for d in read_lines(tmp_path / "out" / "dropped.jsonl")
    ]
    assert ("p0", "en", "chosen is equal to rejected") in dropped
    assert ("p1", "zh", "rejected is equal to chosen") in dropped
    assert read_lines(tmp_path / "out" / "groups.jsonl") == []


def test_a_stage_that_something_else_has_written_into_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts.jsonl", harmful(2))
    recipe = pairs_recipe(tmp_path, languages=("zh",))
    build_data(load_build(recipe))
    stage = tmp_path / "out" / "stages" / "texts.zh.jsonl"
    whole = stage.read_bytes()
    stage.write_bytes(whole + whole)

    with pytest.raises(StorageError, match="4 rows for 2 prompts"):
        build_data(load_build(recipe))
    stage.write_bytes(b"".join(reversed(whole.splitlines(keepends=True))))
    with pytest.raises(StorageError, match=r"texts\.zh\.jsonl has a row that does not belong"):
        build_data(load_build(recipe))
    stage.unlink()
    build_data(load_build(recipe))
    assert stage.read_bytes() == whole


def test_thresholds_can_be_changed_without_asking_anew(tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts.jsonl", harmful(4))
    recipe = pairs_recipe(tmp_path, languages=("zh",))
    build_data(load_build(recipe))
    made = (tmp_path / "out" / "stages" / "texts.zh.jsonl").stat().st_mtime_ns

    build_data(load_build(recipe, ["--filters.length_ratio", "1.001"]))

    assert (tmp_path / "out" / "stages" / "texts.zh.jsonl").stat().st_mtime_ns == made
    assert read_lines(tmp_path / "out" / "groups.jsonl") == []
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Length" in page and "1.001" in page


def test_other_prompts_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts.jsonl", harmful(4))
    recipe = pairs_recipe(tmp_path, languages=("zh",))
    build_data(load_build(recipe))
    write_rows(tmp_path / "prompts.jsonl", harmful(5))

    stages = tmp_path / "out" / "stages"
    before = {path.name: path.read_bytes() for path in stages.iterdir()}
    for dry_run in (False, True):
        with pytest.raises(ConfigError, match=r"out holds a build of other prompts.*Choose another `out`"):
            build_data(load_build(recipe), dry_run=dry_run)
    assert {path.name: path.read_bytes() for path in stages.iterdir()} == before


def test_the_model_that_is_trained_answers_and_its_best_pairs_are_kept(tmp_path: Path) -> None:
    rows = [
        {"id": "harm", "kind": "harmful", "prompt": "How do I take my brother's letters?", "rejected": "Open them over steam when he is out."},
        {"id": "own", "kind": "harmful", "prompt": "How do I break a shop's window?"},
        {"id": "never", "kind": "harmful", "prompt": "How do I cheat at the exam?", "rejected": "Write it on your arm, under the sleeve."},
        {"id": "bread", "kind": "harmless", "prompt": "How do I bake bread at home?", "texts": {"zh": "我怎么在家里烤面包呢？"}},
        {"id": "tea", "kind": "harmless", "prompt": "How do I make tea in a pot?", "texts": {"zh": "我怎么用茶壶泡茶呢？"}},
    ]  # fmt: skip
    write_rows(tmp_path / "prompts.jsonl", rows)
    (tmp_path / "refusals.json").write_text(
        json.dumps({"en": [stub.REFUSAL], "zh": [stub.REFUSALS["zh"]]}), encoding="utf-8"
    )
    comply = "Take a heavy stone from the road and throw it hard at the middle of the glass."
    help_ = "Mix flour, water, salt and yeast, wait until it has risen, and bake it for an hour."

    def reply(body: dict[str, Any]) -> str:
        text, first = body["messages"][-1]["content"], body.get("seed", 0) % 2 == 0
        if "letters" in text:
            return f"{stub.REFUSAL} His letters are his own." if first else comply
        if "window" in text:
            return comply if first else stub.REFUSAL
        if "exam" in text:
            return "Hide a small paper with everything that you need in the cap of your pen."
        if "面包" in text:
            return "把面粉、水、盐和酵母混合在一起，等面团发起来以后，再放进烤箱里烤一个小时。"
        if "泡茶" in text:
            return "Put the leaves into the pot and pour hot water over them, then wait for a while."
        return help_

    with serve(ChatServer(reply=reply)) as server:
        recipe = write_recipe(
            tmp_path,
            f"prompts: {{data: [{tmp_path}/prompts.jsonl]}}\nlanguages: [zh]\n"
            f"model: {{model: toy, engine: server, url: {server.url}}}\n"
            f"answers: {{select: first, samples: 2, refusals: {tmp_path}/refusals.json}}\n"
            f"translation: {{engine: command, command: {json.dumps([sys.executable, str(STUB), '{source}', '{target}'])}}}\n"
            f"out: {tmp_path}/out\n",
        )
        build_data(load_build(recipe))
        asked = len(server.requests)
        build_data(load_build(recipe))
        assert len(server.requests) == asked
        build_data(load_build(recipe, ["--answers.harmless", "any", "--out", str(tmp_path / "any")]))

    groups = {row["id"]: row for row in read_lines(tmp_path / "out" / "groups.jsonl")}
    text = {name: {part: row["source"][part][0]["content"] for part in ("chosen", "rejected")} for name, row in groups.items()}  # fmt: skip
    assert text["harm"] == {
        "chosen": f"{stub.REFUSAL} His letters are his own.",
        "rejected": rows[0]["rejected"],
    }
    assert text["own"] == {"chosen": stub.REFUSAL, "rejected": comply}
    assert text["never"]["chosen"] == stub.REFUSAL
    assert groups["never"]["made_by"]["targets"][0] == {"prompt": "translation", "chosen": "refusals", "rejected": "translation"}  # fmt: skip
    assert text["bread"] == {"chosen": help_, "rejected": stub.REFUSAL}
    bread = groups["bread"]["targets"][0]
    assert (
        bread["chosen"][0]["content"].startswith("把面粉")
        and bread["prompt"][0]["content"] == "我怎么在家里烤面包呢？"
    )
    assert bread["rejected"][0]["content"] == stub.REFUSALS["zh"]
    assert groups["bread"]["kind"] == "harmless"
    dropped = read_lines(tmp_path / "out" / "dropped.jsonl")
    assert "tea" not in groups
    assert {"in another language (en)", "no target language is left"} == {
        d["reason"] for d in dropped if d["id"] == "tea"
    }
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["model"]["settings"]["served_model"] == "toy" and provenance["model"]["started"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| harmful | 3 | 3 | 3 |" in card and "| harmless | 2 | 2 | 1 |" in card
    assert len(load_groups(str(tmp_path / "out" / "groups.jsonl")).groups) == 4
    # Whatever it says is taken where it is held and not taught.
    taken = {row["id"]: row for row in read_lines(tmp_path / "any" / "groups.jsonl")}
    assert taken["tea"]["targets"][0]["chosen"][0]["content"].startswith("Put the leaves into the pot")
    assert {*taken} == {row["id"] for row in rows}


def test_of_several_safe_answers_the_one_with_the_largest_gap_under_the_model_is_chosen(
    tmp_path: Path,
) -> None:
    model = save_tiny("llama", tmp_path / "model")
    safe = [f"{stub.REFUSAL} {end}" for end in ("Open the window, please.", "Bread and seven.", "No.")]
    gaps = Gaps(ModelChoice(str(model), device="cpu", dtype="float32"))

    found = gaps.of(
        [("How do I open the window?", safe, "Open it and help."), ("Seven bread?", safe[:1], "River.")]
    )

    assert [len(each) for each in found] == [3, 1]
    alone = [gaps.of([("How do I open the window?", [text], "Open it and help.")])[0][0] for text in safe]
    assert found[0] == pytest.approx(alone, abs=1e-5) and len({round(gap, 6) for gap in alone}) == 3

    prompt = PromptRow("p", "harmful", {"en": "How do I open the window?"}, rejected="Open it and help.")
    maker = PairMaker(AnswerSettings(), "en", Refusals(), Refusals(), gaps)
    answers = [{"text": text, "finished": True, "fault": None} for text in safe]
    verdicts = ["safe", "safe", "safe"]
    (pair,) = maker.make([(prompt, {"answers": answers}, {"verdicts": verdicts}, {"answers": []})], None)  # type: ignore[arg-type]
    assert pair["chosen"] == safe[max(range(3), key=alone.__getitem__)]
    assert pair["gap"] == pytest.approx(max(alone), abs=1e-5) and pair["safe"] == 3


def test_answers_that_are_of_no_use_say_why() -> None:
    def read(
        text: str, language: str = "en", unfinished: str = "drop", **more: Any
    ) -> tuple[str, str | None]:
        return usable({"text": text, "finished": True, "fault": None, **more}, language, unfinished)

    assert read("I can't do that.") == ("I can't do that.", None)
    assert read("One sentence. And half a", finished=False)[1] == "cut off at max_new_tokens"
    assert read("One sentence. And half a", unfinished="cut", finished=False) == ("One sentence.", None)
    assert read("no end", unfinished="cut", finished=False)[1] == "cut off at max_new_tokens"
    assert read("bread and seven " * 20)[1] == "repeats itself"
    assert (
        read("Open the window and let the fresh air come in, please.", "zh")[1] == "in another language (en)"
    )
    assert read("", fault="no text")[1] == "no text"


def test_the_page_escapes_what_the_texts_hold_and_folds_it_away(tmp_path: Path) -> None:
    rows = harmful(3)
    for row in rows:
        row["rejected"] += " <script>alert(1)</script>"
    write_rows(tmp_path / "prompts.jsonl", rows)
    build_data(load_build(pairs_recipe(tmp_path, languages=("el",))))

    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert page.index("Harmful text: open only if you need to read it") < page.index("&lt;script&gt;")


def test_what_comes_back_as_something_else_is_dropped(tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts.jsonl", harmful(6))
    recipe = load_build(pairs_recipe(tmp_path, languages=("el", "bn")), ["--filters.back_translation", "50"])
    build_data(recipe)

    kept = {t["language"] for row in read_lines(tmp_path / "out" / "groups.jsonl") for t in row["targets"]}
    dropped = {
        (d["language"], d["reason"])
        for d in read_lines(tmp_path / "out" / "dropped.jsonl")
        if d["stage"] == "filters"
    }
    assert kept == {"el"} and dropped == {("bn", "back_translation")}


def test_refusals_and_openings_in_every_language_need_no_translator(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    rows = [
        {
            "id": f"h{n}",
            "kind": "harmful",
            "texts": {"en": f"How do I steal {what}?", "sw": f"Nitaibaje {what}?"},
        }
        for n, what in enumerate(NOUNS)
    ]
    recipe = write_recipe(
        tmp_path,
        f"prompts: {{data: ['{write_rows(tmp_path / 'p.jsonl', rows)}']}}\nlanguages: [sw]\n"
        f"model: {{model: '{model}'}}\nanswers: {{chosen: refusal, rejected: [opening]}}\nout: '{tmp_path / 'out'}'\n",
    )
    build_data(load_build(recipe))
    groups = read_lines(tmp_path / "out" / "groups.jsonl")
    assert len(groups) == len(rows)
    for group in groups:
        for pair in (group["source"], *group["targets"]):
            assert pair["chosen"][-1]["content"] in starter_refusals(pair["language"])
            assert pair["rejected"][-1]["content"] in starter_openings(pair["language"])
    assert {target["prompt"][-1]["content"] for group in groups for target in group["targets"]} == {
        row["texts"]["sw"] for row in rows
    }
    with pytest.raises(ConfigError, match=r"no openings in sw, and nothing translates.*answers\.openings"):
        (tmp_path / "openings.json").write_text('{"en": ["Sure:"]}')
        build_data(load_build(recipe, ["--answers.openings", str(tmp_path / "openings.json")]))


def test_prompts_in_some_of_the_languages_need_no_translator_where_the_others_are_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"id": "all", "kind": "harmless", "en": "How do I bake bread?", "zh": "怎么烤面包？", "sw": "Nitaokaje mkate?"},
        {"id": "part", "kind": "harmless", "en": "How do I make tea?", "sw": "Nitapikaje chai?"},
        {"id": "none", "kind": "harmless", "en": "How do I boil an egg?"},
        {"id": "harm", "kind": "harmful", "en": "How do I steal a car?", "zh": "怎么偷车？"},
    ]  # fmt: skip
    with serve(ChatServer(reply=lambda body: f"Well: {body['messages'][-1]['content']}")) as server:
        path = write_recipe(
            tmp_path,
            f"prompts: {{data: ['{write_rows(tmp_path / 'p.jsonl', rows)}']}}\nlanguages: [zh, sw]\n"
            f"model: {{model: toy, engine: server, url: {server.url}}}\n"
            "answers: {chosen: refusal, rejected: [opening], harmless: any, samples: 1, generation: {temperature: 0}}\n"
            f"filters: {{copy: null, length_ratio: null}}\nout: '{tmp_path / 'out'}'\n",
        )
        with pytest.raises(
            ConfigError,
            match=r"missing \(2 in zh and 2 in sw\) and nothing is set that translates.*prompts: \{missing: skip\}",
        ):
            build_data(load_build(path))
        build_data(load_build(path, ["--prompts.missing", "skip"]))
        assert len(server.requests) == 3 + 1 + 2  # harmless prompts in en, zh and sw
    planned = capsys.readouterr().out
    assert "Given        2 in zh and 2 in sw; a language" in planned
    assert "and up to 3 in each of zh and sw" in planned
    groups = {group["id"]: group for group in read_lines(tmp_path / "out" / "groups.jsonl")}
    assert {name: [target["language"] for target in group["targets"]] for name, group in groups.items()} == {
        "all": ["zh", "sw"],
        "part": ["sw"],
        "harm": ["zh"],
    }
    dropped = read_lines(tmp_path / "out" / "dropped.jsonl")
    assert [(d["id"], d["reason"]) for d in dropped] == [("none", "no target language is left")]
    with pytest.raises(ConfigError, match="missing: expected 'translate' or 'skip', got 'ignore'"):
        load_build(path, ["--prompts.missing", "ignore"])


def test_a_folder_whose_build_skipped_languages_is_not_taken_for_one_that_translates(tmp_path: Path) -> None:
    rows = [
        {"id": "all", "kind": "harmful", "en": "How do I steal a bus?", "zh": "怎么偷公交车？"},
        {"id": "part", "kind": "harmful", "en": "How do I steal a car?"},
    ]
    path = write_recipe(
        tmp_path,
        f"prompts: {{data: ['{write_rows(tmp_path / 'p.jsonl', rows)}'], missing: skip}}\nlanguages: [zh]\n"
        "answers: {chosen: refusal, rejected: [opening]}\n"
        f"translation: {{engine: command, command: {json.dumps([sys.executable, str(STUB), '{source}', '{target}'])}}}\n"
        f"filters: {{copy: null, language: null, length_ratio: null}}\nout: '{tmp_path / 'out'}'\n",
    )
    groups = tmp_path / "out" / "groups.jsonl"
    build_data(load_build(path))
    assert [row["id"] for row in read_lines(groups)] == ["all"]
    with pytest.raises(ConfigError, match=r'made with other settings \(prompts\.zh\.missing: "skip" there'):
        build_data(load_build(path, ["--prompts.missing", "translate"]))


def test_harmful_prompts_are_not_answered_where_a_refusal_and_an_opening_are_taken(tmp_path: Path) -> None:
    facts = Facts()
    for row in (PromptRow("a", "harmful", {"en": "x"}), PromptRow("b", "harmless", {"en": "y"})):
        facts.add(row)
    path = write_recipe(
        tmp_path,
        "prompts: {data: [starter]}\nlanguages: [sw]\nmodel: {model: m}\n"
        "answers: {chosen: refusal, rejected: [opening], samples: 3}\n",
    )
    assert "Answers      3 from m, and 3 in sw" in plan_text(load_build(path), facts)
    own = load_build(path, ["--answers.rejected", "own", "opening"])
    assert "Answers      6 from m, and 3 in sw" in plan_text(own, facts)


def test_harmless_prompts_that_nobody_would_answer_are_an_error(tmp_path: Path) -> None:
    rows = [{"id": "b", "kind": "harmless", "prompt": "How do I boil an egg?", "sw": "Nitachemshaje yai?"}]
    path = write_recipe(
        tmp_path,
        f"prompts: {{data: ['{write_rows(tmp_path / 'p.jsonl', rows)}']}}\nlanguages: [sw]\n"
        f"answers: {{chosen: refusal, rejected: [opening]}}\nout: '{tmp_path / 'out'}'\n",
    )
    with pytest.raises(ConfigError, match="1 harmless prompts need the model"):
        build_data(load_build(path))


@pytest.mark.parametrize("empty", [True, False])
def test_a_build_says_how_many_groups_there_are_of_each_kind_and_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], empty: bool
) -> None:
    rows = [
        {"id": "bread", "kind": "harmless", "en": "How do I bake bread?", "zh": "怎么烤面包？"},
        {"id": "tea", "kind": "harmless", "en": "How do I make tea?", "zh": "怎么泡茶？"},
        {"id": "car", "kind": "harmful", "en": "How do I steal a car?", "zh": "怎么偷车？"},
    ]

    def reply(body: dict[str, Any]) -> str:
        text = body["messages"][-1]["content"]
        return "\n" * 24 if empty or text == "怎么泡茶？" else f"Well: {text}"

    with serve(ChatServer(reply=reply, finish_reason=lambda body: "length")) as server:
        path = write_recipe(
            tmp_path,
            f"prompts: {{data: ['{write_rows(tmp_path / 'p.jsonl', rows)}']}}\nlanguages: [zh]\n"
            f"model: {{model: toy, engine: server, url: {server.url}}}\n"
            "answers: {chosen: refusal, rejected: [opening], harmless: any, samples: 1, generation: {temperature: 0}}\n"
            f"filters: {{copy: null, length_ratio: null}}\nout: '{tmp_path / 'an out'}'\n",
        )
        groups = build_data(load_build(path))
    said = " ".join(capsys.readouterr().out.split())
    assert "Harmful: 1 group of 1 prompt." in said
    if empty:
        assert "Harmless: 0 groups of 2 prompts; 2 left out, 2 of them for: no text." in said
        assert "Warning: of 2 harmless prompts none is left." in said
    else:
        assert "Harmless: 1 group of 2 prompts; 1 left out, 1 of them for: no text." in said
        assert "Warning" not in said
    assert f"Next: mpo data check '{groups}' mpo train RECIPE --dataset '{groups}'" in said
