"""Scores preference pairs with a model, with and without a trainer."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import tqdm
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from mpo.data.tokenization import set_chat_template, tokenize_groups
from mpo.modeling.head import attach_reward_gap_head
from mpo.modeling.layout import BatchShape, Forward, batch_shape, usable_layout
from mpo.modeling.pairs import PairTensors, mismatch_sums, run_model
from mpo.training.harmless import harmless_groups
from mpo.training.order import GroupBatchSampler
from mpo.training.ranks import Ranks, SingleRank, gathered
from mpo.training.records import PairScore, Scores
from mpo.training.reference import GroupReference, build_or_load
from mpo.training.sampling import (
    GroupCollator,
    GroupDataset,
    Trained,
    step_of,
    target_languages,
    to_device,
)
from mpo.training.unique_pairs import probe_trees
from mpo.training.workload import trained_totals


@dataclass
class _Sums:
    records: list[tuple[int, int, PairScore]] = field(default_factory=list)
    retention: dict[tuple[int, int], float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of harmful and of harmless pairs
    pairs: list[int] = field(default_factory=lambda: [0, 0])
    tokens: int = 0


def score_dataset(
    forward: Forward,
    groups: Dataset,
    reference: GroupReference,
    *,
    languages: Sequence[str],
    source_language: str,
    shape: BatchShape,
    ranks: Ranks,
    batch_size: int = 1,
    trained: Trained = Trained(),  # noqa: B008 (frozen)
    harmless: Trained | None = None,
    pair_loss: Callable[[PairTensors], Tensor] | None = None,
    description: str = "Scoring",
    progress: bool = True,
) -> tuple[Scores, float]:
    """Score every pair of tokenized groups, sources included.

    All ranks call this and divide the groups; all get the whole result. Groups are gathered by their number, so a ragged
    last batch or a filler changes nothing.

    Args:
        forward: Model with the reward-gap head, in eval mode.
        groups: Tokenized groups.
        reference: The reference's values of these groups.
        languages: Target languages; a pair's language is its index here.
        source_language: Language of the sources.
        shape: How groups become model calls.
        ranks: The process group.
        batch_size: Groups per model call and rank.
        trained: Which pairs ``pair_loss`` is of, and what it needs.
        harmless: The same for harmless groups, where there are some.
        pair_loss: Loss of each such pair, to be averaged over the harmful and over the harmless pairs.
        description: Text of the progress bar.
        progress: Whether the main process shows it.

    Returns:
        The scores, and the mean of ``pair_loss`` over its pairs, or the sum of both kinds' (NaN without it).
    """
    kinds = harmless_groups(groups)
    if not kinds.any():
        harmless = None
    loader = DataLoader(
        GroupDataset(groups, reference),
        batch_sampler=GroupBatchSampler(
            np.arange(len(groups)), batch_size, num_ranks=ranks.num_processes, rank=ranks.process_index
        ),
        collate_fn=GroupCollator(
            languages,
            [1.0] * len(languages),
            shape,
            score_source=True,
            trained=trained,
            source_language=source_language,
            harmless=harmless,
            harmless_weights=[1.0] * len(languages),
        ),
        # A loader without one draws from torch's own numbers, and a run would depend on how often it is measured.
        generator=torch.Generator(),
    )
    totals = [
        number
        for kind, asked in ((False, trained), (True, harmless))
        if asked is not None
        for number in trained_totals(groups, asked, reference.carries_source, kinds == kind)
    ]
    means = step_of(totals)
    if trained.mismatched and pair_loss is not None:
        means["step"]["kl"] = _reference_point(forward, loader, ranks)
    sums = _Sums()
    holds_own = harmless is not None and (harmless.holds_own or harmless.keeps_tokens)
    quiet = not (progress and ranks.is_main_process) or bool(os.environ.get("TQDM_DISABLE", ""))
    for cpu_batch in tqdm(loader, desc=description, disable=quiet, leave=False):
        batch = {**to_device(cpu_batch, ranks.device), **means}
        trains = cpu_batch["counts"].nonzero().flatten()
        with torch.no_grad():
            pairs, output = run_model(forward, batch)
            if pair_loss is not None and len(trains):
                losses = pair_loss(pairs.select(trains.to(ranks.device)))
                of_harmless = cpu_batch["is_harmless"][trains] if harmless is not None else None
                for kind, value in enumerate(_by_kind(losses.double().cpu(), of_harmless)):
                    sums.losses[kind] += value
        assert output.response_logps is not None
        logps = output.response_logps.double().cpu().numpy()
        numbers, fillers = cpu_batch["groups"], cpu_batch["fillers"]
        order = [0] * len(numbers)
        for i, g in enumerate(cpu_batch["group_of_pair"].tolist()):
            if fillers[g]:
                continue
            is_source = bool(cpu_batch["is_source"][i])
            order[g] += 1
            language = source_language if is_source else languages[int(cpu_batch["language"][i])]
            scored = _score(numbers[g], language, is_source, logps[i], float(cpu_batch["reference_gap"][i]))
            sums.records.append((numbers[g], 0 if is_source else order[g], scored))
            # What is held of a harmless group is its trained pairs, where something is; of others it is the source.
            if bool(cpu_batch["counts"][i]) if holds_own and kinds[numbers[g]] else is_source:
                sums.retention[numbers[g], order[g]] = float(pairs.retention[i])
        counted = cpu_batch["totals"]
        sums.pairs = [sums.pairs[0] + counted[0], sums.pairs[1] + (counted[4] if len(counted) > 4 else 0)]
        if not all(fillers):
            sums.tokens += int(
                (cpu_batch["tree_ids"] >= 0).sum()
                if "tree_ids" in cpu_batch
                else cpu_batch["attention_mask"].sum()
            )

    parts = gathered([sums], ranks)
    records = [
        record for _, _, record in sorted((r for part in parts for r in part.records), key=lambda r: r[:2])
    ]
    retention = [(kinds[group], value) for part in parts for (group, _), value in part.retention.items()]
    scores = Scores(
        records=records,
        retention=_mean([value for is_harmless, value in retention if not is_harmless]),
        harmless_retention=_mean([value for is_harmless, value in retention if is_harmless]),
        tokens=sum(part.tokens for part in parts),
        harmless_groups=frozenset(np.flatnonzero(kinds).tolist()),
    )
    pairs_of_kind = [sum(part.pairs[kind] for part in parts) for kind in (0, 1)]
    if not (pair_loss and sum(pairs_of_kind)):
        return scores, math.nan
    return scores, math.fsum(
        math.fsum(part.losses[kind] for part in parts) / count
        for kind, count in enumerate(pairs_of_kind)
        if count
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _by_kind(losses: Tensor, is_harmless: Tensor | None) -> list[float]:
    """Sums over the harmful and over the harmless pairs."""
    if is_harmless is None:
        return [float(losses.sum()), 0.0]
    return [float(losses[is_harmless == kind].sum()) for kind in (False, True)]


def _reference_point(forward: Forward, loader: DataLoader[dict[str, Any]], ranks: Ranks) -> float:
    """KTO's estimate of the divergence from the reference, over all pairs of a dataset."""
    own = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in loader:
            own += mismatch_sums(forward, to_device(batch["mismatched"], ranks.device)).double().cpu()
    parts = gathered([own.tolist()], ranks)
    total, count = (math.fsum(part[i] for part in parts) for i in (0, 1))
    return max(0.0, total / max(count, 1))


def _score(group: int, language: str, is_source: bool, logps: np.ndarray, reference: float) -> PairScore:
    chosen, rejected = float(logps[0]), float(logps[1])
    return PairScore(group, language, is_source, chosen, rejected, chosen - rejected, reference)


def score_groups(
    model: Any,
    groups: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source_language: str = "en",
    max_length: int | None = 1024,
    max_response_length: int | None = None,
    chat_template: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
    pooling: str = "mean",
    layout: str = "tree",
    max_tokens_per_row: int | None = None,
    batch_size: int = 1,
    bad_rows: str = "error",
    autocast: AbstractContextManager[Any] | None = None,
    progress: bool = True,
) -> Scores:
    """Score groups with a model, in one process and without a trainer.

    The reference gap of a source is the model's own; for a PEFT model it is the base model's (adapter off), so that the
    scores of an adapter are measured against the model it was made from.

    Args:
        model: A causal language model or a PEFT model of one, on its device.
        groups: Dataset in the data contract's canonical form.
        tokenizer: Of the model.
        source_language: Language of the sources, for the records.
        max_length, max_response_length: Limits of prompt plus response and of the response alone, in tokens.
        chat_template, template_kwargs: See :func:`mpo.data.tokenization.set_chat_template` and
            :func:`mpo.data.tokenization.tokenize_pair`.
        pooling, layout, max_tokens_per_row: See :class:`mpo.training.config.MPOConfig`.
        batch_size: Groups per model call.
        bad_rows: ``"error"`` or ``"drop"``.
        autocast: Context of the model calls, for mixed precision.
        progress: Whether to show progress bars.

    Raises:
        DataError: A row breaks the data contract.
        ModelError: Model or tokenizer cannot be used.
    """
    set_chat_template(tokenizer, chat_template)
    tokenized, _ = tokenize_groups(
        groups,
        tokenizer,
        max_length=max_length,
        max_response_length=max_response_length,
        template_kwargs=template_kwargs,
        bad_rows=bad_rows,
        name="evaluation",
    )
    is_peft = hasattr(model, "peft_config")
    base: Any = model.get_base_model() if is_peft else model
    attach_reward_gap_head(base)
    ranks = SingleRank(next(model.parameters()).device)
    assert isinstance(tokenizer.pad_token_id, int)
    shape = batch_shape(
        ranks.device,
        layout=layout,
        pad_token_id=tokenizer.pad_token_id,
        pooling=pooling,
        max_tokens_per_row=max_tokens_per_row,
        attention=model.config.get_text_config()._attn_implementation,
    )

    @contextmanager
    def reference_forward() -> Any:
        with model.disable_adapter() if is_peft else nullcontext():
            yield model

    was_training = model.training
    model.eval()
    try:
        with autocast or nullcontext(), tempfile.TemporaryDirectory(prefix="mpo-reference-") as folder:
            layout = usable_layout(model, probe_trees(tokenized), shape, ranks.device, base.dtype)
            shape = replace(shape, layout=layout)
            reference = build_or_load(
                tokenized,
                reference_forward,
                cache_dir=folder,
                key={},
                shape=shape,
                hidden_size=base.config.get_text_config().hidden_size,
                ranks=ranks,
                name="evaluation",
            )
            scores, _ = score_dataset(
                model,
                tokenized,
                reference,
                languages=target_languages(tokenized),
                source_language=source_language,
                shape=shape,
                ranks=ranks,
                batch_size=batch_size,
                progress=progress,
            )
    finally:
        model.train(was_training)
    return scores
