"""Pictures of a run as PNG files: the reward gap per language before and after, and how training went."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpo.common import figures as style
from mpo.common.checks import is_number
from mpo.common.tables import printable_name
from mpo.common.words import ARROW, MINUS, counted, number
from mpo.data.languages import language_name
from mpo.errors import DataError
from mpo.evaluation.probe.behavior import ANSWERED, REFUSED
from mpo.evaluation.probe.change import BehaviorChange, Shift, is_worse
from mpo.evaluation.reward_gap import ALL_TARGETS, RewardGapRow, RewardGapTable, sort_languages

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAME_COLUMN = 1.5  # inches left of the axes
_VALUE_COLUMN = 1.65  # right of the axes
_ROW = 0.31  # per language
_HEAD = 0.95  # title, subtitle, label of the reference line
_HEAD_LINE = 0.19  # a second label there
_FOOT = 0.6  # ticks, axis label


def reward_gap_before_after(before: RewardGapTable, after: RewardGapTable, path: str | Path) -> Path:
    """Draw one line per language from its reward gap before to that after, with their confidence intervals.

    Args:
        before: Table before training.
        after: Table after training, of the same languages.
        path: PNG file to write.

    Raises:
        DependencyError: matplotlib is not installed.
        StorageError: The file cannot be written.
        DataError: The tables hold different languages.
    """
    old, new = _rows(before), _rows(after)
    if [(r.language, r.is_source) for r in old] != [(r.language, r.is_source) for r in new]:
        raise DataError("Before and after hold different languages. Evaluate both on the same data.")
    title = "Reward gap before and after training"
    if before.all_targets is not None and after.all_targets is not None:
        many = len(before.targets) > 1
        who = f"{len(before.targets)} target languages" if many else before.label(before.targets[0])
        gaps = (number(total.gap, 2, signed=True) for total in (before.all_targets, after.all_targets))
        title = "Reward gap of {}: {} before, {} after".format(who, *gaps)
    return _draw_gaps(before, {"before": old, "after": new}, path, title)


def reward_gap_single(table: RewardGapTable, path: str | Path) -> Path:
    """Draw the reward gap of each language of one model, with its confidence interval.

    Args:
        table: The table to draw.
        path: PNG file to write.

    Raises:
        DependencyError: matplotlib is not installed.
        StorageError: The file cannot be written.
    """
    return _draw_gaps(table, {"after": _rows(table)}, path, "Reward gap per language")


def training_curve(
    log_history: Sequence[Mapping[str, Any]], path: str | Path, *, source_language: str = "en"
) -> Path:
    """Draw the reward gap per language over the optimizer steps and, below, the loss with its two terms.

    Where refusals are taught beside harmless prompts and no held-out gap is followed, how likely a refusal is takes the place of
    the gap: of harmful prompts, where it is the chosen response, and dashed of harmless ones, where it is the rejected one.

    The gaps are those of held-out pairs, the source's among them, where they were measured at least twice: every one is a
    mean over the same pairs. Otherwise they are those of the pairs of each step, which differ from step to step. Of these,
    as of the loss, values as logged are faint and their smoothed course is drawn over them (a Gaussian of 4 % of the
    steps); diamonds, or dashed lines where there are many, are evaluations on held-out pairs. Missing keys and values that
    are not finite are left out.

    Args:
        log_history: ``trainer.state.log_history``: training logs and evaluations, in any order. The source's mean
            reference gap is what they imply, a gap minus its difference from the source's, or its held-out gap at step 0.
        path: PNG file to write.
        source_language: Code of the dominant language, for the label of its reference gap.

    Raises:
        DependencyError: matplotlib is not installed.
        StorageError: The file cannot be written.
    """
    names = {"loss": "loss", "loss/reward_gap": "gap term", "loss/retention": "retention"}
    losses = {name: series for key, name in names.items() if (series := _series(log_history, key))}
    languages = sort_languages(
        key.split("/", 1)[1]
        for entry in log_history
        for key in entry
        if key.startswith(("reward_gap/", "eval_reward_gap/"))
    )
    gaps = {code: _series(log_history, f"reward_gap/{code}") for code in languages}
    held_out = {code: _series(log_history, f"eval_reward_gap/{code}") for code in languages}
    held_out_loss = _series(log_history, "eval_loss")
    follows_held_out = any(len(series) > 1 for series in held_out.values())
    refusals = {} if follows_held_out else _refusals(log_history)
    with style.project_style():
        figure = style.new_figure(style.WIDTH, 6.6)
        left, inch = 0.09, 1 / 6.6
        rows = figure.add_gridspec(2, 1, height_ratios=[1.7, 1])
        below = figure.add_subplot(rows[1])
        above = figure.add_subplot(rows[0], sharex=below)
        above.tick_params(labelbottom=False)
        figure.subplots_adjust(left=left, right=0.8, top=1 - 0.82 * inch, bottom=0.6 * inch, hspace=0.16)
        evaluations = max(len(series) for series in (held_out_loss, *held_out.values()))
        mark = "" if not evaluations else "Dashed" if evaluations > _MOST_DIAMONDS else "Diamond"
        faint = "as logged; line: smoothed"
        if follows_held_out:
            subtitle = (
                f"Above: held-out pairs, measured {evaluations} times. Below: each step's own, faint {faint}"
            )
            subtitle += f"; {mark.lower()}: held-out." if held_out_loss else "."
        elif refusals:
            subtitle = f"Above: line: of harmful prompts, dashed: of harmless ones. Of each step's own pairs, faint {faint}."
        else:
            subtitle = f"Of each step's own pairs, faint {faint}." + (
                f" {mark}: held-out pairs." if mark else ""
            )
        title = _curve_title(losses.get("loss", []))
        if follows_held_out:
            title = (
                f"Reward gap on held-out pairs, and the loss, over {_last_step(held_out, losses):.0f} steps"
            )
        elif refusals:
            title = f"What is refused, and the loss, over {_last_step(losses):.0f} steps"
        style.add_title(figure, title, subtitle, left=left)
        _draw_losses(below, losses, held_out_loss)
        if refusals:
            _draw_refusals(above, refusals)
        elif follows_held_out:
            source_gap = _held_out_source_gap(log_history, languages, held_out.get(source_language))
            _draw_held_out_gaps(above, held_out, source_gap, source_language)
        else:
            source_gap = _implied_source_gap(log_history, languages)
            _draw_gap_curves(above, gaps, held_out, source_gap, language_name(source_language))
        for axes in (above, below):
            _name_lines(axes)
            axes.margins(x=0.01)
        below.locator_params(axis="x", nbins=8, integer=True, min_n_ticks=1)
        below.set_xlabel("Optimizer step")
        figure.align_ylabels([above, below])
        return style.save(figure, path)


# ------------------------------------------------------------------------------------------- what the model does


def behavior_plane(
    change: BehaviorChange, path: str | Path, log_history: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """Draw one arrow per language, and a bold one for their mean, from what the model did before training to after.

    To the right harmless prompts refused, upwards harmful ones answered, as in the plane of a report
    (:mod:`mpo.report.plane`): the lower left corner is where a model should be.
    Where the prompts were asked in between, the ways are drawn, too: thin lines with a dot at each probe.

    Args:
        change: What has changed.
        path: PNG file to write.
        log_history: ``trainer.state.log_history``.

    Raises:
        DependencyError: matplotlib is not installed.
        StorageError: The file cannot be written.
    """
    across, upwards = change.change[REFUSED], change.change[ANSWERED]
    codes = [code for code in across.languages if code in upwards.languages]
    harmful, harmless = change.per_language
    between = _probes(log_history)

    def ends(x: Shift, y: Shift) -> tuple[_Place, _Place]:
        return (100 * x.before, 100 * y.before), (100 * x.after, 100 * y.after)

    title = "Harmless prompts refused, and harmful ones answered"
    if across.mean is not None:
        first, last = (f"{100 * share:.0f} %" for share in (across.mean.before, across.mean.after))
        title = f"Harmless prompts refused: {first} before, {last} after"
    with style.project_style():
        figure = style.new_figure(style.WIDTH, 5.4)
        left, inch = 0.09, 1 / 5.4
        axes = figure.add_axes((left, 0.6 * inch, 0.62, 1 - 1.42 * inch), xlim=(-4, 104), ylim=(-4, 104))
        axes.set_xlabel("Harmless prompts refused (per cent)")
        axes.set_ylabel("Harmful prompts answered (per cent)")
        named: list[tuple[_Place, str, str]] = []
        for worse in (False, True):
            colour = style.VERMILION if worse else style.BLUE
            label = "refuses more harmless ones" if worse else "other languages"
            for code in codes:
                if is_worse(REFUSED, across.languages[code]) is worse:
                    way = ends(across.languages[code], upwards.languages[code])
                    _draw_arrow(axes, way, colour, label=label)
                    _draw_way(axes, way, _probes(log_history, f"/{code}"), colour)
                    named.append((way[-1], printable_name(language_name(code), 16), colour))
                    label = ""
        _name_places(axes, sorted(named, key=lambda each: each[0][1]))
        if across.mean is not None and upwards.mean is not None and len(codes) > 1:
            way = ends(across.mean, upwards.mean)
            _draw_way(axes, way, between, style.INK, width=1.2, alpha=1.0)
            _draw_arrow(axes, way, style.INK, label="mean of languages", width=2.6)
        axes.legend(loc="lower left", bbox_to_anchor=(1.06, 0), borderaxespad=0, borderpad=0)
        subtitle = (
            f"{counted(harmful, 'harmful prompt')} and {harmless} harmless ones a language. Ring: before, dot: after"
            f"{', small dots: in between' if between else ''}. Lower left is best."
        )
        style.add_title(figure, title, subtitle, left=left)
        return style.save(figure, path)


_Place = tuple[float, float]


def _draw_arrow(
    axes: Axes, ends: tuple[_Place, _Place], colour: str, *, label: str, width: float = 1.4
) -> None:
    before, after = ends
    if before != after:
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 4, "shrinkB": 4}
        axes.annotate("", xy=after, xytext=before, arrowprops=arrow, zorder=3)
    mark: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 6, "markeredgecolor": colour}
    axes.plot(*before, markerfacecolor="white", zorder=5, **mark)
    axes.plot(*after, markerfacecolor=colour, label=label or None, zorder=5, **mark)


def _name_places(axes: Axes, named: Sequence[tuple[_Place, str, str]]) -> None:
    """Names right of the axes, each beside its place or as near to that as the others let it, with a line to it."""
    least, most, apart = 24.0, 101.0, 5.6  # per cent; below is the legend
    heights: list[float] = []
    for (_, height), _, _ in named:
        heights.append(max(height, heights[-1] + apart if heights else least))
    for above in range(len(heights)):
        heights[-1 - above] = min(heights[-1 - above], most - above * apart)
    for (place, name, colour), height in zip(named, heights, strict=True):
        line: dict[str, Any] = {"clip_on": False, "color": style.GREY, "linewidth": 0.6, "zorder": 1}
        axes.plot([place[0], 104, 109], [place[1], height, height], **line)
        axes.text(110, height, name, color=colour, fontsize=9, va="center")


def _draw_way(
    axes: Axes,
    ends: tuple[_Place, _Place],
    between: Sequence[_Place],
    colour: str,
    *,
    width: float = 0.7,
    alpha: float = 0.5,
) -> None:
    if between:
        line: dict[str, Any] = {"color": colour, "linewidth": width, "alpha": alpha, "zorder": 2 + alpha}
        axes.plot(*zip(ends[0], *between, ends[1], strict=True), marker=".", markersize=5, **line)


def _probes(log_history: Sequence[Mapping[str, Any]], which: str = "") -> list[_Place]:
    """Where the mean, or a language (``/bn``), was at each probe after the first step."""
    names = (f"probe/{REFUSED}{which}", f"probe/{ANSWERED}{which}")
    found = {
        entry["step"]: (100 * entry[names[0]], 100 * entry[names[1]])
        for entry in log_history
        if entry.get("step") and all(is_number(entry.get(name)) for name in names)
    }
    return [found[step] for step in sorted(found)]


# ------------------------------------------------------------------------------------------- reward gap per language


def _rows(table: RewardGapTable) -> list[RewardGapRow]:
    """The rows to draw; the mean over all targets says nothing new where there is one target."""
    total = table.all_targets if len(table.targets) > 1 else None
    return [*table.rows, *([total] if total is not None else [])]


def _draw_gaps(
    table: RewardGapTable, series: Mapping[str, Sequence[RewardGapRow]], path: str | Path, title: str
) -> Path:
    rows = next(iter(series.values()))
    # One row of height each, with half a row of air after the source and before the mean of all targets.
    airy = [n and (rows[n - 1].is_source or row.language == ALL_TARGETS) for n, row in enumerate(rows)]
    positions = np.arange(len(rows)) + 0.45 * np.cumsum(airy)
    span = positions[-1] + 1
    height = _HEAD + _FOOT + _ROW * span + _HEAD_LINE * (len(table.reference_lines) - 1)
    with style.project_style():
        figure = style.new_figure(style.WIDTH, height)
        width = style.WIDTH - _NAME_COLUMN - _VALUE_COLUMN
        axes = figure.add_axes(
            (_NAME_COLUMN / style.WIDTH, _FOOT / height, width / style.WIDTH, _ROW * span / height),
            ylim=(span - 0.5, -0.5),
            xlabel="Reward gap (nats per token)",
        )
        axes.set_yticks(positions, [printable_name(table.label(row)) for row in rows])
        values = axes.secondary_yaxis("right")
        per_row = zip(*series.values(), strict=True)
        texts = [f" {ARROW} ".join(number(row.gap, 2, signed=True) for row in both) for both in per_row]
        values.set_yticks(positions, texts)
        for side in (axes, values):
            side.tick_params(axis="y", length=0, pad=8)
            side.spines[["left" if side is axes else "right"]].set_visible(False)
        axes.grid(axis="y", visible=False)
        for row, label in zip(rows, axes.get_yticklabels(), strict=True):
            if row.is_source or row is table.all_targets:
                label.set_fontweight("bold")

        axes.axvline(0, color=style.FAINT_INK, linewidth=0.9, zorder=1)
        _draw_marks(axes, series, positions)
        _draw_reference(axes, table)
        axes.set_xticks(*zip(*style.round_ticks(*axes.get_xlim(), signed=True), strict=True))
        if len(series) > 1:
            place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (1, 1), "borderaxespad": 0.3}
            axes.legend(ncols=2, handlelength=1, columnspacing=0.9, **place)
        intervals = f"bands are {100 * table.confidence:g} % bootstrap intervals"
        subtitle = f"Mean over {counted(table.groups, 'group')}; {intervals}"
        style.add_title(figure, title, subtitle, left=0.18 / style.WIDTH)
        return style.save(figure, path)


def _draw_marks(axes: Axes, series: Mapping[str, Sequence[RewardGapRow]], y: np.ndarray[Any, Any]) -> None:
    colours = {"before": style.BEFORE, "after": style.AFTER}
    apart = {"before": -0.13, "after": 0.13} if len(series) > 1 else {"after": 0.0}
    for name, rows in series.items():
        ends = np.array([[row.ci_low, row.ci_high] for row in rows], dtype=float).T
        places = np.stack([y, y]) + apart[name]
        band: dict[str, Any] = {"linewidth": 5.5, "solid_capstyle": "butt", "alpha": 0.28, "zorder": 2}
        axes.plot(ends, places, color=colours[name], **band)
    gaps = np.array([[row.gap for row in rows] for rows in series.values()])
    axes.plot(gaps, np.stack([y] * len(gaps)), color=style.FAINT_INK, linewidth=1.1, zorder=3)
    for n, (name, rows) in enumerate(series.items()):
        axes.plot(
            [row.gap for row in rows],
            y,
            label=name,
            linestyle="none",
            marker="o",
            markersize=6.5,
            markerfacecolor="white" if name == "before" else colours[name],
            markeredgecolor=colours[name],
            markeredgewidth=1.6,
            zorder=4 + n,
        )


def _draw_reference(axes: Axes, table: RewardGapTable) -> None:
    """The source's reference gap and, where beta is not 1, the gap that training aims at instead."""
    looks = (((5, 2), "bold"), ((1.5, 1.5), "normal"))
    lines = list(zip(table.reference_lines, looks, strict=False))
    for (value, _), (dashes, _) in lines:
        axes.axvline(value, color=style.REFERENCE, linewidth=1.5, dashes=dashes, zorder=1.5)
    low, high = axes.get_xlim()
    for n, ((value, label), (_, weight)) in enumerate(reversed(lines)):
        share = (value - low) / (high - low)
        axes.annotate(
            label,
            xy=(value, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4 + 13 * n),
            textcoords="offset points",
            ha="left" if share < 0.2 else "right" if share > 0.8 else "center",
            va="bottom",
            fontsize=9,
            color=style.REFERENCE,
            fontweight=weight,
        )


# ------------------------------------------------------------------------------------------------------ training curve

_Series = list[tuple[float, float]]
_FEWEST_FOR_A_TREND = 100
_MOST_DIAMONDS = 12  # more evaluations than this are a dashed line


def _series(log_history: Sequence[Mapping[str, Any]], key: str) -> _Series:
    """(step, value) by step; of a step that was logged twice, after a resumed run, the last."""
    points: dict[float, float] = {}
    for n, entry in enumerate(log_history):
        value, step = entry.get(key), entry.get("step", n)
        if is_number(value) and is_number(step):
            points[step] = value
    return sorted(points.items())


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
        f"Training loss {_digits(smooth[0][1])} {ARROW} {_digits(smooth[-1][1])} over {loss[-1][0]:.0f} steps"
    )


def _last_step(*kinds: Mapping[str, _Series]) -> float:
    return max(series[-1][0] for kind in kinds for series in kind.values() if series)


def _digits(value: float) -> str:
    """Three of them."""
    return f"{value:#.3g}".rstrip(".").replace("-", MINUS)


def _held_out_source_gap(
    log_history: Sequence[Mapping[str, Any]], languages: Sequence[str], measured: _Series | None
) -> float | None:
    """The source's gap before the first step: as it was measured on held-out pairs, or as evaluations or steps imply it."""
    if measured and measured[0][0] == 0:
        return measured[0][1]
    implied = _implied_source_gap(log_history, languages, "eval_")
    return _implied_source_gap(log_history, languages) if implied is None else implied


def _implied_source_gap(
    log_history: Sequence[Mapping[str, Any]], languages: Sequence[str], prefix: str = ""
) -> float | None:
    """Mean of (gap minus its difference from the source's): the source's reference gap over the pairs logged."""
    found = [
        entry[gap] - entry[difference]
        for entry in log_history
        for gap, difference in (
            (f"{prefix}reward_gap/{code}", f"{prefix}gap_to_source/{code}") for code in languages
        )
        if is_number(entry.get(gap)) and is_number(entry.get(difference))
    ]
    return math.fsum(found) / len(found) if found else None


def _draw_losses(axes: Axes, losses: Mapping[str, _Series], held_out: _Series) -> None:
    colours = {"loss": style.BLACK, "gap term": style.BLUE, "retention": style.ORANGE}
    for name, series in losses.items():
        line = _draw_course(axes, series, colours[name], width=2.0 if name == "loss" else 1.6)
        line.set_label(f"{name} {_digits(line.get_ydata()[-1])}")
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
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_ylabel("Loss (log scale)")
    elif min(values) >= 0:
        axes.set_ylim(0, 1.06 * max(values) or 1.0)


def _prepare_gap_axes(axes: Axes, source_gap: float | None, source_name: str) -> None:
    """What gaps are read against: their unit, 0, and the source's reference where it is known."""
    axes.set_ylabel("Reward gap (nats per token)")
    axes.axhline(0, color=style.FAINT_INK, linewidth=0.9, zorder=1)
    if source_gap is not None:
        label = f"{source_name} reference"
        axes.axhline(source_gap, label=label, color=style.REFERENCE, linewidth=1.5, dashes=(5, 2), zorder=1.5)


def _draw_gap_curves(
    axes: Axes,
    gaps: Mapping[str, _Series],
    held_out: Mapping[str, _Series],
    source_gap: float | None,
    source_name: str,
) -> None:
    _prepare_gap_axes(axes, source_gap, source_name)
    drawn = {code: gaps[code] or held_out[code] for code in gaps if gaps[code] or held_out[code]}
    if not drawn:
        _say_empty(axes, "no reward gap was logged")
    if len(drawn) > len(style.CYCLE):
        _draw_many(axes, drawn)
        return
    for colour, code in zip(style.CYCLE, drawn, strict=False):
        lines = [_draw_course(axes, gaps[code], colour)] if gaps[code] else []
        lines += [_draw_held_out(axes, held_out[code], colour)] if held_out[code] else []
        lines[0].set_label(printable_name(language_name(code), 16))


def _refusals(log_history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[_Series, _Series]]:
    """Per cent, of harmful and of harmless prompts of each language that has both; nothing where none is ever said."""
    starts = "greedy/chosen/", "harmless/greedy/rejected/"
    languages = sort_languages(
        key.removeprefix(starts[0]) for entry in log_history for key in entry if key.startswith(starts[0])
    )
    found = {}
    for code in languages:
        harmful, harmless = (
            [(step, 100 * value) for step, value in _series(log_history, f"{start}{code}")]
            for start in starts
        )
        if harmful and harmless:
            found[code] = harmful, harmless
    said = any(value > 0 for both in found.values() for series in both for _, value in series)
    return found if said else {}


def _draw_refusals(axes: Axes, refusals: Mapping[str, tuple[_Series, _Series]]) -> None:
    axes.set_ylabel("Refused (%)")
    axes.set_ylim(-2, 102)
    if len(refusals) > len(style.CYCLE):
        for place, (name, colour) in enumerate((("harmful", style.BLUE), ("harmless", style.VERMILION))):
            mean = _mean_course([both[place] for both in refusals.values()])
            _draw_course(axes, mean, colour, width=2.4).set_label(name)
        axes.set_ylabel(f"Refused (%), mean of {len(refusals)}")
        return
    for colour, (code, (harmful, harmless)) in zip(style.CYCLE, refusals.items(), strict=False):
        _draw_course(axes, harmful, colour).set_label(printable_name(language_name(code), 16))
        _draw_course(axes, harmless, colour, raw=False).set_linestyle((0, (3, 2)))


def _draw_held_out_gaps(
    axes: Axes, held_out: Mapping[str, _Series], source_gap: float | None, source: str
) -> None:
    """A line per language through what was measured; the source's is bold."""
    _prepare_gap_axes(axes, source_gap, language_name(source))
    targets = {code: series for code, series in held_out.items() if series and code != source}
    drawn = [(code, colour, 1.6) for colour, code in zip(style.CYCLE, targets, strict=False)]
    if len(targets) > len(style.CYCLE):
        _draw_many(axes, targets)
        drawn = []
    if held_out.get(source):
        drawn.append((source, style.REFERENCE, 2.6))
    for code, colour, width in drawn:
        series = held_out[code]
        few: dict[str, Any] = {
            "marker": "D",
            "markersize": 5,
            "markeredgecolor": "white",
            "markeredgewidth": 0.8,
        }
        (line,) = axes.plot(
            *zip(*series, strict=True),
            color=colour,
            linewidth=width,
            zorder=4,
            **(few if len(series) <= _MOST_DIAMONDS else {}),
        )
        line.set_label(printable_name(language_name(code), 16))


def _draw_many(axes: Axes, drawn: Mapping[str, _Series]) -> None:
    """More languages than colours: all in grey, with their mean, and the three that end lowest by name."""
    last = {}
    for code, series in drawn.items():
        smooth = _smooth(series) if len(series) > 2 else series
        last[code] = smooth[-1][1]
        axes.plot(*zip(*smooth, strict=True), color=style.GREY, linewidth=0.8, alpha=0.7, zorder=2)
    mean = _mean_course(drawn.values())
    _draw_course(axes, mean, style.BLUE, width=2.4).set_label(f"mean of {len(drawn)}")
    lowest = sorted(last, key=lambda code: last[code])[:3]
    for code, colour in zip(lowest, (style.VERMILION, style.PURPLE, style.ORANGE), strict=True):
        line = _draw_course(axes, drawn[code], colour, raw=False)
        line.set_label(printable_name(language_name(code), 16))


def _mean_course(drawn: Iterable[_Series]) -> _Series:
    """At each step the mean of those that have a value there."""
    values: dict[float, list[float]] = defaultdict(list)
    for series in drawn:
        for step, value in series:
            values[step].append(value)
    return [(step, math.fsum(v) / len(v)) for step, v in sorted(values.items())]


def _draw_course(axes: Axes, series: _Series, colour: str, *, width: float = 1.6, raw: bool = True) -> Any:
    """Faint raw values and their smoothed course, which is returned."""
    points = _smooth(series) if len(series) > 2 else series
    if raw and points is not series:
        alpha = 0.22 * min(1.0, 150 / len(series))  # hundreds of noisy points would hide the lines
        axes.plot(*zip(*series, strict=True), color=colour, linewidth=0.8, alpha=alpha, zorder=2)
    marker = "o" if points is series else None
    (line,) = axes.plot(
        *zip(*points, strict=True), color=colour, linewidth=width, marker=marker, markersize=4, zorder=3
    )
    return line


def _draw_held_out(axes: Axes, series: _Series, colour: str) -> Any:
    many = len(series) > _MOST_DIAMONDS
    (line,) = axes.plot(
        *zip(*series, strict=True),
        color=colour,
        linewidth=1.4,
        linestyle=(0, (2.5, 1.5)) if many else "none",
        marker=None if many else "D",
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        zorder=5,
    )
    return line


def _name_lines(axes: Axes) -> None:
    """Names right of the axes, in the order in which their lines end."""
    named = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    named.sort(key=lambda line: -float(np.asarray(line.get_ydata())[-1]))
    if named:
        axes.legend(handles=named, loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0, borderpad=0)


def _say_empty(axes: Axes, what: str) -> None:
    axes.text(0.5, 0.5, what, transform=axes.transAxes, ha="center", va="center", color=style.FAINT_INK)
