from __future__ import annotations

import io
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo.common.tables import escape_markdown, printable_name
from mpo.errors import ConfigError, DataError, ModelError, StorageError
from mpo.evaluation import PairScore, RewardGapTable, compare, summarize
from mpo.evaluation.reward_gap import sort_languages
from tests.evaluation.simulated import score, simulated_scores

RESAMPLES = 200  # the draws are tested on their own; here they only cost time

_logp = st.floats(-20, 0, allow_nan=False).map(lambda value: round(value, 6))


@st.composite
def _records(draw: st.DrawFn) -> list[PairScore]:
    out = []
    for group in range(draw(st.integers(1, 6))):
        reference = draw(st.floats(-3, 3, allow_nan=False))
        if draw(st.booleans()):
            out.append(score(group, "en", draw(_logp), draw(_logp), reference, is_source=True))
        for language in draw(st.lists(st.sampled_from(["zh", "sw", "bn", "de"]), min_size=1, max_size=5)):
            out.append(score(group, language, draw(_logp), draw(_logp), reference))
    return out


@given(_records(), st.floats(0.1, 3))
@settings(max_examples=60, deadline=None)
def test_every_mean_equals_that_of_a_plain_loop(records: list[PairScore], beta: float) -> None:
    table = summarize(records, beta=beta, resamples=RESAMPLES)
    rows = {(row.is_source, row.language): row for row in table.rows}
    assert set(rows) == {(r.is_source, r.language) for r in records}
    for (is_source, language), row in rows.items():
        n = gap = positive = chosen = rejected = to_source = error = 0.0
        for r in records:
            if (r.is_source, r.language) != (is_source, language):
                continue
            n += 1
            gap += r.chosen - r.rejected
            positive += 1 if r.chosen > r.rejected else 0
            chosen += r.chosen
            rejected += r.rejected
            to_source += r.chosen - r.rejected - r.reference_gap
            error += (beta * (r.chosen - r.rejected) - r.reference_gap) ** 2
        assert row.pairs == n
        close = pytest.approx
        assert (row.gap, row.positive) == close((gap / n, positive / n), abs=1e-9)
        assert (row.chosen, row.rejected) == close((chosen / n, rejected / n), abs=1e-9)
        assert row.gap_to_source == close(to_source / n, abs=1e-9)
        assert (
            row.squared_error is None
            if is_source
            else row.squared_error == close(error / n, rel=1e-9, abs=1e-9)
        )
    targets = [r for r in records if not r.is_source]
    assert table.all_targets is not None and table.all_targets.pairs == len(targets)
    assert table.all_targets.gap == pytest.approx(sum(r.gap for r in targets) / len(targets), abs=1e-9)
    references = {r.group: r.reference_gap for r in records}
    assert table.reference_gap == pytest.approx(sum(references.values()) / len(references), abs=1e-9)


@given(_records(), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_the_order_of_the_records_changes_nothing(records: list[PairScore], seed: int) -> None:
    shuffled = records.copy()
    random.Random(seed).shuffle(shuffled)
    assert summarize(shuffled, beta=1.0, resamples=RESAMPLES) == summarize(
        records, beta=1.0, resamples=RESAMPLES
    )


@given(_records(), st.integers(-40, 0))
@settings(max_examples=40, deadline=None)
def test_a_shift_of_chosen_and_rejected_together_leaves_gaps_and_intervals(
    records: list[PairScore], eighths: int
) -> None:
    shift = eighths / 8
    # Powers of two, so that adding the shift rounds nothing.
    exact = [
        score(
            r.group,
            r.language,
            round(64 * r.chosen) / 64,
            round(64 * r.rejected) / 64,
            r.reference_gap,
            is_source=r.is_source,
        )
        for r in records
    ]
    moved = [
        score(
            r.group, r.language, r.chosen + shift, r.rejected + shift, r.reference_gap, is_source=r.is_source
        )
        for r in exact
    ]
    first = summarize(exact, beta=1.5, resamples=RESAMPLES)
    second = summarize(moved, beta=1.5, resamples=RESAMPLES)
    for a, b in zip(first.rows, second.rows, strict=True):
        assert (a.gap, a.ci_low, a.ci_high, a.positive, a.squared_error) == (
            b.gap,
            b.ci_low,
            b.ci_high,
            b.positive,
            b.squared_error,
        )
        assert b.chosen - a.chosen == pytest.approx(shift, abs=1e-9)


def test_a_language_has_the_same_interval_whatever_other_languages_are_there() -> None:
    before, _ = simulated_scores()
    whole = summarize(before, beta=1.0, resamples=RESAMPLES)
    alone = summarize([r for r in before if r.language == "bn"], beta=1.0, resamples=RESAMPLES)
    assert alone.targets[0] == next(row for row in whole.targets if row.language == "bn")


def test_pairs_of_a_group_are_not_counted_as_independent() -> None:
    groups = range(20)
    values = [random.Random(g).gauss(0, 1) for g in groups]
    languages = ("zh", "ja", "ko", "ar", "bn", "sw")
    same = [score(g, lang, values[g], 0.0, 0.5) for g in groups for lang in languages]
    apart = [score(6 * g + i, lang, values[g], 0.0, 0.5) for g in groups for i, lang in enumerate(languages)]
    wide = summarize(same, beta=1.0).all_targets
    narrow = summarize(apart, beta=1.0).all_targets
    assert wide is not None and narrow is not None and wide.gap == pytest.approx(narrow.gap)
    assert wide.ci_low is not None and wide.ci_high is not None
    assert narrow.ci_low is not None and narrow.ci_high is not None
    assert wide.ci_high - wide.ci_low > 2.2 * (narrow.ci_high - narrow.ci_low)


def test_the_source_comes_first_then_the_papers_languages_then_others_by_code() -> None:
    records = [score(0, code, -1, -2, 0.5) for code in ("yo", "sw", "de", "zh", "ar")]
    records.append(score(0, "en", -1, -2, 0.5, is_source=True))
    table = summarize(records, beta=1.0, resamples=RESAMPLES)
    assert [row.language for row in table.rows] == ["en", "zh", "ar", "sw", "de", "yo"]
    assert sort_languages(["fr", "bn", "fr", "am"]) == ["bn", "am", "fr"]


def test_one_group_has_no_interval_and_is_still_printed() -> None:
    table = summarize([score(3, "bn", -1, -1.5, 0.6)], beta=1.0)
    assert (table.targets[0].ci_low, table.targets[0].ci_high) == (None, None)
    assert "Bengali" in table.to_text() and "on 1 group\n" in table.to_text()


def test_the_goal_is_the_reference_gap_over_beta_where_the_error_is_zero() -> None:
    records = [score(g, "bn", 0.4 * (g + 1), 0.0, 0.6 * (g + 1)) for g in range(4)]
    table = summarize(records, beta=1.5, resamples=RESAMPLES)
    assert table.goal == pytest.approx(1.0) and table.targets[0].gap == pytest.approx(table.goal)
    assert table.targets[0].squared_error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("field", ["chosen", "rejected", "gap", "reference_gap"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_an_error_that_names_it(field: str, value: float) -> None:
    records = [score(0, "bn", -1, -2, 0.5), replace(score(7, "sw", -1, -2, 0.5), **{field: value})]  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=rf"1 of 2 pairs: `{field}`.*'sw' in group 7"):
        summarize(records, beta=1.0)


def test_no_scores_are_an_error() -> None:
    with pytest.raises(DataError, match="at least one pair"):
        summarize([], beta=1.0)


def test_two_dominant_languages_are_an_error() -> None:
    records = [score(0, "en", -1, -2, 1, is_source=True), score(1, "zh", -1, -2, 1, is_source=True)]
    with pytest.raises(DataError, match="en, zh"):
        summarize(records, beta=1.0)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_a_beta_that_is_not_positive_is_refused(beta: float) -> None:
    with pytest.raises(ConfigError, match="beta"):
        summarize([score(0, "bn", -1, -2, 1)], beta=beta)


# ------------------------------------------------------------------------------------------------------------ compare


def test_the_change_is_paired_so_that_what_pairs_share_does_not_widen_its_interval() -> None:
    spread = [random.Random(g).gauss(0, 1) for g in range(15)]
    before = [score(g, "bn", spread[g], 0.0, 0.6) for g in range(15)]
    after = [score(g, "bn", spread[g] + 0.5 + 0.01 * (g % 3), 0.0, 0.6) for g in range(15)]
    result = compare(summarize(before, beta=1.0), summarize(after[::-1], beta=1.0))
    (change,) = result.changes
    assert change.change == pytest.approx(0.51) and result.all_targets is not None
    assert change.ci_low is not None and change.ci_high is not None
    assert 0.5 < change.ci_low < 0.51 < change.ci_high < 0.52
    assert result.after.targets[0].ci_high - result.after.targets[0].ci_low > 0.5  # type: ignore[operator]


def test_changes_equal_the_difference_of_the_two_tables_row_by_row() -> None:
    before, after = simulated_scores(groups=7)
    result = compare(*(summarize(s, beta=1.5, resamples=RESAMPLES) for s in (before, after)))
    for old, new, change in zip(result.before.rows, result.after.rows, result.changes, strict=True):
        assert (change.language, change.is_source) == (old.language, old.is_source)
        assert change.change == pytest.approx(new.gap - old.gap, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "spread", "named"),
    [(-0.5, 0.1, True), (-0.09, 0.01, False), (-0.5, 4.0, False), (0.5, 0.1, False)],
)
def test_a_gap_that_falls_is_a_warning_of_its_language(change: float, spread: float, named: bool) -> None:
    before = [score(g, "bn", 0.0, 0, 0.6) for g in range(16)] + [
        score(g, "sw", 0.1, 0, 0.6) for g in range(16)
    ]
    after = [score(g, "bn", change + (spread if g % 2 else -spread), 0, 0.6) for g in range(16)]
    after += [score(g, "sw", 0.3, 0, 0.6) for g in range(16)]
    warning = compare(summarize(before, beta=1.0), summarize(after, beta=1.0)).fallen()
    assert (warning is not None) == named
    if warning is not None:
        assert f"fell in Bengali (0.000 -> {change:.3f}):" in warning and "Swahili" not in warning


def test_two_targets_of_one_language_in_a_group_are_matched_in_their_order() -> None:
    before = [score(0, "bn", 0.0, 0, 1), score(0, "bn", 1.0, 0, 1), score(1, "bn", 0.0, 0, 1)]
    after = [score(0, "bn", 0.5, 0, 1), score(0, "bn", 1.5, 0, 1), score(1, "bn", 0.5, 0, 1)]
    (change,) = compare(summarize(before, beta=1), summarize(after, beta=1)).changes
    assert (change.change, change.ci_low, change.ci_high) == (0.5, 0.5, 0.5)


def test_tables_of_different_pairs_are_not_compared() -> None:
    before, after = simulated_scores(groups=5)
    shorter = [r for r in after if (r.group, r.language) != (3, "sw")]
    with pytest.raises(DataError, match=r"1 only before, 0 only after.*'sw' of group 3"):
        compare(
            summarize(before, beta=1, resamples=RESAMPLES), summarize(shorter, beta=1, resamples=RESAMPLES)
        )


def test_tables_of_different_beta_are_not_compared() -> None:
    before, after = simulated_scores(groups=3)
    with pytest.raises(ConfigError, match=r"1 before and 1\.5 after"):
        compare(
            summarize(before, beta=1, resamples=RESAMPLES), summarize(after, beta=1.5, resamples=RESAMPLES)
        )


def test_a_table_read_without_its_records_is_refused_and_one_with_them_compares_the_same() -> None:
    before, after = (summarize(s, beta=1.0, resamples=RESAMPLES) for s in simulated_scores(groups=4))
    stored = [json.loads(json.dumps(t.to_dict(records=True), allow_nan=False)) for t in (before, after)]
    first, second = (RewardGapTable.from_dict(values) for values in stored)
    assert compare(first, second) == compare(before, after)
    assert first.records == before.records
    with pytest.raises(DataError, match="records=True"):
        compare(RewardGapTable.from_dict(before.to_dict()), after)


# --------------------------------------------------------------------------------------------------- text and storage


def test_a_table_survives_json() -> None:
    before, _ = simulated_scores(groups=4)
    table = summarize(before, beta=1.5, resamples=RESAMPLES)
    assert RewardGapTable.from_dict(json.loads(json.dumps(table.to_dict(), allow_nan=False))) == table
    assert table.to_dict()["targets"]["bn"]["gap"] == table.targets[4].gap


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("targets"),
        lambda d: d["source"].pop("gap"),
        lambda d: d.update(beta="much"),
        lambda d: d.update(source=3),
    ],
)
def test_a_damaged_file_is_an_error_of_storage(damage: object) -> None:
    values = summarize(simulated_scores(groups=2)[0], beta=1.0, resamples=RESAMPLES).to_dict()
    damage(values)  # type: ignore[operator]
    with pytest.raises(StorageError, match="evaluate again"):
        RewardGapTable.from_dict(values)


def test_text_is_aligned_at_most_100_columns_wide_and_ends_in_no_spaces() -> None:
    ordinary = compare(
        *(summarize(s, beta=1.0, resamples=RESAMPLES) for s in simulated_scores(("fy", "nb", "sw")))
    )
    for text in (ordinary.before.to_text(), ordinary.to_text()):
        lines = text.splitlines()
        assert max(map(len, lines)) <= 100
        assert all(line == line.rstrip() for line in lines)
        rows = [line for line in lines if "English  " in line or "All targets" in line or "Swahili" in line]
        assert (
            len(rows) == 3 and len({len(line) for line in rows}) == 1
        )  # right-aligned: all end in the same column


def test_the_comparison_reads_before_then_after() -> None:
    before = [score(g, "bn", -2.25 if g else -2.0, -2.0, 0.6) for g in range(2)]
    after = [score(g, "bn", -1.5, -2.0, 0.6) for g in range(2)]
    text = compare(summarize(before, beta=1.0), summarize(after, beta=1.0)).to_text()
    row = next(line for line in text.splitlines() if line.startswith("Bengali"))
    assert "-0.125 -> +0.500" in row and "0% -> 100%" in row and "+0.625" in row and "+0.62" in row


def test_a_label_from_a_data_file_cannot_send_control_codes_to_the_terminal() -> None:
    table = summarize([score(0, "\x1b[31mred\nrow | x", -1, -2, 0.5)], beta=1.0)
    assert "\x1b" not in table.to_text() and "[31mred row" in table.to_text()
    assert r"\[31mred row \| x" in table.to_markdown()


def test_show_is_plain_in_a_pipe_and_has_the_same_numbers_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")
    result = compare(*(summarize(s, beta=1.0, resamples=RESAMPLES) for s in simulated_scores(groups=4)))
    pipe, terminal = io.StringIO(), Terminal()
    result.show(pipe)
    result.show(terminal)
    assert pipe.getvalue() == result.to_text() + "\n"
    assert "\x1b[" in terminal.getvalue()
    numbers = [cell for row in result.text_table().rows for cell in row]
    assert all(cell in terminal.getvalue() for cell in numbers)


def test_a_terminal_too_narrow_for_the_table_gets_the_plain_one_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "40")
    table = summarize(simulated_scores(groups=4)[0], beta=1.0, resamples=RESAMPLES)
    stream = Terminal()
    table.show(stream)
    assert stream.getvalue() == table.to_text() + "\n"


def test_markdown_has_as_many_cells_in_every_row() -> None:
    table = summarize(simulated_scores(groups=4)[0], beta=1.0, resamples=RESAMPLES)
    lines = table.to_markdown().splitlines()
    assert len(lines) == 2 + len(table.rows) + 1
    assert {line.replace(r"\|", "").count("|") for line in lines} == {len(table.text_table().header) + 1}


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("<b>&", "&lt;b&gt;&amp;"),
        ("a|b", r"a\|b"),
        ("1. x", r"1\. x"),
        ("- x", r"\- x"),
        ("# x", r"\# x"),
        ("a\nb", "a b"),
        ("*x* [y](z)", r"\*x\* \[y\](z)"),
    ],
)
def test_markdown_is_escaped(text: str, escaped: str) -> None:
    assert escape_markdown(text) == escaped


def test_names_are_cut_by_columns_not_by_characters() -> None:
    assert printable_name("a" * 30, 10) == "aaaaaaa..."
    assert (
        printable_name("\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 9, 10)
        == "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 3 + "..."
    )
    assert printable_name("\x00\n") == "?"
