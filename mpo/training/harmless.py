"""Harmless groups in training: how they are used, beside the harmful ones and in the same step.

A harmful prompt is to be refused, a harmless one to be answered (``kind`` of the data contract). With N harmful and M
harmless pairs in an optimizer step, whatever their order, packing, accumulation and ranks::

    L = (1/N) sum of l(harmful pair)  +  (1/M) sum of (w l'(harmless pair) + lambda' ||h - h_ref||^2 / hidden_size)

with ``l`` of ``loss_type``, ``l'`` of ``harmless_loss_type``, ``w`` ``harmless_loss_weight`` and ``lambda'``
``harmless_retain_weight``, or of each language what ``harmless_retain_target`` or ``harmless_refusal_target`` has made of it. The
second term is there with
``harmless_retention: hidden``: the pooled final hidden states of prompt and chosen response of the pair itself, in the dominant
and in the target languages. With ``states`` it is the same distance at each token of prompt and responses but their last, and
with ``kl`` at each of these ``KL(p_ref || p)`` of the token that follows, ``KL(p || p_ref)`` with ``reverse_kl``, or with ``mixed_kl``
the former over the prompt and the latter from its last token on: what the policy says of harmless prompts, and after them, stays as
it was. Of these it is the mean of three parts: over the prompt; the decision, at the prompt's last token and along the rejected response, a refusal, each of its tokens as far as
the model would come to it; and over the chosen response.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from mpo.common.checks import is_at_least_0, is_positive, is_whole, require
from mpo.common.words import listed
from mpo.data.contract import HARMLESS
from mpo.errors import ConfigError
from mpo.modeling.pairs import PairTensors
from mpo.training.objectives import MISMATCHED, RETENTION, STATES, TRAIN_ON, take_published

HARMLESS_LOSS = "sigmoid"
"""The objective of harmless groups where none is set."""
NONE = "none"
POOLED, KL, REVERSE_KL, MIXED_KL = "hidden", "kl", "reverse_kl", "mixed_kl"
BY_HEAD = (KL, REVERSE_KL, MIXED_KL)
RETENTIONS = {
    NONE: "nothing",
    POOLED: "pooled hidden states",
    "states": "hidden states of each token",
    KL: "what follows each token",
    REVERSE_KL: "what follows each token (reverse KL)",
    MIXED_KL: "what follows each token (KL of prompts, reverse KL of answers)",
}
_PER_STEP = {MISMATCHED: "other pairs' responses", STATES: "a prompt in all its languages"}


@dataclass
class HarmlessSettings:
    r"""The settings of :class:`~mpo.training.config.MPOConfig` for groups whose `kind` is harmless. Data without such groups
    read none of them.

    Args:
        harmless_loss_type (`list[str]`, *optional*):
            Their objective, or several, each weighing the same: a name of `loss_type`; `"gap_retention"`, which holds the gap
            of each pair where the starting policy has it; or `"none"`, which leaves them to `harmless_retention`. Unset:
            `"sigmoid"` (DPO).
        harmless_loss_weight (`float`, *optional*, defaults to `1.0`):
            Weight of that objective beside that of the harmful groups. Each is a mean over its own pairs.
        harmless_beta (`float`, *optional*):
            Its temperature. Unset: its published value, 0.1 for `sigmoid`.
        harmless_train_on (`str`, *optional*):
            Which of their pairs are trained on: `"targets"`, `"source"` or `"both"`. Unset: both, since refusals of
            harmless prompts must not grow in the dominant language either; targets for `mpo`.
        harmless_retention (`str`, *optional*, defaults to `"none"`):
            `"hidden"` holds the final hidden states of prompt and chosen response, pooled, where the starting policy has
            them, in each of these pairs' languages; `"states"` those of each token, those of the rejected response as far as the
            model would come to them; `"kl"` what the model expects after each token, which needs an LM head that is not
            trained and that the reference has, too, and `"reverse_kl"` the same the other way round, which weighs what the
            model has come to expect and the starting policy did not; `"mixed_kl"` takes the former over the prompt,
            which bounds the perplexity of such text, and the latter from its last token on. The last four keep the starting policy's states of every
            token on disk, four bytes times the hidden size for each.
        harmless_retain_weight (`float`, *optional*, defaults to `1.0`):
            Weight of that retention.
        harmless_retain_target (`float`, *optional*):
            Mean retention to aim at in each language, in nats under `"kl"`. Each language then has a weight of its own, which
            begins with `harmless_retain_weight`, grows while the language's mean is above the target and falls while it is
            below (see `mpo.training.retention_weights`). Unset: one weight, as it is.
        harmless_refusal_target (`float`, *optional*):
            In place of that: share of harmless prompts to aim at in each language that greedy decoding refuses in the words of
            their rejected response, above 0 and below 1, made smooth. It is read from the prompts of each step before they are
            trained on.
        harmless_max_response_length (`int`, *optional*):
            Cut their responses to this many tokens. To refuse or to answer is decided in the first words, while a refusal is
            best taught whole. Unset: `max_response_length`.
        harmless_share (`float`, *optional*):
            Share of harmless groups in each optimizer step, above 0 and below 1, as closely as whole groups allow. An
            epoch is one pass over the harmful groups; harmless ones are left out or repeated in turn. Unset: as in the
            data.
    """

    harmless_loss_type: list[str] | None = field(
        default=None, metadata={"help": "The objective of harmless groups; unset: sigmoid."}
    )
    harmless_loss_weight: float = field(default=1.0, metadata={"help": "Weight of that objective."})
    harmless_beta: float | None = field(
        default=None, metadata={"help": "Its temperature. Unset: its published value."}
    )
    harmless_train_on: str | None = field(
        default=None,
        metadata={
            "help": "Which pairs of harmless groups are trained on.",
            "choices": ["targets", "source", "both"],
        },
    )
    harmless_retention: str = field(
        default="none",
        metadata={
            "help": "What of harmless pairs is held still.",
            "choices": ["none", "hidden", "states", "kl", "reverse_kl", "mixed_kl"],
        },
    )
    harmless_retain_weight: float = field(default=1.0, metadata={"help": "Weight of that retention."})
    harmless_retain_target: float | None = field(
        default=None,
        metadata={"help": "Adapt that weight in each language until the retention is this; unset: fixed."},
    )
    harmless_refusal_target: float | None = field(
        default=None,
        metadata={"help": "Adapt it until this share of harmless prompts is refused; unset: fixed."},
    )
    harmless_max_response_length: int | None = field(
        default=None,
        metadata={"help": "Cut their responses to this many tokens; unset: max_response_length."},
    )
    harmless_share: float | None = field(
        default=None, metadata={"help": "Share of harmless groups in each optimizer step."}
    )

    # True in what `of_harmless` returns.
    is_of_harmless = False

    @property
    def keeps_own(self) -> bool:
        """Whether the trained pairs' own states are held where the starting policy has them."""
        return self.is_of_harmless and self.harmless_retention != NONE and self.harmless_retain_weight > 0

    @property
    def keeps_tokens(self) -> bool:
        """Whether they are held token by token, along the rejected response, too."""
        return self.keeps_own and self.harmless_retention != POOLED

    def check_harmless(self: Any) -> None:
        """Refuse settings for harmless groups that have no meaning.

        Raises:
            ConfigError: There is one.
        """
        if isinstance(self.harmless_loss_type, str):
            self.harmless_loss_type = [self.harmless_loss_type]
        names = self.harmless_loss_type
        if names is not None and not (
            isinstance(names, list)
            and names
            and len({*names}) == len(names)
            and (NONE not in names or len(names) == 1)
        ):
            raise ConfigError(
                f"`harmless_loss_type` is {names!r}; expected one or more objectives, each once, or 'none' alone."
            )
        require(self, "harmless_loss_weight harmless_retain_weight", is_at_least_0, "a number of at least 0")
        require(
            self,
            "harmless_beta harmless_retain_target",
            lambda v: v is None or is_positive(v),
            "a number above 0, or nothing",
        )
        require(
            self,
            "harmless_refusal_target",
            lambda v: v is None or (is_positive(v) and v < 1),
            "a share above 0 and below 1, or nothing",
        )
        require(
            self,
            "harmless_max_response_length",
            lambda v: v is None or is_whole(v, 1),
            "a whole number of at least 1, or nothing",
        )
        require(
            self,
            "harmless_share",
            lambda v: v is None or (is_positive(v) and v < 1),
            "a share above 0 and below 1, or nothing for that of the data",
        )
        require(
            self, "harmless_train_on", lambda v: v is None or v in TRAIN_ON, "'targets', 'source' or 'both'"
        )
        require(
            self,
            "harmless_retention",
            lambda v: v in RETENTIONS,
            "'none', 'hidden', 'states', 'kl', 'reverse_kl' or 'mixed_kl'",
        )
        view = self.harmless
        objectives = view.objectives
        for name, objective in objectives.by_name.items():
            if found := [_PER_STEP[need] for need in sorted(objective.needs & set(_PER_STEP))]:
                raise ConfigError(
                    f"`harmless_loss_type` names {name!r}, which needs {listed(found)} and is for `loss_type` alone. Choose "
                    "another objective."
                )
            if view.train_on != "targets" and objective.targets_only:
                raise ConfigError(
                    f"`harmless_train_on: {view.train_on}` does not go with `{name}`: {objective.targets_only}. Set "
                    "`harmless_train_on: targets`, or another `harmless_loss_type`."
                )
        if RETENTION in objectives.needs and view.keeps_own:
            raise ConfigError(
                f"`harmless_retention: {self.harmless_retention}` does not go with an objective that holds the source still. "
                "Remove it, or choose another `harmless_loss_type`."
            )
        targets = {
            name: value
            for name in ("harmless_retain_target", "harmless_refusal_target")
            if (value := getattr(self, name)) is not None
        }
        if len(targets) > 1:
            raise ConfigError(
                "`harmless_retain_target` and `harmless_refusal_target` both adapt `harmless_retain_weight`. Remove one of them."
            )
        if targets and not view.keeps_own:
            ((name, value),) = targets.items()
            raise ConfigError(
                f"`{name}: {value:g}` adapts the weight of `harmless_retention`, but nothing is "
                "held. Set `harmless_retention: mixed_kl` (or another), with a `harmless_retain_weight` above 0 to begin with, or remove it."
            )
        if self.harmless_beta is not None and "beta" not in objectives.reads:
            raise ConfigError(
                f"`harmless_beta={self.harmless_beta!r}` has no meaning for `harmless_loss_type` "
                f"{listed(self.harmless_loss_type or [HARMLESS_LOSS])}, which has no temperature. Remove it."
            )
        if self.harmless_share is not None and self.max_tokens_per_batch is not None:
            raise ConfigError(
                "`harmless_share` counts groups and `max_tokens_per_batch` tokens, so a step cannot have both. Remove one of "
                "them; `per_device_train_batch_size` sets the number of groups."
            )


def of_harmless(args: Any, neutral: Mapping[str, float]) -> Any:
    """The settings, an ``MPOConfig``, as they are for harmless groups: objective, weight, temperature and trained pairs are theirs.

    Args:
        args: The run's settings.
        neutral: See :func:`mpo.training.objectives.take_published`.
    """
    view: Any = copy.copy(args)
    view.is_of_harmless = True
    names = args.harmless_loss_type or [HARMLESS_LOSS]
    view.loss_type = [] if names == [NONE] else list(names)
    view.loss_weights = [args.harmless_loss_weight] * len(view.loss_type)
    view.min_source_gap = None
    view.beta, view.label_smoothing, view.train_on = args.harmless_beta, None, "targets"
    objectives = view.objectives.by_name.values()
    view.train_on = args.harmless_train_on or (
        "targets" if any(objective.targets_only for objective in objectives) else "both"
    )
    take_published(view, neutral, "harmless_")
    return view


def harmless_groups(groups: Dataset) -> np.ndarray:
    """``[groups]``, True for those of a dataset of groups, tokenized or not, that are harmless."""
    if "kind" not in groups.column_names:
        return np.zeros(len(groups), dtype=bool)
    return np.array([kind == HARMLESS for kind in groups.with_format(None)["kind"]], dtype=bool)


def pair_losses(pairs: PairTensors, args: Any, retain_weights: Tensor | None = None) -> Tensor:
    """The loss of each pair, by the objectives of its kind.

    Args:
        pairs: T pairs.
        args: The run's ``MPOConfig``.
        retain_weights: ``[languages]``, weight of the harmless pairs' retention; by default ``harmless_retain_weight`` for all.

    Returns:
        ``[T]``.
    """
    if pairs.by_kind is None:
        return args.objectives.loss(pairs)
    parts = []
    for place, settings in zip((False, True), (args, args.harmless), strict=True):
        part = pairs.of_kind(harmless=place)
        if part is None:
            continue
        losses = settings.objectives.loss(part)
        if settings.keeps_own:
            weight = settings.harmless_retain_weight
            losses = (
                losses
                + (weight if retain_weights is None else retain_weights[part.language]) * part.retention
            )
        parts.append(losses)
    order = torch.argsort(torch.cat(pairs.by_kind))
    return torch.cat(parts)[order]
