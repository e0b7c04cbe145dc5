"""The trainer: a ``trl.DPOTrainer`` whose step is one model call on packed preference trees."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import TrainOutput
from trl import DPOTrainer
from trl.trainer.utils import get_config_model_id

from mpo.common.citations import MPO_BIBTEX
from mpo.common.log import get_logger
from mpo.data import as_groups
from mpo.data.tokenization import TOKENIZED_FEATURES
from mpo.errors import ConfigError, DataError, StoppedBySignal, TrainingError
from mpo.modeling.adapters import skip_input_casts
from mpo.modeling.head import attach_reward_gap_head
from mpo.modeling.pairs import PairTensors, run_in_calls, run_model
from mpo.training import sharding
from mpo.training.activation_checkpointing import decide_checkpointing, prepare_checkpointing
from mpo.training.checkpoints import save_checkpoint, warn_if_none_is_best
from mpo.training.checks import (
    check_adapter,
    check_arguments,
    check_best_metric,
    check_harmless,
    check_languages,
    check_master_weights,
    check_tokens,
)
from mpo.training.collapse import CollapseDetector
from mpo.training.config import MPOConfig
from mpo.training.guards import FiniteGuard
from mpo.training.harmless import harmless_groups, pair_losses
from mpo.training.loaders import training_collator, training_loader
from mpo.training.metrics import KindMetrics, evaluation_metrics
from mpo.training.notebook import show_compactly
from mpo.training.objectives import SOURCE_GAP
from mpo.training.policy import open_policy, source_of
from mpo.training.probe_settings import check_probe_is_asked
from mpo.training.records import Scores
from mpo.training.reference import GroupReference
from mpo.training.reference_policy import ReferencePolicy, needed_for
from mpo.training.resume import ResumableRun
from mpo.training.retention_weights import RetentionWeights
from mpo.training.sampling import GroupCollator, Trained, pair_weights, step_of, target_languages
from mpo.training.scoring import score_dataset
from mpo.training.step_totals import reference_point, summed
from mpo.training.stopping import LastStep, StopSignals
from mpo.training.trl_contract import (
    own_errors,
    without_reference_model,
    without_second_sharding,
    without_signal_handler,
)
from mpo.training.workload import tokenize_for_training

logger = get_logger(__name__)


class MPOTrainer(DPOTrainer):
    """Trains a causal language model with MPO (Zhao et al., ACL 2025, arXiv 2505.16869).

    The reward gap between chosen and rejected answers in each target language is pulled to the gap that the starting
    policy has on the same pair in its dominant language, whose hidden states are held still. Before the first step a pass
    over the unique sources computes what the starting policy says of them (:mod:`mpo.training.reference`); no reference
    model is in memory while training. To change the loss, override :meth:`pair_loss`.

    Example:
        >>> trainer = MPOTrainer(
        ...     model="Qwen/Qwen2.5-0.5B-Instruct",
        ...     args=MPOConfig(output_dir="out", beta=1.5, learning_rate=2e-4),
        ...     train_dataset="pairs.jsonl",
        ...     peft_config=LoraConfig(r=16, target_modules="all-linear"),
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

    Args:
        model: Hub id or folder of a model, a loaded model, or a PEFT model whose adapter is trained further (the
            reference is then that adapter as it is at the start).
        ref_model: Explicit reference model. Unset: the starting policy. Freed after the reference pass.
        args: Settings.
        train_dataset: Groups in any form that :func:`mpo.data.as_groups` accepts.
        eval_dataset: Held-out groups in the same forms, or a dictionary of them.
        processing_class: Tokenizer of the model; loaded from the model's folder or id if unset.
        data_collator, compute_metrics: Refused: the step packs batches of its own and builds no logits.
        callbacks, optimizers: As in ``transformers.Trainer``.
        quantization_config: For QLoRA, with ``model`` given by name.
        peft_config: Wraps the model in a new adapter.

    Attributes:
        languages: Target languages, sorted, and after them the source language where sources are trained on; a pair's
            language is its index here.
        dropped_rows: One sentence for each row that tokenization dropped (``bad_rows="drop"``).
        retain_weights: With a target of the retention of harmless groups, the weights that are adapted to it; else None.
        source_report: After the reference pass: ``sources``, ``not_positive`` (gap of 0 or less) and ``dropped``.

    Raises:
        ConfigError: Settings contradict each other or the model.
        DataError: A row breaks the data contract.
        ModelError: The model or tokenizer cannot be loaded or used.
    """

    loss_is_scaled_for_ga = True
    _tag_names = ["trl", "mpo"]  # noqa: RUF012
    _name = "MPO"
    _paper = {  # noqa: RUF012
        "title": "MPO: Multilingual Safety Alignment via Reward Gap Optimization",
        "id": "2505.16869",
        "citation": MPO_BIBTEX,
    }

    # What the base class leaves open is fixed here.
    args: MPOConfig
    model: Any
    model_wrapped: Any
    train_dataset: Dataset
    eval_dataset: Any
    data_collator: GroupCollator

    # ---- What it builds ------------------------------------------------------------------------------------------

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        ref_model: PreTrainedModel | None = None,
        args: MPOConfig | None = None,
        data_collator: Any | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: Any | None = None,
    ) -> None:
        loaded_from = model if isinstance(model, str) else None
        if args is None:
            name = loaded_from or get_config_model_id(model.config)  # type: ignore[union-attr]
            args = MPOConfig(output_dir=f"{Path(name).name}-MPO")
        refused = {"data_collator": data_collator, "compute_metrics": compute_metrics}
        check_arguments(args, model, ref_model, train_dataset, quantization_config, **refused)
        prepare_checkpointing(args)
        set_seed(args.seed)
        model, processing_class = open_policy(model, processing_class, args, quantization_config)
        check_adapter(model, peft_config)

        self.dropped_rows: list[str] = []
        self.source_report: dict[str, int] = {}
        groups_of = partial(as_groups, source_language=args.source_language, bad_rows=args.bad_rows)
        if isinstance(eval_dataset, dict):
            eval_dataset = {split: groups_of(data) for split, data in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = groups_of(eval_dataset)
        with without_reference_model(args), without_signal_handler(args), own_errors(args):
            super().__init__(
                model=model,
                args=args,
                data_collator=dict,  # MPO's own knows the languages, below
                train_dataset=groups_of(train_dataset),
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
            )
        show_compactly(self, callbacks or ())
        if peft_config is None and "ref" in getattr(self.model, "peft_config", {}):
            # The reference pass runs before the adapter changes, so no frozen copy of it is needed, or saved.
            self.model.delete_adapter("ref")
        sharding.check_sharding(self.accelerator)
        if not sharding.is_sharded(self.accelerator):
            check_master_weights(self.model)
        bare = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        attach_reward_gap_head(bare)
        skip_input_casts(self.model)

        self.languages = target_languages(self.train_dataset, *self._eval_datasets)
        sets = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
        if self._eval_datasets:
            check_best_metric(args, target_languages(*self._eval_datasets), sets)
        sides = [("train", self.train_dataset), *(("eval", data) for data in self._eval_datasets)]
        for name, dataset in sides:
            check_tokens(dataset, bare, self._tokenizer, name)
        harmless = harmless_groups(self.train_dataset)
        other_loss = type(self).pair_loss is not MPOTrainer.pair_loss
        check_harmless(args, harmless, bare, other_reference=ref_model is not None, other_loss=other_loss)
        has_harmless = bool(harmless.any())
        trains_sources = args.train_on != "targets" or (has_harmless and args.harmless.train_on != "targets")
        if trains_sources and args.source_language not in self.languages:
            self.languages.append(args.source_language)
        self.data_collator = training_collator(
            args,
            self.languages,
            bare,
            self._tokenizer,
            self.accelerator,
            router_loss=self.aux_loss_enabled,
            harmless=has_harmless,
        )
        self.data_collator.weigh_languages(self.train_dataset, args.language_weights)
        decide_checkpointing(self.model, args, self.train_dataset, self.data_collator, self.accelerator)
        # The model as it can be called before training and in it, whole or sharded.
        self._policy = sharding.CallablePolicy(self)
        self._reference = ReferencePolicy(
            self._policy,
            ref_model,
            new_adapter=peft_config,
            loaded_from=None if loaded_from is None else source_of(loaded_from, args),
            cache_dir=args.reference_folder(),
            shape=self.data_collator.shape,
        )
        device = self.accelerator.device
        self.retain_weights = RetentionWeights.of(args, self.languages, device, harmless=has_harmless)
        # Sums over the pairs since the last log.
        self._metrics_per_language = KindMetrics(
            self.languages, args, device, harmless=has_harmless, retain_weights=self.retain_weights
        )
        # What ends the run: before the optimizer's step, or at a log.
        self._signals = StopSignals(keep=True)
        self._finite = FiniteGuard(self.accelerator, lambda: self._signals.asked)
        self._collapse = [
            CollapseDetector(args.collapse_window, args.collapse_drop, kind) for kind in ("", "harmless/")
        ]
        # What its checkpoints state, and which of them it can go on from.
        self._run = ResumableRun(self, self._reference)

    @property
    def policy(self) -> sharding.CallablePolicy:
        """The model as it can be called, whole or divided over ranks, before training and in it."""
        return self._policy

    # ---- The loss ------------------------------------------------------------------------------------------------

    def pair_loss(self, pairs: PairTensors) -> Tensor:
        """Loss of each pair, by ``loss_type``; override this to train with a loss of your own.

        What is returned is weighted by language and averaged over all trained pairs of the optimizer step, whatever the
        grouping, the accumulation or the number of ranks. A call may hold some of a micro-batch's pairs only
        (``max_tokens_per_call``), so the loss of a pair must not depend on the others. It is given what ``loss_type``
        needs; to give recipes a name for a loss, see :func:`mpo.training.objectives.register_objective`. Pairs of harmless
        groups (``pairs.is_harmless``), which have a loss and a mean of their own, are among them where the data have some.

        Args:
            pairs: Tensors with one entry per pair, see :class:`mpo.modeling.pairs.PairTensors`.

        Returns:
            ``[T]``, differentiable with respect to the policy.
        """
        adapted = self.retain_weights if self.model.training else None
        return pair_losses(pairs, self.args, None if adapted is None else adapted.values)

    def _checked_pair_loss(self, pairs: PairTensors) -> Tensor:
        losses = self.pair_loss(pairs)
        if losses.shape != pairs.chosen_logps.shape:
            raise ConfigError(
                f"`pair_loss` returned shape {tuple(losses.shape)}; expected {tuple(pairs.chosen_logps.shape)}, one "
                "value per target pair."
            )
        return losses

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """One micro-batch's share of the step's mean: the sum of its pairs' losses over the step's number of pairs."""
        kwargs = {"output_router_logits": True} if self.aux_loss_enabled else {}
        pairs, output = run_model(model, inputs, **kwargs)
        losses = self._checked_pair_loss(pairs)
        count = inputs["num_pairs"] if num_items_in_batch is None else num_items_in_batch
        loss = (losses * pair_weights(inputs)).sum()
        if self.aux_loss_enabled:
            # The router's loss of a micro-batch counts like each of its pairs.
            loss = loss + self.router_aux_loss_coef * output.aux_loss * inputs["num_pairs"]  # type: ignore[operator]
        loss = loss / count
        if self.model.training:
            self._metrics_per_language.add(pairs, inputs["counts"])
            self._finite.add(loss.detach(), inputs)
            if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
                # DeepSpeed takes the optimizer step at the end of this micro-batch's backward pass.
                self._require_finite()
            # Gradients are averaged over ranks afterwards, while the step's mean is over all ranks' pairs.
            loss = loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    # ---- The step ------------------------------------------------------------------------------------------------

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch, in one model call or, where the collator split it, in several."""
        if "calls" not in inputs:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        model.train()
        inputs = self._prepare_inputs(inputs)
        count = inputs["num_pairs"] if num_items_in_batch is None else num_items_in_batch
        total = torch.zeros((), device=self.accelerator.device)

        def backward(pairs: PairTensors, places: Tensor) -> None:
            loss = (self._checked_pair_loss(pairs) * pair_weights(inputs)[places]).sum() / count
            self._metrics_per_language.add(pairs, inputs["counts"][places])
            self.accelerator.backward(loss)
            total.add_(loss.detach())

        with self.maybe_activation_offload_context:
            run_in_calls(model, inputs, backward)
        self._finite.add(total, inputs)
        return total

    def _prepare_input(self, data: Any) -> Any:
        # Not the library's for tensors: it waits for each copy, and rounds reference values under DeepSpeed in bf16.
        if isinstance(data, Tensor):
            return data.to(self.accelerator.device, non_blocking=True)
        return super()._prepare_input(data)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Number of pairs of the optimizer step, over its micro-batches and all ranks. The step's means go with them."""
        totals = summed(batch_samples, self.accelerator)
        means = step_of(totals)
        if self.data_collator.trained.mismatched:
            with sharding.inference(self._policy.callable(), self.accelerator) as model:
                means["step"]["kl"] = reference_point(model, batch_samples, self.accelerator)
        for batch in batch_samples:
            batch |= means
        count: Tensor | int = sum(totals[::4])
        return count

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Called once per optimizer step, after the gradients are final and before the optimizer moves.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._require_finite(norm)
        self._finite.clear()
        if self.retain_weights is not None:
            self.retain_weights.step(self.accelerator, taken=not self._finite.skips)
        return norm

    def _require_finite(self, grad_norm: Any = 0.0) -> None:
        if (what := self._finite.not_finite(grad_norm)) is not None:
            self._finite.stop(what, self.model, self._checkpoint_folder, save=self._save_if_saving)

    # ---- The data ------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset:
        with args.main_process_first(desc="tokenizing"):
            tokenized, dropped = tokenize_for_training(dataset, processing_class, args, name=dataset_name)
        if dropped:
            logger.warning(
                f"{len(dropped)} rows of the {dataset_name} data were dropped, the first: {dropped[0]}"
            )
            self.dropped_rows.extend(dropped)
        return tokenized

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(self.train_dataset.column_names)  # type: ignore[assignment]

    @property
    def _eval_datasets(self) -> list[Dataset]:
        data = self.eval_dataset
        return list(data.values()) if isinstance(data, dict) else [] if data is None else [data]

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Loader of this rank's micro-batches. Its order depends on ``data_seed`` (or ``seed``) and the epoch only."""
        reference = self._reference_of(self.train_dataset)
        groups = self.trained_groups = reference.groups_above(self.args.min_source_gap)
        if self.args.min_source_gap is not None:
            kept = self.train_dataset.select(groups)
            self.data_collator.weigh_languages(kept, self.args.language_weights)
        return training_loader(
            self.train_dataset,
            reference,
            groups,
            self.data_collator,
            self.args,
            self.accelerator,
            batch_size=self._train_batch_size,
        )

    # ---- The reference -------------------------------------------------------------------------------------------

    def _reference_of(
        self, dataset: Dataset, name: str = "train", *, evaluation: bool = False
    ) -> GroupReference:
        """Reference values of a prepared dataset, computed or read when first asked for."""
        stored, of_harmless = (
            needed_for(args, evaluation=evaluation) for args in (self.args, self.args.harmless)
        )
        values = self._reference.values(dataset, name, stored, of_harmless)
        self.data_collator.shape = self._reference.shape  # with the layout that the model takes
        return values

    def _prepare_references(self) -> None:
        """Run or read the reference of all data, before the first step changes anything."""
        self.source_report = self._reference_of(self.train_dataset).report(
            self.args.min_source_gap, is_goal=SOURCE_GAP in self.args.objectives.needs
        )
        for i, dataset in enumerate(self._eval_datasets):
            self._reference_of(dataset, "eval" if i == 0 else f"eval {i}", evaluation=True)
        self._reference.release()

    # ---- Training ------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train. Where checkpoints are saved, SIGINT, SIGTERM and SIGUSR1 end the run after the current step, with one.

        Args:
            resume_from_checkpoint: A checkpoint's folder; True for the last complete one in ``output_dir``; ``"auto"``
                for the same if there is one, else a fresh start.
            trial, ignore_keys_for_eval: As in ``transformers.Trainer``.

        Raises:
            StorageError: There is no complete checkpoint to resume from.
            ConfigError: The checkpoint was made with other settings or another order of the data.
            TrainingError: A loss or gradient is not finite, or a collapse was seen with ``stop_on_collapse``.
            StoppedBySignal: A signal has ended the run; the state of its last step is saved.
        """
        check_probe_is_asked(self.args, self.args.metric_for_best_model, self.callback_handler.callbacks)
        checkpoint = self.resolve_checkpoint(resume_from_checkpoint)
        self._prepare_references()
        saves = self.args.save_strategy != "no" or self.args.enable_jit_checkpoint
        self._last_step, self._finite.stopped_by = LastStep(), 0
        if self.retain_weights is not None:
            self.retain_weights.forget_step()  # of a run that an error has ended within one
        with own_errors(self.args), self._signals if saves else nullcontext():
            self._run.set_earlier_aside(checkpoint)
            return super().train(
                resume_from_checkpoint=checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval
            )

    @property
    def resume_changes(self) -> list[str]:
        """What was changed on purpose where the run was resumed: ``from step 3: learning_rate 0.001 → 0.0005``."""
        return self._run.changes

    def resolve_checkpoint(self, resume: str | os.PathLike[str] | bool | None) -> str | None:
        """The checkpoint that :meth:`train` would resume from if given this, which is complete and fits the run.

        Raises:
            StorageError, ConfigError: As :meth:`train`.
        """
        return self._run.find_checkpoint(resume)

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer where there is none yet, as in ``transformers.Trainer``."""
        optimizer = super().create_optimizer(model)
        self._run.optimizer_created(optimizer)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._run.restored(checkpoint, self.optimizer, self.lr_scheduler)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        started: tuple[int, int] = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        # A checkpoint's state brings along how often its run logged, evaluated and saved.
        self.state.compute_steps(self.args, max_steps)
        return self._run.position(started, max_steps, num_train_epochs)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> tuple[Any, Any]:
        with without_second_sharding(self.model, self.accelerator):
            prepared: tuple[Any, Any] = super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        # Then `_get_grad_norm` stops the run.
        sharding.skip_steps_that_overflow(self.model_wrapped, self.accelerator)
        return prepared

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Any,
        model: Any,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        if self._finite.stopped_by:
            self._last_step.direct(self.control, self.state)
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        if self._finite.stopped_by:
            # Nothing of what follows a finished run: it may even remove the last checkpoint in favour of the best one.
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            self.is_in_train = False
            raise StoppedBySignal(self._finite.stopped_by)
        output: TrainOutput = super()._finalize_training(trial, num_train_samples, start_time)
        warn_if_none_is_best(self.args, self.state)
        if self.retain_weights is not None:
            self.retain_weights.warn_if_missed()
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics per language to a training log, see :meth:`mpo.training.metrics.LanguageMetrics.log`."""
        if self.model.training and "loss" in logs:
            metrics = self._metrics_per_language.log(self.state.global_step, self.accelerator)
            logs.update(metrics)
            for collapse in [found for each in self._collapse for found in each.watch(metrics)]:
                if self.args.stop_on_collapse:
                    self._save_if_saving()
                    raise TrainingError(f"Stopped at step {self.state.global_step}: {collapse}.")
                logger.warning(
                    f"At step {self.state.global_step}, {collapse} (`stop_on_collapse: true` does)."
                )
        # Not DPOTrainer's, which adds metrics of its own.
        Trainer.log(self, logs, start_time)

    # ---- Evaluation ----------------------------------------------------------------------------------------------

    def score(self, dataset: Any = None, *, description: str = "Scoring held-out pairs") -> Scores:
        """Score every pair of a dataset, sources included, with the current weights.

        All ranks call this and get the same result.

        Args:
            dataset: Prepared or raw groups; None for the evaluation dataset, a name for one of several.
            description: Text of the progress bar.

        Raises:
            DataError: There is no dataset.
        """
        return self._score(self._evaluation_data(dataset), description)[0]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and reward gap per language on held-out groups, each pair weighing the same.

        Args:
            eval_dataset: As for :meth:`score`, or a dictionary of datasets.
            ignore_keys, metric_key_prefix: As in ``transformers.Trainer``.

        Returns:
            ``eval_loss``, ``eval_loss/retention``, and per language, the source's among them, ``eval_reward_gap/<language>``
            and the other names of the training log. ``eval_gap_to_source`` of the source is how far its gap has moved.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics: dict[str, float] = {}
        if isinstance(data, dict):
            for name, part in data.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        start = time.monotonic()
        scores, loss = self._score(self._evaluation_data(eval_dataset), "Evaluating")
        found = evaluation_metrics(
            scores, loss, list(dict.fromkeys([*self.languages, self.args.source_language]))
        )
        found["runtime"] = time.monotonic() - start
        self._metrics_per_language.pause(found["runtime"])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Refused: evaluation packs its own batches, with reference values."""
        raise ConfigError(
            "MPOTrainer has no evaluation dataloader: `trainer.evaluate()` gives the metrics, `trainer.score()` every pair."
        )

    def predict(self, *arguments: Any, **named: Any) -> Any:
        """Refused: there are no logits to return."""
        raise ConfigError(
            "MPOTrainer builds no logits, so it has no predictions: `trainer.score(dataset)` gives the score of every pair."
        )

    def _evaluation_data(self, dataset: Any) -> Dataset:
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        elif dataset is None:
            dataset = self.eval_dataset
        if dataset is None:
            raise DataError(
                "there is no evaluation data; pass `eval_dataset` to the trainer or to this call."
            )
        if isinstance(dataset, dict):
            raise DataError(f"there are several evaluation datasets; name one of {', '.join(dataset)}.")
        prepared = set(TOKENIZED_FEATURES) - {"errors"}
        if isinstance(dataset, Dataset) and set(dataset.column_names) - {"kind"} == prepared:
            return dataset
        groups = as_groups(dataset, source_language=self.args.source_language, bad_rows=self.args.bad_rows)
        return self._prepare_dataset(groups, self.processing_class, self.args, "eval")

    def _score(self, dataset: Dataset, description: str) -> tuple[Scores, float]:
        """Scores of a prepared dataset, and the mean of :meth:`pair_loss` over its pairs that training would train on."""
        check_languages(target_languages(dataset), self.languages)
        reference = self._reference_of(dataset, "eval", evaluation=True)
        with sharding.inference(self._policy.callable(), self.accelerator) as model:
            return score_dataset(
                model,
                dataset,
                reference,
                languages=self.languages,
                source_language=self.args.source_language,
                shape=self.data_collator.shape,
                ranks=self.accelerator,
                batch_size=self.args.per_device_eval_batch_size,
                trained=self.data_collator.trained,
                harmless=Trained.by(self.args.harmless),
                pair_loss=self.pair_loss,
                description=description,
                progress=not self.args.disable_tqdm,
            )

    # ---- Saving --------------------------------------------------------------------------------------------------

    @property
    def _checkpoint_folder(self) -> Path:
        """Of the current step, saved or not."""
        return Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"

    def _save_if_saving(self) -> None:
        """Save a checkpoint of the state as it is, if the run saves any and there has been a step."""
        if self.state.global_step > 0 and self.args.save_strategy != "no":
            self._save_checkpoint(self.model_wrapped, trial=None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        def write() -> str | None:
            # Not DPOTrainer's: it rewrites the model card at every checkpoint.
            Trainer._save_checkpoint(self, model, trial)
            return self.state.best_model_checkpoint

        # The library would remove old checkpoints before the new one is complete.
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            save_checkpoint(self._checkpoint_folder, write, self._run.state(), self.accelerator, keep=keep)
        finally:
            self.args.save_total_limit = keep

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, or its adapter, whole: what is saved loads on one CPU, however many ranks have trained it.

        All ranks call this; the main process writes.
        """
        if self.is_fsdp_enabled and not _internal_call:
            # The base class saves nothing here where checkpoints are kept in shards (`SHARDED_STATE_DICT`).
            self._save(output_dir, state_dict=sharding.fsdp_whole_state(self.model, self.accelerator))
        elif self.is_deepspeed_enabled and sharding.sharding_name(self.accelerator) != "ZeRO-3":
            # Weights are whole on each rank; the base class copies them, and saves tied ones twice.
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of the arguments (without tokens, see `MPOConfig.__getstate__`), which no one needs and some fear.
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir or ".") / "training_args.bin").unlink(missing_ok=True)

    def _send_telemetry(self) -> None:
        """Send nothing: an offline run must not wait for a server."""
