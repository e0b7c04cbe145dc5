"""A callback that asks the probe prompts while a model is trained: logs the answers' measures, can stop, and can choose the
checkpoint to keep."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mpo.common.log import get_logger
from mpo.common.words import listed
from mpo.data.languages import language_name, normalize_language_setting
from mpo.errors import ConfigError, MPOError
from mpo.evaluation.probe import PROBE_LANGUAGES
from mpo.evaluation.probe.ask import Questions
from mpo.evaluation.probe.behavior import REFUSED, Answered, ProbePrompts, choose_prompts
from mpo.evaluation.probe.change import BehaviorChange, compare_answers, over_refusal
from mpo.training.config import MPOConfig
from mpo.training.probe_settings import PROBE_METRIC, is_probe_metric
from mpo.training.trainer import MPOTrainer

_log = get_logger(__name__)


class ProbeWatch(TrainerCallback):
    """Asks a trainer's model the probe prompts before, while and after it is trained.

    What is trained is the same with it and without it, bit for bit. A probe that fails is a warning, and the run goes on.

    Example:
        >>> watch = ProbeWatch(trainer)  # doctest: +SKIP
        >>> watch.start()  # doctest: +SKIP
        >>> trainer.add_callback(watch)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> watch.finish().show()  # doctest: +SKIP

    Args:
        trainer: The trainer, whose settings say what is asked.
        prompts: What to ask; by default what :func:`prompts_of` chooses.

    Attributes:
        prompts: What is asked; None for nothing.
        before: Answers of the starting model, from :meth:`start`.
        latest: Step and answers of the last probe while training.
        stopped: Why the run was stopped, or None.
        failure: What went wrong in the last probe that failed, or None.
    """

    asks_probe = True

    def __init__(self, trainer: MPOTrainer, prompts: ProbePrompts | None = None) -> None:
        self.prompts = prompts_of(trainer.args, trainer.languages) if prompts is None else prompts
        self.before: Answered | None = None
        self.latest: tuple[int, Answered | None] | None = None
        self.after: Answered | None = None
        self.stopped: str | None = None
        self.failure: str | None = None
        self._trainer = trainer
        self._questions = Questions(
            trainer.policy,
            trainer.processing_class,  # type: ignore[arg-type]
            trainer.args.probe_max_new_tokens,
            trainer.args.chat_template_kwargs,  # type: ignore[arg-type]
        )

    # ---- Before and after ----------------------------------------------------------------------------------------

    def start(self) -> Answered | None:
        """Ask the starting model. All ranks call this before ``trainer.train()``, also of a run that is resumed."""
        self.before = self._ask("before training", title="Asking the probe prompts before training")
        return self.before

    def finish(self) -> BehaviorChange | None:
        """What training has changed; None where one of the two probes failed. All ranks call this after training."""
        state = self._trainer.state
        step, self.after = self.latest or (-1, None)
        if self.after is None or step != state.global_step or self._trainer.args.load_best_model_at_end:
            self.after = self._ask("after training", title="Asking the probe prompts after training")
        if self.before is None or self.after is None:
            return None
        return compare_answers(
            self.before,
            self.after,
            max_new_tokens=self._questions.max_new_tokens,
            stopped=self.stopped,
        )

    # ---- While training ------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0 and self.before is None and self.failure is None:
            self.start()
        if state.global_step == 0 and self.before is not None:
            self._log(self.before)
        if self._trainer.args.stop_on_over_refusal is None or (self.before and self.before.outcomes[REFUSED]):
            return
        if self.before is None and self.failure is None:
            raise ConfigError(
                "`stop_on_over_refusal` compares with the starting model, which this run, since it is resumed, no longer "
                "has. Ask it before `trainer.train()`: `watch.start()`."
            )
        _log.warning(
            "`stop_on_over_refusal` is off: it is not known how many harmless prompts the starting model refuses."
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        settings = self._trainer.args
        every = settings.probe_every(state.max_steps)
        if every is None or state.global_step % every:
            return
        answered = self._at_step(state.global_step)
        if answered is None or self.before is None or settings.stop_on_over_refusal is None:
            return
        self.stopped = over_refusal(self.before, answered, settings.stop_on_over_refusal)
        if self.stopped is not None:
            _log.warning(
                f"Stopped at step {state.global_step}: {self.stopped} "
                f"(`stop_on_over_refusal: {settings.stop_on_over_refusal:g}`)."
            )
            # What is evaluated and saved at a run's last step is so at this one.
            DefaultFlowCallback().on_step_end(args, replace(state, max_steps=state.global_step), control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if (
            metrics is None
            or not is_probe_metric(args.metric_for_best_model)
            or not self._trainer.is_in_train
        ):
            return
        answered = self._at_step(state.global_step)
        balanced = None if answered is None else answered.behavior.balanced
        # Not a number is never the best.
        metrics[f"eval_{PROBE_METRIC}"] = math.nan if balanced is None else balanced

    def _at_step(self, step: int) -> Answered | None:
        """The answers at a step, asked for once and logged."""
        if self.latest is None or self.latest[0] != step:
            self.latest = (step, self._ask(f"at step {step}"))
            if (answered := self.latest[1]) is not None:
                self._log(answered)
        return self.latest[1]

    def _log(self, answered: Answered) -> None:
        control = self._trainer.control
        wanted = control.should_log
        self._trainer.log(answered.metrics())
        control.should_log = wanted  # any log counts as the one that is due at this step

    def _ask(self, when: str, title: str | None = None) -> Answered | None:
        if self.prompts is None:
            return None
        try:
            answered = Answered.judged(self.prompts, self._questions.ask(self.prompts.prompts, title))
            answered.metrics()  # all that can go wrong in them goes wrong here
        except torch.distributed.DistError:
            raise
        except Exception as error:
            self.failure = str(error) if isinstance(error, MPOError) else f"{type(error).__name__}: {error}"
            _log.warning(f"The probe {when} failed, and the run goes on without it: {self.failure}")
            return None
        return answered


def prompts_of(args: MPOConfig, languages: Iterable[str]) -> ProbePrompts | None:
    """What the settings of a run say that its model is asked, and which of its languages are not; None for nothing.

    Args:
        args: Settings.
        languages: Target languages of the data.

    Raises:
        ConfigError: `probe_languages` names one that the probe set does not have; or a setting needs answers, and the set
            has none of the languages.
    """
    named = [normalize_language_setting(code, "probe_languages") for code in args.probe_languages or ()]
    if unknown := [code for code in named if code not in PROBE_LANGUAGES]:
        raise ConfigError(
            f"`probe_languages` names {', '.join(unknown)}, which the probe set does not have. It has "
            f"{', '.join(PROBE_LANGUAGES)}."
        )
    trained = [args.source_language, *languages]
    codes = named or trained
    prompts = choose_prompts(codes, args.behavior_probe)
    if prompts is not None:
        return replace(prompts, left_out=tuple(sorted({*trained} - {*prompts.languages})))
    if wanting := args.wanting_answers(args.metric_for_best_model):
        raise ConfigError(
            f"{wanting}, and the probe set has no prompts in {listed(language_name(code) for code in dict.fromkeys(codes))}. "
            "`probe_languages: [en]`, for example, asks in another language."
        )
    return None
