"""Budgets by device, the attention of a model whose user chose none, and the fallback to the padded layout."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from transformers import GptOssConfig, PreTrainedModel

from mpo.data import as_groups
from mpo.data.tokenization import set_chat_template, tokenize_groups
from mpo.errors import ModelError
from mpo.modeling.head import RewardGapOutput, attach_reward_gap_head
from mpo.modeling.layout import BatchShape, batch_shape, default_attention, usable_layout
from mpo.modeling.trees import Tree
from mpo.training.unique_pairs import probe_trees
from tests import runs
from tests.tiny import MODEL_FAMILIES, build_model, build_tokenizer, random_groups, save_tiny

CPU = torch.device("cpu")
SHAPE = BatchShape("tree", 256, 0, "mean", 1024)


@pytest.fixture(autouse=True)
def process_state_and_messages(caplog: pytest.LogCaptureFixture) -> None:
    PartialState(cpu=True)
    caplog.set_level(logging.WARNING)


def trees(family: str) -> list[Tree]:
    tokenizer = build_tokenizer(family)
    set_chat_template(tokenizer, None)
    return probe_trees(tokenize_groups(as_groups(random_groups(1, 3)), tokenizer)[0])


def with_head(family: str, **options: Any) -> PreTrainedModel:
    model = build_model(family, **options)
    attach_reward_gap_head(model)
    return model


def test_a_cpu_gets_short_rows_and_an_accelerator_long_ones() -> None:
    cpu = batch_shape(CPU, layout="tree", pad_token_id=3, pooling="last")
    gpu = batch_shape(torch.device("cuda"), layout="tree", pad_token_id=3, pooling="last")
    assert cpu == BatchShape("tree", 512, 3, "last", 2048)
    assert gpu == BatchShape("tree", 8192, 3, "last", 8192)


def test_a_budget_of_the_user_is_kept_on_every_device() -> None:
    for device in ("cpu", "cuda"):
        shape = batch_shape(
            torch.device(device),
            layout="padded",
            pad_token_id=0,
            pooling="mean",
            max_tokens_per_row=77,
            tokens_per_batch=99,
        )
        assert shape == BatchShape("padded", 77, 0, "mean", 99)


def test_trees_default_to_their_own_attention_and_padded_rows_to_what_applies_a_soft_cap() -> None:
    for family in MODEL_FAMILIES:
        config = build_model(family).config
        expected = "eager" if family == "gemma2" else None
        assert default_attention(config, "padded") == expected, family
        assert default_attention(config, "tree") == "tree"
    # Attention sinks are nothing that sdpa computes.
    assert default_attention(GptOssConfig(), "tree") is None


def test_with_attention_tree_by_tree_one_row_holds_a_whole_call() -> None:
    options = {"layout": "tree", "pad_token_id": 0, "pooling": "mean"}
    for device in map(torch.device, ("cpu", "cuda")):
        assert batch_shape(device, attention="sdpa", **options) == batch_shape(device, **options)
        assert batch_shape(device, attention="tree", **options).max_tokens_per_row > 10**6
        assert batch_shape(device, attention="tree", max_tokens_per_row=9, **options).max_tokens_per_row == 9


@pytest.mark.parametrize("family", MODEL_FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "tree"])
def test_models_that_follow_the_mask_take_trees(family: str, attention: str) -> None:
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("sdpa has no soft-cap")
    model = with_head(family, attn_implementation=attention)
    assert usable_layout(model, trees(family), SHAPE, CPU, torch.float32) == "tree"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rounding_is_not_taken_for_a_wrong_mask(dtype: torch.dtype) -> None:
    model = with_head("llama", dtype=dtype)
    assert usable_layout(model, trees("llama"), SHAPE, CPU, dtype) == "tree"


def ignoring(model: PreTrainedModel, **changes: Any) -> Any:
    """A forward that, like a layer that knows no mask, leaves something out of what it is given."""

    def forward(**batch: Any) -> RewardGapOutput:
        if "tree_ids" in batch:
            batch.update({name: change(batch[name]) for name, change in changes.items()})
        return model(**batch)

    return forward


WRONG = {
    "it sees the tokens of other trees": {"tree_ids": lambda ids: ids.clamp(max=0)},
    "it sees the other branch": {"branch_ids": torch.zeros_like},
    "its positions count through the row": {
        "position_ids": lambda ids: torch.arange(ids.shape[1]).expand_as(ids),
    },
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_that_misreads_trees_falls_back_to_padding_with_a_warning(
    wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    forward = ignoring(with_head("llama"), **WRONG[wrong])
    assert usable_layout(forward, trees("llama"), SHAPE, CPU, torch.float32) == "padded"
    assert "padded" in caplog.text and "%" in caplog.text


def test_a_model_that_gives_no_numbers_for_trees_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    model = with_head("llama")

    def forward(**batch: Any) -> RewardGapOutput:
        output = model(**batch)
        if "tree_ids" in batch:
            output.pooled = output.pooled * float("nan")
        return output

    assert usable_layout(forward, trees("llama"), SHAPE, CPU, torch.float32) == "padded"


def test_a_model_that_refuses_trees_falls_back_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model = with_head("llama")

    def forward(**batch: Any) -> RewardGapOutput:
        if "tree_ids" in batch:
            raise ModelError("flash attention takes no such mask")
        return model(**batch)

    assert usable_layout(forward, trees("llama"), SHAPE, CPU, torch.float32) == "padded"
    assert "flash attention takes no such mask" in caplog.text


def test_the_fallback_needs_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in `score_groups`, which runs without a trainer.
    monkeypatch.setattr(PartialState, "_shared_state", {})
    forward = ignoring(with_head("llama"), **WRONG["its positions count through the row"])
    assert usable_layout(forward, trees("llama"), SHAPE, CPU, torch.float32) == "padded"


def test_the_padded_layout_is_kept_without_a_call_of_the_model() -> None:
    def forward(**_: Any) -> RewardGapOutput:
        raise AssertionError("called")

    assert (
        usable_layout(forward, trees("llama"), replace(SHAPE, layout="padded"), CPU, torch.float32)
        == "padded"
    )


def test_the_trial_is_short_whatever_the_length_of_the_texts() -> None:
    sizes = []
    model = with_head("llama")

    def forward(**batch: Any) -> RewardGapOutput:
        sizes.append(batch["input_ids"].numel())
        return model(**batch)

    long = [Tree(list(range(10, 400)), list(range(10, 300)), list(range(20, 300))) for _ in range(5)]
    usable_layout(forward, long, SHAPE, CPU, torch.float32)
    assert max(sizes) <= 3 * 2 * (12 + 9)


def test_a_trainer_falls_back_as_a_whole_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    plain = runs.trainer(folder, tmp_path, batch_layout="padded", max_steps=2)
    plain.train()
    expected = runs.weights(plain.model)

    calls = []
    original = usable_layout

    def misread(forward: Any, *arguments: Any) -> str:
        calls.append(1)
        return original(ignoring(forward, **WRONG["its positions count through the row"]), *arguments)

    monkeypatch.setattr("mpo.training.reference_policy.usable_layout", misread)
    trainer = runs.trainer(folder, tmp_path, max_steps=2)
    trainer.train()
    assert calls == [1], "the layout is settled once"
    assert trainer.data_collator.shape.layout == "padded"
    assert runs.differing(expected, runs.weights(trainer.model)) == []
