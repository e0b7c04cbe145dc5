"""Groups, pairs and tokens are counted as a person would, and steps as the training loop takes them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo.data.contract import PARTS
from mpo.data.tokenization import TOKENIZED_FEATURES
from mpo.errors import DataError
from mpo.training.trainer import MPOTrainer
from mpo.training.workload import (
    assume_work,
    count_work,
    group_tokens,
    largest_micro_batch,
    longest_tree,
    schedule,
    seen_by_step,
    train_sampler,
)
from tests import runs
from tests.tiny import build_model, build_tokenizer, random_groups

Part = list[int]


def tokenized(groups: list[list[tuple[Part, Part, Part]]]) -> Dataset:
    """Groups of pairs of ``(prompt, chosen, rejected)`` ids; the first pair of each is the source."""
    rows = []
    for source, *targets in groups:
        row: dict[str, Any] = {f"source_{part}": ids for part, ids in zip(PARTS, source, strict=True)}
        for place, part in enumerate(PARTS):
            row[f"target_{part}"] = [target[place] for target in targets]
        row |= {"target_language": ["bn"] * len(targets), "row": [0] * len(targets)}
        rows.append({**row, "origin": "x", "errors": []})
    return Dataset.from_list(rows, features=TOKENIZED_FEATURES)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from(["tree", "padded"]), st.booleans())
def test_the_tokens_of_a_group_are_those_that_are_run(
    seed: int, run_source: bool, layout: str, select: bool
) -> None:
    rng = np.random.default_rng(seed)

    def part() -> Part:
        return rng.integers(0, 2, rng.integers(1, 9)).tolist()

    groups = [
        [(part(), part(), part()) for _ in range(int(rng.integers(2, 5)))]
        for _ in range(int(rng.integers(1, 30)))
    ]
    groups += [[groups[0][0], *group[1:]] for group in groups[:3]]  # sources that occur again
    dataset = tokenized(groups)
    if select:
        places = rng.permutation(len(groups))[: max(1, len(groups) // 2)]
        dataset, groups = dataset.select(places), [groups[i] for i in places]
    copies = 1 if layout == "tree" else 2
    expected = [
        sum(copies * len(p) + len(c) + len(r) for p, c, r in group[0 if run_source else 1 :])
        for group in groups
    ]
    assert group_tokens(dataset, run_source=run_source, layout=layout).tolist() == expected
    trees = [len(p) + len(c) + len(r) for group in groups for p, c, r in group]
    assert longest_tree(dataset) == max(trees)

    args = runs.config(Path("unused"), retain_weight=float(run_source), batch_layout=layout)
    work = count_work(dataset, args)
    assert work.group_tokens.tolist() == expected
    assert (work.groups, work.tokens, work.longest_tree) == (len(groups), sum(expected), max(trees))
    run = [pair for group in groups for pair in group[0 if run_source else 1 :]]
    assert (work.trees, work.tree_tokens) == (len(run), sum(len(part) for pair in run for part in pair))
    pairs = [(group[0], target) for group in groups for target in group[1:]]
    assert work.pairs == len(pairs)

    def in_official_batch(p: Part, c: Part, r: Part) -> int:
        return 2 * 8 * math.ceil(max(len(p + c), len(p + r)) / 8)

    assert work.official_tokens == sum(in_official_batch(*side) for pair in pairs for side in pair)
    unique = {tuple(map(tuple, group[0])) for group in groups}
    assert work.reference_tokens == sum(len(part) for source in unique for part in source)


@pytest.mark.parametrize("retain_weight", [0.0, 1.0])
@pytest.mark.parametrize(
    "grouping",
    [{}, {"max_targets_per_group": 2}, {"max_targets_per_group": 9}, {"group_by_source": False}],
    ids=str,
)
def test_work_is_assumed_as_data_of_that_shape_would_be_counted(
    grouping: dict[str, Any], retain_weight: float
) -> None:
    args = runs.config(Path("unused"), retain_weight=retain_weight, **grouping)
    limit = grouping.get("max_targets_per_group", 5) if grouping.get("group_by_source", True) else 1

    def pair(first: int) -> tuple[Part, Part, Part]:
        return [first], [1, 2, 3], [4, 5]

    groups = [
        [pair(source), *(pair(0) for _ in range(min(limit, 5 - start)))]
        for source in range(3)
        for start in range(0, 5, limit)
    ]
    counted = vars(count_work(tokenized(groups), args))
    assumed = vars(assume_work(args, sources=3, targets=5, tree_tokens=6))
    assert assumed.pop("group_tokens").tolist() == counted.pop("group_tokens").tolist()
    assert {**assumed, "official_tokens": counted["official_tokens"]} == counted


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    ranks=st.integers(1, 8),
    accumulation=st.integers(1, 5),
    budget=st.one_of(st.none(), st.integers(1, 2000)),
    batch_size=st.integers(1, 4),
    drop_last=st.booleans(),
    epochs=st.sampled_from([0.3, 1, 1.5, 3]),
    max_steps=st.sampled_from([-1, 1, 7]),
)
def test_the_steps_are_those_of_a_loop_over_the_micro_batches(
    tokens: list[int],
    ranks: int,
    accumulation: int,
    budget: int | None,
    batch_size: int,
    drop_last: bool,
    epochs: float,
    max_steps: int,
) -> None:
    args = runs.config(
        Path("unused"),
        gradient_accumulation_steps=accumulation,
        max_tokens_per_batch=budget,
        per_device_train_batch_size=1 if budget else batch_size,
        dataloader_drop_last=drop_last,
        num_train_epochs=epochs,
        max_steps=max_steps,
    )
    sizes = np.array(tokens)

    def micro_batches(rank: int) -> list[list[int]]:
        return list(train_sampler(args, np.arange(len(sizes)), sizes, num_ranks=ranks, rank=rank))

    try:
        drawn = [micro_batches(rank) for rank in range(ranks)]
    except DataError as error:
        assert drop_last and f"{len(tokens)} groups are less than one micro-batch" in str(error)
        with pytest.raises(DataError):
            schedule(sizes, args, ranks)
        return
    steps_of_an_epoch = len(range(0, len(drawn[0]), accumulation))
    found = schedule(sizes, args, ranks)
    assert found.micro_batches == len(drawn[0])
    assert found.steps == (max_steps if max_steps > 0 else math.ceil(epochs * steps_of_an_epoch))
    assert found.epochs == (max_steps / steps_of_an_epoch if max_steps > 0 else epochs)
    largest = largest_micro_batch(sizes, args)
    for batch in (batch for batches in drawn for batch in batches):
        assert sum(tokens[group] for group in batch if group >= 0) <= largest


def test_the_largest_micro_batch_is_of_the_largest_groups_or_of_the_budget() -> None:
    sizes = np.array([5, 9, 2, 7])

    def largest(**settings: Any) -> int:
        return largest_micro_batch(sizes, runs.config(Path("unused"), **settings))

    assert [largest(per_device_train_batch_size=n) for n in (1, 2, 4, 9)] == [9, 16, 23, 23]
    assert [largest(max_tokens_per_batch=n) for n in (1, 9, 12, 100)] == [9, 9, 12, 23]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
        {"max_tokens_per_batch": 60, "group_by_source": False},
        {"loss_type": ["sigmoid"], "train_on": "both", "max_targets_per_group": 1},
        {"loss_type": ["sigmoid"], "train_on": "source", "max_targets_per_group": 1},
    ],
    ids=str,
)
def test_what_a_run_is_counted_to_see_is_what_it_sees(tmp_path: Path, options: dict[str, Any]) -> None:
    class Counting(MPOTrainer):
        counted = 0

        def _checked_pair_loss(self, pairs: Any) -> Any:
            if self.model.training:
                self.counted += len(pairs.chosen_logps)
            return super()._checked_pair_loss(pairs)

    rows = random_groups(2, 7, (1, 4), words=(1, 5))
    trainer = runs.trainer(
        build_model("llama"),
        tmp_path,
        [*rows, rows[0]],
        kind=Counting,
        processing_class=build_tokenizer("llama"),
        max_steps=9,
        **options,
    )
    trainer.train()
    steps = seen_by_step(trainer.train_dataset, trainer.args, kept=trainer.trained_groups)
    seen = next(itertools.islice(steps, 8, None))
    assert (seen.steps, seen.pairs) == (9, trainer.counted)
    assert seen.tokens > seen.pairs
