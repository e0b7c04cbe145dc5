"""What stops a run: values that are not finite, and a collapse that the user asked to stop at."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from mpo.errors import TrainingError
from mpo.modeling.pairs import PairTensors
from mpo.training import trainer as trainer_module
from mpo.training.checkpoints import checkpoints, is_complete, last_complete_checkpoint
from mpo.training.guards import FiniteGuard
from mpo.training.trainer import MPOTrainer
from tests import runs
from tests.tiny import random_groups

pytestmark = pytest.mark.usefixtures("accelerator_of_its_own")


# ---- Values that are not finite ----------------------------------------------------------------------------------


class Snapshots(TrainerCallback):
    """Weights after every step, and something that happens before step ``at``."""

    def __init__(self, at: int, action: Callable[[Any], Any] = lambda model: None) -> None:
        self.at, self.action = at, action
        self.last: dict[str, Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            self.last = runs.weights(model)
        if state.global_step + 1 == self.at:
            self.action(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.last = runs.weights(model)


class Poisoned(MPOTrainer):
    """The loss of one pair of step ``at`` is ``value``."""

    at, value = 3, float("nan")

    def pair_loss(self, pairs: PairTensors) -> Tensor:
        losses = super().pair_loss(pairs)
        if self.model.training and self.state.global_step + 1 == self.at:
            losses = losses + torch.tensor([self.value] + [0.0] * (len(losses) - 1))
        return losses


def poison_gradient(value: float) -> Callable[[Any], None]:
    def action(model: Any) -> None:
        parameter = next(p for p in model.parameters() if p.requires_grad)
        parameter.register_hook(lambda gradient: gradient * value)

    return action


def poison_weight(model: Any) -> None:
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "norm" in name)[0] = float("nan")


STEPPED: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 1,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
}

POISON: dict[str, tuple[dict[str, Any], str]] = {
    "a loss that is NaN": ({"kind": type("NaN", (Poisoned,), {"value": float("nan")})}, "loss"),
    "an infinite loss": ({"kind": type("Inf", (Poisoned,), {"value": float("inf")})}, "loss"),
    "a gradient that is NaN": ({"callbacks": [Snapshots(3, poison_gradient(float("nan")))]}, "gradient"),
    "an infinite gradient": ({"callbacks": [Snapshots(3, poison_gradient(float("inf")))]}, "gradient"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "by default": {},
    "without clipping": {"max_grad_norm": 0.0},
    "with the library's filter": {"logging_nan_inf_filter": True},
    "between two logs": {"logging_steps": 50},
}


@pytest.mark.parametrize(
    ("poison", "settings"),
    [*((poison, "by default") for poison in POISON), *(("a loss that is NaN", s) for s in list(SETTINGS)[1:]),
     ("an infinite gradient", "without clipping")],
)  # fmt: skip
def test_a_value_that_is_not_finite_stops_the_run_before_the_optimizer(
    model: Path, rows: Any, tmp_path: Path, poison: str, settings: str
) -> None:
    arguments, what = POISON[poison]
    snapshots = next(iter(arguments.get("callbacks", [Snapshots(3)])))
    trainer = runs.trainer(
        model, tmp_path, rows, **{**STEPPED, **SETTINGS[settings], **arguments, "callbacks": [snapshots]}
    )
    with pytest.raises(TrainingError, match=f"the {what} of step 3 is not finite"):
        trainer.train()
    assert runs.differing(snapshots.last, runs.weights(trainer.model)) == []
    saved = tmp_path / "out" / "checkpoint-2"
    assert last_complete_checkpoint(tmp_path / "out") == saved
    sane = {**STEPPED, **SETTINGS[settings]}
    again = runs.trainer(model, tmp_path, rows, **sane)
    again.train(resume_from_checkpoint="auto")
    whole = runs.trainer(model, tmp_path / "whole", rows, **sane)
    whole.train()
    assert runs.differing(runs.weights(again.model), runs.weights(whole.model)) == []


def test_the_rows_of_the_whole_step_and_the_last_good_state_are_named(
    model: Path, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, list[int]]] = []
    original = trainer_module.run_model

    def watch(forward: Any, batch: dict[str, Any], **kwargs: Any) -> Any:
        seen.extend(zip(batch["origins"], batch["rows"], strict=True))
        return original(forward, batch, **kwargs)

    monkeypatch.setattr(trainer_module, "run_model", watch)
    trainer = runs.trainer(model, tmp_path, rows, kind=Poisoned, **STEPPED)
    with pytest.raises(TrainingError) as error:
        trainer.train()
    text = str(error.value)
    assert len(seen) == 6
    for origin, numbers in seen[4:]:
        assert f"{origin} rows {numbers}" in text
    others = {row for _, numbers in seen[:4] for row in numbers} - {
        row for _, numbers in seen[4:] for row in numbers
    }
    assert not [row for row in others if f"[{row}]" in text]
    assert "checkpoint-2" in text


def test_a_poisoned_weight_is_not_saved_as_the_last_good_state(
    model: Path, rows: Any, tmp_path: Path
) -> None:
    trainer = runs.trainer(model, tmp_path, rows, callbacks=[Snapshots(3, poison_weight)], **STEPPED)
    with pytest.raises(TrainingError, match="step 3"):
        trainer.train()
    saved = last_complete_checkpoint(tmp_path / "out")
    assert saved is not None
    with safe_open(saved / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert torch.isfinite(file.get_tensor(name)).all(), f"{name} of {saved.name} is not finite"
    again = runs.trainer(model, tmp_path, rows, **STEPPED)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 4


def test_a_good_checkpoint_of_the_last_step_is_not_written_over_by_the_failing_one(
    model: Path, rows: Any, tmp_path: Path
) -> None:
    # With dropout on, the failing step has drawn random numbers that the checkpoint must not contain.
    dropout = {"peft_config": runs.lora(lora_dropout=0.3), "disable_dropout": False}
    trainer = runs.trainer(model, tmp_path, rows, kind=Poisoned, **STEPPED, **dropout)
    with pytest.raises(TrainingError):
        trainer.train()
    again = runs.trainer(model, tmp_path, rows, **STEPPED, **dropout)
    again.train(resume_from_checkpoint="auto")
    whole = runs.trainer(model, tmp_path / "whole", rows, **STEPPED, **dropout)
    whole.train()
    assert runs.differing(runs.weights(again.model), runs.weights(whole.model)) == []


def test_a_full_disk_at_the_failing_step_does_not_cost_the_last_good_checkpoint(
    model: Path, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FiniteGuard.stop

    def stop(*args: Any, **kwargs: Any) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        original(*args, **kwargs)

    monkeypatch.setattr(FiniteGuard, "stop", stop)
    with pytest.raises(TrainingError):
        runs.trainer(model, tmp_path, rows, kind=Poisoned, **STEPPED).train()
    assert last_complete_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"


def test_a_good_state_that_was_not_due_to_be_saved_is_saved(model: Path, rows: Any, tmp_path: Path) -> None:
    settings = {**STEPPED, "save_steps": 100}
    snapshots = Snapshots(3)
    trainer = runs.trainer(model, tmp_path, rows, kind=Poisoned, callbacks=[snapshots], **settings)
    with pytest.raises(TrainingError, match="checkpoint-2"):
        trainer.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2", dtype=torch.float32)
    assert runs.differing(runs.weights(saved), snapshots.last) == []


def test_weights_that_are_not_finite_on_another_rank_are_not_saved_as_the_last_good_state(
    model: Path, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FiniteGuard.stop

    def stop(*args: Any, **kwargs: Any) -> None:
        with mock.patch.object(Accelerator, "num_processes", 2):
            original(*args, **kwargs)

    def gather(values: list[Any]) -> list[Any]:
        return [*values, False] if values == [True] else values

    monkeypatch.setattr(FiniteGuard, "stop", stop)
    monkeypatch.setattr("mpo.training.ranks.gather_object", gather)
    with pytest.raises(TrainingError, match="No step had been saved"):
        runs.trainer(model, tmp_path, rows, kind=Poisoned, **{**STEPPED, "save_steps": 100}).train()
    assert checkpoints(tmp_path / "out") == []


def test_a_failure_in_the_first_step_says_that_nothing_was_saved(
    model: Path, rows: Any, tmp_path: Path
) -> None:
    first = type("First", (Poisoned,), {"at": 1})
    with pytest.raises(TrainingError, match="No step had been saved"):
        runs.trainer(model, tmp_path, rows, kind=first, **STEPPED).train()
    assert checkpoints(tmp_path / "out") == []


def test_a_run_that_saves_nothing_stops_as_well(model: Path, rows: Any, tmp_path: Path) -> None:
    settings = {**STEPPED, "save_strategy": "no"}
    with pytest.raises(TrainingError, match="step 3"):
        runs.trainer(model, tmp_path, rows, kind=Poisoned, **settings).train()
    assert checkpoints(tmp_path / "out") == []


# ---- The guard without a trainer ---------------------------------------------------------------------------------


def guard(**changes: Any) -> FiniteGuard:
    settings = {"device": torch.device("cpu"), "num_processes": 1, "mixed_precision": "no", **changes}
    accelerator: Any = SimpleNamespace(**settings)
    return FiniteGuard(accelerator)


def micro_batch(*rows: int) -> dict[str, Any]:
    return {"origins": ["a.jsonl"] * len(rows), "rows": [[row] for row in rows]}


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_in_any_micro_batch_of_the_step_is_found(place: int, value: float) -> None:
    watched = guard()
    for i in range(3):
        watched.add(torch.tensor(value if i == place else 1.0), micro_batch(i))
    assert watched.not_finite() == "loss"
    assert watched.not_finite(torch.tensor(float("nan"))) == "loss"
    watched.clear()
    assert watched.not_finite() is None


@pytest.mark.parametrize("norm", [float("nan"), torch.tensor(float("inf")), torch.tensor(float("nan"))])
def test_a_gradient_that_is_not_finite_is_found(norm: Any) -> None:
    watched = guard()
    watched.add(torch.tensor(1.0), micro_batch(0))
    assert watched.not_finite(1.0) is None
    assert watched.not_finite(norm) == "gradient"


def test_under_fp16_only_many_overflows_in_a_row_are_found() -> None:
    watched = guard(mixed_precision="fp16")
    infinite = torch.tensor(float("inf"))
    for _ in range(2):
        assert [watched.not_finite(infinite) for _ in range(24)] == [None] * 24
        assert watched.not_finite(1.0) is None, "a good step begins the count again"
    assert [watched.not_finite(infinite) for _ in range(25)] == [None] * 24 + ["gradient"]
    watched.add(torch.tensor(float("nan")), micro_batch(0))
    assert watched.not_finite(1.0) == "loss", "a loss does not overflow"


def test_what_another_rank_finds_stops_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(flags: Tensor, op: Any) -> None:
        assert op == torch.distributed.ReduceOp.MIN
        flags[1] = 0.0  # the gradient of the other rank is not finite

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    watched = guard(num_processes=2)
    watched.add(torch.tensor(1.0), micro_batch(0))
    assert watched.not_finite(1.0) == "gradient"


def test_the_message_names_the_first_rows_and_counts_the_others(tmp_path: Path) -> None:
    watched = guard()
    watched.add(torch.tensor(float("nan")), micro_batch(*range(11)))
    saved: list[int] = []
    with pytest.raises(TrainingError) as error:
        watched.stop("loss", torch.nn.Linear(1, 1), tmp_path / "checkpoint-4", lambda: saved.append(1))
    text = str(error.value)
    assert "the loss of step 5 is not finite" in text and "a.jsonl rows [7] and 3 more groups" in text
    assert "rows [8]" not in text and saved == [1]


# ---- Collapse ----------------------------------------------------------------------------------------------------


class Collapsing(MPOTrainer):
    """Makes both answers unlikely, the rejected one more so."""

    def pair_loss(self, pairs: PairTensors) -> Tensor:
        return pairs.chosen_logps + 2.0 * pairs.rejected_logps


def collapsing(model: Path, folder: Path, **settings: Any) -> MPOTrainer:
    rows = random_groups(random.Random(2), 1, (2, 2), languages=("bn", "sw"), words=(3, 4))
    return runs.trainer(
        model,
        folder,
        rows,
        kind=Collapsing,
        num_train_epochs=20,
        learning_rate=4e-3,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=100,
        collapse_window=6,
        **settings,
    )


def test_a_collapse_is_warned_of_once_per_language_and_training_goes_on(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    trainer = collapsing(model, tmp_path)
    trainer.train()
    assert trainer.state.global_step == 20
    warned = [
        record.getMessage()
        for record in caplog.records
        if "making both answers unlikely" in record.getMessage()
    ]
    for language in ("bn", "sw"):
        assert sum(f"'{language}'" in message for message in warned) == 1
    assert "stop_on_collapse" in warned[0]


def test_a_collapse_stops_the_run_after_saving_when_asked_to(model: Path, tmp_path: Path) -> None:
    trainer = collapsing(model, tmp_path, stop_on_collapse=True)
    with pytest.raises(TrainingError, match="fell by"):
        trainer.train()
    step = trainer.state.global_step
    assert 6 <= step < 20
    saved = tmp_path / "out" / f"checkpoint-{step}"
    assert last_complete_checkpoint(tmp_path / "out") == saved and is_complete(saved)
    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert runs.differing(runs.weights(loaded), runs.weights(trainer.model)) == []


def test_healthy_training_is_not_taken_for_a_collapse(
    model: Path, rows: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    runs.trainer(
        model, tmp_path, rows, num_train_epochs=10, learning_rate=1e-3, stop_on_collapse=True
    ).train()
    assert "unlikely" not in caplog.text
