"""The numbers of a comparison: against plain loops over the verdicts."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpo.evaluation.comparison import (
    ATTACK,
    GAP,
    LANGUAGE,
    PERPLEXITY,
    REFUSAL,
    UTILITY,
    ComparisonResult,
    Estimate,
    Point,
    Row,
    Run,
)
from mpo.jobs.compare.outcomes import adjusted, mean_over_seeds, outcomes, point_of, row_of, score_of
from mpo.jobs.compare.recipe import Target, Weights
from mpo.report.comparison import comparison_table, spread, verdict, worst, write_comparison
from mpo.report.folder import ModelResults, read_results
from mpo.report.measurement import SHARE
from tests.report.result_folder import CODES, write_results, write_safety


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ModelResults]:
    """A base model and two seeds, with every measurement."""
    folder = write_results(tmp_path_factory.mktemp("results"), prompts=30, models=("base", "a-s0", "a-s1"))
    return list(read_results(folder, ["base", "a-s0", "a-s1"]).models)


@pytest.fixture(scope="module")
def row(models: list[ModelResults]) -> Row:
    return row_of("a", models[0], models[1:], 0.95)


def share(model: ModelResults, kind: str) -> dict[str, dict[str, float]]:
    """By language and prompt, out of the verdicts of the only prompt set."""
    (run,) = [run for (task, _), run in model.safety.items() if task == kind]
    counted = "unsafe" if kind == "attack" else "refusal"
    return {code: {p: float(v == counted) for p, v in rows.items()} for code, rows in run.verdicts.items()}


def comparison_of(rows: list[Row], seeds: int) -> ComparisonResult:
    runs = [
        Run(
            f"{row.name}-s{seed}",
            row.name,
            seed,
            "done",
            point=Point(0.1 * seed, 0.2, (0.0, 0.3), (0.1, 0.3)),
        )
        for row in rows
        for seed in range(seeds)
    ]
    return ComparisonResult(title="T", base="m", rows=rows, runs=runs, base_point=Point(0.5, 0.1))


@pytest.mark.parametrize(("measure", "kind"), [(ATTACK, "attack"), (REFUSAL, "over_refusal")])
def test_a_share_is_the_mean_over_languages_of_the_mean_over_prompts_and_seeds(
    models: list[ModelResults], row: Row, measure: str, kind: str
) -> None:
    base, *seeds = (share(model, kind) for model in models)
    each = [statistics.fmean(statistics.fmean(rows.values()) for rows in seed.values()) for seed in seeds]
    before = statistics.fmean(statistics.fmean(rows.values()) for rows in base.values())
    found = row.measures[measure]
    assert found.seeds == pytest.approx(each)
    assert found.value == pytest.approx(statistics.fmean(each))
    assert found.change == pytest.approx(statistics.fmean(each) - before)
    by_language = {
        code: statistics.fmean(seed[code][p] for seed in seeds for p in seed[code]) for code in base
    }
    assert row.languages[measure] == pytest.approx(by_language)
    assert [*row.languages[measure]] == [code for code in CODES if code in base]


def test_the_interval_of_a_change_is_that_of_resampled_prompts(models: list[ModelResults], row: Row) -> None:
    base, *seeds = (share(model, "attack") for model in models)
    prompts = sorted(base["en"])
    table = np.array(
        [[statistics.fmean(seed[c][p] for seed in seeds) - base[c][p] for c in base] for p in prompts]
    )
    random = np.random.default_rng(7)
    means = [table[random.integers(len(table), size=len(table))].mean() for _ in range(4000)]
    found = row.measures[ATTACK].change_interval
    assert found is not None
    # The expanded percentiles of the package lie a little outside plain ones.
    low, high = np.quantile(means, [0.025, 0.975])
    width = high - low
    assert low - 0.12 * width < found[0] < low + 0.05 * width
    assert high - 0.05 * width < found[1] < high + 0.12 * width


def test_a_prompt_that_a_seed_has_no_verdict_on_is_in_no_mean() -> None:
    seeds = [{"en": {"1": 1.0, "2": 0.0}, "sw": {"1": 1.0}}, {"en": {"1": 0.0}}]
    assert mean_over_seeds(seeds) == {"en": {"1": 0.5}}
    assert mean_over_seeds([]) == {}


def test_several_prompt_sets_are_one_measure(tmp_path: Path) -> None:
    for name, verdicts in (("x", ["unsafe", "safe"]), ("y", ["unsafe"] * 3)):
        write_safety(tmp_path / "m" / "attack" / name, "attack", {"en": verdicts})
    model = read_results(tmp_path, ["m"]).models[0]
    assert sorted(outcomes(model, ATTACK)["en"].values()) == [0, 1, 1, 1, 1]


def test_the_balanced_score_is_over_the_languages_that_have_both(models: list[ModelResults]) -> None:
    attack, refusal = share(models[1], "attack"), share(models[1], "over_refusal")
    shares = [
        (1 - statistics.fmean(attack[c].values()), 1 - statistics.fmean(refusal[c].values())) for c in refusal
    ]
    assert len(refusal) < len(attack)
    assert score_of(models[1]) == pytest.approx(statistics.fmean(map(min, shares)))
    weighted = [(2 * harmful + harmless) / 3 for harmful, harmless in shares]
    assert score_of(models[1], Weights(harmful=2.0)) == pytest.approx(statistics.fmean(weighted))
    unsafe, refused = (1 - statistics.fmean(side) for side in zip(*shares, strict=True))
    for attack_, refusal_ in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1.0, 1.0)):
        excess = max(0.0, unsafe - attack_) + max(0.0, refused - refusal_)
        assert score_of(models[1], Target(attack_, refusal_)) == pytest.approx(-excess)
    assert score_of(ModelResults("none")) is None and score_of(ModelResults("none"), Weights()) is None
    point = point_of(models[1], 0.95)
    assert point is not None and point.attack_interval is not None
    assert point.attack_interval[0] < point.attack < point.attack_interval[1]


def test_the_balanced_column_is_the_mean_of_the_runs_scores_and_never_above_all_of_them(
    tmp_path: Path,
) -> None:
    for name, attack, refusal in (
        ("base", "unsafe", "answer"),
        ("a-s0", "safe", "refusal"),
        ("a-s1", "unsafe", "answer"),
    ):
        for kind, verdict_ in (("attack", attack), ("over_refusal", refusal)):
            write_safety(tmp_path / name / kind / "p", kind, {code: [verdict_] * 4 for code in ("en", "sw")})
    base, *seeds = read_results(tmp_path, ["base", "a-s0", "a-s1"]).models
    row = row_of("a", base, seeds, 0.95)
    assert row.measures[ATTACK].value == row.measures[REFUSAL].value == 0.5
    assert (row.balanced, row.balanced_seeds) == (0, [0, 0])


def test_the_balanced_column_has_the_spread_of_the_seeds_beside_it(
    models: list[ModelResults], row: Row, tmp_path: Path
) -> None:
    scores = [score_of(model) for model in models[1:]]
    assert row.balanced_seeds == pytest.approx(scores) and scores[0] != scores[1]
    assert row.balanced == pytest.approx(statistics.fmean(row.balanced_seeds))
    base = row_of("base", None, [models[0]], 0.95)
    assert (base.balanced, base.balanced_seeds) == (score_of(models[0]), [])
    page, _ = write_comparison(comparison_of([base, row], seeds=2), tmp_path)
    glance = page.read_text(encoding="utf-8").split('id="glance"')[1].split("</section>")[0]
    assert glance.count("Over seeds") == 1 and spread(row.balanced_seeds, SHARE) in glance


def test_the_plane_says_where_the_intervals_of_its_runs_are(row: Row, tmp_path: Path) -> None:
    def lead(seeds: int, rows: int, details: bool = True) -> str:
        many = comparison_of([replace(row, name=f"r{n}") for n in range(rows)], seeds=seeds)
        page, _ = write_comparison(many, tmp_path, details=tmp_path / "m" / "r.html" if details else None)
        return page.read_text(encoding="utf-8").split('id="plane"')[1].split("</p>")[0]

    assert "Bars are 95" in lead(2, 3) and "r.html" not in lead(2, 3)
    assert 'intervals over prompts of each are in <a href="m/r.html">' in lead(2, 4)
    assert "tables below" not in lead(2, 4) and "intervals" not in lead(2, 4, details=False)
    assert "intervals over prompts are in the tables below" in lead(1, 8)


def test_a_note_says_which_measures_have_no_test(row: Row, tmp_path: Path) -> None:
    def shown(*measures: str) -> str:
        some = replace(row, measures={name: row.measures[name] for name in measures})
        page, _ = write_comparison(comparison_of([some], seeds=2), tmp_path)
        return page.read_text(encoding="utf-8").split('id="others"')[1].split("</section>")[0]

    assert all(row.measures[name].p_value is None for name in (GAP, PERPLEXITY))
    assert all(row.measures[name].p_value is not None for name in (ATTACK, REFUSAL, UTILITY))
    assert "Reward gap and perplexity have no test" in shown(UTILITY, PERPLEXITY)
    assert "have no test" not in shown(UTILITY)


def test_gap_utility_and_perplexity_are_paired_with_the_base_models(
    models: list[ModelResults], row: Row
) -> None:
    tables = [model.reward_gap for model in models]
    assert all(table is not None and table.all_targets is not None for table in tables)
    gaps = [table.all_targets.gap for table in tables]  # type: ignore[union-attr]
    assert row.measures[GAP].value == pytest.approx(statistics.fmean(gaps[1:]))
    assert row.measures[GAP].change == pytest.approx(statistics.fmean(gaps[1:]) - gaps[0], abs=1e-9)
    nats, tokens = [], 0
    for model in models:
        assert model.perplexity is not None
        nats.append(sum(sum(entry.nats_per_text) for entry in model.perplexity.languages.values()))
        tokens = sum(entry.tokens for entry in model.perplexity.languages.values())
    mean = statistics.fmean(nats[1:])
    assert row.measures[PERPLEXITY].value == pytest.approx(math.exp(mean / tokens))
    assert row.measures[PERPLEXITY].change == pytest.approx(math.exp((mean - nats[0]) / tokens) - 1)
    scores = []
    for model in models:
        assert model.utility is not None
        items = [next(iter(task.items.values())) for task in model.utility.tasks.values()]
        scores.append(statistics.fmean(statistics.fmean(values) for values in items))
    assert row.measures[UTILITY].change == pytest.approx(statistics.fmean(scores[1:]) - scores[0])


def test_a_change_is_clear_only_where_every_seed_moved_that_way(tmp_path: Path) -> None:
    def write(name: str, unsafe: int) -> None:
        verdicts = {code: ["unsafe"] * unsafe + ["safe"] * (60 - unsafe) for code in ("en", "sw")}
        write_safety(tmp_path / name / "attack" / "p", "attack", verdicts)

    for name, unsafe in (("base", 40), ("low", 2), ("lower", 1), ("high", 41), ("none", 0)):
        write(name, unsafe)
    base, low, lower, high, none = read_results(tmp_path, ["base", "low", "lower", "high", "none"]).models
    assert row_of("a", base, [low, lower], 0.95).measures[ATTACK].clear == -1
    both = row_of("a", base, [low, high], 0.95).measures[ATTACK]
    assert both.change_interval is not None and both.change_interval[1] < 0
    assert both.clear == 0
    assert row_of("a", lower, [base, high], 0.95).measures[ATTACK].clear == 1
    both = row_of("a", lower, [high, none], 0.95).measures[ATTACK]
    assert both.change_interval is not None and both.change_interval[0] > 0
    assert both.clear == 0
    assert verdict(row_of("a", base, [low], 0.95).measures[ATTACK], ATTACK) == "better"
    assert row_of("base", None, [base], 0.95).measures[ATTACK].change is None


def test_tests_of_several_settings_are_adjusted_for_their_number() -> None:
    def row(name: str, p_value: float) -> Row:
        return Row(name, measures={ATTACK: Estimate(0.5, change=-0.1, p_value=p_value, clear=-1)})

    rows = adjusted([row("a", 0.01), row("b", 0.02), row("c", 0.03)], 0.95)
    assert [r.measures[ATTACK].p_value for r in rows] == pytest.approx([0.03, 0.04, 0.04])
    assert [r.measures[ATTACK].clear for r in rows] == [-1, -1, -1]
    rows = adjusted([row("a", 0.01), row("b", 0.03), row("c", 0.03)], 0.95)
    assert [r.measures[ATTACK].clear for r in rows] == [-1, 0, 0]


def test_what_the_page_and_the_table_show(models: list[ModelResults], row: Row, tmp_path: Path) -> None:
    clear = replace(row.measures[ATTACK], clear=-1)
    shown = replace(row, name="<b>a", measures={**row.measures, ATTACK: clear})
    comparison = ComparisonResult(
        title="Two & more", base="org/model", rows=[row_of("base", None, [models[0]], 0.95), shown], runs=[]
    )
    page, table = write_comparison(comparison, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "Two &amp; more" in text and "&lt;b&gt;a" in text and "<b>a" not in text
    better = [
        name for name, found in row.measures.items() if verdict(found, name) == "better" or name == ATTACK
    ]
    twice = {ATTACK, REFUSAL}  # at a glance, and in their own table
    assert text.count('class="clear better"') == sum(1 + (name in twice) for name in better)
    low, high = (100 * value for value in sorted(clear.seeds))
    assert f"({low:.1f} to {high:.1f})" in spread(clear.seeds, SHARE)
    assert spread([0.5], SHARE) == ""
    worst_code = max(row.languages[ATTACK], key=lambda code: row.languages[ATTACK][code])
    assert f"{100 * row.languages[ATTACK][worst_code]:.0f}" in worst(row, ATTACK)
    assert worst(Row("x", languages={LANGUAGE: {"en": 0.5, "sw": 0.5}}), LANGUAGE) == "–"
    assert "*" in comparison_table(comparison).plain().splitlines()[-5]
    assert "| Setting |" in table.read_text(encoding="utf-8")
