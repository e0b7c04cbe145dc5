"""Silhouettes by meaning and by language, against scikit-learn's and a plain loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import silhouette_score

from mpo.hidden_space import language_silhouette
from mpo.hidden_space.language_silhouette import (
    Silhouettes,
    silhouette_picture,
    silhouette_table,
    silhouettes,
)


def clouds(
    seed: int, by_harm: float, by_language: float
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    harmful = {code: random.random(n) < 0.5 for code, n in (("en", 12), ("sw", 17), ("bn", 9))}
    points = {
        code: (random.normal(size=(len(rows), 5)) + by_harm * rows[:, None] + by_language * n).astype(
            np.float32
        )
        for n, (code, rows) in enumerate(harmful.items())
    }
    return points, harmful


def by_hand(points: np.ndarray, labels: np.ndarray) -> float:
    total = 0.0
    for n, point in enumerate(points):
        distance = np.linalg.norm(points - point, axis=1)
        means = {
            label: distance[(labels == label) & (np.arange(len(points)) != n)].mean() for label in set(labels)
        }
        a = means.pop(labels[n])
        total += (min(means.values()) - a) / max(a, min(means.values()))
    return total / len(points)


@pytest.mark.parametrize("seed", range(3))
def test_both_scores_are_those_of_scikit_learn_and_of_a_loop(seed: int) -> None:
    points, harmful = clouds(seed, 1.0, 0.5)
    found = silhouettes(points, harmful)
    whole = np.concatenate(list(points.values()))
    for score, labels in (
        (found.semantic, np.concatenate(list(harmful.values())).astype(int)),
        (found.language, np.repeat([0, 1, 2], [12, 17, 9])),
    ):
        assert score == pytest.approx(silhouette_score(whole, labels), abs=1e-6)
        assert score == pytest.approx(by_hand(whole.astype(np.float64), labels), abs=1e-4)


def test_they_tell_meaning_from_language_and_say_nothing_of_points_that_are_one() -> None:
    by_harm, by_language = silhouettes(*clouds(0, 8.0, 0.0)), silhouettes(*clouds(0, 0.0, 8.0))
    assert by_harm.semantic is not None and by_harm.language is not None
    assert by_language.semantic is not None and by_language.language is not None
    assert by_harm.semantic > 0.5 > by_harm.language and by_language.language > 0.5 > by_language.semantic
    points, harmful = clouds(0, 0.0, 0.0)
    same = {code: np.zeros_like(rows) for code, rows in points.items()}
    assert silhouettes(same, harmful) == Silhouettes(None, None)
    assert silhouettes({"en": points["en"]}, harmful).language is None


def test_of_many_texts_a_part_is_drawn_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    points, harmful = clouds(1, 1.0, 1.0)
    whole = silhouettes(points, harmful)
    monkeypatch.setattr(language_silhouette, "MOST_TEXTS", 25)
    assert silhouettes(points, harmful) == silhouettes(points, harmful) != whole


def test_the_table_and_the_picture_show_every_layer(tmp_path: Path) -> None:
    layers = {
        layer: {"before": Silhouettes(0.1, None), "after": Silhouettes(0.25, -0.5)}
        for layer in ("0", "1", "norm")
    }
    table = silhouette_table("tiny", layers)
    assert [row[0] for row in table.rows] == ["0", "1", "norm"]
    assert table.rows[0][1:] == ("0.100 -> 0.250", "- -> -0.500")
    assert silhouette_picture("tiny", layers, tmp_path / "a.png").stat().st_size > 5000
