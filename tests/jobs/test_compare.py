"""`mpo compare`: every run checked before the first, each trained and measured once, whatever happens in between."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpo.cli import main
from mpo.common.typed_json import read_typed, write_typed
from mpo.errors import ConfigError, MPOError, StoppedBySignal
from mpo.evaluation.comparison import ComparisonResult, RunRecord
from mpo.jobs import suite
from mpo.jobs.compare import processes, running
from mpo.jobs.compare.job import compare
from mpo.jobs.compare.planning import inherited_notes, plan_comparison, within_budget
from mpo.jobs.compare.processes import Ended
from mpo.jobs.compare.recipe import Budget, base_of, check_early, load_comparison, settings_of
from mpo.training.recipe import load_recipe
from mpo.training.workload import Seen
from tests.jobs.comparing import BASE, SUITE, Stub, dump, loader, prepare, stub
from tests.processes import start

__all__ = ["stub"]

RUNS = [{"name": "mpo"}, {"name": "dpo", "loss_type": "sigmoid", "beta": 0.1}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("compare"))


@pytest.fixture
def load(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return loader(place, tmp_path, monkeypatch, runs=RUNS)


def records(folder: Path) -> dict[str, RunRecord]:
    return {path.parent.name: read_typed(path, RunRecord) for path in (folder / "runs").glob("*/run.json")}


# ---------------------------------------------------------------------------------------------------------- the recipe


def test_a_grid_is_every_combination_of_its_values_with_every_run(load: Any) -> None:
    recipe = load(
        runs=[{"name": "a"}, {"name": "b", "beta": 2.0}],
        grid={"learning_rate": [1e-3, 1e-2], "lora_r": [2, 4]},
    )
    settings = settings_of(recipe)
    assert [setting.name for setting in settings[:3]] == ["a_lr0.001_lr2", "a_lr0.001_lr4", "a_lr0.01_lr2"]
    assert len({json.dumps(dict(setting.changes)) for setting in settings}) == 8
    assert settings[-1].changes == {"beta": 2.0, "learning_rate": 0.01, "lora_r": 4}
    alone = settings_of(load(runs=None, grid={"loss_type": ["ipo", ["mpo", "sft"]], "beta": [0.5]}))
    assert [setting.name for setting in alone] == ["ipo_beta0.5", "mpo+sft_beta0.5"]


def test_all_wrong_keys_of_all_runs_are_said_at_once(load: Any) -> None:
    recipe = load(
        runs=[
            {"name": "a", "lerning_rate": 1},
            {"name": "b", "beta": "much", "output_dir": "x"},
            {"name": "c", "max_steps": 3},
        ],
        budget={"pairs": 4},
    )
    with pytest.raises(ConfigError) as error:
        check_early(recipe)
    for said in (
        "4 settings are wrong",
        "a: `lerning_rate` is not a key of a recipe; the nearest is `learning_rate`",
        "b: `beta` is 'much'; expected a number",
        "b: `output_dir` cannot be set for a run",
        "c: `max_steps` and `budget` both say how long it trains",
    ):
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"runs": None}, "there is nothing to compare"),
        ({"runs": [{"beta": 1}]}, "`runs.0` needs `name`"),
        ({"runs": [{"name": "a/b"}]}, "expected letters, digits"),
        ({"runs": [{"name": "base"}]}, "is the model before training"),
        ({"runs": [{"name": "Base"}]}, "is the model before training"),  # one folder on some file systems
        ({"runs": [{"name": "a"}, {"name": "a", "beta": 2}]}, "there are two runs 'a'"),
        ({"runs": [{"name": "a", "beta": 2}, {"name": "b", "beta": 2}]}, "'a' and 'b' are the same run"),
        ({"runs": [{"name": "a", "model_name_or_path": "x"}]}, "all runs start from the same model"),
        ({"runs": [{"name": "a", "beta": 2}], "grid": {"beta": [1]}}, "beta stand in `grid`, too"),
        ({"budget": {"pairs": 3, "steps": 4}}, "expected one of `pairs` and `steps`"),
        ({"budget": {"pairs": 0}}, "`pairs` is 0"),
        ({"seeds": [1, 1]}, "each once"),
        ({"keep": "all"}, "`keep` is 'all'"),
        ({"base": "lama"}, "There is no recipe lama"),
        (
            {"search": {"parameters": {"beta": {"low": 1, "high": 2}}}},
            "`search` and `validation_suite` go together",
        ),
        ({"shared": {"seed": 3}}, "`shared.seed`: use `seeds`"),
        ({"seed": 3}, "`seed` is not a key of a comparison; use `seeds`"),
        (
            {"model_name_or_path": "x"},
            "`model_name_or_path` is not a key of a comparison; it is one of a training recipe, which "
            "`shared.model_name_or_path` sets for every run.",
        ),
        (
            {"shared": {"lerning_rate": 1}},
            "c.yaml: `shared`: `lerning_rate` is not a key of a recipe; the nearest is `learning_rate`.",
        ),
        ({"titel": "x"}, "`titel` is not a key of a comparison; the nearest is `title`"),
    ],
)
def test_what_is_wrong_with_a_comparison_is_one_sentence(
    load: Any, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_early(load(**changes))
    assert said in str(error.value)


def test_runs_that_are_the_same_once_defaults_are_filled_in_are_named(load: Any) -> None:
    runs = [{"name": "a", "loss_type": "sigmoid"}, {"name": "b", "loss_type": "sigmoid", "beta": 0.1}]
    with pytest.raises(ConfigError, match="'a' and 'b' are the same run, defaults filled in"):
        plan_comparison(load(runs=runs))


def test_a_row_that_takes_a_value_of_the_base_recipe_for_a_published_one_is_remarked_on(
    load: Any, place: Path
) -> None:
    base = dump(place / "with_beta.yaml", {**BASE, "beta": 1.0})
    runs = [
        {"name": "mpo"},
        {"name": "as-mpo", "loss_type": "mpo", "lora_r": 4},
        {"name": "rdpo", "loss_type": "robust"},
        {"name": "own", "loss_type": "robust", "beta": 2.0},
        {"name": "both", "loss_type": ["mpo", "sigmoid"]},
    ]

    def noted(**changes: Any) -> list[str]:
        return [note for note in plan_comparison(load(runs=runs, **changes)).notes if "published" in note]

    assert noted(base=base) == [
        "rdpo takes `beta: 1` from with_beta.yaml; published for `robust` is 0.01. Set `beta` for rdpo to say which is meant",
        "both takes `beta: 1` from with_beta.yaml; published for `sigmoid` is 0.1. Set `beta` for both to say which is meant",
    ]
    assert not noted(base=base, shared={"beta": 1.0})


def test_what_only_the_model_and_the_data_show_is_said_of_all_runs_before_the_first_starts(
    load: Any, stub: Stub
) -> None:
    runs = [
        {"name": "a", "dataset": "gone.jsonl"},
        {"name": "b", "label_smoothing": 0.3},
        {"name": "c", "languages": ["fr"]},
    ]
    with pytest.raises(ConfigError) as error:
        compare(load(runs=runs[:2]))
    assert "b: " in str(error.value) and "label_smoothing" in str(error.value)
    with pytest.raises(ConfigError) as error:
        compare(load(runs=[runs[0], runs[2]]))
    assert "2 runs cannot be made" in str(error.value)
    assert "a: gone.jsonl" in str(error.value) and "c: " in str(error.value)
    assert not stub.trained and not stub.measured


def test_a_mistake_of_many_runs_is_said_once(load: Any, stub: Stub) -> None:
    def said(count: int) -> str:
        runs = [{"name": f"r{n}", "beta": n + 1.0} for n in range(count)]
        with pytest.raises(ConfigError) as error:
            compare(load(runs=runs, shared={"dataset": "gone.jsonl"}))
        return str(error.value)

    assert said(14).count("gone.jsonl") == said(3).count("gone.jsonl") == said(1).count("gone.jsonl")
    assert "14 runs cannot be made:\n  r0 and 13 other runs: gone.jsonl" in said(14)
    assert "3 runs cannot be made:\n  r0, r1 and r2: gone.jsonl" in said(3)
    assert "cannot be made" not in said(1) and not stub.trained


def test_a_dry_run_shows_runs_steps_and_pairs_and_starts_nothing(
    load: Any, stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(load(seeds=[0, 1], budget={"steps": 5}), dry_run=True) is None
    printed = capsys.readouterr().out
    for said in (
        "4 runs of 2 settings",
        "mpo-s0",
        "dpo-s1",
        "loss_type sigmoid, beta 0.1",
        "In all 20 steps",
        "60 answers",
    ):
        assert said in printed
    assert not stub.trained and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- the budget


def test_a_budget_of_pairs_ends_at_the_step_that_reaches_it() -> None:
    def steps() -> Any:
        pairs = 0
        for step in range(1, 10**6):
            pairs += 2 + step % 3
            yield Seen(step, pairs, 10 * pairs)

    for wanted in range(1, 200):
        seen = within_budget(steps(), Budget(pairs=wanted), 7)
        before = Seen() if seen.steps == 1 else within_budget(steps(), Budget(steps=seen.steps - 1), 7)
        assert before.pairs < wanted <= seen.pairs
    assert within_budget(steps(), None, 7).steps == 7


def test_every_run_sees_the_same_number_of_pairs_whatever_its_step_is(load: Any) -> None:
    runs = [
        {"name": "one"},
        {"name": "two", "per_device_train_batch_size": 2},
        {"name": "accumulated", "gradient_accumulation_steps": 3},
        {"name": "tokens", "max_tokens_per_batch": 300},
    ]
    plan = plan_comparison(load(runs=runs, seeds=[0, 5], budget={"pairs": 40}))
    for run in plan.runs:
        largest = 4 * {"two": 2, "accumulated": 3, "tokens": 8}.get(run.setting.name, 1)
        assert 40 <= run.seen.pairs < 40 + largest
        assert f"--max_steps={run.seen.steps}" in run.words and f"--seed={run.seed}" in run.words
    assert len({run.seen.steps for run in plan.runs}) > 1


def test_runs_of_different_length_without_a_budget_are_remarked_on(load: Any) -> None:
    plan = plan_comparison(load(runs=[{"name": "a"}, {"name": "b", "num_train_epochs": 2}]))
    assert any("different numbers of pairs" in note for note in plan.notes)
    # Groups of different size, of which each seed draws others: no setting trains longer than another.
    plan = plan_comparison(
        load(
            runs=[{"name": "a"}, {"name": "b", "learning_rate": 1e-3}],
            seeds=[0, 1, 2, 3],
            shared={"max_steps": 3},
        )
    )
    assert len({run.seen.pairs for run in plan.runs}) > 1
    assert not any("different numbers of pairs" in note for note in plan.notes)


# ------------------------------------------------------------------------------------------------------------- the runs


def test_every_run_is_trained_and_measured_once_and_the_base_model_too(
    load: Any, stub: Stub, tmp_path: Path
) -> None:
    recipe = load(seeds=[0, 1], budget={"steps": 5})
    page = compare(recipe)
    assert page == tmp_path / "out" / "index.html"
    assert [Path(given["output_dir"]).name for given in stub.trained] == [
        "mpo-s0",
        "dpo-s0",
        "mpo-s1",
        "dpo-s1",
    ]
    assert [given["seed"] for given in stub.trained] == ["0", "0", "1", "1"]
    assert all(given["max_steps"] == "5" for given in stub.trained)
    assert (stub.trained[1]["loss_type"], stub.trained[1]["beta"]) == ("sigmoid", "0.1")
    assert stub.measured == [["base"], *(["base", name] for name in ("mpo-s0", "dpo-s0", "mpo-s1", "dpo-s1"))]
    compare(load(seeds=[0, 1], budget={"steps": 5}))
    assert len(stub.trained) == 4 and len(stub.measured) == 5
    compare(load(seeds=[0, 1, 2], budget={"steps": 5}))
    assert [Path(given["output_dir"]).name for given in stub.trained[4:]] == ["mpo-s2", "dpo-s2"]
    result = read_typed(tmp_path / "out" / "compare.json", ComparisonResult)
    assert [row.name for row in result.rows] == ["base", "mpo", "dpo"]
    assert [(run.steps, run.pairs, run.tokens) for run in result.runs] == [(5, 15, 500)] * 6


def test_a_run_that_fails_costs_itself_only_and_is_tried_again(
    load: Any, stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.fails = lambda given: "The GPU is out of memory." if given.get("loss_type") == "sigmoid" else None
    runs = [RUNS[1], RUNS[0], {"name": "ipo", "loss_type": "ipo"}]
    with pytest.raises(MPOError, match=r"1 of 3 runs failed.*dpo-s0: Training: The GPU is out of memory"):
        compare(load(runs=runs))
    assert {name: record.state for name, record in records(tmp_path / "out").items()} == {
        "dpo-s0": "failed",
        "mpo-s0": "done",
        "ipo-s0": "done",
    }
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<b>dpo-s0</b> failed" in page and "out of memory" in page
    stub.fails = lambda given: None
    compare(load(runs=runs))
    assert [Path(given["output_dir"]).name for given in stub.trained[3:]] == ["dpo-s0"]
    assert {record.state for record in records(tmp_path / "out").values()} == {"done"}


def test_a_measurement_that_fails_is_made_up_for_without_training_again(
    load: Any, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = stub._measure
    broken = lambda given: processes.Ended(-9, "") if "dpo-s0" in given["models"] else plain(given)  # noqa: E731
    monkeypatch.setattr(stub, "_measure", broken)
    with pytest.raises(
        MPOError, match="Measuring: its process was ended by SIGKILL; the system may have run out of memory"
    ):
        compare(load())
    monkeypatch.setattr(stub, "_measure", plain)
    compare(load())
    assert len(stub.trained) == 2 and records(tmp_path / "out")["dpo-s0"].state == "done"


def test_a_base_model_that_cannot_be_measured_ends_it_before_any_training(
    load: Any, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stub, "_measure", lambda given: processes.Ended(2, "there is no judge"))
    with pytest.raises(
        MPOError, match="The base model could not be measured, so no run was trained: there is no judge"
    ):
        compare(load())
    assert not stub.trained


def test_a_base_measurement_that_is_gone_is_made_again(load: Any, stub: Stub, tmp_path: Path) -> None:
    compare(load())
    shutil.rmtree(tmp_path / "out" / "measured" / "base")
    compare(load())
    assert stub.measured == [["base"], ["base", "mpo-s0"], ["base", "dpo-s0"], ["base"]]
    result = read_typed(tmp_path / "out" / "compare.json", ComparisonResult)
    assert [row.name for row in result.rows] == ["base", "mpo", "dpo"]


@pytest.fixture
def ten_seconds_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training process takes ten seconds by the clock, however it ends."""
    clock = itertools.count(0, 10)
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: next(clock)))


@pytest.mark.usefixtures("ten_seconds_each")
def test_what_was_interrupted_is_gone_on_with_and_nothing_that_is_done_is_repeated(
    load: Any, stub: Stub, tmp_path: Path
) -> None:
    stub.stop_at = {2: StoppedBySignal(signal.SIGTERM)}
    with pytest.raises(StoppedBySignal, match="the same command goes on from there") as stop:
        compare(load())
    assert stop.value.exit_code == 143
    interrupted = records(tmp_path / "out")["dpo-s0"]
    assert (interrupted.state, interrupted.seconds) == ("started", 10)
    checkpoint = tmp_path / "out" / "runs" / "dpo-s0" / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "complete.json").write_text('{"files": {}}')
    compare(load())
    names = [Path(given["output_dir"]).name for given in stub.trained]
    assert names == ["mpo-s0", "dpo-s0", "dpo-s0"]
    assert stub.trained[1]["overwrite_output_dir"] == "true"
    assert (
        stub.trained[2]["resume_from_checkpoint"] == "auto" and "overwrite_output_dir" not in stub.trained[2]
    )
    assert not checkpoint.exists()  # its weights are saved
    assert stub.measured == [["base"], ["base", "mpo-s0"], ["base", "dpo-s0"]]
    assert {name: record.seconds for name, record in records(tmp_path / "out").items()} == {
        "mpo-s0": 10,
        "dpo-s0": 20,
    }


@pytest.mark.usefixtures("ten_seconds_each")
@pytest.mark.parametrize(("has_checkpoint", "seconds"), [(True, 45), (False, 10)])
def test_the_time_of_a_killed_process_counts_up_to_the_last_line_of_its_log_where_it_is_gone_on_with(
    load: Any, stub: Stub, tmp_path: Path, has_checkpoint: bool, seconds: float
) -> None:
    compare(load())
    folder = tmp_path / "out" / "runs" / "dpo-s0"
    record = replace(records(tmp_path / "out")["dpo-s0"], state="started", pairs=None, seconds=5.0)
    write_typed(folder / "run.json", record)
    (folder / "train.log").touch()
    os.utime(folder / "run.json", (1000, 1000))
    os.utime(folder / "train.log", (1030, 1030))
    if has_checkpoint:
        (folder / "checkpoint-3").mkdir()
        (folder / "checkpoint-3" / "complete.json").write_text('{"files": {}}')
    compare(load())
    assert records(tmp_path / "out")["dpo-s0"].seconds == seconds


def test_changed_settings_are_named_and_refused(load: Any, stub: Stub, place: Path, tmp_path: Path) -> None:
    compare(load())
    changed = [RUNS[0], {**RUNS[1], "beta": 0.5}]
    with pytest.raises(ConfigError) as error:
        compare(load(runs=changed))
    assert "dpo-s0 was trained with other settings (beta: 0.1 → 0.5)" in str(error.value)
    assert "mpo-s0" not in str(error.value) and "--out" in str(error.value)
    dump(tmp_path / "other.yaml", {**SUITE, "generation": {"max_new_tokens": 9}})
    with pytest.raises(ConfigError, match="measured with another suite"):
        compare(load(suite=str(tmp_path / "other.yaml")))
    assert len(stub.trained) == 2
    compare(load("--out", str(tmp_path / "elsewhere"), runs=changed))
    assert len(stub.trained) == 4


def test_with_other_refusal_phrases_what_is_trained_is_measured_again(
    load: Any, stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(load())
    compare(load("--out", str(tmp_path / "gone"), "--keep", "none"))
    monkeypatch.setattr(suite, "phrases_fingerprint", lambda: "others")
    stub.measured.clear()
    capsys.readouterr()
    for states in (["to measure"] * 2, ["done"] * 2):
        compare(load())
        plan = capsys.readouterr().out.split("In all")[0]
        assert re.findall(r"-s0 .*?(to measure|to do|done)", plan) == states
        assert stub.measured == [["base"], ["base", "mpo-s0"], ["base", "dpo-s0"]]
    assert len(stub.trained) == 4
    with pytest.raises(ConfigError, match=r"measured with another suite \(phrases: .* → \"others\"\)"):
        compare(load("--out", str(tmp_path / "gone"), "--keep", "none"))


def test_weights_are_kept_as_asked(load: Any, stub: Stub, tmp_path: Path) -> None:
    stub.effect = lambda given: (0.25, 0.25) if given.get("loss_type") == "ipo" else (0.5, 0.5)
    runs = [*RUNS, {"name": "ipo", "loss_type": "ipo"}]
    for keep, left in (("adapters", {"mpo-s0", "dpo-s0", "ipo-s0"}), ("best", {"ipo-s0"}), ("none", set())):
        out = tmp_path / keep
        compare(load("--out", str(out), "--keep", keep, runs=runs))
        assert {path.parent.name for path in out.glob("runs/*/*.safetensors")} == left
        assert {name for name, record in records(out).items() if record.kept} == left
        compare(load("--out", str(out), "--keep", keep, runs=runs))  # needs no weights that are gone
    assert len(stub.trained) == 9


def test_runs_ask_no_probe_of_their_own_unless_a_recipe_says_so(load: Any) -> None:
    def asked(**changes: Any) -> set[str]:
        words = {word for run in plan_comparison(load(**changes)).runs for word in run.words}
        return {word for word in words if "probe" in word}

    assert asked() == {"--behavior_probe=0"}
    assert asked(shared={"behavior_probe": 2}) == {"--behavior_probe=2"}
    assert asked(runs=[{"name": "a", "probe_max_new_tokens": 9}]) == {"--probe_max_new_tokens=9"}


def test_two_comparisons_do_not_write_one_folder(load: Any, stub: Stub, tmp_path: Path) -> None:
    from mpo.common.locks import locked_folder

    (tmp_path / "out").mkdir()
    with locked_folder(tmp_path / "out", ""), pytest.raises(MPOError, match="Another comparison is running"):
        compare(load())


def test_a_disk_that_is_too_small_for_what_is_kept_is_named_before_anything_starts(
    load: Any, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_comparison(load(seeds=[0, 1, 2]))
    one, all_kept = plan.runs[0].disk, sum(run.weights for run in plan.runs)
    free = SimpleNamespace(free=one + all_kept - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: free)
    with pytest.raises(MPOError, match=r"the 6 runs that are left may need .*`keep: best`"):
        compare(load(seeds=[0, 1, 2]))
    assert not stub.trained
    compare(load("--keep", "none", seeds=[0, 1, 2]))


# ------------------------------------------------------------------------------------------------------ the processes


def test_a_process_is_shown_logged_and_its_error_is_its_own_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = processes.run_mpo(["train", "no_such_recipe.yaml"], tmp_path / "a" / "log.txt")
    assert ended.code == 2 and ended.reason.startswith("There is no recipe no_such_recipe.yaml")
    assert "There is no recipe" in (tmp_path / "a" / "log.txt").read_text()
    assert "    Error: There is no recipe" in capsys.readouterr().out


def test_a_signal_is_passed_on_and_the_process_may_save_first(tmp_path: Path) -> None:
    saves = (
        "import signal, time, sys\n"
        "def save(*_):\n    print('saved', flush=True); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    log = tmp_path / "log"

    def kill_when_ready() -> None:
        while "ready" not in (log.read_text() if log.exists() else ""):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill_when_ready).start()
    with open(log, "a", encoding="utf-8") as file, pytest.raises(StoppedBySignal) as stop:
        processes._run([sys.executable, "-c", saves], file)
    assert stop.value.number == signal.SIGTERM and "saved" in log.read_text()


# ------------------------------------------------------------------------------------------------------- the real thing


def test_a_comparison_of_two_objectives_from_one_command_to_its_page(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(place, tmp_path / "place")
    as_it_is, begun = processes.run_mpo, []

    def run_mpo(words: Sequence[str], log: Path) -> Ended:
        """The first training and the first measurement as they are; later ones in processes that import nothing."""
        begun.append(words[0])
        if begun.count(words[0]) == 1:
            return as_it_is(words, log)
        log.parent.mkdir(parents=True, exist_ok=True)
        process = start(main, list(words), output=log)
        process.join()
        return Ended(process.exitcode or 0, log.read_text())

    monkeypatch.setattr(processes, "run_mpo", run_mpo)
    monkeypatch.chdir(root)
    dump(root / "base.yaml", {**BASE, "save_strategy": "epoch"})
    path = dump(
        root / "c.yaml",
        {"base": "base.yaml", "suite": "suite.yaml", "runs": RUNS, "budget": {"pairs": 6}, "keep": "none"},
    )
    assert main(["compare", path, "--out", str(tmp_path / "out")]) == 0
    assert begun == ["evaluate", "train", "evaluate", "train", "evaluate"]
    result = read_typed(tmp_path / "out" / "compare.json", ComparisonResult)
    assert [run.state for run in result.runs] == ["done", "done"]
    assert all(
        run.pairs is not None and 6 <= run.pairs < 10 and run.tokens and run.peak_memory
        for run in result.runs
    )
    assert all(run.point is not None for run in result.runs) and result.base_point is not None
    assert {*result.rows[1].measures} >= {"attack_success", "over_refusal"}
    assert not [*(tmp_path / "out" / "runs").rglob("*.safetensors")]
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<svg" in page and "<script" not in page and "measured/report.html" in page
    printed = capsys.readouterr().out
    assert "dpo" in printed and str(tmp_path / "out" / "index.html") in printed


def test_the_papers_ten_rows_train_with_the_settings_that_their_comments_name() -> None:
    recipe = load_comparison(Path(__file__).parents[2] / "recipes" / "compare" / "paper.yaml")
    base, settings = base_of(recipe), settings_of(recipe)
    loaded = [load_recipe(base, setting.words()) for setting in settings]
    usual = {
        "label_smoothing": 0.0,
        "simpo_gamma": 0.5,
        "cpo_alpha": 1.0,
        "rdpo_alpha": 0.01,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "retain_weight": 1.0,
        "train_on": "targets",
        "loss_weights": None,
        "harmless_loss_type": None,
    }
    wanted: dict[str, dict[str, Any]] = {
        "mpo": {"loss_type": ["mpo"], "beta": 1.0},
        "sft": {"loss_type": ["sft"], "beta": 1.0},  # which it does not read
        "dpo": {"loss_type": ["sigmoid"], "beta": 0.1},
        "ipo": {"loss_type": ["ipo"], "beta": 0.1},
        "rdpo": {"loss_type": ["robust"], "beta": 0.01, "label_smoothing": 0.1},
        "cpo": {"loss_type": ["cpo"], "beta": 0.1},
        "kto": {"loss_type": ["kto"], "beta": 0.1},
        "orpo": {"loss_type": ["orpo"], "beta": 0.1},
        "r-dpo": {"loss_type": ["rdpo"], "beta": 0.1},
        "simpo": {"loss_type": ["simpo"], "beta": 2.5, "simpo_gamma": 1.375},
    }
    found = {
        setting.name: {key: getattr(one.training, key) for key in ("loss_type", "beta", *usual)}
        for setting, one in zip(settings, loaded, strict=True)
    }
    assert found == {name: {**usual, **own} for name, own in wanted.items()}
    assert not inherited_notes(base, settings, loaded)


def test_the_shipped_demo_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    for name in ("demo", "paper", "refuse_or_answer"):
        path = root / "recipes" / "compare" / f"{name}.yaml"
        if path.is_file():
            check_early(load_comparison(path))
            assert f"recipes/compare/{name}.yaml" in path.read_text(encoding="utf-8").split("\n\n")[0]
    assert main(["compare", "recipes/compare/demo.yaml", "--sedes", "1"]) == 2
