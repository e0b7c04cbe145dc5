"""A search: every trial is measured on other prompts than the page, and an interrupted one goes on as if it had not been."""

from __future__ import annotations

import math
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from mpo.common.typed_json import read_typed
from mpo.errors import ConfigError, DependencyError, MPOError, StoppedBySignal
from mpo.evaluation.comparison import ComparisonResult
from mpo.jobs.compare.job import compare
from mpo.jobs.compare.planning import plan_comparison
from mpo.jobs.compare.recipe import Parameter, check_early, searched, settings_of
from tests.jobs.comparing import SUITE, Stub, dump, loader, prepare, stub

__all__ = ["stub"]

pytest.importorskip("optuna")

SEARCH = {
    "parameters": {
        "learning_rate": {"low": 1.0e-5, "high": 1.0e-1, "log": True},
        "lora_r": {"choices": [2, 4]},
        "retain_weight": {"low": 0, "high": 3, "whole": True, "runs": ["mpo"]},
    },
    "trials": 4,
    "sampler_seed": 3,
}
RUNS = [{"name": "mpo"}, {"name": "dpo", "loss_type": "sigmoid", "lora_r": 2}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("search"))


@pytest.fixture
def load(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    usual = {"validation_suite": "validation.yaml", "runs": RUNS, "search": SEARCH}
    return loader(place, tmp_path, monkeypatch, **usual)


def rate_matters(given: dict[str, str]) -> tuple[float, float]:
    """The nearer the learning rate is to 1e-3, the fewer attacks succeed."""
    return min(1.0, abs(math.log10(float(given["learning_rate"])) + 3) / 2), 0.0


def trials_of(stub: Stub) -> list[dict[str, str]]:
    return [given for given in stub.trained if "/search/" in given["output_dir"]]


def test_each_setting_gets_the_trials_and_the_best_of_them_is_what_is_compared(
    load: Any, stub: Stub, tmp_path: Path
) -> None:
    stub.effect, stub.prompts = rate_matters, 200
    compare(load())
    tried = trials_of(stub)
    assert len(tried) == 8
    mpo, dpo = tried[:4], tried[4:]
    assert all("retain_weight" in given for given in mpo) and not any(
        "retain_weight" in given for given in dpo
    )
    assert {given["lora_r"] for given in dpo} == {"2"}  # set by the run itself
    assert all(1e-5 <= float(given["learning_rate"]) <= 1e-1 for given in tried)
    assert all(float(given["retain_weight"]) in (0, 1, 2, 3) for given in mpo)
    final = [given for given in stub.trained if given not in tried]
    assert [Path(given["output_dir"]).name for given in final] == ["mpo-s0", "dpo-s0"]
    for own, chosen in ((mpo, final[0]), (dpo, final[1])):
        best = min(own, key=lambda given: rate_matters(given)[0])
        assert chosen["learning_rate"] == best["learning_rate"]
    result = read_typed(tmp_path / "out" / "compare.json", ComparisonResult)
    assert [search.setting for search in result.searches] == ["mpo", "dpo"]
    scores = [trial.score for trial in result.searches[0].trials]
    wanted = [1 - round(200 * rate_matters(given)[0]) / 200 for given in mpo]
    assert scores == pytest.approx(wanted)
    assert set(result.rows[1].searched) == {"learning_rate", "lora_r", "retain_weight"}
    assert not [*(tmp_path / "out" / "search").rglob("*.safetensors")]
    assert "The search" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    compare(load())
    assert len(stub.trained) == 10


def test_an_interrupted_search_tries_what_one_that_was_not_would_have(
    load: Any, stub: Stub, tmp_path: Path
) -> None:
    stub.effect = rate_matters
    only = [{"name": "mpo"}]
    compare(load("--out", str(tmp_path / "whole"), runs=only))
    whole = [given["learning_rate"] for given in trials_of(stub)]
    stub.trained.clear()
    stub.stop_at = {3: StoppedBySignal(signal.SIGINT)}
    with pytest.raises(StoppedBySignal):
        compare(load("--out", str(tmp_path / "cut"), runs=only))
    compare(load("--out", str(tmp_path / "cut"), runs=only))
    tried = [given["learning_rate"] for given in trials_of(stub)]
    assert tried == [*whole[:3], *whole[2:]]


def test_a_trial_that_fails_is_a_failed_trial(load: Any, stub: Stub, tmp_path: Path) -> None:
    stub.effect = rate_matters
    stub.fails = lambda given: "The loss is not finite." if float(given["learning_rate"]) > 1e-3 else None
    compare(load(runs=[{"name": "mpo"}], search={**SEARCH, "trials": 6}))
    (search,) = read_typed(tmp_path / "out" / "compare.json", ComparisonResult).searches
    failed = [trial for trial in search.trials if trial.score is None]
    assert failed and all(trial.values["learning_rate"] > 1e-3 for trial in failed)
    assert "The loss is not finite" in failed[0].error and search.best["learning_rate"] <= 1e-3
    stub.fails = lambda given: "Never."
    with pytest.raises(MPOError, match="Every trial of every search failed"):
        compare(load("--out", str(tmp_path / "none"), runs=[{"name": "mpo"}]))


def test_a_failed_trial_is_tried_again_with_its_values_until_a_run_has_begun_with_what_was_found(
    load: Any, stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tried() -> list[str]:
        found = [given["learning_rate"] for given in trials_of(stub)]
        stub.trained.clear()
        return found

    def stored() -> list[float | None]:
        (search,) = read_typed(tmp_path / "out" / "compare.json", ComparisonResult).searches
        return [trial.score for trial in search.trials]

    recipe = load(runs=[{"name": "mpo"}])
    stub.effect = rate_matters
    stub.fails = lambda given: "The GPU is taken."
    with pytest.raises(MPOError, match=r"Every trial of every search failed.*tries them again"):
        compare(recipe)
    first = tried()
    with pytest.raises(MPOError, match="Every trial of every search failed"):
        compare(recipe)
    assert tried() == first and len(set(first)) == 4
    stub.fails = lambda given: "The GPU is taken." if given["learning_rate"] in first[:2] else None
    compare(recipe)
    assert tried() == first
    assert [score is None for score in stored()] == [True, True, False, False]
    stub.fails = lambda given: None
    capsys.readouterr()
    compare(recipe)
    assert not tried() and len(stored()) == 4
    assert "2 trials of mpo failed; its runs have begun" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out" / "runs")
    compare(recipe)
    assert tried() == first[:2]
    assert len(stored()) == 4 and None not in stored()


def test_a_point_is_aimed_at_by_what_exceeds_it(load: Any, stub: Stub, tmp_path: Path) -> None:
    def traded(given: dict[str, str]) -> tuple[float, float]:
        share = (math.log10(float(given["learning_rate"])) + 5) / 4
        return 1 - share, share

    stub.effect, stub.prompts = traded, 500
    search = {"parameters": {"learning_rate": SEARCH["parameters"]["learning_rate"]}, "trials": 8}
    point = {"attack": 0.3, "refusal": 0.5}
    compare(load(runs=[{"name": "mpo"}], search={**search, "point": point}))

    def excess(given: dict[str, str]) -> float:
        attack, refusal = traded(given)
        return max(0.0, attack - 0.3) + max(0.0, refusal - 0.5)

    (found,) = read_typed(tmp_path / "out" / "compare.json", ComparisonResult).searches
    scores = [trial.score for trial in found.trials]
    assert scores == pytest.approx([-excess(given) for given in trials_of(stub)], abs=2 / 500)
    assert len(set(scores)) > 1
    best = min(trials_of(stub), key=excess)
    assert stub.trained[-1]["learning_rate"] == best["learning_rate"]
    for wrong, said in (
        ({"point": {"attack": 5, "refusal": 0.1}}, "`attack` is 5; expected a share from 0 to 1"),
        ({"point": point, "weights": {"harmful": 2}}, "`weights` and `point` both say what a search aims at"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(search={**SEARCH, **wrong})


def test_weights_of_the_aim_decide_what_is_best(load: Any, stub: Stub, tmp_path: Path) -> None:
    def traded(given: dict[str, str]) -> tuple[float, float]:
        share = (math.log10(float(given["learning_rate"])) + 5) / 4
        return 1 - share, share**2

    stub.effect, stub.prompts = traded, 500
    chosen = []
    for weights in ({"harmful": 10}, {"harmless": 10}):
        out = str(tmp_path / next(iter(weights)))
        compare(load("--out", out, runs=[{"name": "mpo"}], search={**SEARCH, "weights": weights}))
        chosen.append(float(stub.trained[-1]["learning_rate"]))
    tried = [float(given["learning_rate"]) for given in trials_of(stub)]
    assert chosen == [max(tried), min(tried)]


def test_prompts_of_the_page_are_not_searched_on(load: Any, place: Path) -> None:
    with pytest.raises(ConfigError, match=r"2 prompts of the validation suite.*also in the suite"):
        plan_comparison(
            load(
                validation_suite=dump(
                    place / "both.yaml",
                    {**SUITE, "over_refusal": {"x": {"prompts": ["harmless_2.csv"]}}},
                )
            )
        )
    for kind in ("unsafe", "harmless"):
        with open(place / f"{kind}.csv", encoding="utf-8") as file:
            names, *rows = [line.rstrip("\n").split(",") for line in file]
        for column, code in enumerate(names[1:], 1):
            lines = ["id,prompt", *(f"{row[0]},{row[column]}" for row in rows)]
            (place / f"{kind}_only_{code}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        shutil.copy(place / f"{kind}.csv", place / f"{kind}_copy.csv")

    def suite(name: str, file: str, **more: Any) -> str:
        sets = {"attack": "unsafe", "over_refusal": "harmless"}
        asked = {kind: {"x": {"prompts": [f"{of}{file}.csv"], **more}} for kind, of in sets.items()}
        return dump(place / f"{name}.yaml", {**SUITE, **asked})

    for final, other in (
        (("", {"languages": ["en"]}), ("", {"languages": ["sw"]})),
        (("", {"languages": ["en"], "limit": 1}), ("_copy", {"languages": ["ar"]})),
        (("_only_en", {}), ("_only_sw", {})),
    ):
        count = 2 if "limit" in final[1] else 4
        with pytest.raises(ConfigError, match=f"{count} prompts of the .* in the same language or another"):
            plan_comparison(
                load(
                    suite=suite("final", final[0], **final[1]),
                    validation_suite=suite("other", other[0], **other[1]),
                )
            )
    plan_comparison(load(validation_suite=suite("fine", "_2", languages=["sw"])))
    alone = {key: value for key, value in SUITE.items() if key != "attack"}
    alone["over_refusal"] = {"x": {"prompts": ["harmless_2.csv"]}}
    with pytest.raises(ConfigError, match="`validation_suite` needs both"):
        plan_comparison(load(validation_suite=dump(place / "alone.yaml", alone)))


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({}, "`parameters` is empty"),
        ({"beta": {"low": 2, "high": 1}}, "expected `low` and a larger `high`"),
        ({"beta": {"low": 0, "high": 1, "log": True}}, "a logarithmic range begins above 0"),
        ({"beta": {"choices": [1], "low": 1}}, "`choices` stand alone"),
        ({"beta": {"choices": []}}, "`choices` is empty"),
        ({"lora_r": {"low": 1.5, "high": 4, "whole": True}}, "needs whole numbers"),
        ({"bta": {"low": 1, "high": 2}}, "`bta` is not a key of a recipe; the nearest is `beta`"),
        ({"beta": {"low": 1, "high": 2, "runs": ["ipo"]}}, "names ipo; expected some of dpo and mpo"),
        ({"seed": {"low": 1, "high": 2}}, "use `seeds`"),
    ],
)
def test_a_wrong_space_is_one_sentence(load: Any, parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_early(load(search={"parameters": parameters}))
    assert said in str(error.value)


def test_what_a_loss_does_not_read_is_not_searched_for_it(load: Any) -> None:
    recipe = load()
    mpo, dpo = settings_of(recipe)
    assert [*searched(recipe.search, mpo)] == ["learning_rate", "lora_r", "retain_weight"]
    assert [*searched(recipe.search, dpo)] == ["learning_rate"]
    everywhere = {"parameters": {"retain_weight": {"low": 0, "high": 1}}}
    with pytest.raises(ConfigError, match=r"dpo: .*retain_weight"):
        plan_comparison(load(search=everywhere))


def test_a_parameter_says_what_it_is() -> None:
    assert str(Parameter(1e-6, 1e-4, log=True)) == "1e-06 to 0.0001 (logarithmic)"
    assert str(Parameter(choices=[1, 2])) == "one of 1 and 2"


def test_optuna_is_asked_for_before_anything_else(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(DependencyError, match=r"pip install 'mpo-align\[search\]'"):
        compare(load(suite="suite.yaml"))
