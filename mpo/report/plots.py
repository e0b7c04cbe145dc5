"""Pictures of a run: the reward gap per language before and after, and how training went."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from mpo.common import figures as style
from mpo.common.tables import printable_name
from mpo.data.languages import language_name
from mpo.errors import DataError
from mpo.evaluation.reward_gap import ALL_TARGETS, RewardGapRow, RewardGapTable, sort_languages

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

MINUS = "\N{MINUS SIGN}"
ARROW = "\N{RIGHTWARDS ARROW}"

_NAME_COLUMN = 1.5  # inches left of the axes
_VALUE_COLUMN = 1.65  # inches right of the axes
_ROW = 0.31  # inches per language
_HEAD = 0.95  # title, subtitle, label of the reference line
_HEAD_LINE = 0.19  # a second label there
_FOOT = 0.6  # ticks, axis label


def reward_gap_before_after(
    before: RewardGapTable, after: RewardGapTable, path: str | Path, *, title: str | None = None
) -> Path:
    """Draw one line per language from its reward gap before to that after, with their confidence intervals.

    Args:
        before: Table before training.
        after: Table after training, of the same languages.
        path: PNG file to write.
        title: Replaces the title.

    Raises:
        DependencyError: matplotlib is not installed.
        StorageError: The file cannot be written.
        DataError: The tables hold different languages.
    """
    old, new = _rows(before), _rows(after)
    if [(r.language, r.is_source) for r in old] != [(r.language, r.is_source) for r in new]:
        raise DataError("Before and after hold different languages. Evaluate both on the same data.")
    if title is None:
        title = _before_after_title(before, after)
    return _draw_gaps(before, [(old, "before", style.BEFORE), (new, "after", style.AFTER)], path, title)


def reward_gap_single(table: RewardGapTable, path: str | Path, *, title: str | None = None) -> Path:
    """Draw the reward gap of each language of one model, with its confidence interval.

    Args:
        table: The table to draw.
        path: PNG file to write.
        title: Replaces the title.

    Raises:
        DependencyError: matplotlib is not installed.
        StorageError: The file cannot be written.
    """
    return _draw_gaps(
        table, [(_rows(table), "reward gap", style.AFTER)], path, title or "Reward gap per language"
    )


def training_curve(
    log_history: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    source_language: str = "en",
    source_gap: float | None = None,
    title: str | None = None,
) -> Path:
    """Draw the loss with its two terms over the optimizer steps and, below, the reward gap per language.

    Values as logged are faint, their smoothed course is drawn over them (a Gaussian of 4 % of the steps); diamonds,
    or dashed lines where there are many, are evaluations on held-out pairs. Missing keys and values that are not finite are left out.

    Args:
        log_history: ``trainer.state.log_history``: training logs and evaluations, in any order.
        path: PNG file to write.
        source_language: Code of the dominant language, for the label of its reference gap.
        source_gap: Mean reference gap of the source; by default the one that the logs imply (gap minus its
            difference from the source's).
        title: Replaces the title.

    Raises:
        DependencyError: matplotlib is not installed.
        StorageError: The file cannot be written.
    """
    losses = {
        name: series
        for key, name in (
            ("loss", "loss"),
            ("loss/reward_gap", "gap term"),
            ("loss/retention", "retention"),
        )
        if (series := _series(log_history, key))
    }
    languages = sort_languages(
        key.split("/", 1)[1]
        for entry in log_history
        for key in entry
        if key.startswith(("reward_gap/", "eval_reward_gap/"))
    )
    gaps = {code: _series(log_history, f"reward_gap/{code}") for code in languages}
    held_out = {code: _series(log_history, f"eval_reward_gap/{code}") for code in languages}
    if source_gap is None:
        source_gap = _implied_source_gap(log_history, languages)
    with style.project_style():
        figure = style.new_figure(8.6, 6.6)
        left, right, inch = 0.09, 0.8, 1 / 6.6
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.35])
        figure.subplots_adjust(left=left, right=right, top=1 - 0.82 * inch, bottom=0.6 * inch, hspace=0.16)
        style.add_title(
            figure,
            title or _curve_title(losses.get("loss", [])),
            _curve_subtitle([_series(log_history, "eval_loss"), *held_out.values()]),
            left=left,
        )
        _draw_losses(top, losses, _series(log_history, "eval_loss"))
        _draw_gap_curves(bottom, gaps, held_out, source_gap, language_name(source_language))
        _step_axis(top, bottom)
        figure.align_ylabels([top, bottom])
        return style.save(figure, path)


# ------------------------------------------------------------------------------------------- reward gap per language


def _rows(table: RewardGapTable) -> list[RewardGapRow]:
    """The rows to draw; the mean over all targets says nothing new where there is one target."""
    show_total = table.all_targets is not None and len(table.targets) > 1
    return [*table.rows, *([table.all_targets] if show_total and table.all_targets is not None else [])]


def _before_after_title(before: RewardGapTable, after: RewardGapTable) -> str:
    """What is seen: whether the targets have come nearer to the goal of training."""
    if before.all_targets is None or after.all_targets is None:
        return "Reward gap before and after training"
    many = len(before.targets) > 1
    who = f"{len(before.targets)} target languages" if many else before.label(before.targets[0])
    return f"Reward gap of {who}: {_number(before.all_targets.gap)} before, {_number(after.all_targets.gap)} after"


def _draw_gaps(
    table: RewardGapTable,
    series: Sequence[tuple[Sequence[RewardGapRow], str, str]],
    path: str | Path,
    title: str,
) -> Path:
    labels = [printable_name(table.label(row)) for row in series[0][0]]
    positions = _positions(series[0][0])
    span = positions[-1] + 1
    head = _HEAD if _aims_at_source(table) else _HEAD + _HEAD_LINE
    width, height = 8.6, head + _FOOT + _ROW * span
    with style.project_style():
        figure = style.new_figure(width, height)
        axes = figure.add_axes(
            (
                _NAME_COLUMN / width,
                _FOOT / height,
                (width - _NAME_COLUMN - _VALUE_COLUMN) / width,
                _ROW * span / height,
            )
        )
        axes.set_ylim(span - 0.5, -0.5)
        axes.set_yticks(positions, labels)
        axes.tick_params(axis="y", length=0, pad=8)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        for row, label in zip(series[0][0], axes.get_yticklabels(), strict=True):
            if row.is_source or row is table.all_targets:
                label.set_fontweight("bold")

        axes.axvline(0, color=style.FAINT_INK, linewidth=0.9, zorder=1)
        _draw_markers(axes, series, positions)
        _gap_limits(axes, table, series)
        _label_reference(axes, table)
        _print_values(axes, series, positions)
        axes.set_xlabel("Reward gap (nats per token)")
        _number_axis(axes.xaxis, bins=6)
        _gap_legend(axes, series)
        style.add_title(
            figure,
            title,
            f"Mean over {_plural(table.groups, 'group')}; bands are {100 * table.confidence:g} % bootstrap intervals",
            left=0.18 / width,
        )
        return style.save(figure, path)


def _positions(rows: Sequence[RewardGapRow]) -> list[float]:
    """One row of height each, with half a row of air after the source and before the mean of all targets."""
    positions, at = [], 0.0
    for number, row in enumerate(rows):
        if number and (rows[number - 1].is_source or row.language == ALL_TARGETS):
            at += 0.45
        positions.append(at)
        at += 1
    return positions


def _draw_markers(
    axes: Axes, series: Sequence[tuple[Sequence[RewardGapRow], str, str]], positions: Sequence[float]
) -> None:
    two = len(series) == 2
    for number, (rows, _, colour) in enumerate(series):
        for row, y in zip(rows, positions, strict=True):
            if row.ci_low is not None and row.ci_high is not None:
                offset = (-0.13, 0.13)[number] if two else 0.0
                axes.plot(
                    [row.ci_low, row.ci_high],
                    [y + offset] * 2,
                    color=colour,
                    alpha=0.28,
                    linewidth=5.5,
                    solid_capstyle="butt",
                    zorder=2,
                )
    if two:
        for old, new, y in zip(series[0][0], series[1][0], positions, strict=True):
            axes.plot([old.gap, new.gap], [y, y], color=style.FAINT_INK, linewidth=1.1, zorder=3)
    for number, (rows, _, colour) in enumerate(series):
        hollow = two and number == 0
        axes.plot(
            [row.gap for row in rows],
            positions,
            linestyle="none",
            marker="o",
            markersize=6.5,
            markerfacecolor="white" if hollow else colour,
            markeredgecolor=colour,
            markeredgewidth=1.6,
            zorder=4 + number,
        )


def _gap_limits(
    axes: Axes, table: RewardGapTable, series: Sequence[tuple[Sequence[RewardGapRow], str, str]]
) -> None:
    values = [0.0, table.reference_gap, table.goal]
    for rows, _, _ in series:
        values += [v for row in rows for v in (row.gap, row.ci_low, row.ci_high) if v is not None]
    low, high = min(values), max(values)
    margin = 0.05 * ((high - low) or 1.0)
    axes.set_xlim(low - margin, high + margin)


def _label_reference(axes: Axes, table: RewardGapTable) -> None:
    """The source's reference gap and, where beta is not 1, the gap that training aims at instead."""
    reference = f"{table.source_label} reference {_number(table.reference_gap)}"
    lines: list[tuple[float, str, tuple[float, float]]] = [(table.reference_gap, reference, (5, 2))]
    if not _aims_at_source(table):
        lines.append(
            (table.goal, f"goal (reference / \N{GREEK SMALL LETTER BETA}) {_number(table.goal)}", (1.5, 1.5))
        )
    low, high = axes.get_xlim()
    for number, (value, label, dashes) in enumerate(lines):
        axes.axvline(value, color=style.REFERENCE, linewidth=1.5, dashes=dashes, zorder=1.5)
        fraction = (value - low) / (high - low)
        axes.annotate(
            label,
            xy=(value, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4 + 13 * (len(lines) - 1 - number)),
            textcoords="offset points",
            ha="left" if fraction < 0.2 else "right" if fraction > 0.8 else "center",
            va="bottom",
            fontsize=9,
            color=style.REFERENCE,
            fontweight="bold" if number == 0 else "normal",
        )


def _aims_at_source(table: RewardGapTable) -> bool:
    return math.isclose(table.beta, 1.0)


def _print_values(
    axes: Axes, series: Sequence[tuple[Sequence[RewardGapRow], str, str]], positions: Sequence[float]
) -> None:
    """The numbers themselves, in a column right of the axes."""
    per_row = zip(*(rows for rows, _, _ in series), strict=True)
    for rows, y in zip(per_row, positions, strict=True):
        axes.annotate(
            f" {ARROW} ".join(_number(row.gap) for row in rows),
            xy=(1, y),
            xycoords=("axes fraction", "data"),
            xytext=(12, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=style.INK,
            annotation_clip=False,
        )


def _gap_legend(axes: Axes, series: Sequence[tuple[Sequence[RewardGapRow], str, str]]) -> None:
    """The markers' names, as the heading of the column of numbers."""
    if len(series) == 1:
        return
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=colour,
            marker="o",
            markersize=6.5,
            linestyle="none",
            markerfacecolor="white" if number == 0 else colour,
            markeredgewidth=1.6,
            label=name,
        )
        for number, (_, name, colour) in enumerate(series)
    ]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(1 + 0.1 / style.inches(axes)[0], 1 + 0.02 / style.inches(axes)[1]),
        borderaxespad=0,
        borderpad=0,
        ncols=2,
        handlelength=1.0,
        handletextpad=0.3,
        columnspacing=0.9,
    )


# ------------------------------------------------------------------------------------------------------ training curve

_Series = list[tuple[float, float]]
_FEWEST_FOR_A_TREND = 100
_MOST_DIAMONDS = 12  # more evaluations than this are a dashed line


def _series(log_history: Sequence[Mapping[str, Any]], key: str) -> _Series:
    """(step, value) by step; of a step that was logged twice, after a resumed run, the last."""
    points: dict[float, float] = {}
    for number, entry in enumerate(log_history):
        value, step = entry.get(key), entry.get("step", number)
        if _is_finite(value) and _is_finite(step):
            points[step] = value
    return sorted(points.items())


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _smooth(series: _Series) -> _Series:
    """Mean under a Gaussian of 4 % of the steps, at least one step wide; at the ends, of what there is."""
    step, value = np.array(series).T
    width = max(0.04 * (step[-1] - step[0]), float(np.median(np.diff(step))))
    # No more places than the picture can show: all against all would fill the memory in a long run.
    places = step[np.unique(np.linspace(0, len(step) - 1, 400).round().astype(int))]
    weights = np.exp(-0.5 * ((places[:, None] - step[None, :]) / width) ** 2)
    return list(zip(places.tolist(), (weights @ value / weights.sum(axis=1)).tolist(), strict=True))


def _curve_title(loss: _Series) -> str:
    if len(loss) < 3:
        return "Training loss and reward gap"
    if len(loss) < _FEWEST_FOR_A_TREND:
        # The loss of single groups differs more between groups than training changes it.
        return f"Training loss and reward gap over {loss[-1][0]:.0f} steps"
    smooth = _smooth(loss)
    return (
        f"Training loss {_plain(smooth[0][1])} {ARROW} {_plain(smooth[-1][1])} over {loss[-1][0]:.0f} steps"
    )


def _curve_subtitle(held_out: Sequence[_Series]) -> str:
    evaluations = max(len(series) for series in held_out)
    mark = "" if not evaluations else "Dashed" if evaluations > _MOST_DIAMONDS else "Diamond"
    return "Faint: as logged. Line: smoothed." + (f" {mark}: held-out pairs." if mark else "")


def _implied_source_gap(log_history: Sequence[Mapping[str, Any]], languages: Sequence[str]) -> float | None:
    """Mean of (gap minus its difference from the source's): the source's reference gap over the pairs logged."""
    found = [
        entry[f"reward_gap/{code}"] - entry[f"gap_to_source/{code}"]
        for entry in log_history
        for code in languages
        if _is_finite(entry.get(f"reward_gap/{code}")) and _is_finite(entry.get(f"gap_to_source/{code}"))
    ]
    return math.fsum(found) / len(found) if found else None


def _draw_losses(axes: Axes, losses: Mapping[str, _Series], held_out: _Series) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    colours = {"loss": style.BLACK, "gap term": style.BLUE, "retention": style.ORANGE}
    ends = []
    for name, series in losses.items():
        end = _draw_course(axes, series, colours[name], width=2.0 if name == "loss" else 1.6)
        ends.append((end, f"{name} {_plain(end)}", colours[name]))
    if held_out:
        _draw_held_out(axes, held_out, style.BLACK)
    values = [v for series in (*losses.values(), held_out) for _, v in series]
    axes.set_ylabel("Loss")
    if not values:
        _say_empty(axes, "no loss was logged")
    elif min(values) > 0 and max(values) > 100 * min(values) and "loss" in losses:
        axes.set_yscale("log")
        # The retention term starts at rounding's level, which would leave no room for the rest.
        axes.set_ylim(bottom=max(min(values) / 2, 1e-4 * max(values)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("Loss (log scale)")
    elif min(values) >= 0:
        axes.set_ylim(0, 1.06 * max(values) or 1.0)
    _label_ends(axes, ends)


def _draw_gap_curves(
    axes: Axes,
    gaps: Mapping[str, _Series],
    held_out: Mapping[str, _Series],
    source_gap: float | None,
    source_name: str,
) -> None:
    axes.set_ylabel("Reward gap (nats per token)")
    axes.axhline(0, color=style.FAINT_INK, linewidth=0.9, zorder=1)
    ends = []
    if source_gap is not None and _is_finite(source_gap):
        axes.axhline(source_gap, color=style.REFERENCE, linewidth=1.5, dashes=(5, 2), zorder=1.5)
        ends.append((source_gap, f"{source_name} reference", style.REFERENCE))
    drawn = {code: gaps[code] or held_out[code] for code in gaps if gaps[code] or held_out[code]}
    if not drawn:
        _say_empty(axes, "no reward gap was logged")
    if len(drawn) <= len(style.CYCLE):
        for colour, code in zip(style.CYCLE, drawn, strict=False):
            end = _draw_course(axes, gaps[code], colour) if gaps[code] else held_out[code][-1][1]
            _draw_held_out(axes, held_out[code], colour)
            ends.append((end, printable_name(language_name(code), 16), colour))
    else:
        ends += _draw_many(axes, drawn)
    _label_ends(axes, ends)


def _draw_many(axes: Axes, drawn: Mapping[str, _Series]) -> list[tuple[float, str, str]]:
    """More languages than colours: all in grey, with their mean, and the three that end lowest by name."""
    values: dict[float, list[float]] = defaultdict(list)
    last = {}
    for code, series in drawn.items():
        smooth = _smooth(series) if len(series) > 2 else series
        last[code] = smooth[-1][1]
        axes.plot(*zip(*smooth, strict=True), color=style.GREY, linewidth=0.8, alpha=0.7, zorder=2)
        for step, value in series:
            values[step].append(value)
    mean = [(step, math.fsum(v) / len(v)) for step, v in sorted(values.items())]
    ends = [(_draw_course(axes, mean, style.BLUE, width=2.4), f"mean of {len(drawn)}", style.BLUE)]
    lowest = sorted(last, key=lambda code: last[code])[:3]
    for code, colour in zip(lowest, (style.VERMILION, style.PURPLE, style.ORANGE), strict=True):
        end = _draw_course(axes, drawn[code], colour, raw=False)
        ends.append((end, printable_name(language_name(code), 16), colour))
    return ends


def _draw_course(axes: Axes, series: _Series, colour: str, *, width: float = 1.6, raw: bool = True) -> float:
    """Faint raw values and their smoothed course. Returns where it ends."""
    if len(series) < 3:
        axes.plot(
            *zip(*series, strict=True), color=colour, linewidth=width, marker="o", markersize=4, zorder=3
        )
        return series[-1][1]
    smooth = _smooth(series)
    if raw:
        alpha = 0.22 * min(1.0, 150 / len(series))  # hundreds of noisy points would hide the lines
        axes.plot(*zip(*series, strict=True), color=colour, linewidth=0.8, alpha=alpha, zorder=2)
    axes.plot(*zip(*smooth, strict=True), color=colour, linewidth=width, zorder=3)
    return smooth[-1][1]


def _draw_held_out(axes: Axes, series: _Series, colour: str) -> None:
    if len(series) > _MOST_DIAMONDS:
        axes.plot(*zip(*series, strict=True), color=colour, linewidth=1.4, dashes=(2.5, 1.5), zorder=5)
    elif series:
        axes.plot(
            *zip(*series, strict=True),
            linestyle="none",
            marker="D",
            markersize=5,
            markerfacecolor=colour,
            markeredgecolor="white",
            markeredgewidth=0.8,
            zorder=5,
        )


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names right of the axes at the height of their lines, moved apart where they would overlap."""
    if not ends:
        return
    to_axes = (axes.transScale + axes.transLimits).transform
    low, high = axes.get_ylim()
    wanted = sorted(
        (float(to_axes((0, min(max(value, low), high)))[1]), label, colour) for value, label, colour in ends
    )
    spread = _spread([y for y, _, _ in wanted], gap=0.19 / style.inches(axes)[1])
    for (y, label, colour), place in zip(wanted, spread, strict=True):
        axes.annotate(
            label,
            xy=(1, y),
            xycoords="axes fraction",
            xytext=(1.04, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=style.INK,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 1.6,
                "shrinkA": 2,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """The places nearest to `wanted` (ascending) that lie at least `gap` apart, in least squares.

    Subtracting ``i * gap`` turns this into isotonic regression, solved by pooling adjacent violators.
    """
    blocks: list[tuple[float, int]] = []
    for number, place in enumerate(wanted):
        mean, size = place - number * gap, 1
        while blocks and blocks[-1][0] > mean:
            previous, count = blocks.pop()
            mean = (mean * size + previous * count) / (size + count)
            size += count
        blocks.append((mean, size))
    flat = [mean for mean, size in blocks for _ in range(size)]
    return [mean + number * gap for number, mean in enumerate(flat)]


def _step_axis(top: Axes, bottom: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    bottom.set_xlabel("Optimizer step")
    bottom.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    ends = [end for axes in (top, bottom) for end in axes.dataLim.intervalx if math.isfinite(end)]
    if not ends:
        bottom.set_xlim(0, 1)
    elif min(ends) == max(ends):
        bottom.set_xlim(ends[0] - 1, ends[0] + 1)
    else:
        margin = 0.01 * (max(ends) - min(ends))
        bottom.set_xlim(min(ends) - margin, max(ends) + margin)


def _say_empty(axes: Axes, what: str) -> None:
    axes.text(0.5, 0.5, what, transform=axes.transAxes, ha="center", va="center", color=style.FAINT_INK)


# -------------------------------------------------------------------------------------------------------------- numbers


def _number_axis(axis: Axis, *, bins: int) -> None:
    """Round ticks with signs, all with as many digits as the step between them needs."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator

    low, high = axis.get_view_interval()
    ticks = [
        t
        for t in MaxNLocator(nbins=bins, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        if low <= t <= high
    ]
    digits = next(d for d in range(10) if d == 9 or all(abs(round(t, d) - t) < 1e-9 for t in ticks))
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter(["0" if abs(t) < 1e-12 else _number(t, digits) for t in ticks]))


def _number(value: float, digits: int = 2) -> str:
    """A gap with its sign, and a real minus."""
    text = f"{value:+.{digits}f}"
    return (text[1:] if float(text) == 0 else text).replace("-", MINUS)


def _plain(value: float) -> str:
    return f"{value:#.3g}".rstrip(".").replace("-", MINUS)


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
