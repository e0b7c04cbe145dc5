from __future__ import annotations

import builtins
import re
import sys
import warnings
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo.common import figures as style
from mpo.data.languages import LANGUAGES as ALL_LANGUAGES
from mpo.errors import DataError, DependencyError
from mpo.evaluation import RewardGapTable, summarize
from mpo.evaluation.probe import PROBE_LANGUAGES
from mpo.evaluation.probe.change import BehaviorChange, compare_answers
from mpo.report import plots
from tests.evaluation.probe.said import REFUSAL, TEXT, ask, judged, refuses
from tests.evaluation.simulated import LANGUAGES, score, simulated_scores

FORTY = tuple(code for code in ALL_LANGUAGES if code != "en")[:40]


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _tables(
    languages: tuple[str, ...], beta: float = 1.0, groups: int = 8
) -> tuple[RewardGapTable, RewardGapTable]:
    before, after = simulated_scores(languages, groups)
    return summarize(before, beta=beta, resamples=200), summarize(after, beta=beta, resamples=200)


def _logs(languages: tuple[str, ...], steps: int, evaluate_every: int = 10) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    logs: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        done = 1 - np.exp(-4 * step / steps)
        entry: dict[str, Any] = {"step": step, "epoch": step / steps, "learning_rate": 1e-4}
        entry["loss/reward_gap"] = float(1.1 - 0.85 * done + abs(random.normal(0, 0.1)))
        entry["loss/retention"] = float(0.005 + 0.03 * done)
        entry["loss"] = entry["loss/reward_gap"] + entry["loss/retention"]
        for code in languages:
            if random.random() < 0.8:  # a step does not hold every language
                entry[f"reward_gap/{code}"] = float(-0.3 + 0.8 * done + random.normal(0, 0.1))
                entry[f"gap_to_source/{code}"] = entry[f"reward_gap/{code}"] - 0.57
        logs.append(entry)
        if step % evaluate_every == 0:
            logs.append(
                {"step": step, "eval_loss": 0.5, **{f"eval_reward_gap/{code}": 0.2 for code in languages}}
            )
    return [*logs, {"step": steps, "train_runtime": 3.2, "train_loss": 0.4}]


def _size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def _texts(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [t.get_text() for t in figure.findobj(Text) if t.get_visible() and t.get_text()]


def _check_layout(figure: Any) -> None:
    """All text that is drawn lies on the figure, and no text lies over another."""
    from matplotlib.text import Text

    boxes: list[tuple[str, Any]] = []
    real = Text.draw

    def draw(text: Any, renderer: Any) -> None:
        real(text, renderer)
        if text.get_visible() and text.get_text().strip():
            boxes.append((text.get_text(), Text.get_window_extent(text, renderer)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", draw)
        figure.canvas.draw()
    assert len(boxes) > 5
    page = figure.bbox
    for number, (text, box) in enumerate(boxes):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text
        for other_text, other in boxes[:number]:
            width = min(box.x1, other.x1) - max(box.x0, other.x0)
            height = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert width <= 1 or height <= 2, f"{text!r} over {other_text!r}"


@pytest.mark.parametrize("languages", [("sw",), LANGUAGES, FORTY], ids=["1", "6", "40"])
@pytest.mark.parametrize("beta", [1.0, 1.5])
def test_before_and_after_is_drawn_legibly_for_any_number_of_languages(
    languages: tuple[str, ...], beta: float, tmp_path: Path, figures: list[Any]
) -> None:
    before, after = _tables(languages, beta)
    path = plots.reward_gap_before_after(before, after, tmp_path / "gap.png")
    (figure,) = figures
    width, height = _size(path)
    assert width == 1720 and abs(height - figure.get_figheight() * style.DPI) <= 1
    assert height > 400 + 55 * len(languages)
    texts = _texts(figure)
    assert all(before.label(row) in texts for row in before.rows)
    assert any(text.startswith("English reference") for text in texts)
    assert any(text.startswith("goal") for text in texts) == (beta != 1.0)
    assert {"before", "after"} <= set(texts)
    _check_layout(figure)


def test_the_markers_stand_at_the_gaps_and_the_line_at_the_reference(
    tmp_path: Path, figures: list[Any]
) -> None:
    before, after = _tables(LANGUAGES)
    plots.reward_gap_before_after(before, after, tmp_path / "gap.png")
    (axes,) = figures[0].axes
    markers = [line for line in axes.lines if line.get_marker() == "o"]
    for line, table in zip(markers, (before, after), strict=True):
        assert table.all_targets is not None
        assert list(line.get_xdata()) == [row.gap for row in (*table.rows, table.all_targets)]
    upright = [line.get_xdata()[0] for line in axes.lines if list(line.get_ydata()) == [0, 1]]
    assert upright == [0, before.reference_gap]
    bands = [tuple(line.get_xdata()) for line in axes.lines if line.get_alpha() == 0.28]
    assert (before.targets[0].ci_low, before.targets[0].ci_high) in bands


@pytest.mark.parametrize("languages", [("sw",), LANGUAGES, FORTY], ids=["1", "6", "40"])
def test_a_single_table_is_drawn_legibly(
    languages: tuple[str, ...], tmp_path: Path, figures: list[Any]
) -> None:
    table, _ = _tables(languages)
    assert _size(plots.reward_gap_single(table, tmp_path / "gap.png"))[0] == 1720
    assert all(table.label(row) in _texts(figures[0]) for row in table.rows)
    _check_layout(figures[0])


@pytest.mark.parametrize("gaps", [(0.0, 0.0), (-40.0, 60.0), (0.001, 0.002), (-3.0, -2.0)])
def test_gaps_of_any_size_are_drawn_legibly_even_from_one_group(
    gaps: tuple[float, float], tmp_path: Path, figures: list[Any]
) -> None:
    tables = [summarize([score(0, "bn", gap, 0.0, gaps[1])], beta=1.5) for gap in gaps]
    plots.reward_gap_before_after(tables[0], tables[1], tmp_path / "gap.png")
    _check_layout(figures[0])


def test_tables_of_different_languages_are_not_drawn_together(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="different languages"):
        plots.reward_gap_before_after(_tables(("sw",))[0], _tables(("bn",))[1], tmp_path / "gap.png")


@pytest.mark.parametrize("languages", [("sw",), LANGUAGES, FORTY], ids=["1", "6", "40"])
@pytest.mark.parametrize("steps", [1, 2, 40, 400])
def test_the_training_curve_is_drawn_legibly_for_any_number_of_languages_and_steps(
    languages: tuple[str, ...], steps: int, tmp_path: Path, figures: list[Any]
) -> None:
    path = plots.training_curve(_logs(languages, steps), tmp_path / "curve.png")
    assert _size(path) == (1720, 1320)
    texts = _texts(figures[0])
    assert "English reference" in texts and "Optimizer step" in texts
    assert any(text.startswith("loss ") for text in texts) and any(
        text.startswith("retention ") for text in texts
    )
    if len(languages) <= 6:
        assert all(any(t == plots.language_name(code) for t in texts) for code in languages if steps > 2)
    _check_layout(figures[0])
    top, bottom = figures[0].axes
    assert top.get_xlim() == bottom.get_xlim()


@pytest.mark.parametrize(
    "logs",
    [
        [],
        [{"step": 5, "train_runtime": 1.0}],
        [{"step": 5, "loss": 0.5}],
        [{"loss": 0.5}, {"loss": 0.25}, {"loss": 0.125}],
        [{"step": 1, "loss": float("nan"), "reward_gap/bn": float("inf")}],
        [{"step": n, "loss": 0.0, "reward_gap/bn": 0.0} for n in range(5)],
        [{"step": n, "eval_reward_gap/bn": 0.1 * n, "eval_loss": 1.0} for n in range(4)],
        [{"step": n, "reward_gap/bn": 0.1 * n} for n in range(4)],
        [{"step": n, "loss": 10.0 ** -n, "loss/retention": 1e-9} for n in range(9)],
        [{"step": n, "loss": -0.1 * n} for n in range(4)],
    ],
    ids=["nothing", "no values", "one loss", "no steps", "not finite", "all zero", "only held-out", "only gaps", "nine decades", "negative"],
)  # fmt: skip
def test_the_training_curve_takes_whatever_was_logged(
    logs: list[dict[str, Any]], tmp_path: Path, figures: list[Any]
) -> None:
    assert _size(plots.training_curve(logs, tmp_path / "curve.png")) == (1720, 1320)
    _check_layout(figures[0])


def test_the_raw_values_are_drawn_at_their_steps_and_the_last_log_of_a_step_counts(
    tmp_path: Path, figures: list[Any]
) -> None:
    logs = [{"step": n, "reward_gap/bn": float(n), "gap_to_source/bn": n - 0.75} for n in (1, 2, 3)]
    plots.training_curve([*logs, {"step": 2, "reward_gap/bn": 20.0}], tmp_path / "curve.png")
    lines = figures[0].axes[1].lines
    assert any(list(line.get_ydata()) == [1.0, 20.0, 3.0] for line in lines)
    assert any(list(line.get_ydata()) == [0.75, 0.75] for line in lines)


def test_the_reference_is_read_from_the_logs(tmp_path: Path, figures: list[Any]) -> None:
    plots.training_curve(_logs(("bn", "sw"), 20), tmp_path / "curve.png", source_language="zh")
    levels = [line.get_ydata()[0] for line in figures[0].axes[1].lines if len(set(line.get_ydata())) == 1]
    assert any(level == pytest.approx(0.57) for level in levels)
    assert "Chinese reference" in _texts(figures[0])


def test_what_was_held_out_is_drawn_instead_of_the_steps_own_pairs_where_it_was_measured_twice(
    tmp_path: Path, figures: list[Any]
) -> None:
    logs = _logs(("bn", "sw"), 20, evaluate_every=100)
    for step, gap in ((0, 0.1), (10, 0.3), (20, 0.5)):
        logs.append(
            {"step": step, "eval_reward_gap/bn": gap, "eval_reward_gap/en": 0.8, "eval_reward_gap/sw": -gap}
        )
    plots.training_curve(logs, tmp_path / "curve.png")
    _check_layout(figures[0])
    lines = {line.get_label(): line for line in figures[0].axes[1].lines}
    assert list(lines["Bengali"].get_xdata()) == [0, 10, 20]
    assert list(lines["Bengali"].get_ydata()) == [0.1, 0.3, 0.5]
    assert list(lines["English"].get_ydata()) == [0.8] * 3
    reference = lines["English reference"].get_ydata()
    assert reference[0] == 0.8  # of the held-out pairs, not the 0.57 that the steps' own imply
    assert len(lines) == 5  # these, Swahili, the reference and the one at 0: none of the steps' own
    title = next(text for text in _texts(figures[0]) if "over 20 steps" in text)
    assert title.startswith("Reward gap on held-out pairs")


@pytest.mark.parametrize("languages", [("sw",), LANGUAGES, FORTY], ids=["1", "6", "40"])
def test_of_refusals_that_are_taught_it_is_drawn_how_many_of_either_kind_are_refused(
    languages: tuple[str, ...], tmp_path: Path, figures: list[Any]
) -> None:
    logs = _logs(languages, 20, evaluate_every=100)
    for entry in logs[:20]:
        for place, code in enumerate(languages):
            entry[f"greedy/chosen/{code}"] = 0.04 * entry["step"]
            entry[f"harmless/greedy/rejected/{code}"] = 0.01 if place % 2 else 0.03
    plots.training_curve(logs, tmp_path / "curve.png")
    _check_layout(figures[0])
    lines = {str(line.get_label()): line for line in figures[0].axes[1].lines}
    assert "What is refused" in " ".join(_texts(figures[0]))
    if len(languages) == 40:
        assert any(text.endswith("mean of 40") for text in _texts(figures[0]))
        last = {name: lines[name].get_ydata()[-1] for name in ("harmful", "harmless")}
        assert last["harmless"] == pytest.approx(2.0) and 70 < last["harmful"] <= 80
        return
    assert {plots.language_name(code) for code in languages} <= lines.keys()
    assert 70 < lines["Swahili"].get_ydata()[-1] <= 80
    dashed = [line for line in figures[0].axes[1].lines if line.get_linestyle() == "--"]
    assert len(dashed) == len(languages) and {round(line.get_ydata()[-1], 6) for line in dashed} <= {1.0, 3.0}


def test_where_greedy_decoding_says_no_response_word_by_word_the_gap_is_drawn(
    tmp_path: Path, figures: list[Any]
) -> None:
    logs = _logs(("bn", "sw"), 20, evaluate_every=100)
    for entry in logs[:20]:
        entry |= {"greedy/chosen/bn": 0.0, "harmless/greedy/rejected/bn": 0.0}
    plots.training_curve(logs, tmp_path / "curve.png")
    assert "Reward gap (nats per token)" in _texts(figures[0])


def test_smoothing_keeps_a_constant_and_follows_a_line() -> None:
    flat = plots._smooth([(float(n), 0.25) for n in range(50)])
    assert all(value == pytest.approx(0.25) for _, value in flat)
    line = dict(plots._smooth([(float(n), 2.0 * n) for n in range(101)]))
    assert line[50.0] == pytest.approx(100.0)  # symmetric around the middle
    assert len(plots._smooth([(float(n), 0.0) for n in range(5000)])) <= 400


def test_the_lines_are_named_in_the_order_in_which_they_end(tmp_path: Path, figures: list[Any]) -> None:
    ends = {"bn": 0.5, "sw": 2.0, "zh": -1.0}
    logs = [{"step": n, **{f"reward_gap/{code}": n * end for code, end in ends.items()}} for n in (1, 2)]
    logs += [{"step": 3, "reward_gap/ar": 1.5, "gap_to_source/ar": 0.0}]
    plots.training_curve(logs, tmp_path / "curve.png")
    legend = figures[0].axes[1].get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["Swahili", "English reference", "Arabic", "Bengali", "Chinese"]


def test_the_page_has_the_colours_of_the_pictures() -> None:
    css = files("mpo.report").joinpath("page.css").read_text(encoding="utf-8")
    of_page = dict(re.findall(r"--(s0|s1): (#[0-9a-f]{6});", css.partition("@media")[0]))
    assert of_page == {"s0": style.BEFORE.lower(), "s1": style.AFTER.lower()}


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    before, after = _tables(LANGUAGES)
    first = plots.reward_gap_before_after(before, after, tmp_path / "a.png").read_bytes()
    assert plots.reward_gap_before_after(before, after, tmp_path / "b.png").read_bytes() == first


def test_the_callers_matplotlib_settings_are_neither_used_nor_changed(tmp_path: Path) -> None:
    import matplotlib

    before, after = _tables(("sw",))
    plain = plots.reward_gap_before_after(before, after, tmp_path / "a.png").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.bbox": "tight"}):
        own = dict(matplotlib.rcParams)
        other = plots.reward_gap_before_after(before, after, tmp_path / "b.png").read_bytes()
        assert dict(matplotlib.rcParams) == own
    assert other == plain


def test_a_name_with_a_dollar_sign_is_no_formula(tmp_path: Path, figures: list[Any]) -> None:
    table = summarize([score(g, "$x_1$", 0.1, 0.0, 0.5) for g in range(3)], beta=1.0, resamples=200)
    plots.reward_gap_before_after(table, table, tmp_path / "gap.png")
    from matplotlib.text import Text

    assert {"$x_1$", "Reward gap of $x_1$: +0.10 before, +0.10 after"} <= set(_texts(figures[0]))
    assert not any(text.get_parse_math() for text in figures[0].findobj(Text) if "$" in text.get_text())


def test_a_missing_matplotlib_is_an_error_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_matplotlib(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(DependencyError, match=re.escape("pip install 'mpo-align[plots]'")):
        plots.training_curve([], tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())


# ---- What the model does ---------------------------------------------------------------------------------------------


def _changed(languages: tuple[str, ...], refused: dict[str, int]) -> BehaviorChange:
    """Of 16 harmless prompts in each language so many are refused after training, and none before."""
    before = ask(lambda prompt: TEXT["en"], languages)
    kept = {
        prompt.prompt_id: n for n, prompt in enumerate(before.prompts.harmless.prompts[:: len(languages)])
    }
    after = judged(
        before.prompts,
        lambda p: REFUSAL["en"] if kept.get(p.prompt_id, 99) < refused.get(p.language, 0) else TEXT["en"],
    )
    return compare_answers(before, after, max_new_tokens=48)


@pytest.mark.parametrize("languages", [("en",), ("en", "bn", "sw"), PROBE_LANGUAGES], ids=len)
@pytest.mark.parametrize("refused", [{}, {"bn": 16, "sw": 15, "en": 1}, dict.fromkeys(PROBE_LANGUAGES, 16)])
def test_the_plane_is_drawn_legibly_for_any_number_of_languages(
    tmp_path: Path, figures: list[Any], languages: tuple[str, ...], refused: dict[str, int]
) -> None:
    change = _changed(languages, refused)
    logs = [{"step": step, "probe/harmful_answered": 0.5, "probe/harmless_refused": 0.2} for step in (0, 5)]
    plots.behavior_plane(change, tmp_path / "b.png", logs)
    assert _size(tmp_path / "b.png")[0] == 1720
    _check_layout(figures[0])
    texts = _texts(figures[0])
    for code in languages:
        assert ALL_LANGUAGES[code].name in texts
    assert ("refuses more harmless ones" in texts) is any(refused.get(code, 0) > 3 for code in languages)


@pytest.mark.parametrize(("languages", "lines"), [(("en",), 1), (("en", "sw"), 3)])
def test_the_way_of_every_language_and_of_their_mean_leads_over_the_probes_in_between(
    tmp_path: Path, figures: list[Any], languages: tuple[str, ...], lines: int
) -> None:
    probes = ask(refuses, languages).metrics()
    plots.behavior_plane(_changed(languages, {"en": 8}), tmp_path / "b.png", [{"step": 5, **probes}])
    ways = [
        list(map(tuple, line.get_xydata()))
        for line in figures[0].axes[0].lines
        if len(line.get_xydata()) == 3
    ]
    ways = [way for way in ways if way[1] == (100, 0)]
    assert len(ways) == lines
    assert [(0, 100), (100, 0), (50, 100)] in ways
    assert any("small dots: in between" in text for text in _texts(figures[0]))


def test_an_arrow_leads_from_before_to_after(tmp_path: Path, figures: list[Any]) -> None:
    plots.behavior_plane(_changed(("en", "sw"), {"sw": 8}), tmp_path / "b.png")
    arrows = [text for text in figures[0].axes[0].texts if text.get_text() == ""]
    assert [(arrow.xyann, arrow.xy) for arrow in arrows] == [((0, 100), (50, 100)), ((0, 100), (25, 100))]
