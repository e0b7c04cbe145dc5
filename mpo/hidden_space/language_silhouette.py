"""Whether texts lie by what they ask or by the language they ask it in, layer by layer.

LASA (*Language-Agnostic Semantic Alignment*) looks for the layer in which texts lie together by meaning rather than by language,
by two silhouette scores of the same texts. Here all languages' texts together are labelled once as harmful or harmless, and
once by their language.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpo.common import figures as style
from mpo.common.tables import TextTable
from mpo.hidden_space.resampling import Array

MOST_TEXTS = 3000
"""Of more texts a random part is measured: the distances of all pairs take the square of their number in time."""


@dataclass(frozen=True)
class Silhouettes:
    """Two silhouette scores of one layer, from -1 to 1; above 0, texts lie nearer to those of their own label.

    Attributes:
        semantic: By harmful and harmless; None where fewer than two labels are there, or all distances are 0.
        language: By language; None likewise.
    """

    semantic: float | None
    language: float | None


def silhouettes(clouds: Mapping[str, Array], harmful: Mapping[str, Array], *, seed: int = 0) -> Silhouettes:
    """Silhouette scores (Rousseeuw, 1987, *Journal of Computational and Applied Mathematics* 20) of all languages together.

    Args:
        clouds: ``{language: [n, d]}`` embeddings of one layer.
        harmful: ``{language: [n]}`` booleans.
        seed: Of the part that is drawn of more than :data:`MOST_TEXTS` texts.
    """
    points = np.concatenate([np.asarray(clouds[code], dtype=np.float32) for code in clouds])
    semantic = np.concatenate([np.asarray(harmful[code], dtype=bool) for code in clouds])
    language = np.concatenate([np.full(len(clouds[code]), n) for n, code in enumerate(clouds)])
    if len(points) > MOST_TEXTS:
        kept = np.random.default_rng(seed).choice(len(points), MOST_TEXTS, replace=False)
        points, semantic, language = points[kept], semantic[kept], language[kept]
    return Silhouettes(_score(points, semantic), _score(points, language))


def _score(points: Array, labels: Array) -> float | None:
    from sklearn.metrics import silhouette_score

    kinds = len(np.unique(labels))
    if not 2 <= kinds < len(points) or not np.ptp(points, axis=0).any():
        return None
    return float(silhouette_score(points, labels))


def silhouette_table(name: str, layers: Mapping[str, Mapping[str, Silhouettes]]) -> TextTable:
    """A row per layer; with a before, its scores stand before the arrow.

    Args:
        name: Of the model.
        layers: ``{layer: {state: scores}}``.
    """
    rows = tuple(
        (
            layer,
            *(
                " -> ".join(
                    "-" if (v := getattr(one, kind)) is None else f"{v:.3f}" for one in states.values()
                )
                for kind in ("semantic", "language")
            ),
        )
        for layer, states in layers.items()
    )
    notes = (
        "Semantic: harmful against harmless texts of all languages; language: one label per language. Compare layers, and",
        "before with after: two labels are fewer than many, so one score says little beside the other.",
    )
    return TextTable(
        f"Silhouette scores of {name} by layer", ("Layer", "Semantic", "Language"), rows, notes=notes
    )


def silhouette_picture(name: str, layers: Mapping[str, Mapping[str, Silhouettes]], path: str | Path) -> Path:
    """Both scores by layer, before dashed and after solid.

    Raises:
        DependencyError: matplotlib is not installed.
        StorageError: The file cannot be written.
    """
    names, states = list(layers), list(next(iter(layers.values())))
    height = 3.6
    with style.project_style():
        figure = style.new_figure(style.WIDTH, height)
        style.add_title(
            figure, f"By meaning or by language in {name}", "silhouette of all texts together", left=0.02
        )
        axes = figure.subplots()
        figure.subplots_adjust(left=0.075, right=0.98, top=1 - 1.05 / height, bottom=0.55 / height)
        for kind, color in (("semantic", style.ORANGE), ("language", style.BLUE)):
            for state in states:
                values = [getattr(one[state], kind) for one in layers.values()]
                last = state == states[-1]
                axes.plot(
                    [np.nan if value is None else value for value in values],
                    label=kind if len(states) == 1 else f"{kind}, {state}",
                    color=color,
                    linestyle="-" if last else (0, (3, 1.6)),
                    marker="o" if last else None,
                    markersize=3.6,
                )
        axes.axhline(0, color=style.FAINT_INK, linewidth=0.9)
        step = max(1, len(names) // 12)
        axes.set_xticks(range(0, len(names), step), names[::step])
        axes.set_xlabel("Layer (0: embeddings, norm: after the final norm)")
        axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2)
        return style.save(figure, path)
