"""The trainer: a ``trl.DPOTrainer`` whose step is one model call on packed preference trees."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from safetensors import SafetensorError
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
from mpo.common.files import is_full_disk
from mpo.common.log import get_logger
from mpo.data import as_groups
from mpo.data.tokenization import TOKENIZED_FEATURES, set_chat_template, tokenize_groups
from mpo.errors import (
    ConfigError,
    DataError,
    DependencyError,
    ModelError,
    MPOError,
    StorageError,
    TrainingError,
)
from mpo.modeling.adapters import spare_input_copies
from mpo.modeling.head import attach_reward_gap_head
from mpo.modeling.identity import identify_module
from mpo.modeling.layout import CALL_TOKENS, batch_shape, usable_layout
from mpo.modeling.loading import ModelSource, load_tokenizer
from mpo.modeling.loss import mpo_loss, reward_gap, reward_gap_loss
from mpo.modeling.opening import OpenedModel, open_model
from mpo.planning.memory import device_memory, step_needs_checkpointing
from mpo.training.checkpoints import (
    is_complete,
    last_complete_checkpoint,
    mark_complete,
    rotate,
    saved_state,
    set_aside,
)
from mpo.training.collapse import CollapseDetector
from mpo.training.compute import check_compute_options
from mpo.training.config import MPOConfig
from mpo.training.records import Scores
from mpo.training.reference import SourceReference, build_or_load, fingerprint_rows
from mpo.training.sampling import (
    EpochSampler,
    GroupBatchSampler,
    GroupCollator,
    GroupDataLoader,
    GroupDataset,
    TokenBudgetSampler,
    group_tokens,
    language_weights,
    longest_tree,
)
from mpo.training.scoring import (
    PairTensors,
    count_languages,
    evaluation_loader,
    probe_trees,
    run_in_calls,
    run_model,
    score_loader,
)
from mpo.training.sharding import (
    check_sharding,
    deepspeed_inference_engine,
    fsdp_reshard,
    fsdp_shard,
    fsdp_shard_reference,
    fsdp_sharded_before,
    is_fsdp_sharded,
    launched_with,
    local_part,
    sharding_name,
)

logger = get_logger(__name__)

# Sums kept per language between two logs, in the columns of one fixed matrix, so that reducing it over ranks is one
# call whose size does not depend on which languages a rank has seen.
_COUNT, _GAP, _TO_SOURCE, _POSITIVE, _CHOSEN, _REJECTED, _GAP_LOSS, _RETENTION = range(8)

# Initialisations under which a fresh adapter computes exactly what the base model does.
_NEUTRAL_ADAPTER_INITS = (True, "gaussian", "orthogonal", "eva", "mica")

# Arguments of `from_pretrained` that are passed on by name or set here.
_OWN_INIT_KWARGS = ("revision", "trust_remote_code", "use_safetensors", "dtype", "attn_implementation")

_OVERFLOWS_BEFORE_STOP = 25


class MPOTrainer(DPOTrainer):
    """
    Trains a causal language model with MPO, *Multilingual reward gaP Optimization* (Zhao et al., ACL 2025,
    arXiv 2505.16869).

    The reward gap between chosen and rejected answers in each target language is pulled to the gap that the starting
    policy has on the same pair in its dominant language, whose hidden states are held still. Before the first step a
    pass over the unique sources computes what the starting policy says of them (:mod:`mpo.training.reference`); no reference
    model is in memory while training.

    Example:
        >>> from mpo import MPOConfig, MPOTrainer
        >>> from peft import LoraConfig
        >>> trainer = MPOTrainer(
        ...     model="Qwen/Qwen2.5-0.5B-Instruct",
        ...     args=MPOConfig(output_dir="out", beta=1.5, learning_rate=2e-4),
        ...     train_dataset=load_groups("pairs.jsonl").groups,
        ...     peft_config=LoraConfig(r=16, target_modules="all-linear"),
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

    To change the loss, override :meth:`pair_loss`; it is given tensors with one entry per target pair and knows nothing
    of trees, rows or ranks.

    Args:
        model: Hub id or folder of a model, a loaded model, or a PEFT model whose adapter is trained further (the
            reference is then that adapter as it is at the start).
        ref_model: explicit reference model. Unset: the starting policy. Freed after the reference pass.
        args: settings.
        data_collator: refused, since MPO's step needs its own.
        train_dataset: groups in any form that :func:`mpo.data.as_groups` accepts.
        eval_dataset: held-out groups, in the same forms.
        processing_class: tokenizer of the model; loaded from the model's folder or id if unset.
        compute_metrics: refused, since no logits are built. Metrics per language are always computed.
        callbacks, optimizers: as in ``transformers.Trainer``.
        quantization_config: for QLoRA, with ``model`` given by name.
        peft_config: wraps the model in a new adapter.

    Raises:
        ConfigError: settings contradict each other or the model.
        DataError: a row breaks the data contract.
        ModelError: the model or tokenizer cannot be loaded or used.
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
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = MPOConfig(output_dir=f"{Path(name).name}-MPO")
        if not isinstance(args, MPOConfig):
            raise ConfigError(f"`args` is a {type(args).__name__}; expected an `mpo.MPOConfig`.")
        _refuse(data_collator=data_collator, compute_metrics=compute_metrics)
        if train_dataset is None:
            raise DataError("`train_dataset` is missing; expected groups, see `mpo.data.load_groups`.")
        if ref_model is model:
            raise ConfigError(
                "`ref_model` is the model itself. Leave it out: the reference is the starting policy."
            )

        if quantization_config is not None and not isinstance(model, str):
            raise ConfigError(
                "`quantization_config` was given with a loaded model; quantization happens while loading. Pass the "
                "model's name or folder instead."
            )
        check_compute_options(
            args,
            load_in_4bit=getattr(quantization_config, "load_in_4bit", False),
            load_in_8bit=getattr(quantization_config, "load_in_8bit", False),
        )
        if args.decide_checkpointing and _sharded(args):
            _set_checkpointing(args, "", True)
        plugin = getattr(args, "deepspeed_plugin", None)
        if args.gradient_checkpointing and plugin is not None and plugin.zero_stage == 3:
            # A layer that is recomputed gathers its weights again, which the other form takes for a change of shape.
            kwargs: Any = args.gradient_checkpointing_kwargs or {}
            _set_checkpointing(args, "_kwargs", {**kwargs, "use_reentrant": True})
        set_seed(args.seed)
        self._model_source = model if isinstance(model, str) else None
        if isinstance(model, str):
            opened = _open(model, args, processing_class)
            processing_class, args.chat_template_kwargs = (
                opened.tokenizer,
                opened.chat_template_kwargs or None,
            )
            model = opened.load(quantization_config=quantization_config, **_init_kwargs(args))
        if processing_class is None:
            name = get_config_model_id(model.config)
            if not name:
                raise ModelError(
                    "the model was not loaded from anywhere: pass its tokenizer as `processing_class`."
                )
            processing_class = load_tokenizer(_source(name, args), args.chat_template)
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise ModelError(
                f"`processing_class` is a {type(processing_class).__name__}; MPO trains on text and needs a tokenizer."
            )
        set_chat_template(
            processing_class, args.chat_template, get_config_model_id(model.config) or "the tokenizer"
        )
        _check_adapter(model, peft_config)
        check_adapter_config(
            peft_config if peft_config is not None else getattr(model, "active_peft_config", None)
        )
        continues_adapter = hasattr(model, "peft_config")

        self._explicit_reference = ref_model
        self._reference_wrapped: Any = None
        self._early_engine: Any = None
        self._reference_without_adapter = (
            peft_config is not None
            and getattr(peft_config, "init_lora_weights", True) in _NEUTRAL_ADAPTER_INITS
        )
        self._fingerprint: str | None = None
        self._references: list[tuple[Dataset, SourceReference]] = []
        self._had_explicit_reference = ref_model is not None
        self.dropped_rows: list[str] = []
        """One sentence for each row that tokenization dropped (``bad_rows="drop"``)."""
        self.source_report: dict[str, int] = {}
        """After the reference pass: ``sources``, ``not_positive`` (gap of 0 or less) and ``dropped``."""

        collator = GroupCollator([], [], args.batch_layout, 1, 0, args.retain_pooling)
        groups_of = lambda data: as_groups(data, source_language=args.source_language, bad_rows=args.bad_rows)  # noqa: E731
        with _no_reference_model(), _as_own_errors(args):
            super().__init__(
                model=model,
                args=args,
                data_collator=collator,
                train_dataset=groups_of(train_dataset),
                eval_dataset=_map_datasets(groups_of, eval_dataset),
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
            )
        if continues_adapter and "ref" in self.model.peft_config:
            # The reference pass runs before the adapter changes, so no frozen copy of it is needed, or saved.
            self.model.delete_adapter("ref")
        check_sharding(self.accelerator)
        _check_master_weights(self.model, self.is_deepspeed_enabled or self.is_fsdp_enabled)
        bare = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        attach_reward_gap_head(bare)
        spare_input_copies(self.model)
        self._text_config = bare.config.get_text_config()

        datasets = [self.train_dataset, *_datasets(self.eval_dataset)]
        self.languages: list[str] = sorted(
            {language for data in datasets for language in count_languages(data)}
        )
        """Target languages, sorted; a pair's language is its index here."""
        assert isinstance(self._tokenizer.pad_token_id, int)
        self._shape = batch_shape(
            self.accelerator.device,
            layout=args.batch_layout,
            pad_token_id=self._tokenizer.pad_token_id,
            pooling=args.retain_pooling,
            max_tokens_per_row=args.max_tokens_per_row,
            tokens_per_batch=args.reference_tokens_per_batch,
            attention=self._text_config._attn_implementation,
        )
        self._layout_checked = False
        self.data_collator = GroupCollator(
            languages=self.languages,
            language_weights=[1.0] * len(self.languages),
            layout=self._shape.layout,
            max_tokens_per_row=self._shape.max_tokens_per_row,
            pad_token_id=self._shape.pad_token_id,
            pooling=self._shape.pooling,
            run_source=args.retain_weight > 0,
            pad_to_multiple_of=args.pad_to_multiple_of or None,  # type: ignore[arg-type]
            max_tokens_per_call=self._tokens_per_call(),
        )
        self._weigh_languages(self.train_dataset)
        self._decide_checkpointing()
        self._sums = torch.zeros((len(self.languages), 8), device=self.accelerator.device)
        self._last_log: tuple[float, int] | None = None
        self._step_loss: Tensor | None = None
        self._step_groups: list[tuple[str, list[int]]] = []
        self._overflows = 0
        self._collapse = CollapseDetector(args.collapse_window, args.collapse_drop)

    # ---- The objective -------------------------------------------------------------------------------------------

    def pair_loss(self, pairs: PairTensors) -> Tensor:
        """
        Loss of each target pair; override this to train with a loss of your own.

        What is returned is weighted by language and averaged over all target pairs of the optimizer step, whatever the
        grouping, the accumulation or the number of ranks. A call may hold some of a micro-batch's pairs only
        (``max_tokens_per_call``), so the loss of a pair must not depend on the others.

        Args:
            pairs: tensors with one entry per target pair, see :class:`mpo.training.scoring.PairTensors`.

        Returns:
            ``[T]``, differentiable with respect to the policy.
        """
        gap = reward_gap(pairs.chosen_logps, pairs.rejected_logps)
        return mpo_loss(
            gap,
            pairs.reference_gap,
            pairs.retention,
            beta=self.args.beta,
            retain_weight=self.args.retain_weight,
        )

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
        loss = (losses * inputs["weight"]).sum()
        if self.aux_loss_enabled:
            # The router's loss of a micro-batch counts like each of its pairs.
            loss = loss + self.router_aux_loss_coef * output.aux_loss * inputs["num_pairs"]  # type: ignore[operator]
        loss = loss / count
        if self.model.training:
            self._accumulate(pairs, inputs["counts"])
            self._remember(loss.detach(), inputs)
            if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
                # DeepSpeed takes the optimizer step at the end of this micro-batch's backward pass.
                self._require_finite()
            # Gradients are averaged over ranks afterwards, while the step's mean is over all ranks' pairs.
            loss = loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch, in one model call or, where the collator split it, in several."""
        if "calls" not in inputs:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.maybe_activation_offload_context:
            return self._step_in_calls(model, inputs, num_items_in_batch)

    def _step_in_calls(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        count = inputs["num_pairs"] if num_items_in_batch is None else num_items_in_batch
        total = torch.zeros((), device=self.accelerator.device)

        def backward(pairs: PairTensors, places: Tensor) -> None:
            loss = (self._checked_pair_loss(pairs) * inputs["weight"][places]).sum() / count
            self._accumulate(pairs, inputs["counts"][places])
            self.accelerator.backward(loss)
            total.add_(loss.detach())

        run_in_calls(model, inputs, backward)
        self._remember(total, inputs)
        return total

    def _prepare_input(self, data: Any) -> Any:
        # Not the library's for tensors: it waits for each copy, and rounds reference values under DeepSpeed in bf16.
        if isinstance(data, Tensor):
            return data.to(self.accelerator.device, non_blocking=True)
        return super()._prepare_input(data)

    def _decide_checkpointing(self) -> None:
        """Recompute activations where memory asks for it, unless the user has said whether to."""
        memory = device_memory(self.accelerator.device)
        if not self.args.decide_checkpointing or memory is None or _sharded(self.args):
            return
        groups = np.sort(
            group_tokens(
                self.train_dataset, run_source=self.args.retain_weight > 0, layout=self._shape.layout
            )
        )
        tokens = int(groups[-self._train_batch_size :].sum())
        if self.args.max_tokens_per_batch is not None:
            tokens = max(int(groups[-1]), min(self.args.max_tokens_per_batch, int(groups.sum())))
        call = min(tokens, self._tokens_per_call() or tokens)
        try:
            needed = step_needs_checkpointing(
                self.model,
                tokens=call,
                row_tokens=self._shape.max_tokens_per_row,
                tree_tokens=longest_tree(self.train_dataset),
                half=self.accelerator.mixed_precision in ("bf16", "fp16"),
                processes=self.accelerator.num_processes,
                accumulates=self.args.gradient_accumulation_steps > 1 or call < tokens,
                device_bytes=memory,
            )
        except (
            Exception
        ) as error:  # an estimate must not stop a run: the model may have parts that need real tensors
            logger.warning(
                f"The memory of a step cannot be estimated ({type(error).__name__}), so activations are kept. Set "
                "`gradient_checkpointing: true` if it does not fit."
            )
            return
        if needed:
            logger.warning(
                f"Activations are recomputed: a micro-batch of {tokens} tokens would not fit into {memory / 1e9:.0f} GB "
                "otherwise. `gradient_checkpointing: false` insists on keeping them."
            )
            _set_checkpointing(self.args, "", True)
            if hasattr(self.model, "peft_config"):
                self.model.enable_input_require_grads()

    def _tokens_per_call(self) -> int | None:
        wanted = self.args.max_tokens_per_call
        split = (
            self.accelerator.num_processes == 1
            and not (self.is_deepspeed_enabled or self.is_fsdp_enabled or self.aux_loss_enabled)
            and not self.args.fp16
        )
        if wanted is not None and not split:
            raise ConfigError(
                f"`max_tokens_per_call` is {wanted}, but a micro-batch is one model call with several processes, "
                "DeepSpeed, FSDP, fp16 or a mixture-of-experts model. Remove it, and lower "
                "`max_targets_per_group` to save memory."
            )
        return wanted or (CALL_TOKENS.get(self.accelerator.device.type) if split else None)

    def _checked_pair_loss(self, pairs: PairTensors) -> Tensor:
        losses = self.pair_loss(pairs)
        if losses.shape != pairs.chosen_logps.shape:
            raise ConfigError(
                f"`pair_loss` returned shape {tuple(losses.shape)}; expected {tuple(pairs.chosen_logps.shape)}, one "
                "value per target pair."
            )
        return losses

    def _remember(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        """Keep what the check before the optimizer step needs: the step's loss so far, and the rows it is made of."""
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        self._step_groups.extend(zip(inputs["origins"], inputs["rows"], strict=True))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Number of target pairs of the optimizer step, over its micro-batches and all ranks."""
        count = sum(batch["num_pairs"] for batch in batch_samples)
        if self.accelerator.num_processes == 1:
            return count
        total = self.accelerator.reduce(torch.full((), float(count), device=device), reduction="sum")
        assert isinstance(total, Tensor)
        return total

    def _accumulate(self, pairs: PairTensors, counts: Tensor) -> None:
        with torch.no_grad():
            gap = reward_gap(pairs.chosen_logps, pairs.rejected_logps)
            columns = [torch.ones_like(gap)] * 8
            columns[_GAP] = gap
            columns[_TO_SOURCE] = gap - pairs.reference_gap
            columns[_POSITIVE] = (gap > 0).to(gap.dtype)
            columns[_CHOSEN] = pairs.chosen_logps
            columns[_REJECTED] = pairs.rejected_logps
            columns[_GAP_LOSS] = reward_gap_loss(gap, pairs.reference_gap, self.args.beta)
            columns[_RETENTION] = pairs.retention
            values = torch.stack(columns, dim=1).to(self._sums.dtype) * counts[:, None]
            self._sums.index_add_(0, pairs.language, values)

    # ---- Data ----------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset:
        with args.main_process_first(desc="tokenizing"):
            tokenized, dropped = tokenize_groups(
                dataset,
                processing_class,
                max_length=args.max_length,
                max_response_length=args.max_response_length,
                template_kwargs=args.chat_template_kwargs,
                bad_rows=args.bad_rows,
                group_by_source=args.group_by_source,
                max_targets_per_group=args.max_targets_per_group,
                num_proc=args.dataset_num_proc,
                name=dataset_name,
            )
        if dropped:
            logger.warning(
                f"{len(dropped)} rows of the {dataset_name} data were dropped, the first: {dropped[0]}"
            )
            self.dropped_rows.extend(dropped)
        return tokenized

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(self.train_dataset.column_names)  # type: ignore[assignment]

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Loader of this rank's micro-batches. Its order depends on ``data_seed`` (or ``seed``) and the epoch only."""
        args = self.args
        reference = self._reference_of(self.train_dataset)
        indices = np.arange(len(self.train_dataset))
        if args.min_source_gap is not None:
            indices = indices[reference.gap > args.min_source_gap]
            if len(indices) == 0:
                raise DataError(
                    f"no source has a reference gap above min_source_gap={args.min_source_gap}; the largest is "
                    f"{float(reference.gap.max()):.3f}. Lower `min_source_gap`, or check that chosen and rejected are not "
                    "swapped."
                )
            self._weigh_languages(self.train_dataset.select_columns(["target_language"]).select(indices))
        sampler = self._train_sampler(indices)
        if len(sampler) == 0:
            raise DataError(
                f"{len(indices)} groups are less than one micro-batch on each of {self.accelerator.num_processes} ranks, "
                "and `dataloader_drop_last` drops them."
            )
        workers = args.dataloader_num_workers
        return GroupDataLoader(
            GroupDataset(self.train_dataset, reference),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and self.accelerator.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers if workers else False,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        )

    def _train_sampler(self, indices: np.ndarray) -> EpochSampler:
        """What draws this rank's micro-batches from the groups with these indices: by count, or by tokens."""
        args = self.args
        options: dict[str, Any] = {
            "num_ranks": self.accelerator.num_processes,
            "rank": self.accelerator.process_index,
            "seed": args.data_seed if args.data_seed is not None else args.seed,
            "drop_last": args.dataloader_drop_last,
        }
        if args.max_tokens_per_batch is None:
            return GroupBatchSampler(indices, self._train_batch_size, **options)
        self._check_layout()
        tokens = group_tokens(
            self.train_dataset, run_source=args.retain_weight > 0, layout=self._shape.layout
        )
        sampler = TokenBudgetSampler(indices, tokens[indices], args.max_tokens_per_batch, **options)
        if sampler.oversized:
            logger.warning(
                f"{sampler.oversized} groups have more than max_tokens_per_batch={args.max_tokens_per_batch} tokens (the "
                f"largest {int(tokens[indices].max())}) and are micro-batches of their own. `max_targets_per_group` makes "
                "groups smaller."
            )
        return sampler

    def _weigh_languages(self, groups: Dataset) -> None:
        """Weight the languages so that the mean weight is 1 over the pairs of these groups."""
        pairs = count_languages(groups)
        self.data_collator.language_weights = language_weights(
            self.languages, pairs, self.args.language_weights
        )

    # ---- The reference -------------------------------------------------------------------------------------------

    def _reference_of(self, dataset: Dataset, name: str = "train") -> SourceReference:
        """Reference values of a prepared dataset, computed or read when first asked for."""
        for known, values in self._references:
            if known is dataset:
                return values
        if self._had_explicit_reference and self._explicit_reference is None:
            raise ModelError(
                "the reference of new data is asked for after `ref_model` was freed. Pass the data as `eval_dataset` when "
                "the trainer is made."
            )
        if self.state.global_step > 0 and not (self._reference_without_adapter or self._explicit_reference):
            raise ModelError(
                "the reference of new data is asked for after training has begun, when the starting policy is gone. "
                "Pass the data as `eval_dataset` when the trainer is made, or pass `ref_model`."
            )
        reference = build_or_load(
            dataset,
            self._reference_forward,
            cache_dir=self.args.reference_folder(),
            key=self._reference_key(),
            shape=self._shape,
            hidden_size=self._text_config.hidden_size,
            ranks=self.accelerator,
            name=name,
        )
        if any(dataset is own for own in (self.train_dataset, *_datasets(self.eval_dataset))):
            self._references.append((dataset, reference))
        return reference

    def _prepare_references(self) -> None:
        """Run or read the reference of all data and settle the batch layout, before the first step changes anything."""
        self._check_layout()
        reference = self._reference_of(self.train_dataset)
        for i, dataset in enumerate(_datasets(self.eval_dataset)):
            self._reference_of(dataset, "eval" if i == 0 else f"eval {i}")
        gaps = reference.store.gaps()
        limit = self.args.min_source_gap
        dropped = gaps <= limit if limit is not None else np.zeros(len(gaps), dtype=bool)
        self.source_report = {
            "sources": len(gaps),
            "not_positive": int((gaps <= 0).sum()),
            "dropped": int(dropped.sum()),
        }
        if count := int(((gaps <= 0) & ~dropped).sum()):
            logger.warning(
                f"{count} of {len(gaps)} sources that are trained on have a reference gap of 0 or less: on them the model "
                "prefers the rejected answer in its dominant language, too, and teaches that to the target languages. "
                "`min_source_gap: 0.0` drops them."
            )
        # The explicit reference has said all it will be asked.
        for engine in (self._early_engine, self._reference_wrapped):
            if hasattr(engine, "destroy"):
                engine.destroy()
        self._explicit_reference = self._reference_wrapped = self._early_engine = None

    def _check_layout(self) -> None:
        if self._layout_checked:
            return
        with self._reference_forward() as forward:
            dtype = (
                torch.get_autocast_dtype(self.accelerator.device.type)
                if self._mixed_precision
                else self.model.dtype
            )
            layout = usable_layout(
                forward, probe_trees(self.train_dataset), self._shape, self.accelerator.device, dtype
            )
        self._shape = replace(self._shape, layout=layout)
        self.data_collator.layout = layout
        self._layout_checked = True

    @property
    def _mixed_precision(self) -> bool:
        return self.accelerator.mixed_precision in ("bf16", "fp16")

    @contextmanager
    def _reference_forward(self) -> Iterator[Any]:
        """The reference model's forward: the explicit one, the base below a new adapter, or the policy at its start."""
        if self._explicit_reference is not None:
            model = self._callable_reference()
            adapter_off: Any = nullcontext()
        else:
            model = self._callable_model()
            adapter_off = self.model.disable_adapter() if self._reference_without_adapter else nullcontext()
        was_training = model.training
        model.eval()
        try:
            with adapter_off, self._autocast():
                yield model
        finally:
            model.train(was_training)

    def _callable_model(self) -> Any:
        """What to call for a forward pass. Before training, a model that will be sharded is sharded here."""
        if self.is_deepspeed_enabled and self.model_wrapped is self.model:
            if self._early_engine is None:
                self._early_engine = deepspeed_inference_engine(self.model, self.accelerator)
            return self._early_engine
        if self.is_fsdp_enabled and not is_fsdp_sharded(self.model):
            self.model = self.model_wrapped = fsdp_shard(self.model, self.accelerator)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        return self.model_wrapped if sharded else self.model

    def _callable_reference(self) -> Any:
        if self._reference_wrapped is None:
            model: Any = self._explicit_reference
            attach_reward_gap_head(model)
            if self.is_deepspeed_enabled:
                self._reference_wrapped = deepspeed_inference_engine(model, self.accelerator)
            elif self.is_fsdp_enabled:
                self._reference_wrapped = fsdp_shard_reference(model, self.accelerator)
            else:
                self._reference_wrapped = model.to(self.accelerator.device)
        return self._reference_wrapped

    def _autocast(self) -> Any:
        """Mixed precision of a forward pass, as in training: sharding engines cast the weights themselves."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        return nullcontext() if sharded else self.accelerator.autocast()

    def _reference_key(self) -> dict[str, Any]:
        if self._fingerprint is None:
            found = [self._reference_identity() if self.accelerator.is_main_process else None]
            broadcast_object_list(found, from_process=0)
            assert found[0] is not None
            self._fingerprint = found[0]
        return {"model": self._fingerprint, "mixed_precision": str(self.accelerator.mixed_precision)}

    def _reference_identity(self) -> str:
        files = None
        if self._explicit_reference is None and self._model_source is not None and self._starts_at_files:
            files = _source(self._model_source, self.args)
        adapter_on = self._explicit_reference is not None or not self._reference_without_adapter
        return identify_module(
            self._explicit_reference or self.model, adapter_on=adapter_on, files=files
        ).digest

    @property
    def _starts_at_files(self) -> bool:
        return self._reference_without_adapter or not hasattr(self.model, "peft_config")

    # ---- Training ------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Train.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True for the last complete one in ``output_dir``; ``"auto"``
                for the same if there is one, else a fresh start.

        Raises:
            StorageError: there is no complete checkpoint to resume from.
            ConfigError: the checkpoint was made with another order of the data.
            TrainingError: a loss or gradient is not finite, or a collapse was seen with ``stop_on_collapse``.
        """
        checkpoint = self.resolve_checkpoint(resume_from_checkpoint)
        self._prepare_references()
        with _as_own_errors(self.args):
            self._set_earlier_checkpoints_aside(checkpoint)
            return super().train(
                resume_from_checkpoint=checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval
            )

    def _set_earlier_checkpoints_aside(self, checkpoint: str | None) -> None:
        """Later checkpoints of another run in the output folder must not be taken for this run's own when it resumes."""
        if not self.accelerator.is_main_process:
            return
        folder = Path(self.args.output_dir or ".")
        if found := set_aside(folder, checkpoint):
            logger.warning(
                f"'{folder}' holds checkpoints of an earlier run ({', '.join(path.name for path in found)}) that this run "
                "does not go on from: `resume_from_checkpoint: auto` passes over them from now on. Name one to resume "
                "from it, or choose another `output_dir` to keep runs apart."
            )

    def resolve_checkpoint(self, resume: str | os.PathLike[str] | bool | None) -> str | None:
        """
        The checkpoint that :meth:`train` would resume from, after checking that it fits this run.

        Args:
            resume: as ``resume_from_checkpoint`` of :meth:`train`.

        Raises:
            StorageError, ConfigError: as :meth:`train`.
        """
        if not resume:
            return None
        folder = self.args.output_dir
        assert folder is not None
        if resume is True or resume == "auto":
            # One rank decides for all: on a network file system another may see a new checkpoint later.
            found = self._as_main_sees(last_complete_checkpoint(folder))
            if found is None and resume is True:
                raise StorageError(f"there is no complete checkpoint in '{folder}' to resume from.")
            if found is None:
                return None
            resume = str(found)
        resume = os.fspath(resume)
        if not Path(resume).is_dir():
            raise StorageError(f"the checkpoint '{resume}' to resume from does not exist.")
        if not is_complete(resume):
            raise StorageError(
                f"the checkpoint '{resume}' is not complete: its run ended while it was written, or files are missing. "
                'Resume with "auto" or True, which takes the last complete one.'
            )
        self._check_resumable(resume, saved_state(resume))
        return resume

    def _check_resumable(self, checkpoint: str, saved: dict[str, Any]) -> None:
        form, was = self._state_form(), saved.get("form")
        if was is not None and was != form:
            adapter = "adapter_name_or_path" if hasattr(self.model, "peft_config") else "model_name_or_path"
            raise ConfigError(
                f"the optimizer's states in '{checkpoint}' are kept as {was} needs them, and this run is {form}. Resume "
                f"under the same Accelerate configuration, or start a new run from the weights (`{adapter}: {checkpoint}`), "
                "with a fresh optimizer."
            )
        if self.args.ignore_data_skip:
            return
        now = self._order_state()
        different = [name for name in now if name in saved and saved[name] != now[name]]
        if different and not self._same_steps(different, saved):
            changes = ", ".join(f"{name}: {saved[name]} then, {now[name]} now" for name in different)
            raise ConfigError(
                f"'{checkpoint}' was saved with another order of the data ({changes}), so resuming would repeat some groups "
                "and skip others. Restore the settings (on another number of ranks, groups per rank times ranks times "
                "`gradient_accumulation_steps` must stay the same), or set `ignore_data_skip: true` to begin the epoch anew "
                "from the checkpoint's weights."
            )

    def _same_steps(self, different: list[str], saved: dict[str, Any]) -> bool:
        """Whether all optimizer steps have the same groups as before, only spread otherwise over ranks and micro-batches."""
        factors = ("ranks", "groups_per_micro_batch", "gradient_accumulation_steps")
        if not set(different) <= set(factors) or self.args.dataloader_drop_last:
            return False
        if self.args.max_tokens_per_batch is not None:
            return False  # the groups of a micro-batch are chosen for the number of ranks
        now = self._order_state()
        return math.prod(saved.get(name, 0) for name in factors) == math.prod(now[name] for name in factors)

    def _state_form(self) -> str:
        """How the optimizer's states are kept in a checkpoint: whole, or divided as one engine and number of ranks needs."""
        name = sharding_name(self.accelerator)
        if self.is_deepspeed_enabled:
            return f"{name} on {self.accelerator.num_processes} ranks"
        return name if self.is_fsdp_enabled else "whole"

    def _order_state(self) -> dict[str, Any]:
        """What decides which groups have been seen after a number of steps."""
        args = self.args
        state: dict[str, Any] = {
            "order_version": 1,
            "data_seed": args.data_seed if args.data_seed is not None else args.seed,
            "ranks": self.accelerator.num_processes,
            "groups_per_micro_batch": self._train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "groups": len(self.train_dataset),
            "rows": self._rows_fingerprint,
            "dataloader_drop_last": args.dataloader_drop_last,
            "min_source_gap": args.min_source_gap,
            "max_tokens_per_batch": args.max_tokens_per_batch,
        }
        if args.max_tokens_per_batch is not None:  # these decide how many tokens a group has
            state.update(batch_layout=args.batch_layout, sources_run=args.retain_weight > 0)
        return state

    @cached_property
    def _rows_fingerprint(self) -> str:
        return fingerprint_rows(self.train_dataset)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> tuple[Any, Any]:
        sharded_before: Any = nullcontext()
        if is_fsdp_sharded(self.model):
            fsdp_reshard(self.model)
            sharded_before = fsdp_sharded_before(self.accelerator)
        with sharded_before:
            prepared: tuple[Any, Any] = super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        if self.is_deepspeed_enabled:
            # ZeRO-1 and 2 take a step with a gradient that is not finite, unless told to look; then they skip it, as
            # ZeRO-3 does, and `_get_grad_norm` stops the run.
            self.model_wrapped.optimizer.check_grad_overflow = True
        return prepared

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Called once per optimizer step, after the gradients are final and before the optimizer moves.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._require_finite(norm)
        self._step_loss, self._step_groups = None, []
        return norm

    def _require_finite(self, grad_norm: Any = 0.0) -> None:
        loss = self._step_loss
        device = self.accelerator.device
        norm = torch.as_tensor(grad_norm, dtype=torch.float32, device=device)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        loss = torch.zeros((), device=device) if loss is None else loss.float()
        flags = torch.stack([torch.isfinite(loss), torch.isfinite(norm)]).float()
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MIN)
        loss_finite, norm_finite = (bool(flag) for flag in flags.tolist())
        if loss_finite and norm_finite:
            self._overflows = 0
            return
        if loss_finite and self.accelerator.mixed_precision == "fp16":
            # Under fp16 an overflowing gradient is how the loss scale finds its level; the scaler skips the step.
            self._overflows += 1
            if self._overflows < _OVERFLOWS_BEFORE_STOP:
                return
        self._stop_at_non_finite(loss_finite)

    def _stop_at_non_finite(self, loss_finite: bool) -> None:
        groups = self._step_groups
        if self.accelerator.num_processes > 1:
            groups = gather_object(groups)
        self.model.zero_grad()
        step = self.state.global_step
        output = self.args.output_dir or "."
        # Saving is a collective, and a rank may see another state of the folder, or have all its own weights finite.
        good = self._on_all_ranks(self._weights_are_finite())
        written = self._as_main_sees(is_complete(Path(output) / f"checkpoint-{step}"))
        if step > 0 and self.args.save_strategy != "no" and not written and good:
            # The optimizer has not moved, so the weights are still those of the last good step.
            self._save_checkpoint(self.model_wrapped, trial=None)
        saved = self._as_main_sees(last_complete_checkpoint(output))
        rows = "; ".join(f"{origin} rows {rows}" for origin, rows in groups[:8])
        more = f" and {len(groups) - 8} more groups" if len(groups) > 8 else ""
        raise TrainingError(
            f"the {'gradient' if loss_finite else 'loss'} of step {step + 1} is not finite, so the optimizer was not "
            f"run. Rows of the batch: {rows}{more}. "
            + (f"The last good state is in '{saved}'. " if saved else "No step had been saved. ")
            + "Lower the learning rate, check these rows, or train in bf16 or fp32 instead of fp16."
        )

    def _weights_are_finite(self) -> bool:
        return all(
            bool(torch.isfinite(local_part(p)).all()) for p in self.model.parameters() if p.requires_grad
        )

    def _on_all_ranks(self, value: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return value
        return all(gather_object([value]))

    def _as_main_sees(self, value: Any) -> Any:
        found = [value]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found, from_process=0)
        return found[0]

    # ---- Logging -------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics per language to a training log, see the class's documentation for their names."""
        if self.model.training and "loss" in logs:
            logs.update(self._language_metrics())
        Trainer.log(self, logs, start_time)

    def _language_metrics(self) -> dict[str, float]:
        sums = self._sums
        if self.accelerator.num_processes > 1:
            sums = sums.clone()
            torch.distributed.all_reduce(sums)
        table = sums.double().cpu().clone().numpy()
        self._sums.zero_()
        total = table.sum(axis=0)
        if total[_COUNT] == 0:
            return {}
        metrics = {
            "loss/reward_gap": float(total[_GAP_LOSS] / total[_COUNT]),
            "loss/retention": float(total[_RETENTION] / total[_COUNT]),
        }
        now, step = time.monotonic(), self.state.global_step
        if self._last_log is not None and step > self._last_log[1]:
            metrics["pairs_per_second"] = float(total[_COUNT] / max(now - self._last_log[0], 1e-9))
        self._last_log = (now, step)
        for language, row in zip(self.languages, table, strict=True):
            if row[_COUNT] == 0:
                continue
            mean = row / row[_COUNT]
            metrics[f"reward_gap/{language}"] = float(mean[_GAP])
            metrics[f"gap_to_source/{language}"] = float(mean[_TO_SOURCE])
            metrics[f"positive/{language}"] = float(mean[_POSITIVE])
            metrics[f"logps/chosen/{language}"] = float(mean[_CHOSEN])
            metrics[f"logps/rejected/{language}"] = float(mean[_REJECTED])
            self._watch_collapse(language, float(mean[_CHOSEN]), float(mean[_GAP]))
        return metrics

    def _watch_collapse(self, language: str, chosen: float, gap: float) -> None:
        collapse = self._collapse.update(language, chosen, gap)
        if collapse is None:
            return
        if self.args.stop_on_collapse:
            if self.state.global_step > 0 and self.args.save_strategy != "no":
                self._save_checkpoint(self.model_wrapped, trial=None)
            raise TrainingError(f"Stopped at step {self.state.global_step}: {collapse}.")
        logger.warning(f"At step {self.state.global_step}, {collapse} (`stop_on_collapse: true` does).")

    # ---- Evaluation ----------------------------------------------------------------------------------------------

    def score(self, dataset: Any = None, *, description: str = "Scoring held-out pairs") -> Scores:
        """
        Score every pair of a dataset, sources included, with the current weights.

        All ranks call this and get the same result.

        Args:
            dataset: prepared or raw groups; None for the evaluation dataset.
            description: text of the progress bar.

        Raises:
            DataError: there is no dataset.
        """
        return self._score(self._evaluation_data(dataset), description)[0]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Loss and reward gap per language on held-out groups, each pair weighing the same.

        Returns:
            ``eval_loss``, ``eval_loss/retention``, and per target language ``eval_reward_gap/<language>`` and the other
            names of the training log.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, dict):
            metrics: dict[str, float] = {}
            for name, part in data.items():
                metrics.update(self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        start = time.monotonic()
        scores, loss = self._score(self._evaluation_data(eval_dataset), "Evaluating")
        metrics = {f"{metric_key_prefix}_loss": loss}
        if scores.retention is not None:
            metrics[f"{metric_key_prefix}_loss/retention"] = scores.retention
        for language in self.languages:
            records = [r for r in scores.records if r.language == language and not r.is_source]
            if not records:
                continue
            values = {
                "reward_gap": [r.gap for r in records],
                "gap_to_source": [r.gap - r.reference_gap for r in records],
                "positive": [float(r.gap > 0) for r in records],
                "logps/chosen": [r.chosen for r in records],
                "logps/rejected": [r.rejected for r in records],
            }
            for name, numbers in values.items():
                metrics[f"{metric_key_prefix}_{name}/{language}"] = math.fsum(numbers) / len(numbers)
        metrics[f"{metric_key_prefix}_runtime"] = time.monotonic() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluation_data(self, dataset: Any) -> Dataset:
        if dataset is None or isinstance(dataset, str):
            found = self.eval_dataset[dataset] if isinstance(dataset, str) else self.eval_dataset
            if isinstance(found, dict):
                raise DataError(f"there are several evaluation datasets; name one of {', '.join(found)}.")
            if found is None:
                raise DataError(
                    "there is no evaluation data; pass `eval_dataset` to the trainer or to this call."
                )
            assert isinstance(found, Dataset)
            return found
        if isinstance(dataset, Dataset) and set(dataset.column_names) == set(TOKENIZED_FEATURES) - {"errors"}:
            return dataset
        groups = as_groups(dataset, source_language=self.args.source_language, bad_rows=self.args.bad_rows)
        return self._prepare_dataset(groups, self.processing_class, self.args, "eval")

    def _score(self, dataset: Dataset, description: str) -> tuple[Scores, float]:
        unknown = sorted(set(count_languages(dataset)) - set(self.languages))
        if unknown:
            raise DataError(
                f"the data has target languages the trainer was not made with: {', '.join(unknown)}. Pass it as "
                "`eval_dataset` when the trainer is made."
            )
        self._check_layout()
        reference = self._reference_of(dataset, "eval")
        ranks = self.accelerator
        loader = evaluation_loader(
            dataset,
            reference,
            languages=self.languages,
            shape=self._shape,
            batch_size=self.args.per_device_eval_batch_size,
            num_ranks=ranks.num_processes,
            rank=ranks.process_index,
        )
        model = self._callable_model()
        was_training = model.training
        model.eval()
        try:
            with self._autocast():
                return score_loader(
                    model,
                    loader,
                    languages=self.languages,
                    source_language=self.args.source_language,
                    device=ranks.device,
                    pair_loss=self.pair_loss,
                    num_ranks=ranks.num_processes,
                    description=description,
                    progress=ranks.is_main_process and not self.args.disable_tqdm,
                )
        finally:
            model.train(was_training)

    # ---- Saving --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Not DPOTrainer's: it rewrites the model card at every checkpoint.
        folder = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
        main = self.accelerator.is_main_process
        if main and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        # Old checkpoints go only when the new one is complete, so that a kill in between leaves one to resume from.
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        problem: str | None = None
        try:
            Trainer._save_checkpoint(self, model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not (isinstance(error, OSError) or is_full_disk(error)):
                raise
            problem = str(error)
        finally:
            self.args.save_total_limit = keep
        problems = [problem]
        if self.accelerator.num_processes > 1:
            problems = gather_object(problems)
        problem = next((p for p in problems if p), None)
        if main and problem is None:
            try:
                mark_complete(folder, {**self._order_state(), "form": self._state_form()})
                rotate(folder.parent, keep, self.state.best_model_checkpoint, newest=folder)
            except OSError as error:
                problem = str(error)
        if problem is not None and main:
            shutil.rmtree(folder, ignore_errors=True)
            last = last_complete_checkpoint(folder.parent)
            logger.error(
                f"The checkpoint of step {self.state.global_step} could not be saved ({problem}). Training goes on; the "
                f"last complete checkpoint is {last or 'none'}. Free some space in '{folder.parent}' before the next one."
            )
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the model, or its adapter, whole: what is saved loads on one CPU, however many ranks have trained it.

        All ranks call this; the main process writes.
        """
        if self.is_fsdp_enabled and not _internal_call:
            # The base class saves nothing here where checkpoints are kept in shards (`SHARDED_STATE_DICT`).
            state = self.accelerator.get_state_dict(self.model)
            for tied in getattr(self.model, "all_tied_weights_keys", None) or {}:
                state.pop(tied, None)
            self._save(output_dir, state_dict=state)
        elif self.is_deepspeed_enabled and sharding_name(self.accelerator) != "ZeRO-3":
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


# ---- Parts of the constructor ---------------------------------------------------------------------------------------


def _sharded(args: MPOConfig) -> bool:
    """Whether DeepSpeed or FSDP divides the model over ranks."""
    return bool(getattr(args, "deepspeed_plugin", None) or args.fsdp or launched_with("FSDP"))


def _set_checkpointing(args: MPOConfig, ending: str, value: Any) -> None:
    """Set ``gradient_checkpointing`` or, with its ending, ``gradient_checkpointing_kwargs``."""
    setattr(args, f"gradient_checkpointing{ending}", value)
    if hasattr(args, f"activation_checkpointing{ending}"):  # its name in later versions of transformers
        setattr(args, f"activation_checkpointing{ending}", value)


@contextmanager
def _no_reference_model() -> Iterator[None]:
    """
    Keep ``DPOTrainer.__init__`` from loading a second model as the reference, which MPO never needs.

    The policy is loaded before, so the only call of ``create_model_from_path`` left in there is the reference's.
    """
    with (
        mock.patch("trl.trainer.dpo_trainer.create_model_from_path", lambda *args, **kwargs: None),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message=".*model_init_kwargs.*")
        # PEFT asks a model by the old name of an attribute that transformers renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        # The loaded model was made from `model_init_kwargs` right here, so TRL's remark on them is not true.
        trl_logger = logging.getLogger("trl.trainer.dpo_trainer")
        level = trl_logger.level
        trl_logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            trl_logger.setLevel(level)


def _refuse(**arguments: Any) -> None:
    reasons = {
        "data_collator": "the step packs preference trees with its own collator",
        "compute_metrics": "no logits are built that it could read; `trainer.score()` gives the score of every pair",
    }
    for name, value in arguments.items():
        if value is not None:
            raise ConfigError(f"`{name}` is not supported by MPOTrainer: {reasons[name]}.")


def _source(name: str, args: MPOConfig) -> ModelSource:
    kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    return ModelSource(name, kwargs.get("revision"), args.trust_remote_code)


def _open(name: str, args: MPOConfig, tokenizer: PreTrainedTokenizerBase | None) -> OpenedModel:
    given: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    return open_model(
        _source(name, args),
        tokenizer=tokenizer,
        chat_template=args.chat_template,
        chat_template_kwargs=args.chat_template_kwargs,  # type: ignore[arg-type]
        dtype=given.get("dtype", "float32"),
        device=args.device,
        attn_implementation=given.get("attn_implementation"),
        layout=args.batch_layout,
        trained=True,
        compiled=bool(args.torch_compile),
    )


def _init_kwargs(args: MPOConfig) -> dict[str, Any]:
    kwargs = {k: v for k, v in (args.model_init_kwargs or {}).items() if k not in _OWN_INIT_KWARGS}  # type: ignore[union-attr]
    if args.distributed_state is not None and args.distributed_state.distributed_type in (
        "MULTI_GPU",
        "DEEPSPEED",
    ):
        kwargs["device_map"] = None
    return kwargs


def check_adapter_config(config: Any) -> None:
    """
    Refuse adapters that the reward-gap head cannot train: prompt learning, and copies of the LM head.

    Args:
        config: a ``peft.PeftConfig`` or None.

    Raises:
        ConfigError: names what to use instead.
    """
    if config is None:
        return
    if getattr(config, "is_prompt_learning", False):
        raise ConfigError(
            f"{type(config).__name__} puts virtual tokens before the prompt, which preference trees do not have. Use LoRA "
            "(or DoRA, rsLoRA) instead."
        )
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, str) and "lm_head" in (targets or []):
        raise ConfigError(
            "`target_modules` names lm_head: the reward-gap head reads the LM head's weight directly, so an adapter on it "
            "would never be trained. Remove it; `all-linear` leaves it out."
        )
    saved = set(getattr(config, "modules_to_save", None) or [])
    if saved & {"lm_head", "embed_tokens"}:
        raise ConfigError(
            f"`modules_to_save` names {', '.join(sorted(saved & {'lm_head', 'embed_tokens'}))}: the reward-gap head reads "
            "the LM head's weight directly and would train a copy that it does not use. Remove it."
        )


def _check_adapter(model: Any, peft_config: Any) -> None:
    """Whether the adapter of a model that has one can be trained further."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(
            "the model holds an adapter of transformers' own (`add_adapter`). Load it with `peft.PeftModel` instead, or pass "
            "the bare model with `peft_config`."
        )
    if not hasattr(model, "peft_config"):
        return
    if peft_config is not None:
        raise ConfigError(
            "`peft_config` asks for a new adapter, but the model has one already. Leave it out to train that one further, "
            "or merge it first (`mpo merge`)."
        )
    if "default" not in model.peft_config:
        raise ConfigError(
            f"the model's adapter is called {', '.join(model.peft_config)}; the trainer trains the one called 'default'. "
            "Load it without `adapter_name`."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "the model's adapter was loaded frozen. Load it with `is_trainable=True` to train it further."
        )


@contextmanager
def _as_own_errors(args: MPOConfig) -> Iterator[None]:
    """Turn what the libraries say of a missing package, a folder or the LM head into this package's errors."""
    try:
        yield
    except MPOError:
        raise
    except ImportError as error:
        raise DependencyError(str(error)) from error
    except (NotADirectoryError, PermissionError, FileExistsError) as error:
        raise StorageError(f"the output folder '{args.output_dir}' cannot be made: {error}") from error
    except ValueError as error:
        if "lm_head" not in str(error):
            raise
        raise ConfigError(str(error)) from error


def _check_master_weights(model: Any, sharded: bool) -> None:
    if sharded or hasattr(model, "peft_config"):
        return
    half = {
        str(p.dtype)
        for p in model.parameters()
        if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)
    }
    if half:
        raise ConfigError(
            f"the weights to be trained are {', '.join(sorted(half))}: at the learning rates of preference training their "
            "updates are rounded away. Load the model with `dtype: float32` and set `bf16: true`, which computes in bf16 "
            "and keeps float32 master weights."
        )


def _map_datasets(function: Callable[[Any], Dataset], data: Any) -> Any:
    if data is None:
        return None
    if isinstance(data, dict):
        return {name: function(part) for name, part in data.items()}
    return function(data)


def _datasets(data: Any) -> Sequence[Dataset]:
    if data is None:
        return []
    return list(data.values()) if isinstance(data, dict) else [data]
