"""Linear probes: how well a hyperplane tells harmful from harmless texts, in its own language and in others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpo.hidden_space.resampling import Array

STRENGTH = 0.01
"""``C`` of the logistic regression on standardised features: strong regularisation, since there are often as many
dimensions as texts."""


def folds_of(kin: Array, harmful: Array, folds: int, seed: int) -> Array:
    """Which fold a text is held out in, ``[n]``. Kin share their fold, also across languages with the same kin: no probe is
    tested on a text whose pair, translation or duplicate it was trained on. Classes are spread evenly.
    """
    names, first, index = np.unique(kin, return_index=True, return_inverse=True)
    fold = np.empty(len(names), dtype=np.int64)
    random = np.random.default_rng([seed, 2])
    for label in (False, True):
        (members,) = np.nonzero(harmful[first] == label)
        fold[members] = random.permutation(np.arange(len(members)) % folds)
    assigned: Array = fold[index]
    return assigned


@dataclass(frozen=True)
class Probe:
    """A linear probe per fold, each trained on the other folds.

    Attributes:
        weight: ``[folds, d]``; a score is ``weight . x``. A constant would change no ranking.
    """

    weight: Array

    def scores(self, points: Array, fold: Array) -> Array:
        """``[n]`` score of each text by the probe that has not seen its fold."""
        every = points @ self.weight.T
        held_out: Array = every[np.arange(len(points)), fold]
        return held_out


def train_probe(points: Array, harmful: Array, fold: Array) -> Probe:
    """Logistic regression with an L2 penalty on features of mean 0 and variance 1, by scikit-learn, once per fold.

    Args:
        points: ``[n, d]``.
        harmful: ``[n]`` booleans.
        fold: ``[n]``, from :func:`folds_of`.
    """
    from sklearn.linear_model import LogisticRegression

    points = np.asarray(points, dtype=np.float32)
    weight = np.zeros((int(fold.max()) + 1, points.shape[1]), dtype=np.float32)
    for held_out in range(len(weight)):
        rows = fold != held_out
        if len(np.unique(harmful[rows])) < 2:
            continue
        train = points[rows]
        train -= train.mean(axis=0, dtype=np.float64).astype(np.float32)
        deviation = np.sqrt(np.einsum("nd,nd->d", train, train, dtype=np.float64) / len(train)).astype(
            np.float32
        )
        # A dimension that is the same for all texts, up to rounding, says nothing.
        scale = np.where(deviation > 1e-6 * deviation.max(), deviation, np.inf).astype(np.float32)
        train /= scale
        model = LogisticRegression(C=STRENGTH, max_iter=500, tol=1e-3).fit(train, harmful[rows])
        weight[held_out] = model.coef_[0] / scale
    return Probe(weight)


def auroc(scores: Array, harmful: Array, weights: Array | None = None) -> Array:
    """Area under the ROC curve: the chance that a harmful text scores higher than a harmless one, ties counting half
    (Mann-Whitney).

    Args:
        scores: ``[n]``.
        harmful: ``[n]`` booleans.
        weights: ``[R, n]``; by default one row of ones.

    Returns:
        ``[R]``; NaN where a class has no weight.
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    sorted_weights = np.asarray(weights[:, order], dtype=np.float64)
    positive = np.add.reduceat(sorted_weights * harmful[order], starts, axis=1)
    negative = np.add.reduceat(sorted_weights * ~harmful[order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        value: Array = (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))
    return value


def fold_auroc(scores: Array, harmful: Array, fold: Array, weights: Array | None = None) -> Array:
    """``[R]`` mean over folds of :func:`auroc` within the fold: scores of different probes are not compared."""
    weights = np.ones((1, len(scores))) if weights is None else weights
    values = [
        auroc(scores[rows], harmful[rows], weights[:, rows])
        for rows in (fold == number for number in np.unique(fold))
        if 0 < np.count_nonzero(harmful[rows]) < np.count_nonzero(rows)
    ]
    if not values:
        return np.full(len(weights), np.nan)
    found = np.stack(values)
    if np.isnan(found).all(axis=0).any():
        return np.full(len(weights), np.nan)
    mean: Array = np.nanmean(found, axis=0)
    return mean


def with_training_error(replicates: Array, folds: int) -> Array:
    """Replicates of a cross-validated number, widened by what resampling the held-out scores cannot see.

    Another sample would also train other probes. Nadeau and Bengio (2003, *Machine Learning* 52) estimate the variance
    that this adds from the sizes of the training and held-out parts: a factor of ``1 + folds / (folds - 1)`` in all, 2.25
    with five folds. Without it two models that differ by noise alone are told apart two to three times too often.

    Args:
        replicates: ``[1 + R]``, the estimate first.
        folds: Of the cross-validation.
    """
    wide: Array = replicates[0] + np.sqrt(1 + folds / (folds - 1)) * (replicates - replicates[0])
    return wide


def fold_ranks(scores: Array, fold: Array) -> Array:
    """``[n]`` rank of each score within its fold, from 0 to 1, so that scores of two models can be exchanged."""
    from scipy.stats import rankdata

    ranks = np.empty(len(scores))
    for number in np.unique(fold):
        rows = fold == number
        ranks[rows] = (rankdata(scores[rows]) - 0.5) / np.count_nonzero(rows)
    return ranks
