"""How far two classes lie apart: the paper's measures, and Fisher's ratio, from weighted means and covariances.

Verma and Bharadwaj (arXiv 2504.02708) compare the clusters of harmful and harmless texts along the principal components
of both together, on 2 and on 10 components, by between-class variance, explained variance, the Bhattacharyya distance and
the silhouette score. Their text leaves the normalisation of the covariances open; all here divide by the number of texts.

All functions take weights ``[R, n]`` as :mod:`mpo.hidden_space.resampling` makes them and return ``[R]`` values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpo.hidden_space.resampling import Array

TEXTS_PER_COMPONENT = 2
"""Classes with fewer texts per dimension than this have their covariance shrunk."""


@dataclass(frozen=True)
class Moments:
    """Weighted moments of two classes, harmless first.

    Attributes:
        count: ``[R, 2]`` sum of weights.
        mean: ``[R, 2, d]``.
        covariance: ``[R, 2, d, d]``, divided by the count.
        shrinkage: ``[2]`` weight of the scaled identity in each class covariance for :func:`bhattacharyya`.
    """

    count: Array
    mean: Array
    covariance: Array
    shrinkage: Array

    @property
    def share(self) -> Array:
        """``[R, 2]`` each class's part of the weight."""
        part: Array = self.count / self.count.sum(axis=1, keepdims=True)
        return part

    @property
    def difference(self) -> Array:
        """``[R, d]`` mean of the harmful minus mean of the harmless texts."""
        apart: Array = self.mean[:, 1] - self.mean[:, 0]
        return apart

    @property
    def within(self) -> Array:
        """``[R, d, d]`` within-class covariance, the classes weighted by their share."""
        pooled: Array = np.einsum("rc,rcij->rij", self.share, self.covariance)
        return pooled

    @property
    def total(self) -> Array:
        """``[R]`` trace of the total covariance: all variance, between the classes and within them."""
        within = np.trace(self.within, axis1=1, axis2=2)
        everything: Array = between_class_variance(self) + within
        return everything


def class_moments(points: Array, harmful: Array, weights: Array | None = None) -> Moments:
    """Means and covariances of both classes under each row of weights. Meant for few dimensions (a plane).

    Args:
        points: ``[n, d]``.
        harmful: ``[n]`` booleans.
        weights: ``[R, n]``; by default one row of ones.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    points = np.asarray(points, dtype=np.float64)
    weights = np.ones((1, len(points))) if weights is None else weights
    dimensions = points.shape[1]
    centre = points.mean(axis=0)  # products of centred values lose no digits
    counts, means, covariances, shrinkage = [], [], [], []
    for label in (False, True):
        rows = harmful == label
        x = points[rows] - centre
        w = np.asarray(weights[:, rows], dtype=np.float64)
        products = np.einsum("ni,nj->nij", x, x).reshape(len(x), -1)
        sums = w @ np.concatenate([np.ones((len(x), 1)), x, products], axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = sums[:, 1 : 1 + dimensions] / sums[:, :1]
            second = (sums[:, 1 + dimensions :] / sums[:, :1]).reshape(-1, dimensions, dimensions)
        counts.append(sums[:, 0])
        means.append(mean + centre)
        covariances.append(second - np.einsum("ri,rj->rij", mean, mean))
        few = len(x) < TEXTS_PER_COMPONENT * dimensions
        shrinkage.append(ledoit_wolf_shrinkage(x) if few and len(x) > 1 else 0.0)
    return Moments(
        np.stack(counts, axis=1),
        np.stack(means, axis=1),
        np.stack(covariances, axis=1),
        np.asarray(shrinkage),
    )


def between_class_variance(moments: Moments) -> Array:
    """Variance of the class means, weighted by class: ``p1 p0 |mu1 - mu0|^2``, the trace of the between-class scatter.

    In the square of the embedding's unit, so it grows with the scale of a model's states: compare models by
    :func:`between_class_ratio`.
    """
    share = moments.share
    value: Array = share[:, 0] * share[:, 1] * np.square(moments.difference).sum(axis=1)
    return value


def between_class_ratio(moments: Moments) -> Array:
    """The part of all variance that lies between the classes, ``tr S_B / tr S_T``, from 0 to 1.

    The paper's headline number, on the first principal components of both classes together. Also known as eta squared.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: Array = between_class_variance(moments) / moments.total
    return ratio


def fisher_ratio(moments: Moments) -> Array:
    """Fisher's ratio along the best direction, ``(mu1 - mu0)^T S_W^-1 (mu1 - mu0)``: squared distance of the class
    means in within-class standard deviations, what linear discriminant analysis maximises (Fisher, 1936, *Annals of
    Eugenics* 7(2)). No linear map of the space changes it. NaN where the classes together
    have too few texts for the number of dimensions.
    """
    solved = _solve(moments.within, moments.difference)
    ratio: Array = np.einsum("rd,rd->r", moments.difference, solved)
    return ratio


def bhattacharyya(moments: Moments) -> Array:
    """Bhattacharyya distance of two normals with the classes' means and covariances.

    ``1/8 D^T S^-1 D + 1/2 ln(det S / sqrt(det S0 det S1))`` with ``D = mu1 - mu0`` and ``S = (S0 + S1) / 2`` (Kailath,
    1967, *IEEE Transactions on Communication Technology* 15(1), equation 5). 0 for equal normals, without an upper end;
    no linear map of the space changes it.

    A class with fewer than ``TEXTS_PER_COMPONENT`` texts per dimension has a covariance that is singular or nearly so.
    It is then drawn towards the identity of the same trace with the weight of Ledoit and Wolf (2004, *Journal of
    Multivariate Analysis* 88(2)), found on the data as it is and kept for the replicates.
    """
    dimensions = moments.mean.shape[2]
    scale = np.trace(moments.covariance, axis1=2, axis2=3) / dimensions
    alpha = moments.shrinkage[None, :, None, None]
    shrunk = (1 - alpha) * moments.covariance + alpha * scale[:, :, None, None] * np.eye(dimensions)
    middle = shrunk.mean(axis=1)
    apart = np.einsum("rd,rd->r", moments.difference, _solve(middle, moments.difference)) / 8
    return apart + (_logdet(middle) - 0.5 * (_logdet(shrunk[:, 0]) + _logdet(shrunk[:, 1]))) / 2


def _solve(matrices: Array, vectors: Array) -> Array:
    """``[R, d]`` solutions; NaN where a matrix is singular up to rounding, as with fewer texts than dimensions."""
    solved: Array = np.full(vectors.shape, np.nan)
    regular = np.linalg.matrix_rank(np.nan_to_num(matrices), hermitian=True) == matrices.shape[-1]
    solved[regular] = np.linalg.solve(matrices[regular], vectors[regular][..., None])[..., 0]
    return solved


def _logdet(matrices: Array) -> Array:
    sign, value = np.linalg.slogdet(matrices)
    return np.where(sign > 0, value, np.nan)


@dataclass(frozen=True)
class FullMoments:
    """What the measures in the full space need, without a covariance.

    Attributes:
        difference: ``[R, d]`` harm direction: mean of the harmful minus mean of the harmless texts.
        between: ``[R]`` between-class variance.
        total: ``[R]`` trace of the total covariance.
    """

    difference: Array
    between: Array
    total: Array

    @property
    def ratio(self) -> Array:
        """``[R]`` :func:`between_class_ratio` in the full space."""
        with np.errstate(invalid="ignore", divide="ignore"):
            part: Array = self.between / self.total
        return part


def full_moments(points: Array, harmful: Array, weights: Array | None = None) -> FullMoments:
    """Class means and total variance in all dimensions.

    Args:
        points: ``[n, d]``, centred, since sums are in the dtype of the points.
        harmful: ``[n]`` booleans.
        weights: ``[R, n]``; by default one row of ones.
    """
    weights = np.ones((1, len(points)), dtype=points.dtype) if weights is None else weights
    square = np.einsum("nd,nd->n", points, points, dtype=np.float64)
    count, mean = [], []
    for label in (False, True):
        w = np.asarray(weights[:, harmful == label], dtype=points.dtype)
        total = w.sum(axis=1, dtype=np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean.append((w @ points[harmful == label]) / total[:, None].astype(points.dtype))
        count.append(total)
    share = np.stack(count, axis=1) / (count[0] + count[1])[:, None]
    difference = mean[1] - mean[0]
    between = share[:, 0] * share[:, 1] * np.einsum("rd,rd->r", difference, difference, dtype=np.float64)
    middle = sum(part[:, None] * m for part, m in zip(share.T.astype(points.dtype), mean, strict=True))
    second = (weights @ square) / (count[0] + count[1])
    total_variance = second - np.einsum("rd,rd->r", middle, middle, dtype=np.float64)
    return FullMoments(difference, between, total_variance)
