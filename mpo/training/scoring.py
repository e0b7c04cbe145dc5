"""Scores preference pairs with a model: the numbers behind every table, with and without a trainer."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, tqdm
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from mpo.data.tokenization import set_chat_template, tokenize_groups
from mpo.errors import DataError
from mpo.modeling.head import RewardGapOutput, attach_reward_gap_head, logit_scale
from mpo.modeling.layout import BatchShape, Forward, batch_shape, usable_layout
from mpo.modeling.loss import retention_loss
from mpo.modeling.trees import MODEL_KEYS, Tree
from mpo.training.records import PairScore, Scores
from mpo.training.reference import SourceReference, build_or_load
from mpo.training.sampling import GroupBatchSampler, GroupCollator, GroupDataset, to_device

__all__ = [
    "PairScore",
    "PairTensors",
    "Scores",
    "call_model",
    "pair_tensors",
    "perplexity",
    "run_in_calls",
    "run_model",
    "score_groups",
    "score_loader",
]


@dataclass
class PairTensors:
    """
    The tensors of one batch of T target pairs from G groups: all a loss needs, whatever the batch's layout.

    Attributes:
        chosen_logps: ``[T]``, mean log-likelihood per token of the chosen responses under the policy, nats.
        rejected_logps: ``[T]``, the same for the rejected responses.
        reference_gap: ``[T]``, the reference's reward gap on the pair's source (a constant).
        retention: ``[T]``, retention term of the pair's source (0 where the source is not run).
        language: ``[T]``, index of the pair's language in the trainer's ``languages``.
        group_of_pair: ``[T]``, index of the pair's group, 0 to G - 1.
        source_hidden: ``[G, 2, H]``, pooled states of the source's two sequences under the policy, or None.
        reference_hidden: ``[G, 2, H]``, the same under the reference, or None.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    reference_gap: Tensor
    retention: Tensor
    language: Tensor
    group_of_pair: Tensor
    source_hidden: Tensor | None = None
    reference_hidden: Tensor | None = None


def call_model(forward: Forward, tensors: dict[str, Any], **kwargs: Any) -> RewardGapOutput:
    """One call of a model with the reward-gap head on the tensors of :func:`mpo.modeling.trees.build_batch`."""
    return forward(
        reward_gap_head=True, **{key: tensors[key] for key in MODEL_KEYS if key in tensors}, **kwargs
    )


def pair_tensors(
    batch: dict[str, Any], logps: Tensor, pooled: Tensor | None, pairs: Tensor | None = None
) -> PairTensors:
    """
    The tensors a loss needs, from what the head returned.

    Args:
        batch: from :class:`mpo.training.sampling.GroupCollator`.
        logps: ``[T, 2]``, scores of the target pairs.
        pooled: ``[G, 2, H]``, pooled states of the sources, or None.
        pairs: ``[T]``, which of the batch's pairs these are; None for all.
    """
    select = (lambda values: values) if pairs is None else (lambda values: values[pairs])
    group_of_pair = select(batch["group_of_pair"])
    reference_hidden = batch.get("reference_hidden")
    if pooled is None or not pooled.shape[0] or reference_hidden is None:
        pooled, reference_hidden = None, None
        retention = torch.zeros_like(logps[:, 0])
    else:
        retention = retention_loss(pooled, reference_hidden)[group_of_pair]
    return PairTensors(
        chosen_logps=logps[:, 0],
        rejected_logps=logps[:, 1],
        reference_gap=select(batch["reference_gap"]),
        retention=retention.to(logps.device),
        language=select(batch["language"]),
        group_of_pair=group_of_pair,
        source_hidden=pooled,
        reference_hidden=reference_hidden,
    )


def run_model(forward: Forward, batch: dict[str, Any], **kwargs: Any) -> tuple[PairTensors, RewardGapOutput]:
    """
    Run a model on a collated batch (:class:`mpo.training.sampling.GroupCollator`), in one call, or in several if it is split.

    Returns:
        The target pairs' tensors, and the head's whole output (scores of sources, if any, follow the targets').
    """
    count = batch["reference_gap"].shape[0]
    if "calls" not in batch:
        output = call_model(forward, batch, **kwargs)
    else:
        source = (
            call_model(forward, batch["source_call"])
            if batch["source_call"] is not None
            else RewardGapOutput()
        )
        parts: list[Tensor] = []
        for call in batch["calls"]:
            scored = call_model(forward, call).response_logps
            assert scored is not None
            parts.append(scored)
        order = torch.argsort(torch.cat([call["pairs"] for call in batch["calls"]]))
        output = RewardGapOutput(response_logps=torch.cat(parts)[order], pooled=source.pooled)
    assert output.response_logps is not None
    return pair_tensors(batch, output.response_logps[:count], output.pooled), output


def run_in_calls(
    forward: Forward, batch: dict[str, Any], backward: Callable[[PairTensors, Tensor], None]
) -> None:
    """
    Forward and backward of a batch that the collator split into several calls: a call's activations are freed before the
    next begins.

    The pairs of all calls share their sources. Each call's backward stops at the sources' states, where the gradients add
    up, and one backward from there finishes the step: the same sums as in a single call.

    Args:
        forward: the model with the reward-gap head.
        batch: with ``calls`` and ``source_call``, see :class:`mpo.training.sampling.GroupCollator`.
        backward: called with the tensors of a call's pairs and their places in the batch ``[T]``; makes their loss and runs
            its backward.
    """
    source_call = batch["source_call"]
    pooled = call_model(forward, source_call).pooled if source_call is not None else None
    shared = pooled.detach().requires_grad_() if pooled is not None else None
    for call in batch["calls"]:
        output = call_model(forward, call)
        assert output.response_logps is not None
        backward(pair_tensors(batch, output.response_logps, shared, call["pairs"]), call["pairs"])
    if pooled is not None and shared is not None and shared.grad is not None:
        torch.autograd.backward(pooled, shared.grad)


@dataclass
class _Sums:
    records: list[tuple[int, int, PairScore]] = field(default_factory=list)
    retention: dict[int, float] = field(default_factory=dict)
    loss: float = 0.0
    pairs: int = 0
    tokens: int = 0


def score_loader(
    forward: Forward,
    loader: Iterable[dict[str, Any]],
    *,
    languages: Sequence[str],
    source_language: str,
    device: torch.device,
    pair_loss: Callable[[PairTensors], Tensor] | None = None,
    num_ranks: int = 1,
    description: str = "Scoring",
    progress: bool = True,
) -> tuple[Scores, float]:
    """
    Score every pair that a loader yields, sources included.

    All ranks call this with their own loader; all get the whole result. Groups are gathered by their number, so a
    ragged last batch or a filler changes nothing.

    Args:
        forward: model with the reward-gap head, in eval mode.
        loader: batches of a :class:`mpo.training.sampling.GroupCollator` with ``score_source`` and ``run_source``.
        languages: target languages, in the collator's order.
        source_language: language of the sources.
        device: of the model.
        pair_loss: loss of each target pair, to be averaged.
        num_ranks: number of ranks that take part.
        description, progress: of the progress bar.

    Returns:
        The scores, and the mean of ``pair_loss`` over all target pairs (NaN without it).
    """
    sums = _Sums()
    bar = tqdm(loader, desc=description, disable=not progress or bool(os.environ.get("TQDM_DISABLE", "")))
    for cpu_batch in bar:
        batch = to_device(cpu_batch, device)
        with torch.no_grad():
            pairs, output = run_model(forward, batch)
            losses = pair_loss(pairs) if pair_loss is not None else None
        assert output.response_logps is not None
        logps = output.response_logps.double().cpu().numpy()
        counts = cpu_batch["counts"].numpy() > 0
        groups = cpu_batch["groups"]
        pair_groups = cpu_batch["group_of_pair"].tolist()
        order = dict.fromkeys(range(len(groups)), 0)
        for i, g in enumerate(pair_groups):
            order[g] += 1
            if counts[i]:
                language = languages[int(cpu_batch["language"][i])]
                reference = float(cpu_batch["reference_gap"][i])
                sums.records.append(
                    (groups[g], order[g], _score(groups[g], language, False, logps[i], reference))
                )
        for g, group in enumerate(groups):
            pair = pair_groups.index(g)
            if counts[pair]:
                reference = float(cpu_batch["reference_gap"][pair])
                scored = logps[len(pair_groups) + g]
                sums.records.append((group, 0, _score(group, source_language, True, scored, reference)))
                sums.retention[group] = float(pairs.retention[pair])
        if losses is not None:
            sums.loss += float((losses * batch["counts"]).double().sum())
        sums.pairs += int(counts.sum())
        if counts.any():
            sums.tokens += int(
                (cpu_batch["tree_ids"] >= 0).sum()
                if "tree_ids" in cpu_batch
                else cpu_batch["attention_mask"].sum()
            )

    parts: list[_Sums] = gather_object([sums]) if num_ranks > 1 else [sums]
    records = [
        record for _, _, record in sorted((r for part in parts for r in part.records), key=lambda r: r[:2])
    ]
    retention = {group: value for part in parts for group, value in part.retention.items()}
    total_pairs = sum(part.pairs for part in parts)
    scores = Scores(
        records=records,
        retention=math.fsum(retention.values()) / len(retention) if retention else None,
        tokens=sum(part.tokens for part in parts),
    )
    mean_loss = (
        math.fsum(part.loss for part in parts) / total_pairs if pair_loss and total_pairs else math.nan
    )
    return scores, mean_loss


def _score(group: int, language: str, is_source: bool, logps: np.ndarray, reference: float) -> PairScore:
    chosen, rejected = float(logps[0]), float(logps[1])
    return PairScore(group, language, is_source, chosen, rejected, chosen - rejected, reference)


def evaluation_loader(
    groups: Dataset,
    reference: SourceReference,
    *,
    languages: Sequence[str],
    shape: BatchShape,
    batch_size: int = 1,
    num_ranks: int = 1,
    rank: int = 0,
) -> DataLoader[dict[str, Any]]:
    """A loader over all groups in order, for :func:`score_loader`."""
    return DataLoader(
        GroupDataset(groups, reference),
        batch_sampler=GroupBatchSampler(np.arange(len(groups)), batch_size, num_ranks=num_ranks, rank=rank),
        collate_fn=GroupCollator(
            languages=languages,
            language_weights=[1.0] * len(languages),
            layout=shape.layout,
            max_tokens_per_row=shape.max_tokens_per_row,
            pad_token_id=shape.pad_token_id,
            pooling=shape.pooling,
            score_source=True,
        ),
    )


class _SingleRank:
    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_for_everyone(self) -> None:
        pass


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
    """
    Score groups with a model, in one process and without a trainer.

    The reference gap of a source is the model's own; for a PEFT model it is the base model's (adapter off), so that the
    scores of an adapter are measured against the model it was made from.

    Args:
        model: a causal language model or a PEFT model of one, on its device.
        groups: dataset in the data contract's canonical form.
        tokenizer: of the model.
        source_language: language of the sources, for the records.
        max_length, max_response_length: limits of prompt plus response and of the response alone, in tokens.
        chat_template, template_kwargs: see :func:`mpo.data.tokenization.set_chat_template` and
            :func:`mpo.data.tokenization.tokenize_pair`.
        pooling, layout, max_tokens_per_row: see :class:`mpo.training.config.MPOConfig`.
        batch_size: groups per model call.
        bad_rows: ``"error"`` or ``"drop"``.
        autocast: context of the model calls, for mixed precision.
        progress: show progress bars.

    Raises:
        DataError, ModelError: as when training.
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
    device = next(model.parameters()).device
    assert isinstance(tokenizer.pad_token_id, int)
    shape = batch_shape(
        device,
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
            layout = usable_layout(model, probe_trees(tokenized), shape, device, base.dtype)
            shape = replace(shape, layout=layout)
            reference = build_or_load(
                tokenized,
                reference_forward,
                cache_dir=folder,
                key={},
                shape=shape,
                hidden_size=base.config.get_text_config().hidden_size,
                ranks=_SingleRank(device),
                name="evaluation",
            )
            languages = target_languages(tokenized)
            loader = evaluation_loader(
                tokenized, reference, languages=languages, shape=shape, batch_size=batch_size
            )
            scores, _ = score_loader(
                model,
                loader,
                languages=languages,
                source_language=source_language,
                device=device,
                progress=progress,
            )
    finally:
        model.train(was_training)
    return scores


def probe_trees(tokenized: Dataset) -> list[Tree]:
    """A few source trees of a tokenized dataset, for :func:`mpo.modeling.layout.usable_layout`."""
    rows = tokenized[: min(3, len(tokenized))]
    return [
        Tree(*parts)
        for parts in zip(rows["source_prompt"], rows["source_chosen"], rows["source_rejected"], strict=True)
    ]


def target_languages(tokenized: Dataset) -> list[str]:
    """Target languages of a tokenized dataset, sorted."""
    return sorted(count_languages(tokenized))


def count_languages(tokenized: Dataset) -> dict[str, int]:
    """Number of target pairs of each language of a tokenized dataset."""
    import pyarrow.compute as pc

    counts: dict[str, int] = {}
    for table in tokenized.with_format("arrow").select_columns(["target_language"]).iter(batch_size=10_000):
        values = pc.value_counts(pc.list_flatten(table["target_language"]))
        for value in values.to_pylist():
            counts[value["values"]] = counts.get(value["values"], 0) + value["counts"]
    return counts


def perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 1024,
    batch_size: int = 8,
) -> float:
    """
    Perplexity of texts: ``exp`` of the mean negative log-likelihood per token over all tokens but the first of each text.

    Args:
        model: a causal language model or a PEFT model of one.
        tokenizer: of the model; its own special tokens are added.
        texts: at least one text of two tokens or more.
        max_length: texts are cut to this many tokens.
        batch_size: texts per model call.

    Raises:
        DataError: no text has two tokens.
    """
    scored = text_likelihoods(model, tokenizer, texts, max_length=max_length, batch_size=batch_size)
    tokens = sum(count for _, count in scored)
    if not tokens:
        raise DataError("no text has two tokens or more, so there is nothing to predict.")
    return math.exp(-math.fsum(total for total, _ in scored) / tokens)


def text_likelihoods(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 1024,
    batch_size: int = 8,
) -> list[tuple[float, int]]:
    """
    Log-likelihood of each text and the number of tokens it is of: all but the text's first, (0, 0) where there is no other.

    Args:
        model, tokenizer, texts, max_length, batch_size: as for :func:`perplexity`.

    Returns:
        ``[(sum of the tokens' log-probabilities in nats, number of tokens)]`` in the order of the texts.
    """
    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model
    config = base.config.get_text_config()
    head = base.get_output_embeddings()
    device = head.weight.device
    ids = [tokenizer(text)["input_ids"][:max_length] for text in texts]
    scored = [(0.0, 0)] * len(ids)
    order = sorted((n for n, i in enumerate(ids) if len(i) >= 2), key=lambda n: len(ids[n]))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = [ids[n] for n in numbers]
            length = max(map(len, batch))
            padded = torch.tensor([i + [0] * (length - len(i)) for i in batch], device=device)
            mask = torch.tensor([[1] * len(i) + [0] * (length - len(i)) for i in batch], device=device)
            with torch.no_grad():
                hidden = base.base_model(
                    input_ids=padded, attention_mask=mask, use_cache=False
                ).last_hidden_state
                predicts = mask[:, 1:].bool()
                log_probs = ChunkedLogProbFunction.apply(
                    hidden[:, :-1][predicts],
                    head.weight,
                    getattr(head, "bias", None),
                    padded[:, 1:][predicts],
                    1.0,
                    8192,
                    getattr(config, "final_logit_softcapping", None),
                    logit_scale(config),
                    (),
                )[0]
            counts = [len(i) - 1 for i in batch]
            for n, part in zip(numbers, log_probs.double().split(counts), strict=True):
                scored[n] = (float(part.sum()), len(ids[n]) - 1)
    finally:
        model.train(was_training)
    return scored
