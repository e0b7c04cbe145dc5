"""Probes: their AUROC, against scikit-learn, and that none is tested on what it was trained on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from mpo.hidden_space.probe import auroc, fold_auroc, fold_ranks, folds_of, train_probe
from tests.hidden_space.clouds import labels, rotation


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    harmful=st.integers(1, 20),
    harmless=st.integers(1, 20),
    levels=st.integers(1, 30),
)
def test_auroc_is_scikit_learns_with_ties_and_weights(
    seed: int, harmful: int, harmless: int, levels: int
) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.permutation(labels(harmful, harmless))
    scores = rng.integers(0, levels, len(truth)) / levels
    weights = rng.integers(1, 4, (2, len(truth))).astype(np.float32)
    assert auroc(scores, truth)[0] == pytest.approx(roc_auc_score(truth, scores))
    assert auroc(scores, truth, weights) == pytest.approx(
        [roc_auc_score(truth, scores, sample_weight=row) for row in weights]
    )
    # Only the order of the scores counts, and turning it around mirrors the area.
    assert auroc(np.exp(3 * scores), truth)[0] == pytest.approx(auroc(scores, truth)[0])
    assert auroc(-scores, truth)[0] == pytest.approx(1 - auroc(scores, truth)[0])


def test_the_texts_of_a_unit_share_their_fold_and_classes_are_spread_evenly() -> None:
    unit = np.tile(np.arange(40), 2)
    fold = folds_of(unit, labels(40, 40), 5, 0)
    assert (fold[:40] == fold[40:]).all()
    fold = folds_of(np.arange(100), labels(30, 70), 5, 0)
    assert np.bincount(fold[:30]).tolist() == [6] * 5
    assert np.bincount(fold[30:]).tolist() == [14] * 5


def test_a_fold_depends_on_the_unit_and_not_on_its_place() -> None:
    harmful = labels(20, 20)
    order = np.random.default_rng(0).permutation(40)
    assert (folds_of(order, harmful[order], 5, 3) == folds_of(np.arange(40), harmful, 5, 3)[order]).all()


def test_a_probe_finds_a_direction_and_nothing_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    points, harmful = rng.standard_normal((400, 20)), labels(200, 200)
    fold = folds_of(np.arange(400), harmful, 5, 0)
    # More dimensions than a probe could resist remembering, if it were tested on its own training texts.
    wide = rng.standard_normal((400, 500))
    assert fold_auroc(train_probe(wide, harmful, fold).scores(wide, fold), harmful, fold)[0] == pytest.approx(
        0.5, abs=0.08
    )
    points[harmful, 3] += 2
    found = fold_auroc(train_probe(points, harmful, fold).scores(points, fold), harmful, fold)[0]
    assert found == pytest.approx(0.921, abs=0.04)  # Phi(2 / sqrt(2))


def test_a_probe_of_one_language_works_in_another_that_has_its_direction_and_only_there() -> None:
    rng = np.random.default_rng(1)
    harmful = labels(300, 300)
    fold = folds_of(np.arange(600), harmful, 5, 0)

    def language(direction: int) -> np.ndarray:
        points = rng.standard_normal((600, 30)) + 5 * rng.standard_normal(
            30
        )  # each language has its own place
        points[harmful, direction] += 3
        return points

    probe = train_probe(language(0), harmful, fold)
    same, other = (fold_auroc(probe.scores(x, fold), harmful, fold)[0] for x in (language(0), language(1)))
    assert same > 0.95
    assert other == pytest.approx(0.5, abs=0.1)


def test_shift_and_scale_change_no_probe() -> None:
    rng = np.random.default_rng(2)
    points, harmful = rng.standard_normal((200, 8)).astype(np.float32), labels(100, 100)
    points[harmful, 0] += 1
    fold = folds_of(np.arange(200), harmful, 4, 0)
    moved = points * np.float32(40.0) + np.float32(7.0)
    first = fold_auroc(train_probe(points, harmful, fold).scores(points, fold), harmful, fold)[0]
    assert fold_auroc(train_probe(moved, harmful, fold).scores(moved, fold), harmful, fold)[
        0
    ] == pytest.approx(first, abs=2e-3)
    turned = points @ rotation(rng, 8).astype(
        np.float32
    )  # features are standardised, so nearly but not quite the same
    assert fold_auroc(train_probe(turned, harmful, fold).scores(turned, fold), harmful, fold)[
        0
    ] == pytest.approx(first, abs=0.02)


def test_ranks_are_within_folds() -> None:
    assert fold_ranks(np.array([10.0, 30.0, 2.0, 1.0]), np.array([0, 0, 1, 1])).tolist() == [
        0.25,
        0.75,
        0.75,
        0.25,
    ]
