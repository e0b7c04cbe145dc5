"""A run that is resumed ends as the unbroken one, bit for bit, wherever it was killed.

Dropout is on and gradients are accumulated, so that the state of the random numbers and the place within the epoch
both count. Seven groups in micro-batches of one and accumulation of two give four steps per epoch, the last a short one.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback

from mpo.errors import ConfigError, MPOError, StoppedBySignal, StorageError
from mpo.training import checkpoints, reference
from mpo.training import trainer as trainer_module
from mpo.training.checkpoints import MARKER, is_complete, last_complete_checkpoint, mark_complete, saved_state
from mpo.training.config import MPOConfig
from mpo.training.resume import check_resumable, no_step_is_left
from mpo.training.run_settings import check_settings, saved_settings
from mpo.training.stopping import SIGNALS, StopSignals
from mpo.training.trainer import MPOTrainer
from tests import processes, runs
from tests.tiny import build_model, random_groups, save_tiny

KINDS = ("lora", "full")
STEPS = 8


@lru_cache
def rows() -> list[dict[str, Any]]:
    return random_groups(4, 7, (1, 3), words=(1, 5))


def trainer(model: Any, folder: Path, kind: str, **settings: Any) -> MPOTrainer:
    """The run of this file, saved at every step."""
    defaults: dict[str, Any] = {
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "disable_dropout": False,
    }
    if kind == "full":
        defaults["model_init_kwargs"] = {"attention_dropout": 0.2}
    else:
        defaults["peft_config"] = runs.lora(lora_dropout=0.2)
    return runs.trainer(model, folder, **{"rows": rows(), **defaults, **settings})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


class Unbroken:
    """An unbroken run with all its checkpoints, and the weights it ended with."""

    def __init__(self, model: Path, folder: Path, kind: str) -> None:
        self.folder = folder
        run = trainer(model, folder, kind)
        run.train()
        assert run.state.global_step == STEPS
        self.weights = runs.weights(run.model)
        self.losses = [log["loss"] for log in run.state.log_history if "loss" in log]

    def copy(self, folder: Path, steps: int) -> Path:
        """A run's folder as it was after some steps; the copy shares nothing with this one."""
        shutil.copytree(self.folder / "reference", folder / "reference")
        for step in range(1, steps + 1):
            name = f"checkpoint-{step}"
            shutil.copytree(self.folder / "out" / name, folder / "out" / name)
        return folder


@pytest.fixture(scope="module")
def unbroken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Unbroken]:
    return {kind: Unbroken(model, tmp_path_factory.mktemp(f"unbroken-{kind}"), kind) for kind in KINDS}


def resumed(model: Path, folder: Path, kind: str, resume: Any = "auto", **settings: Any) -> dict[str, Tensor]:
    run = trainer(model, folder, kind, **settings)
    run.train(resume_from_checkpoint=resume)
    assert run.state.global_step == STEPS
    return runs.weights(run.model)


# ---- In the middle of an epoch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 3, 4, 6, 7])
def test_a_resumed_run_ends_with_the_same_weights(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path, kind: str, step: int
) -> None:
    folder = unbroken[kind].copy(tmp_path, step)
    run = trainer(model, folder, kind)
    run.train(resume_from_checkpoint=True)
    assert runs.differing(runs.weights(run.model), unbroken[kind].weights) == []
    losses = [log["loss"] for log in run.state.log_history if "loss" in log]
    assert losses == unbroken[kind].losses


def saved_by_two_ranks(marker: str) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(marker)["state"]
    assert state["ranks"] == 1
    return {**state, "ranks": 2}


def test_a_run_with_a_token_budget_resumes_in_the_middle_of_an_epoch(model: Path, tmp_path: Path) -> None:
    settings = {"max_tokens_per_batch": 150, "gradient_accumulation_steps": 1}
    whole = trainer(model, tmp_path / "whole", "lora", **settings)
    whole.train()
    steps = whole.state.global_step
    assert steps % 2 == 0 and steps // 2 >= 3, "two epochs of as many steps"
    folder = tmp_path / "resumed"
    name = f"checkpoint-{steps // 2 + 1}"
    shutil.copytree(tmp_path / "whole" / "out" / name, folder / "out" / name)
    with pytest.raises(ConfigError, match="max_tokens_per_batch: 150 then, 160 now"):
        trainer(model, folder, "lora", **{**settings, "max_tokens_per_batch": 160}).resolve_checkpoint(True)
    # As many groups in a step as two ranks would have, but not the same ones: batches are made for a number of ranks.
    marker = folder / "out" / name / "complete.json"
    written = marker.read_text()
    marker.write_text(json.dumps({**json.loads(written), "state": saved_by_two_ranks(written)}))
    twice = {**settings, "gradient_accumulation_steps": 2}
    with pytest.raises(ConfigError, match="ranks: 2 then, 1 now"):
        trainer(model, folder, "lora", **twice).resolve_checkpoint(True)
    marker.write_text(written)
    again = trainer(model, folder, "lora", **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps
    assert runs.differing(runs.weights(again.model), runs.weights(whole.model)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_random_state_is_part_of_what_is_resumed(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path, kind: str
) -> None:
    # Were it not, the tests above would pass without any dropout.
    folder = unbroken[kind].copy(tmp_path, 3)
    checkpoint = folder / "out" / "checkpoint-3"
    state = torch.load(checkpoint / "rng_state.pth", weights_only=False)
    state["cpu"] = torch.random.manual_seed(99).get_state()
    torch.save(state, checkpoint / "rng_state.pth")
    mark_complete(checkpoint, saved_state(checkpoint))
    assert runs.differing(resumed(model, folder, kind), unbroken[kind].weights) != []


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_over_the_sources_does_not_change_the_run_that_follows(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path, kind: str
) -> None:
    # The unbroken run made its reference; this one reads it.
    shutil.copytree(unbroken[kind].folder / "reference", tmp_path / "reference")
    assert runs.differing(resumed(model, tmp_path, kind, None), unbroken[kind].weights) == []


@pytest.mark.parametrize("resume", ["auto", True, "folder", Path("folder")])
def test_a_checkpoint_can_be_asked_for_in_every_way(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path, resume: Any
) -> None:
    folder = unbroken["lora"].copy(tmp_path, 6)
    if resume in ("folder", Path("folder")):
        resume = type(resume)(folder / "out" / "checkpoint-6")
    assert runs.differing(resumed(model, folder, "lora", resume), unbroken["lora"].weights) == []


def test_auto_is_a_fresh_start_where_there_is_no_checkpoint(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path
) -> None:
    assert runs.differing(resumed(model, tmp_path, "lora"), unbroken["lora"].weights) == []


def test_a_finished_run_that_is_resumed_stays_as_it_is(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path
) -> None:
    folder = unbroken["lora"].copy(tmp_path, STEPS)
    assert runs.differing(resumed(model, folder, "lora"), unbroken["lora"].weights) == []


def test_no_step_is_taken_beyond_the_last_one_in_the_middle_of_an_epoch(model: Path, tmp_path: Path) -> None:
    whole = trainer(model, tmp_path, "lora", max_steps=6)
    whole.train()
    weights, saved = runs.weights(whole.model), sorted((tmp_path / "out").iterdir())
    settings: list[dict[str, Any]] = [
        {},
        {"ignore_data_skip": True},
        {"max_steps": 5, "resume_changes": ["max_steps"]},
    ]
    for changed in settings:
        run = trainer(model, tmp_path, "lora", **{"max_steps": 6, **changed})
        output = run.train(resume_from_checkpoint="auto")
        assert output.global_step == run.state.global_step == 6 and output.training_loss == 0
        assert runs.differing(runs.weights(run.model), weights) == []
        assert sorted((tmp_path / "out").iterdir()) == saved
    longer = trainer(model, tmp_path, "lora", max_steps=7, resume_changes=["max_steps"])
    longer.train(resume_from_checkpoint="auto")
    assert longer.state.global_step == 7 and runs.differing(runs.weights(longer.model), weights)


@pytest.mark.parametrize(
    ("settings", "planned", "ended"),
    [
        ({}, 6, True),
        ({}, 7, False),
        ({"min_source_gap": 0.1}, 7, True),  # sources that were left out have made the run shorter
        ({"min_source_gap": 0.1, "num_train_epochs": 3}, 7, False),
        ({"min_source_gap": 0.1, "ignore_data_skip": True}, 7, False),
        ({"min_source_gap": 0.1, "max_steps": 7}, 7, False),
    ],
)
def test_a_checkpoint_of_the_last_step_is_known(
    tmp_path: Path, settings: dict[str, Any], planned: int, ended: bool
) -> None:
    (tmp_path / "trainer_state.json").write_text('{"global_step": 6, "max_steps": 6}')
    mark_complete(tmp_path, {"settings": {"num_train_epochs": 2}})
    args = MPOConfig(output_dir=str(tmp_path), use_cpu=True, **{"num_train_epochs": 2, **settings})
    assert no_step_is_left(tmp_path, args, planned) == ended


def test_workers_that_load_the_data_change_nothing(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path
) -> None:
    folder = unbroken["lora"].copy(tmp_path, 5)
    weights = resumed(model, folder, "lora", dataloader_num_workers=1)
    assert runs.differing(weights, unbroken["lora"].weights) == []


def test_the_groups_of_two_epochs_come_in_two_orders(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    original = trainer_module.run_model

    def watch(forward: Any, batch: dict[str, Any], **kwargs: Any) -> Any:
        seen.append(batch["groups"])
        return original(forward, batch, **kwargs)

    monkeypatch.setattr(trainer_module, "run_model", watch)
    trainer(model, tmp_path, "lora", save_strategy="no").train()
    first, second = [g for batch in seen[:7] for g in batch], [g for batch in seen[7:] for g in batch]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second and first != sorted(first)


# ---- Killed ------------------------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_in_file(module: Any, name: str, position: int, wanted: str = "") -> None:
    """Have a function that writes a file (its argument ``position``) die half-way, the third time."""
    original = getattr(module, name)
    calls = 0

    def write(*arguments: Any, **kwargs: Any) -> Any:
        nonlocal calls
        path = arguments[position] if len(arguments) > position else kwargs["filename"]
        if not str(path).endswith(wanted):
            return original(*arguments, **kwargs)
        calls += 1
        result = original(*arguments, **kwargs)
        if calls == 3:
            os.truncate(path, os.path.getsize(path) // 2)
            die()
        return result

    setattr(module, name, write)


def run_and_die(model: Path, folder: Path, kind: str, where: str, settings: dict[str, Any]) -> None:
    """The run of this file, in a process of its own, killed from inside while it saves its third checkpoint."""
    import peft.peft_model
    import transformers.modeling_utils

    count = 0

    def third(action: Any, meant: Any = lambda *_: True, before: Any = lambda *_: None) -> Any:
        """The action, but the third call that is meant dies instead."""

        def wrapped(*arguments: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += meant(*arguments)
            if count == 3:
                before(*arguments)
                die()
            return action(*arguments, **kwargs)

        return wrapped

    if where == "the model file":
        module = peft.peft_model if kind == "lora" else transformers.modeling_utils
        _kill_in_file(module, "safe_save_file", 1)
    elif where == "the optimizer file":
        _kill_in_file(torch, "save", 1, "optimizer.pt")
    elif where == "the random state":
        _kill_in_file(torch, "save", 1, "rng_state.pth")
    elif where == "before the marker":
        checkpoints.mark_complete = third(checkpoints.mark_complete)
    elif where == "in the marker":
        os.replace = third(os.replace, lambda _, target: Path(target).name == MARKER)
    elif where == "in rotation":
        # The first save has nothing to rotate, so this is the fourth.
        shutil.rmtree = third(
            shutil.rmtree,
            lambda path: Path(path).name.startswith("checkpoint-"),
            lambda path: os.unlink(Path(path) / "optimizer.pt"),
        )
    elif where == "in the reference pass":
        reference._complete = lambda *_: die()  # type: ignore[assignment]
    trainer(model, folder, kind, **settings).train()


# Where the run dies, and the last checkpoint it leaves.
DEATHS = {
    "the model file": 2,
    "the optimizer file": 2,
    "the random state": 2,
    "before the marker": 2,
    "in the marker": 2,
    "in rotation": 4,
    "in the reference pass": None,
}


@pytest.mark.parametrize(
    ("kind", "where"),
    [*(("lora", where) for where in DEATHS), ("full", "the model file"), ("full", "in the reference pass")],
)
def test_a_run_killed_while_it_writes_resumes_and_ends_with_the_same_weights(
    model: Path,
    unbroken: dict[str, Unbroken],
    tmp_path: Path,
    kind: str,
    where: str,
) -> None:
    settings = {"save_total_limit": 1}
    process = processes.start(run_and_die, model, tmp_path, kind, where, settings)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    left, out = DEATHS[where], tmp_path / "out"
    if left is None:
        assert list((tmp_path / "reference").iterdir()) != []
        assert last_complete_checkpoint(out) is None
    else:
        assert last_complete_checkpoint(out) == out / f"checkpoint-{left}"
        half = out / ("checkpoint-3" if where == "in rotation" else f"checkpoint-{left + 1}")
        assert half.is_dir() and not is_complete(half), "the kill was meant to leave half a checkpoint"
    weights = resumed(model, tmp_path, kind, **settings)
    assert runs.differing(weights, unbroken[kind].weights) == []
    assert [path.name for path in checkpoints.checkpoints(out)] == [f"checkpoint-{STEPS}"]


@pytest.mark.parametrize("attempt", range(3))
def test_a_run_killed_at_any_moment_resumes_and_ends_with_the_same_weights(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path, attempt: int
) -> None:
    shutil.copytree(unbroken["lora"].folder / "reference", tmp_path / "reference")
    process = processes.start(run_and_die, model, tmp_path, "lora", "from outside", {"save_total_limit": 2})
    out = tmp_path / "out"
    deadline = time.monotonic() + 120
    while not (out / "checkpoint-1" / MARKER).exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    delay = random.uniform(0.0, 0.5)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    left = [path.name for path in checkpoints.checkpoints(out)]
    assert last_complete_checkpoint(out) is not None, f"killed after {delay:.3f} s, left {left}"
    weights = resumed(model, tmp_path, "lora", save_total_limit=2)
    assert runs.differing(weights, unbroken["lora"].weights) == [], f"killed after {delay:.3f} s, left {left}"


# ---- Told to end -------------------------------------------------------------------------------------------------


class SignalAt(TrainerCallback):
    """Sends this process a signal in a step, as a scheduler would."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "step", "settings"),
    [
        (signal.SIGTERM, 3, {}),
        (signal.SIGINT, 6, {"save_steps": 100}),
        (signal.SIGUSR1, 2, {"save_strategy": "epoch"}),
        (signal.SIGTERM, 4, {"save_strategy": "no", "enable_jit_checkpoint": True}),  # the end of an epoch
        (signal.SIGTERM, 5, {"save_strategy": "epoch", "eval_strategy": "epoch", "eval_dataset": "rows"}),
        (signal.SIGTERM, 7, {"save_steps": 2, "save_total_limit": 1, "enable_jit_checkpoint": True}),
    ],
)
def test_a_signal_ends_the_run_after_its_step_and_it_resumes_as_if_it_had_not(
    model: Path,
    unbroken: dict[str, Unbroken],
    tmp_path: Path,
    number: int,
    step: int,
    settings: dict[str, Any],
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    expected = unbroken["lora"].weights
    if "eval_dataset" in settings:  # an evaluation between the steps is part of the run
        settings = {**settings, "eval_dataset": random_groups(9, 2, (1, 2), words=(1, 4))}
        whole = trainer(model, tmp_path / "whole", "lora", **settings)
        whole.train()
        expected = runs.weights(whole.model)
    run = trainer(model, tmp_path, "lora", callbacks=[SignalAt(step, number)], **settings)
    with pytest.raises(StoppedBySignal) as stop:
        run.train()
    assert stop.value.exit_code == 128 + number
    assert run.state.global_step == step, "the step under way is finished, and no other begun"
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert last_complete_checkpoint(tmp_path / "out") == tmp_path / "out" / f"checkpoint-{step}"
    assert not any("train_runtime" in log for log in run.state.log_history)
    evaluated = [log["epoch"] for log in run.state.log_history if "eval_loss" in log]
    assert evaluated == ([1.0] if "eval_strategy" in settings else [])
    again = trainer(model, tmp_path, "lora", **settings)
    again.train(resume_from_checkpoint=True)
    assert runs.differing(runs.weights(again.model), expected) == []
    assert [log["step"] for log in again.state.log_history if "loss" in log] == list(range(1, STEPS + 1))


def test_the_checkpoint_at_the_end_of_an_epoch_knows_of_its_evaluation(model: Path, tmp_path: Path) -> None:
    settings = {
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "eval_dataset": random_groups(9, 2, (1, 2), words=(1, 4)),
        "load_best_model_at_end": True,
        "save_total_limit": 1,
    }
    run = trainer(model, tmp_path, "lora", callbacks=[SignalAt(4, signal.SIGTERM)], **settings)
    with pytest.raises(StoppedBySignal):
        run.train()
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"] if "eval_loss" in log] == [4]
    assert state["best_model_checkpoint"] == str(tmp_path / "out" / "checkpoint-4")


def test_the_last_checkpoint_stays_beside_the_best_one(model: Path, tmp_path: Path) -> None:
    run = trainer(
        model,
        tmp_path,
        "lora",
        callbacks=[SignalAt(6, signal.SIGTERM)],
        eval_dataset=random_groups(9, 2, (1, 2), words=(1, 4)),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        save_total_limit=1,
    )
    score = run.evaluate
    values = iter(range(100))  # the first is the best
    run.evaluate = lambda *_, **__: {**score(), "eval_loss": float(next(values))}  # type: ignore[method-assign]
    with pytest.raises(StoppedBySignal):
        run.train()
    saved = [path.name for path in checkpoints.checkpoints(tmp_path / "out")]
    assert saved == ["checkpoint-1", "checkpoint-6"]


def test_without_checkpoints_a_signal_does_what_it_always_did(model: Path, tmp_path: Path) -> None:
    run = trainer(model, tmp_path, "lora", save_strategy="no", callbacks=[SignalAt(2, signal.SIGINT)])
    with pytest.raises(KeyboardInterrupt) as stop:
        run.train()
    assert not isinstance(stop.value, StoppedBySignal)
    assert run.state.global_step == 1


def test_what_someone_else_does_at_a_signal_stays(model: Path, tmp_path: Path) -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("their own"))
    try:
        trainer(model, tmp_path, "lora", callbacks=[SignalAt(2, signal.SIGTERM)], max_steps=3).train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["their own"]


def test_a_second_press_ends_the_run_at_once_but_not_the_launchers_echo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("mpo.training.stopping.time.monotonic", lambda: now[0])
    with StopSignals(keep=True) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] = 0.5
        os.kill(os.getpid(), signal.SIGINT)
        now[0] = 5.0
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked == signal.SIGINT
        with pytest.raises(StoppedBySignal):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_one_rank_receives_ends_all_of_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(model, tmp_path, "lora")
    monkeypatch.setattr(Accelerator, "num_processes", 2)

    def with_the_other(flags: Tensor, op: Any) -> None:
        flags.copy_(torch.minimum(flags, torch.tensor([1.0, 1.0, -float(signal.SIGTERM)])))

    monkeypatch.setattr(torch.distributed, "all_reduce", with_the_other)
    assert run._finite.not_finite(torch.tensor(1.0)) is None
    assert run._finite.stopped_by == signal.SIGTERM and run._signals.asked == 0


# ---- The reference -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_deleted_reference_is_computed_again_from_the_starting_weights(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path, kind: str
) -> None:
    folder = unbroken[kind].copy(tmp_path, 3)
    shutil.rmtree(folder / "reference")
    assert runs.differing(resumed(model, folder, kind), unbroken[kind].weights) == []
    assert any((folder / "reference").iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_of_the_trained_weights_would_have_been_another(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path, kind: str
) -> None:
    run = trainer(model, unbroken[kind].copy(tmp_path, STEPS), kind, eval_dataset=rows())
    run.train(resume_from_checkpoint="auto")
    sources = [record for record in run.score().records if record.is_source]
    assert max(abs(record.gap - record.reference_gap) for record in sources) > 1e-2


def test_the_reference_of_an_adapter_that_is_trained_further_is_that_adapter_as_it_was(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path
) -> None:
    adapter = unbroken["lora"].folder / "out" / "checkpoint-3"

    def further(folder: Path, **settings: Any) -> MPOTrainer:
        policy = PeftModel.from_pretrained(build_model("llama"), adapter, is_trainable=True)
        tokenizer = AutoTokenizer.from_pretrained(model)
        return trainer(policy, folder, "lora", peft_config=None, processing_class=tokenizer, **settings)

    whole = further(tmp_path / "whole")
    whole.train()
    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "out" / "checkpoint-3", folder / "out" / "checkpoint-3")
    again = further(folder)
    again.train(resume_from_checkpoint="auto")
    assert runs.differing(runs.weights(again.model), runs.weights(whole.model)) == []


# ---- Refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("seed", {"seed": 4}),
        ("seed", {"data_seed": 4}),
        ("gradient_accumulation_steps", {"gradient_accumulation_steps": 1}),
        ("micro_batch", {"per_device_train_batch_size": 2}),
        ("groups", {"rows": random_groups(4, 6, (1, 3), words=(1, 5))}),
        ("groups", {"group_by_source": False}),
        ("min_source_gap", {"min_source_gap": -9.0}),
    ],
)
def test_another_order_of_the_data_is_refused_by_name(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    run = trainer(model, unbroken["lora"].copy(tmp_path, 3), "lora", **settings)
    before = runs.weights(run.model)
    with pytest.raises(ConfigError, match=name) as error:
        run.train(resume_from_checkpoint="auto")
    assert "ignore_data_skip" in str(error.value) and "checkpoint-3" in str(error.value)
    assert runs.differing(before, runs.weights(run.model)) == []


def test_other_data_of_the_same_size_is_refused(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path
) -> None:
    other = random_groups(5, 7, (1, 3), words=(1, 5))
    with pytest.raises(ConfigError):
        resumed(model, unbroken["lora"].copy(tmp_path, 3), "lora", rows=other)


def test_dropping_the_last_groups_is_another_order(model: Path, tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_steps": 3}
    trainer(model, tmp_path, "lora", **settings).train()
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    with pytest.raises(ConfigError, match="drop_last"):
        trainer(model, tmp_path, "lora", dataloader_drop_last=True, **settings).train(
            resume_from_checkpoint="auto"
        )


SAME_STEPS = {
    "ranks": 2,
    "gradient_accumulation_steps": 1,
}  # the run of this file accumulates two on one rank


@pytest.mark.parametrize(
    ("settings", "saved", "message"),
    [
        ({}, SAME_STEPS, None),
        ({}, {"ranks": 2}, "ranks: 2 then, 1 now"),
        # The groups of a step's last micro-batches, or of any, depend on the number of ranks.
        ({"dataloader_drop_last": True}, SAME_STEPS, "ranks: 2 then, 1 now"),
        ({"max_tokens_per_batch": 400}, SAME_STEPS, "ranks: 2 then, 1 now"),
        ({"ignore_data_skip": True}, {"ranks": 2}, None),
        ({"ignore_data_skip": True}, {"form": "ZeRO-2 on 2 ranks"}, "ZeRO-2 on 2 ranks needs them"),
    ],
)
def test_another_number_of_ranks_goes_on_where_every_step_has_the_same_groups(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    saved: dict[str, Any],
    message: str | None,
) -> None:
    run = trainer(model, tmp_path, "lora", **settings)
    now = run._run.state()
    monkeypatch.setattr("mpo.training.resume.saved_state", lambda _: {**now, **saved})
    skips = not run.args.ignore_data_skip
    if message is None:
        check_resumable("checkpoint-3", now, trains_adapter=True, skips_seen_groups=skips)
    else:
        with pytest.raises(ConfigError, match=message):
            check_resumable("checkpoint-3", now, trains_adapter=True, skips_seen_groups=skips)


def test_another_order_is_accepted_when_the_epoch_begins_anew(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path
) -> None:
    run = trainer(model, unbroken["lora"].copy(tmp_path, 3), "lora", data_seed=4, ignore_data_skip=True)
    run.train(resume_from_checkpoint="auto")
    assert run.state.global_step == STEPS


def test_resuming_without_any_complete_checkpoint_is_an_error(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path
) -> None:
    folder = unbroken["lora"].copy(tmp_path, 1)
    (folder / "out" / "checkpoint-1" / "optimizer.pt").unlink()
    with pytest.raises(StorageError, match="no complete checkpoint"):
        resumed(model, folder, "lora", True)
    with pytest.raises(StorageError, match="does not exist"):
        resumed(model, folder, "lora", str(folder / "out" / "checkpoint-9"))


@pytest.mark.parametrize(
    "missing", ["optimizer.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors"]
)
def test_a_half_written_checkpoint_is_refused_also_when_it_is_named(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path, missing: str
) -> None:
    # The library would go on without an optimizer or a random state, and never say so.
    folder = unbroken["lora"].copy(tmp_path, 2)
    half = folder / "out" / "checkpoint-2"
    (half / MARKER).unlink()
    (half / missing).unlink()
    with pytest.raises(MPOError, match="complete"):
        resumed(model, folder, "lora", str(half))


# ---- Other settings ----------------------------------------------------------------------------------------------

DIFFERENT: dict[str, tuple[Any, str]] = {
    "learning_rate": (5e-3, "learning_rate: 0.01 then, 0.005 now"),
    "weight_decay": (0.3, "weight_decay: 0.0 then, 0.3 now"),
    "adam_beta2": (0.9, "adam_beta2: 0.999 then, 0.9 now"),
    "adam_epsilon": (1e-6, "adam_epsilon: 1e-08 then, 1e-06 now"),
    "lr_scheduler_type": ("cosine", 'lr_scheduler_type: "linear" then, "cosine" now'),
    "warmup_steps": (2, "warmup_steps: 0 then, 2 now"),
    "num_train_epochs": (3, "num_train_epochs: 2 then, 3 now"),
    "max_steps": (9, "max_steps: null then, 9 now"),
    "max_grad_norm": (0.1, "max_grad_norm: 1.0 then, 0.1 now"),
    "beta": (2.0, "beta: 1.0 then, 2.0 now"),
    "retain_weight": (0.5, "retain_weight: 1.0 then, 0.5 now"),
    "retain_pooling": ("last", 'retain_pooling: "mean" then, "last" now'),
    "language_weights": ("balanced", 'language_weights: null then, "balanced" now'),
    "disable_dropout": (True, "disable_dropout: false then, true now"),
    "optim": ("adafactor", 'optim: "adamw_torch_fused" then, "adafactor" now'),
    "peft_config": (runs.lora(lora_dropout=0.2, lora_alpha=64), "lora_alpha: 8 then, 64 now"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_settings_are_refused_with_their_old_and_new_value(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path, name: str
) -> None:
    value, message = DIFFERENT[name]
    run = trainer(model, unbroken["lora"].copy(tmp_path, 3), "lora", **{name: value})
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        run.train(resume_from_checkpoint="auto")
    assert "checkpoint-3" in str(error.value) and run.state.global_step == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"r": 8}, "lora_r: 4 then, 8 now"),
        ({"lora_dropout": 0.1}, "lora_dropout: 0.2 then, 0.1 now"),
        ({"target_modules": ["q_proj"]}, "lora_target_modules: "),
        ({"use_rslora": True}, "use_rslora: false then, true now"),
        ({"use_dora": True}, "use_dora: false then, true now"),
    ],
)
def test_another_adapter_is_refused(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    config = runs.lora(**{"lora_dropout": 0.2, **changed})
    run = trainer(model, unbroken["lora"].copy(tmp_path, 3), "lora", peft_config=config)
    with pytest.raises(ConfigError, match=message):
        run.resolve_checkpoint("auto")


@pytest.mark.parametrize("kind", KINDS)
def test_another_base_model_of_the_same_shape_is_refused(
    unbroken: dict[str, Unbroken], tmp_path: Path, kind: str
) -> None:
    other = save_tiny("llama", tmp_path / "other", seed=9)
    run = trainer(other, unbroken[kind].copy(tmp_path, 3), kind)
    with pytest.raises(ConfigError, match=r"reference model: another.*cannot change within a run"):
        run.resolve_checkpoint("auto")


def test_all_differences_are_named_at_once(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path
) -> None:
    folder = unbroken["lora"].copy(tmp_path, 3)
    other = {"learning_rate": 1e-3, "weight_decay": 0.1, "optim": "adafactor", "max_response_length": 9}
    with pytest.raises(ConfigError) as error:
        trainer(model, folder, "lora", data_seed=4, **other).resolve_checkpoint("auto")
    text = str(error.value)
    for name in (*other, "data_seed"):
        assert f"{name}: " in text
    assert "`resume_changes: [learning_rate, weight_decay]`" in text
    assert "optim cannot change within a run" in text and "`adapter_name_or_path: " in text


@pytest.mark.parametrize(
    "settings",
    [
        {"logging_steps": 3},
        {"save_steps": 2},
        {"save_total_limit": 1},
        {"dataloader_num_workers": 1},
        {"max_tokens_per_call": 4096},
        {"max_length": 5000},
        {"resume_changes": ["learning_rate", "beta"]},
        {"stop_on_collapse": True},
        {"run_name": "another"},
    ],
)
def test_settings_that_change_no_weight_never_refuse_and_are_in_effect(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = unbroken["lora"].copy(tmp_path, 3)
    run = trainer(model, folder, "lora", **settings)
    run.train(resume_from_checkpoint="auto")
    assert runs.differing(runs.weights(run.model), unbroken["lora"].weights) == []
    assert run.resume_changes == []
    saved = [path.name for path in checkpoints.checkpoints(folder / "out")]
    if "save_steps" in settings:
        assert saved == [f"checkpoint-{step}" for step in (1, 2, 3, 4, 6, 8)]
    if "logging_steps" in settings:
        assert [log["step"] for log in run.state.log_history if "loss" in log][3:] == [6]


class ChangeAfter(TrainerCallback):
    """Changes the optimizer of an unbroken run after some steps."""

    def __init__(self, step: int, change: Callable[[Any, Any], None]) -> None:
        self.step, self.change = step, change

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.change(kwargs["optimizer"], kwargs["lr_scheduler"])


def _halve(optimizer: Any, scheduler: Any) -> None:
    scheduler.base_lrs = [rate / 2 for rate in scheduler.base_lrs]
    for group in optimizer.param_groups:
        group["lr"] /= 2


def _decay(optimizer: Any, scheduler: Any) -> None:
    assert any(group["params"] for group in optimizer.param_groups[:1])
    optimizer.param_groups[0]["weight_decay"] = 0.3


def _betas(optimizer: Any, scheduler: Any) -> None:
    for group in optimizer.param_groups:
        group["betas"] = (0.9, 0.9)


CHANGES: dict[str, tuple[Any, Callable[[Any, Any], None], str]] = {
    "learning_rate": (5e-3, _halve, "from step 3: learning_rate 0.01 → 0.005"),
    "weight_decay": (0.3, _decay, "from step 3: weight_decay 0.0 → 0.3"),
    "adam_beta2": (0.9, _betas, "from step 3: adam_beta2 0.999 → 0.9"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_is_asked_for_takes_effect_where_the_run_is_resumed(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path, name: str
) -> None:
    value, change, sentence = CHANGES[name]
    whole = trainer(model, tmp_path / "whole", "lora", callbacks=[ChangeAfter(3, change)])
    whole.train()
    assert runs.differing(runs.weights(whole.model), unbroken["lora"].weights) != []
    folder = unbroken["lora"].copy(tmp_path / "resumed", 3)
    run = trainer(model, folder, "lora", **{name: value, "resume_changes": [name]})
    run.train(resume_from_checkpoint="auto")
    assert runs.differing(runs.weights(run.model), runs.weights(whole.model)) == []
    assert run.resume_changes == [sentence]
    # What came of it is known wherever the run is resumed next; the new value is now its own.
    shutil.rmtree(folder / "out" / f"checkpoint-{STEPS}")
    again = trainer(model, folder, "lora", **{name: value})
    again.train(resume_from_checkpoint="auto")
    assert again.resume_changes == [sentence]
    assert runs.differing(runs.weights(again.model), runs.weights(whole.model)) == []
    back = trainer(model, folder, "lora")
    with pytest.raises(ConfigError, match=f"{name}: "):
        back.resolve_checkpoint("auto")


def test_a_longer_run_goes_on_along_its_own_schedule(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path
) -> None:
    folder = unbroken["lora"].copy(tmp_path, 3)
    run = trainer(model, folder, "lora", num_train_epochs=3, resume_changes=["num_train_epochs"])
    run.train(resume_from_checkpoint="auto")
    rates = [log["learning_rate"] for log in run.state.log_history if "loss" in log]
    expected = [1e-2 * (1 - step / STEPS) for step in range(3)] + [
        1e-2 * (1 - step / 12) for step in range(3, 12)
    ]
    assert rates == pytest.approx(expected)
    assert run.resume_changes == ["from step 3: num_train_epochs 2 → 3"]


def test_another_objective_that_is_asked_for_is_trained(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path
) -> None:
    folder = unbroken["lora"].copy(tmp_path, 3)
    config = runs.lora(lora_dropout=0.2, lora_alpha=16)
    changes = {"beta": 2.0, "peft_config": config, "resume_changes": ["beta", "lora_alpha"]}
    run = trainer(model, folder, "lora", **changes)
    run.train(resume_from_checkpoint="auto")
    assert set(run.resume_changes) == {"from step 3: beta 1.0 → 2.0", "from step 3: lora_alpha 8 → 16"}
    assert runs.differing(runs.weights(run.model), unbroken["lora"].weights) != []
    saved = json.loads((folder / "out" / f"checkpoint-{STEPS}" / "adapter_config.json").read_text())
    assert saved["lora_alpha"] == 16


@pytest.mark.parametrize(
    ("name", "hint"), [("lora_r", "cannot change"), ("learning_rat", "did you mean `learning_rate`")]
)
def test_only_what_can_change_may_be_named(tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        runs.config(tmp_path, resume_changes=[name])


def test_a_checkpoint_of_an_earlier_version_resumes_with_a_warning(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = unbroken["lora"].copy(tmp_path, 3)
    marker = folder / "out" / "checkpoint-3" / MARKER
    content = json.loads(marker.read_text())
    del content["xxh3"]
    for name in ("settings", "changes", "made_by"):
        del content["state"][name]
    marker.write_text(json.dumps(content))
    with caplog.at_level("WARNING", logger="mpo"):
        weights = resumed(model, folder, "lora")
    assert [message for message in caplog.messages if "does not say with which settings" in message]
    assert runs.differing(weights, unbroken["lora"].weights) == []


def test_a_setting_that_a_checkpoint_does_not_know_of_had_its_default() -> None:
    then = saved_settings({"settings": {"harmless_retain_weight": 3.0, "learning_rate": 1e-3}})
    assert then is not None and then["harmless_retain_weight"] == 3.0 and then["learning_rate"] == 1e-3
    now = {**then, "harmless_retain_target": 0.1}
    with pytest.raises(ConfigError, match=r"harmless_retain_target: null then, 0\.1 now"):
        check_settings("checkpoint-3", then, now, (), trains_adapter=True)
    assert saved_settings({"settings": {"beta": 1.0}}) == {"beta": 1.0}  # without harmless groups
    assert saved_settings({}) is None


# ---- What cannot be resumed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", ["auto", True, "folder"])
def test_a_checkpoint_of_weights_alone_is_refused(model: Path, tmp_path: Path, resume: Any) -> None:
    settings = {"save_only_model": True, "max_steps": 2}
    trainer(model, tmp_path, "lora", **settings).train()
    if resume == "folder":
        resume = str(tmp_path / "out" / "checkpoint-2")
    run = trainer(model, tmp_path, "lora", **settings)
    with pytest.raises(
        StorageError, match="checkpoint-2' cannot be resumed: it was saved with `save_only_model"
    ):
        run.train(resume_from_checkpoint=resume)
    assert run.state.global_step == 0


def overwrite(path: Path) -> None:
    """Other bytes, as many as before."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(255 - byte for byte in content[middle : middle + 8])
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "adapter_model.safetensors", "rng_state.pth", "scheduler.pt", "trainer_state.json"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    folder = unbroken["lora"].copy(tmp_path, 3)
    damaged = folder / "out" / "checkpoint-3"
    overwrite(damaged / name)
    assert is_complete(damaged), "its size is as it was"
    with pytest.raises(StorageError, match=f"checkpoint-3' is damaged: {name} changed"):
        trainer(model, folder, "lora").resolve_checkpoint(str(damaged))
    run = trainer(model, folder, "lora")
    with caplog.at_level("WARNING", logger="mpo"):
        assert run.resolve_checkpoint("auto") == str(folder / "out" / "checkpoint-2")
    assert [message for message in caplog.messages if f"checkpoint-3' is damaged ({name}" in message]
    run.train(resume_from_checkpoint="auto")
    assert runs.differing(runs.weights(run.model), unbroken["lora"].weights) == []


@pytest.mark.parametrize("resume", ["auto", True])
def test_where_all_checkpoints_are_damaged_nothing_starts_again_in_silence(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path, resume: Any
) -> None:
    folder = unbroken["lora"].copy(tmp_path, 2)
    for step in (1, 2):
        overwrite(folder / "out" / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(StorageError, match=r"all checkpoints in .* are damaged"):
        trainer(model, folder, "lora").resolve_checkpoint(resume)


# ---- What is kept ------------------------------------------------------------------------------------------------


def test_only_the_newest_checkpoints_are_kept_and_all_are_complete(model: Path, tmp_path: Path) -> None:
    trainer(model, tmp_path, "lora", save_total_limit=2).train()
    found = checkpoints.checkpoints(tmp_path / "out")
    assert [path.name for path in found] == ["checkpoint-7", "checkpoint-8"]
    assert all(is_complete(path) for path in found)


def test_there_is_a_complete_checkpoint_at_every_moment_of_a_save(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    seen, removed = [], []
    save, remove = torch.save, shutil.rmtree

    def watch(*arguments: Any, **kwargs: Any) -> Any:
        seen.append(last_complete_checkpoint(out))
        return save(*arguments, **kwargs)

    def watch_removal(path: Any, **kwargs: Any) -> Any:
        remove(path, **kwargs)
        if Path(path).parent == out:
            assert last_complete_checkpoint(out) is not None
            removed.append(path)

    monkeypatch.setattr(torch, "save", watch)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", watch_removal)
    trainer(model, tmp_path, "lora", save_total_limit=1).train()
    first = next(i for i, path in enumerate(seen) if path is not None)
    assert len(seen) > STEPS and None not in seen[first:]
    assert len(removed) == STEPS - 1


def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(model: Path, tmp_path: Path) -> None:
    run = trainer(
        model,
        tmp_path,
        "lora",
        eval_dataset=random_groups(11, 3, (1, 2), words=(1, 5)),
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        learning_rate=0.3,
    )
    run.train()
    losses = {log["step"]: log["eval_loss"] for log in run.state.log_history if "eval_loss" in log}
    best = min(losses, key=lambda step: losses[step])
    assert best != STEPS, "the last is the best, so this shows nothing"
    assert run.state.best_model_checkpoint == str(tmp_path / "out" / f"checkpoint-{best}")
    assert is_complete(tmp_path / "out" / f"checkpoint-{best}")
    assert abs(run.evaluate()["eval_loss"] - losses[best]) < 1e-5


def test_a_new_run_in_an_old_folder_keeps_its_own_checkpoints(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path
) -> None:
    folder = unbroken["lora"].copy(tmp_path, STEPS)
    for step in range(1, STEPS):
        shutil.rmtree(folder / "out" / f"checkpoint-{step}")
    run = trainer(model, folder, "lora", save_total_limit=1, max_steps=3, seed=11)
    run.train()
    assert is_complete(folder / "out" / "checkpoint-3"), (
        "the newest checkpoint was deleted as soon as it was written"
    )


def test_auto_goes_on_from_the_new_run_and_not_from_later_steps_of_an_earlier_one(
    model: Path,
    unbroken: dict[str, Unbroken],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = unbroken["lora"].copy(tmp_path, STEPS)
    out = folder / "out"
    new = trainer(model, folder, "lora", max_steps=2, seed=11)
    with caplog.at_level("WARNING", logger="mpo"):
        new.train()
    assert [m for m in caplog.messages if "earlier run" in m and f"checkpoint-{STEPS}" in m]
    assert is_complete(out / f"checkpoint-{STEPS}"), "what is set aside can still be named"
    assert new.resolve_checkpoint("auto") == str(out / "checkpoint-2")
    assert new.resolve_checkpoint(True) == str(out / "checkpoint-2")
    monkeypatch.setattr(
        "mpo.training.resume.from_main", lambda found, ranks: out / "checkpoint-1"
    )  # on another rank
    assert new.resolve_checkpoint("auto") == str(out / "checkpoint-1")
    monkeypatch.undo()
    # Before its own first checkpoint, a new run has nothing to go on from.
    for step in (1, 2):
        shutil.rmtree(out / f"checkpoint-{step}")
    assert new.resolve_checkpoint("auto") is None


def test_going_back_to_an_earlier_step_sets_the_later_ones_aside(
    model: Path, unbroken: dict[str, Unbroken], tmp_path: Path
) -> None:
    folder = unbroken["lora"].copy(tmp_path, STEPS)
    out = folder / "out"
    checkpoints.set_aside(out)
    assert last_complete_checkpoint(out) is None
    run = trainer(model, folder, "lora", save_strategy="no", max_steps=4, resume_changes=["max_steps"])
    run.train(resume_from_checkpoint=str(out / "checkpoint-3"))
    assert last_complete_checkpoint(out) == out / "checkpoint-3"
