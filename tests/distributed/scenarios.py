"""Runs that one process and two must make alike: the same groups in every optimizer step, however they are divided.

The same code runs in the test's own process and in those that ``accelerate launch`` starts.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import TrainerCallback

from mpo.errors import ConfigError, StoppedBySignal, TrainingError
from mpo.evaluation.probe.ask import Questions
from mpo.evaluation.probe.watch import ProbeWatch
from mpo.modeling.loading import ModelSource, load_adapter, load_model, load_tokenizer
from mpo.modeling.pairs import PairTensors
from mpo.training.checkpoints import checkpoints
from mpo.training.config import MPOConfig
from mpo.training.trainer import MPOTrainer
from tests.evaluation.probe.said import is_safe, refuses
from tests.runs import lora
from tests.tiny import build_model, build_tokenizer, random_groups, save_tiny

GROUPS_PER_STEP = 4


@dataclass(frozen=True)
class Scenario:
    """What is trained, and how. ``tied``: the LM head is the embedding."""

    family: str
    adapter: bool
    optimizer: str
    tied: bool = False


SCENARIOS = {
    "full-sgd": Scenario("llama", adapter=False, optimizer="sgd"),
    "tied-sgd": Scenario("gemma2", adapter=False, optimizer="sgd", tied=True),
    "lora-sgd": Scenario("qwen2", adapter=True, optimizer="sgd"),
    "full-adamw": Scenario("llama", adapter=False, optimizer="adamw_torch"),
    "lora-adamw": Scenario("llama", adapter=True, optimizer="adamw_torch"),
}


def rows() -> list[dict[str, Any]]:
    """Eleven groups of one to four pairs: ranks have unequal numbers of pairs, and the last step has three groups."""
    return random_groups(5, 11, (1, 4), words=(1, 6))


def some_harmless(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups, every third of them harmless."""
    return [{**group, "kind": "harmless"} if i % 3 == 1 else group for i, group in enumerate(groups)]


def held_out() -> list[dict[str, Any]]:
    return random_groups(6, 3, (1, 3), words=(1, 6))


def settings(scenario: Scenario, folder: Path, shared: Path, ranks: int, **changes: Any) -> MPOConfig:
    """Settings under which every optimizer step has the same groups, whatever the number of ranks."""
    sgd = scenario.optimizer == "sgd"
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "reference_cache_dir": str(shared),
        "use_cpu": ranks == 1,
        "report_to": [],
        "disable_tqdm": True,
        "optim": scenario.optimizer,
        "learning_rate": 0.02 if sgd else 1e-3,
        "max_grad_norm": 0.0 if sgd else 0.5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "num_train_epochs": 1,
        "gradient_accumulation_steps": GROUPS_PER_STEP // ranks,
        "reference_tokens_per_batch": 200,
        "save_strategy": "no",
        "ddp_find_unused_parameters": False,
        "seed": 3,
    }
    # transformers knows of bf16 on GPUs and under `use_cpu`, under which Accelerate has no engines.
    with mock.patch("transformers.training_args.is_torch_bf16_gpu_available", return_value=True):
        return MPOConfig(**{**defaults, **changes})


class Observer(TrainerCallback):
    """Keeps the gradients of the first optimizer step, whole."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        engine = self.trainer.model_wrapped
        if not self.trainer.is_deepspeed_enabled:
            return
        take_step = engine.step

        def step(*given: Any, **named: Any) -> Any:
            self._keep()
            return take_step(*given, **named)

        engine.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.is_deepspeed_enabled:
            self._keep()

    def _keep(self) -> None:
        if self.gradients:
            return
        for name, parameter in self.trainer.model.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad
                if self.trainer.is_deepspeed_enabled:
                    from deepspeed.utils import safe_get_full_grad

                    gradient = safe_get_full_grad(parameter)
                if hasattr(gradient, "full_tensor"):
                    gradient = gradient.full_tensor()
                assert gradient is not None, name
                self.gradients[name] = gradient.detach().float().clone()


def build(
    name: str,
    folder: Path,
    shared: Path,
    ranks: int,
    kind: type = MPOTrainer,
    model: Callable[[], Any] | None = None,
    ref_model: Callable[[], Any] | None = None,
    of_kinds: bool = False,
    **changes: Any,
) -> MPOTrainer:
    """
    The trainer of a scenario, with its observer as ``trainer.observer``.

    ``model`` and ``ref_model`` load models of their own, as a recipe does when the settings are there: ``model`` one with
    an adapter. With ``of_kinds`` some groups are harmless.
    """
    scenario = SCENARIOS[name]
    source = shared / f"model-{scenario.family}"
    observer = Observer()
    args = settings(scenario, folder, shared / "reference", ranks, **changes)
    trainer = kind(
        model=str(source) if model is None else model(),
        ref_model=None if ref_model is None else ref_model(),
        processing_class=load_tokenizer(ModelSource(str(source))),
        args=args,
        train_dataset=some_harmless(rows()) if of_kinds else rows(),
        eval_dataset=some_harmless(held_out()) if of_kinds else held_out(),
        peft_config=lora(r=4) if scenario.adapter and model is None else None,
        callbacks=[observer],
    )
    observer.trainer = trainer
    trainer.observer = observer
    return trainer


def save_models(shared: Path) -> None:
    """The starting models of all scenarios, below ``shared``."""
    for scenario in SCENARIOS.values():
        save_tiny(scenario.family, shared / f"model-{scenario.family}")
    save_tiny("llama", shared / "model-reference", seed=7)
    torch.manual_seed(0)
    base = load_model(ModelSource(str(shared / "model-qwen2")))
    get_peft_model(base, lora(r=4, init_lora_weights=False)).save_pretrained(shared / "adapter")


def run(name: str, folder: Path, shared: Path, ranks: int, **changes: Any) -> dict[str, Any]:
    """Train a scenario; all ranks get what it computed. The saved model is in ``folder / "saved"``."""
    trainer = build(name, folder, shared, ranks, **changes)
    before = trainer.score()
    seen: list[tuple[list[int], int]] = []
    collate = trainer.data_collator.__call__

    class Recorder(type(trainer.data_collator)):  # type: ignore[misc]
        def __call__(self, examples: Any) -> Any:
            seen.append(
                (
                    [e["group"] for e in examples if not e["filler"]],
                    sum(len(e["target_language"]) for e in examples),
                )
            )
            return collate(examples)

    trainer.data_collator.__class__ = Recorder
    trainer.train()
    after = trainer.score()
    trainer.save_model(str(folder / "saved"))
    reference = trainer._reference_of(trainer.train_dataset)
    return {
        "gradients": trainer.observer.gradients,
        "reference_gap": torch.tensor(reference.gap.copy()),
        "reference_hidden": torch.tensor(reference.store.hidden[:].copy()),
        "before": _table(before),
        "after": _table(after),
        "retention": after.retention,
        "history": [log for log in trainer.state.log_history if "loss" in log],
        "groups": seen,
        "evaluated": {k: v for k, v in trainer.evaluate().items() if "runtime" not in k},
    }


def _table(scores: Any) -> list[tuple[Any, ...]]:
    return [(r.group, r.language, r.is_source, r.chosen, r.rejected, r.reference_gap) for r in scores.records]


class Poisoned(MPOTrainer):
    """Its third optimizer step has a loss, or a gradient, that is not finite, on the last rank only."""

    poison = "gradient"

    def pair_loss(self, pairs: PairTensors) -> Tensor:
        loss = super().pair_loss(pairs)
        if not self.model.training or self.state.global_step < 2 or self.accelerator.process_index == 0:
            return loss
        if self.poison == "loss":
            # The value is not finite, its derivative is: an engine that looks at gradients alone takes the step.
            return loss + float("nan")
        # The value is finite, its derivative is not.
        return loss + torch.sqrt(loss.detach() - loss + 0.0)


def run_with_reference(folder: Path, shared: Path, ranks: int) -> dict[str, Any]:
    """The reference that an explicit model gives, and the loss of the one step after it."""
    trainer = build(
        "full-sgd",
        folder,
        shared,
        ranks,
        ref_model=lambda: load_model(ModelSource(str(shared / "model-reference"))),
        max_steps=1,
    )
    trainer.train()
    reference = trainer._reference_of(trainer.train_dataset)
    return {
        "reference_gap": torch.tensor(reference.gap.copy()),
        "reference_hidden": torch.tensor(reference.store.hidden[:].copy()),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
    }


def run_continued(folder: Path, shared: Path, ranks: int, **changes: Any) -> dict[str, Any]:
    """An adapter that is trained further; the result is in ``folder / "saved"``."""

    def adapted() -> Any:
        dtype = torch.bfloat16 if changes.get("bf16") else torch.float32
        base = load_model(ModelSource(str(shared / "model-qwen2")), dtype=dtype)
        return load_adapter(base, str(shared / "adapter"), trainable=True)

    trainer = build("lora-sgd", folder, shared, ranks, model=adapted, **changes)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    reference = trainer._reference_of(trainer.train_dataset)
    return {
        "reference_gap": torch.tensor(reference.gap.copy()),
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
    }


OBJECTIVES: dict[str, dict[str, Any]] = {
    # Means over the step's tokens, and KTO's reference point.
    "tokens": {"loss_type": ["kto", "orpo", "sft"], "beta": 0.3, "train_on": "both"},
    # Shared first tokens, a mean over the step's prompts, and states between layers.
    "states": {"loss_type": ["sigmoid", "mlc"], "ld_alpha": 0.4, "state_layer": 1, "state_position": -3},
}


def run_objectives(name: str, folder: Path, shared: Path, ranks: int) -> dict[str, Any]:
    """Objectives that need more of a step than its pairs."""
    trainer = build("lora-sgd", folder, shared, ranks, **OBJECTIVES[name])
    trainer.train()
    return {
        "gradients": trainer.observer.gradients,
        "history": [log for log in trainer.state.log_history if "loss" in log],
        "evaluated": trainer.evaluate()["eval_loss"],
    }


def run_kinds(folder: Path, shared: Path, ranks: int) -> dict[str, Any]:
    """Harmful and harmless groups, each kind with a mean of its own over the steps of all ranks."""
    uses = {"harmless_retention": "kl", "harmless_share": 0.4, "harmless_retain_target": 1e-3}
    trainer = build("lora-sgd", folder, shared, ranks, of_kinds=True, **uses)
    trainer.train()
    return {
        "gradients": trainer.observer.gradients,
        "history": [log for log in trainer.state.log_history if "loss" in log],
        "evaluated": trainer.evaluate()["eval_loss"],
    }


def run_probed(name: str, folder: Path, shared: Path, ranks: int) -> dict[str, Any]:
    """A run that asks its model before, after each step and after it, and the same one without; what it was told.

    Forty-two prompts are three batches, so that one of two ranks has one more than the other.
    """
    settings = {"behavior_probe": 2, "probe_max_new_tokens": 4, "probe_steps": 1}
    trainer = build(name, folder / "probed", shared, ranks, **settings)
    watch = ProbeWatch(trainer)
    trainer.add_callback(watch)
    before = watch.start()
    trainer.train()
    change = watch.finish()
    trainer.save_model(str(folder / "probed" / "saved"))
    plain = build(name, folder / "plain", shared, ranks)
    plain.score()  # as the probe does, this divides the model before training begins
    plain.train()
    plain.save_model(str(folder / "plain" / "saved"))
    return {
        "prompts": None if watch.prompts is None else len(watch.prompts.prompts),
        "before": None if before is None else [(row.id, row.answer) for row in before.answers],
        "after": None if watch.after is None else [(row.id, row.answer) for row in watch.after.answers],
        "change": change,
        "failure": watch.failure,
        "steps": [log["step"] for log in trainer.state.log_history if "probe/balanced" in log],
    }


def run_stopped(name: str, folder: Path, shared: Path, ranks: int) -> dict[str, Any]:
    """A run whose model is read as refusing everything from its second step on; the best checkpoint is to be kept."""
    trainer = build(
        name,
        folder,
        shared,
        ranks,
        behavior_probe=2,
        probe_languages=["en", "sw"],
        probe_max_new_tokens=4,
        probe_steps=1,
        stop_on_over_refusal=20.0,
        metric_for_best_model="eval_probe_balanced",
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    watch = ProbeWatch(trainer)
    trainer.add_callback(watch)

    def ask(self: Questions, prompts: Any, title: str | None = None) -> Any:
        says = refuses if trainer.state.global_step > 1 else is_safe
        return [
            replace(row, answer=says(p)) for row, p in zip(asked(self, prompts, title), prompts, strict=True)
        ]

    asked = Questions.ask
    with mock.patch.object(Questions, "ask", ask):
        watch.start()
        trainer.train()
    trainer.save_model(str(folder / "saved"))
    return {
        "stopped": watch.stopped,
        "failure": watch.failure,
        "steps": trainer.state.global_step,
        "best": Path(trainer.state.best_model_checkpoint or "").name,
        "evaluated": [log["step"] for log in trainer.state.log_history if "eval_loss" in log],
    }


def run_poisoned(poison: str, folder: Path, shared: Path, ranks: int) -> dict[str, Any]:
    """The error of a run whose third step is not finite, and the checkpoint it leaves."""
    Poisoned.poison = poison
    trainer = build("full-adamw", folder, shared, ranks, kind=Poisoned, save_strategy="steps", save_steps=100)
    try:
        trainer.train()
    except TrainingError as error:
        return {"error": str(error), "checkpoints": [path.name for path in checkpoints(folder)]}
    return {"error": None}


class SignalOneRank(TrainerCallback):
    """Sends a signal to the last rank alone, before its step ``step``."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (
            state.global_step + 1 == self.step
            and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        ):
            os.kill(os.getpid(), self.number)


def run_signalled(name: str, out: Path, shared: Path, ranks: int) -> dict[str, Any]:
    """A run that SIGTERM ends on one rank, what a resume of it refuses, and the resumed one beside an unbroken one."""
    folder, kept = out / "signalled", {"save_strategy": "steps", "save_steps": 100}
    whole = build(name, out / "whole", shared, ranks)
    whole.train()
    whole.save_model(str(out / "whole" / "saved"))
    stopped = build(name, folder, shared, ranks, **kept)
    stopped.add_callback(SignalOneRank(2, signal.SIGTERM))
    code = None
    try:
        stopped.train()
    except StoppedBySignal as stop:
        code = stop.exit_code
    found = [path.name for path in checkpoints(folder)]
    refused = None
    try:
        build(name, folder, shared, ranks, **kept, learning_rate=0.5).train(resume_from_checkpoint=True)
    except ConfigError as error:
        refused = str(error)
    resumed = build(name, folder, shared, ranks, **kept)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model(str(folder / "saved"))
    return {
        "code": code,
        "checkpoints": found,
        "refused": refused,
        "stopped at": stopped.state.global_step,
        "steps": [log["step"] for log in resumed.state.log_history if "loss" in log],
    }


__all__ = ["SCENARIOS", "build", "build_model", "build_tokenizer", "run", "run_poisoned", "save_models"]
