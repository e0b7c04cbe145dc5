"""What ``mpo train`` says of what its model does: last on the screen, first on the card, and all of it in files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpo.errors import ConfigError, StorageError
from mpo.evaluation.answers import AnswerRow
from mpo.evaluation.probe.ask import Questions
from mpo.jobs.preflight import make_plan
from mpo.jobs.train import train
from mpo.report.card import write_merged_card
from mpo.training.recipe import Recipe, load_recipe
from mpo.training.trainer import MPOTrainer
from tests.evaluation.probe.said import is_safe, refuses
from tests.tiny import random_groups, save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(tmp_path: Path, model: Path):
    rows = random_groups(7, 5, (2, 2), ("bn", "sw"), words=(1, 4))
    for row in rows:
        row.pop("origin")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def _make(**settings: Any) -> Recipe:
        values = {
            "model_name_or_path": str(model),
            "dataset": str(tmp_path / "pairs.jsonl"),
            "held_out": 2,
            "max_steps": 2,
            "use_peft": True,
            "lora_r": 4,
            "learning_rate": 2e-3,
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "probe_max_new_tokens": 4,
            "reference_cache_dir": str(tmp_path / "cache"),
            "output_dir": str(tmp_path / "out"),
            **settings,
        }
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
        return load_recipe(tmp_path / "r.yaml")

    return _make


@pytest.fixture
def learns_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that can tell harm from harmless at the start, and refuse everything from the first step on."""

    def ask(self: Questions, prompts: Any, title: str | None = None) -> list[AnswerRow]:
        says = refuses if self.policy.has_moved else is_safe
        return [AnswerRow(p.id, p.prompt_id, p.language, p.text, says(p), True) for p in prompts]

    monkeypatch.setattr(Questions, "ask", ask)


def first_line(card: Path) -> str:
    lines = card.read_text(encoding="utf-8").split("\n---\n", 1)[1].splitlines()
    return next(line for line in lines if line.strip() and not line.startswith("# "))


def test_who_refuses_harmless_prompts_reads_it_last_on_the_screen_and_first_on_the_card(
    make, learns_to_refuse: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(make())
    printed = capsys.readouterr().out.strip().splitlines()
    sentence = (
        "Warning: this model refuses harmless prompts (0 -> 100 %, mean of 3 languages; English 0 -> 100 %; Bengali 0 -> 100 %; "
        "Swahili 0 -> 100 %)."
    )
    assert printed[-1] == sentence
    assert first_line(out / "README.md") == f"**{sentence.replace('->', '→')}**"
    gap, table = (
        next(n for n, line in enumerate(printed) if line.startswith(title))
        for title in ("Reward gap per language", "What the model does, before -> after")
    )
    assert gap < table < printed.index(f"Written to {out}:")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| Swahili | 0 → 0 \\[-16, +16\\] | 0 → 100 \\[+82, +100\\] |" in card
    assert "It was not measured whether" not in card


def test_all_that_was_measured_is_in_the_files_of_the_run(make, learns_to_refuse: None) -> None:
    pytest.importorskip("matplotlib")
    out = train(make(probe_steps=1))
    metrics = json.loads((out / "metrics.json").read_text())["behavior"]
    assert metrics["finding"]["level"] == "warning"
    assert metrics["before"]["harmless_refused"]["languages"]["sw"]["rate"] == 0
    assert metrics["after"]["harmless_refused"]["languages"]["sw"]["rate"] == 1
    assert metrics["after"]["balanced"] == 0 and metrics["before"]["balanced"] == 1
    change = metrics["change"]["harmless_refused"]["languages"]["sw"]
    assert change["change"] == 1 and change["count"] == 40
    assert change["p_value"] < 1e-6
    answers = [json.loads(line) for line in (out / "probe_answers.jsonl").read_text("utf-8").splitlines()]
    assert len(answers) == 3 * 60
    assert {row["after"]["verdict"] for row in answers} == {"safe", "refusal"}
    assert all(row["prompt"] and row["before"]["answer"] for row in answers)
    assert (out / "behavior.png").read_bytes().startswith(b"\x89PNG")
    assert load_recipe(out / "recipe.yaml").training.probe_steps == 1


@pytest.mark.parametrize("settings", [{}, {"probe_steps": 1, "stop_on_over_refusal": 10.0}])
def test_the_card_of_the_merged_model_opens_with_it_too(
    make, learns_to_refuse: None, tmp_path: Path, settings: dict[str, Any]
) -> None:
    out = train(make(**settings))
    assert ("The run was stopped early" in first_line(out / "README.md")) is bool(settings)
    (tmp_path / "merged").mkdir()
    adapter = json.loads((out / "adapter_config.json").read_text())
    card = write_merged_card(
        tmp_path / "merged", adapter=out, base_model="a/b", adapter_settings=adapter, name="merged"
    )
    assert card is not None
    assert first_line(card) == first_line(out / "README.md")
    assert "0 → 100" in card.read_text(encoding="utf-8")
    assert (tmp_path / "merged" / "behavior.png").is_file()


def test_a_real_answer_is_asked_for_and_the_run_ends_in_a_sentence(
    make, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(make(behavior_probe=1))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(
        "Too few answers to judge this model by (fewest in a language: 2 harmless, 1 harmful): "
    )
    assert json.loads((out / "metrics.json").read_text())["behavior"]["prompts"]["max_new_tokens"] == 4


def test_a_probe_that_fails_costs_nothing_but_itself(
    make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(self: Questions, prompts: Any, title: str | None = None) -> list[AnswerRow]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Questions, "ask", ask)
    out = train(make())
    sentence = (
        "It could not be measured what this model does: the probe failed (RuntimeError: out of memory)."
    )
    assert capsys.readouterr().out.strip().splitlines()[-1] == sentence
    assert first_line(out / "README.md") == f"**{sentence}**"
    assert (out / "adapter_model.safetensors").is_file()
    assert "behavior" not in json.loads((out / "metrics.json").read_text())
    assert not (out / "probe_answers.jsonl").exists()


def test_what_is_trained_and_not_asked_is_named_last_and_on_the_card(
    make, learns_to_refuse: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(make(probe_languages=["en", "ko"]))
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith(" Not asked: Bengali and Swahili.")
    assert first_line(out / "README.md").endswith(" Not asked: Bengali and Swahili.**")
    assert "\nNot asked: Bengali and Swahili.\n" in (out / "README.md").read_text(encoding="utf-8")
    metrics = json.loads((out / "metrics.json").read_text())["behavior"]
    assert metrics["left_out"] == ["bn", "sw"]


def test_a_run_that_cannot_ask_in_any_of_its_languages_says_so_last_and_on_the_card(
    make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make(source_language="jv")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        re.sub(r'"(en|bn|sw)"', lambda m: {"en": '"jv"', "bn": '"it"', "sw": '"pl"'}[m[1]], pairs.read_text())
    )
    out = train(recipe)
    sentence = (
        "It was not measured what this model does: the probe set has no prompts in Javanese, Italian and Polish. "
        "`probe_languages: [en]`, for example, asks in another language."
    )
    assert capsys.readouterr().out.strip().splitlines()[-1] == sentence
    assert first_line(out / "README.md").startswith(
        "**It was not measured what this model does: the probe set has"
    )


def test_an_upload_that_fails_does_not_hide_what_was_found(
    make, learns_to_refuse: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make()
    save = MPOTrainer.save_model

    def save_and_ask_for_an_upload(self: MPOTrainer, *arguments: Any) -> None:
        save(self, *arguments)
        self.args.push_to_hub = True  # only now, or the library would make a repository

    def fails(*arguments: Any) -> None:
        raise StorageError("the upload failed")

    monkeypatch.setattr(MPOTrainer, "save_model", save_and_ask_for_an_upload)
    monkeypatch.setattr("mpo.jobs.train._push", fails)
    with pytest.raises(StorageError, match="the upload failed"):
        train(recipe)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("Warning: this model refuses harmless prompts")


def test_a_run_that_asks_nothing_says_on_its_card_that_it_did_not(
    make, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(make(behavior_probe=0))
    assert "mpo merge" in capsys.readouterr().out.strip().splitlines()[-1]
    assert first_line(out / "README.md").startswith("**It was not measured what this model does")
    assert not (out / "probe_answers.jsonl").exists()


def test_a_run_that_the_probe_stops_says_so_last(
    make, learns_to_refuse: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(make(probe_steps=1, stop_on_over_refusal=10.0, max_steps=4))
    assert (
        capsys.readouterr()
        .out.strip()
        .splitlines()[-1]
        .endswith(
            "The run was stopped early: harmless prompts refused rose from 0 % to 100 % in the mean over languages."
        )
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 1 and metrics["behavior"]["stopped"]


def test_the_plan_says_what_will_be_asked_and_where_it_cannot_be(make, tmp_path: Path) -> None:
    plan = make_plan(make(max_steps=10, probe_steps=0.5, behavior_probe=2))
    assert plan.facts["Probe"] == (
        "18 prompts (2 harmful and 4 harmless ones in each of 3 languages) before and after and every 5 steps, up to 288 new "
        "tokens"
    )
    assert make_plan(make(behavior_probe=0)).facts["Probe"] == "nothing is asked"
    text = (tmp_path / "pairs.jsonl").read_text().replace('"sw"', '"jv"')
    (tmp_path / "javanese.jsonl").write_text(text)
    plan = make_plan(make(dataset=str(tmp_path / "javanese.jsonl")))
    assert any("the probe asks nothing in Javanese" in note for note in plan.notes)
    plan = make_plan(make(probe_languages=["en"]))
    assert any("the probe asks nothing in Bengali and Swahili" in note for note in plan.notes)
    with pytest.raises(ConfigError, match="probe_languages"):
        make_plan(make(probe_languages=["jv"]))


def test_a_plan_that_could_ask_nothing_refuses_what_needs_answers(make, tmp_path: Path) -> None:
    text = (tmp_path / "pairs.jsonl").read_text().replace('"bn"', '"su"').replace('"sw"', '"jv"')
    (tmp_path / "unknown.jsonl").write_text(text.replace('"en"', '"tl"'))
    settings = {"dataset": str(tmp_path / "unknown.jsonl"), "source_language": "tl"}
    assert make_plan(make(**settings)).probe is None
    with pytest.raises(ConfigError, match="`stop_on_over_refusal` need answers to the probe prompts"):
        make_plan(make(**settings, probe_steps=1, stop_on_over_refusal=10.0))
