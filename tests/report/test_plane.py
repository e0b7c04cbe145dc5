from __future__ import annotations

import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linprog

from mpo.errors import DataError
from mpo.report.plane import Box, PlaneArrow, PlanePoint, draw, lay_out, lower_left_hull
from tests.report import browser

SIZES = ("wide", "narrow")
HOSTILE = "<script>document.title='owned'</script>\" onload=\"x"


def _random_points(seed: int, count: int, low: float = 0.0, high: float = 1.0) -> list[PlanePoint]:
    random = np.random.default_rng(seed)
    return [
        PlanePoint(f"run {n} of many", *(float(v) for v in random.uniform(low, high, 2)), group=f"g{n % 3}")
        for n in range(count)
    ]


def _random_arrows(seed: int, count: int, spread: float = 1.0) -> list[PlaneArrow]:
    random = np.random.default_rng(seed)
    ends = random.uniform(0, spread, (count, 2, 2))
    return [
        PlaneArrow(*(PlanePoint("", *map(float, end)) for end in both), label=f"Language {n}", strong=n == 0)
        for n, both in enumerate(ends)
    ]


def _is_on_hull(places: list[tuple[float, float]], n: int) -> bool:
    """Whether some weights, none negative, make a place the only one with the smallest weighted sum (a linear program)."""
    others = [other for other in places if other != places[n]]
    if not others:
        return True
    rows = [[places[n][0] - x, places[n][1] - y, 1.0] for x, y in others]
    found = linprog([0, 0, -1], rows, [0.0] * len(rows), [[1, 1, 0]], [1], [(0, 1), (0, 1), (None, None)])
    return bool(found.success and -found.fun > 1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_the_hull_holds_the_places_that_some_weighting_of_the_axes_calls_best(seed: int) -> None:
    random = np.random.default_rng(seed)
    # A coarse grid has places in line, above and beside each other, and twice.
    places = [tuple(map(float, row)) for row in random.integers(0, 6 if seed % 2 else 1000, (14, 2))]
    places = list(dict.fromkeys(places))
    wanted = sorted(place for n, place in enumerate(places) if _is_on_hull(places, n))
    assert lower_left_hull([*places, places[0]]) == wanted


def test_the_hull_of_one_place_and_of_none() -> None:
    assert lower_left_hull([]) == [] and lower_left_hull([(0.5, 0.5)] * 3) == [(0.5, 0.5)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(6))
def test_no_two_labels_overlap_and_none_leaves_the_picture(seed: int, size: str) -> None:
    count = 9 if size == "wide" else 6
    arrows = _random_arrows(seed, count, 1.0 if seed % 2 else 0.12)
    points = _random_points(seed, count - 1, 0.4, 0.45)
    chart = lay_out(points, arrows, size)
    assert len(chart.labels) == 2 * count - 1
    for first, second in itertools.combinations(chart.labels, 2):
        apart = (
            first.box.right <= second.box.left
            or second.box.right <= first.box.left
            or first.box.bottom <= second.box.top
            or second.box.bottom <= first.box.top
        )
        assert apart, (first, second)
    for label in chart.labels:
        assert label.box.left >= 0 and label.box.right <= chart.width
        assert label.box.top >= 0 and label.box.bottom <= chart.axes.bottom


def test_of_a_crowd_the_best_are_labelled() -> None:
    points = _random_points(3, 60)
    strong = PlaneArrow(points[0], points[1], "the mean", strong=True)
    for size in SIZES:
        labels = {label.text for label in lay_out(points, [strong], size).labels}
        hull = lower_left_hull([(p.over_refusal, p.attack_success) for p in points])
        wanted = {p.label for p in points if (p.over_refusal, p.attack_success) in hull} | {"the mean"}
        assert {text.rstrip(".") for text in labels} == {
            name if len(name) <= 17 or size == "wide" else name[:14] for name in wanted
        }


def test_a_label_far_from_its_mark_has_a_line_to_it() -> None:
    crowded = [PlanePoint(f"crowded run {n}", 0.5, 0.5) for n in range(12)]
    chart = lay_out(crowded, [])
    assert len(chart.labels) == 12 and len({m.place for m in chart.marks}) == 1
    for label in chart.labels:
        x, y = chart.marks[0].place
        gap = math.hypot(
            max(label.box.left - x, 0, x - label.box.right), max(label.box.top - y, 0, y - label.box.bottom)
        )
        assert (label.leader is not None) == (gap > 18)
    assert any(label.leader for label in chart.labels)


@pytest.mark.parametrize("size", SIZES)
def test_places_are_linear_in_the_shares_and_ticks_stand_at_theirs(size: str) -> None:
    points = _random_points(5, 30)
    chart = lay_out(points, [], size)
    places = np.array([mark.place for mark in chart.marks])
    shares = np.array([[p.over_refusal, p.attack_success] for p in points])
    for axis, ticks in enumerate((chart.across, chart.up)):
        slope, start = np.polyfit(shares[:, axis], places[:, axis], 1)
        assert places[:, axis] == pytest.approx(start + slope * shares[:, axis], abs=0.11)
        assert (slope > 0) == (axis == 0)  # upwards is towards smaller pixels
        for at, text in ticks:
            assert at == pytest.approx(start + slope * float(text) / 100, abs=0.2)
    assert all(chart.axes.holds(Box(*mark.place, *mark.place)) for mark in chart.marks)


@pytest.mark.parametrize("seed", range(4))
def test_an_arrows_tip_is_at_its_end_and_its_head_looks_along_it(seed: int) -> None:
    arrows = _random_arrows(seed, 6)
    chart = lay_out([], arrows, "wide")
    where = lay_out([end for a in arrows for end in (a.before, a.after)], [], "wide")
    ends = [mark.place for mark in where.marks]
    for n, way in enumerate(chart.ways):
        assert (way.start, way.end) == (ends[2 * n], ends[2 * n + 1]) and way.head is not None
        tip, left, right = map(np.array, way.head)
        along = np.array(way.end) - np.array(way.start)
        assert tuple(tip) == way.end
        assert math.dist(left, tip) == pytest.approx(math.dist(right, tip), abs=0.2)
        back = (left + right) / 2 - tip
        assert back @ along / (np.linalg.norm(back) * np.linalg.norm(along)) == pytest.approx(-1, abs=0.01)
    assert [mark.hollow for mark in chart.marks] == [True] * 6


def test_an_arrow_that_goes_nowhere_is_a_filled_point() -> None:
    here = PlanePoint("", 0.2, 0.3)
    chart = lay_out([], [PlaneArrow(here, here, "Swahili")])
    assert chart.ways[0].head is None and [mark.hollow for mark in chart.marks] == [True, False]


def test_along_a_drawn_line_the_sum_of_the_shares_is_the_same() -> None:
    points = _random_points(7, 20)
    chart = lay_out(points, [])
    places = np.array([mark.place for mark in chart.marks])
    maps = [
        np.polyfit(places[:, axis], [(p.over_refusal, p.attack_success)[axis] for p in points], 1)
        for axis in (0, 1)
    ]
    shares = [
        [np.polyval(maps[0], x) + np.polyval(maps[1], y) for x, y in (start, end)]
        for start, end in chart.sums
    ]
    assert len(shares) == 9
    for start, end in shares:
        assert start == pytest.approx(end, abs=0.005) and start * 5 == pytest.approx(
            round(start * 5), abs=0.03
        )


def test_intervals_are_within_the_axes_and_around_their_point() -> None:
    point = PlanePoint("mean", 0.2, 0.3, ((0.1, 0.62), (0.25, 0.4)))
    chart = lay_out([point], [])
    ((x1, y1), (x2, y2), _), ((x3, y3), (x4, y4), _) = chart.whiskers
    x, y = chart.marks[0].place
    assert y1 == y2 == y and x1 < x < x2 <= chart.axes.right
    assert x3 == x4 == x and y4 < y < y3


@pytest.mark.parametrize("share", [-0.01, 1.01, math.nan])
def test_a_share_that_is_none_has_no_place(share: float) -> None:
    with pytest.raises(DataError, match="expected a share from 0 to 1"):
        PlanePoint("it", share, 0.5)
    with pytest.raises(DataError, match="expected a share from 0 to 1"):
        PlanePoint("it", 0.5, 0.5, (None, (0.0, share)))


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(DataError, match="at least one point"):
        draw(title="Empty")


class _Elements(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_every_text_is_escaped_and_the_picture_says_what_it_shows() -> None:
    points = [PlanePoint(HOSTILE, 0.1, 0.2, group=HOSTILE), PlanePoint("b", 0.3, 0.1, group="G")]
    html = draw(points, title=HOSTILE, frontier=True)
    tags = _Elements(html).tags
    assert not {tag for tag, _ in tags} & {"script", "img"}
    assert not any(name.startswith("on") or name in ("style", "id") for _, attrs in tags for name in attrs)
    assert [attrs["role"] for tag, attrs in tags if tag == "svg" and "role" in attrs] == ["img", "img"]
    assert html.count("<title>&lt;script&gt;") == 2 * (1 + 1) and html.count("<desc>") == 2
    assert "b, G: attack success 10.0\N{NO-BREAK SPACE}%, harmless prompts refused 30.0" in html


def test_the_legend_names_the_groups_in_their_colours_and_the_kinds_that_occur() -> None:
    html = draw(
        [
            PlanePoint("a", 0.1, 0.2),
            PlanePoint("b", 0.2, 0.2, group="x"),
            PlanePoint("c", 0.2, 0.1, group="y"),
        ],
        title="Runs",
    )
    legend = re.findall(r'class="mark s(\d)"[^>]*/></svg>(\w)<', html)
    assert legend == [("1", "x"), ("2", "y")]
    ends = PlanePoint("", 0.1, 0.5), PlanePoint("", 0.4, 0.1)
    html = draw(arrows=[PlaneArrow(*ends, "Swahili", "trade"), PlaneArrow(*ends, "Zulu")], title="Languages")
    assert "trades safety for refusals</li>" in html and "not told apart (n too small)</li>" in html
    assert ">worse</li>" not in html and ">better</li>" not in html


# ------------------------------------------------------------------------------------------------------- in a browser


def test_twelve_groups_have_twelve_marks() -> None:
    points = [PlanePoint(str(n), n / 20, n / 20, group=str(n)) for n in range(12)]
    legend = re.findall(r'class="mark (s\d)"[^>]*? d="([^"]+)"/></svg>\d+<', draw(points, title="Runs"))
    assert len(legend) == len(set(legend)) == 12


def test_in_a_browser_labels_stay_within_the_boxes_that_were_planned_for_them(
    chromium: browser.Browser, tmp_path: Path
) -> None:
    from importlib.resources import files

    style = files("mpo.report").joinpath("page.css").read_text(encoding="utf-8")
    names = ["Swahili", "Mmmmm WWW", "run-λ=0.5 @2e-4", "中文模型", "Kölner Übung", "ভাষা", "mean of languages"]
    points = [PlanePoint(name, 0.1 * n, 0.08 * n) for n, name in enumerate(names)]
    page = tmp_path / "plane.html"
    page.write_text(
        f"<!DOCTYPE html><meta charset=utf-8><meta name=viewport content='width=device-width'><style>{style}</style>"
        f"<main>{draw(points, title='Runs')}</main>",
        encoding="utf-8",
    )
    for width, size in ((1280, "wide"), (390, "narrow")):
        chromium.width(width)
        chromium.open(page)
        found = chromium.run(
            f"return [...document.querySelectorAll('svg.{size} text.point')].map(e => [e.textContent, e.getBBox().x, "
            "e.getBBox().width, e.getBoundingClientRect().width])"
        )
        planned = {label.text: label.box for label in lay_out(points, [], size).labels}
        assert {text for text, *_ in found} == set(names) and all(shown > 0 for *_, shown in found)
        for text, left, wide, _ in found:
            assert planned[text].left <= left and left + wide <= planned[text].right, text
        assert chromium.run("return document.documentElement.scrollWidth <= innerWidth")
