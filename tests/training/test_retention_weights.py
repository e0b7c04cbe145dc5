"""Weights of the retention that adapt to a target, against the same rule written out in Python's floats."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from mpo.modeling.pairs import PairTensors
from mpo.training.ranks import SingleRank
from mpo.training.retention_weights import DECAY, GAIN, HIGHEST, LARGEST_ERROR, LOWEST, RetentionWeights

LANGUAGES = ["ar", "bn", "en"]
ALONE = SingleRank(torch.device("cpu"))


def pairs(rows: list[tuple[str, float, bool]]) -> PairTensors:
    """Pairs of (language, retention, whether it is harmless)."""
    nothing = torch.zeros(len(rows))
    return PairTensors(
        chosen_logps=nothing,
        rejected_logps=nothing,
        reference_gap=nothing,
        retention=torch.tensor([retention for _, retention, _ in rows]),
        language=torch.tensor([LANGUAGES.index(code) for code, _, _ in rows], dtype=torch.long),
        group_of_pair=nothing.long(),
        is_harmless=torch.tensor([harmless for *_, harmless in rows], dtype=torch.bool),
    )


def refusals(rows: list[tuple[str, float, bool]]) -> PairTensors:
    """The same with how far the rejected response is below greedy decoding's, whose third power is given, in place of the retention."""
    below = torch.tensor([math.log(value) / 3 for _, value, _ in rows])
    return replace(
        pairs([(code, 1e6, harmless) for code, _, harmless in rows]),
        below_greedy=torch.stack([torch.full_like(below, -1e6), below], dim=1),
    )


def plainly(
    steps: list[list[tuple[str, float, bool, int]]], weight: float, target: float
) -> dict[str, float]:
    """Weights after the steps: of each language a running mean without bias, and the bounded rule."""
    weights = dict.fromkeys(LANGUAGES, weight)
    for code in LANGUAGES:
        seen: list[float] = []
        reached = False
        for step in steps:
            own = [r for language, r, harmless, count in step if language == code and harmless and count]
            if not own:
                continue
            seen.append(sum(own) / len(own))
            ages = [DECAY**age for age in range(len(seen))]
            mean = sum(a * m for a, m in zip(ages, reversed(seen), strict=True)) / sum(ages)
            error = min(max(mean / target - 1, -1.0), LARGEST_ERROR)
            reached = reached or error >= 0
            weights[code] *= math.exp(GAIN * (error if reached else 0.0))
            weights[code] = min(max(weights[code], LOWEST * weight), HIGHEST * weight)
    return weights


@pytest.mark.parametrize("of_refusals", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_each_language_has_the_weight_of_the_rule(seed: int, of_refusals: bool) -> None:
    rng = random.Random(seed)
    weight, target = rng.choice([0.5, 10.0]), rng.choice([0.01, 0.3])
    found = RetentionWeights(LANGUAGES, weight, target, of_refusals=of_refusals)
    of_rows = refusals if of_refusals else pairs
    steps = []
    for _ in range(rng.choice([1, 40, 120])):
        step = [
            (rng.choice(LANGUAGES[:2] if seed % 2 else LANGUAGES), rng.expovariate(1 / target), rng.random() < 0.6, int(rng.random() < 0.8))
            for _ in range(rng.randint(0, 6))
        ]  # fmt: skip
        cut = rng.randint(0, len(step))  # two micro-batches
        for part in (step[:cut], step[cut:]):
            found.add(of_rows([row[:3] for row in part]), torch.tensor([float(row[3]) for row in part]))
        found.step(ALONE)
        steps.append(step)
    expected = plainly(steps, weight, target)
    assert found.values.tolist() == pytest.approx([expected[code] for code in LANGUAGES], rel=1e-4)
    logged = found.log()
    seen = {row[0] for step in steps for row in step if row[2] and row[3]}
    assert {name.rpartition("/")[2] for name in logged} == seen
    for code in seen:
        assert logged[f"harmless/retain_weight/{code}"] == pytest.approx(expected[code], rel=1e-4)
        assert f"harmless/{'refusal' if of_refusals else 'retention'}/{code}" in logged


def test_a_language_is_brought_to_the_target_by_the_weight_that_it_needs() -> None:
    """Where the retention falls as its weight grows, both languages end at the target, with different weights."""
    found = RetentionWeights(LANGUAGES, 10.0, 0.05)
    strength = {"ar": 0.8, "bn": 5.0}  # 0.08 and 0.5 to begin with
    for _ in range(1500):
        now = dict(zip(LANGUAGES, found.values.tolist(), strict=True))
        found.add(pairs([(code, c / now[code], True) for code, c in strength.items()]), torch.ones(2))
        found.step(ALONE)
    weights = dict(zip(LANGUAGES, found.values.tolist(), strict=True))
    assert weights["ar"] == pytest.approx(0.8 / 0.05, rel=0.02)
    assert weights["bn"] == pytest.approx(5.0 / 0.05, rel=0.02)
    assert weights["en"] == 10.0 and math.isfinite(weights["en"])
    assert found.missed() == {}


def test_what_was_adapted_goes_on_exactly_where_it_was() -> None:
    rng = random.Random(3)
    whole, halves = (RetentionWeights(LANGUAGES, 3.0, 0.1) for _ in range(2))
    for step in range(20):
        batch = pairs([(rng.choice(LANGUAGES), rng.random(), True) for _ in range(2)])
        for each in (whole, halves):
            each.add(batch, torch.ones(2))
            each.step(ALONE)
        if step == 9:
            state, halves = halves.state(), RetentionWeights(LANGUAGES, 3.0, 0.1)
            halves.add(batch, torch.ones(2))  # of a step that was not taken
            halves.restore(state)
    assert torch.equal(whole.values, halves.values) and whole.log() == halves.log()


def test_pairs_without_kinds_change_nothing() -> None:
    found = RetentionWeights(LANGUAGES, 3.0, 0.1)
    batch = pairs([("ar", 5.0, True)])
    batch.is_harmless = None
    found.add(batch, torch.ones(1))
    found.step(ALONE)
    assert found.values.tolist() == [3.0, 3.0, 3.0] and found.log() == {}


def test_only_a_language_that_stays_far_from_the_target_is_named() -> None:
    found = RetentionWeights(LANGUAGES, 3.0, 0.1)
    for _ in range(30):
        found.add(pairs([("ar", 0.19, True), ("bn", 0.35, True)]), torch.ones(2))
        found.step(ALONE)
    assert found.missed() == {"bn": pytest.approx(0.35, rel=1e-4)}
    weights = found.values.tolist()
    assert found.summary() == (
        f"Retention of harmless prompts, target 0.1: ar 0.190 (weight {weights[0]:.3g}) and bn 0.350 "
        f"(weight {weights[1]:.3g})"
    )


def test_of_refusals_the_words_are_others(caplog: pytest.LogCaptureFixture) -> None:
    found = RetentionWeights(LANGUAGES, 3.0, 0.1, of_refusals=True)
    for _ in range(30):
        found.add(refusals([("ar", 0.19, True), ("bn", 0.35, True), ("en", 0.001, True)]), torch.ones(3))
        found.step(ALONE)
    assert found.summary().endswith("and en 0.001 (weight 3, as it began)")
    assert found.summary().startswith("Share refused of harmless prompts, target 0.1: ar 0.190 (weight")
    found.warn_if_missed()
    assert (
        "`harmless_refusal_target: 0.1` was not held in bn (0.35): there, more harmless prompts"
        in caplog.text
    )


def test_rare_large_moves_around_the_target_neither_raise_a_weight_nor_an_alarm() -> None:
    """One pair in twenty comes to be refused, which moves it by a nat: that is a target of 0.05."""
    rng, alarms, logs = random.Random(0), 0, []
    for _ in range(60):
        found = RetentionWeights(["en"], 3.0, 0.05)
        for _ in range(170):
            found.add(pairs_of_english(float(rng.random() < 0.05)), torch.ones(1))
            found.step(ALONE)
        alarms += bool(found.missed())
        logs.append(math.log(found.values.item() / 3.0))
    assert alarms <= 6
    assert abs(sum(logs) / len(logs)) < 0.7  # of a range of -2.3 to 4.6


def pairs_of_english(retention: float) -> PairTensors:
    return replace(pairs([("ar", retention, True)]), language=torch.tensor([0]))


def test_a_step_that_is_not_taken_changes_nothing() -> None:
    found = RetentionWeights(LANGUAGES, 3.0, 0.1)
    found.add(pairs([("ar", 5.0, True)]), torch.ones(1))
    found.forget_step()
    found.step(ALONE)
    found.add(pairs([("bn", 5.0, True)]), torch.ones(1))
    found.step(ALONE, taken=False)
    found.step(ALONE)
    assert found.values.tolist() == [3.0, 3.0, 3.0] and found.log() == {}


def test_a_weight_does_not_fall_before_anything_has_moved() -> None:
    found = RetentionWeights(LANGUAGES, 3.0, 0.1)
    values = []
    for retention in [0.0] * 20 + [2.0] + [0.0] * 100:
        found.add(pairs([("ar", retention, True)]), torch.ones(1))
        found.step(ALONE)
        values.append(found.values[0].item())
    assert set(values[:20]) == {3.0} and values[20] > 3.0 and values[-1] < 3.0
