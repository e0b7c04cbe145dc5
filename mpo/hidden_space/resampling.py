"""Resampling as weights: every measure takes ``[R, n]`` weights and returns ``R`` values, the first of which counts.

Row 0 of all weights is the data as it is, so that the estimate and its replicates come from one piece of code. A
bootstrap sample gives each text the number of times it was drawn; a permuted before/after comparison gives each of the
2n embeddings a 0 or a 1.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from mpo.common.bootstrap import check_settings
from mpo.common.typed_json import stored_as

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Estimate:
    """A number with what is known of its error.

    Attributes:
        value: The number; NaN where it is not defined.
        low: Lower end of the confidence interval; None where there is none.
        high: Upper end.
        p_value: Of the permutation test against no change; None where there was none.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None

    @property
    def is_clear(self) -> bool:
        """Whether the interval, of a change, leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def to_list(self) -> list[float | None]:
        """``[value, low, high]``, followed by the p-value where there is one, to seven digits."""
        parts = [self.value, self.low, self.high, *([] if self.p_value is None else [self.p_value])]
        return [None if part is None or not math.isfinite(part) else float(f"{part:.7g}") for part in parts]

    @classmethod
    def from_list(cls, parts: list[float | None]) -> Estimate:
        """What :meth:`to_list` gave."""
        value, low, high, *rest = parts
        p_value = rest[0] if rest else None
        if p_value is not None and not 0 <= p_value <= 1:
            raise ValueError("a p-value from 0 to 1 as the last entry")
        return cls(math.nan if value is None else value, low, high, p_value)


_Parts = Annotated[
    list[Annotated[float, Field(ge=-1e300, le=1e300)] | None], Field(min_length=3, max_length=4)
]
Stored = Annotated[Estimate, stored_as(_Parts, Estimate.from_list, Estimate.to_list)]
"""An estimate that a file holds as a list."""


def bootstrap_weights(unit: Array, harmful: Array, resamples: int, seed: int) -> Array:
    """How often each text is in each bootstrap sample.

    What is drawn is the unit, with all its texts: the two texts of a pair, or a single text. Units are drawn within
    their class (Davison and Hinkley, *Bootstrap Methods and their Application*, 1997, section 3.2), so that a sample
    has as many harmful and harmless texts as the data. The draws depend on the seed and on the units alone: languages
    that share their units share their draws, which keeps what their texts have in common; others have their own.

    Args:
        unit: ``[n]`` which unit a text belongs to.
        harmful: ``[n]`` booleans.
        resamples: Number R of samples.
        seed: Of the draws.

    Returns:
        ``[1 + R, n]`` float32; row 0 is all ones.
    """
    names, index = np.unique(unit, return_inverse=True)
    has_harmful = np.bincount(index, weights=harmful, minlength=len(names)) > 0
    has_harmless = np.bincount(index, weights=~harmful, minlength=len(names)) > 0
    stratum = has_harmful + 2 * has_harmless
    counts = np.zeros((resamples, len(names)), dtype=np.float32)
    for kind in np.unique(stratum):
        (members,) = np.nonzero(stratum == kind)
        random = np.random.default_rng([seed, int(kind), zlib.crc32(names[members].tobytes())])
        counts[:, members] = random.multinomial(
            len(members), np.full(len(members), 1 / len(members)), resamples
        )
    return np.concatenate([np.ones((1, len(unit)), dtype=np.float32), counts[:, index]])


def swap_masks(unit: Array, permutations: int, seed: int) -> Array:
    """Which texts trade their embedding before for that after, under the hypothesis that the two are alike.

    Returns:
        ``[1 + P, n]`` booleans; row 0 is all False. The texts of a unit trade together.
    """
    names, index = np.unique(unit, return_inverse=True)
    swapped = np.random.default_rng([seed, 1]).random((permutations, len(names)), dtype=np.float32) < 0.5
    return np.concatenate([np.zeros((1, len(unit)), dtype=bool), swapped[:, index]])


def estimate(
    replicates: Array,
    confidence: float,
    p_value: float | None = None,
    *,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """The first of the values, with an interval from the spread of the others.

    The percentiles of the replicates, moved so that their mean is the estimate. A distance between means or covariances
    is larger in a bootstrap sample than in the data, because the noise of the means counts twice; plain percentiles would
    lie too high, at times without the estimate in them. The same noise, counted once, is in the estimate: it shrinks with
    the number of texts and is alike before and after, so it cancels in a change.

    Args:
        replicates: ``[1 + R]``.
        confidence: Coverage, between 0 and 1.
        p_value: Of a test, to be kept with it.
        limits: Smallest and largest value that the number can have.
    """
    value, others = float(replicates[0]), np.asarray(replicates[1:], dtype=np.float64)
    if not math.isfinite(value) or len(others) == 0 or not np.isfinite(others).all():
        return Estimate(value, None, None, p_value)
    tail = (1 - confidence) / 2
    ends = np.quantile(others, [tail, 1 - tail]) + value - others.mean()
    low, high = (float(end) for end in ends)
    return Estimate(value, max(low, limits[0]), min(high, limits[1]), p_value)


def permutation_p(changes: Array) -> float | None:
    """Two-sided p-value of the first of the changes among all (Phipson and Smyth, 2010): never 0.

    Args:
        changes: ``[1 + P]``, the observed one first.
    """
    if len(changes) < 2 or not np.isfinite(changes).all():
        return None
    size = np.abs(np.asarray(changes, dtype=np.float64))
    return float(np.count_nonzero(size >= size[0] * (1 - 1e-9)) / len(size))


def check_resampling(confidence: float, resamples: int, permutations: int) -> None:
    """Refuse settings that nothing can be computed with.

    Raises:
        ConfigError: One is out of range.
    """
    from mpo.errors import ConfigError

    check_settings(confidence, resamples)
    if not isinstance(permutations, int) or permutations < 0:
        raise ConfigError(f"`permutations` is {permutations!r}; expected a whole number from 0.")
