"""Pictures of the hidden space: clusters, separation by layer, a heat map of the change, cosines of harm directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpo.common import figures as style
from mpo.common.fonts import drawable, families_for
from mpo.common.tables import printable_name
from mpo.data.languages import language_name
from mpo.hidden_space.compare import AFTER, BEFORE, LanguageResult, LanguageTexts
from mpo.hidden_space.projection import centred, principal_plane, shared_plane, spread
from mpo.hidden_space.resampling import Array, Estimate
from mpo.hidden_space.results import LABELS, HiddenSpace, ModelResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HARMFUL = style.ORANGE
HARMLESS = style.INK
ARROW = "\N{RIGHTWARDS ARROW}"
MINUS = "\N{MINUS SIGN}"

_POINTS = 200  # of each class in a scatter; the ellipses are those of all texts
_PER_BAND = 4  # languages beside each other
_WIDTH = 8.6
_CELL_CHARACTERS = 12  # of a line that fills a cell of the table at its usual size
_HEAT_MEASURES = (
    "between_class_ratio_2",
    "between_class_ratio_10",
    "between_class_ratio",
    "silhouette_2",
    "bhattacharyya_10",
    "fisher_ratio_10",
    "probe_auroc",
    "transfer_auroc",
    "source_cosine",
)
_LAYER_MEASURES = ("between_class_ratio", "silhouette", "probe_auroc", "transfer_auroc")


def draw_all(
    result: HiddenSpace,
    name: str,
    texts: Mapping[str, LanguageTexts],
    load: Callable[[str, str], Array],
    folder: Path,
) -> list[Path]:
    """
    Draw every picture of a model.

    Args:
        result: the analysis.
        name: of the model in it.
        texts: by language.
        load: gives the embeddings of ``(state, language)`` in the shown layer.
        folder: where ``NAME.clusters.png`` and so on go.

    Raises:
        DependencyError: matplotlib is not installed.
        StorageError: a file cannot be written.
    """
    model = result.models[name]
    written = [
        clusters(model, texts, load, folder / f"{name}.clusters.png"),
        measures(model, result.confidence, folder / f"{name}.measures.png"),
    ]
    if len(model.shown.languages) > 1:
        written.append(directions(model, folder / f"{name}.directions.png"))
    if len(model.layers) > 1:
        written.append(by_layer(model, result.source_language, folder / f"{name}.layers.png"))
    return written


# ------------------------------------------------------------------------------------------------------------ clusters


def clusters(
    model: ModelResult,
    texts: Mapping[str, LanguageTexts],
    load: Callable[[str, str], Array],
    path: str | Path,
) -> Path:
    """Scatter of both classes per language, before above after, in the plane that the two models share.

    Each model's embeddings are centred and divided by their spread, so the axes have no unit. The ellipses hold about
    86 % of a normal class (two standard deviations).
    """
    states = (BEFORE, AFTER) if model.is_comparison else (AFTER,)
    languages = list(texts)
    bands = [languages[start : start + _PER_BAND] for start in range(0, len(languages), _PER_BAND)]
    columns = len(bands[0])
    panel = (_WIDTH - 0.75) / max(columns, 2)
    height = 1.05 + len(bands) * len(states) * panel
    with _labelled(model):
        figure = style.new_figure(_WIDTH, height)
        style.add_title(figure, f"Harmful and harmless texts in {model.name}", _where(model), left=0.02)
        grid = figure.subplots(len(bands) * len(states), columns, squeeze=False)
        figure.subplots_adjust(
            left=0.5 / _WIDTH,
            right=1 - 0.15 / _WIDTH,
            top=1 - 0.9 / height,
            bottom=0.12 / height,
            hspace=0.12,
            wspace=0.06,
        )
        for band, members in enumerate(bands):
            for column in range(columns):
                panels = [grid[band * len(states) + row][column] for row in range(len(states))]
                if column >= len(members):
                    for axes in panels:
                        axes.set_visible(False)
                    continue
                _cluster_column(
                    panels, model, members[column], texts[members[column]], load, states, column == 0
                )
        _class_legend(figure)
        return style.save(figure, path, colours=128)


def _cluster_column(
    panels: list[Axes],
    model: ModelResult,
    language: str,
    texts: LanguageTexts,
    load: Callable[[str, str], Array],
    states: tuple[str, ...],
    is_first: bool,
) -> None:
    coordinates = _plane_coordinates({state: load(state, language) for state in states}, texts.harmful)
    reach = 1.08 * max(np.abs(np.quantile(c, [0.005, 0.995], axis=0)).max() for c in coordinates.values())
    reach = reach or 1.0
    found = model.shown.languages[language]
    for axes, state in zip(panels, states, strict=True):
        measures = found.state(state)
        shown = measures.get("between_class_ratio_2_shared") or measures.get("between_class_ratio_2")
        _scatter(axes, coordinates[state], texts.harmful)
        axes.set_xlim(-reach, reach)
        axes.set_ylim(-reach, reach)
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(True)
        if shown is not None:
            axes.text(
                0.04, 0.96, f"ratio {shown.value:.3f}", transform=axes.transAxes, va="top", fontsize=8.5,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5},
            )  # fmt: skip
        if is_first and len(states) == 2:
            axes.set_ylabel(state, fontsize=10, fontweight="bold", labelpad=6)
    panels[0].set_title(_name(language), fontsize=10, fontweight="bold", pad=5)


def _plane_coordinates(clouds: Mapping[str, Array], harmful: Array) -> dict[str, Array]:
    """Coordinates in the shared plane, the harmful class to the right of and above the harmless one."""
    points = {state: centred(np.asarray(cloud, dtype=np.float32)) for state, cloud in clouds.items()}
    scales = {state: np.float32(spread(cloud) or 1.0) for state, cloud in points.items()}
    shapes = {cloud.shape for cloud in points.values()}
    if len(points) == 2 and len(shapes) == 1:
        shared = shared_plane(points[BEFORE], points[AFTER], 2)
        planes = dict.fromkeys(points, shared)
    else:
        planes = {state: principal_plane(cloud, 2) for state, cloud in points.items()}
    out = {state: planes[state].project(cloud / scales[state]) for state, cloud in points.items()}
    last = out[AFTER]
    turn = np.sign(last[harmful].mean(axis=0) - last[~harmful].mean(axis=0))
    return {state: found * np.where(turn == 0, 1, turn) for state, found in out.items()}


def _scatter(axes: Axes, points: Array, harmful: Array) -> None:
    random = np.random.default_rng(0)
    for label, colour, marker, dashes in (
        (False, HARMLESS, "o", (3, 1.6)),
        (True, HARMFUL, "^", (None, None)),
    ):
        rows = np.flatnonzero(harmful == label)
        if len(rows) > _POINTS:
            rows = random.choice(rows, _POINTS, replace=False)
        x, y = points[rows].T
        axes.scatter(x, y, s=7, marker=marker, color=colour, alpha=0.45, linewidths=0, zorder=2)
        outline = _ellipse(points[harmful == label])
        (line,) = axes.plot(*outline.T, color=colour if label else "#555555", linewidth=1.7, zorder=3)
        if dashes[0] is not None:
            line.set_dashes(dashes)


def _ellipse(points: Array) -> Array:
    """``[200, 2]`` outline at two standard deviations of a class."""
    values, vectors = np.linalg.eigh(np.cov(points.T, bias=True))
    angle = np.linspace(0, 2 * math.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    outline: Array = points.mean(axis=0) + 2 * circle * np.sqrt(np.maximum(values, 0)) @ vectors.T
    return outline


def _class_legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=HARMFUL, marker="^", markersize=5, linewidth=1.7, label="harmful"),
        Line2D(
            [],
            [],
            color="#555555",
            marker="o",
            markersize=4,
            linewidth=1.7,
            dashes=(3, 1.6),
            label="harmless",
        ),
    ]
    figure.legend(
        handles=handles,
        loc="upper right",
        bbox_to_anchor=(1 - 0.1 / _WIDTH, 1 - 0.04 / figure.get_figheight()),
        ncols=2,
        handlelength=2.2,
    )


# ----------------------------------------------------------------------------------------------------------- by layer


def by_layer(model: ModelResult, source_language: str, path: str | Path) -> Path:
    """Separation in every layer, one line per language, before dashed and after solid."""
    languages = list(model.shown.languages)
    layers = list(model.layers)
    with _labelled(model):
        height = 6.4
        figure = style.new_figure(_WIDTH, height)
        style.add_title(figure, f"Separation by layer in {model.name}", _where(model, layer=False), left=0.02)
        grid = figure.subplots(2, 2, sharex=True)
        figure.subplots_adjust(
            left=0.075, right=0.98, top=1 - 1.25 / height, bottom=0.55 / height, hspace=0.22, wspace=0.2
        )
        for axes, measure in zip(grid.flat, _LAYER_MEASURES, strict=True):
            for number, language in enumerate(languages):
                _layer_line(axes, model, measure, language, number)
            axes.set_title(LABELS[measure] + _in_brackets(measure, source_language), fontsize=10, loc="left")
            if "auroc" in measure:
                axes.axhline(0.5, color=style.FAINT_INK, linewidth=0.9)
        step = max(1, len(layers) // 8)
        ticks = [*range(0, len(layers) - 1, step), len(layers) - 1]
        if len(ticks) > 2 and ticks[-1] - ticks[-2] < step:
            del ticks[-2]
        for axes in grid[1]:
            axes.set_xticks(ticks, [layers[tick] for tick in ticks])
            axes.set_xlabel("Layer (0: embeddings, norm: after the final norm)")
        _layer_legend(figure, languages, model.is_comparison)
        return style.save(figure, path, colours=128)


_LINE_MARKERS = ("o", "s", "^", "D", "v", "P")


def _layer_line(axes: Axes, model: ModelResult, measure: str, language: str, number: int) -> None:
    colour = style.CYCLE[number % len(style.CYCLE)]
    for state in (BEFORE, AFTER):
        found = [layer.languages[language].state(state).get(measure) for layer in model.layers.values()]
        if all(one is None for one in found):
            continue
        values = [math.nan if one is None else one.value for one in found]
        after = state == AFTER
        axes.plot(
            values,
            color=colour,
            linewidth=1.6 if after else 1.1,
            linestyle="-" if after else (0, (3, 1.6)),
            marker=_LINE_MARKERS[number % len(_LINE_MARKERS)] if after else None,
            markersize=3.6,
            markevery=(number, max(3, len(values) // 6)),
            alpha=1.0 if after else 0.85,
        )


def _layer_legend(figure: Figure, languages: list[str], two: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=style.CYCLE[number % len(style.CYCLE)],
            marker=_LINE_MARKERS[number % len(_LINE_MARKERS)],
            markersize=4,
            label=_name(language),
        )
        for number, language in enumerate(languages)
    ]
    if two:
        handles += [
            Line2D([], [], color=style.FAINT_INK, linestyle=(0, (3, 1.6)), linewidth=1.1, label="before"),
            Line2D([], [], color=style.FAINT_INK, label="after"),
        ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.06, 1 - 0.6 / figure.get_figheight()),
        ncols=min(len(handles), 8),
        columnspacing=1.3,
        handlelength=2.0,
    )


# ----------------------------------------------------------------------------------------------------------- heat maps


def measures(model: ModelResult, confidence: float, path: str | Path) -> Path:
    """Languages by measures: the values, coloured by how much they changed.

    A column's colours are relative to its largest change. A change whose interval holds 0 has no colour.
    """
    languages = model.shown.languages
    columns = [m for m in _HEAT_MEASURES if any(m in one.after for one in languages.values())]
    row, head, foot = 0.5, 1.3, 0.5
    height = head + foot + row * len(languages)
    with _labelled(model):
        figure = style.new_figure(_WIDTH, height)
        style.add_title(figure, f"Separation per language in {model.name}", _where(model), left=0.02)
        axes = figure.add_axes(
            (1.05 / _WIDTH, foot / height, 1 - 1.15 / _WIDTH, row * len(languages) / height)
        )
        colours = np.zeros((len(languages), len(columns)))
        for number, column in enumerate(columns):
            changes = [one.change.get(column) for one in languages.values()]
            largest = max((abs(c.value) for c in changes if c is not None and _is_clear(c)), default=0) or 1
            colours[:, number] = [c.value / largest if c is not None and _is_clear(c) else 0 for c in changes]
        axes.imshow(colours, cmap="PuOr_r", vmin=-2.1, vmax=2.1, aspect="auto")
        for y, one in enumerate(languages.values()):
            for x, column in enumerate(columns):
                text = _cell(one, column)
                size = 7.6 * min(1, _CELL_CHARACTERS / max(map(len, text.splitlines())))
                axes.text(x, y, text, ha="center", va="center", fontsize=size, linespacing=1.25)
        _heat_axes(axes, [_heading(column) for column in columns], [_name(code) for code in languages])
        if model.is_comparison:
            figure.text(
                1.05 / _WIDTH,
                0.16 / height,
                f"Orange: more after, violet: less, relative to the column's largest change. White: the {100 * confidence:g} % "
                "interval of the change holds 0.",
                fontsize=8.5,
                color=style.FAINT_INK,
            )
        return style.save(figure, path, colours=128)


def _cell(one: LanguageResult, measure: str) -> str:
    if measure not in one.after:
        return MINUS
    digits = 2 if abs(one.after[measure].value) >= 1 else 3
    if measure not in one.before:
        return _number(one.after[measure].value, digits)
    change = one.change[measure].value
    return (
        f"{_number(one.before[measure].value, digits)}{ARROW}{_number(one.after[measure].value, digits)}\n"
        f"({'+' if change >= 0 else ''}{_number(change, digits)})"
    )


def _is_clear(change: Estimate) -> bool:
    return change.low is not None and change.high is not None and (change.low > 0 or change.high < 0)


def _heading(measure: str) -> str:
    name, _, components = measure.rpartition("_")
    in_plane = components.isdigit()
    words = LABELS[name if in_plane else measure].replace("Between-class ratio", "Between-\nclass ratio")
    lines = words if "\n" in words else words.replace(" ", "\n", 1)
    return f"{lines}\n{components} PCs" if in_plane else lines


def directions(model: ModelResult, path: str | Path) -> Path:
    """Cosines between the languages' harm directions, before and after."""
    states = (BEFORE, AFTER) if model.is_comparison else (AFTER,)
    names = [_name(code) for code in model.shown.languages]
    side = 3.3
    head, foot = 1.2, 0.2
    height = head + foot + side
    with _labelled(model):
        figure = style.new_figure(_WIDTH, height)
        style.add_title(figure, f"Harm directions across languages in {model.name}", _where(model), left=0.02)
        for number, state in enumerate(states):
            left = 1.0 + number * (side + 0.5)
            axes = figure.add_axes((left / _WIDTH, foot / height, side / _WIDTH, side / height))
            matrix = model.shown.cosine_matrix(state)
            axes.imshow(matrix, cmap="PuOr_r", vmin=-1.15, vmax=1.15, aspect="equal")
            for y, row in enumerate(matrix):
                for x, value in enumerate(row):
                    axes.text(
                        x, y, _number(value, 2), ha="center", va="center", fontsize=9 if len(names) < 8 else 7,
                        color="white" if abs(value) > 0.75 else style.INK,
                    )  # fmt: skip
            _heat_axes(axes, names, names if number == 0 else [""] * len(names))
            if len(states) == 2:
                axes.set_title(state, fontsize=10, fontweight="bold", pad=8)
        return style.save(figure, path, colours=128)


def _heat_axes(axes: Axes, columns: list[str], rows: list[str]) -> None:
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0, top=False, bottom=False, left=False)


# -------------------------------------------------------------------------------------------------------------- labels


@contextmanager
def _labelled(model: ModelResult) -> Iterator[None]:
    """The project's style, with fonts for the languages' names and the model's."""
    with style.project_style():
        import matplotlib as mpl

        mpl.rcParams["font.sans-serif"] = families_for([model.name, *map(_name, model.shown.languages)])
        yield


def _name(code: str) -> str:
    return drawable(printable_name(language_name(code)), code)


def _where(model: ModelResult, *, layer: bool = True) -> str:
    parts = [
        f"{count} texts per language" if (count := _texts_per_language(model)) else "numbers of texts differ"
    ]
    if layer:
        parts.append("after the final norm" if model.shown_layer == "norm" else f"layer {model.shown_layer}")
    if model.is_comparison:
        after = f"with {model.adapter}" if model.adapter else model.aligned
        parts.append(f"before: {model.reference}, after: {after}")
    return "; ".join(parts)


def _texts_per_language(model: ModelResult) -> int | None:
    counts = {sum(one.count.values()) for one in model.shown.languages.values()}
    return counts.pop() if len(counts) == 1 else None


def _in_brackets(measure: str, source_language: str) -> str:
    return {
        "between_class_ratio": " (all dimensions)",
        "silhouette": " (all dimensions)",
        "transfer_auroc": f" (probe trained in {_name(source_language)})",
    }.get(measure, "")


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)
