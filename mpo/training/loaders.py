"""The micro-batches of a training run, from its settings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mpo.common.log import get_logger
from mpo.modeling.layout import batch_shape
from mpo.training.checks import check_state_layer
from mpo.training.config import MPOConfig
from mpo.training.harmless import harmless_groups
from mpo.training.order import TokenBudgetSampler
from mpo.training.ranks import Ranks
from mpo.training.reference import GroupReference
from mpo.training.sampling import GroupCollator, GroupDataLoader, GroupDataset, Trained
from mpo.training.sharding import tokens_per_call
from mpo.training.workload import tokens_of_step, train_sampler

logger = get_logger(__name__)


def training_collator(
    args: MPOConfig,
    languages: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    *,
    router_loss: bool,
    harmless: bool = False,
) -> GroupCollator:
    """What makes a micro-batch of training, with the budgets of the settings or of the device; languages weigh the same.

    Args:
        args, languages, model, tokenizer, accelerator: Of the trainer.
        router_loss: Whether the loss of a mixture of experts is minimised, too.
        harmless: Whether some groups are harmless.

    Raises:
        ConfigError, ModelError: The settings ask for states of the model that it has not.
    """
    check_state_layer(args, model)
    assert isinstance(tokenizer.pad_token_id, int)
    shape = batch_shape(
        accelerator.device,
        layout=args.batch_layout,
        pad_token_id=tokenizer.pad_token_id,
        pooling=args.retain_pooling,
        max_tokens_per_row=args.max_tokens_per_row,
        tokens_per_batch=args.reference_tokens_per_batch,
        attention=model.config.get_text_config()._attn_implementation,
    )
    return GroupCollator(
        languages,
        [1.0] * len(languages),
        shape,
        run_source=args.holds_sources,
        trained=Trained.by(args),
        source_language=args.source_language,
        pad_to_multiple_of=args.pad_to_multiple_of or None,  # type: ignore[arg-type]
        max_tokens_per_call=tokens_per_call(args, accelerator, router_loss=router_loss),
        harmless=Trained.by(args.harmless) if harmless else None,
        harmless_weights=[1.0] * len(languages) if harmless else (),
    )


def training_loader(
    dataset: Dataset,
    reference: GroupReference,
    groups: np.ndarray,
    collator: GroupCollator,
    args: MPOConfig,
    ranks: Ranks,
    *,
    batch_size: int,
) -> GroupDataLoader:
    """A rank's micro-batches of training: by tokens where there is a budget, else by number of groups.

    Args:
        dataset, reference: All tokenized groups, and the reference's values of them.
        groups: ``[n]``, those to draw from.
        collator, args, ranks: Of the trainer.
        batch_size: Groups per rank and micro-batch.

    Raises:
        DataError: There is not one micro-batch.
    """
    tokens = None
    harmless = harmless_groups(dataset)
    for kind, trained in ((False, collator.trained), (True, collator.harmless)):
        if trained is not None and not trained.targets:
            runs = reference.carries_source if trained.sources else np.zeros(len(dataset), dtype=bool)
            groups = groups[(harmless[groups] != kind) | runs[groups]]
    if args.max_tokens_per_batch is not None:
        tokens = tokens_of_step(dataset, args, collator.shape.layout)[groups]
    sampler = train_sampler(
        args,
        groups,
        tokens,
        batch_size=batch_size,
        num_ranks=ranks.num_processes,
        rank=ranks.process_index,
        harmless=harmless[groups],
    )
    if isinstance(sampler, TokenBudgetSampler) and sampler.oversized and tokens is not None:
        logger.warning(
            f"{sampler.oversized} groups have more than max_tokens_per_batch={args.max_tokens_per_batch} tokens (the "
            f"largest {int(tokens.max())}) and are micro-batches of their own. `max_targets_per_group` makes groups "
            "smaller."
        )
    workers = args.dataloader_num_workers
    return GroupDataLoader(
        GroupDataset(dataset, reference),
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory and ranks.device.type == "cuda",
        persistent_workers=args.dataloader_persistent_workers if workers else False,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
    )
