from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import time
from collections import Counter, namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from mpo.cli import app as cli
from mpo.data import load_groups
from mpo.errors import (
    ConfigError,
    DataError,
    DependencyError,
    ModelError,
    MPOError,
    StorageError,
    TrainingError,
)
from mpo.evaluation import summarize
from mpo.evaluation.engines import ModelChoice
from mpo.jobs.measure import measure_reward_gap
from mpo.jobs.preflight import Plan, make_plan
from mpo.jobs.preflight.folder import disk_space
from mpo.jobs.train import _explaining, _placement, _write_start, how_to_resume, train
from mpo.modeling.identity import fingerprint_folder
from mpo.training.checkpoints import mark_complete
from mpo.training.recipe import Recipe, load_recipe
from mpo.training.trainer import MPOTrainer
from tests import processes
from tests.tiny import build_tokenizer, random_groups, save_tiny

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "learning_rate": 2e-3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, folder / family) for family in ("llama", "gemma2", "qwen2")}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = random_groups(7, 10, (2, 3), ("bn", "sw", "zh"))
    for row in rows:
        row.pop("origin")
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make(tmp_path: Path, models: dict[str, Path], pairs: Path):
    def _make(*overrides: str, family: str = "llama", **settings: Any) -> Recipe:
        values = {
            "model_name_or_path": str(models[family]),
            "dataset": str(pairs),
            "held_out": 3,
            "max_steps": 2,
            "max_length": 128,
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "behavior_probe": 0,  # has tests of its own
            "reference_cache_dir": str(tmp_path / "cache"),
            "output_dir": str(tmp_path / "out"),
            **settings,
        }
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value != "unset"}))
        return load_recipe(path, overrides)

    return _make


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes loading of any weights a failure: what is tested must be found before."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded before the check")

    monkeypatch.setattr("mpo.modeling.opening.load_model", refuse)
    monkeypatch.setattr("trl.trainer.utils.create_model_from_path", refuse)


# --------------------------------------------------------------------------------------------- before time is spent


def refused(recipe: Recipe, kind: type[MPOError], message: str) -> None:
    with pytest.raises(kind, match=message):
        train(recipe)


def test_an_output_folder_that_is_a_file_or_cannot_be_made_is_refused(
    make, no_weights: None, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    refused(make(output_dir=str(tmp_path / "file")), StorageError, "is a file")
    refused(make(output_dir=str(tmp_path / "file" / "below")), StorageError, "cannot be written")
    refused(make(output_dir="/proc/mpo"), StorageError, "cannot be written")


def test_a_model_that_the_run_needs_is_not_replaced_by_its_result(
    make, no_weights: None, tmp_path: Path
) -> None:
    recipe = make()
    model = str(recipe.model.model_name_or_path)
    files = {path: path.read_bytes() for path in Path(model).iterdir()}
    refused(
        make(output_dir=model), StorageError, "that of `model_name_or_path`.*Choose another with `output_dir`"
    )
    (tmp_path / "other").mkdir()
    for key in ("adapter_name_or_path", "reference_model_name_or_path"):
        refused(make(output_dir=str(tmp_path / "other"), **{key: str(tmp_path / "other")}), StorageError, key)
    assert {path: path.read_bytes() for path in Path(model).iterdir()} == files


def test_files_that_no_run_wrote_are_not_replaced(make, no_weights: None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("my own")
    refused(make(output_dir=str(tmp_path)), StorageError, r"holds files that no run wrote \(README.md,")
    assert (tmp_path / "README.md").read_text() == "my own"
    (tmp_path / "provenance.json").write_text("{}")  # it is the folder of an earlier run
    make_plan(make(output_dir=str(tmp_path)))


def test_a_disk_that_is_too_small_is_refused_with_the_numbers(
    make, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    refused(
        make(save_strategy="steps", save_steps=1),
        StorageError,
        r"has 1 kB free, and this run may need .*2 checkpoints",
    )


def test_the_disk_estimate_covers_what_a_run_writes(make, tmp_path: Path) -> None:
    recipe = make(save_strategy="steps", save_steps=1)
    plan = make_plan(recipe)
    estimate = disk_space(plan)
    train(recipe)
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    checkpoint = sum(
        (tmp_path / "out" / "checkpoint-2" / name).stat().st_size
        for name in ("model.safetensors", "optimizer.pt")
    )
    assert estimate.weights == pytest.approx(weights, rel=0.1)
    assert estimate.checkpoint == pytest.approx(checkpoint, rel=0.1)
    assert estimate.kept == len(list((tmp_path / "out").glob("checkpoint-*")))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 6},
        {"max_steps": 3},
        {"max_steps": "unset", "num_train_epochs": 1.5},
        {"max_steps": 7, "save_strategy": "steps", "save_steps": 0.3},
    ],
    ids=str,
)
def test_as_many_checkpoints_are_expected_as_are_written(
    make, tmp_path: Path, settings: dict[str, Any]
) -> None:
    recipe = make(**{"save_strategy": "epoch", "held_out": 0, "per_device_train_batch_size": 5, **settings})
    kept = disk_space(make_plan(recipe)).kept
    train(recipe)
    assert kept == len(list((tmp_path / "out").glob("checkpoint-*")))


def test_the_checkpoints_of_an_earlier_run_are_not_overwritten(
    make, no_weights: None, tmp_path: Path
) -> None:
    from mpo.training.checkpoints import mark_complete

    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)
    mark_complete(tmp_path / "out" / "checkpoint-7", {})
    with pytest.raises(StorageError, match="checkpoint-7") as caught:
        train(make("--beta", "2"))
    recipe = str(tmp_path / "r.yaml")
    assert f"mpo train {recipe} --beta 2 --resume_from_checkpoint auto" in str(caught.value)
    assert f"mpo train {recipe} --beta 2 --output_dir {tmp_path / 'out-2'}" in str(caught.value)
    refused(make(resume_from_checkpoint="nowhere"), ConfigError, "not a folder.*checkpoint-7")


def test_a_model_that_cannot_be_used_is_refused(
    make, no_weights: None, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(models["llama"], tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    refused(make(model_name_or_path=str(folder)), ModelError, "no chat template")
    (folder / "tokenizer.json").unlink()
    refused(make(model_name_or_path=str(folder)), ModelError, "no tokenizer")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(make(model_name_or_path=str(folder)), ModelError, "pickle")
    refused(make(model_name_or_path="org/no-such-model"), ModelError, "org/no-such-model")
    refused(make(reference_model_name_or_path="org/no-such-reference"), ModelError, "org/no-such-reference")


def test_data_that_cannot_be_used_are_refused(make, no_weights: None, tmp_path: Path) -> None:
    refused(make(dataset="none.jsonl"), DataError, r"none.jsonl: there is no such file \(looked in ")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"source": 1}\n')
    refused(make(dataset=str(bad)), DataError, "bad.jsonl, row 0")
    refused(make(max_length=6), DataError, "leaves no room for a response")
    refused(make(held_out=10), ConfigError, "leave nothing to train on")


def test_adapter_modules_that_do_not_exist_are_named_with_those_that_do(make, no_weights: None) -> None:
    refused(
        make(**LORA, lora_target_modules=["query"]),
        ModelError,
        r"is query; .*linear layers are down_proj, gate_proj",
    )
    refused(make(**LORA, lora_modules_to_save=["lm_head"]), ConfigError, "lm_head")


@pytest.mark.parametrize(("first", "untouched"), [(0.5, 1), (1, 1), (0, 0)])
@pytest.mark.parametrize("modules", [{}, {"lora_target_modules": ["q_proj", "down_proj"]}])
def test_an_adapter_begins_at_the_layer_that_the_recipe_names(
    make, first: float, untouched: int, modules: dict[str, Any], tmp_path: Path
) -> None:
    recipe = make(**LORA, lora_first_layer=first, max_steps=1, **modules)
    weights = load_file(train(recipe) / "adapter_model.safetensors")
    layers = {int(name.split("layers.")[1].split(".")[0]) for name in weights}
    assert layers == {*range(untouched, 2)}
    assert not any("lm_head" in name or "embed" in name for name in weights)
    names = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in weights}
    linear = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    assert names == {*modules.get("lora_target_modules", linear)}
    # Gone on with, it stays as it is.
    again = {
        "adapter_name_or_path": str(recipe.training.output_dir),
        "output_dir": str(tmp_path / "again"),
        "reference_cache_dir": str(tmp_path / "again"),
    }
    make_plan(make(**again, lora_first_layer=first))
    with pytest.raises(ConfigError, match=r"`lora_first_layer` is .*, but the adapter .* cannot be changed"):
        make_plan(make(**again, lora_first_layer=1 - untouched))


def test_a_layer_that_the_model_has_not_is_refused_without_loading_weights(make, no_weights: None) -> None:
    refused(make(**LORA, lora_first_layer=2), ConfigError, "has 2 layers, counted from 0")


def installed(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    for module in ("mpo.jobs.preflight", "mpo.jobs.preflight.packages", "mpo.training.compute"):
        monkeypatch.setattr(f"{module}.is_installed", answer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"load_in_4bit": True, **LORA},
            "`load_in_4bit` needs the package bitsandbytes.*pip install bitsandbytes",
        ),
        ({"load_in_8bit": True, **LORA}, "bitsandbytes"),
        ({"optim": "adamw_bnb_8bit"}, "`optim: adamw_bnb_8bit` needs the package bitsandbytes"),
        ({"optim": "paged_adamw_32bit"}, "needs the package bitsandbytes"),
        ({"optim": "lion_8bit"}, "needs the package bitsandbytes"),
        ({"optim": "adamw_torch_8bit"}, "needs the package torchao"),
        ({"use_liger_kernel": True}, r"needs the package liger-kernel.*mpo-align\[liger\]"),
        ({"report_to": ["wandb"]}, "`report_to` names wandb, but wandb is not installed.*pip install wandb"),
        ({"report_to": ["trackio"]}, "trackio"),
    ],
)
def test_a_missing_optional_package_is_named_with_its_installation(
    make, no_weights: None, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    recipe = make(**settings)
    installed(monkeypatch, lambda module: module == "matplotlib")
    refused(recipe, DependencyError, message)


def test_a_tracker_that_nobody_knows_is_refused_before_anything_is_loaded(make, no_weights: None) -> None:
    refused(
        make(report_to=["wandbb"]),
        ConfigError,
        "`report_to` names 'wandbb'; expected none, all, or some of .*wandb",
    )


def test_quantisation_without_a_gpu_is_refused(
    make, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, lambda module: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(make(load_in_4bit=True, **LORA), DependencyError, "needs bitsandbytes with a GPU")
    refused(make(optim="paged_adamw_8bit"), DependencyError, "needs bitsandbytes with a GPU")
    refused(make(use_liger_kernel=True), DependencyError, "needs liger-kernel with a GPU")
    make_plan(make(optim="paged_adamw_8bit"), on_this_machine=False)  # a plan may be for another machine


def test_deepspeed_of_the_launcher_is_required(
    make, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make()
    installed(monkeypatch, lambda module: False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    refused(recipe, DependencyError, "deepspeed")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_full_fine_tuning_of_half_precision_weights_is_refused(make, no_weights: None, dtype: str) -> None:
    refused(make(dtype=dtype, learning_rate=4e-7), ConfigError, f"as {dtype} .*4e-07 .* updates would vanish")


def test_half_precision_that_the_checkpoint_brings_along_is_refused_too(
    make, no_weights: None, tmp_path: Path
) -> None:
    half = save_tiny("llama", tmp_path / "half", dtype=torch.bfloat16)
    refused(make(model_name_or_path=str(half), dtype="auto"), ConfigError, "updates would vanish")
    assert make_plan(make(model_name_or_path=str(half))).recipe.model.dtype == "float32"


def test_the_frozen_base_of_an_adapter_takes_the_type_of_the_computation(make) -> None:
    assert make_plan(make(bf16=True, **LORA)).recipe.model.dtype == "bfloat16"
    assert make_plan(make(bf16=True)).recipe.model.dtype == "float32"
    assert make_plan(make(**LORA)).recipe.model.dtype == "float32"


def test_a_setting_this_machine_cannot_honour_stops_a_run_but_not_a_plan(make, no_weights: None) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    recipe = make(bf16=True, use_cpu=False)
    refused(recipe, ConfigError, "no accelerator with bf16")
    plan = make_plan(recipe, on_this_machine=False)
    assert any("bf16" in note for note in plan.notes)
    assert plan.facts["Precision"].startswith("bf16")


def test_an_adapter_to_go_on_from_must_agree_with_the_recipe(
    make, no_weights: None, models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_adapter(models["llama"], tmp_path / "adapter")
    refused(
        make(adapter_name_or_path=str(adapter), lora_r=8),
        ConfigError,
        r"`lora_r` is 8, but the adapter .* has 4",
    )
    refused(make(adapter_name_or_path=str(models["llama"])), ModelError, "no adapter folder")


# ------------------------------------------------------------------------------------------------------------ the plan


def save_adapter(model: Path, folder: Path) -> Path:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
@pytest.mark.parametrize("settings", [{}, LORA, {**LORA, "use_dora": True}], ids=["full", "lora", "dora"])
def test_the_plan_counts_the_weights_that_are_trained(
    make, models: dict[str, Path], family: str, settings: dict[str, Any]
) -> None:
    plan = make_plan(make(family=family, **settings))
    model = AutoModelForCausalLM.from_pretrained(models[family])
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    if settings:
        config = LoraConfig(
            r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=settings.get("use_dora", False)
        )
        model = get_peft_model(model, config)
    assert plan.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_plan_counts_pairs_and_tokens_as_a_person_would(
    make, models: dict[str, Path], pairs: Path
) -> None:
    plan = make_plan(make())
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])

    def ids(messages: list[dict], generation: bool = False) -> int:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    trees = padded = count = 0
    for row in plan.train:
        lengths = []
        for pair in (row["source"], *row["targets"]):
            prompt = ids(pair["prompt"], True)
            chosen, rejected = (
                min(128, ids([*pair["prompt"], *pair[side]])) for side in ("chosen", "rejected")
            )
            trees += chosen + rejected - prompt
            lengths.append(max(chosen, rejected))
        for length in lengths[1:]:
            count += 1
            padded += 2 * 8 * (math.ceil(length / 8) + math.ceil(lengths[0] / 8))
    assert plan.facts["Tokens per epoch"].startswith(
        f"{trees:,} as trees; padded pair by pair, as in the official code, {padded:,} "
    )
    assert f"{len(plan.train)} groups, {count} pairs" in plan.facts["Data"]
    languages = Counter(target["language"] for row in plan.train for target in row["targets"])
    assert plan.facts["Pairs per language"] == (
        f"Chinese {languages['zh']}, Bengali {languages['bn']}, Swahili {languages['sw']}"
    )
    assert plan.held_out is not None and len(plan.held_out) == 3
    held = sum(len(row["targets"]) for row in plan.held_out)
    assert plan.facts["Held out"] == f"3 sources, {held} pairs (by source)"


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 3},
        {"max_steps": "unset", "num_train_epochs": 1.5},
        {"max_steps": "unset", "num_train_epochs": 1, "gradient_accumulation_steps": 3},
        {"max_steps": "unset", "num_train_epochs": 1, "per_device_train_batch_size": 3},
        {"max_steps": "unset", "num_train_epochs": 1, "group_by_source": False},
        {
            "max_steps": "unset",
            "num_train_epochs": 1,
            "per_device_train_batch_size": 3,
            "dataloader_drop_last": True,
        },
    ],
)
def test_the_planned_steps_are_the_steps_that_are_run(make, tmp_path: Path, settings: dict[str, Any]) -> None:
    recipe = make(held_out=0, **{**LORA, **settings})
    planned = make_plan(recipe).steps
    train(recipe)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"] == planned


# ------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_a_run_leaves_the_adapter_its_measurements_and_its_card(
    make, models: dict[str, Path], family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    base = (models[family] / "model.safetensors").read_bytes()
    recipe = make(family=family, report_to="tensorboard", max_steps=4, **LORA)
    out = train(recipe)
    assert (models[family] / "model.safetensors").read_bytes() == base

    tensors = load_file(out / "adapter_model.safetensors")
    assert tensors and all("lora_" in name for name in tensors)
    assert any(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    for name in (
        "README.md",
        "recipe.yaml",
        "provenance.json",
        "metrics.json",
        "tokenizer.json",
        "leaks.json",
    ):
        assert (out / name).stat().st_size > 0
    for name in ("training_curve.png", "reward_gap.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("*.bin"))
    assert list(out.rglob("events.out.tfevents*"))

    again = load_recipe(out / "recipe.yaml")
    assert (again.training.learning_rate, again.model.lora_r) == (2e-3, 4)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["held_out_groups"] == 3
    assert metrics["retention_loss"]["before"] == pytest.approx(0, abs=1e-9)
    assert metrics["retention_loss"]["after"] > 0
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card and "2505.16869" in card and "2504.02708" in card
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["data_fingerprint"] == load_groups(recipe.data.dataset).fingerprint
    assert provenance["libraries"]["torch"]

    printed = capsys.readouterr().out
    assert "before -> after" in printed and "README.md" in printed
    assert f"Ask it:      mpo chat {out} --compare\n" in printed and f"mpo merge {out} --out" in printed
    assert "{'" not in printed


def test_the_numbers_of_a_run_are_those_of_the_evaluation_command(
    make, models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = make(max_steps=4, **LORA)
    out = train(recipe)
    held_out = make_plan(make(output_dir=str(tmp_path / "other"), **LORA)).held_out
    assert held_out is not None
    rows = [json.dumps({"source": row["source"], "targets": row["targets"]}) for row in held_out]
    (tmp_path / "held.jsonl").write_text("\n".join(rows))
    comparison = measure_reward_gap(
        str(tmp_path / "held.jsonl"), ModelChoice(str(models["llama"]), str(out)), max_length=128
    )
    metrics = json.loads((out / "metrics.json").read_text())
    for when in ("before", "after"):
        table = getattr(comparison, when)
        for row in table.targets:
            assert row.gap == pytest.approx(metrics[when]["targets"][row.language]["gap"], abs=1e-5)
            assert row.reference_gap == pytest.approx(
                metrics[when]["targets"][row.language]["reference_gap"], abs=1e-5
            )
    assert any(
        abs(metrics["after"]["targets"][code]["gap"] - metrics["before"]["targets"][code]["gap"]) > 1e-3
        for code in metrics["after"]["targets"]
    )


@pytest.fixture
def own_template(tmp_path: Path) -> dict[str, Any]:
    """Settings of a run with a chat template of its own, and an argument of it that its models were not told to have."""
    file = tmp_path / "template.jinja"
    file.write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}{% if quiet %}, quietly{% endif %}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant{% if quiet %}, quietly{% endif %}] {% endif %}"
    )
    return {"chat_template": str(file), "chat_template_kwargs": {"quiet": True}}


@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole model"])
def test_what_was_trained_with_a_template_of_its_own_is_measured_with_it(
    make, models: dict[str, Path], own_template: dict[str, Any], tmp_path: Path, whole: bool
) -> None:
    out = train(make(max_steps=4, **own_template, **({"learning_rate": 2e-3} if whole else LORA)))
    held_out = make_plan(make(output_dir=str(tmp_path / "other"))).held_out
    assert held_out is not None
    rows = [json.dumps({"source": row["source"], "targets": row["targets"]}) for row in held_out]
    (tmp_path / "held.jsonl").write_text("\n".join(rows))

    def measure(**settings: Any) -> dict[str, float]:
        names = [out] if whole else [models["llama"], out]
        model = ModelChoice(*map(str, names), **settings)
        found = measure_reward_gap(str(tmp_path / "held.jsonl"), model, max_length=128)
        return {row.language: row.gap for row in getattr(found, "after", found).targets}

    metrics = json.loads((out / "metrics.json").read_text())
    trained = {code: row["gap"] for code, row in metrics["after"]["targets"].items()}
    assert measure() == pytest.approx(trained, abs=1e-5)
    assert measure(**own_template) == pytest.approx(trained, abs=1e-5)
    for other in ({"chat_template_kwargs": {}}, {"chat_template": build_tokenizer("llama").chat_template}):
        assert measure(**other) != pytest.approx(trained, abs=1e-3)


def test_training_goes_on_with_the_template_of_the_adapter(
    make, own_template: dict[str, Any], tmp_path: Path
) -> None:
    first = train(make(max_steps=1, output_dir=str(tmp_path / "first"), **own_template, **LORA))
    more = {"use_peft": True, "adapter_name_or_path": str(first)}
    plain = build_tokenizer("llama").chat_template
    for name, settings, template, kwargs in (
        ("second", {}, Path(own_template["chat_template"]).read_text(), {"quiet": True}),
        ("third", {"chat_template": plain, "chat_template_kwargs": {}}, plain, {}),
    ):
        out = train(make(max_steps=1, output_dir=str(tmp_path / name), **more, **settings))
        assert AutoTokenizer.from_pretrained(out).chat_template == template
        assert load_recipe(out / "recipe.yaml").training.chat_template_kwargs == kwargs


def test_a_run_records_its_base_and_going_on_from_another_is_said(
    make, models: dict[str, Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(models["llama"], tmp_path / "base"))
    first = train(make(model_name_or_path=str(base), output_dir=str(tmp_path / "first"), **LORA))
    recorded = json.loads((first / "provenance.json").read_text())["base_model_weights"]
    assert recorded == fingerprint_folder(models["llama"])
    more = {"use_peft": True, "adapter_name_or_path": str(first)}
    assert not any("was trained on" in note for note in make_plan(make(**more)).notes)
    save_tiny("llama", base, seed=1)
    (note,) = (
        n for n in make_plan(make(model_name_or_path=str(base), **more)).notes if "was trained on" in n
    )
    assert f"The adapter {first} was trained on {base}, whose weights have changed since" in note


def test_a_full_fine_tuning_run_leaves_a_whole_model(make, models: dict[str, Path]) -> None:
    out = train(make(learning_rate=1e-3))
    assert not (out / "adapter_config.json").exists()
    trained = AutoModelForCausalLM.from_pretrained(out).state_dict()
    before = AutoModelForCausalLM.from_pretrained(models["llama"]).state_dict()
    assert any(not torch.equal(trained[name], before[name]) for name in before)


def test_training_goes_on_from_an_existing_adapter(make, models: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(models["llama"], tmp_path / "adapter")
    recipe = make(adapter_name_or_path=str(adapter), learning_rate=2e-3)
    plan = make_plan(recipe)
    out = train(recipe)
    start, end = (
        load_file(adapter / "adapter_model.safetensors"),
        load_file(out / "adapter_model.safetensors"),
    )
    assert start.keys() == end.keys()
    moved = [(end[name] - start[name]).norm() / start[name].norm() for name in start]
    assert all(distance < 0.5 for distance in moved) and max(moved) > 1e-4
    # The reference is the adapter at its start, so before training the source's gap is the reference gap.
    before = json.loads((out / "metrics.json").read_text())["before"]
    assert before["source"]["gap"] == pytest.approx(before["reference_gap"], abs=1e-5)
    assert plan.peft_config is None and plan.trainable == sum(tensor.numel() for tensor in start.values())


def test_an_explicit_reference_supplies_the_source_gaps(
    make, models: dict[str, Path], tmp_path: Path
) -> None:
    other = save_tiny("llama", tmp_path / "other", seed=5)
    held = make_plan(make(**LORA)).held_out
    out = train(make(reference_model_name_or_path=str(other), **LORA))
    before = json.loads((out / "metrics.json").read_text())["before"]
    from mpo.training.scoring import score_groups

    scores = score_groups(
        AutoModelForCausalLM.from_pretrained(other),
        held,
        AutoTokenizer.from_pretrained(other),
        max_length=128,
    )
    assert before["reference_gap"] == pytest.approx(
        summarize(scores.records, beta=1.0).reference_gap, abs=1e-5
    )
    assert before["source"]["gap"] != pytest.approx(before["reference_gap"], abs=1e-3)


def test_a_run_is_measured_within_and_ends_with_the_same_bits(
    make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[dict[str, Any]]] = []
    monkeypatch.setattr(
        "mpo.report.plots.training_curve", lambda history, path, **named: drawn.append(list(history))
    )
    often, never = (
        train(make(max_steps=4, held_out_measurements=n, output_dir=str(tmp_path / str(n)), **LORA))
        for n in (3, 0)
    )
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (often, never))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    tables = [json.loads((folder / "metrics.json").read_text()) for folder in (often, never)]
    assert tables[0]["before"] == tables[1]["before"] and tables[0]["after"] == tables[1]["after"]
    steps = [{log["step"] for log in history if "eval_reward_gap/en" in log} for history in drawn]
    assert steps == [{0, 1, 2, 3, 4}, {0, 4}]
    ends = {log["step"]: log["eval_reward_gap/en"] for log in drawn[0] if "eval_reward_gap/en" in log}
    assert ends[0] == tables[0]["before"]["source"]["gap"]
    said = capsys.readouterr()
    assert "Measured" in said.out and "in between" in said.out
    assert "held-out loss" in said.err and "gap en" in said.err


def test_a_run_says_how_many_sources_it_left_out(
    make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make(output_dir=str(tmp_path / "all"), held_out=0, **LORA))
    assert "left" not in capsys.readouterr().out
    out = train(make(min_source_gap=0.0, held_out=0, **LORA))
    sources = json.loads((out / "metrics.json").read_text())["sources"]
    assert 0 < sources["dropped"] < sources["sources"]
    said = f"; `min_source_gap: 0` left {sources['dropped']} of {sources['sources']} sources out\n"
    assert said in capsys.readouterr().out


def test_another_data_set_may_be_measured_on(make, pairs: Path, tmp_path: Path) -> None:
    lines = pairs.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "eval.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    recipe = make(eval_dataset=str(tmp_path / "eval.jsonl"), held_out="unset", **LORA)
    plan = make_plan(recipe)
    assert len(plan.train) == 10
    assert any("4 of the prompts of `eval_dataset` are also trained on" in note for note in plan.notes)
    out = train(recipe)
    assert json.loads((out / "metrics.json").read_text())["held_out_groups"] == 4


def test_a_run_that_holds_nothing_out_measures_nothing_and_says_so(
    make, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(make(held_out=0, **LORA))
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["held_out_groups"] == 0 and "before" not in metrics
    said = capsys.readouterr().out
    assert ("nothing is held out and nothing is asked" in said) == (metrics.get("behavior") is None)
    assert not (out / "reward_gap.png").exists()


def test_a_run_goes_on_from_its_last_complete_checkpoint(
    make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(make(max_steps=4, output_dir=str(tmp_path / "whole"), **LORA))
    train(make(max_steps=4, save_strategy="steps", save_steps=2, **LORA))
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    assert "Going on from" not in capsys.readouterr().out
    resumed = train(
        make(max_steps=4, save_strategy="steps", save_steps=2, resume_from_checkpoint="auto", **LORA)
    )
    assert f"Going on from {tmp_path / 'out' / 'checkpoint-2'}" in capsys.readouterr().out
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dropped_rows_are_counted_and_listed(make, pairs: Path, tmp_path: Path) -> None:
    bad = tmp_path / "some_bad.jsonl"
    bad.write_text(pairs.read_text(encoding="utf-8") + '{"source": 1}\n', encoding="utf-8")
    out = train(make(dataset=str(bad), bad_rows="drop", **LORA))
    dropped = json.loads((out / "dropped_rows.json").read_text())["dropped"]
    assert [row["row"] for row in dropped] == [10]
    assert json.loads((out / "provenance.json").read_text())["dropped_rows"] == 1


def test_a_rank_that_is_not_the_main_one_writes_prints_and_uploads_nothing(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make(**LORA)
    monkeypatch.setattr(type(recipe.training), "process_index", 1)
    uploads = []
    monkeypatch.setattr("mpo.jobs.train._push", lambda *arguments: uploads.append(arguments))
    save = MPOTrainer.save_model

    def save_and_ask_for_an_upload(self: MPOTrainer, *arguments: Any) -> None:
        save(self, *arguments)
        self.args.push_to_hub = True  # only now, or the library would make a repository

    monkeypatch.setattr(MPOTrainer, "save_model", save_and_ask_for_an_upload)
    out = train(recipe)
    assert recipe.training.push_to_hub
    assert not uploads
    assert not [path for path in out.rglob("*") if path.is_file()]
    assert capsys.readouterr().out == ""


def test_no_token_is_in_anything_a_run_leaves(
    make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secrets = {"HF_TOKEN": "hf_" + "Zz9" * 9, "WANDB_API_KEY": "0a1b2c3d" * 5}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    recipe = make(report_to="tensorboard", **LORA)
    recipe.training.hub_token = secrets["HF_TOKEN"]
    out = train(recipe)
    captured = capsys.readouterr()
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    for value in secrets.values():
        assert value.encode() not in written
        assert value not in captured.out + captured.err


# -------------------------------------------------------------------------------------------------------------- errors


def explained(plan: Plan, error: Exception) -> str:
    with pytest.raises(MPOError) as caught, _explaining(plan):
        raise error
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("end", ["\n", "\r", "\x85", "\u2028", "\u2029"])
def test_a_line_break_in_the_output_folder_stays_in_the_comment(end: str, tmp_path: Path) -> None:
    folder = tmp_path / f"a{end}learning_rate: 9 #"
    training = SimpleNamespace(output_dir=str(folder))
    plan: Any = SimpleNamespace(recipe=SimpleNamespace(training=training), dropped=[], leaks=None)
    _write_start(plan, "beta: 1\n", {})
    assert yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")) == {"beta": 1}


def test_want_of_memory_and_disk_is_explained(make, tmp_path: Path) -> None:
    from mpo.training.checkpoints import mark_complete

    plan = make_plan(make(**LORA))
    text = explained(plan, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"))
    assert (
        text.startswith("TrainingError: The GPU is out of memory")
        and "`gradient_checkpointing: true`" in text
    )
    assert "`load_in_4bit: true`" in text
    # Shorter rows need less memory where a mask as long as they are is made, which `tree` attention has none of.
    for settings, advised in (
        ({"attn_implementation": "sdpa"}, True),
        ({"attn_implementation": "tree"}, False),
        ({"attn_implementation": "sdpa", "batch_layout": "padded"}, False),
    ):
        told = explained(make_plan(make(**LORA, **settings)), torch.OutOfMemoryError("CUDA out of memory"))
        assert ("`max_tokens_per_row`" in told) == advised
    text = explained(plan, OSError(errno.ENOSPC, "No space left on device"))
    assert text.startswith("StorageError") and "begin anew, since no checkpoint is complete" in text
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    mark_complete(tmp_path / "out" / "checkpoint-3", {})
    text = explained(plan, OSError(errno.ENOSPC, "No space left on device"))
    assert (
        "last complete checkpoint, checkpoint-3: mpo train" in text
        and "--resume_from_checkpoint auto" in text
    )
    assert "save_only_model" not in text  # such checkpoints cannot be resumed
    for words in (
        "I/O error: No space left on device",
        "[enforce fail at x.cc:595] . unexpected pos 64 vs 0",
    ):
        assert explained(plan, RuntimeError(words)).startswith("StorageError")


def test_a_lost_process_is_explained(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(make(output_dir=str(tmp_path), **LORA))
    closed = RuntimeError(
        "[/x/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:30812\nmore"
    )
    with pytest.raises(RuntimeError, match="Connection closed"), _explaining(plan):
        raise closed  # with one process there is no other
    monkeypatch.setattr(type(plan.recipe.training), "world_size", 2)
    text = explained(plan, closed)
    assert text.startswith("ProcessLostError: Another process of this run was lost")
    assert "Connection closed by peer [127.0.0.1]:30812)" in text and "No checkpoint in" in text
    for step in (4, 12):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        mark_complete(folder, {})
    text = explained(plan, torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0."))
    assert "checkpoint-12: run the same command again with `--resume_from_checkpoint auto`" in text


def test_weights_wait_in_main_memory_for_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    one = SimpleNamespace(world_size=1)
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    given = {"device_map": {"": "cuda:0"}}
    assert _placement(one, given) == given
    assert _placement(SimpleNamespace(world_size=2), given) == {"device_map": None}
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.setenv(name, "true")
        assert _placement(one, given) == {"device_map": None}
        monkeypatch.delenv(name)


def test_other_errors_pass_unchanged(make) -> None:
    plan = make_plan(make(**LORA))
    with pytest.raises(ZeroDivisionError), _explaining(plan):
        raise ZeroDivisionError
    with pytest.raises(TrainingError, match="mine"), _explaining(plan):
        raise TrainingError("mine")


# ---------------------------------------------------------------------------------- what is there, and who else writes


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_finished_result_is_not_replaced_unless_asked_for(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str | None
) -> None:
    settings = {**LORA, **({"resume_from_checkpoint": resume} if resume else {})}
    out = train(make(**settings))
    (out / "notes.txt").write_text("mine")
    first = content(out)
    assert ".lock" not in first
    with pytest.raises(StorageError, match="holds the result of an earlier run") as error:
        train(make(seed=5, **settings), dry_run=True)
    assert "--overwrite_output_dir true" in str(error.value) and f"--output_dir {out}-2" in str(error.value)
    with pytest.raises(StorageError, match="holds the result of an earlier run"):
        train(make(seed=5, **settings))
    assert content(out) == first

    def die(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    again = {**settings, "overwrite_output_dir": True, "seed": 5}
    with monkeypatch.context() as patch:
        patch.setattr(MPOTrainer, "save_model", die)
        with pytest.raises(ZeroDivisionError):
            train(make(**again))
    kept = content(out / "earlier-result")
    assert kept == {name: data for name, data in first.items() if name != "notes.txt"}, "whole, at one place"
    assert not list(out.glob("*.safetensors")) and (out / "recipe.yaml").read_bytes() != first["recipe.yaml"]
    train(make(**again))
    second = content(out)
    assert second.keys() == first.keys() and second["notes.txt"] == b"mine"
    assert second["adapter_model.safetensors"] != first["adapter_model.safetensors"]


def test_a_whole_model_and_checkpoints_are_replaced_only_at_the_end(make) -> None:
    settings = {"learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 1}
    out = train(make(**settings))
    with pytest.raises(StorageError, match=r"a run that is complete.*checkpoint-2") as error:
        make_plan(make(**settings))
    assert "--overwrite_output_dir true" in str(error.value) and f"--output_dir {out}-2" in str(error.value)
    (out / "README.md").rename(out / "card")  # as if it had died while it wrote its result
    with pytest.raises(StorageError, match="holds the checkpoints of an earlier run"):
        make_plan(make(**settings))
    (out / "card").rename(out / "README.md")
    train(make(seed=5, overwrite_output_dir=True, max_steps=1, **settings))
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1"]
    assert not (out / "earlier-result").exists()


def test_a_finished_run_may_be_resumed_in_its_own_folder(make) -> None:
    settings = {**LORA, "save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": "auto"}
    first = content(train(make(**settings)))
    second = content(train(make(**settings)))
    assert first["adapter_model.safetensors"] == second["adapter_model.safetensors"]


BEYOND = {**LORA, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}


def test_a_complete_run_that_is_resumed_trains_nothing_and_stays(
    make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last step lies in the middle of an epoch, of four steps."""
    make(max_steps=6, **BEYOND)
    words = ["train", str(tmp_path / "r.yaml")]
    assert cli.main(words) == 0
    out = tmp_path / "out"
    first = content(out)
    assert "checkpoint-6/complete.json" in first
    for resume in ("auto", "true", str(out / "checkpoint-6")):
        capsys.readouterr()
        assert cli.main([*words, "--resume_from_checkpoint", resume]) == 0
        said = capsys.readouterr().out
        assert f"The run is complete: 6 of 6 steps are trained, and the result is in {out}." in said
        assert "Training for" not in said and "`resume_changes: [max_steps]`" in said
        assert content(out) == first
    # A longer run goes on, and one that is begun anew replaces the result.
    train(make(**{**BEYOND, "max_steps": 7}, resume_from_checkpoint="auto", resume_changes=["max_steps"]))
    assert json.loads((out / "metrics.json").read_text())["steps"] == 7
    train(make(**BEYOND, max_steps=1, overwrite_output_dir=True))
    assert json.loads((out / "metrics.json").read_text())["steps"] == 1


def test_a_result_that_was_not_written_is_made_without_a_step(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(make(max_steps=6, output_dir=str(tmp_path / "whole"), **BEYOND))

    def die(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    for place in ("mpo.jobs.train.finish_probe", "mpo.report.card.write_card"):
        with monkeypatch.context() as patch:
            patch.setattr(place, die)
            with pytest.raises(ZeroDivisionError):
                train(make(max_steps=6, output_dir=str(tmp_path / place), **BEYOND))
        capsys.readouterr()
        again = {"max_steps": 6, "output_dir": str(tmp_path / place), "resume_from_checkpoint": "auto"}
        out = train(make(**again, **BEYOND))
        assert "All steps are trained; their result is made now" in capsys.readouterr().out
        assert not (out / "checkpoint-7").exists() and (out / "README.md").is_file()
        first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, out))
        assert all(torch.equal(first[name], second[name]) for name in first)
        one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, out))
        assert {key: one[key] for key in ("steps", "pairs", "after")} == {
            key: two[key] for key in ("steps", "pairs", "after")
        }
        train(make(**again, **BEYOND))
        assert "The run is complete: 6 of 6 steps" in capsys.readouterr().out


def test_the_result_of_a_shorter_run_is_not_that_of_the_last_step(
    make, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make(max_steps=5, **BEYOND))
    longer = {**BEYOND, "max_steps": 6, "resume_from_checkpoint": "auto", "resume_changes": ["max_steps"]}

    def die(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("mpo.jobs.train.finish_probe", die)
        with pytest.raises(ZeroDivisionError):
            train(make(**longer))
    out = Path(str(make(**longer).training.output_dir))
    assert (out / "checkpoint-6" / "complete.json").exists()
    assert json.loads((out / "metrics.json").read_text())["steps"] == 5
    train(make(**longer))
    assert json.loads((out / "metrics.json").read_text())["steps"] == 6


def test_a_run_that_cannot_be_resumed_leaves_the_files_of_the_one_before(make, tmp_path: Path) -> None:
    settings = {**LORA, "save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": "auto"}
    out = train(make(**settings))
    shutil.rmtree(out / "checkpoint-2")
    before = content(out)
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.002 then, 0\.001 now"):
        train(make(**{**settings, "learning_rate": 1e-3}))
    assert content(out) == before


def test_what_was_changed_on_the_way_is_written_down(make, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**LORA, "save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": "auto"}
    out = train(make(**settings))
    shutil.rmtree(out / "checkpoint-2")
    train(make(**{**settings, "learning_rate": 1e-3, "resume_changes": ["learning_rate"]}))
    sentence = "from step 1: learning_rate 0.002 → 0.001"
    assert sentence in capsys.readouterr().out
    assert json.loads((out / "provenance.json").read_text())["resume_changes"] == [sentence]
    assert f"# Changed {sentence}\n" in (out / "recipe.yaml").read_text(encoding="utf-8")
    assert sentence in (out / "README.md").read_text(encoding="utf-8").replace("\\", "")
    rates = [state["learning_rate"] for state in log_of(out / "checkpoint-2") if "learning_rate" in state]
    assert rates == [0.0, pytest.approx(1e-3)], "the peak after one step of warm-up"


def log_of(checkpoint: Path) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return history


def test_checkpoints_of_weights_alone_are_found_out_by_the_dry_run(make, no_weights: None) -> None:
    settings = {**LORA, "save_strategy": "steps"}
    with pytest.raises(ConfigError, match="`save_only_model` is true"):
        train(make(save_only_model=True, resume_from_checkpoint="auto", **settings), dry_run=True)
    recipe = make(**settings)
    folder = Path(str(recipe.training.output_dir)) / "checkpoint-2"
    folder.mkdir(parents=True)
    mark_complete(folder, {})
    for resume in ("auto", "true", str(folder)):
        with pytest.raises(StorageError, match="cannot be resumed: it was saved with `save_only_model"):
            train(make(resume_from_checkpoint=resume, **settings), dry_run=True)
    assert "holds weights only" in how_to_resume(recipe)


def test_a_checkpoint_of_other_settings_is_found_out_by_the_dry_run(make, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**LORA, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    train(make(**settings))
    settings |= {"resume_from_checkpoint": "auto"}
    train(make(**settings), dry_run=True)
    for changed, said in (
        ({"lora_r": 8}, r"lora_r: 4 then, 8 now.*cannot change within a run"),
        ({"optim": "adafactor"}, r'optim: "adamw\S* then, "adafactor" now'),
        ({"lora_alpha": 64}, r"lora_alpha: 8 then, 64 now.*resume_changes: \[lora_alpha\]"),
        ({"loss_type": ["sigmoid"]}, r"loss_type"),
    ):
        with pytest.raises(ConfigError, match=said):
            train(make(**{**settings, **changed}), dry_run=True)
        with pytest.raises(ConfigError, match=said):
            train(make(**{**settings, **changed}))
    train(make(**{**settings, "lora_alpha": 64, "resume_changes": ["lora_alpha"]}), dry_run=True)


def test_two_runs_at_once_never_share_a_folder(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**LORA, "save_strategy": "steps", "save_steps": 1}
    other = make(overwrite_output_dir=True, **settings)
    recipe = make(**settings)
    original = MPOTrainer.train
    seen = []

    def meanwhile(self: MPOTrainer, *arguments: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(MPOTrainer, "train", original)
        before = content(tmp_path / "out")
        with pytest.raises(StorageError, match=r"Another run is training in .*/out\. Let it finish"):
            train(other)
        assert content(tmp_path / "out") == before
        seen.append(1)
        return original(self, *arguments, **kwargs)

    monkeypatch.setattr(MPOTrainer, "train", meanwhile)
    train(recipe)
    assert seen == [1] and not (tmp_path / "out" / ".lock").exists()


# ------------------------------------------------------------------------------------------------------ told to end


class TellSteps(TrainerCallback):
    """Makes a file when two steps have been taken."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.file.touch()


def train_and_tell(begun: Path, words: list[str]) -> int:
    """The command itself, in a process of its own, whose steps can be waited for."""
    original = MPOTrainer.train

    def train_(self: MPOTrainer, *arguments: Any, **kwargs: Any) -> Any:
        self.add_callback(TellSteps(begun))
        return original(self, *arguments, **kwargs)

    MPOTrainer.train = train_  # type: ignore[method-assign]
    return cli.main(words)


@pytest.mark.parametrize(
    ("number", "settings", "said"),
    [
        (signal.SIGTERM, ["--save_strategy", "steps", "--save_steps", "500"], "Go on with:"),
        (signal.SIGINT, ["--save_strategy", "no", "--enable_jit_checkpoint", "true"], "Go on with:"),
        (signal.SIGTERM, ["--save_strategy", "no"], "nothing is left in"),
    ],
)
def test_a_command_that_is_told_to_end_says_how_to_go_on(
    make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    settings: list[str],
    said: str,
) -> None:
    make(max_steps=3000, **LORA)
    monkeypatch.setenv("MPO_DEBUG", "")
    log, begun = tmp_path / "log", tmp_path / "begun"
    process = processes.start(
        train_and_tell, begun, ["train", str(tmp_path / "r.yaml"), *settings], output=log
    )
    while not begun.exists():
        assert process.is_alive(), log.read_text()
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(300)
    assert process.exitcode == 128 + number, log.read_text()
    text = log.read_text()
    assert said in text and "Traceback" not in text
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "README.md").exists()
    assert ("--resume_from_checkpoint auto" in text) == (said == "Go on with:")
