"""The trainer as a user meets it: what it is built from, what it refuses, what it leaves, and how it stops."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import (
    PeftModel,
    get_peft_model,
)
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
)

from mpo.data import as_groups
from mpo.errors import (
    ConfigError,
    DataError,
    MPOError,
)
from mpo.modeling.loss import reward_gap
from mpo.modeling.pairs import PairTensors
from mpo.training import trainer as trainer_module
from mpo.training.scoring import score_groups
from mpo.training.sharding import tokens_per_call
from mpo.training.trainer import MPOTrainer
from tests import runs
from tests.tiny import build_model, build_tokenizer, random_groups, save_tiny

pytestmark = pytest.mark.usefixtures("accelerator_of_its_own")


def gaps(scores: Any) -> np.ndarray:
    return np.array([record.gap for record in scores.records])


# ---- What it is built from ---------------------------------------------------------------------------------------


def test_a_folder_and_loaded_objects_give_the_same_run(model: Path, rows: Any, tmp_path: Path) -> None:
    by_name = runs.trainer(model, tmp_path / "name", rows, max_steps=2)
    by_name.train()
    objects = runs.trainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="tree"),
        tmp_path / "objects",
        rows,
        max_steps=2,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    objects.train()
    assert runs.differing(runs.weights(by_name.model), runs.weights(objects.model)) == []


def test_without_settings_the_defaults_are_used(
    model: Path, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = MPOTrainer(model=str(model), train_dataset=rows)
    assert trainer.args.beta == 1.0
    assert trainer.args.output_dir == f"{model.name}-MPO"


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "LoRA with trained biases": {"bias": "lora_only"},
    "LoRA with a trained norm": {"modules_to_save": ["norm"]},
    "LoRA that starts from noise": {"init_lora_weights": False},
}


@pytest.mark.filterwarnings("error:.*is_gradient_checkpointing:FutureWarning")
def test_a_new_adapter_brings_no_warning_of_a_renamed_attribute(
    model: Path, rows: Any, tmp_path: Path
) -> None:
    runs.trainer(model, tmp_path, rows, peft_config=runs.lora())


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_trained_saved_and_loaded_again(
    model: Path, rows: Any, held_out: Any, tmp_path: Path, name: str
) -> None:
    trainer = runs.trainer(
        model, tmp_path, rows, max_steps=2, peft_config=runs.lora(**ADAPTERS[name]), eval_dataset=held_out
    )
    start = runs.weights(trainer.model)
    before = gaps(trainer.score())
    trainer.train()
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    moved = set(runs.differing(start, runs.weights(trainer.model)))
    # The first gradient of A is zero while B is, so every tensor has moved only after the second step.
    assert moved == trained
    trainer.save_model()
    out = tmp_path / "out"
    assert not (out / "model.safetensors").exists()
    settings = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["use_dora"] is (name == "DoRA") and settings["use_rslora"] is (name == "rsLoRA")
    after = gaps(trainer.score())
    assert np.abs(after - before).max() > 1e-2
    if name == "LoRA that starts from noise":
        torch.manual_seed(trainer.args.seed)  # the noise is not part of what is compared
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), out)
    scores = score_groups(loaded, as_groups(held_out), AutoTokenizer.from_pretrained(out), progress=False)
    np.testing.assert_allclose(gaps(scores), after, atol=1e-5)


def test_full_fine_tuning_trains_saves_and_loads_again(
    model: Path, rows: Any, held_out: Any, tmp_path: Path
) -> None:
    trainer = runs.trainer(model, tmp_path, rows, max_steps=1, eval_dataset=held_out)
    start = runs.weights(trainer.model)
    trainer.train()
    assert set(runs.differing(start, runs.weights(trainer.model))) == set(start)
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    scores = score_groups(
        loaded, as_groups(held_out), AutoTokenizer.from_pretrained(tmp_path / "out"), progress=False
    )
    np.testing.assert_allclose(gaps(scores), gaps(trainer.score()), atol=1e-5)
    assert runs.differing(runs.weights(loaded), runs.weights(trainer.model)) == []


@pytest.mark.parametrize("init", [False, "pissa", "olora"])
def test_an_adapter_that_changes_the_model_at_its_start_is_part_of_the_reference(
    model: Path, rows: Any, held_out: Any, tmp_path: Path, init: Any
) -> None:
    trainer = runs.trainer(
        model,
        tmp_path,
        rows,
        max_steps=1,
        peft_config=runs.lora(init_lora_weights=init),
        eval_dataset=held_out,
    )
    for record in trainer.score().records:
        if record.is_source:
            assert abs(record.gap - record.reference_gap) < 1e-5
    plain = runs.trainer(model, tmp_path / "plain", rows, eval_dataset=held_out).score()
    same = bool(np.abs(gaps(trainer.score()) - gaps(plain)).max() < 1e-4)
    assert same is (init is not False), (
        "these two decompose the weights, noise does not leave the function as it was"
    )


def adapted(model: Path, folder: Path, *, seed: int = 5) -> Path:
    """A saved adapter that changes what the model says."""
    torch.manual_seed(seed)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), runs.lora(init_lora_weights=False)
    )
    policy.save_pretrained(folder)
    return folder


def test_training_goes_on_from_an_existing_adapter(
    model: Path, rows: Any, held_out: Any, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    policy = PeftModel.from_pretrained(base, adapted(model, tmp_path / "adapter"), is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = runs.trainer(
        policy, tmp_path, rows, max_steps=2, eval_dataset=held_out, processing_class=tokenizer
    )
    assert set(policy.peft_config) == {"default"}, "no second adapter is in memory"
    before = trainer.score()
    for record in before.records:
        if record.is_source:
            assert abs(record.gap - record.reference_gap) < 1e-5, "the reference is the adapter as it was"
    trainer.train()
    after = trainer.score()
    assert [r.reference_gap for r in after.records] == [r.reference_gap for r in before.records]
    assert np.abs(gaps(after) - gaps(before)).max() > 1e-2
    trainer.save_model()
    out = tmp_path / "out"
    assert not [path for path in out.iterdir() if path.is_dir()], "a second adapter was saved"
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), out)
    scores = score_groups(again, as_groups(held_out), AutoTokenizer.from_pretrained(out), progress=False)
    np.testing.assert_allclose(gaps(scores), gaps(after), atol=1e-5)


def test_an_adapter_by_another_name_is_trained_or_refused(model: Path, rows: Any, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    policy = PeftModel.from_pretrained(
        base, adapted(model, tmp_path / "adapter"), adapter_name="mine", is_trainable=True
    )
    try:
        trainer = runs.trainer(policy, tmp_path, rows, max_steps=2, processing_class=build_tokenizer("llama"))
    except MPOError as error:
        assert "mine" in str(error)
    else:
        start = runs.weights(trainer.model)
        trainer.train()
        assert runs.differing(start, runs.weights(trainer.model))


def test_an_adapter_that_was_not_loaded_for_training_is_refused(
    model: Path, rows: Any, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    policy = PeftModel.from_pretrained(base, adapted(model, tmp_path / "adapter"))
    with pytest.raises(MPOError, match="is_trainable"):
        runs.trainer(policy, tmp_path, rows, max_steps=1, processing_class=build_tokenizer("llama")).train()


def test_an_adapter_inside_a_transformers_model_is_refused(model: Path, rows: Any, tmp_path: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    policy.add_adapter(runs.lora())
    with pytest.raises(MPOError):
        runs.trainer(policy, tmp_path, rows, processing_class=build_tokenizer("llama"))


def test_a_new_adapter_on_top_of_an_adapter_is_refused(model: Path, rows: Any, tmp_path: Path) -> None:
    policy = get_peft_model(build_model("llama"), runs.lora())
    with pytest.raises(MPOError, match="peft_config"):
        runs.trainer(
            policy, tmp_path, rows, peft_config=runs.lora(), processing_class=build_tokenizer("llama")
        )


def test_nothing_is_loaded_as_a_second_model(
    model: Path, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    original = PreTrainedModel.from_pretrained.__func__

    def watch(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded.append(args)
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(watch))
    for kind, settings in (("lora", {"peft_config": runs.lora()}), ("full", {})):
        trainer = runs.trainer(model, tmp_path / kind, rows, max_steps=1, **settings)
        trainer.train()
        assert len(loaded) == 1 and trainer.ref_model is None
        loaded.clear()


def test_building_a_trainer_asks_no_server(
    model: Path, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *a, **k: pytest.fail("telemetry"))
    monkeypatch.setattr(socket.socket, "connect", lambda *a, **k: pytest.fail(f"connects to {a[1:]}"))
    runs.trainer(model, tmp_path, rows, max_steps=1).train()


# ---- Data --------------------------------------------------------------------------------------------------------


def flat(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            **{
                f"source_{part}": row["source"][part] for part in ("prompt", "chosen", "rejected", "language")
            },
            **{f"target_{part}": target[part] for part in ("prompt", "chosen", "rejected", "language")},
        }
        for row in rows
        for target in row["targets"]
    ]


def as_text(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value if isinstance(value, str) else value[-1]["content"] for name, value in row.items()}
        for row in flat(rows)
    ]


FORMS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "a list of groups": list,
    "a dataset of groups": lambda rows: as_groups(rows),
    "flat rows": flat,
    "a dataset of flat rows": lambda rows: Dataset.from_list(flat(rows)),
    "plain text": as_text,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_data_gives_the_same_training_set(
    model: Path, rows: Any, tmp_path: Path, form: str
) -> None:
    expected = runs.trainer(model, tmp_path, rows)
    trainer = runs.trainer(model, tmp_path, FORMS[form](rows), eval_dataset=FORMS[form](rows))
    for data in (trainer.train_dataset, trainer.eval_dataset):
        for column in (
            "source_prompt",
            "source_chosen",
            "target_prompt",
            "target_rejected",
            "target_language",
        ):
            assert list(data[column]) == list(expected.train_dataset[column])
    assert trainer.languages == expected.languages


def test_several_evaluation_sets_are_reported_by_name(
    model: Path, rows: Any, held_out: Any, tmp_path: Path
) -> None:
    trainer = runs.trainer(
        model,
        tmp_path,
        rows,
        max_steps=1,
        eval_dataset={"seen": rows, "unseen": held_out},
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    logged = {name for log in trainer.state.log_history for name in log}
    languages = {t["language"] for row in held_out for t in row["targets"]}
    for name, data in (("seen", rows), ("unseen", held_out)):
        assert f"eval_{name}_loss" in logged
        for language in {t["language"] for row in data for t in row["targets"]}:
            assert f"eval_{name}_reward_gap/{language}" in logged
    assert languages <= set(trainer.languages)
    with pytest.raises(DataError, match="seen"):
        trainer.score()
    assert len(trainer.score("unseen").records) == 3 + sum(len(row["targets"]) for row in held_out)


def test_the_dominant_language_can_be_chinese(model: Path, tmp_path: Path) -> None:
    rows = random_groups(3, 4, (1, 2), languages=("en", "bn", "sw"), source_language="zh", words=(2, 5))
    trainer = runs.trainer(model, tmp_path, rows, max_steps=1, source_language="zh", eval_dataset=rows)
    trainer.train()
    assert set(trainer.languages) <= {"en", "bn", "sw"}
    assert {record.language for record in trainer.score().records if record.is_source} == {"zh"}
    logged = {name for log in trainer.state.log_history for name in log}
    assert any(name.startswith("reward_gap/") for name in logged) and "reward_gap/zh" not in logged


def test_the_dominant_language_is_that_of_flat_rows_too(model: Path, tmp_path: Path) -> None:
    rows = flat(random_groups(3, 3, (1, 2), languages=("en", "bn"), source_language="zh", words=(2, 5)))
    for row in rows:
        del row["source_language"]
    trainer = runs.trainer(model, tmp_path, rows, source_language="zh", eval_dataset=rows)
    assert {record.language for record in trainer.score().records if record.is_source} == {"zh"}


def used_groups(trainer: MPOTrainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Groups whose losses were computed by one epoch of training."""
    seen: list[int] = []
    original = trainer_module.run_model

    def watch(forward: Any, batch: dict[str, Any], **kwargs: Any) -> Any:
        seen.extend(batch["groups"])
        return original(forward, batch, **kwargs)

    monkeypatch.setattr(trainer_module, "run_model", watch)
    trainer.train()
    return seen


def test_sources_below_the_limit_are_counted_and_left_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_groups(6, 10, (1, 2), words=(1, 4))
    reference = {
        record.group: record.gap
        for record in runs.trainer(model, tmp_path, rows, eval_dataset=rows).score().records
        if record.is_source
    }
    not_positive = [group for group, gap in reference.items() if gap <= 0]
    assert 0 < len(not_positive) < 10
    kept_all = runs.trainer(model, tmp_path, rows)
    assert sorted(used_groups(kept_all, monkeypatch)) == list(range(10))
    assert kept_all.source_report == {"sources": 10, "not_positive": len(not_positive), "dropped": 0}
    limit = sorted(reference.values())[6]
    trainer = runs.trainer(model, tmp_path, rows, min_source_gap=limit)
    assert sorted(used_groups(trainer, monkeypatch)) == [g for g in reference if reference[g] > limit + 1e-7]
    assert trainer.source_report == {"sources": 10, "not_positive": len(not_positive), "dropped": 7}


def test_sources_that_are_not_positive_and_trained_on_are_warned_of(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = random_groups(6, 10, (1, 2), words=(1, 4))
    gaps_ = sorted(
        record.gap
        for record in runs.trainer(model, tmp_path, rows, eval_dataset=rows).score().records
        if record.is_source
    )
    bad = sum(gap <= 0 for gap in gaps_)
    assert bad >= 2

    def warned(limit: float | None) -> list[str]:
        caplog.clear()
        trainer = runs.trainer(model, tmp_path, rows, min_source_gap=limit, max_steps=1)
        with caplog.at_level(logging.WARNING, logger="mpo"):
            trainer.train()
        return [message for message in caplog.messages if "prefers the rejected" in message]

    assert [m.split()[:3] for m in warned(None)] == [[str(bad), "of", "10"]]
    # A limit below zero drops some of them and trains on the others.
    assert [m.split()[:3] for m in warned((gaps_[0] + gaps_[1]) / 2)] == [[str(bad - 1), "of", "10"]]
    assert warned(0.0) == []


def test_dropping_every_source_is_an_error_that_names_the_largest(
    model: Path, rows: Any, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"min_source_gap=50.*largest is"):
        runs.trainer(model, tmp_path, rows, min_source_gap=50.0).train()


def test_a_drop_that_leaves_no_whole_batch_is_an_error(model: Path, rows: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dataloader_drop_last"):
        runs.trainer(model, tmp_path, rows, per_device_train_batch_size=8, dataloader_drop_last=True).train()


def test_bad_rows_are_an_error_or_are_listed(model: Path, tmp_path: Path) -> None:
    rows = random_groups(0, 4, (2, 2), words=(1, 4))
    rows[1]["targets"][0]["prompt"][0]["content"] = "river " * 200
    with pytest.raises(DataError, match=r"row \d+, field `targets\[0\]\.prompt`"):
        runs.trainer(model, tmp_path, rows, max_length=100)
    trainer = runs.trainer(model, tmp_path, rows, max_length=100, bad_rows="drop", max_steps=1)
    assert len(trainer.dropped_rows) == 1 and "prompt" in trainer.dropped_rows[0]
    assert sum(len(languages) for languages in trainer.train_dataset["target_language"]) == 7
    trainer.train()


class Recording(MPOTrainer):
    """Keeps the losses per pair, and what they were weighted with."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.batches = [*getattr(self, "batches", []), inputs]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def pair_loss(self, pairs: PairTensors) -> Tensor:
        losses = super().pair_loss(pairs)
        self.losses = [*getattr(self, "losses", []), losses.detach().clone()]
        return losses


def pairs_per_language(rows: list[dict[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        for target in row["targets"]:
            counts[target["language"]] = counts.get(target["language"], 0) + 1
    return counts


@pytest.mark.parametrize("given", ["balanced", {"bn": 3.0, "sw": 0.0}])
def test_weights_per_language_have_mean_one_and_are_in_the_loss(
    model: Path, tmp_path: Path, given: Any
) -> None:
    rows = random_groups(2, 6, (1, 3), languages=("bn", "sw", "zh"), words=(1, 4))
    counts = pairs_per_language(rows)
    assert set(counts) == {"bn", "sw", "zh"} and len(set(counts.values())) > 1
    trainer = runs.trainer(
        model,
        tmp_path,
        rows,
        language_weights=given,
        kind=Recording,
        per_device_train_batch_size=6,
        learning_rate=0,
    )
    trainer.train()
    raw = {k: 1 / n for k, n in counts.items()} if given == "balanced" else {"bn": 3.0, "sw": 0.0, "zh": 1.0}
    scale = sum(counts.values()) / sum(raw[k] * n for k, n in counts.items())
    (losses,), (batch,) = trainer.losses, trainer.batches
    weights = torch.tensor([raw[trainer.languages[i]] * scale for i in batch["language"].tolist()])
    assert math.isclose(float(weights.mean()), 1.0, rel_tol=1e-5)
    if given == "balanced":
        sums = [float(weights[batch["language"] == i].sum()) for i in range(3)]
        assert max(sums) - min(sums) < 1e-4
    expected = float((losses * weights).mean())
    assert math.isclose(trainer.state.log_history[0]["loss"], expected, rel_tol=1e-4)
    assert abs(expected - float(losses.mean())) > 1e-3


def test_a_weight_for_a_language_that_is_not_in_the_data_is_refused(
    model: Path, rows: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="xx"):
        runs.trainer(model, tmp_path, rows, language_weights={"xx": 2.0})


class HingeTrainer(MPOTrainer):
    def pair_loss(self, pairs: PairTensors) -> Tensor:
        gap = reward_gap(pairs.chosen_logps, pairs.rejected_logps)
        return torch.relu(pairs.reference_gap + 1.0 - gap) + 0.1 * pairs.retention


def test_a_subclass_changes_the_loss_in_a_few_lines(model: Path, rows: Any, tmp_path: Path) -> None:
    assert len(inspect.getsource(HingeTrainer).strip().splitlines()) < 10
    trainer = runs.trainer(
        model,
        tmp_path,
        rows,
        kind=HingeTrainer,
        num_train_epochs=8,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        eval_dataset=rows,
    )
    before = trainer.evaluate()["eval_loss"]
    records = trainer.score().records
    by_hand = [max(0.0, r.reference_gap + 1.0 - r.gap) for r in records if not r.is_source]
    assert math.isclose(before, sum(by_hand) / len(by_hand), rel_tol=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before


def test_a_loss_of_another_shape_is_refused(model: Path, rows: Any, tmp_path: Path) -> None:
    class Mean(MPOTrainer):
        def pair_loss(self, pairs: PairTensors) -> Tensor:
            return super().pair_loss(pairs).mean()

    with pytest.raises(ConfigError, match="one value per target pair"):
        runs.trainer(model, tmp_path, rows, kind=Mean).train()


# ---- Ways to compute ---------------------------------------------------------------------------------------------


class Gradients(TrainerCallback):
    """The gradients of the first optimizer step, as the optimizer gets them."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.found:
            self.found = {
                name.replace("_orig_mod.", ""): parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }


def first_step(model: Path, folder: Path, rows: Any, **arguments: Any) -> tuple[float, dict[str, Tensor]]:
    gradients = Gradients()
    trainer = runs.trainer(
        model, folder, rows, max_steps=1, callbacks=[gradients], max_grad_norm=0.0, **arguments
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"], gradients.found


def relative(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys() and first
    return max(float((first[k] - second[k]).norm() / second[k].norm().clamp(min=1e-6)) for k in first)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    model: Path, rows: Any, tmp_path: Path, kind: str, reentrant: bool | None
) -> None:
    peft = {"peft_config": runs.lora(init_lora_weights=False)} if kind == "lora" else {}
    loss, expected = first_step(model, tmp_path / "plain", rows, **peft)
    extra = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    same_loss, gradients = first_step(
        model, tmp_path / "again", rows, gradient_checkpointing=True, **extra, **peft
    )
    assert math.isclose(loss, same_loss, rel_tol=1e-6)
    assert relative(gradients, expected) < 1e-5


def test_gradient_checkpointing_is_really_on_when_asked_for_and_else_off(
    model: Path, rows: Any, tmp_path: Path
) -> None:
    counts = []
    for on in (True, False, None):
        trainer = runs.trainer(model, tmp_path, rows[:1], gradient_checkpointing=on)
        calls: list[int] = []
        # Recomputation may stop before the layer's end.
        trainer.model.model.layers[0].self_attn.register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        trainer.get_train_dataloader()  # the reference, so that its calls are the same
        calls.clear()
        trainer.train()
        counts.append(len(calls))
    assert counts[0] > counts[1] == counts[2], "recomputing calls the layer once more"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_gives_the_same_loss_and_gradients(
    model: Path, rows: Any, tmp_path: Path, backend: str
) -> None:
    loss, expected = first_step(model, tmp_path / "plain", rows)
    torch._dynamo.reset()
    compiled_loss, gradients = first_step(model, tmp_path / "compiled", rows, torch_compile_backend=backend)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert math.isclose(loss, compiled_loss, rel_tol=1e-5)
    assert relative(gradients, expected) < 1e-4


def test_batches_of_ever_new_shapes_are_compiled_a_few_times_only(tmp_path: Path) -> None:
    graphs: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = save_tiny("llama", tmp_path / "model", layers=1)
    rows = random_groups(0, 14, (1, 4), words=(1, 30))
    trainer = runs.trainer(
        model, tmp_path, rows, torch_compile_backend="eager", max_tokens_per_row=128, callbacks=[Count()]
    )
    shapes = {tuple(batch["input_ids"].shape) for batch in trainer.get_train_dataloader()}
    assert len(shapes) > 8
    trainer.train()
    assert 0 < graphs[-1] <= 6
    assert graphs[6] == graphs[-1], "the second half compiled nothing"


def test_a_compiled_model_is_saved_under_its_own_names(model: Path, rows: Any, tmp_path: Path) -> None:
    trainer = runs.trainer(model, tmp_path, rows, max_steps=1, torch_compile_backend="eager")
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert runs.differing(runs.weights(loaded), runs.weights(build_model("llama"))) != []
    assert runs.differing(runs.weights(loaded), runs.weights(trainer.model)) == []


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_bf16_is_close_to_float32_and_not_the_same(model: Path, rows: Any, tmp_path: Path, kind: str) -> None:
    peft = {"peft_config": runs.lora(init_lora_weights=False)} if kind == "lora" else {}
    loss, expected = first_step(model, tmp_path / "plain", rows, **peft)
    AcceleratorState._reset_state(reset_partial_state=True)
    bf16_loss, gradients = first_step(model, tmp_path / "bf16", rows, bf16=True, **peft)
    assert all(gradient.dtype is torch.float32 for gradient in gradients.values())
    assert bf16_loss != loss
    assert math.isclose(loss, bf16_loss, rel_tol=0.1)
    assert relative(gradients, expected) < 0.5


def test_the_reference_and_the_step_are_computed_in_the_same_precision(
    model: Path, rows: Any, tmp_path: Path
) -> None:
    trainer = runs.trainer(model, tmp_path, rows, bf16=True, learning_rate=0.0, kind=Recording)
    trainer.train()
    assert trainer.state.log_history[0]["loss/retention"] < 1e-5, (
        "the policy is its own reference at the start"
    )


def test_generation_and_the_plain_forward_are_unchanged_by_training_through_the_head(
    model: Path, rows: Any, tmp_path: Path
) -> None:
    trainer = runs.trainer(model, tmp_path, rows, max_steps=1, peft_config=runs.lora())
    trainer.train()
    trainer.save_model()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    clean = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    policy = trainer.model.eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(policy.generate(input_ids=ids, **settings), clean.generate(input_ids=ids, **settings))
    ours, theirs = policy(input_ids=ids, labels=ids), clean(input_ids=ids, labels=ids)
    assert torch.allclose(ours.loss, theirs.loss, atol=1e-6)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-5)


def test_an_optimizer_of_the_user_is_used(model: Path, rows: Any, tmp_path: Path) -> None:
    loaded = build_model("llama")
    norm = [parameter for name, parameter in loaded.named_parameters() if name == "model.norm.weight"]
    optimizer = torch.optim.SGD(norm, lr=0.1)
    trainer = runs.trainer(
        loaded,
        tmp_path,
        rows,
        max_steps=1,
        optimizers=(optimizer, None),
        processing_class=build_tokenizer("llama"),
    )
    start = runs.weights(trainer.model)
    trainer.train()
    assert runs.differing(start, runs.weights(trainer.model)) == ["model.norm.weight"]


def test_reference_values_keep_their_precision_under_deepspeed(
    model: Path, rows: Any, tmp_path: Path
) -> None:
    # The library rounds what a model is given to DeepSpeed's dtype; ids and masks do not mind, these values do.
    trainer = runs.trainer(model, tmp_path, rows)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.is_deepspeed_enabled = True
    prepared = trainer._prepare_inputs(batch)
    for name in ("reference_gap", "reference_hidden", "weight"):
        assert torch.equal(prepared[name], batch[name]) and prepared[name].dtype == torch.float32


# ---- Evaluation --------------------------------------------------------------------------------------------------


def test_evaluation_is_the_mean_over_pairs_whatever_the_batch(
    model: Path, rows: Any, held_out: Any, tmp_path: Path
) -> None:
    results = []
    for size in (1, 2, 3):
        trainer = runs.trainer(
            model, tmp_path, rows, eval_dataset=held_out, per_device_eval_batch_size=size, beta=1.5
        )
        metrics = trainer.evaluate()
        records = [r for r in trainer.score().records if not r.is_source]
        losses = [(1.5 * r.gap - r.reference_gap) ** 2 for r in records]
        assert math.isclose(metrics["eval_loss"], sum(losses) / len(losses), rel_tol=1e-4)
        for language in {r.language for r in records}:
            own = [r for r in records if r.language == language]
            assert math.isclose(
                metrics[f"eval_positive/{language}"], sum(r.gap > 0 for r in own) / len(own), abs_tol=1e-9
            )
        results.append(metrics["eval_loss"])
    assert max(results) - min(results) < 1e-5


def test_an_evaluation_has_the_sources_row_and_says_how_far_it_has_moved(
    model: Path, rows: Any, held_out: Any, tmp_path: Path
) -> None:
    trainer = runs.trainer(model, tmp_path, rows, eval_dataset=held_out, max_steps=3)
    own = [record for record in trainer.score().records if record.is_source]
    before = trainer.evaluate()
    gap = sum(record.gap for record in own) / len(own)
    assert math.isclose(before["eval_reward_gap/en"], gap, abs_tol=1e-6)
    assert abs(before["eval_gap_to_source/en"]) < 1e-5
    trainer.train()
    after = trainer.evaluate()
    moved = after["eval_reward_gap/en"] - gap
    assert abs(moved) > 1e-4
    assert math.isclose(after["eval_gap_to_source/en"], moved, abs_tol=1e-4)


def test_a_run_that_is_measured_on_the_way_ends_with_the_same_bits(
    model: Path, rows: Any, held_out: Any, tmp_path: Path
) -> None:
    ends = []
    for name, settings in (("often", {"eval_strategy": "steps", "eval_steps": 1}), ("never", {})):
        trainer = runs.trainer(
            model,
            tmp_path / name,
            rows,
            eval_dataset=held_out,
            max_steps=4,
            disable_dropout=False,
            peft_config=runs.lora(lora_dropout=0.5),  # drawn from torch's own numbers
            **settings,
        )
        trainer.train()
        ends.append(runs.weights(trainer.model))
    assert runs.differing(*ends) == []


def test_scoring_leaves_the_model_and_its_mode_as_they_were(
    model: Path, rows: Any, held_out: Any, tmp_path: Path
) -> None:
    trainer = runs.trainer(model, tmp_path, rows, eval_dataset=held_out)
    start = runs.weights(trainer.model)
    for mode in (True, False):
        trainer.model.train(mode)
        trainer.score()
        assert trainer.model.training is mode
    assert runs.differing(start, runs.weights(trainer.model)) == []


def test_languages_that_the_trainer_does_not_know_are_refused(model: Path, rows: Any, tmp_path: Path) -> None:
    trainer = runs.trainer(model, tmp_path, random_groups(0, 3, (1, 1), languages=("bn",), words=(1, 4)))
    with pytest.raises(DataError, match="sw"):
        trainer.score(random_groups(0, 3, (1, 1), languages=("sw",), words=(1, 4)))
    with pytest.raises(DataError, match="eval_dataset"):
        trainer.score()


# ---- What it writes ----------------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_run_leaves_no_pickled_arguments_and_no_card_per_checkpoint(
    model: Path, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        MPOTrainer, "create_model_card", lambda *a, **k: pytest.fail("a card at a checkpoint")
    )
    trainer = runs.trainer(model, tmp_path, rows, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    names = {path.name for path in files(tmp_path)}
    assert "training_args.bin" not in names
    assert {"model.safetensors", "config.json", "tokenizer.json", "optimizer.pt", "complete.json"} <= names


def test_a_kill_between_the_pickle_of_the_arguments_and_its_removal_leaves_no_token(
    model: Path, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_SecretThatMustNotBeWritten"
    loading = {"token": secret, "dtype": "float32"}
    trainer = runs.trainer(model, tmp_path, rows, max_steps=1, hub_token=secret, model_init_kwargs=loading)
    remove = Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda path, **k: None if path.name == "training_args.bin" else remove(path, **k)
    )
    trainer.save_model()
    left = tmp_path / "out" / "training_args.bin"
    assert left.stat().st_size > 1000
    assert secret.encode() not in left.read_bytes()
    assert copy.copy(trainer.args).hub_token == copy.deepcopy(trainer.args).hub_token == secret
    assert copy.deepcopy(trainer.args).model_init_kwargs == trainer.args.model_init_kwargs
    assert trainer.args.hub_token == secret


def test_a_token_is_written_nowhere(
    model: Path, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secrets = {
        name: f"hf_{name}SecretThatMustNotBeWritten" for name in ("environment", "argument", "loading")
    }
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secrets["environment"])
    trainer = runs.trainer(
        model,
        tmp_path,
        rows,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        report_to=["tensorboard"],
        hub_token=secrets["argument"],
        model_init_kwargs={"token": secrets["loading"]},
    )
    trainer.train()
    trainer.save_model()
    written = files(tmp_path)
    assert any("tfevents" in path.name for path in written)
    for name, secret in secrets.items():
        holders = [
            str(path.relative_to(tmp_path)) for path in written if secret.encode() in path.read_bytes()
        ]
        assert holders == [], f"the token of the {name} is in {holders}"
    output = capfd.readouterr()
    assert not [name for name, secret in secrets.items() if secret in output.out + output.err]


def test_tensorboard_gets_the_metrics_of_every_language(
    model: Path, rows: Any, held_out: Any, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = runs.trainer(
        model,
        tmp_path,
        rows,
        report_to=["tensorboard"],
        eval_dataset=held_out,
        eval_strategy="epoch",
    )
    trainer.train()
    (events,) = (path for path in files(tmp_path) if "tfevents" in path.name)
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    for name in (
        "loss",
        "loss/reward_gap",
        "loss/retention",
        "grad_norm",
        "learning_rate",
        "pairs_per_second",
    ):
        assert f"train/{name}" in tags, name
    for language in pairs_per_language(rows):
        for name in ("reward_gap", "gap_to_source", "positive", "logps/chosen", "logps/rejected"):
            assert f"train/{name}/{language}" in tags, f"{name} of {language}"
    for language in pairs_per_language(held_out):
        for name in ("reward_gap", "gap_to_source", "positive", "logps/chosen", "logps/rejected"):
            assert any(tag.startswith("eval/") and tag.endswith(f"{name}/{language}") for tag in tags), name


def test_with_several_processes_a_micro_batch_is_one_call(
    model: Path, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Gradients are reduced in a call's backward pass, and ranks with more calls would wait for those with fewer.
    trainer = runs.trainer(model, tmp_path, rows)

    def limit() -> int | None:
        return tokens_per_call(trainer.args, trainer.accelerator, router_loss=False)

    assert limit() is not None and limit() == trainer.data_collator.max_tokens_per_call
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    assert limit() is None
    trainer.args.max_tokens_per_call = 100
    with pytest.raises(ConfigError, match="one model call with several processes"):
        limit()
