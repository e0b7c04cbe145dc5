"""A run's work, counted once: groups, pairs and tokens, and the micro-batches and optimizer steps made of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from mpo.data.contract import PARTS
from mpo.data.tokenization import tokenize_groups
from mpo.errors import DataError
from mpo.training.config import MPOConfig
from mpo.training.harmless import harmless_groups
from mpo.training.objectives import STATES
from mpo.training.order import (
    EpochSampler,
    GroupBatchSampler,
    ShareSampler,
    TokenBudgetSampler,
    drawn_harmless,
)
from mpo.training.reference_policy import needed_for
from mpo.training.sampling import Trained
from mpo.training.unique_pairs import first_of_each, unique_sources

# The official code runs source and target of a pair as two batches, each of two sequences (prompt + chosen, prompt +
# rejected) that are padded to one length, a multiple of 8.
_OFFICIAL_MULTIPLE = 8


@dataclass(frozen=True)
class Workload:
    """The work of one epoch.

    Attributes:
        group_tokens: ``[groups]`` int64, tokens that each group brings to a micro-batch (:func:`group_tokens`).
        pairs: Number of target pairs.
        tree_tokens: Tokens of all trees that are run, each with its prompt once: of the targets and, where the retention
            term asks for them, of the sources, once for each group; of the pairs that ``train_on`` says otherwise.
        trees: Number of these trees.
        longest_tree: Tokens of the longest tree, sources included.
        reference_tokens: Tokens that the reference pass runs: of the unique sources for MPO, and of the targets for an
            objective that compares with the reference on them.
        official_tokens: Tokens of the same pairs in the official code's batches, padding included; 0 if not known.
        harmless: ``[groups]``, True for the harmless ones; None where there are none.
        harmless_share: Share of them in each step; None for that of the data.
    """

    group_tokens: np.ndarray
    pairs: int
    tree_tokens: int
    trees: int
    longest_tree: int
    reference_tokens: int
    official_tokens: int = 0
    harmless: np.ndarray | None = None
    harmless_share: float | None = None

    @property
    def groups(self) -> int:
        """Number of groups, after dividing those with more targets than ``max_targets_per_group``."""
        return len(self.group_tokens)

    @property
    def tokens(self) -> int:
        """Tokens of an epoch in the layout of the batches, without padding; with a share the harmless ones on average."""
        if self.harmless is None or self.harmless_share is None:
            return int(self.group_tokens.sum())
        run = self.group_tokens > 0
        harmful, harmless = (self.group_tokens[run & kind] for kind in (~self.harmless, self.harmless))
        return round(harmful.sum() + harmless.mean() * drawn_harmless(len(harmful), self.harmless_share))

    @property
    def mean_tree(self) -> float:
        """Mean tokens of a tree."""
        return self.tree_tokens / self.trees


@dataclass(frozen=True)
class Schedule:
    """How long a run trains.

    Attributes:
        micro_batches: Of an epoch, on each rank.
        steps: Optimizer steps of the whole run.
        epochs: Passes over the data in these steps.
    """

    micro_batches: int
    steps: int
    epochs: float


def tokenize_for_training(
    groups: Dataset, tokenizer: PreTrainedTokenizerBase, args: MPOConfig, *, name: str = "train"
) -> tuple[Dataset, list[str]]:
    """Tokenize groups as the settings of a run say; see :func:`mpo.data.tokenization.tokenize_groups`."""
    return tokenize_groups(
        groups,
        tokenizer,
        max_length=args.max_length,
        max_response_length=args.max_response_length,
        harmless_max_response_length=args.harmless_max_response_length,
        harmless_alike=not args.harmless.objectives.names,
        template_kwargs=args.chat_template_kwargs,  # type: ignore[arg-type]  # parsed, where it was text
        bad_rows=args.bad_rows,
        group_by_source=args.group_by_source,
        max_targets_per_group=args.max_targets_per_group,
        num_proc=args.dataset_num_proc,
        name=name,
    )


def count_work(groups: Dataset, args: MPOConfig) -> Workload:
    """Count the work of tokenized groups.

    Args:
        groups: From :func:`tokenize_for_training`.
        args: The objective and ``train_on`` decide what is run, ``batch_layout`` what a group's tokens are.
    """
    harmless = harmless_groups(groups)
    if harmless.any() and not args.is_of_harmless:
        return _both_kinds(groups, args, harmless)
    pairs = official = target_tokens = 0
    source_sizes = []
    for sources, targets, pairs_of_group in _lengths(groups):
        pairs += targets.shape[1]
        target_tokens += int(targets.sum())
        official += int(_official(targets).sum() + _official(sources) @ pairs_of_group)
        source_sizes.append(sources.sum(axis=0))
    _, first_groups, _ = unique_sources(groups)
    trained = Trained.by(args)
    sources_run = len(groups) if args.holds_sources else len(first_groups) if trained.sources else 0
    return Workload(
        group_tokens=tokens_of_step(groups, args, args.batch_layout),
        pairs=pairs,
        tree_tokens=int(tokens_of_step(groups, args, "tree").sum()),
        trees=(pairs if trained.targets else 0) + sources_run,
        longest_tree=longest_tree(groups),
        reference_tokens=_of_reference(
            args, int(np.concatenate(source_sizes)[first_groups].sum()), target_tokens
        ),
        official_tokens=official,
    )


def _both_kinds(groups: Dataset, args: MPOConfig, harmless: np.ndarray) -> Workload:
    """The work of groups some of which are harmless: each kind's by its own settings."""
    places = np.flatnonzero(~harmless), np.flatnonzero(harmless)
    parts = [
        count_work(groups.select(place), settings)
        for place, settings in zip(places, (args, args.harmless), strict=True)
        if len(place)
    ]
    return _sum_of_kinds(parts, args, harmless)


def _sum_of_kinds(parts: Sequence[Workload], args: MPOConfig, harmless: np.ndarray) -> Workload:
    """The work of harmful and of harmless groups as one; ``harmless`` ``[groups]`` says which these are."""
    tokens = np.empty(len(harmless), dtype=np.int64)
    kinds = [kind for kind in (~harmless, harmless) if kind.any()]
    for kind, part in zip(kinds, parts, strict=True):
        tokens[kind] = part.group_tokens
    return Workload(
        group_tokens=tokens,
        pairs=sum(part.pairs for part in parts),
        tree_tokens=sum(part.tree_tokens for part in parts),
        trees=sum(part.trees for part in parts),
        longest_tree=max(part.longest_tree for part in parts),
        reference_tokens=sum(part.reference_tokens for part in parts),
        official_tokens=sum(part.official_tokens for part in parts),
        harmless=harmless,
        harmless_share=args.harmless_share,
    )


def assume_work(args: MPOConfig, *, sources: int, targets: int, tree_tokens: int) -> Workload:
    """The work of data that are not at hand.

    Args:
        args: Decide how the pairs are grouped and whether sources are run.
        sources: Number of sources.
        targets: Target pairs of each source.
        tree_tokens: Tokens of each tree.

    With ``harmless_share`` that share of the sources is taken to be harmless, and at least one is of each kind.
    """

    def of(settings: MPOConfig, count: int) -> Workload:
        run_source = settings.runs_sources
        most = (settings.max_targets_per_group or targets) if settings.group_by_source else 1
        pairs_of_group = np.array([min(most, targets - start) for start in range(0, targets, most)])
        tokens = np.tile((pairs_of_group + run_source) * tree_tokens, count)
        trees = count * targets + (len(tokens) if run_source else 0)
        return Workload(
            group_tokens=tokens,
            pairs=count * targets,
            tree_tokens=trees * tree_tokens,
            trees=trees,
            longest_tree=tree_tokens,
            reference_tokens=_of_reference(settings, count * tree_tokens, count * targets * tree_tokens),
        )

    if args.harmless_share is None:
        return of(args, sources)
    harmless = max(1, round(args.harmless_share * sources))
    parts = [of(args, max(1, sources - harmless)), of(args.harmless, harmless)]
    return _sum_of_kinds(parts, args, np.repeat([False, True], [part.groups for part in parts]))


def _of_reference(args: MPOConfig, sources: int, targets: int) -> int:
    """Of tokens of all sources and of all targets, those that the reference pass runs."""
    stored = needed_for(args)
    return bool(stored.sources) * sources + bool(stored.targets) * targets


def schedule(
    tokens: np.ndarray, args: MPOConfig, num_ranks: int, harmless: np.ndarray | None = None
) -> Schedule:
    """Micro-batches, optimizer steps and epochs of a run.

    Args:
        tokens: ``[groups]``, tokens of each group.
        args: The run's settings.
        num_ranks: Processes, one for each GPU.
        harmless: ``[groups]``, True for the harmless ones, or None for none.

    Raises:
        DataError: No micro-batch can be made, see :func:`train_sampler`.
    """
    run = np.flatnonzero(tokens)
    own = None if harmless is None else harmless[run]
    micro_batches = len(train_sampler(args, run, tokens[run], num_ranks=num_ranks, harmless=own))
    each = math.ceil(micro_batches / args.gradient_accumulation_steps)
    if args.max_steps > 0:
        return Schedule(micro_batches, args.max_steps, args.max_steps / each)
    return Schedule(micro_batches, math.ceil(args.num_train_epochs * each), args.num_train_epochs)


@dataclass(frozen=True)
class Seen:
    """What a run has trained on after some optimizer steps.

    Attributes:
        steps: Optimizer steps.
        pairs: Pairs trained on, each counted as often as it was.
        tokens: Of the trees that were run for them, without padding, prompts once.
    """

    steps: int = 0
    pairs: int = 0
    tokens: int = 0


def seen_by_step(
    groups: Dataset, args: MPOConfig, *, num_ranks: int = 1, kept: np.ndarray | None = None
) -> Iterator[Seen]:
    """Follow a run step by step, epoch after epoch without end, as its sampler draws the groups.

    Args:
        groups: From :func:`tokenize_for_training`.
        args: The run's settings.
        num_ranks: Processes.
        kept: ``[n]``, the groups that are drawn from; by default all.

    Raises:
        DataError: No micro-batch can be made, see :func:`train_sampler`.
    """
    tokens = tokens_of_step(groups, args, args.batch_layout)
    pairs = _trained_pairs(groups, args)
    drawn = np.arange(len(groups)) if kept is None else kept
    drawn = drawn[pairs[drawn] > 0]
    harmless = harmless_groups(groups)[drawn]
    samplers = [
        train_sampler(args, drawn, tokens[drawn], num_ranks=num_ranks, rank=rank, harmless=harmless)
        for rank in range(num_ranks)
    ]
    seen = Seen()
    for epoch in itertools.count():
        for sampler in samplers:
            sampler.set_epoch(epoch)
        micro_batches = zip(*samplers, strict=True)
        while step := list(itertools.islice(micro_batches, args.gradient_accumulation_steps)):
            # A filler, which a rank without a group gets, is negative.
            run = [group for ranks in step for batch in ranks for group in batch if group >= 0]
            seen = Seen(
                seen.steps + 1, seen.pairs + int(pairs[run].sum()), seen.tokens + int(tokens[run].sum())
            )
            yield seen


def _trained_pairs(groups: Dataset, args: MPOConfig) -> np.ndarray:
    """``[groups]``, pairs of each group that are trained on."""
    counts = np.zeros(len(groups), dtype=np.int64)
    harmless = harmless_groups(groups)
    for place, settings in ((~harmless, args), (harmless, args.harmless)):
        part, trained = np.flatnonzero(place), Trained.by(settings)
        if not len(part):
            continue
        own = groups.select(part)
        if trained.targets:
            counts[part] += np.concatenate([pairs for _, _, pairs in _lengths(own)])
        if trained.sources:
            counts[part] += first_of_each(unique_sources(own)[0])
    return counts


def train_sampler(
    args: MPOConfig,
    indices: np.ndarray,
    tokens: np.ndarray | None,
    *,
    num_ranks: int,
    rank: int = 0,
    batch_size: int | None = None,
    harmless: np.ndarray | None = None,
) -> EpochSampler:
    """What draws a rank's micro-batches from groups: by count, or by tokens with ``max_tokens_per_batch``.

    Args:
        args: The run's settings.
        indices: ``[n]``, groups to draw from.
        tokens: ``[n]``, tokens of each; only asked for with ``max_tokens_per_batch``.
        num_ranks, rank: The process group.
        batch_size: Groups of a micro-batch, ``per_device_train_batch_size`` by default.
        harmless: ``[n]``, True for the harmless ones of ``indices``, or None for none.

    Raises:
        ConfigError: ``harmless_share`` is set, and there are no groups of one kind.
        DataError: There are fewer groups than a micro-batch on each rank, and ``dataloader_drop_last`` drops them.
    """
    options: dict[str, Any] = {
        "num_ranks": num_ranks,
        "rank": rank,
        "seed": args.order_seed,
        "drop_last": args.dataloader_drop_last,
    }
    sampler: EpochSampler
    if args.harmless_share is not None:
        own = np.zeros(len(indices), dtype=bool) if harmless is None else harmless
        options |= {"harmless": own, "share": args.harmless_share}
        sampler = ShareSampler(indices, batch_size or args.per_device_train_batch_size, **options)
    elif args.max_tokens_per_batch is None:
        sampler = GroupBatchSampler(indices, batch_size or args.per_device_train_batch_size, **options)
    else:
        assert tokens is not None
        sampler = TokenBudgetSampler(indices, tokens, args.max_tokens_per_batch, **options)
    if len(sampler) == 0:
        raise DataError(
            f"{len(indices)} groups are less than one micro-batch on each of {num_ranks} ranks, and "
            "`dataloader_drop_last` drops them."
        )
    return sampler


def largest_micro_batch(tokens: np.ndarray, args: MPOConfig, batch_size: int | None = None) -> int:
    """The most tokens that a micro-batch of groups with these ``tokens`` can have."""
    sizes = np.sort(tokens)
    if args.max_tokens_per_batch is not None:
        return max(int(sizes[-1]), min(args.max_tokens_per_batch, int(sizes.sum())))
    return int(sizes[-(batch_size or args.per_device_train_batch_size) :].sum())


def tokens_of_step(groups: Dataset, args: MPOConfig, layout: str) -> np.ndarray:
    """Tokens that each group brings to a micro-batch of a run, ``[groups]``; 0 for one with nothing to run.

    Args:
        groups: Tokenized groups.
        args: The run's settings.
        layout: See :func:`group_tokens`.
    """
    harmless = harmless_groups(groups)
    if harmless.any() and not args.is_of_harmless:
        tokens = np.empty(len(groups), dtype=np.int64)
        for place, settings in ((~harmless, args), (harmless, args.harmless)):
            part = np.flatnonzero(place)
            if len(part):
                tokens[part] = tokens_of_step(groups.select(part), settings, layout)
        return tokens
    trained = Trained.by(args)
    sources: bool | np.ndarray = args.holds_sources
    if trained.sources:
        sources = first_of_each(unique_sources(groups)[0])
    tokens = group_tokens(groups, run_source=sources, run_targets=trained.targets, layout=layout)
    if STATES in args.objectives.needs and args.train_on == "targets":
        # Of the source its prompt is run, with one token of each response.
        prompts = np.concatenate([lengths[0] for lengths, _, _ in _lengths(groups)])
        tokens += prompts + 2 if layout == "tree" else 2 * (prompts + 1)
    return tokens


def group_tokens(
    groups: Dataset, *, run_source: bool | np.ndarray = True, run_targets: bool = True, layout: str = "tree"
) -> np.ndarray:
    """Tokens that each group brings to a micro-batch, without padding.

    Only list offsets are read, never the tokens, so this takes seconds and a few megabytes for a million groups.

    Args:
        groups: Tokenized groups.
        run_source: Whether the source is run while training; ``[groups]`` where not all groups are alike.
        run_targets: Whether the targets are.
        layout: ``"tree"`` counts a pair's prompt once, ``"padded"`` twice.

    Returns:
        ``[groups]`` int64.
    """
    weights = np.array([1 if layout == "tree" else 2, 1, 1])
    runs = np.broadcast_to(run_source, len(groups)).astype(np.int64)
    counts = [np.zeros(0, dtype=np.int64)]
    start = 0
    for sources, targets, pairs in _lengths(groups):
        part = slice(start, start := start + len(pairs))
        ends = np.cumsum(pairs)
        so_far = np.concatenate([[0], np.cumsum(weights @ targets)])
        of_targets = so_far[ends] - so_far[ends - pairs]
        counts.append(of_targets * run_targets + (weights @ sources) * runs[part])
    return np.concatenate(counts)


def trained_totals(
    groups: Dataset, trained: Trained, carries_source: np.ndarray, among: np.ndarray | None = None
) -> tuple[int, int, int, int]:
    """What :func:`mpo.training.sampling.step_means` takes, of all pairs of tokenized groups that are trained on.

    Args:
        groups: Tokenized groups.
        trained: Which pairs those are.
        carries_source: ``[groups]``, True for the first group of each unique source.
        among: ``[groups]``, True for the groups that count; None for all.

    Returns:
        Number of pairs, tokens of their chosen responses, of prompts and chosen responses but the first, and groups.
    """
    if among is not None and not among.all():
        chosen = np.flatnonzero(among)
        groups, carries_source = groups.select(chosen), carries_source[chosen]
    pairs = start = 0
    tokens = np.zeros(3, dtype=np.int64)
    for sources, targets, pairs_of_group in _lengths(groups):
        part = slice(start, start := start + len(pairs_of_group))
        if trained.targets:
            pairs, tokens = pairs + targets.shape[1], tokens + targets.sum(axis=1)
        if trained.sources:
            own = sources[:, carries_source[part]]
            pairs, tokens = pairs + own.shape[1], tokens + own.sum(axis=1)
    with_pairs = len(groups) if trained.targets else int(carries_source.sum()) if trained.sources else 0
    return pairs, int(tokens[1]), int(tokens[0] + tokens[1]) - pairs, with_pairs


def longest_tree(groups: Dataset) -> int:
    """Tokens of the largest pair of tokenized groups, sources included: its prompt once and both responses."""
    longest = 0
    for sources, targets, _ in _lengths(groups):
        longest = max(longest, int(sources.sum(axis=0).max()), int(targets.sum(axis=0).max()))
    return longest


def _lengths(groups: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """In chunks: ``[3, groups]`` tokens of the sources' parts, ``[3, pairs]`` of the targets', ``[groups]`` pairs."""
    names = [f"{side}_{part}" for side in ("source", "target") for part in PARTS]
    for table in groups.with_format("arrow").select_columns(names).iter(batch_size=10_000):
        sources = [_list_lengths(table[name]) for name in names[:3]]
        targets = [_list_lengths(pc.list_flatten(table[name])) for name in names[3:]]
        yield np.stack(sources), np.stack(targets), _list_lengths(table[names[3]])


def _list_lengths(column: Any) -> np.ndarray:
    lengths: np.ndarray = pc.list_value_length(column).to_numpy().astype(np.int64)
    return lengths


def _official(lengths: np.ndarray) -> np.ndarray:
    """``[n]`` tokens, padding included, of the official code's batches for pairs with ``[3, n]`` tokens of their parts."""
    prompt, chosen, rejected = lengths
    padded: np.ndarray = -(-(prompt + np.maximum(chosen, rejected)) // _OFFICIAL_MULTIPLE)
    return 2 * _OFFICIAL_MULTIPLE * padded
