from __future__ import annotations

import io
import logging
import math
import re

import pytest
from transformers import TrainerControl, TrainerState

from mpo.common.progress import CountProgress, quiet_libraries
from mpo.common.words import duration
from mpo.training.config import MPOConfig
from mpo.training.progress import TrainingProgress


@pytest.fixture
def args(tmp_path) -> MPOConfig:
    return MPOConfig(output_dir=str(tmp_path), use_cpu=True)


def run(progress: TrainingProgress, args: MPOConfig, steps: int, start: int = 0, main: bool = True) -> None:
    state = TrainerState(max_steps=steps, global_step=start, is_world_process_zero=main)
    control = TrainerControl()
    progress.on_train_begin(args, state, control)
    for step in range(start + 1, steps + 1):
        state.global_step = step
        progress.on_step_end(args, state, control)
        logs = {
            "loss": 1 / step,
            "loss/reward_gap": 0.5 / step,
            "loss/retention": 0.25,
            "pairs_per_second": 12.5,
        }
        progress.on_log(args, state, control, logs=logs)
    progress.on_log(args, state, control, logs={"eval_loss": 0.125})
    progress.on_log(args, state, control, logs={"train_runtime": 3.0})
    progress.on_train_end(args, state, control)


def test_without_a_terminal_every_tenth_of_the_steps_is_a_line(args: MPOConfig) -> None:
    stream = io.StringIO()
    run(TrainingProgress(stream), args, steps=100)
    lines = [line for line in stream.getvalue().splitlines() if "(gap" in line]
    steps = [re.fullmatch(r"\d\d:\d\d:\d\d Step (\d+)/100: .*", line) for line in lines]
    assert [int(found[1]) for found in steps if found] == list(range(10, 101, 10))
    assert "loss 0.0500 (gap 0.0250, retain 0.2500), 12.5 pairs/s, 0 s left" in lines[1].replace("\n", "")
    assert not lines[-1].endswith("left")
    assert "{" not in stream.getvalue()


def test_a_resumed_run_does_not_repeat_the_lines_before(args: MPOConfig) -> None:
    stream = io.StringIO()
    run(TrainingProgress(stream), args, steps=10, start=7)
    assert [line[len("12:00:00 ") :].split(":")[0] for line in stream.getvalue().splitlines()][:3] == [
        "Step 8/10",
        "Step 9/10",
        "Step 10/10",
    ]


def test_on_a_terminal_there_is_one_bar_with_the_loss_and_its_terms(
    args: MPOConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    run(TrainingProgress(stream, bar=True), args, steps=20)
    text = stream.getvalue()
    assert "Training 100%" in text and "20/20" in text
    assert "loss 0.0500 (gap 0.0250, retain 0.2500), 12.5 pairs/s" in text
    assert "Step 20: held-out loss 0.1250" in text
    assert "{" not in text


@pytest.mark.parametrize(
    ("gaps", "text"),
    [
        ({"bn": 0.25, "en": 0.8, "sw": -0.125}, "held-out loss 0.5000, gap en +0.80, bn +0.25, sw -0.12"),
        ({"bn": math.nan, "sw": 0.5}, "held-out loss 0.5000, gap sw +0.50"),
        (
            {"en": 0.8, **{f"x{n}": n / 10 for n in range(1, 10)}},
            "held-out loss 0.5000, gap en +0.80, mean of 9 others +0.50, least x1 +0.10",
        ),
        ({}, "held-out loss 0.5000"),
    ],
)
def test_an_evaluation_is_a_line_with_the_gap_of_each_language_or_of_many_the_least(
    args: MPOConfig, gaps: dict[str, float], text: str
) -> None:
    stream = io.StringIO()
    state = TrainerState(max_steps=9, global_step=3, is_world_process_zero=True)
    logs = {"eval_loss": 0.5, **{f"eval_reward_gap/{code}": gap for code, gap in gaps.items()}}
    TrainingProgress(stream).on_log(args, state, TrainerControl(), logs=logs)
    assert stream.getvalue()[len("12:00:00 ") :] == f"Step 3: {text}\n"


@pytest.mark.parametrize(
    ("logged", "words"),
    [
        (
            {
                "greedy/chosen/bn": 0.5,
                "greedy/chosen/en": 0.75,
                "harmless/greedy/rejected/bn": 0.01,
                "harmless/greedy/rejected/en": 0.004,
                "greedy/rejected/bn": 0.9,
                "harmless/greedy/chosen/bn": 0.9,
            },
            ", refused 62 % of harmful, 0.7 % of harmless",
        ),
        ({"greedy/chosen/bn": 0.0, "harmless/greedy/rejected/sw": 0.05}, ", refused 0 % of harmful, 5 % of harmless"),
        ({"greedy/chosen/bn": 0.0, "harmless/greedy/rejected/bn": 0.0}, ""),  # long answers are preferred
        ({"greedy/chosen/bn": 0.5}, ""),  # nothing is harmless
        ({"greedy/chosen/bn": math.nan, "harmless/greedy/rejected/bn": 0.25}, ""),
    ],
)  # fmt: skip
def test_a_line_says_of_how_many_of_either_kind_the_taught_refusal_is_said(
    args: MPOConfig, logged: dict[str, float], words: str
) -> None:
    stream = io.StringIO()
    state = TrainerState(max_steps=10, global_step=1, is_world_process_zero=True)
    logs = {"loss": 0.5, "pairs_per_second": 2.0, **logged}
    TrainingProgress(stream).on_log(args, state, TrainerControl(), logs=logs)
    assert re.search(r"loss 0\.5000(.*), 2 pairs/s", stream.getvalue())[1] == words


def test_other_ranks_show_nothing(args: MPOConfig) -> None:
    for bar in (True, False):
        stream = io.StringIO()
        run(TrainingProgress(stream, bar=bar), args, steps=20, main=False)
        assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_our_warnings_are_shown_and_those_of_libraries_are_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MPO_DEBUG", raising=False)
    quiet_libraries()
    logging.getLogger("trl.trainer.dpo_trainer").warning("of no concern")
    logging.getLogger("mpo.training.trainer").warning("[RANK 0] the chosen answers become unlikely")
    captured = capsys.readouterr()
    assert captured.err == "Warning: the chosen answers become unlikely\n"


def test_deepspeed_is_quiet_although_it_sets_its_own_level_when_it_is_imported(caplog):
    quiet_libraries()
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addHandler(caplog.handler)
    logger.warning("chatter")
    logger.error("trouble")
    logger.removeHandler(caplog.handler)
    messages = [record.getMessage() for record in caplog.records]
    assert "trouble" in messages and "chatter" not in messages


def test_counts_are_lines_off_a_terminal_and_the_last_is_always_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("mpo.common.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with CountProgress("Answering", 23, done=3, unit="prompt", stream=stream) as progress:
        for _ in range(20):
            progress.advance()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Answering: 6/23 prompts, 34 s left"
    assert lines[-1] == "Answering: 23/23 prompts"
    assert 3 <= len(lines) <= 10


@pytest.mark.parametrize(("seconds", "says"), [(0.2, False), (2.0, True)])
def test_of_what_is_brief_nothing_is_said_unless_it_takes_long(
    seconds: float, says: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(seconds * tick for tick in range(1000))
    monkeypatch.setattr("mpo.common.progress.time.monotonic", lambda: next(times))
    stream = io.StringIO()
    with CountProgress("Reference pass", 10, unit="call", brief=True, stream=stream) as progress:
        for _ in range(10):
            progress.advance()
    lines = stream.getvalue().splitlines()
    assert bool(lines) == says
    if says:
        assert lines[-1] == "Reference pass: 10/10 calls" and len(lines) < 6
