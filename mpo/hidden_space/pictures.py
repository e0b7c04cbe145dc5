"""Pictures of the hidden space: clusters, separation by layer, a heat map of the change, cosines of harm directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpo.common import figures as style
from mpo.common.tables import printable_name
from mpo.common.words import ARROW, MINUS, number
from mpo.data.languages import language_name
from mpo.hidden_space.compare import AFTER, BEFORE, LanguageResult, LanguageTexts
from mpo.hidden_space.projection import centred, principal_plane, shared_plane, spread
from mpo.hidden_space.resampling import Array
from mpo.hidden_space.results import LABELS, HiddenSpace, ModelResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CLASSES = {  # colours of points and outline, marker, line
    "harmful": (style.ORANGE, style.ORANGE, "^", "-"),
    "harmless": (style.INK, "#555555", "o", (0, (3, 1.6))),
}
_POINTS = 200  # of each class in a scatter; the ellipses are those of all texts
_PER_BAND = 4  # languages beside each other
_CELL_CHARACTERS = 12  # of a line that fills a cell of the table at its usual size
_LINE_MARKERS = ("o", "s", "^", "D", "v", "P")
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
    """Draw every picture of a model.

    Args:
        result: The analysis.
        name: Of the model in it.
        texts: By language.
        load: Gives the embeddings of ``(state, language)`` in the shown layer.
        folder: Where ``NAME.clusters.png`` and so on go.

    Raises:
        DependencyError: matplotlib is not installed.
        StorageError: A file cannot be written.
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
    columns = min(len(texts), _PER_BAND)
    bands = math.ceil(len(texts) / _PER_BAND)
    height = 1.05 + bands * len(states) * (style.WIDTH - 0.75) / max(columns, 2)
    with style.project_style():
        figure = _figure(height, f"Harmful and harmless texts in {model.name}", _where(model))
        grid = figure.subplots(bands * len(states), columns, squeeze=False)
        left, right = 0.5 / style.WIDTH, 1 - 0.15 / style.WIDTH
        top, bottom = 1 - 0.9 / height, 0.12 / height
        figure.subplots_adjust(left=left, right=right, top=top, bottom=bottom, hspace=0.12, wspace=0.06)
        for axes in grid.flat:
            axes.set_visible(False)
        for n, (language, given) in enumerate(texts.items()):
            band, column = divmod(n, _PER_BAND)
            clouds = {state: load(state, language) for state in states}
            coordinates = _plane_coordinates(clouds, given.harmful)
            outermost = [np.abs(np.quantile(c, [0.005, 0.995], axis=0)).max() for c in coordinates.values()]
            reach = 1.08 * max(outermost) or 1.0
            ends = (-reach, reach)
            for row, state in enumerate(states):
                axes = grid[band * len(states) + row][column]
                handles = _scatter(axes, coordinates[state], given.harmful)
                axes.set(visible=True, xlim=ends, ylim=ends, aspect="equal", xticks=[], yticks=[])
                axes.spines[:].set_visible(True)
                found = model.shown.languages[language].state(state)
                shown = found.get("between_class_ratio_2_shared") or found.get("between_class_ratio_2")
                if shown is not None:
                    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5}
                    text = f"ratio {number(shown.value, 3)}"
                    axes.text(0.04, 0.96, text, transform=axes.transAxes, va="top", fontsize=8.5, bbox=box)
                if column == 0 and len(states) == 2:
                    axes.set_ylabel(state, fontsize=10, fontweight="bold", labelpad=6)
                if row == 0:
                    axes.set_title(_name(language), fontsize=10, fontweight="bold", pad=5)
        place: dict[str, Any] = {
            "loc": "upper right",
            "bbox_to_anchor": (1 - 0.1 / style.WIDTH, 1 - 0.04 / height),
        }
        figure.legend(handles, list(_CLASSES), ncols=2, handlelength=2.2, markerscale=2.2, **place)
        return style.save(figure, path)


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


def _scatter(axes: Axes, points: Array, harmful: Array) -> list[Any]:
    """Points and outline of each class; returns the marks of the legend."""
    random = np.random.default_rng(0)
    handles = []
    for name, (colour, line_colour, marker, line) in _CLASSES.items():
        rows = np.flatnonzero(harmful == (name == "harmful"))
        x, y = points[rows if len(rows) <= _POINTS else random.choice(rows, _POINTS, replace=False)].T
        dots = axes.scatter(x, y, s=7, marker=marker, color=colour, alpha=0.45, linewidths=0, zorder=2)
        (outline,) = axes.plot(
            *_ellipse(points[rows]).T, color=line_colour, linestyle=line, linewidth=1.7, zorder=3
        )
        handles.append((dots, outline))
    return handles


def _ellipse(points: Array) -> Array:
    """``[200, 2]`` outline at two standard deviations of a class."""
    values, vectors = np.linalg.eigh(np.cov(points.T, bias=True))
    angle = np.linspace(0, 2 * math.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    outline: Array = points.mean(axis=0) + 2 * circle * np.sqrt(np.maximum(values, 0)) @ vectors.T
    return outline


# ----------------------------------------------------------------------------------------------------------- by layer


def by_layer(model: ModelResult, source_language: str, path: str | Path) -> Path:
    """Separation in every layer, one line per language, before dashed and after solid."""
    layers = list(model.layers)
    brackets = {
        "between_class_ratio": " (all dimensions)",
        "silhouette": " (all dimensions)",
        "transfer_auroc": f" (probe trained in {_name(source_language)})",
    }
    height = 6.4
    with style.project_style():
        figure = _figure(height, f"Separation by layer in {model.name}", _where(model, layer=False))
        grid = figure.subplots(2, 2, sharex=True)
        figure.subplots_adjust(
            left=0.075, right=0.98, top=1 - 1.25 / height, bottom=0.55 / height, hspace=0.22, wspace=0.2
        )
        for axes, measure in zip(grid.flat, _LAYER_MEASURES, strict=True):
            for n, language in enumerate(model.shown.languages):
                _layer_lines(axes, model, measure, language, n)
            axes.set_title(LABELS[measure] + brackets.get(measure, ""), fontsize=10, loc="left")
            if "auroc" in measure:
                axes.axhline(0.5, color=style.FAINT_INK, linewidth=0.9)
        step = max(1, len(layers) // 8)
        ticks = [*range(0, len(layers) - 1, step), len(layers) - 1]
        if len(ticks) > 2 and ticks[-1] - ticks[-2] < step:
            del ticks[-2]
        for axes in grid[1]:
            axes.set_xticks(ticks, [layers[tick] for tick in ticks])
            axes.set_xlabel("Layer (0: embeddings, norm: after the final norm)")
        if model.is_comparison:
            for state, line in (BEFORE, (0, (3, 1.6))), (AFTER, "-"):
                grid[0][0].plot([], [], color=style.FAINT_INK, linestyle=line, label=state)
        handles, names = grid[0][0].get_legend_handles_labels()
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0.06, 1 - 0.6 / height)}
        figure.legend(handles, names, ncols=min(len(names), 8), columnspacing=1.3, **place)
        return style.save(figure, path)


def _layer_lines(axes: Axes, model: ModelResult, measure: str, language: str, n: int) -> None:
    for state in (BEFORE, AFTER) if model.is_comparison else (AFTER,):
        found = [layer.languages[language].state(state).get(measure) for layer in model.layers.values()]
        after = state == AFTER
        axes.plot(
            [math.nan if one is None else one.value for one in found],
            label=_name(language) if after else None,
            color=style.CYCLE[n % len(style.CYCLE)],
            linewidth=1.6 if after else 1.1,
            linestyle="-" if after else (0, (3, 1.6)),
            marker=_LINE_MARKERS[n % len(_LINE_MARKERS)] if after else None,
            markersize=3.6,
            markevery=(n, max(3, len(found) // 6)),
            alpha=1.0 if after else 0.85,
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
    with style.project_style():
        figure = _figure(height, f"Separation per language in {model.name}", _where(model))
        left = 1.05 / style.WIDTH
        axes = figure.add_axes((left, foot / height, 1 - 1.15 / style.WIDTH, row * len(languages) / height))
        colours = np.zeros((len(languages), len(columns)))
        for x, column in enumerate(columns):
            changes = [one.change.get(column) for one in languages.values()]
            clear = [change.value if change is not None and change.is_clear else 0.0 for change in changes]
            colours[:, x] = np.array(clear) / (max(map(abs, clear)) or 1)
        axes.imshow(colours, cmap="PuOr_r", vmin=-2.1, vmax=2.1, aspect="auto")
        for y, one in enumerate(languages.values()):
            for x, column in enumerate(columns):
                text = _cell(one, column)
                size = 7.6 * min(1, _CELL_CHARACTERS / max(map(len, text.splitlines())))
                axes.text(x, y, text, ha="center", va="center", fontsize=size, linespacing=1.25)
        _heat_axes(axes, [_heading(column) for column in columns], [_name(code) for code in languages])
        if model.is_comparison:
            text = (
                "Orange: more after, violet: less, relative to the column's largest change. White: the "
                f"{100 * confidence:g} % interval of the change holds 0."
            )
            figure.text(left, 0.16 / height, text, fontsize=8.5, color=style.FAINT_INK)
        return style.save(figure, path)


def _cell(one: LanguageResult, measure: str) -> str:
    if measure not in one.after:
        return MINUS
    digits = 2 if abs(one.after[measure].value) >= 1 else 3
    values = [state[measure].value for state in (one.before, one.after) if measure in state]
    text = ARROW.join(number(value, digits) for value in values)
    return f"{text}\n({number(one.change[measure].value, digits, signed=True)})" if len(values) > 1 else text


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
    side, head, foot = 3.3, 1.2, 0.2
    height = head + foot + side
    with style.project_style():
        figure = _figure(height, f"Harm directions across languages in {model.name}", _where(model))
        for n, state in enumerate(states):
            left = 1.0 + n * (side + 0.5)
            axes = figure.add_axes((left / style.WIDTH, foot / height, side / style.WIDTH, side / height))
            matrix = model.shown.cosine_matrix(state)
            axes.imshow(matrix, cmap="PuOr_r", vmin=-1.15, vmax=1.15, aspect="equal")
            for (y, x), value in np.ndenumerate(matrix):
                size, colour = 9 if len(names) < 8 else 7, "white" if abs(value) > 0.75 else style.INK
                axes.text(x, y, number(value, 2), ha="center", va="center", fontsize=size, color=colour)
            _heat_axes(axes, names, names if n == 0 else [""] * len(names))
            if len(states) == 2:
                axes.set_title(state, fontsize=10, fontweight="bold", pad=8)
        return style.save(figure, path)


def _heat_axes(axes: Axes, columns: list[str], rows: list[str]) -> None:
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.xaxis.tick_top()
    axes.tick_params(which="both", length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    axes.grid(which="minor", color="white", linewidth=2)


# -------------------------------------------------------------------------------------------------------------- labels


def _figure(height: float, title: str, subtitle: str) -> Figure:
    figure = style.new_figure(style.WIDTH, height)
    style.add_title(figure, title, subtitle, left=0.02)
    return figure


def _name(code: str) -> str:
    return printable_name(language_name(code))


def _where(model: ModelResult, *, layer: bool = True) -> str:
    counts = {sum(one.count.values()) for one in model.shown.languages.values()}
    parts = [f"{counts.pop()} texts per language" if len(counts) == 1 else "numbers of texts differ"]
    if layer:
        parts.append("after the final norm" if model.shown_layer == "norm" else f"layer {model.shown_layer}")
    if model.is_comparison:
        after = f"with {model.adapter}" if model.adapter else model.aligned
        parts.append(f"before: {model.reference}, after: {after}")
    return "; ".join(parts)
