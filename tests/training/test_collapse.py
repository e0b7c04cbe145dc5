"""The detector of a collapse: a steady fall is seen once per language, scatter is not."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo.training.collapse import Collapse, CollapseDetector
from mpo.training.config import MPOConfig

WINDOWS = st.integers(min_value=3, max_value=24)


def feed(
    detector: CollapseDetector, language: str, points: Iterable[tuple[float, float]]
) -> list[tuple[int, Collapse]]:
    """All reports, each with the number of the point that gave it."""
    found = [(i, detector.update(language, chosen, gap)) for i, (chosen, gap) in enumerate(points)]
    return [(i, collapse) for i, collapse in found if collapse is not None]


def line(start: float, change: float, points: int) -> np.ndarray:
    """``points`` values from ``start`` to ``start + change``."""
    return np.linspace(start, start + change, points)


@settings(deadline=None)
@given(
    window=WINDOWS,
    drop=st.floats(min_value=0.05, max_value=2.0),
    excess=st.floats(min_value=1.05, max_value=20.0),
    rise=st.floats(min_value=1e-3, max_value=10.0),
    start=st.floats(min_value=-20.0, max_value=0.0),
)
def test_a_steady_fall_while_the_gap_rises_is_reported_as_soon_as_the_window_is_full(
    window: int, drop: float, excess: float, rise: float, start: float
) -> None:
    points = zip(line(start, -drop * excess, window), line(0.0, rise, window), strict=True)
    reports = feed(CollapseDetector(window, drop), "bn", points)
    assert [i for i, _ in reports] == [window - 1]
    collapse = reports[0][1]
    assert (collapse.language, collapse.points) == ("bn", window)
    assert math.isclose(collapse.fall, drop * excess, rel_tol=1e-6)
    assert math.isclose(collapse.rise, rise, rel_tol=1e-6)


@settings(deadline=None)
@given(
    window=WINDOWS,
    drop=st.floats(min_value=0.05, max_value=2.0),
    short=st.floats(min_value=0.0, max_value=0.95),
)
def test_a_fall_below_the_limit_is_not_reported(window: int, drop: float, short: float) -> None:
    points = list(zip(line(-5.0, -drop * short, window), line(0.0, 1.0, window), strict=True))
    assert feed(CollapseDetector(window, drop), "bn", points) == []


@settings(deadline=None)
@given(window=WINDOWS, change=st.floats(min_value=-10.0, max_value=-1e-3))
def test_a_fall_while_the_gap_does_not_rise_is_not_reported(window: int, change: float) -> None:
    points = zip(line(-5.0, -5.0, 3 * window), line(1.0, change, 3 * window), strict=True)
    assert feed(CollapseDetector(window, 0.2), "bn", points) == []


@settings(deadline=None)
@given(window=WINDOWS, climb=st.floats(min_value=0.0, max_value=10.0))
def test_a_rising_log_likelihood_is_never_reported(window: int, climb: float) -> None:
    points = zip(line(-8.0, climb, 3 * window), line(0.0, 5.0, 3 * window), strict=True)
    assert feed(CollapseDetector(window, 0.2), "bn", points) == []


@given(
    window=WINDOWS,
    values=st.lists(
        st.tuples(
            st.floats(allow_nan=True, allow_infinity=True, min_value=None, max_value=None),
            st.floats(allow_nan=True, allow_infinity=True),
        ),
        max_size=40,
    ),
)
@settings(max_examples=200, deadline=None)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_values_at_all_raise_nothing_and_report_a_language_at_most_once(
    window: int, values: list[tuple[float, float]]
) -> None:
    assert len(feed(CollapseDetector(window, 0.2), "bn", values)) <= 1


def test_values_that_are_not_finite_are_left_out() -> None:
    steady = list(zip(line(-5.0, -3.0, 6), line(0.0, 1.0, 6), strict=True))
    broken = [*steady[:3], (float("nan"), 0.5), (float("-inf"), float("inf")), *steady[3:]]
    assert [i for i, _ in feed(CollapseDetector(6, 0.2), "bn", broken)] == [7]
    assert feed(CollapseDetector(6, 0.2), "bn", [(float("nan"), float(i)) for i in range(20)]) == []


@pytest.mark.parametrize("window", [3, 6, 10, 20])
@pytest.mark.parametrize("shape", ["normal", "heavy tails", "skewed"])
def test_the_scatter_between_batches_does_not_trigger_over_a_long_run(window: int, shape: str) -> None:
    # Five runs of 400 points with four languages. Batches of different pairs differ by more than half a nat.
    rng = np.random.default_rng(window)
    draw = {
        "normal": lambda n: rng.normal(0.0, 0.6, n),
        "heavy tails": lambda n: 0.4 * rng.standard_t(4, n),
        "skewed": lambda n: -0.5 * rng.exponential(1.0, n),
    }[shape]
    alarms = 0
    for _ in range(5):
        detector = CollapseDetector(window, 0.2)
        for language in ("ar", "bn", "sw", "zh"):
            alarms += len(feed(detector, language, zip(-7.0 + draw(400), 0.5 + draw(400), strict=True)))
    assert alarms <= 1, f"{alarms} of 20 languages were reported without any fall"


@given(seed=st.integers(min_value=0, max_value=10_000))
@settings(max_examples=25, deadline=None)
def test_a_collapse_under_scatter_is_found(seed: int) -> None:
    # Quiet for forty points, then four nats down within twenty while the gap opens, as seen when both answers go.
    rng = np.random.default_rng(seed)
    level = np.concatenate([np.zeros(40), line(0.0, -4.0, 20), np.full(20, -4.0)])
    chosen = -6.0 + level + rng.normal(0.0, 0.25, 80)
    gap = 0.5 - 0.5 * level + rng.normal(0.0, 0.25, 80)
    reports = feed(CollapseDetector(10, 0.2), "sw", zip(chosen, gap, strict=True))
    assert len(reports) == 1
    assert 40 <= reports[0][0] < 70


def share_and_depth(window: int, scatter: float) -> tuple[float, float]:
    """Of 200 collapses by 3 nats in 40 points: the share that is reported, and the median fall when it is."""
    rng = np.random.default_rng(0)
    fall = np.concatenate([np.zeros(40), line(0.0, 3.0, 40)])
    depths = []
    for _ in range(200):
        chosen, gap = (rng.normal(0.0, scatter, 80) + sign * fall for sign in (-1, 1))
        if reports := feed(CollapseDetector(window, 0.2), "sw", zip(chosen, gap, strict=True)):
            depths.append(fall[reports[0][0]])
    return len(depths) / 200, float(np.median(depths)) if depths else math.nan


def test_the_default_window_sees_collapses_that_a_short_one_cannot(tmp_path: Path) -> None:
    default = MPOConfig(output_dir=str(tmp_path), use_cpu=True).collapse_window
    share, depth = share_and_depth(default, 0.3)
    assert share >= 0.95
    assert depth < 1.5
    assert share_and_depth(6, 0.3)[0] == 0.0


def test_each_language_is_reported_once_and_for_itself() -> None:
    detector = CollapseDetector(4, 0.2)
    order = ["bn"] * 20 + ["sw"] * 20
    random.Random(0).shuffle(order)
    count = {"bn": 0, "sw": 0}
    reports = []
    for language in order:
        i = count[language]
        count[language] += 1
        collapse = detector.update(language, -5.0 - 0.5 * i, 0.1 * i)
        if collapse is not None:
            reports.append((collapse.language, i))
    assert sorted(reports) == [("bn", 3), ("sw", 3)]


def test_one_language_falling_says_nothing_about_another() -> None:
    detector = CollapseDetector(4, 0.2)
    found = []
    for i in range(12):
        found += [detector.update("bn", -5.0 - 0.5 * i, 0.1 * i), detector.update("zh", -5.0, 0.1 * i)]
    assert [collapse.language for collapse in found if collapse] == ["bn"]


def test_the_report_says_what_fell_by_how_much_and_what_to_do() -> None:
    text = str(Collapse("bn", 6, 1.25, 0.5))
    for part in ("'bn'", "1.25", "0.50", "6 logging points", "learning rate"):
        assert part in text
