"""The plane in which an effect is a point: attack success against refusals of harmless prompts, as SVG.

A run that lowers the first by raising the second has moved along the plane's diagonal and gained nothing; the picture shows it
at a glance. It serves a report (an arrow per language, from before to after) and a comparison of runs (a point per run, a
colour per group).

Everything is placed in pixels, twice: once for a page and once for a telephone, between which the style sheet chooses. Colours
are those of the page.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from mpo.common.figures import round_ticks
from mpo.common.words import ARROW, shortened
from mpo.errors import DataError
from mpo.report.measurement import SHARE
from mpo.report.rendering import html

Interval = tuple[float, float]
Place = tuple[float, float]
Kind = Literal["", "better", "worse", "trade"]

KINDS: dict[Kind, str] = {
    "better": "better",
    "trade": "trades safety for refusals",
    "worse": "worse",
    "": "not told apart (n too small)",
}
"""What a way through the plane is called."""

X_AXIS, Y_AXIS = "Refusals of harmless prompts (%)", "Attack success (%)"

_SIZES = {"wide": (600, 430), "narrow": (326, 340)}
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 12, 26, 40  # around the axes
_INSIDE = 9  # between an axis and 0, so that a mark on it is whole
_FONT, _MARK, _HEAD = 12.5, 5.0, 9.0
_MOST_LABELS = {"wide": 32, "narrow": 11}  # of more, only the hull's
_LONGEST_LABEL = {"wide": 24, "narrow": 17}  # characters


@dataclass(frozen=True)
class PlanePoint:
    """A model in one language, or a run.

    Attributes:
        label: What it is, as plain text.
        over_refusal: Share of harmless prompts that are refused, from 0 to 1.
        attack_success: Share of harmful prompts that are answered in an unsafe way, from 0 to 1.
        intervals: ``(low, high)`` of the first and of the second; None where there is none, or none is to be drawn.
        group: Points of a group have one colour and mark, and a line in the legend; empty for none.
    """

    label: str
    over_refusal: float
    attack_success: float
    intervals: tuple[Interval | None, Interval | None] = (None, None)
    group: str = ""

    def __post_init__(self) -> None:
        ends = [end for interval in self.intervals if interval is not None for end in interval]
        for share in (self.over_refusal, self.attack_success, *ends):
            if not -1e-9 <= share <= 1 + 1e-9:  # the mean of ones may be one and a rounding error
                raise DataError(
                    f"{self.label}: {share} is no place in the plane; expected a share from 0 to 1."
                )


@dataclass(frozen=True)
class PlaneArrow:
    """A way through the plane.

    Attributes:
        before: Where it starts; drawn hollow.
        after: Where it ends.
        label: What moved, as plain text.
        kind: Colour: ``better``, ``worse``, ``trade``, or nothing for a change that cannot be told from none.
        strong: Draw it heavier, as the mean among its languages.
    """

    before: PlanePoint
    after: PlanePoint
    label: str
    kind: Kind = ""
    strong: bool = False


class Box(NamedTuple):
    """A rectangle of the picture, in pixels from its upper left corner."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two share more than an edge."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def holds(self, other: Box) -> bool:
        """Whether the other lies within."""
        return (
            self.left <= other.left
            and self.top <= other.top
            and other.right <= self.right
            and other.bottom <= self.bottom
        )

    def is_crossed(self, start: Place, end: Place) -> bool:
        """Whether a straight line from one place to another meets it (Liang and Barsky, 1984)."""
        first, last = 0.0, 1.0
        for at, way, low, high in (
            (start[0], end[0] - start[0], self.left, self.right),
            (start[1], end[1] - start[1], self.top, self.bottom),
        ):
            if way == 0:
                if not low <= at <= high:
                    return False
                continue
            enter, leave = sorted(((low - at) / way, (high - at) / way))
            first, last = max(first, enter), min(last, leave)
        return first <= last


class Label(NamedTuple):
    """A text beside its mark; ``leader`` is the line to it where it stands apart."""

    text: str
    box: Box
    leader: tuple[Place, Place] | None
    strong: bool

    @property
    def baseline(self) -> Place:
        """Where the text starts."""
        return round(self.box.left + 2, 1), round(self.box.bottom - 4, 1)


class Mark(NamedTuple):
    """A point: its place, number of its group, and what it says when it is pointed at."""

    place: Place
    group: int
    title: str
    kind: str = ""
    hollow: bool = False


class Way(NamedTuple):
    """An arrow: its shaft, the three corners of its head, and what it says when it is pointed at."""

    start: Place
    end: Place
    head: tuple[Place, Place, Place] | None
    kind: str
    strong: bool
    title: str


@dataclass(frozen=True)
class Layout:
    """Where everything stands, in pixels.

    Attributes:
        size: ``wide`` or ``narrow``.
        width: Of the picture.
        height: Of the picture.
        axes: What the two axes enclose.
        across: ``(x, label)`` of each tick.
        up: ``(y, label)`` of each tick.
        sums: Lines on which the two shares have the same sum: along one, a point less of the first costs one of the second.
        frontier: Corners of the lower left hull of all ends; empty where it was not asked for.
        whiskers: Intervals as ``(start, end, class of the style sheet)``.
        ways: The arrows.
        marks: The points.
        labels: Texts, no two of which overlap. One for which there is no room is left out; where there are too many marks
            for a picture of this size, those of the hull and the heavier ones stay.
        groups: Names of the groups, in the order of their numbers.
    """

    size: str
    width: int
    height: int
    axes: Box
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]
    sums: tuple[tuple[Place, Place], ...]
    frontier: tuple[Place, ...]
    whiskers: tuple[tuple[Place, Place, str], ...]
    ways: tuple[Way, ...]
    marks: tuple[Mark, ...]
    labels: tuple[Label, ...]
    groups: tuple[str, ...]


def draw(
    points: Sequence[PlanePoint] = (),
    arrows: Sequence[PlaneArrow] = (),
    *,
    title: str,
    frontier: bool = False,
) -> str:
    """The plane as HTML: two SVG pictures, of which the style sheet ``page.css`` shows the one that fits, and a legend.

    Args:
        points: Single points, for example one per run.
        arrows: Ways from before to after, for example one per language.
        title: What the picture shows, for those who do not see it and as its tooltip. Plain text.
        frontier: Draw the lower left hull of all points and ends of arrows.

    Returns:
        HTML in which every text is escaped.

    Raises:
        DataError: There is nothing to draw.
    """
    described = ". ".join([*map(_arrow_title, arrows), *map(_point_title, points)]) + "."
    return html(
        "plane.html",
        layouts=[lay_out(points, arrows, size, frontier=frontier) for size in _SIZES],
        kinds=[(kind, word) for kind, word in KINDS.items() if kind in {arrow.kind for arrow in arrows}],
        title=title,
        description=described,
        has_arrows=bool(arrows),
        x_axis=X_AXIS,
        y_axis=Y_AXIS,
    )


def lay_out(
    points: Sequence[PlanePoint],
    arrows: Sequence[PlaneArrow],
    size: str = "wide",
    *,
    frontier: bool = False,
) -> Layout:
    """Where everything of :func:`draw` stands.

    Raises:
        DataError: There is nothing to draw.
    """
    ends = [*points, *(end for arrow in arrows for end in (arrow.before, arrow.after))]
    if not ends:
        raise DataError("There is nothing to draw in the plane; expected at least one point or arrow.")
    width, height = _SIZES[size]
    axes = Box(_LEFT, _TOP, width - _RIGHT, height - _BOTTOM)
    limits = _limits(
        max(end for p in ends for end in (p.over_refusal, *(p.intervals[0] or ()))),
        max(end for p in ends for end in (p.attack_success, *(p.intervals[1] or ()))),
    )

    def place(x: float, y: float) -> Place:
        across = (axes.right - axes.left - 2 * _INSIDE) * x / limits[0]
        up = (axes.bottom - axes.top - 2 * _INSIDE) * y / limits[1]
        return round(axes.left + _INSIDE + across, 1), round(axes.bottom - _INSIDE - up, 1)

    def of(point: PlanePoint) -> Place:
        return place(point.over_refusal, point.attack_success)

    groups = tuple(dict.fromkeys(point.group for point in ends))
    ways = [_way(of(arrow.before), of(arrow.after), arrow) for arrow in arrows]
    marks = [Mark(of(point), groups.index(point.group), _point_title(point)) for point in points]
    for arrow in arrows:
        marks.append(Mark(of(arrow.before), 0, _arrow_title(arrow), arrow.kind, hollow=True))
        if of(arrow.before) == of(arrow.after):
            marks.append(Mark(of(arrow.after), 0, _arrow_title(arrow), arrow.kind))
    longest = _LONGEST_LABEL[size]
    named = [(shortened(arrow.label, longest), of(arrow.after), arrow.strong) for arrow in arrows]
    named += [(shortened(point.label, longest), of(point), False) for point in points if point.label]
    hull = lower_left_hull(
        [(p.over_refusal, p.attack_success) for p in (*points, *(a.after for a in arrows))]
    )
    if len(named) > _MOST_LABELS[size]:
        best = {place(*corner) for corner in hull}
        named = [(text, at, strong) for text, at, strong in named if strong or at in best]
    drawn = [(point, f"s{groups.index(point.group) % 6}") for point in points]
    drawn += [(end, f"arrow {arrow.kind}") for arrow in arrows for end in (arrow.before, arrow.after)]
    whiskers = [(place(*a), place(*b), style) for point, style in drawn for a, b in _whiskers(point)]
    corners = tuple(place(*corner) for corner in hull) if frontier else ()
    room = Box(axes.left + 1, 14, width - 1, axes.bottom - 1)
    lines = [*((way.start, way.end) for way in ways), *pairwise(corners)]
    return Layout(
        size=size,
        width=width,
        height=height,
        axes=axes,
        across=tuple((place(value / 100, 0)[0], text) for value, text in round_ticks(0, 100 * limits[0])),
        up=tuple((place(0, value / 100)[1], text) for value, text in round_ticks(0, 100 * limits[1])),
        sums=tuple((place(*a), place(*b)) for a, b in _equal_sums(limits)),
        frontier=corners,
        whiskers=tuple(whiskers),
        ways=tuple(ways),
        marks=tuple(marks),
        labels=tuple(_labels(named, marks, lines, room)),
        groups=groups,
    )


def lower_left_hull(places: Iterable[Place]) -> list[Place]:
    """Corners of the convex hull that faces the origin: what a mixture of the given places can reach, and nothing better.

    Andrew's monotone chain (1979, *Information Processing Letters* 9(5)), up to where it would rise.

    Returns:
        From the leftmost place to the lowest, each further right and lower than the one before.
    """
    hull: list[Place] = []
    for place in sorted(set(places)):
        if hull and place[1] >= min(y for _, y in hull):
            continue
        while len(hull) > 1 and _turn(hull[-2], hull[-1], place) <= 0:
            hull.pop()
        hull.append(place)
    return hull


def _turn(a: Place, b: Place, c: Place) -> float:
    """Above 0 where the way over three places turns left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _limits(x: float, y: float) -> tuple[float, float]:
    """Ends of the axes: the next tens, and neither less than half of the other, lest small changes look large."""
    ends = [min(1.0, max(0.2, math.ceil(10 * end + 0.1) / 10)) for end in (x, y)]
    least = max(ends) / 2
    return max(ends[0], least), max(ends[1], least)


def _equal_sums(limits: tuple[float, float]) -> list[tuple[Place, Place]]:
    """A line for every 20 % of the sum, cut at the ends of the axes."""
    x, y = limits
    totals = [n / 5 for n in range(1, 10) if n / 5 < x + y - 1e-9]
    return [((max(0.0, t - y), min(t, y)), (min(t, x), max(0.0, t - x))) for t in totals]


def _whiskers(point: PlanePoint) -> list[tuple[Place, Place]]:
    x, y = point.over_refusal, point.attack_success
    across, up = point.intervals
    return [
        *([] if across is None else [((across[0], y), (across[1], y))]),
        *([] if up is None else [((x, up[0]), (x, up[1]))]),
    ]


def _way(start: Place, end: Place, arrow: PlaneArrow) -> Way:
    """The shaft ends within the head, whose tip is the place itself."""
    across, down = end[0] - start[0], end[1] - start[1]
    length = math.hypot(across, down)
    head = None
    if length > 0:
        size = min(_HEAD * (1.25 if arrow.strong else 1), length)
        ux, uy = across / length, down / length
        foot = end[0] - size * ux, end[1] - size * uy
        half = 0.45 * size
        corners = (
            end,
            (foot[0] - half * uy, foot[1] + half * ux),
            (foot[0] + half * uy, foot[1] - half * ux),
        )
        head = tuple((round(x, 1), round(y, 1)) for x, y in corners)
    return Way(start, end, head, arrow.kind or "untold", arrow.strong, _arrow_title(arrow))  # type: ignore[arg-type]


def _point_title(point: PlanePoint) -> str:
    def written(value: float, interval: Interval | None) -> str:
        return f"{SHARE.write(value)} {SHARE.write_interval(*(interval or (None, None)))}".rstrip()

    across, up = point.intervals
    return (
        f"{point.label}{f', {point.group}' if point.group else ''}: attack success {written(point.attack_success, up)}, "
        f"harmless prompts refused {written(point.over_refusal, across)}"
    )


def _arrow_title(arrow: PlaneArrow) -> str:
    attack = f" {ARROW} ".join(SHARE.write(end.attack_success) for end in (arrow.before, arrow.after))
    refused = f" {ARROW} ".join(SHARE.write(end.over_refusal) for end in (arrow.before, arrow.after))
    return f"{arrow.label}: attack success {attack}, harmless prompts refused {refused}"


# ------------------------------------------------------------------------------------------------------------- labels

_HEIGHT = 15.0
_DIRECTIONS = [(math.cos(n * math.pi / 8), math.sin(n * math.pi / 8)) for n in range(16)]
_DISTANCES = (9.0, 15.0, 24.0, 38.0, 56.0, 80.0, 110.0)
_LEADER_FROM = 18.0


def text_width(text: str) -> float:
    """Pixels that a text takes at most, by its characters: a full em for wide ones, nothing for combining ones."""

    def em(sign: str) -> float:
        if unicodedata.combining(sign) or unicodedata.category(sign) in ("Mn", "Cf"):
            return 0.0
        return 1.05 if unicodedata.east_asian_width(sign) in "WF" else 1.02 if sign in "MWmw@%" else 0.64

    return _FONT * sum(map(em, text))


def _labels(
    named: Sequence[tuple[str, Place, bool]],
    marks: Sequence[Mark],
    lines: Sequence[tuple[Place, Place]],
    room: Box,
) -> list[Label]:
    """Each label at the cheapest place that no other has taken: near its mark and no other, off marks and lines.

    Greedy: the heavier ones choose first, then those with most neighbours, which have least choice.
    """
    ends = [place for _, place, _ in named]
    obstacles = [
        _around(place, _MARK + 2) for place in dict.fromkeys([*ends, *(mark.place for mark in marks)])
    ]

    def crowd(place: Place) -> int:
        return sum(math.dist(place, other) < 45 for other in ends)

    def cost(label: Label, place: Place, distance: float) -> float:
        own = math.dist(_nearest_edge(label.box, place), place)
        total = distance + 90 * sum(label.box.overlaps(obstacle) for obstacle in obstacles)
        total += 25 * sum(label.box.is_crossed(*line) for line in lines)
        total += 25 * sum(label.box.is_crossed(*other.leader) for other in placed if other.leader)
        if label.leader is not None:
            total += 30 + 40 * sum(other.box.is_crossed(*label.leader) for other in placed)
        elif any(math.dist(_nearest_edge(label.box, other), other) < own for other in ends if other != place):
            total += 60  # it would be read as another's
        return total

    placed: list[Label] = []
    for text, place, strong in sorted(
        named, key=lambda item: (not item[2], -crowd(item[1]), item[1], item[0])
    ):
        width = text_width(text) * (1.08 if strong else 1) + 4
        best: tuple[float, Label] | None = None
        for distance in _DISTANCES:
            for direction in _DIRECTIONS:
                box = _beside(place, direction, distance, width)
                if not room.holds(box) or any(box.overlaps(other.box) for other in placed):
                    continue
                edge = _nearest_edge(box, place)
                leader = (place, edge) if math.dist(edge, place) > _LEADER_FROM else None
                found = Label(text, box, leader, strong)
                if best is None or distance < best[0]:
                    price = cost(found, place, distance)
                    best = (price, found) if best is None or price < best[0] else best
        if best is not None:
            placed.append(best[1])
    return placed


def _around(place: Place, reach: float) -> Box:
    return Box(place[0] - reach, place[1] - reach, place[0] + reach, place[1] + reach)


def _beside(place: Place, direction: tuple[float, float], distance: float, width: float) -> Box:
    """The box of a label whose nearest edge is so far from a place in a direction."""
    x = place[0] + direction[0] * (distance + width / 2)
    y = place[1] + direction[1] * (distance + _HEIGHT / 2)
    return Box(
        round(x - width / 2, 1), round(y - _HEIGHT / 2, 1), round(x + width / 2, 1), round(y + _HEIGHT / 2, 1)
    )


def _nearest_edge(box: Box, place: Place) -> Place:
    return min(max(place[0], box.left), box.right), min(max(place[1], box.top), box.bottom)
