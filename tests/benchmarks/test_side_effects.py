"""The way from public prompts to the page of a comparison: nothing is in two parts, and all recipes hold."""

from __future__ import annotations

import csv
import json
import random
import sys
from collections.abc import Sequence
from math import exp
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from benchmarks import side_effects
from mpo.building.starter import everyday_rows, starter_rows
from mpo.errors import ConfigError, DataError
from mpo.hidden_space.recipe import load_analysis_recipe
from mpo.hidden_space.texts import load_texts
from mpo.jobs.compare.recipe import load_comparison
from tests.tiny import random_groups, save_tiny


@pytest.fixture
def multijail(tmp_path: Path) -> Path:
    draw = random.Random(0)

    def words() -> str:
        return " ".join("".join(draw.choices("abcdefghijklmnopqrst", k=7)) for _ in range(8))

    rows = [{"id": str(n), **{code: words() for code in side_effects.LANGUAGES}} for n in range(315)]
    return side_effects.write_table(tmp_path / "MultiJail.csv", rows, side_effects.LANGUAGES)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["side_effects", *words])
    side_effects.main()


def read(path: Path) -> set[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return {row["en"] for row in csv.DictReader(file)}


def test_no_prompt_is_in_two_parts_and_all_recipes_are_checked(
    multijail: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny("llama", tmp_path / "model")
    out = tmp_path / "out"
    words = ["--model", str(model), "--multijail", str(multijail), "--out", str(out), "--cpu", "--dry_run"]
    for part in ("tune", "test"):
        run(monkeypatch, *words, "--part", part)
        load_comparison(out / f"compare-{part}.yaml")
        space = load_analysis_recipe(out / f"hidden_space-{part}.yaml")
        texts = load_texts(space.data, space.languages)
        assert (sum(texts.harmful), len(texts.texts)) == {"tune": (180, 264), "test": (288, 564)}[part]
        suite = yaml.safe_load((out / f"suite-{part}.yaml").read_text(encoding="utf-8"))
        assert set(suite["over_refusal"]) == {"harmless", "looks-harmful"}
        assert {"tune": "70", "test": "100"}[part] + " harmful and 479 harmless" in capsys.readouterr().out
    prompts = out / "prompts"
    attacked = {part: read(prompts / f"attack-{part}.csv") for part in ("tune", "test")}
    assert [len(attacked[part]) for part in ("tune", "test")] == [30, 48]
    own = {row.texts["en"] for row in (*starter_rows(), *everyday_rows())}
    trained = {part: read(prompts / f"train-{part}.csv") | own for part in ("tune", "test")}
    assert trained["test"] == trained["tune"] | attacked["tune"]
    harmless = {
        part: read(prompts / f"harmless-{part}.csv") | read(prompts / f"looks-harmful-{part}.csv")
        for part in ("tune", "test")
    }
    assert [len(harmless[part]) for part in ("tune", "test")] == [14, 46]
    parts = [trained["tune"], *attacked.values(), *harmless.values()]
    assert sum(map(len, parts)) == len(set().union(*parts))


def save_polyrefuse(folder: Path) -> Path:
    """Harmless prompts as PolyRefuse has them: English alone in ``instruction``, a translation beside it in test files."""
    folder.mkdir()
    for part, count, codes in (("train", 200, ("en", "ko", "ar", "ja")), ("test", 500, ("en", "de", "ar"))):
        for code in codes:
            rows: list[dict[str, str | None]] = []
            for n in range(count):
                text = f"Please describe item number {n} of the {part} list in {code}"
                translated = part == "test" and code != "en"
                rows.append({"instruction": "English" if translated else text, "category": None})
                if translated:
                    rows[-1]["instruction_translated"] = text
            (folder / f"harmless_{part}_{code}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def test_harmless_prompts_of_polyrefuse_are_trained_on_and_others_measured(
    multijail: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = save_tiny("llama", tmp_path / "model"), save_polyrefuse(tmp_path / "polyrefuse")
    out = tmp_path / "out"
    words = ["--model", str(model), "--multijail", str(multijail), "--out", str(out), "--cpu", "--dry_run"]
    for part in ("tune", "test"):
        run(monkeypatch, *words, "--part", part, "--polyrefuse", str(folder))
        suite = yaml.safe_load((out / f"suite-{part}.yaml").read_text(encoding="utf-8"))
        assert set(suite["over_refusal"]) == {"harmless", "looks-harmful", "polyrefuse"}
    assert "100 harmful and 679 harmless" in capsys.readouterr().out
    trained, tune, test = (
        read(out / "prompts" / f"polyrefuse-{name}.csv") for name in ("train", "tune", "test")
    )
    assert [len(trained), len(tune), len(test)] == [200, 30, 48]
    assert not trained & tune and not tune & test and not trained & test
    header, first, *_ = (out / "prompts" / "polyrefuse-test.csv").read_text(encoding="utf-8").splitlines()
    assert header == "id,en,ar,de" and "test list in ar" in first and "English" not in first
    (folder / "harmless_train_ko.json").write_text("[]", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"numbers of prompts: en 200, ko 0, ar 200, ja 200. Expected English"
    ):
        run(monkeypatch, *words, "--polyrefuse", str(folder))
    (folder / "harmless_train_ko.json").write_text('[{"text": 1}]', encoding="utf-8")
    with pytest.raises(DataError, match=r"is no file of PolyRefuse"):
        run(monkeypatch, *words, "--polyrefuse", str(folder))


def test_prompts_of_pairs_are_trained_on_where_they_are_refused(
    multijail: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same prompt in two files is one; languages that are not trained, pairs that are answered and several turns are left out."""
    model, out = save_tiny("llama", tmp_path / "model"), tmp_path / "out"
    rows = [{**row, "origin": None} for row in random_groups(3, 12, (2, 2), ("bn", "ja"))]
    for n, row in enumerate(rows):
        if n % 3 == 0:
            row["source"]["chosen"][0]["content"] = "I cannot help with that."
    rows[9]["source"]["prompt"][:0] = [{"role": role, "content": "Hello."} for role in ("user", "assistant")]
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for file, kept in zip(files, (rows[:9], rows[6:]), strict=True):
        file.write_text(json.dumps(kept), encoding="utf-8")
    words = ["--model", str(model), "--multijail", str(multijail), "--out", str(out), "--cpu", "--dry_run"]
    run(monkeypatch, *words, "--pairs", *map(str, files))
    printed = capsys.readouterr().out
    assert "103 harmful and 479 harmless" in printed
    assert "479 in zh" not in printed and "579 in zh" in printed and "582 in bn" in printed
    refused = {row["source"]["prompt"][0]["content"] for row in rows[:9:3]}
    assert read(out / "prompts" / "pairs-train.csv") == refused
    header = (out / "prompts" / "pairs-train.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "id,en,zh,ko,ar,bn,sw"


def test_the_published_objective_can_run_beside_it(
    multijail: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the recipe sets for its own data has no meaning for the published pairs, and is refused if it stays."""
    out, model = tmp_path / "out", save_tiny("llama", tmp_path / "model")
    rows = [{**row, "origin": None} for row in random_groups(3, 12, (1, 2), ("bn", "sw"))]
    paper = tmp_path / "paper.json"
    paper.write_text(json.dumps(rows), encoding="utf-8")
    built = out / "data-test" / "groups.jsonl"
    built.parent.mkdir(parents=True)
    kinds = [{**row, "kind": "harmless" if n % 2 else "harmful"} for n, row in enumerate(rows)]
    built.write_text("".join(f"{json.dumps(row)}\n" for row in kinds), encoding="utf-8")
    words = ["--model", str(model), "--multijail", str(multijail), "--out", str(out), "--cpu", "--dry_run"]
    run(
        monkeypatch,
        *words,
        "--paper",
        str(paper),
        "--gap",
        str(paper),
        "--dtype",
        "float32",
        "--ways",
        *side_effects.WAYS,
    )
    suite = yaml.safe_load((out / "suite-test.yaml").read_text(encoding="utf-8"))
    assert suite["reward_gap"]["data"] == [str(paper)] and suite["models"]["base"]["dtype"] == "float32"
    printed = capsys.readouterr().out
    assert all(f"{name}-s0" in printed for name in ("mpo", *side_effects.WAYS))
    remedy = yaml.safe_load(side_effects.RECIPE.read_text(encoding="utf-8"))
    of_any = {
        "model_name_or_path",
        "use_peft",
        "lora_r",
        "lora_alpha",
        "lora_target_modules",
        "dataset",
        "source_language",
        "held_out",
        "max_length",
        "lr_scheduler_type",
        "warmup_steps",
        "per_device_train_batch_size",
        "bf16",
        "dtype",
        "seed",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "output_dir",
        "harmless_max_response_length",
        "harmless_retain_weight",
    }
    assert set(remedy) - of_any <= set(
        side_effects.PAPER
    )  # what is left of the remedy would be measured as the paper's way


@pytest.mark.parametrize(
    "given", ["harmless=a.csv", "polyrefuse=a.csv", "looks-harmful=a.csv", "a.csv", "more="]
)
def test_a_set_needs_a_name_of_its_own(
    given: str, multijail: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"`--harmless {given}` should be NAME=FILE, with another name than harmless, looks",
    ):
        run(
            monkeypatch,
            "--model",
            "m",
            "--multijail",
            str(multijail),
            "--out",
            str(tmp_path),
            "--harmless",
            given,
        )


def test_another_table_than_multijail_is_refused(
    multijail: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = multijail.read_text(encoding="utf-8").splitlines()
    multijail.write_text("\n".join(lines[:60]), encoding="utf-8")
    with pytest.raises(DataError, match=r"has 59 rows.*Expected MultiJail"):
        run(monkeypatch, "--model", "m", "--multijail", str(multijail), "--out", str(tmp_path / "o"))
    with pytest.raises(DataError, match="cannot be read"):
        run(
            monkeypatch, "--model", "m", "--multijail", str(tmp_path / "no.csv"), "--out", str(tmp_path / "o")
        )


def test_the_table_of_effects_has_means_over_seeds_and_changes_of_the_trained_languages() -> None:
    draw = random.Random(3)
    codes = (*side_effects.LANGUAGES, *side_effects.UNTRAINED)
    sets = {
        ("attack", "multijail"): codes[:6],
        ("over_refusal", "a"): codes,
        ("over_refusal", "b"): ("en", "de"),
    }

    def model() -> Any:
        def shares(languages: Sequence[str]) -> dict[str, dict[str, float]]:
            return {code: {str(n): float(draw.random() < 0.5) for n in range(9)} for code in languages}

        safety = {
            key: SimpleNamespace(outcomes=shares(of).copy, in_language_asked=shares(of))
            for key, of in sets.items()
        }
        nats = {code: [draw.uniform(1, 9) for _ in range(4)] for code in codes}
        texts = {
            code: SimpleNamespace(nats_per_text=found, tokens=11, perplexity=exp(sum(found) / 11))
            for code, found in nats.items()
        }
        source = SimpleNamespace(gap=draw.uniform(-1, 1))
        return SimpleNamespace(
            safety=safety,
            perplexity=SimpleNamespace(languages=texts),
            reward_gap=SimpleNamespace(source=source),
        )

    base, *seeds = (model() for _ in range(3))
    table = side_effects.effects("t", base, seeds)
    assert table.header == ("", "multijail", "a", "b", "all harmless", "in the language asked", "perplexity")

    def percent(models: Sequence[Any], key: tuple[str, str], code: str) -> float:
        return 100 * mean(mean(m.safety[key].outcomes()[code].values()) for m in models)

    for row, code in zip(table.rows, codes, strict=False):
        cells = [
            f"{percent([base], key, code):.1f} -> {percent(seeds, key, code):.1f}" if code in of else ""
            for key, of in sets.items()
        ]
        every = [
            100 * mean(x for key in list(sets)[1:] for x in m.safety[key].outcomes().get(code, {}).values())
            for m in (base, *seeds)
        ]
        cells.append(f"{every[0]:.1f} -> {mean(every[1:]):.1f}")
        asked = [
            100
            * mean(
                x for key in list(sets)[1:] for x in m.safety[key].in_language_asked.get(code, {}).values()
            )
            for m in (base, *seeds)
        ]
        nats = [sum(m.perplexity.languages[code].nats_per_text) / 11 for m in (base, *seeds)]
        more = 100 * (exp(mean(nats[1:]) - nats[0]) - 1)
        assert row == (code, *cells, f"{asked[0]:.1f} -> {mean(asked[1:]):.1f}", f"{more:+.1f} %")
    before, after = (mean(percent(m, ("attack", "multijail"), c) for c in codes[:6]) for m in ([base], seeds))
    assert table.rows[-1][1].startswith(f"{before:.1f} -> {after:.1f} ({after - before:+.1f} [")
    each = [mean(percent([m], ("attack", "multijail"), c) for c in codes[:6]) for m in seeds]
    assert table.notes[0] == f"multijail, each seed: {each[0]:.1f}, {each[1]:.1f}"
    gap = [f"{m.reward_gap.source.gap:+.3f}" for m in (base, *seeds)]
    assert table.notes[-1] == f"reward gap in en, before and each seed: {gap[0]}; {gap[1]}, {gap[2]}"
