"""The settings of a training run: :class:`MPOConfig`, a ``trl.DPOConfig`` with MPO's own fields and defaults."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any

import torch
from transformers import SchedulerType
from trl import DPOConfig

from mpo.common import checks
from mpo.common.checks import is_at_least_0, is_number, is_positive, is_whole
from mpo.common.redaction import is_secret_name
from mpo.common.words import listed
from mpo.errors import ConfigError
from mpo.modeling.objectives import F_DIVERGENCES
from mpo.training.harmless import HarmlessSettings, of_harmless
from mpo.training.launcher import deepspeed_backend
from mpo.training.objectives import (
    REFERENCE,
    RETENTION,
    STATES,
    TRAIN_ON,
    Objectives,
    readers,
    take_published,
)
from mpo.training.probe_settings import ProbeSettings, metric_is_loss
from mpo.training.run_settings import check_names

RETAIN_POOLINGS = ("mean", "last")
BATCH_LAYOUTS = ("tree", "padded")

# Options that some objectives read; under others they are refused. The value is what stands for "not set".
_OF_OBJECTIVES = {
    "beta": None,
    "label_smoothing": 0.0,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "discopop_tau": 0.05,
    "retain_weight": 1.0,
    "simpo_gamma": 0.5,
    "cpo_alpha": 1.0,
    "rdpo_alpha": 0.01,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "mlc_temperature": 0.2,
    "mpo_delta": None,
    "state_layer": None,
    "state_position": -1,
}
# Of these, what a recipe need not set because the objective's paper has a value; and what they are where nothing reads
# them.
_PUBLISHED = {"beta": 1.0, "label_smoothing": 0.0}


def _read_by(option: str) -> str:
    return f"it belongs to the objectives {listed(readers(option))}"


# Options of `DPOConfig` and `TrainingArguments` that would be ignored, each with the reason.
# A setting that is ignored is worse than an error, so a value other than the default is refused.
_MEANINGLESS = {
    "ld_alpha": _read_by("ld_alpha"),
    "f_divergence_type": _read_by("f_divergence_type"),
    "f_alpha_divergence_coef": _read_by("f_alpha_divergence_coef"),
    "label_smoothing": _read_by("label_smoothing"),
    "label_smoothing_factor": "it smooths the labels of a classifier's loss; see `label_smoothing`",
    "use_weighting": "WPO's weights need the probabilities of the whole vocabulary, which the tiled head does not keep; "
    "weight languages with `language_weights`",
    "discopop_tau": _read_by("discopop_tau"),
    "sync_ref_model": "the reference is the starting policy and stays fixed",
    "ref_model_mixup_alpha": "the reference is the starting policy and stays fixed",
    "ref_model_sync_steps": "the reference is the starting policy and stays fixed",
    "precompute_ref_log_probs": "what an objective needs of the reference is always computed before the first step and "
    "cached",
    "precompute_ref_batch_size": "the reference pass is sized in tokens: set `reference_tokens_per_batch`",
    "padding_free": "trees are packed without padding by default: see `batch_layout`",
    "truncation_mode": "MPO keeps the prompt whole and cuts the response at its end",
    "pad_token": "set `tokenizer.pad_token` and pass the tokenizer as `processing_class`",
    "train_sampling_strategy": "groups are drawn by MPO's own sampler",
    "neftune_noise_alpha": "noise on the embeddings would be trained into the retention term",
}


@dataclass
class MPOConfig(HarmlessSettings, ProbeSettings, DPOConfig):
    r"""Settings of :class:`~mpo.training.trainer.MPOTrainer`.

    Only what MPO adds or sets differently is described here, and in
    :class:`~mpo.training.harmless.HarmlessSettings` what is for harmless groups; every other field is that of
    ``trl.DPOConfig`` and ``transformers.TrainingArguments``. Options of ``DPOConfig`` that mean nothing under the chosen objective
    (``label_smoothing`` for ``mpo``, ``precompute_ref_log_probs`` for any, ...) raise :class:`~mpo.errors.ConfigError` when
    set.

    MPO's objective, for a target pair with its source (Zhao et al., ACL 2025, arXiv 2505.16869)::

        L1 = (beta * RG_target - RG_reference_source)^2
        L2 = ||h_source - h_reference_source||^2 / hidden_size
        L  = mean over target pairs of (L1 + retain_weight * L2)

    Args:
        > Parameters that control the objective

        loss_type (`list[str]`, *optional*, defaults to `["mpo"]`):
            The objective, or several: `"mpo"`; TRL's `"sigmoid"` (DPO), `"sigmoid_norm"`, `"hinge"`, `"ipo"`,
            `"exo_pair"`, `"nca_pair"`, `"robust"` (rDPO), `"bco_pair"`, `"sppo_hard"`, `"apo_zero"`, `"apo_down"`,
            `"discopop"`, `"sft"`; `"first_token"`; `"simpo"`, `"cpo"`, `"orpo"`, `"rdpo"` (length-regularised), `"kto"`, `"mlc"`; or one that a package has
            registered ([`register_objective`][mpo.training.objectives.register_objective]).
        loss_weights (`list[float]`, *optional*):
            Weight of each of `loss_type`. Unset: 1 each.
        train_on (`str`, *optional*, defaults to `"targets"`):
            Which pairs are trained on: `"targets"`, the `"source"` pairs, each once however its group is split, or
            `"both"`. `mpo` trains targets only.
        beta (`float`, *optional*):
            Temperature of the objective. Unset: its published value, 1.0 for `mpo` and 0.1 for `sigmoid`. For `mpo` it is
            the scale of the target language's reward gap; the paper uses 1.0 for Llama-3.1 and 1.5 for Gemma-2 and
            Qwen2.5. A larger value asks for a *smaller* gap in the target language: the gap settles at
            RG_reference / beta.
        label_smoothing (`float`, *optional*):
            Probability that a preference is the wrong way round, for `robust` (unset: 0.1), `exo_pair` (1e-3), `cpo`
            and `simpo` (0).
        simpo_gamma (`float`, *optional*, defaults to `0.5`):
            Margin by which SimPO wants the chosen reward, beta times the mean log-likelihood, to be the larger.
        cpo_alpha (`float`, *optional*, defaults to `1.0`):
            Weight of CPO's second term, the negative log-likelihood of the chosen responses' tokens.
        rdpo_alpha (`float`, *optional*, defaults to `0.01`):
            Reward that `rdpo` takes off per token of a response.
        desirable_weight, undesirable_weight (`float`, *optional*, defaults to `1.0`):
            Weights of the chosen and of the rejected responses for `kto`.
        mlc_temperature (`float`, *optional*, defaults to `0.2`):
            Temperature of the softmax over singular values for `mlc`. Its authors weigh it by 0.8 beside `sigmoid`, in
            every second step.
        state_layer (`int`, *optional*):
            Layer whose hidden states `mlc` compares, or another objective that needs states of prompts, counted as in
            transformers' `hidden_states`: 0 for the embeddings, i for what block i gives. Unset: the last one, after the final
            norm.
        state_position (`int`, *optional*, defaults to `-1`):
            Token of the prompt where they are, from its end: -1 for the last one of the prompt with its chat template.
        mpo_delta (`float`, *optional*):
            Distance of the gaps in nats per token from which on `mpo` takes Huber's loss, which grows with the distance and
            not with its square. Unset: the square, as published.
        retain_weight (`float`, *optional*, defaults to `1.0`):
            Weight (lambda) of MPO's retention term. At 0 the source pair is not run at all while training.
        retain_pooling (`str`, *optional*, defaults to `"mean"`):
            How a sequence's final hidden states become one vector: `"mean"` over the real tokens of prompt and
            response, or `"last"`, the last real token.
        min_source_gap (`float`, *optional*):
            Drop harmful groups whose reference gap is not above this value (nats per token). A source gap that is
            not positive teaches the wrong thing; such sources are always counted and reported. `0.0` drops them.
        language_weights (`dict[str, float]` or `"balanced"`, *optional*):
            Weight of a pair by its language, for unequal numbers of targets. `"balanced"` weights each
            language by the inverse of its number of pairs. Weights are scaled so that their mean over the training
            pairs is 1; languages not named in a dict weigh 1 before scaling.
        stop_on_collapse (`bool`, *optional*, defaults to `False`):
            Stop the run when the chosen log-likelihood of a language falls steadily while its gap rises. A warning
            is given in any case.
        collapse_window (`int`, *optional*, defaults to `20`):
            Number of consecutive logging points that must show the fall. Fewer see only falls that are many times
            the scatter between batches.
        collapse_drop (`float`, *optional*, defaults to `0.2`):
            Fall of the mean chosen log-likelihood over the window, in nats per token, that counts as a collapse.

        > Parameters that control the data

        source_language (`str`, *optional*, defaults to `"en"`):
            The dominant language: ISO 639-1 code, for example `"en"`, or `"zh"` for Qwen2.5 as in the paper.
        group_by_source (`bool`, *optional*, defaults to `True`):
            Run a source once per group of its target languages instead of once per pair. The loss is the same.
        max_targets_per_group (`int`, *optional*):
            Split groups with more targets than this.
        bad_rows (`str`, *optional*, defaults to `"error"`):
            What to do with rows that break the data contract: `"error"` stops at the first, `"drop"` counts and
            lists them.
        max_response_length (`int`, *optional*):
            Cut every response to this many tokens, besides `max_length`, which limits prompt plus response.
        chat_template (`str`, *optional*):
            Chat template (Jinja text, or a file that holds it) for tokenizers that have none.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Extra arguments for the chat template, for example `{"enable_thinking": false}`.

        > Parameters that control the step

        batch_layout (`str`, *optional*, defaults to `"tree"`):
            `"tree"` packs [prompt | chosen | rejected] trees into rows, `"padded"` runs one padded sequence per
            row: slower, the plain reference, and the fallback for models that cannot take tree masks.
        max_tokens_per_row (`int`, *optional*):
            Token budget of a packed row. Unset: no limit with `tree` attention (the default), where it saves nothing; else
            512 on a CPU, 8192 on an accelerator. Where a tree is longer, all rows of its batch may be as long as that
            tree, since they are padded to one length.
        max_tokens_per_batch (`int`, *optional*):
            Make up micro-batches by tokens instead of counting groups: at most this many tokens on each device, sources
            included, and about the same on all of them. A group is never split; one that is larger is a micro-batch of
            its own. Takes the place of `per_device_train_batch_size`.
        max_tokens_per_call (`int`, *optional*):
            Split a micro-batch of more tokens into several model calls, each with its backward pass: the same gradient
            from less memory. Unset: 1024 on a CPU, no limit on an accelerator. For a single process without DeepSpeed
            or FSDP.
        gradient_checkpointing (`bool`, *optional*):
            Recompute activations in the backward pass, which takes about a third more work and a fraction of the memory.
            Unset, the trainer decides before the first step: on under DeepSpeed and FSDP, off on a CPU, and on one
            accelerator or under DDP on where the largest micro-batch would not fit otherwise, by the count of `mpo plan`
            (:func:`mpo.planning.memory.step_needs_checkpointing`).
        per_device_train_batch_size (`int`, *optional*, defaults to `1`):
            *Groups* (sources with all their targets) per device and micro-batch.

        > Parameters that control the reference pass

        reference_cache_dir (`str`, *optional*):
            Folder of the reference cache, shared by all ranks and nodes. Defaults to `mpo/reference` below the
            Hugging Face cache (`HF_HOME`).
        reference_tokens_per_batch (`int`, *optional*):
            Token budget of a batch of the reference pass. Unset: 2048 on a CPU, 8192 on an accelerator.

        > Parameters that control what the model is asked: those of [`ProbeSettings`][mpo.training.probe_settings.ProbeSettings]

        > Parameters that control resuming

        resume_changes (`list[str]`, *optional*):
            Settings that may differ from those of the checkpoint that the run resumes from, for example
            `["learning_rate"]`: the new value holds from there on, and the run's files say so. Every other difference
            in what is trained and how is refused. What may be named: :data:`mpo.training.run_settings.CHANGEABLE`.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Have `mpo train` replace the result of an earlier run in `output_dir`, which is otherwise refused. The earlier
            result lies in `output_dir/earlier-result` until the new one is complete.

    > [!NOTE]
    > Defaults that differ from `DPOConfig`: `loss_type` `["mpo"]` (`["sigmoid"]`), `beta` and `label_smoothing` the
    > objective's own (0.1, 0), `gradient_checkpointing` by need (on), `bf16` on only where
    > the hardware has it (always), `learning_rate` 1e-6 as there, `lr_scheduler_type` cosine, `warmup_steps` 0.1 (a
    > ratio), `logging_nan_inf_filter` off (it hides a NaN), `logging_steps` 1, `remove_unused_columns` off,
    > `per_device_train_batch_size` 1, `num_train_epochs` 2.
    """

    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]  # noqa: RUF012

    # The objective
    loss_type: list[str] = field(
        default_factory=lambda: ["mpo"], metadata={"help": "The objective, or several to be summed."}
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each of `loss_type`; unset: 1 each."}
    )
    train_on: str = field(
        default="targets",
        metadata={"help": "Which pairs are trained on.", "choices": ["targets", "source", "both"]},
    )
    beta: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Temperature of the objective. Unset: its published value."}
    )
    label_smoothing: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Probability of a flipped preference. Unset: the objective's published value."},
    )
    simpo_gamma: float = field(default=0.5, metadata={"help": "Reward margin of SimPO."})
    cpo_alpha: float = field(default=1.0, metadata={"help": "Weight of CPO's log-likelihood term."})
    rdpo_alpha: float = field(default=0.01, metadata={"help": "Reward that `rdpo` takes off per token."})
    desirable_weight: float = field(default=1.0, metadata={"help": "Weight of chosen responses for `kto`."})
    undesirable_weight: float = field(
        default=1.0, metadata={"help": "Weight of rejected responses for `kto`."}
    )
    mlc_temperature: float = field(default=0.2, metadata={"help": "Temperature of `mlc`."})
    state_layer: int | None = field(
        default=None,
        metadata={"help": "Layer of the states that `mlc` compares. Unset: after the final norm."},
    )
    state_position: int = field(
        default=-1, metadata={"help": "Token of the prompt where they are, from -1 for its last."}
    )
    mpo_delta: float | None = field(
        default=None, metadata={"help": "Distance of the gaps beyond which `mpo` is linear. Unset: never."}
    )
    retain_weight: float = field(default=1.0, metadata={"help": "Weight (lambda) of the retention term."})
    retain_pooling: str = field(
        default="mean", metadata={"help": "Pooling of the retention term.", "choices": list(RETAIN_POOLINGS)}
    )
    min_source_gap: float | None = field(
        default=None, metadata={"help": "Drop groups whose reference gap is not above this value."}
    )
    language_weights: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Weight per target language, or 'balanced'."}
    )
    stop_on_collapse: bool = field(
        default=False, metadata={"help": "Stop when a language's chosen log-likelihood collapses."}
    )
    collapse_window: int = field(default=20, metadata={"help": "Logging points a collapse must last."})
    collapse_drop: float = field(default=0.2, metadata={"help": "Fall in nats per token that is a collapse."})

    # The data
    source_language: str = field(default="en", metadata={"help": "The dominant language (ISO 639-1)."})
    group_by_source: bool = field(default=True, metadata={"help": "Run a source once per group of targets."})
    max_targets_per_group: int | None = field(
        default=None, metadata={"help": "Split groups with more targets than this."}
    )
    bad_rows: str = field(
        default="error", metadata={"help": "What to do with bad rows.", "choices": ["error", "drop"]}
    )
    max_response_length: int | None = field(
        default=None, metadata={"help": "Cut every response to this many tokens."}
    )
    chat_template: str | None = field(default=None, metadata={"help": "Chat template: Jinja text or a file."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Extra arguments for the chat template."}
    )

    # The step
    batch_layout: str = field(
        default="tree", metadata={"help": "'tree' or 'padded'.", "choices": list(BATCH_LAYOUTS)}
    )
    max_tokens_per_row: int | None = field(default=None, metadata={"help": "Token budget of a packed row."})
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Token budget of a micro-batch on each device, instead of a number of groups."},
    )
    max_tokens_per_call: int | None = field(
        default=None, metadata={"help": "Split a micro-batch of more tokens into several model calls."}
    )

    # The reference pass
    reference_cache_dir: str | None = field(default=None, metadata={"help": "Folder of the reference cache."})
    reference_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Token budget of a batch of the reference pass."}
    )

    # Resuming, and what is there already
    resume_changes: list[str] | None = field(
        default=None, metadata={"help": "Settings that may change where the run is resumed."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace an earlier result in output_dir once the run is complete."}
    )

    # Defaults that differ from DPOConfig
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bf16 mixed precision. Unset: on where the accelerator has it."}
    )
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Trade compute for memory. Unset: on where the step would not fit otherwise."},
    )
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Groups per device and micro-batch."}
    )
    per_device_eval_batch_size: int = field(
        default=1, metadata={"help": "Groups per device when evaluating."}
    )
    num_train_epochs: float = field(default=2.0, metadata={"help": "Number of epochs."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up: steps, or a ratio below 1."})
    logging_steps: float = field(default=1, metadata={"help": "Optimizer steps between two logs."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hides a NaN; keep it off."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "MPO prepares its own columns."})

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self._check_objectives()
        self.check_harmless()
        self._refuse_meaningless()
        take_published(self, _PUBLISHED)
        if isinstance(self.language_weights, str) and self.language_weights.lstrip().startswith("{"):
            # As on a command line; the base class parses its own dicts later than they are checked here.
            try:
                self.language_weights = json.loads(self.language_weights)
            except ValueError as error:
                raise ConfigError(
                    f"`language_weights` is {self.language_weights!r}, which is no JSON: {error}."
                ) from error
        self._check_values()
        self._choose_best_metric()
        self.check_probe(self.metric_for_best_model)
        if self.bf16 is None:
            self.bf16 = bool(
                not self.fp16
                and not self.use_cpu
                and torch.cuda.is_available()
                and torch.cuda.is_bf16_supported()
            )
        self.decide_checkpointing = (
            self.gradient_checkpointing is None and getattr(self, "activation_checkpointing", None) is None
        )
        # transformers renamed the option; the old name is what users and recipes know, so it is passed on silently.
        if "activation_checkpointing" in {f.name for f in fields(self)}:
            if self.gradient_checkpointing is not None and self.activation_checkpointing is None:
                self.activation_checkpointing = self.gradient_checkpointing
        elif self.gradient_checkpointing is None:
            self.gradient_checkpointing = False
        self.ddp_backend = self.ddp_backend or deepspeed_backend(self.use_cpu)
        super().__post_init__()
        # Trainer pads nothing for us; every device keeps its own groups, whatever their number.
        if getattr(self.accelerator_config, "split_batches", False):
            raise ConfigError(
                "accelerator_config.split_batches is on, but MPO's sampler already gives every rank its own groups. "
                "Turn it off and set `per_device_train_batch_size`."
            )

    def _check_objectives(self) -> None:
        names, weights = self.loss_type, self.loss_weights
        if not (isinstance(names, list) and names and len({*names}) == len(names)):
            raise ConfigError(f"`loss_type` is {names!r}; expected one or more objectives, each once.")
        if weights is not None and not (
            isinstance(weights, list) and len(weights) == len(names) and all(map(is_number, weights))
        ):
            raise ConfigError(
                f"`loss_weights` is {weights!r}; expected as many numbers as `loss_type` names objectives, {len(names)}."
            )
        objectives = self.objectives.by_name
        if self.train_on not in TRAIN_ON:
            raise ConfigError(f"`train_on` is {self.train_on!r}; expected 'targets', 'source' or 'both'.")
        for name, objective in objectives.items():
            if self.train_on != "targets" and objective.targets_only:
                raise ConfigError(
                    f"`train_on: {self.train_on}` does not go with `{name}`: {objective.targets_only}. Set "
                    "`train_on: targets`, or another `loss_type`."
                )
            if objective.harmless_only:
                raise ConfigError(
                    f"`loss_type` names {name!r}, which is for harmless groups alone: {objective.harmless_only}. Name it in "
                    "`harmless_loss_type`, or choose another objective."
                )
        if STATES in self.objectives.needs:
            for option in ("train_on", "max_targets_per_group", "group_by_source"):
                value = getattr(self, option)
                if value in ("source", False) or (option == "max_targets_per_group" and value is not None):
                    raise ConfigError(
                        f"`{option}` is {value!r}, but `mlc` compares a prompt in all its languages, which must be in one "
                        f"group and be run. Remove `{option}`."
                    )
        if self.state_layer is not None and (
            self.torch_compile or self.torch_compile_backend or self.torch_compile_mode
        ):
            raise ConfigError(
                f"`state_layer` is {self.state_layer!r}, but a model that is compiled (`torch_compile`) does not show the states "
                "between its layers. Remove one of them."
            )
        if self.f_divergence_type != "reverse_kl" and "f_divergence_type" in self.objectives.reads:
            others = [
                name
                for name, objective in objectives.items()
                if REFERENCE in objective.needs and "f_divergence_type" not in objective.reads
            ]
            if others:
                raise ConfigError(
                    f"`f_divergence_type` is {self.f_divergence_type!r}, which {listed(others)} cannot take: they use more "
                    "than the difference of chosen and rejected, where the divergence's normaliser does not cancel."
                )

    def _refuse_meaningless(self) -> None:
        reads = self.objectives.reads
        if self.harmless_loss_type is not None:
            # Temperature and smoothing have settings of their own, or none.
            reads |= self.harmless.objectives.reads - set(_PUBLISHED)
        for option in fields(self):
            name, value = option.name, getattr(self, option.name)
            if name in reads or name not in {**_MEANINGLESS, **_OF_OBJECTIVES}:
                continue
            default = option.default if option.default_factory is MISSING else option.default_factory()
            if value not in (default, _OF_OBJECTIVES.get(name), _PUBLISHED.get(name, default)):
                raise ConfigError(
                    f"`{name}={value!r}` has no meaning for `loss_type` {', '.join(self.loss_type)}: "
                    f"{_MEANINGLESS.get(name) or _read_by(name)}. Remove it from the configuration."
                )

    def _choose_best_metric(self) -> None:
        """Refuse a metric that no evaluation gives, and set the direction in which it is better.

        The library takes every name that does not end in ``loss`` for one to be maximised. Languages are not known here;
        :func:`mpo.training.checks.check_best_metric` compares them with the data.
        """
        if self.metric_for_best_model is None:
            return
        lower = metric_is_loss(self.metric_for_best_model)
        if self.greater_is_better is None:
            self.greater_is_better = not lower
        elif lower and self.greater_is_better:
            raise ConfigError(
                f"`greater_is_better` is on and `metric_for_best_model` is {self.metric_for_best_model!r}, a loss: the worst "
                "checkpoint would be kept. Remove `greater_is_better`."
            )

    def _check_values(self) -> None:
        require = partial(checks.require, self)
        require(
            "beta",
            is_positive,
            "a number above 0 (MPO's paper uses 1.0 or 1.5), or nothing for the objective's published value",
        )
        least = 1e-12 if "exo_pair" in self.loss_type else 0
        require(
            "label_smoothing",
            lambda value: is_number(value) and least <= value < 0.5,
            f"a probability {'above' if least else 'of at least'} 0 and below 0.5",
        )
        require(
            "ld_alpha",
            lambda value: value is None or (is_at_least_0(value) and value <= 1),
            "a number from 0 to 1, or nothing",
        )
        require(
            "f_divergence_type", lambda value: value in F_DIVERGENCES, f"one of {', '.join(F_DIVERGENCES)}"
        )
        require("f_alpha_divergence_coef", is_number, "a number")
        require("discopop_tau mlc_temperature", is_positive, "a number above 0")
        require(
            "mpo_delta", lambda value: value is None or is_positive(value), "a number above 0, or nothing"
        )
        require(
            "state_layer",
            lambda value: value is None or is_whole(value, 0),
            "a number of a layer from 0 (the embeddings), or nothing for the last",
        )
        require(
            "state_position",
            lambda value: isinstance(value, int) and value < 0,
            "a whole number from -1 (the prompt's last token) down",
        )
        require(
            "simpo_gamma cpo_alpha rdpo_alpha desirable_weight undesirable_weight retain_weight",
            is_at_least_0,
            "a number of at least 0",
        )
        require("retain_pooling", lambda value: value in RETAIN_POOLINGS, "'mean' or 'last'")
        require("batch_layout", lambda value: value in BATCH_LAYOUTS, "'tree' or 'padded'")
        require("bad_rows", lambda value: value in ("error", "drop"), "'error' or 'drop'")
        require(
            "min_source_gap",
            lambda value: value is None or is_number(value),
            "a number in nats per token, or nothing",
        )
        require(
            "max_length",
            lambda value: value is None or is_whole(value, 2),
            "a whole number of at least 2 (one prompt token and one response token), or null for no limit",
        )
        require(
            "max_tokens_per_row max_tokens_per_batch max_tokens_per_call reference_tokens_per_batch "
            "max_targets_per_group max_response_length",
            lambda value: value is None or is_whole(value, 1),
            "a whole number of at least 1, or null",
        )
        if self.max_tokens_per_batch is not None and self.per_device_train_batch_size != 1:
            raise ConfigError(
                f"`per_device_train_batch_size` is {self.per_device_train_batch_size} and `max_tokens_per_batch` is "
                f"{self.max_tokens_per_batch}: one counts a micro-batch's groups, the other its tokens. Remove one of them."
            )
        require("collapse_window", lambda value: is_whole(value, 3), "at least 3")
        require("collapse_drop", is_positive, "a number above 0 (nats per token)")
        require(
            "source_language",
            lambda value: isinstance(value, str) and bool(value.strip()),
            "a language code such as 'en' or 'zh'",
        )
        require(
            "lr_scheduler_type",
            lambda value: getattr(value, "value", value) in list(SchedulerType),
            f"one of {', '.join(SchedulerType)}",
        )
        if getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type) in (
            "cosine_with_min_lr",
            "cosine_warmup_with_min_lr",
        ):
            given = self.lr_scheduler_kwargs
            if not any(name in str(given or "") for name in ("min_lr", "min_lr_rate")):
                raise ConfigError(
                    f"`lr_scheduler_type` is {self.lr_scheduler_type!r}, which needs its least learning rate. Set "
                    "`lr_scheduler_kwargs: {min_lr_rate: 0.1}` (a share of `learning_rate`) or `{min_lr: 1.0e-7}`."
                )
        require(
            "seed data_seed",
            lambda value: value is None or (is_whole(value, 0) and value < 2**32),
            "a whole number from 0 to below 2**32",
        )
        if isinstance(self.deepspeed, bool) or (
            self.deepspeed is not None and not isinstance(self.deepspeed, (str, dict))
        ):
            raise ConfigError(
                f"`deepspeed` is {self.deepspeed!r}; expected the path of a DeepSpeed configuration. Better, remove it and "
                "launch with `accelerate launch --config_file recipes/accelerate/zero3.yaml`."
            )
        # transformers takes these as they are; the optimizer would refuse them once everything is loaded.
        require("learning_rate weight_decay adam_epsilon", is_at_least_0, "a number of at least 0")
        require(
            "adam_beta1 adam_beta2",
            lambda value: is_at_least_0(value) and value < 1,
            "a number from 0 to below 1",
        )
        require(
            "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps",
            lambda value: is_whole(value, 1),
            "a whole number of at least 1",
        )
        require(
            "max_steps",
            lambda value: value == -1 or is_whole(value, 1),
            "a whole number of at least 1, or -1 to go by `num_train_epochs`",
        )
        if self.max_steps == -1:
            require("num_train_epochs", is_positive, "a number above 0")
        check_names(self.resume_changes or ())
        if isinstance(self.language_weights, dict):
            require(
                "language_weights",
                lambda weights: (
                    all(isinstance(k, str) and is_at_least_0(v) for k, v in weights.items())
                    and (not weights or any(weights.values()))
                ),
                "language codes with weights of at least 0, not all of them 0",
            )
        else:
            require(
                "language_weights",
                lambda weights: weights is None or weights == "balanced",
                "a mapping, 'balanced', or nothing",
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, without tokens: trackers and checkpoints write this."""
        settings: dict[str, Any] = super().to_dict()
        settings["model_init_kwargs"] = _without_tokens(settings.get("model_init_kwargs"), "<TOKEN>")
        return settings

    def __getstate__(self) -> dict[str, Any]:
        # The library pickles the settings into every checkpoint folder (and what it uploads). A pickle holds no token.
        state: dict[str, Any] = _without_tokens(self.__dict__, None)
        return {**state, "model_init_kwargs": _without_tokens(state.get("model_init_kwargs"), None)}

    def __copy__(self) -> MPOConfig:
        # The copy module would take what a pickle has.
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> MPOConfig:
        other = object.__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    @property
    def objectives(self) -> Objectives:
        """What is minimised."""
        return Objectives(self)

    @property
    def harmless(self) -> MPOConfig:
        """These settings as they are for harmless groups."""
        return of_harmless(self, _PUBLISHED)

    @property
    def holds_sources(self) -> bool:
        """Whether the source pairs are run to be held where they are."""
        return RETENTION in self.objectives.needs

    @property
    def runs_sources(self) -> bool:
        """Whether a step runs source pairs at all, to hold them or to train on them."""
        return self.holds_sources or self.train_on != "targets"

    @property
    def gap_scale(self) -> float:
        """What a gap is multiplied by before it is measured against the source's: MPO's ``beta``, else 1."""
        return self.beta if "mpo" in self.loss_type else 1.0  # type: ignore[return-value]

    @property
    def order_seed(self) -> int:
        """What the order of the groups depends on, besides the epoch: ``data_seed``, or ``seed``."""
        return self.data_seed if self.data_seed is not None else self.seed

    def reference_folder(self) -> str:
        """Folder of the reference cache: ``reference_cache_dir``, or ``mpo/reference`` below ``HF_HOME``."""
        if self.reference_cache_dir is not None:
            return os.path.abspath(os.path.expanduser(self.reference_cache_dir))
        from huggingface_hub.constants import HF_HOME

        return os.path.join(HF_HOME, "mpo", "reference")


def _without_tokens(settings: Any, mark: str | None) -> Any:
    """A mapping with ``mark`` in place of every text whose name says that it is a secret; anything else as it is."""
    if not isinstance(settings, dict):
        return settings
    return {
        name: mark if isinstance(value, str) and is_secret_name(name) else value
        for name, value in settings.items()
    }
