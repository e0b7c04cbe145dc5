"""A model that is asked while it is trained: what is logged, when it is asked, what stops it, and what it does not change."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpo.data.languages import language_name
from mpo.errors import ConfigError
from mpo.evaluation.probe.ask import Questions
from mpo.evaluation.probe.watch import ProbeWatch, prompts_of
from mpo.training.trainer import MPOTrainer
from tests.evaluation.probe.said import is_safe, refuses
from tests.runs import config, differing, lora, trainer, weights
from tests.tiny import random_groups, save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def made(model: Path, folder: Path, **settings: Any) -> MPOTrainer:
    rows = random_groups(0, 6, (1, 2), ("bn", "sw"), words=(1, 4))
    settings = {"probe_max_new_tokens": 4, "behavior_probe": 1, "peft_config": lora(), **settings}
    return trainer(model, folder, rows, **settings)


KEEPS_BEST: dict[str, Any] = {
    "eval_dataset": random_groups(1, 2, (1, 2), ("bn", "sw"), words=(1, 4)),
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "metric_for_best_model": "eval_probe_balanced",
    "load_best_model_at_end": True,
}


def watched(made: MPOTrainer) -> ProbeWatch:
    watch = ProbeWatch(made)
    made.add_callback(watch)
    return watch


def scripted(monkeypatch: pytest.MonkeyPatch, says: Callable[[int, Any], str]) -> list[int]:
    """Have models say what a script has them say, by the number of the probe; the steps at which they were asked."""
    asked: list[int] = []

    def ask(self: Questions, prompts: Any, title: str | None = None) -> Any:
        from mpo.evaluation.answers import AnswerRow

        number = len(asked)
        asked.append(self.policy._trainer.state.global_step)
        return [AnswerRow(p.id, p.prompt_id, p.language, p.text, says(number, p), True) for p in prompts]

    monkeypatch.setattr(Questions, "ask", ask)
    return asked


def probed_steps(made: MPOTrainer) -> list[int]:
    return [log["step"] for log in made.state.log_history if "probe/balanced" in log]


def test_what_is_trained_is_the_same_with_and_without_it_bit_for_bit(model: Path, tmp_path: Path) -> None:
    dropout = {"peft_config": lora(lora_dropout=0.2), "disable_dropout": False}
    alone = made(model, tmp_path / "alone", **dropout)
    alone.train()
    asked = made(model, tmp_path / "asked", probe_steps=1, **dropout)
    watch = watched(asked)
    watch.start()
    asked.train()
    watch.finish()
    assert probed_steps(asked) == [0, 1, 2, 3, 4, 5, 6]
    assert not differing(weights(alone.model), weights(asked.model))
    losses = [[log["loss"] for log in each.state.log_history if "loss" in log] for each in (alone, asked)]
    assert losses[0] == losses[1]


def test_a_run_that_is_resumed_ends_as_the_unbroken_one_and_has_its_start(
    model: Path, tmp_path: Path
) -> None:
    saved = {"save_strategy": "steps", "save_steps": 3, "probe_steps": 2}
    whole = made(model, tmp_path / "whole", **saved)
    first = watched(whole)
    first.start()
    whole.train()
    again = made(model, tmp_path / "whole", **saved)
    second = watched(again)
    second.start()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-3"))
    assert not differing(weights(whole.model), weights(again.model))
    assert probed_steps(again) == probed_steps(whole) == [0, 2, 4, 6]
    assert first.before == second.before and first.finish() == second.finish()


def test_every_language_is_logged_under_its_name(model: Path, tmp_path: Path) -> None:
    run = made(model, tmp_path, probe_steps=3)
    watched(run)  # asks the starting model itself, when the run begins
    run.train()
    (log,) = [log for log in run.state.log_history if "probe/balanced" in log and log["step"] == 3]
    for code in ("en", "bn", "sw"):
        for measure in ("harmful_answered", "harmless_refused"):
            assert 0 <= log[f"probe/{measure}/{code}"] <= 1
    json.dumps(log, allow_nan=False)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(None, [0, 6]), (2, [0, 2, 4, 6]), (4, [0, 4, 6]), (0.5, [0, 3, 6]), (0.01, [0, 1, 2, 3, 4, 5, 6])],
)
def test_it_is_asked_before_after_and_every_so_many_steps_and_never_twice(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: Any, expected: list[int]
) -> None:
    asked = scripted(monkeypatch, lambda number, prompt: is_safe(prompt))
    run = made(model, tmp_path, probe_steps=steps)
    watch = watched(run)
    watch.start()
    run.train()
    assert watch.finish() is not None
    assert asked == expected


def test_a_run_is_stopped_when_its_model_refuses_too_much(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = scripted(monkeypatch, lambda number, prompt: (refuses if number > 2 else is_safe)(prompt))
    run = made(model, tmp_path, probe_steps=1, stop_on_over_refusal=20.0)
    watch = watched(run)
    watch.start()
    with caplog.at_level(logging.WARNING, logger="mpo"):
        run.train()
    assert run.state.global_step == 3
    assert watch.stopped == "harmless prompts refused rose from 0 % to 100 % in the mean over languages"
    assert f"Stopped at step 3: {watch.stopped} (`stop_on_over_refusal: 20`)" in caplog.text
    found = watch.finish()
    assert found is not None and found.stopped == watch.stopped
    assert asked == [0, 1, 2, 3]


def test_a_run_that_refuses_no_more_than_it_did_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda number, prompt: refuses(prompt))
    run = made(model, tmp_path, probe_steps=1, stop_on_over_refusal=1.0)
    watched(run).start()
    run.train()
    assert run.state.global_step == 6


def test_the_checkpoint_to_keep_is_chosen_by_the_balanced_share(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the probes at steps 0, 2, 4 and 6 the third is the only one that tells harm from harmless.
    scripted(monkeypatch, lambda number, prompt: (is_safe if number == 2 else refuses)(prompt))
    run = made(
        model,
        tmp_path,
        **KEEPS_BEST,
    )
    watch = watched(run)
    watch.start()
    run.train()
    assert run.args.greater_is_better
    assert run.state.best_metric == 1.0
    assert str(run.state.best_model_checkpoint).endswith("checkpoint-4")
    assert probed_steps(run) == [0, 2, 4, 6]


def test_the_step_at_which_a_run_is_stopped_is_evaluated_and_saved_as_its_last_would_be(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, lambda number, prompt: (refuses if number > 2 else is_safe)(prompt))
    run = made(
        model,
        tmp_path,
        probe_steps=1,
        stop_on_over_refusal=20.0,
        **{**KEEPS_BEST, "eval_steps": 5, "save_steps": 5},
    )
    watched(run).start()
    run.train()
    assert run.state.global_step == 3 and run.state.max_steps == 6
    assert [log["step"] for log in run.state.log_history if "eval_loss" in log] == [3]
    assert str(run.state.best_model_checkpoint).endswith("checkpoint-3")


@pytest.mark.parametrize(
    ("settings", "needing"),
    [
        ({"metric_for_best_model": "probe_balanced"}, "`metric_for_best_model` needs"),
        ({"probe_steps": 1}, "`probe_steps` needs"),
        ({"probe_steps": 1, "stop_on_over_refusal": 1.0}, "`probe_steps` and `stop_on_over_refusal` need"),
    ],
)
def test_what_needs_the_callback_is_refused_without_it_before_training(
    model: Path, tmp_path: Path, settings: dict[str, Any], needing: str
) -> None:
    run = made(model, tmp_path, **settings)
    with pytest.raises(ConfigError, match=rf"{needing} answers .*add_callback\(ProbeWatch\(trainer\)\)"):
        run.train()
    assert run.state.global_step == 0


def test_a_resumed_run_that_can_be_stopped_is_asked_before_it_goes_on(model: Path, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3, "probe_steps": 6, "stop_on_over_refusal": 100.0}
    first = made(model, tmp_path, **settings)
    watched(first)
    first.train()
    again = made(model, tmp_path, **settings)
    watched(again)
    with pytest.raises(ConfigError, match=r"before `trainer.train\(\)`: `watch.start\(\)`"):
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))


# ---- Failures --------------------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    def says(number: int, prompt: Any) -> str:
        if number in numbers:
            raise RuntimeError("the answers are gone")
        return is_safe(prompt)

    scripted(monkeypatch, says)


def test_a_probe_that_fails_is_a_warning_and_the_run_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing(monkeypatch, 2)
    run = made(model, tmp_path, probe_steps=2, stop_on_over_refusal=10.0)
    watch = watched(run)
    watch.start()
    with caplog.at_level(logging.WARNING, logger="mpo"):
        run.train()
    assert run.state.global_step == 6
    assert probed_steps(run) == [0, 2, 6]
    assert (
        "at step 4 failed, and the run goes on without it: RuntimeError: the answers are gone" in caplog.text
    )
    assert watch.finish() is not None


@pytest.mark.parametrize("number", [0, 1])
def test_without_a_start_or_an_end_there_is_no_change_and_no_crash(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing(monkeypatch, number)
    run = made(model, tmp_path)
    watch = watched(run)
    watch.start()
    run.train()
    assert watch.finish() is None
    assert watch.failure == "RuntimeError: the answers are gone"


@pytest.mark.parametrize("why", ["the probe failed", "no answer has a verdict"])
def test_a_run_whose_start_is_not_known_says_that_it_will_not_be_stopped(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    if why == "the probe failed":
        failing(monkeypatch, 0)
    else:
        scripted(monkeypatch, lambda number, prompt: "<think>")
    run = made(model, tmp_path, probe_steps=6, stop_on_over_refusal=10.0)
    watched(run).start()
    with caplog.at_level(logging.WARNING, logger="mpo"):
        run.train()
    assert run.state.global_step == 6
    assert "`stop_on_over_refusal` is off: it is not known how many harmless prompts" in caplog.text


def test_a_run_in_which_no_checkpoint_could_be_chosen_says_so_at_its_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing(monkeypatch, 1, 2, 3)
    run = made(model, tmp_path, **KEEPS_BEST)
    watched(run).start()
    with caplog.at_level(logging.WARNING, logger="mpo"):
        run.train()
    assert run.state.best_model_checkpoint is None
    assert caplog.messages[-1] == (
        "No checkpoint could be chosen (`load_best_model_at_end`): no evaluation has given `eval_probe_balanced`. The model "
        "has the weights of its last step, 6."
    )


def test_a_probe_that_fails_is_not_the_best_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, 1)
    run = made(model, tmp_path, metric_for_best_model="probe_balanced")
    watch = watched(run)
    watch.start()
    metrics: dict[str, float] = {}
    run.is_in_train = True
    watch.on_evaluate(run.args, run.state, run.control, metrics)
    assert math.isnan(metrics["eval_probe_balanced"])
    assert not run._determine_best_metric(metrics, None)


# ---- What is asked ---------------------------------------------------------------------------------------------------


def test_what_is_trained_is_asked_with_the_source_language(tmp_path: Path) -> None:
    prompts = prompts_of(config(tmp_path, source_language="zh", behavior_probe=2), ["jv", "bn"])
    assert prompts is not None
    assert prompts.languages == ["zh", "bn"] and prompts.left_out == ("jv",)
    other = prompts_of(config(tmp_path, probe_languages=["Deutsch", "bn"]), ["sw"])
    assert other is not None and other.languages == ["bn", "de"] and other.left_out == ("en", "sw")
    assert prompts_of(config(tmp_path, behavior_probe=0), ["bn"]) is None
    with pytest.raises(ConfigError, match=r"names jv, which the probe set does not have. It has en, zh"):
        prompts_of(config(tmp_path, probe_languages=["en", "jv"]), ["bn"])
    assert language_name("jv") == "Javanese"


def test_what_needs_answers_is_refused_where_no_language_can_be_asked(tmp_path: Path) -> None:
    assert prompts_of(config(tmp_path, source_language="jv"), ["su"]) is None
    stopped = config(tmp_path, source_language="jv", probe_steps=1, stop_on_over_refusal=1.0)
    with pytest.raises(
        ConfigError,
        match=r"`stop_on_over_refusal` need answers .* in Javanese and Sundanese\. `probe_languages: \[en\]`",
    ):
        prompts_of(stopped, ["su"])
