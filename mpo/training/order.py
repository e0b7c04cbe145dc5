"""Which groups a rank sees in which micro-batch."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from mpo.errors import ConfigError


class EpochSampler(Sampler[list[int]]):
    """A batch sampler whose order follows the epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        raise NotImplementedError


class GroupBatchSampler(EpochSampler):
    """Micro-batches of groups for one rank, in an order that depends on seed and epoch only.

    A micro-batch takes ``batch_size`` groups on each rank. What is left at the end of an epoch is spread evenly over the
    ranks; a rank that gets none receives a filler (see :class:`mpo.training.sampling.GroupDataset`).

    Args:
        indices: Groups to draw from.
        batch_size: Groups per rank and micro-batch.
        num_ranks, rank: The process group.
        seed: Seed of the order; None keeps the order of ``indices``.
        drop_last: Leave out what is left at the end of an epoch.
    """

    def __init__(
        self,
        indices: np.ndarray,
        batch_size: int,
        *,
        num_ranks: int = 1,
        rank: int = 0,
        seed: int | None = None,
        drop_last: bool = False,
    ) -> None:
        self.indices = indices
        self.batch_size = batch_size
        self.num_ranks, self.rank = num_ranks, rank
        self.seed = seed
        self.drop_last = drop_last

    def __len__(self) -> int:
        per_step = self.batch_size * self.num_ranks
        return self.groups // per_step if self.drop_last else -(-self.groups // per_step)

    @property
    def groups(self) -> int:
        """Number of groups of an epoch."""
        return len(self.indices)

    def order(self) -> np.ndarray:
        """``[groups]``, those of this epoch in their order."""
        if self.seed is None:
            return self.indices
        drawn = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.indices))
        found: np.ndarray = self.indices[drawn]
        return found

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        per_step = self.batch_size * self.num_ranks
        for step in range(len(self)):
            groups = order[step * per_step : (step + 1) * per_step]
            mine = groups[self.rank :: self.num_ranks]
            yield [int(i) for i in mine] if len(mine) else [~int(groups[0])]


def drawn_harmless(harmful: int, share: float) -> int:
    """Number of harmless groups of an epoch, beside so many harmful ones, that makes theirs a share of all."""
    return max(1, round(harmful * share / (1 - share)))


class ShareSampler(GroupBatchSampler):
    """A :class:`GroupBatchSampler` in whose order harmless groups are spread evenly, at a share of their own.

    Any so many neighbours in the order hold that share of harmless groups, to the nearest whole number below or above; so
    does every optimizer step, whatever its micro-batches and ranks. An epoch has every harmful group once. Of the harmless
    ones it has as many as the share asks for: each epoch goes on where the last one stopped, in an order that is drawn
    anew whenever all had their turn.

    Args:
        indices: Groups to draw from.
        batch_size, num_ranks, rank, seed, drop_last: As for :class:`GroupBatchSampler`.
        harmless: ``[n]``, True for the harmless ones of ``indices``.
        share: Of harmless groups, above 0 and below 1.

    Raises:
        ConfigError: There are no groups of one kind.
    """

    def __init__(
        self, indices: np.ndarray, batch_size: int, *, harmless: np.ndarray, share: float, **options: Any
    ) -> None:
        super().__init__(indices, batch_size, **options)
        self._harmful, self._harmless = indices[~harmless], indices[harmless]
        for kind, found in (("harmful", self._harmful), ("harmless", self._harmless)):
            if not len(found):
                raise ConfigError(
                    f"`harmless_share` is {share:g}, but there are no {kind} groups to train on. `mpo data build` makes both kinds; "
                    "rows of harmless ones say `kind: harmless`, and `limit` takes the first rows of a file."
                    + (
                        " Trained on harmful prompts alone, a model comes to refuse harmless ones, too; who wants that takes a "
                        "recipe for them (llama_mpo, gemma_mpo, qwen_mpo), or sets `harmless_share: null`."
                        if kind == "harmless"
                        else ""
                    )
                )
        self._drawn = drawn_harmless(len(self._harmful), share)

    @property
    def groups(self) -> int:
        """Number of groups of an epoch."""
        return len(self._harmful) + self._drawn

    def order(self) -> np.ndarray:
        """``[groups]``, those of this epoch in their order."""
        harmful = self._harmful
        if self.seed is not None:
            harmful = harmful[np.random.default_rng([self.seed, self.epoch]).permutation(len(harmful))]
        place = np.arange(self.groups + 1, dtype=np.int64) * self._drawn // self.groups
        is_harmless = np.diff(place) > 0
        found = np.empty(self.groups, dtype=self.indices.dtype)
        found[~is_harmless], found[is_harmless] = harmful, self._next_harmless()
        return found

    def _next_harmless(self) -> np.ndarray:
        """The harmless groups of this epoch."""
        first = self.epoch * self._drawn
        rounds = range(first // len(self._harmless), (first + self._drawn - 1) // len(self._harmless) + 1)
        drawn = [
            np.arange(len(self._harmless))
            if self.seed is None
            # Numbers apart from those of the harmful groups' epochs.
            else np.random.default_rng([self.seed, turn, 1]).permutation(len(self._harmless))
            for turn in rounds
        ]
        start = first - rounds[0] * len(self._harmless)
        places = np.concatenate(drawn)[start : start + self._drawn]
        found: np.ndarray = self._harmless[places]
        return found


class TokenBudgetSampler(EpochSampler):
    """Micro-batches of at most ``max_tokens`` tokens for one rank, in an order that depends on seed and epoch only.

    Group sizes are spread over as few micro-batches as the budget allows, the largest first, each to the micro-batch with
    the fewest tokens so far. So all micro-batches come out nearly equal, and those of one step, one per rank, differ by
    less than their smallest group: no rank waits for another. A group is never split; one beyond the budget is a
    micro-batch of its own.

    Only the sizes, rounded up to six binary digits, decide on this, so every epoch has the same number of steps, known in
    advance. Which groups of a size go where, and the order of the steps, are drawn anew in every epoch.

    Args:
        indices: ``[n]``, groups to draw from.
        tokens: ``[n]``, tokens of each (:func:`mpo.training.workload.group_tokens`).
        max_tokens: Budget of a micro-batch on one rank.
        num_ranks, rank: The process group.
        seed: Seed of the order.
        drop_last: Leave out the step in which a rank would have no group and compute a filler.
    """

    def __init__(
        self,
        indices: np.ndarray,
        tokens: np.ndarray,
        max_tokens: int,
        *,
        num_ranks: int = 1,
        rank: int = 0,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.num_ranks, self.rank = num_ranks, rank
        self.seed = seed
        self.oversized = int((tokens > max_tokens).sum())
        """Number of groups that are larger than the budget."""
        sizes = _rounded_up(tokens)
        order = np.argsort(-sizes, kind="stable")
        self._indices, self._sizes = indices[order], sizes[order]
        batch_of_place, loads = _spread(self._sizes, max_tokens, num_ranks)
        # Places of the sizes, batch by batch and largest first, and where each batch begins.
        self._places = np.argsort(batch_of_place, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(batch_of_place, minlength=len(loads)))])
        # Neighbours by load share a step, one for each rank.
        steps = np.argsort(-loads, kind="stable").reshape(-1, num_ranks)
        filled = loads[steps] > 0
        self._steps = steps[filled.all(axis=1) if drop_last else filled.any(axis=1)]

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        shuffled = rng.permutation(len(self._sizes))
        # Groups of one size trade places; a stable sort keeps their random order.
        groups = self._indices[shuffled[np.argsort(-self._sizes[shuffled], kind="stable")]]
        for step in rng.permutation(len(self._steps)):
            first, mine = self._steps[step, 0], self._steps[step, self.rank]
            places = self._places[self._starts[mine] : self._starts[mine + 1]]
            if len(places):
                yield groups[places].tolist()
            else:
                # The step's first batch has groups; its smallest is the cheapest filler.
                yield [~int(groups[self._places[self._starts[first + 1] - 1]])]


def _rounded_up(tokens: np.ndarray) -> np.ndarray:
    """Numbers rounded up to six binary digits: at most 3 % more, and few different ones."""
    unit = 2 ** np.maximum(np.floor(np.log2(np.maximum(tokens, 1))).astype(np.int64) - 5, 0)
    rounded: np.ndarray = -(-tokens.astype(np.int64) // unit) * unit
    return rounded


def _spread(sizes: np.ndarray, budget: int, num_ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Spread falling sizes over the fewest batches that were found to do, a multiple of the number of ranks.

    Returns:
        ``[n]`` batch of each, and the batches' loads.
    """
    total = int(sizes.sum())
    halves = int((2 * sizes > budget).sum())
    low = max(1, -(-total // (budget * num_ranks)), -(-halves // num_ranks))
    high = max(low, -(-len(sizes) // num_ranks))  # a batch for every group
    before = np.cumsum(sizes) - sizes
    # A size finds no room only if every batch is fuller than the budget less that size.
    floor, ceiling = low, high
    while floor < ceiling:
        steps = (floor + ceiling) // 2
        batches = steps * num_ranks
        if np.all(before[batches:] <= batches * (budget - sizes[batches:])):
            ceiling = steps
        else:
            floor = steps + 1
    high = ceiling
    found = _fill(sizes, budget, high * num_ranks)
    assert found is not None
    # What is certain to do may be more than is needed; each try costs a pass over all groups.
    while high - low > high // 50:
        steps = (low + high) // 2
        tried = _fill(sizes, budget, steps * num_ranks)
        if tried is None:
            low = steps + 1
        else:
            found, high = tried, steps
    return found


def _fill(sizes: np.ndarray, budget: int, batches: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Give each size to the batch with the smallest load; None where one does not fit."""
    heap = list(range(batches))  # load * batches + batch, so that the smallest has the smallest load
    chosen = np.empty(len(sizes), dtype=np.int64)
    for i, size in enumerate(sizes.tolist()):
        load, batch = divmod(heap[0], batches)
        if load and load + size > budget:
            return None
        chosen[i] = batch
        heapq.heapreplace(heap, heap[0] + size * batches)
    loads = np.empty(batches, dtype=np.int64)
    for entry in heap:
        load, batch = divmod(entry, batches)
        loads[batch] = load
    return chosen, loads
