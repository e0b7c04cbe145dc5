"""What the dry run finds in the data and the model before weights are loaded."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoTokenizer

from mpo.data import load_groups
from mpo.errors import ConfigError, DataError, ModelError
from mpo.jobs.preflight import make_plan
from mpo.jobs.preflight.data import shared_sources
from mpo.training.recipe import Recipe, load_recipe
from tests.data.rows import flat
from tests.tiny import random_groups, save_tiny


def test_a_prompt_in_another_unicode_form_counts_as_shared() -> None:
    prompts = [f"Où est le café numéro {number}?" for number in range(4)]
    train = load_groups([flat("bn", source_prompt=prompt) for prompt in prompts]).groups
    other = [unicodedata.normalize("NFD", prompt) for prompt in prompts[:3]] + ["Où est le thé?"]
    assert (
        shared_sources(train, load_groups([flat("ko", source_prompt=prompt) for prompt in other]).groups) == 3
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def make(tmp_path: Path, model: Path) -> Callable[..., Recipe]:
    rows = random_groups(7, 8, (2, 3), ("bn", "sw"))
    (tmp_path / "pairs.json").write_text(
        json.dumps([{**row, "origin": None} for row in rows]), encoding="utf-8"
    )

    def made(**settings: Any) -> Recipe:
        values = {
            "model_name_or_path": str(model),
            "dataset": str(tmp_path / "pairs.json"),
            "max_steps": 2,
            "bf16": False,
            "use_cpu": True,
            "output_dir": str(tmp_path / "out"),
            **settings,
        }
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
        return load_recipe(tmp_path / "r.yaml")

    return made


def changed(model: Path, folder: Path, **settings: Any) -> str:
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return str(folder)


def test_a_token_that_was_added_to_the_tokenizer_only_is_refused(
    make: Callable[..., Recipe], model: Path, tmp_path: Path
) -> None:
    make_plan(make())
    folder = changed(model, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == AutoConfig.from_pretrained(folder).vocab_size
    tokenizer.add_tokens(["<last>"])
    tokenizer.save_pretrained(folder)
    rows = [flat("bn", number=n) for n in range(6)]
    data = tmp_path / "new.json"
    for place in ("source_prompt", "target_rejected"):
        data.write_text(json.dumps([*rows, flat("bn", number=7, **{place: "An end <last> of it"})]))
        with pytest.raises(ModelError, match=r"gives token \d+ \('<last>'\), but the model's embedding has"):
            make_plan(make(model_name_or_path=folder, dataset=str(data), held_out=1))


def test_texts_beyond_the_positions_of_the_model_are_refused(
    make: Callable[..., Recipe], model: Path, tmp_path: Path
) -> None:
    folder = changed(model, tmp_path / "short", max_position_embeddings=24)
    with pytest.raises(ModelError, match=r"more than the model's 24 positions.*max_length: 24"):
        make_plan(make(model_name_or_path=folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": -1},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"num_hidden_layers": 0},
        {"vocab_size": -5},
    ],
)
def test_a_configuration_with_impossible_sizes_is_refused(
    make: Callable[..., Recipe], model: Path, tmp_path: Path, settings: dict[str, int]
) -> None:
    with pytest.raises(ModelError, match="configuration of"):
        make_plan(make(model_name_or_path=changed(model, tmp_path / "odd", **settings)))


def test_a_metric_of_a_language_that_is_not_measured_is_refused(make: Callable[..., Recipe]) -> None:
    with pytest.raises(ConfigError, match="no target language 'de'; it has bn, sw"):
        make_plan(make(metric_for_best_model="eval_reward_gap/de", held_out=4))


def test_an_upload_that_cannot_happen_is_refused(
    make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked_at(recipe: Recipe) -> str:
        return make_plan(recipe, on_this_machine=False).to_text()

    recipe = make(push_to_hub=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="the Hub is switched off"):
        make_plan(recipe)
    assert "Note: `push_to_hub` is on, but the Hub is switched off" in looked_at(recipe)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("mpo.jobs.preflight.packages.get_token", lambda: None)
    with pytest.raises(ConfigError, match="not signed in"):
        make_plan(recipe)
    assert "Note: `push_to_hub` is on, but this machine is not signed in" in looked_at(recipe)
    monkeypatch.setattr("mpo.jobs.preflight.packages.get_token", lambda: "t")
    assert "Note: `push_to_hub`" not in looked_at(recipe)
    assert "Upload              org/name, once the run is complete" in looked_at(
        make(push_to_hub=True, hub_model_id="org/name")
    )


def test_untranslated_answers_are_left_out_where_the_recipe_says_so(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    rows = [flat("bn", number=n) for n in range(6)]
    rows.append(flat("bn", number=6, target_chosen=rows[0]["source_chosen"].replace("0", "6")))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    recipe = {"dataset": str(tmp_path / "p.json"), "held_out": 1}
    assert make_plan(make(**recipe)).dropped == []
    dropped = make_plan(make(drop_untranslated=True, **recipe)).dropped
    assert [(bad.row, bad.field) for bad in dropped] == [(6, "chosen")]


def test_evaluation_prompts_in_the_training_data_are_counted_and_named(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    plan = make_plan(make(), on_this_machine=False)
    assert (
        plan.leaks is not None and plan.leaks.prompts == {"probe": 100} and plan.leaks.rows == len(plan.train)
    )
    assert "Leaks" not in plan.facts and "stand in the training data" not in plan.to_text()
    prompts = [group["source"]["prompt"][0]["content"] for group in plan.train.select([0, 3])]
    rows = [
        {"id": f"p{number}", "en": text, "sw": "Kwa nini?"}
        for number, text in enumerate([*prompts, "Why is it so?"])
    ]
    (tmp_path / "prompts.json").write_text(json.dumps(rows), encoding="utf-8")
    plan = make_plan(make(leak_against=["prompts.json"]), on_this_machine=False)
    assert plan.leaks is not None and set(plan.leaks.found("prompts")) >= {"p0", "p1"}
    number = len(plan.leaks.found("prompts"))
    assert plan.facts["Leaks"] == f"{number} of 3 prompts of prompts, 0 of 100 of probe"
    assert f"{number} of 3 prompts of prompts stand in the training data" in plan.to_text()
    with pytest.raises(DataError, match="leak_against"):
        make_plan(make(leak_against=["none.json"]), on_this_machine=False)


@pytest.mark.parametrize("swahili", [0, 1, 3, 5])
def test_a_language_that_is_shown_with_refusals_alone_is_named(
    make: Callable[..., Recipe], tmp_path: Path, swahili: int
) -> None:
    rows = random_groups(7, 10, (2, 3), ("bn", "sw"))
    for number, row in enumerate(rows):
        row["kind"] = "harmful" if number % 2 else "harmless"
        if row["kind"] == "harmless":  # five groups
            languages = ("bn", "sw") if number // 2 < swahili else ("bn",)
            row["targets"] = [{**row["targets"][0], "language": language} for language in languages]
        else:
            row["targets"] = [{**row["targets"][0], "language": language} for language in ("bn", "sw")]
    path = tmp_path / "kinds.json"
    path.write_text(json.dumps([{**row, "origin": None} for row in rows]), encoding="utf-8")
    notes = [
        note for note in make_plan(make(dataset=str(path), held_out=0)).notes if "refusals alone" in note
    ]
    assert [note.partition(" has ")[0] for note in notes] == (["Swahili"] if swahili < 2 else [])
    if notes:
        assert f"5 harmful pairs and {swahili or 'no'} harmless" in notes[0]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"loss_type": "sft", "max_response_length": 4}, True),
        ({"loss_type": "sft", "max_response_length": 400}, False),
        ({"loss_type": "sft"}, False),
        ({"loss_type": "mpo", "max_response_length": 4}, False),
    ],
)
def test_refusals_that_are_taught_in_halves_are_named(
    make: Callable[..., Recipe], tmp_path: Path, settings: dict[str, Any], told: bool
) -> None:
    rows = random_groups(5, 6, (2, 3), ("bn", "sw"), words=(1, 2))
    for number, row in enumerate(rows):
        row["kind"] = "harmful" if number % 2 else "harmless"
        row["targets"] = [{**row["targets"][0], "language": language} for language in ("bn", "sw")]
        for pair in [row["source"], *row["targets"]]:
            if pair["language"] == "bn" or row["kind"] == "harmless":
                pair["chosen"] = [{"role": "assistant", "content": "a refusal of very many words " * 3}]
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{**row, "origin": None} for row in rows]), encoding="utf-8")
    made = make_plan(make(dataset=str(path), held_out=0, **settings), on_this_machine=False)
    notes = [note for note in made.notes if "cuts chosen responses" in note]
    assert len(notes) == told and all("100% in Bengali" in note and "`sft`" in note for note in notes)


@pytest.mark.parametrize(
    ("settings", "objective"),
    [
        ({}, "sigmoid"),
        ({"harmless_loss_type": "sft", "harmless_retention": "hidden"}, "sft"),
        ({"harmless_loss_type": "none", "harmless_retention": "hidden"}, None),
        ({"harmless_loss_type": "sft", "harmless_loss_weight": 0}, None),
        ({"harmless_train_on": "source"}, None),
    ],
)
def test_refusals_of_harmless_prompts_that_would_be_taught_are_counted(
    make: Callable[..., Recipe], tmp_path: Path, settings: dict[str, Any], objective: str | None
) -> None:
    rows = random_groups(5, 6, (2, 2), ("bn", "sw"))
    refusals = {"bn": "দুঃখিত, আমি এতে সাহায্য করতে পারি না।", "sw": "I'm sorry, but I can't help with that."}
    for number, row in enumerate(rows):
        row["kind"] = "harmful" if number % 2 else "harmless"
        row["targets"] = [{**row["targets"][0], "language": language} for language in refusals]
        for target in row["targets"]:
            refuses = row["kind"] == "harmful" or (number, target["language"]) in {
                (0, "bn"),
                (2, "bn"),
                (4, "sw"),
            }
            answer = refusals[target["language"]] if refuses else "Boil the rice for twelve minutes."
            target["chosen"] = [{"role": "assistant", "content": answer}]
    path = tmp_path / "refused.json"
    path.write_text(json.dumps([{**row, "origin": None} for row in rows]), encoding="utf-8")
    made = make_plan(make(dataset=str(path), held_out=0, **settings), on_this_machine=False)
    notes = [note for note in made.notes if "harmless prompts refuse" in note]
    assert len(notes) == (objective is not None)
    for note in notes:
        assert note.startswith("2 in Bengali and 1 in Swahili of the chosen responses")
        assert f"`harmless_loss_type: {objective}`" in note


@pytest.mark.parametrize(
    ("held", "settings", "named"),
    [
        ("I apologize, but I can't do that.", {"harmless_retention": "states"}, True),
        ("I cannot do that.", {"harmless_retention": "states"}, True),
        ("I'm sorry, but that will not do.", {"harmless_retention": "states"}, False),
        ("Boil the rice.", {"harmless_retention": "states"}, False),
        ("I apologize, but I can't do that.", {"harmless_retention": "hidden"}, False),
        ("I apologize, but I can't do that.", {}, False),
    ],
)
def test_refusals_that_are_held_along_and_are_not_the_taught_ones_are_named(
    make: Callable[..., Recipe], tmp_path: Path, held: str, settings: dict[str, Any], named: bool
) -> None:
    rows = random_groups(5, 6, (2, 2), ("bn", "sw"))
    for number, row in enumerate(rows):
        harmful = number % 2 == 1
        row["kind"] = "harmful" if harmful else "harmless"
        row["targets"] = [{**row["targets"][0], "language": language} for language in ("bn", "sw")]
        for target in row["targets"]:
            own = "I'm sorry, but that I can't do." if harmful else held
            if target["language"] == "bn":
                own = "I can't help with that."
            target["chosen" if harmful else "rejected"] = [{"role": "assistant", "content": own}]
    path = tmp_path / "held.json"
    path.write_text(json.dumps([{**row, "origin": None} for row in rows]), encoding="utf-8")
    made = make_plan(make(dataset=str(path), held_out=0, **settings), on_this_machine=False)
    notes = [note for note in made.notes if "in other words than" in note]
    assert len(notes) == named and all(note.startswith("in Swahili the rejected") for note in notes)


@pytest.mark.parametrize(("objective", "accepted"), [("none", True), ("sigmoid", False)])
def test_an_answer_that_begins_as_the_refusal_does_can_be_held_and_not_preferred(
    make: Callable[..., Recipe], tmp_path: Path, objective: str, accepted: bool
) -> None:
    rows = random_groups(5, 6, (2, 2), ("bn", "sw"))
    same = "river bread " * 20
    for number, row in enumerate(rows):
        row["kind"] = "harmful" if number % 2 else "harmless"
    for part in ("chosen", "rejected"):
        rows[0]["targets"][0][part] = [{"role": "assistant", "content": same + part}]
    path = tmp_path / "alike.json"
    path.write_text(json.dumps([{**row, "origin": None} for row in rows]), encoding="utf-8")
    recipe = make(
        dataset=str(path), held_out=0, harmless_max_response_length=6,
        harmless_loss_type=objective, harmless_retention="states",
    )  # fmt: skip
    if not accepted:
        with pytest.raises(DataError, match="equal to chosen after the cut to 6 tokens"):
            make_plan(recipe, on_this_machine=False)
        return
    made = make_plan(recipe, on_this_machine=False)
    assert sum(made.languages.values()) == sum(len(row["targets"]) for row in rows)


@pytest.mark.parametrize(
    ("settings", "accepted"),
    [
        ({"harmless_loss_type": "none", "harmless_retention": "reverse_kl"}, False),
        ({"harmless_loss_type": "sft", "harmless_loss_weight": 0}, False),
        ({"harmless_loss_type": "gap_retention"}, False),
        ({"harmless_loss_type": "sft"}, True),
    ],
)
def test_harmless_groups_alone_that_are_only_held_would_teach_nothing(
    make: Callable[..., Recipe], tmp_path: Path, settings: dict[str, Any], accepted: bool
) -> None:
    rows = [{**row, "kind": "harmless", "origin": None} for row in random_groups(5, 4, (1, 2), ("bn", "sw"))]
    path = tmp_path / "harmless.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    recipe = make(dataset=str(path), held_out=0, **settings)
    if accepted:
        assert make_plan(recipe, on_this_machine=False).work.harmless is not None
        return
    with pytest.raises(DataError, match="all 4 groups are harmless"):
        make_plan(recipe, on_this_machine=False)


def test_sources_that_are_labelled_with_another_language_than_the_dominant_one_are_refused(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    rows = [{**row, "origin": None} for row in random_groups(5, 4, (1, 2), ("bn", "sw"))]
    for row in rows:
        row["source"]["language"] = "zh"
    path = tmp_path / "chinese.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(DataError, match="labelled as Chinese, but `source_language` is 'en'"):
        make_plan(make(dataset=str(path)), on_this_machine=False)
    assert make_plan(make(dataset=str(path), source_language="zh"), on_this_machine=False).languages
    rows[0]["source"]["language"] = "en"
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert make_plan(make(dataset=str(path)), on_this_machine=False).languages
