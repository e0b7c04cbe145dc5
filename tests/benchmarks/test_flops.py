"""The counting: parts against closed formulas, trees against the rule of who sees whom."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import command, flops, lengths
from benchmarks.lengths import GroupLengths, PairLengths
from mpo.errors import ConfigError, DataError
from mpo.modeling.masks import dense_mask
from mpo.modeling.trees import Tree, build_batch
from tests.tiny import build_model

part = st.integers(1, 12)
pair = st.builds(PairLengths, part, part, part)


def linear_parameters(family: str) -> tuple[int, int]:
    """Weights of all linear layers but the LM head; the smallest number that their inputs and outputs sum to."""
    model = build_model(family)
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]
    return sum(m.weight.numel() for m in layers), sum(m.in_features + m.out_features for m in layers)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_full_fine_tuning_costs_two_operations_a_weight_forward_and_four_backward(family: str) -> None:
    config = build_model(family).config
    costs = flops.measure(config, lora=0)
    weights, _ = linear_parameters(family)
    width = config.num_attention_heads * config.head_dim
    scores = 4 * width * config.num_hidden_layers
    logits = 2 * config.vocab_size * config.hidden_size
    # Rotary frequencies are a product of matrices, too, of one column.
    extra = costs.reference.token - 2 * weights
    assert 0 <= extra <= 0.01 * weights
    assert costs.reference.score == scores
    assert costs.train.token == 6 * weights + extra
    assert costs.train.score == 3 * scores
    assert (costs.logits, costs.logits_train) == (logits, 3 * logits)
    assert costs.kernel_train == costs.own_train == 4 * logits


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_with_lora_frozen_weights_have_no_gradient(family: str) -> None:
    config = build_model(family).config
    full, lora = flops.measure(config, lora=0), flops.measure(config, lora=2)
    weights, widths = linear_parameters(family)
    assert lora.reference == full.reference
    adapter = 2 * 2 * widths  # forward, rank 2
    # The gradient of the first layer's input is needed by nobody.
    assert 4 * weights * 0.75 < lora.train.token - 3 * adapter <= 4 * weights + 0.01 * weights
    logits = lora.logits
    assert (lora.logits_train, lora.own_train, lora.kernel_train) == (2 * logits, 2 * logits, 3 * logits)


@given(st.lists(pair, min_size=1, max_size=4))
def test_visible_scores_are_the_ones_of_the_mask(pairs: list[PairLengths]) -> None:
    trees = [Tree([1] * p.prompt, [1] * p.chosen, [1] * p.rejected) for p in pairs]
    batch = build_batch(trees, layout="tree", max_tokens_per_row=10**6, pad_token_id=0, pooling="mean")
    mask = dense_mask(batch["tree_ids"], batch["branch_ids"], batch["position_ids"])
    assert sum(map(flops.visible_scores, pairs)) == int(mask.sum())


@given(pair, st.lists(pair, min_size=1, max_size=5), st.integers(1, 60))
def test_no_formulation_does_less_than_the_trees_and_visible_scores_are_a_part(
    source: PairLengths, targets: list[PairLengths], row_tokens: int
) -> None:
    group = GroupLengths(source, tuple(targets))
    (trees,) = flops.calls("trees", group)
    assert trees.tokens == sum(p.tree for p in group.trees)
    assert trees.head_tokens == sum(p.responses for p in targets)
    for name in (*flops.FORMULATIONS, flops.REFERENCE):
        for call in flops.calls(name, group, row_tokens):
            assert call.visible <= call.scores
            if name not in ("TRL DPO", flops.REFERENCE):
                assert sum(c.tokens for c in flops.calls(name, group, row_tokens)) >= trees.tokens


def test_the_official_formulation_pads_each_pair_alone_to_eight() -> None:
    group = GroupLengths(PairLengths(3, 4, 6), (PairLengths(5, 9, 2), PairLengths(2, 3, 20)))
    found = [(c.part, c.tokens, c.head, c.head_tokens) for c in flops.calls("official", group)]
    source = [("train", 32, "logits", 32), ("reference", 32, "logits", 32)]
    first, second = ("train", 32, "logits_train", 32), ("train", 48, "logits_train", 48)
    assert found == [source[0], first, source[1], source[0], second, source[1]]
    batched = [(c.part, c.tokens) for c in flops.calls("official, batched", group)]
    assert batched == [("train", 4 * 16), ("train", 4 * 24), ("reference", 4 * 16)]


def test_an_unknown_formulation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'fast'.*official"):
        flops.calls("fast", GroupLengths(PairLengths(1, 1, 1), (PairLengths(1, 1, 1),)))


# ---- Lengths -------------------------------------------------------------------------------------------------------


def write_table(path: Path, rows: list[str]) -> Path:
    header = "file,source_id,source_prompt,source_chosen,source_rejected,target_prompt,target_chosen,target_rejected"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_a_table_is_read_by_source_with_the_template_added_and_cut(tmp_path: Path) -> None:
    table = write_table(
        tmp_path / "lengths.csv",
        ["a,7,10,5,50,20,1,2", "b,7,1,1,1,1,1,1", "a,8,1,1,1,2,2,2", "a,7,10,5,50,9,99,3"],
    )
    first, second = lengths.read_csv(table, "a", template_tokens=15, max_length=60)
    assert first == GroupLengths(PairLengths(25, 5, 35), (PairLengths(35, 1, 2), PairLengths(24, 36, 3)))
    assert second == GroupLengths(PairLengths(16, 1, 1), (PairLengths(17, 2, 2),))
    assert len(lengths.read_csv(table, None, 15, 60)) == 2


def test_responses_alone_can_be_cut() -> None:
    group = GroupLengths(PairLengths(70, 5, 35), (PairLengths(35, 64, 65),))
    assert lengths.shorten([group], None) == [group]
    assert lengths.shorten([group], 20) == [GroupLengths(PairLengths(70, 5, 20), (PairLengths(35, 20, 20),))]


@pytest.mark.parametrize(
    ("rows", "part", "message"),
    [
        (["a,7,10,5,50,20,1,2"], "c", r"no rows with file='c'"),
        (["a,7,10,x,50,20,1,2"], "a", r"line 2: expected whole numbers"),
        (["a,7,10"], "a", r"line 2: expected whole numbers"),
        (["a,7,10,5,50,90,1,2"], "a", r"does not fit max_length=60"),
        (["a,7,10,5,50,20,0,2"], "a", r"0 chosen"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_by_name(
    rows: list[str], part: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        lengths.read_csv(write_table(tmp_path / "lengths.csv", rows), part, 15, 60)


def test_a_missing_table_is_one_message_and_exit_code_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["flops", "--lengths", "nowhere.csv"])
    with pytest.raises(SystemExit) as stop:
        command.run(flops.main)
    assert stop.value.code == 2
    assert "nowhere.csv" in capsys.readouterr().err


@given(st.lists(st.builds(GroupLengths, pair, st.lists(pair, min_size=1, max_size=3).map(tuple)), max_size=3))
def test_drawn_tokens_have_the_lengths_they_were_drawn_for(groups: list[GroupLengths]) -> None:
    drawn = lengths.draw_tokens(groups, vocabulary=40, seed=random.Random(0).randrange(9))
    assert lengths.of_groups(drawn) == groups
    for group in drawn:
        assert all(0 <= token < 40 for token in group["source_prompt"])


# ---- The figures of the papers' data -------------------------------------------------------------------------------

DATA = os.environ.get("MPO_TEST_DATA")


@pytest.mark.skipif(not DATA, reason="MPO_TEST_DATA is not set")
@pytest.mark.parametrize("shape", flops.DEFAULT_SHAPES)
def test_trees_save_what_the_documentation_says_on_the_papers_lengths(shape: str) -> None:
    costs = flops.costs_of(shape, 16)
    for file, least in (("llama", 1.65), ("gemma", 2.65)):
        groups = lengths.read_csv(Path(str(DATA)) / "mpo" / "token_lengths.csv", file, 15, 1024)
        for visible_only in (False, True):
            totals = flops.epoch(costs, groups, visible_only=visible_only)
            assert totals["official"] / totals["trees"] >= least


def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flops, "shape_config", lambda name: build_model(name).config)
    table = write_table(tmp_path / "lengths.csv", ["a,7,10,5,50,20,1,2", "a,7,10,5,50,9,99,3"])
    out = tmp_path / "flops.json"
    monkeypatch.setattr(
        sys, "argv", ["flops", "--lengths", str(table), "--shapes", "llama", "--out", str(out), "--lora", "2"]
    )
    flops.main()
    printed = capsys.readouterr().out
    counted = json.loads(out.read_text())["shapes"]["llama"]["computed"]
    assert set(counted["operations"]) == {*flops.FORMULATIONS, flops.REFERENCE}
    assert f"{counted['official_over_trees']:.2f}" in printed
    assert counted["official_over_trees"] > 1
