"""Which model is the reference, how long it is there, and what it says of data that comes later."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from mpo.data import as_groups
from mpo.errors import ModelError, MPOError
from mpo.training import reference_policy
from mpo.training.scoring import score_groups
from tests import runs
from tests.tiny import build_model, build_tokenizer, random_groups

pytestmark = pytest.mark.usefixtures("accelerator_of_its_own")


def gaps(scores: Any) -> np.ndarray:
    return np.array([record.gap for record in scores.records])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_explicit_reference_gives_the_targets_and_is_freed(
    model: Path, rows: Any, held_out: Any, tmp_path: Path, kind: str
) -> None:
    other = build_model("llama", seed=8)
    expected = score_groups(other, as_groups(held_out), build_tokenizer("llama"), progress=False)
    trainer = runs.trainer(
        model,
        tmp_path,
        rows,
        max_steps=1,
        ref_model=other,
        eval_dataset=held_out,
        peft_config=runs.lora() if kind == "lora" else None,
    )
    freed = weakref.ref(other)
    del other
    trainer.train()
    gc.collect()
    assert freed() is None, "the reference model is in memory while training"
    assert trainer.ref_model is None
    scores = trainer.score()
    np.testing.assert_allclose(
        [r.reference_gap for r in scores.records], [r.reference_gap for r in expected.records], atol=1e-5
    )
    assert np.abs(gaps(expected) - gaps(scores)).max() > 1e-2
    trainer.save_model()
    with safe_open(next((tmp_path / "out").glob("*.safetensors")), "pt") as file:
        assert not [name for name in file.keys() if "ref" in name]  # noqa: SIM118


def test_an_explicit_reference_of_the_same_weights_is_the_start(
    model: Path, rows: Any, tmp_path: Path
) -> None:
    twin = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="tree")
    with_twin = runs.trainer(model, tmp_path / "twin", rows, max_steps=2, ref_model=twin)
    with_twin.train()
    alone = runs.trainer(model, tmp_path / "alone", rows, max_steps=2)
    alone.train()
    assert runs.differing(runs.weights(with_twin.model), runs.weights(alone.model)) == []


def test_an_explicit_reference_is_not_replaced_by_another_once_it_is_freed(
    model: Path, rows: Any, held_out: Any, tmp_path: Path
) -> None:
    other = build_model("llama", seed=8)
    expected = score_groups(other, as_groups(held_out), build_tokenizer("llama"), progress=False)
    trainer = runs.trainer(model, tmp_path, rows, max_steps=1, ref_model=other, peft_config=runs.lora())
    trainer.train()
    try:
        scores = trainer.score(held_out)
    except MPOError:
        return
    np.testing.assert_allclose(
        [r.reference_gap for r in scores.records], [r.reference_gap for r in expected.records], atol=1e-5
    )


def test_data_scored_one_after_the_other_is_not_confused(model: Path, rows: Any, tmp_path: Path) -> None:
    trainer = runs.trainer(model, tmp_path, rows, peft_config=runs.lora())
    languages = tuple(trainer.languages)
    for seed in range(20, 28):
        data = random_groups(seed, 3, (1, 1), languages=languages, words=(1, 4))
        for record in trainer.score(data).records:
            if record.is_source:
                assert abs(record.gap - record.reference_gap) < 1e-5, "the reference is that of other data"
        gc.collect()


def test_the_reference_of_data_that_is_gone_is_forgotten(
    model: Path, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Data is known by its identity, which the next data may get when this one is no longer in memory.
    built: list[weakref.ref[Any]] = []
    original = reference_policy.build_or_load

    def watch(dataset: Any, *args: Any, **kwargs: Any) -> Any:
        built.append(weakref.ref(dataset))
        return original(dataset, *args, **kwargs)

    monkeypatch.setattr(reference_policy, "build_or_load", watch)
    trainer = runs.trainer(model, tmp_path, rows, peft_config=runs.lora())
    trainer.score(random_groups(20, 3, (1, 1), languages=tuple(trainer.languages), words=(1, 4)))
    gc.collect()
    assert len(trainer._reference.known) == sum(dataset() is not None for dataset in built)


def test_new_data_after_training_is_scored_with_the_right_reference_or_refused(
    model: Path, rows: Any, tmp_path: Path
) -> None:
    for kind, peft in (("lora", runs.lora()), ("full", None)):
        trainer = runs.trainer(model, tmp_path / kind, rows, max_steps=2, peft_config=peft)
        trainer.train()
        data = random_groups(30, 3, (1, 1), languages=tuple(trainer.languages), words=(1, 4))
        if kind == "full":
            with pytest.raises(MPOError, match="eval_dataset"):
                trainer.score(data)
        else:
            base = score_groups(
                AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
                as_groups(data),
                build_tokenizer("llama"),
                progress=False,
            )
            np.testing.assert_allclose(
                [r.reference_gap for r in trainer.score(data).records],
                [r.reference_gap for r in base.records],
                atol=1e-5,
            )


@pytest.mark.parametrize("first", ["training", "batches", "scores"])
def test_the_layout_is_checked_before_any_value_is_kept(
    model: Path, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    # A model that misreads packed trees would leave wrong values in the cache, where the next run finds them.
    monkeypatch.setattr(reference_policy, "usable_layout", lambda *_: "padded")
    layouts: list[str] = []
    original = reference_policy.build_or_load

    def watch(*args: Any, shape: Any, **kwargs: Any) -> Any:
        layouts.append(shape.layout)
        return original(*args, shape=shape, **kwargs)

    monkeypatch.setattr(reference_policy, "build_or_load", watch)
    trainer = runs.trainer(model, tmp_path, rows, eval_dataset=rows, max_steps=1)
    if first == "batches":
        list(trainer.get_train_dataloader())
    elif first == "scores":
        trainer.score()
    trainer.train()
    assert set(layouts) == {"padded"}


@pytest.mark.parametrize("kind", ["explicit", "adapter", "policy"])
def test_each_kind_of_reference_is_asked_in_eval_mode_and_leaves_the_policy_as_it_was(
    model: Path, rows: Any, tmp_path: Path, kind: str
) -> None:
    explicit = build_model("llama", seed=8) if kind == "explicit" else None
    trainer = runs.trainer(
        model, tmp_path, rows, ref_model=explicit, peft_config=runs.lora() if kind == "adapter" else None
    )
    adapter = [module for module in trainer.model.modules() if isinstance(module, LoraLayer)]
    trainer.model.train()
    with trainer._reference.forward() as called:
        assert not called.training and called is (explicit or trainer.model)
        assert all(module.disable_adapters for module in adapter)
    assert trainer.model.training and not any(module.disable_adapters for module in adapter)


def test_new_data_is_refused_once_its_reference_is_gone(model: Path, rows: Any, tmp_path: Path) -> None:
    explicit = build_model("llama", seed=8)
    trainer = runs.trainer(model, tmp_path, rows, ref_model=explicit, peft_config=runs.lora())
    known = trainer._reference.values(trainer.train_dataset, "train")
    trainer._reference.release()
    assert trainer._reference.values(trainer.train_dataset, "train") is known
    with pytest.raises(ModelError, match="after `ref_model` was freed"):
        trainer._reference.values(trainer.train_dataset.select([0]), "new")
    alone = runs.trainer(model, tmp_path, rows)
    alone._reference.release()
    alone._reference.values(alone.train_dataset, "train")  # the policy has not moved yet
    alone.state.global_step = 1
    with pytest.raises(ModelError, match="after training has begun"):
        alone._reference.values(alone.train_dataset.select([0]), "new")
