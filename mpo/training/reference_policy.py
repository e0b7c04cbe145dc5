"""Which model is the reference of a run, how it is called, what identifies it, and how long it is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from mpo.errors import ModelError
from mpo.modeling.head import attach_reward_gap_head
from mpo.modeling.identity import ModelIdentity, identify_module
from mpo.modeling.layout import BatchShape, usable_layout
from mpo.modeling.loading import ModelSource
from mpo.training.config import MPOConfig
from mpo.training.harmless import POOLED, harmless_groups
from mpo.training.objectives import MISMATCHED, REFERENCE, RETENTION, SOURCE_GAP
from mpo.training.ranks import from_main
from mpo.training.reference import (
    HIDDEN,
    LOGPS,
    SHARED,
    STATES,
    GroupReference,
    MixedReference,
    Stored,
    build_or_load,
)
from mpo.training.sharding import CallablePolicy, destroy_engine, inference, place_frozen
from mpo.training.unique_pairs import SOURCE, TARGET, probe_trees

# Initialisations under which a fresh adapter computes exactly what the base model does.
_NEUTRAL_ADAPTER_INITS = (True, "gaussian", "orthogonal", "eva", "mica")


def needed_for(args: MPOConfig, *, evaluation: bool = False) -> Stored:
    """What of the reference a run needs of its data.

    Args:
        args: Its settings.
        evaluation: Whether the data are scored: then the sources' gaps and states are needed in any case.
    """
    needs, train_on = args.objectives.needs, args.train_on
    own = {LOGPS} if REFERENCE in needs else set()
    if own and args.objectives.needs_shared:
        own.add(SHARED)
    sources = set(own) if train_on != "targets" else set()
    if evaluation or SOURCE_GAP in needs or args.min_source_gap is not None:
        sources.add(LOGPS)
    if evaluation or RETENTION in needs:
        sources |= {LOGPS, HIDDEN}
    if args.keeps_own:
        own |= {LOGPS, HIDDEN if args.harmless_retention == POOLED else STATES}
        sources |= own if train_on != "targets" else set()
    sides = {"targets": {TARGET}, "source": {SOURCE}, "both": {SOURCE, TARGET}}[train_on]
    return Stored(
        frozenset(sources),
        frozenset(own if train_on != "source" else ()),
        frozenset(sides if MISMATCHED in needs else ()),
        args.max_length,
    )


class ReferencePolicy:
    """The frozen model that gives training its targets, asked before the first step and then freed.

    It is the explicit model where there is one; the base model, with the adapter switched off, below a new adapter that
    changes nothing yet; otherwise the policy itself as it is before its first step.

    Args:
        policy: The model that is trained.
        explicit: An explicit reference, or None.
        new_adapter: Configuration of the adapter that the trainer has put on the policy, or None.
        loaded_from: Where the policy's weights were loaded from, or None.
        cache_dir: Folder of the reference cache, shared by all ranks.
        shape: How sources become model calls; once values were asked for, with the layout that the model takes.
    """

    def __init__(
        self,
        policy: CallablePolicy,
        explicit: PreTrainedModel | None,
        *,
        new_adapter: Any,
        loaded_from: ModelSource | None,
        cache_dir: str,
        shape: BatchShape,
    ) -> None:
        self.shape = shape
        self.known: WeakKeyDictionary[Dataset, GroupReference] = WeakKeyDictionary()
        # Of data of both kinds the harmful and the harmless groups.
        self._by_kind: WeakKeyDictionary[Dataset, tuple[Dataset | None, ...]] = WeakKeyDictionary()
        self._policy = policy
        self._explicit: Any = explicit
        self._placed: Any = None  # the explicit reference as it can be called
        self._released = False
        self._adapter_off = (
            new_adapter is not None
            and getattr(new_adapter, "init_lora_weights", True) in _NEUTRAL_ADAPTER_INITS
        )
        self._loaded_from = loaded_from
        self._cache_dir = cache_dir
        self._layout_checked = False
        self._identity: ModelIdentity | None = None  # once it is computed

    def values(
        self, dataset: Dataset, name: str, stored: Stored | None = None, harmless: Stored | None = None
    ) -> GroupReference:
        """The reference's values of a tokenized dataset, computed or read from the cache when first asked for.

        Args:
            dataset: Tokenized groups.
            name: Of the split, for the progress bar.
            stored: What is needed; unset: gaps and states of the sources.
            harmless: What is needed of harmless groups; unset: the same.

        Raises:
            ModelError: The data is new and the reference is gone.
        """
        kinds = harmless_groups(dataset)
        if not kinds.any():
            return self._values(dataset, name, stored)
        if dataset not in self._by_kind:
            places = np.flatnonzero(~kinds), np.flatnonzero(kinds)
            self._by_kind[dataset] = tuple(dataset.select(place) if len(place) else None for place in places)
        harmful_part, harmless_part = self._by_kind[dataset]
        return MixedReference(
            kinds,
            (
                None if harmful_part is None else self._values(harmful_part, name, stored),
                None
                if harmless_part is None
                else self._values(
                    harmless_part, f"harmless {name}", stored if harmless is None else harmless
                ),
            ),
        )

    def _values(self, dataset: Dataset, name: str, stored: Stored | None) -> GroupReference:
        stored = Stored() if stored is None else stored
        known = self.known.get(dataset)
        if known is not None and stored <= known.stored:
            return known
        if stored:
            self._require_still_there()
        if not self._layout_checked:
            self._check_layout(dataset)
        self.known[dataset] = build_or_load(
            dataset,
            self.forward,
            cache_dir=self._cache_dir,
            key=self._key() if stored else {},
            shape=self.shape,
            hidden_size=self._policy.model.config.get_text_config().hidden_size,
            ranks=self._policy.accelerator,
            name=name,
            stored=stored if known is None else stored | known.stored,
        )
        return self.known[dataset]

    @contextmanager
    def forward(self) -> Iterator[Any]:
        """The reference as it is called in the reference pass: in eval mode, under the mixed precision of training."""
        accelerator = self._policy.accelerator
        if self._explicit is not None:
            if self._placed is None:
                attach_reward_gap_head(self._explicit)
                self._placed = place_frozen(self._explicit, accelerator)
            with inference(self._placed, accelerator) as model:
                yield model
        else:
            with (
                inference(self._policy.callable(), accelerator) as model,
                self._policy.model.disable_adapter() if self._adapter_off else nullcontext(),
            ):
                yield model

    def release(self) -> None:
        """Free an explicit reference and all that was made to call the reference: training is about to begin."""
        self._policy.release()
        destroy_engine(self._placed)
        self._released = self._released or self._explicit is not None
        self._explicit = self._placed = None

    def _require_still_there(self) -> None:
        if self._released:
            raise ModelError(
                "the reference of new data is asked for after `ref_model` was freed. Pass the data as `eval_dataset` when "
                "the trainer is made."
            )
        if self._policy.has_moved and not (self._adapter_off or self._explicit):
            raise ModelError(
                "the reference of new data is asked for after training has begun, when the starting policy is gone. "
                "Pass the data as `eval_dataset` when the trainer is made, or pass `ref_model`."
            )

    def _check_layout(self, dataset: Dataset) -> None:
        accelerator = self._policy.accelerator
        mixed = accelerator.mixed_precision in ("bf16", "fp16")
        dtype = torch.get_autocast_dtype(accelerator.device.type) if mixed else self._policy.model.dtype
        with self.forward() as forward:
            layout = usable_layout(forward, probe_trees(dataset), self.shape, accelerator.device, dtype)
        self.shape = replace(self.shape, layout=layout)
        self._layout_checked = True

    def _key(self) -> dict[str, Any]:
        """What identifies the reference's values besides the data."""
        return {
            "model": self.identity().digest,
            "mixed_precision": str(self._policy.accelerator.mixed_precision),
        }

    def identity(self) -> ModelIdentity:
        """Who the reference is, found out when first asked for: before training changes the policy. All ranks call this."""
        accelerator = self._policy.accelerator
        if self._identity is None:
            found = self._identify() if accelerator.is_main_process else None
            self._identity = from_main(found, accelerator)
            assert self._identity is not None
        return self._identity

    def _identify(self) -> ModelIdentity:
        """By its files where its weights still equal them, by its tensors otherwise."""
        model = self._policy.model
        starts_at_files = self._adapter_off or not hasattr(model, "peft_config")
        files = self._loaded_from if self._explicit is None and starts_at_files else None
        adapter_on = self._explicit is not None or not self._adapter_off
        return identify_module(self._explicit or model, adapter_on=adapter_on, files=files)
