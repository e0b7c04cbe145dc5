"""How alike two sets of embeddings are: harm directions, centred kernel alignment, drift, and where to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpo.hidden_space.resampling import Array

_BLOCK = 1024


def cosine(first: Array, second: Array) -> Array:
    """``[R]`` cosine between the rows of two ``[R, d]`` arrays of directions; NaN where one is 0."""
    product = np.einsum("rd,rd->r", first, second, dtype=np.float64)
    lengths = np.einsum("rd,rd->r", first, first, dtype=np.float64) * np.einsum(
        "rd,rd->r", second, second, dtype=np.float64
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        value: Array = np.clip(product / np.sqrt(lengths), -1, 1)
    return value


@dataclass(frozen=True)
class _Alignment:
    """Sums over pairs of different texts i, j of products of two Gram matrices."""

    pairs: Array  # [n], sum over j of K_ij L_ij
    rows_first: Array  # [n], sum over j of K_ij
    rows_second: Array

    def hsic(self) -> float:
        """Unbiased Hilbert-Schmidt independence criterion, times n(n-3)."""
        n = len(self.pairs)
        total = self.rows_first.sum() * self.rows_second.sum() / ((n - 1) * (n - 2))
        return float(self.pairs.sum() + total - 2 / (n - 2) * (self.rows_first @ self.rows_second))


def linear_cka(before: Array, after: Array, weights: Array | None = None) -> Array:
    """Centred kernel alignment of two representations of the same texts, with linear kernels: 1 for the same geometry up
    to rotation and scale, about 0 for unrelated ones.

    Kornblith et al. (2019, arXiv 1905.00414), with the unbiased HSIC of Song et al. (2012, *Journal of Machine Learning
    Research* 13, equation 5): the plain estimate rises towards 1 for any two representations when there are fewer texts
    than dimensions.

    The replicates are those of its linear expansion. HSIC is a mean over pairs of texts, so a text's weight counts twice
    to first order (Hoeffding's projection); that is enough for an interval, and spares a matrix product per replicate.

    Args:
        before, after: ``[n, d]`` and ``[n, e]``, centred, row by row the same texts; n at least 4.
        weights: ``[R, n]``; by default one row of ones.

    Returns:
        ``[R]``.
    """
    n = len(before)
    weights = np.ones((1, n)) if weights is None else weights
    if n < 4:
        return np.full(len(weights), np.nan)
    before, after = (x / np.float32(np.abs(x).max() or 1.0) for x in (before, after))
    parts = {name: _Alignment(np.empty(n), np.empty(n), np.empty(n)) for name in ("xy", "xx", "yy")}
    for start in range(0, n, _BLOCK):
        rows = slice(start, min(start + _BLOCK, n))
        k, el = before[rows] @ before.T, after[rows] @ after.T
        here = np.arange(rows.start, rows.stop)
        k[here - start, here] = 0
        el[here - start, here] = 0
        for name, first, second in (("xy", k, el), ("xx", k, k), ("yy", el, el)):
            parts[name].pairs[rows] = np.einsum("ij,ij->i", first, second, dtype=np.float64)
            parts[name].rows_first[rows] = first.sum(axis=1, dtype=np.float64)
            parts[name].rows_second[rows] = second.sum(axis=1, dtype=np.float64)
    hsic = {name: part.hsic() for name, part in parts.items()}
    expanded = 1 + 2 * (np.asarray(weights, dtype=np.float64) - 1)
    weighted = {
        name: hsic[name] * (expanded @ part.pairs) / part.pairs.sum()
        if part.pairs.sum()
        else np.zeros(len(weights))
        for name, part in parts.items()
    }
    with np.errstate(invalid="ignore", divide="ignore"):
        value: Array = weighted["xy"] / np.sqrt(weighted["xx"] * weighted["yy"])
    return value


def drift(before: Array, after: Array, scale: Array | float, weights: Array | None = None) -> Array:
    """Mean distance that texts moved, ``mean |after_i - before_i| / scale``.

    Args:
        before, after: ``[n, d]``, *not* centred: a common shift is a move, too.
        scale: ``[R]`` or one number: the spread of the texts before (root of the total variance).
        weights: ``[R, n]``; by default one row of ones.

    Returns:
        ``[R]``; 0.1 is a tenth of the distance at which a text before lies from the mean of all.
    """
    moved = np.empty(len(before))
    for start in range(0, len(before), _BLOCK):
        step = after[start : start + _BLOCK].astype(np.float64) - before[start : start + _BLOCK]
        moved[start : start + _BLOCK] = np.sqrt(np.einsum("nd,nd->n", step, step))
    weights = np.ones((1, len(moved))) if weights is None else np.asarray(weights, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        value: Array = (weights @ moved) / weights.sum(axis=1) / scale
    return value


def mean_points(points: Array, weights: Array) -> Array:
    """``[R, d]`` mean of ``[n, d]`` points under each row of ``[R, n]`` weights."""
    weights = np.asarray(weights, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Array = weights @ points.astype(np.float64) / weights.sum(axis=1, keepdims=True)
    return mean


def shift_along(shift: Array, way: Array) -> Array:
    """``[R]`` scalar projection of a shift on a direction over the direction's length, ``shift . way / |way|^2``: 1 if it goes as
    far as the direction is long, 0 if it is orthogonal, below 0 if it goes back. Both are ``[R, d]``; NaN where it is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        part: Array = np.einsum("rd,rd->r", shift, way) / np.einsum("rd,rd->r", way, way)
    return part
