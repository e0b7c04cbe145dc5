"""Parallel texts: a harmful sentence and its harmless rewrite, measured as pairs.

In a parallel set the two classes speak of the same things, so what lies between them is harm and not the topic. That
makes it the control of what the plain measures find.
"""

from __future__ import annotations

import numpy as np

from mpo.hidden_space.resampling import Array
from mpo.hidden_space.silhouette import distances

_BLOCK = 1024

PAIR_MEASURES = ("pair_distance_ratio", "pair_nearest", "pair_consistency")


def pair_rows(unit: Array, harmful: Array) -> tuple[Array, Array]:
    """Rows of the harmful and of the harmless text of each unit that has exactly one of both, ``[pairs]`` each."""
    names, index = np.unique(unit, return_inverse=True)
    whole = (np.bincount(index[harmful], minlength=len(names)) == 1) & (
        np.bincount(index[~harmful], minlength=len(names)) == 1
    )
    rows = []
    for label in (True, False):
        (members,) = np.nonzero((harmful == label) & whole[index])
        rows.append(members[np.argsort(index[members], kind="stable")])
    return rows[0], rows[1]


def pair_measures(harmful: Array, harmless: Array, weights: Array | None = None) -> dict[str, Array]:
    """Distances within pairs against chance.

    Args:
        harmful, harmless: ``[pairs, d]``, row by row the two texts of a pair, in one centred space.
        weights: ``[R, pairs]``; by default one row of ones.

    Returns:
        ``[R]`` each:

        - ``pair_distance_ratio``: mean distance within a pair over the mean distance of a harmful text to the harmless
          texts of *other* pairs. 1 is chance; the smaller, the less the rewrite changes the representation.
        - ``pair_nearest``: part of harmful texts whose nearest harmless text is their own rewrite, one of m that are as
          near counting 1/m. Chance is one in the number of pairs. In a bootstrap sample the candidates stay those of the data.
        - ``pair_consistency``: length of the mean of the unit vectors from each harmless text to its harmful one. 1 if
          all pairs differ in the same direction, near 0 if each differs in its own. It is corrected for the number of
          pairs, so that unrelated directions give 0.
    """
    pairs = len(harmful)
    weights = np.ones((1, pairs)) if weights is None else np.asarray(weights, dtype=np.float64)
    harmful, harmless = (np.ascontiguousarray(x, dtype=np.float32) for x in (harmful, harmless))
    squares = [np.einsum("nd,nd->n", x, x) for x in (harmful, harmless)]
    within, nearest = np.empty(pairs), np.empty(pairs)
    across = np.zeros(len(weights))
    for start in range(0, pairs, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, pairs))
        distance = distances(harmful[rows], harmless, squares[0][rows], squares[1])
        own = distance[rows - start, rows]
        within[rows] = own
        closest = distance <= distance.min(axis=1, keepdims=True)
        nearest[rows] = closest[rows - start, rows] / closest.sum(axis=1)
        distance[rows - start, rows] = 0
        across += np.einsum("rb,rb->r", weights[:, rows], weights @ distance.T.astype(np.float64))
    total = weights.sum(axis=1)
    different = total**2 - np.square(weights).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = (weights @ within / total) / (across / different)
    return {
        "pair_distance_ratio": ratio,
        "pair_nearest": weights @ nearest / total,
        "pair_consistency": _consistency(harmful - harmless, weights),
    }


def _consistency(step: Array, weights: Array) -> Array:
    """Root of the mean cosine between the steps of two different pairs, with the sign of that mean."""
    length = np.sqrt(np.einsum("nd,nd->n", step, step, dtype=np.float64))
    unit = (step / np.where(length > 0, length, 1)[:, None]).astype(np.float64)
    sums = weights @ unit
    norm = (length > 0).astype(np.float64)
    square = np.square(weights)
    pairs_of_pairs = (weights @ norm) ** 2 - square @ norm
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (np.einsum("rd,rd->r", sums, sums) - square @ norm) / pairs_of_pairs
    value: Array = np.sign(mean) * np.sqrt(np.abs(mean))
    return value


def pairing_test(harmful: Array, harmless: Array, permutations: int, seed: int) -> float | None:
    """p-value of the mean distance within pairs against random partners: one-sided, never 0."""
    if permutations == 0:
        return None
    pairs = len(harmful)
    harmful, harmless = (np.ascontiguousarray(x, dtype=np.float32) for x in (harmful, harmless))
    squares = [np.einsum("nd,nd->n", x, x) for x in (harmful, harmless)]
    random = np.random.default_rng([seed, 3])
    partners = np.empty((1 + permutations, pairs), dtype=np.int32)
    partners[0] = np.arange(pairs)
    for row in range(1, 1 + permutations):
        partners[row] = random.permutation(pairs)
    sums = np.zeros(len(partners))
    for start in range(0, pairs, _BLOCK):
        rows = slice(start, start + _BLOCK)
        distance = distances(harmful[rows], harmless, squares[0][rows], squares[1])
        for number, partner in enumerate(partners):
            sums[number] += distance[np.arange(len(distance)), partner[rows]].sum(dtype=np.float64)
    return float((1 + np.count_nonzero(sums[1:] <= sums[0])) / (1 + permutations))
