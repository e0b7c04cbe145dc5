"""A judge against labels: formulas on random tables, and intervals on simulated judges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpo.common.misclassification import (
    accuracy,
    accuracy_intervals,
    drawn_interval,
    drawn_shares,
    rogan_gladen,
    wilson_share,
)
from mpo.common.statistics import cohen_kappa, wilson_interval


@pytest.mark.parametrize("seed", range(20))
def test_accuracy_is_that_of_the_answers_counted_one_by_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    size = int(random.integers(20, 80))
    strata, truth = random.integers(0, 3, size), random.random(size) < 0.4
    strata[:3], truth[:3], strata[3:6], truth[3:6] = [0, 1, 2], True, [0, 1, 2], False
    flagged = np.array([False, True, False])
    sizes = np.array([(strata == s).sum() for s in range(3)], dtype=float)
    positive = np.array([truth[strata == s].sum() for s in range(3)], dtype=float)

    found = accuracy(sizes, flagged, positive / sizes)

    verdict = flagged[strata]
    assert found.sensitivity == pytest.approx(verdict[truth].mean())
    assert found.specificity == pytest.approx((~verdict[~truth]).mean())
    assert found.kappa == pytest.approx(cohen_kappa(verdict.tolist(), truth.tolist()).kappa)
    # Everything is labelled: Wilson's interval of the counts.
    ends = accuracy_intervals(sizes, flagged, sizes, positive)
    assert ends[0] == pytest.approx(wilson_interval(int(verdict[truth].sum()), int(truth.sum())))
    assert ends[1] == pytest.approx(wilson_interval(int((~verdict[~truth]).sum()), int((~truth).sum())))
    # The correction of the judge's own rate is the share of labels, which is what it is an estimate of.
    corrected = rogan_gladen(verdict.mean(), found.sensitivity, found.specificity)
    if found.sensitivity + found.specificity > 1:
        assert float(corrected) == pytest.approx(truth.mean())
    else:
        assert math.isnan(corrected)


@pytest.mark.parametrize("seed", range(5))
def test_wilson_of_whole_numbers_is_scipys(seed: int) -> None:
    random = np.random.default_rng(seed)
    total = int(random.integers(1, 60))
    successes = int(random.integers(0, total + 1))
    for confidence in (0.8, 0.95):
        assert wilson_share(successes / total, total, confidence) == pytest.approx(
            wilson_interval(successes, total, confidence)
        )


def test_the_correction_stays_within_0_and_1_and_is_none_for_a_judge_that_guesses() -> None:
    rates = rogan_gladen(np.array([0.02, 0.99, 0.5, 0.5]), np.array(0.8), np.array(0.9))
    assert rates.tolist() == pytest.approx([0.0, 1.0, 0.4 / 0.7, 0.4 / 0.7])
    assert np.isnan(rogan_gladen(np.array(0.5), np.array([0.5, 0.3, 1.0]), np.array([0.5, 0.6, 0.0]))).all()


def test_draws_that_say_nothing_widen_the_interval_to_its_ends() -> None:
    draws = np.array([0.5] * 90 + [math.nan] * 10)
    assert drawn_interval(draws, 0.5, 0.9) == (0.0, 1.0)
    assert drawn_interval(draws[:90], 0.5, 0.9) == (0.5, 0.5)


def _sample(
    random: np.random.Generator, size: int, rate: float, sensitivity: float, specificity: float, each: int
) -> tuple[np.ndarray, ...]:
    """One judged set of answers and as many labels of either verdict: sizes, labels and positive labels by verdict."""
    truth = random.random(size) < rate
    verdict = np.where(truth, random.random(size) < sensitivity, random.random(size) >= specificity)
    sizes = np.array([(~verdict).sum(), verdict.sum()], dtype=float)
    labels, positive = np.zeros(2), np.zeros(2)
    for side in (0, 1):
        members = np.flatnonzero(verdict == bool(side))
        chosen = random.choice(members, min(each, len(members)), replace=False)
        labels[side], positive[side] = len(chosen), truth[chosen].sum()
    return sizes, labels, positive


@pytest.mark.parametrize(
    ("rate", "sensitivity", "specificity"), [(0.3, 0.8, 0.95), (0.08, 0.9, 0.9), (0.6, 0.98, 0.7)]
)
def test_a_stratified_sample_is_unbiased_and_its_intervals_cover(
    rate: float, sensitivity: float, specificity: float
) -> None:
    random = np.random.default_rng(7)
    flagged = np.array([False, True])
    found, hits = [], np.zeros(3)
    rounds, resamples = 400, 300
    for _ in range(rounds):
        sizes, labels, positive = _sample(random, 400, rate, sensitivity, specificity, 40)
        measured = accuracy(sizes, flagged, positive / labels)
        corrected = float(rogan_gladen(sizes[1] / 400, measured.sensitivity, measured.specificity))
        found.append((float((sizes * positive / labels).sum() / 400), corrected))
        drawn = random.multinomial(400, sizes / 400, size=resamples).astype(float)
        again = accuracy(drawn, flagged, drawn_shares(labels, positive, flagged, resamples, random))
        draws = rogan_gladen(drawn[:, 1] / 400, again.sensitivity, again.specificity)
        ends = [
            *accuracy_intervals(sizes, flagged, labels, positive),
            drawn_interval(draws, corrected, 0.95),
        ]
        truths = (sensitivity, specificity, rate)
        hits += [low <= true <= high for (low, high), true in zip(ends, truths, strict=True)]

    weighted, corrected_mean = np.mean(found, axis=0)
    assert weighted == pytest.approx(rate, abs=0.012) and corrected_mean == pytest.approx(rate, abs=0.012)
    assert (hits / rounds > 0.91).all(), hits / rounds


def test_counting_the_labels_without_weights_would_be_biased() -> None:
    """What the weights are for: as many labels of the rare verdict as of the common one make a judge look blameless."""
    random = np.random.default_rng(1)
    flagged = np.array([False, True])
    weighted, plain = [], []
    for _ in range(300):
        sizes, labels, positive = _sample(random, 1000, 0.2, 0.6, 0.99, 50)
        weighted.append(float(accuracy(sizes, flagged, positive / labels).sensitivity))
        plain.append(float(accuracy(labels, flagged, positive / labels).sensitivity))
    assert np.mean(weighted) == pytest.approx(0.6, abs=0.02)
    assert np.mean(plain) > 0.8


Quality = float | tuple[float, float]  # of each language, or of the first and the last


@pytest.mark.parametrize(
    ("languages", "settings"),
    [
        (1, [(24, 0.9, 0.985, 0.15), (24, 0.8, 0.95, 0.3), (50, 0.95, 0.99, 0.6)]),
        (3, [(12, 0.9, 0.985, 0.15), (24, 0.75, 0.99, 0.3), (50, 0.95, 0.95, 0.05)]),
        (10, [(12, 0.9, 0.985, 0.15), (12, 0.75, 0.99, 0.08)]),
        (10, [(24, (0.99, 0.75), (0.99, 0.85), (0.5, 0.1)), (50, 0.95, 0.95, 0.05)]),
    ],
)
def test_intervals_over_languages_cover_as_often_as_they_say(
    languages: int, settings: list[tuple[int, Quality, Quality, Quality]]
) -> None:
    """Sensitivity, specificity and kappa of all together, the corrected rate of the first language, and the mean of them."""
    random = np.random.default_rng(languages)
    covered = np.array([_covered(random, languages, each, *quality) for each, *quality in settings])
    assert (covered.mean(axis=0) > 0.93).all() and covered.min() > 0.9, covered


def _covered(random: np.random.Generator, languages: int, each: int, *quality: Quality) -> np.ndarray:
    """How often intervals of 95 % hold the truth, with as many labels of either verdict in each language."""
    rounds, answers, resamples, flagged = 300, 150, 200, np.array([True, False])
    everywhere = np.tile(flagged, languages)
    found, right, rate = (np.linspace(*np.broadcast_to(ends, 2), languages) for ends in quality)
    cells = np.stack(
        [rate * found, (1 - rate) * (1 - right), rate * (1 - found), (1 - rate) * right], axis=-1
    )
    totals = cells.reshape(-1, 2).sum(axis=1)  # by language and verdict; of cells also by label
    truths = np.array([*accuracy(totals, everywhere, cells[:, ::2].ravel() / totals), rate[0], rate.mean()])

    def corrected(weights: np.ndarray, shares: np.ndarray) -> np.ndarray:
        by_language = (*weights.shape[:-1], -1, 2)
        weights = weights.reshape(by_language)
        of_judge = accuracy(weights, flagged, shares.reshape(by_language))
        return rogan_gladen(weights[..., 0] / answers, of_judge.sensitivity, of_judge.specificity)

    counts = random.multinomial(answers, cells, size=(rounds, languages)).reshape(rounds, -1, 2)
    sizes = counts.sum(axis=-1).astype(float)
    labels = np.minimum(each, sizes)
    positive = random.hypergeometric(counts[..., 0], counts[..., 1], labels.astype(int)).astype(float)
    verdicts = sizes.reshape(rounds, languages, 2) / answers
    again = random.multinomial(answers, verdicts, size=(resamples, rounds, languages))
    again = again.reshape(resamples, rounds, -1).astype(float)
    shares = drawn_shares(labels, positive, everywhere, resamples, random)
    alone = drawn_shares(labels[:, :2], positive[:, :2], flagged, resamples, random)
    estimates = [
        accuracy(sizes, everywhere, positive / labels).kappa,
        corrected(sizes, positive / labels)[:, 0],
        corrected(sizes, positive / labels).mean(axis=-1),
    ]
    draws = [
        accuracy(again, everywhere, shares).kappa,
        corrected(again[..., :2], alone)[..., 0],
        corrected(again, shares).mean(axis=-1),
    ]
    hits = np.zeros(5)
    for n in range(rounds):
        ends = [
            *accuracy_intervals(sizes[n], everywhere, labels[n], positive[n]),
            *(drawn_interval(d[:, n], float(e[n]), 0.95) for d, e in zip(draws, estimates, strict=True)),
        ]
        hits += [low <= true <= high for (low, high), true in zip(ends, truths, strict=True)]
    return hits / rounds
