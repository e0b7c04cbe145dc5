"""The one picture of a run: what it was for beside what it may have cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpo.errors import DataError
from mpo.evaluation.probe import PROBE_LANGUAGES
from mpo.report.overview import overview
from tests.evaluation.simulated import LANGUAGES
from tests.report.test_plots import _changed, _check_layout, _tables, _texts


def _marks(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.lines
        if line.get_marker() == "o"
    }


def test_a_language_has_one_row_in_all_three_columns(tmp_path: Path, figures: list[Any]) -> None:
    before, after = _tables(LANGUAGES)
    overview(before, after, _changed(("en", *LANGUAGES), {"sw": 8, "bn": 4}), tmp_path / "o.png")
    (figure,) = figures
    _check_layout(figure)
    gaps, answered, refused = (_marks(axes) for axes in figure.axes)
    assert before.all_targets is not None and after.all_targets is not None
    assert gaps["before"][0] == [*(row.gap for row in before.rows), before.all_targets.gap]
    assert gaps["after"][0] == [*(row.gap for row in after.rows), after.all_targets.gap]
    assert gaps["after"][1] == answered["after"][1] == refused["after"][1]
    codes = [row.language for row in after.rows]
    shares = dict(zip(codes, refused["after"][0], strict=False))
    assert (shares["sw"], shares["bn"], shares["en"]) == (50.0, 25.0, 0.0)
    assert refused["after"][0][-1] == pytest.approx(75 / len(LANGUAGES))  # the mean over targets
    assert set(refused["before"][0]) == {0.0} and set(answered["after"][0]) == {100.0}


@pytest.mark.parametrize("asked", [("en", "sw"), PROBE_LANGUAGES[:1]], ids=["two", "one"])
def test_a_language_that_was_not_asked_has_its_gap_only(
    asked: tuple[str, ...], tmp_path: Path, figures: list[Any]
) -> None:
    before, after = _tables(LANGUAGES)
    overview(before, after, _changed(asked, {}), tmp_path / "o.png")
    _check_layout(figures[0])
    assert len(_marks(figures[0].axes[0])["after"][0]) == len(LANGUAGES) + 2
    assert len(_marks(figures[0].axes[2])["after"][0]) == len(asked) + ("sw" in asked)


def test_one_target_has_no_row_of_means(tmp_path: Path, figures: list[Any]) -> None:
    before, after = _tables(("sw",))
    overview(before, after, _changed(("en", "sw"), {"sw": 16}), tmp_path / "o.png")
    _check_layout(figures[0])
    assert "Mean of targets" not in _texts(figures[0])


def test_tables_of_different_languages_are_not_drawn_together(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="different languages"):
        overview(_tables(("sw",))[0], _tables(("bn",))[1], _changed(("en",), {}), tmp_path / "o.png")
