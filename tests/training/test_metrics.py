"""Metrics per language: the same from a training log and from scored pairs, and as a plain computation has them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from mpo.modeling.pairs import PairTensors
from mpo.training import metrics as subject
from mpo.training.metrics import LanguageMetrics, evaluation_metrics
from mpo.training.ranks import SingleRank
from mpo.training.records import PairScore, Scores

LANGUAGES = ["bn", "ja", "sw"]
BETA = 1.5
ALONE = SingleRank(torch.device("cpu"))


def records(count: int, seed: int, languages: list[str] = LANGUAGES) -> list[PairScore]:
    rng = random.Random(seed)
    found = []
    for group in range(count):
        chosen, rejected, reference = (rng.uniform(-6, 0) for _ in range(3))
        language = rng.choice(languages)
        found.append(PairScore(group, language, False, chosen, rejected, chosen - rejected, reference))
    return found


def tensors(pairs: list[PairScore], retention: list[float]) -> PairTensors:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return PairTensors(
        chosen_logps=column([pair.chosen for pair in pairs]),
        rejected_logps=column([pair.rejected for pair in pairs]),
        reference_gap=column([pair.reference_gap for pair in pairs]),
        retention=column(retention),
        language=torch.tensor([LANGUAGES.index(pair.language) for pair in pairs]),
        group_of_pair=torch.tensor([pair.group for pair in pairs]),
    )


def plain(pairs: list[PairScore]) -> dict[str, float]:
    """The metrics of each language, pair by pair."""
    found = {}
    for language in LANGUAGES:
        own = [pair for pair in pairs if pair.language == language]
        if own:
            found[f"reward_gap/{language}"] = sum(p.chosen - p.rejected for p in own) / len(own)
            found[f"gap_to_source/{language}"] = sum(p.gap - p.reference_gap for p in own) / len(own)
            found[f"positive/{language}"] = sum(p.chosen > p.rejected for p in own) / len(own)
            found[f"logps/chosen/{language}"] = sum(p.chosen for p in own) / len(own)
            found[f"logps/rejected/{language}"] = sum(p.rejected for p in own) / len(own)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_log_and_an_evaluation_of_the_same_pairs_agree_with_a_plain_computation(seed: int) -> None:
    pairs = records(random.Random(seed).randint(1, 30), seed)
    retention = [random.Random(seed + i).uniform(0, 3) for i in range(len(pairs))]
    delta = 0.8 if seed % 2 else None
    metrics = LanguageMetrics(LANGUAGES, beta=BETA, dtype=torch.float64, delta=delta)
    for start in range(0, len(pairs), 4):  # some micro-batches
        part = slice(start, start + 4)
        metrics.add(tensors(pairs[part], retention[part]), torch.ones(len(pairs[part])))
    logged = metrics.log(1, ALONE)
    source = PairScore(0, "en", True, -1.0, -50.0, 49.0, 0.0)
    evaluated = evaluation_metrics(Scores([source, *pairs], 0.25, 0), 0.5, LANGUAGES)
    assert (evaluated.pop("loss"), evaluated.pop("loss/retention")) == (0.5, 0.25)
    expected = plain(pairs)
    assert evaluated == pytest.approx(expected, abs=1e-12)
    errors = [abs(BETA * pair.gap - pair.reference_gap) for pair in pairs]
    losses = [e**2 if delta is None or e < delta else delta * (2 * e - delta) for e in errors]
    assert logged.pop("loss/reward_gap") == pytest.approx(sum(losses) / len(pairs))
    assert logged.pop("loss/retention") == pytest.approx(sum(retention) / len(pairs))
    assert logged == pytest.approx(expected, abs=1e-12)
    assert list(logged) == list(evaluated) == list(expected)


@pytest.mark.parametrize("seed", range(3))
def test_what_greedy_decoding_says_is_what_lies_nowhere_below_it(seed: int) -> None:
    rng = random.Random(seed)
    pairs = records(20, seed)
    below = [[rng.choice([0.0, -1e-7, -3.0]) for _ in range(2)] for _ in pairs]
    found = tensors(pairs, [0.0] * len(pairs))
    found.below_greedy = torch.tensor(below)
    metrics = LanguageMetrics(LANGUAGES, beta=BETA, dtype=torch.float64, knows_greedy=True)
    metrics.add(found, torch.ones(len(pairs)))
    logged = metrics.log(1, ALONE)
    for place, name in enumerate(("chosen", "rejected")):
        for language in LANGUAGES:
            own = [
                value[place] == 0
                for pair, value in zip(pairs, below, strict=True)
                if pair.language == language
            ]
            assert logged[f"greedy/{name}/{language}"] == pytest.approx(sum(own) / len(own), abs=1e-12)


def test_the_time_of_a_pause_is_not_that_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 20.0])
    monkeypatch.setattr(subject.time, "monotonic", lambda: next(times))
    metrics = LanguageMetrics(LANGUAGES, beta=BETA)
    metrics.pause(5.0)  # before the first log there is no speed
    for step in (1, 2):
        pairs = records(8, step)
        metrics.add(tensors(pairs, [0.0] * len(pairs)), torch.ones(len(pairs)))
        speed = metrics.log(step, ALONE).get("pairs_per_second")
        metrics.pause(6.0)
    assert speed == 8 / 4.0


def test_fillers_count_nowhere_and_a_log_begins_the_next() -> None:
    pairs, others = records(9, 1), records(4, 2)
    fillers = records(5, 3)
    metrics = LanguageMetrics(LANGUAGES, beta=BETA, dtype=torch.float64)
    counts = torch.tensor([1.0] * len(pairs) + [0.0] * len(fillers))
    metrics.add(tensors([*pairs, *fillers], [0.0] * len(counts)), counts)
    logged = metrics.log(1, ALONE)
    assert {name: logged[name] for name in plain(pairs)} == pytest.approx(plain(pairs))
    assert metrics.log(2, ALONE) == {}
    metrics.add(tensors(others, [0.0] * len(others)), torch.ones(len(others)))
    assert metrics.means() == pytest.approx(plain(others))


def test_the_speed_is_of_the_time_and_pairs_since_the_log_of_an_earlier_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([10.0, 12.0, 16.0])
    monkeypatch.setattr(subject.time, "monotonic", lambda: next(times))
    metrics = LanguageMetrics(LANGUAGES, beta=BETA)
    speeds: list[Any] = []
    for step in (1, 1, 2):  # the second log is of the same step
        pairs = records(8, step)
        metrics.add(tensors(pairs, [0.0] * len(pairs)), torch.ones(len(pairs)))
        speeds.append(metrics.log(step, ALONE).get("pairs_per_second"))
    assert speeds == [None, None, 8 / 4.0]


def test_a_log_is_of_the_pairs_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = LanguageMetrics(LANGUAGES, beta=BETA, knows_greedy=True)
    # One language's count, gap, gap to source, positive, chosen, rejected, gap loss, retention, and of how many greedy decoding
    # says the responses, summed over pairs.
    own = [3.0, 6.0, 3.0, 3.0, -3.0, -9.0, 12.0, 3.0, 2.0, 1.0]
    other = [1.0, -2.0, 1.0, 0.0, -5.0, -3.0, 4.0, 5.0, 0.0, 0.0]
    metrics._sums[0] = torch.tensor(own)
    reductions: list[torch.Size] = []

    def all_reduce(values: Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        assert op == torch.distributed.ReduceOp.SUM
        reductions.append(values.shape)
        values[0] += torch.tensor(other)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(subject.time, "monotonic", lambda: 102.0)
    metrics._last_log = (100.0, 0)
    two: Any = SingleRank(torch.device("cpu"))
    two.num_processes = 2
    language = LANGUAGES[0]
    assert metrics.log(1, two) == {
        "loss/reward_gap": 4.0,
        "loss/retention": 2.0,
        "pairs_per_second": 2.0,
        f"reward_gap/{language}": 1.0,
        f"gap_to_source/{language}": 1.0,
        f"positive/{language}": 0.75,
        f"logps/chosen/{language}": -2.0,
        f"logps/rejected/{language}": -3.0,
        f"greedy/chosen/{language}": 0.5,
        f"greedy/rejected/{language}": 0.25,
    }
    assert not metrics._sums.any()
    assert reductions == [(len(LANGUAGES), 10)], "one call per log, of one shape whatever a rank has seen"
