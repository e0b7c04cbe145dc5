"""Which groups a rank sees in which micro-batch, and the tensors made of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from mpo.common.log import get_logger
from mpo.data.contract import PARTS
from mpo.errors import ConfigError
from mpo.modeling.layout import BatchShape
from mpo.modeling.trees import Tree, build_batch, pack_rows
from mpo.training.config import MPOConfig
from mpo.training.objectives import MISMATCHED, PROMPT, REFERENCE, STATES
from mpo.training.reference import GroupReference
from mpo.training.unique_pairs import unique_sources

logger = get_logger(__name__)


class GroupDataset(TorchDataset[dict[str, Any]]):
    """Tokenized groups with the reference values of their sources.

    A negative index ``~i`` is group ``i`` as a filler: it is computed, but weighs nothing and is counted nowhere. A
    rank that has no group left in a step takes one, so that all ranks make the same model calls.
    """

    def __init__(self, groups: Dataset, reference: GroupReference) -> None:
        self.groups = groups
        self.reference = reference

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        groups = [~i if i < 0 else i for i in indices]
        columns = self.groups[groups]
        return [
            {
                **{column: values[j] for column, values in columns.items()},
                "group": group,
                "filler": indices[j] < 0,
                **self.reference.row(group),
            }
            for j, group in enumerate(groups)
        ]


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
    ranks; a rank that gets none receives a filler (see :class:`GroupDataset`).

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
        return len(self.indices) // per_step if self.drop_last else -(-len(self.indices) // per_step)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.indices
        if self.seed is not None:
            order = self.indices[
                np.random.default_rng([self.seed, self.epoch]).permutation(len(self.indices))
            ]
        per_step = self.batch_size * self.num_ranks
        for step in range(len(self)):
            groups = order[step * per_step : (step + 1) * per_step]
            mine = groups[self.rank :: self.num_ranks]
            yield [int(i) for i in mine] if len(mine) else [~int(groups[0])]


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


def count_languages(tokenized: Dataset) -> dict[str, int]:
    """Number of target pairs of each language of a tokenized dataset."""
    counts: dict[str, int] = {}
    for table in tokenized.with_format("arrow").select_columns(["target_language"]).iter(batch_size=10_000):
        values = pc.value_counts(pc.list_flatten(table["target_language"]))
        for value in values.to_pylist():
            counts[value["values"]] = counts.get(value["values"], 0) + value["counts"]
    return counts


def target_languages(*datasets: Dataset) -> list[str]:
    """Target languages of tokenized datasets, sorted."""
    return sorted({language for dataset in datasets for language in count_languages(dataset)})


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


class GroupDataLoader(DataLoader[dict[str, Any]]):
    """A data loader whose order follows the epoch, as the training loop expects."""

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the batch sampler."""
        sampler = self.batch_sampler
        assert isinstance(sampler, EpochSampler)
        sampler.set_epoch(epoch)


@dataclass(frozen=True)
class Trained:
    """Which pairs are trained on, and what their loss needs besides their log-likelihoods.

    Attributes:
        targets, sources: Whether a group's targets are, and its source, where the group is the first that has it.
        reference: Whether log-likelihoods of the same responses under the reference are needed.
        prompts, shared: See :func:`mpo.modeling.trees.build_batch`.
        mismatched: Whether those of another pair's responses are needed, under policy and reference.
        states: Whether hidden states at the end of a prompt in all languages of its group are needed.
    """

    targets: bool = True
    sources: bool = False
    reference: bool = False
    prompts: bool = False
    shared: bool = False
    mismatched: bool = False
    states: bool = False

    @classmethod
    def by(cls, args: MPOConfig) -> Trained:
        """As a run's settings ask for it."""
        objectives = args.objectives
        return cls(
            targets=args.train_on != "source",
            sources=args.train_on != "targets",
            reference=REFERENCE in objectives.needs,
            prompts=PROMPT in objectives.needs,
            shared=objectives.needs_shared,
            mismatched=MISMATCHED in objectives.needs,
            states=STATES in objectives.needs,
        )


class _Pair(NamedTuple):
    """A pair to score: its tree, its group in the batch, and whether it is the group's source."""

    tree: Tree
    group: int
    language: int
    is_source: bool
    trained: bool
    said: Mapping[str, Any]  # by the reference of it, see `GroupReference.row`


@dataclass
class GroupCollator:
    """Turns groups into the tensors of one step.

    Args:
        languages: A pair's language is its index in this list.
        language_weights: Weight of each of ``languages``.
        shape: How trees become model calls.
        run_source: Whether the source pair is run, for the retention term.
        score_source: For evaluation: all pairs are scored, the source's too.
        pad_to_multiple_of: See :func:`mpo.modeling.trees.build_batch`.
        max_tokens_per_call: A batch of more tokens is split into several model calls.
        trained: Which pairs are trained on.
        source_language: Language of the sources, where they are trained on.

    The output has the tensors of :func:`mpo.modeling.trees.build_batch` and, with G groups and T pairs, targets first:

    - ``reference_gap``: ``[T]`` float32, the reference's gap on the pair's source, NaN where it is not known
    - ``reference_hidden``: ``[G, 2, H]`` float32 (only if the source is run for the retention term)
    - ``reference_logps``, ``reference_shared``: ``[T, 2]`` float32, of the pair's own responses (only if needed)
    - ``group_of_pair``: ``[T]``, the pair's group in this batch
    - ``language``, ``is_source``: ``[T]``
    - ``lengths``: ``[T, 2]``, tokens of the chosen and the rejected response
    - ``counts``, ``weight``: ``[T]`` float32, 0 for fillers and pairs that are only scored
    - ``num_pairs``: pairs that count; ``totals``: the same and their tokens, see :class:`mpo.modeling.pairs.StepMeans`
    - ``step``: the means of this batch; the trainer puts those of the whole step in their place
    - ``prompts``, only if needed: where the states of each group's prompts are among the call's, ``rows`` ``[G, L]``, which
      of these are ``present``, and ``of_pair`` ``[T]``, the pair's row of them
    - ``mismatched``, only if needed: ``calls``, tensors of calls on the trained pairs' prompts with another pair's
      responses; ``reference_logps`` and ``lengths`` of these, ``[T, 2]``; ``counts`` ``[T]``
    - ``calls`` instead of the tensors of one call, where the batch is split: a list of such tensors, each with ``pairs``,
      the pairs of the call, and ``source_call``, the tensors of the sources that are held still, or None
    - ``groups``: the groups' places in the dataset, ``origins`` and ``rows`` where they came from, ``fillers``
    """

    languages: Sequence[str]
    language_weights: Sequence[float]
    shape: BatchShape
    run_source: bool = True
    score_source: bool = False
    pad_to_multiple_of: int | None = None
    max_tokens_per_call: int | None = None
    trained: Trained = Trained()
    source_language: str = ""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pairs, held, stems = self._pairs(examples)
        size = sum(tree.size for tree in [*(pair.tree for pair in pairs), *stems.values(), *held])
        limit = self.max_tokens_per_call
        batch: dict[str, Any]
        if limit is None or self.score_source or size <= limit:
            batch = self._call(pairs, stems, held)
        else:
            batch = {"calls": [], "source_call": self._build(held) if held else None}
            # The languages of a prompt stay together where their states are compared.
            whole = [[i for i, pair in enumerate(pairs) if pair.group == g] for g in range(len(examples))]
            units = whole if self.trained.states else [[i] for i in range(len(pairs))]
            sizes = [sum(pairs[i].tree.size for i in unit) for unit in units]
            for part in pack_rows(sizes, limit):
                numbers = sorted(i for unit in part for i in units[unit])
                own = {g: stems[g] for g in part if g in stems} if self.trained.states else {}
                call = self._call([pairs[i] for i in numbers], own)
                batch["calls"].append({**call, "pairs": torch.tensor(numbers)})
            # What counts a batch's tokens reads them here.
            ids = [call["input_ids"].flatten() for call in batch["calls"]]
            batch["input_ids"] = torch.cat(
                ids + ([batch["source_call"]["input_ids"].flatten()] if held else [])
            )
        batch |= self._columns(pairs, examples)
        if self.run_source:
            batch["reference_hidden"] = torch.from_numpy(
                np.stack([np.asarray(example["reference_hidden"], dtype=np.float32) for example in examples])
            )
        if self.trained.mismatched:
            batch["mismatched"] = self._mismatched([pair for pair in pairs if pair.trained], examples)
        batch["groups"] = [example["group"] for example in examples]
        batch["origins"] = [example["origin"] for example in examples]
        batch["rows"] = [list(example["row"]) for example in examples]
        batch["fillers"] = [bool(example["filler"]) for example in examples]
        return batch

    def weigh_languages(self, groups: Dataset, weights: Mapping[str, float] | str | None) -> None:
        """Weight the languages so that the mean weight is 1 over the pairs of these tokenized groups."""
        counts = count_languages(groups) if self.trained.targets else {}
        if self.trained.sources:
            sources = len(unique_sources(groups)[1])
            counts[self.source_language] = counts.get(self.source_language, 0) + sources
        self.language_weights = language_weights(self.languages, counts, weights)

    def _pairs(
        self, examples: Sequence[Mapping[str, Any]]
    ) -> tuple[list[_Pair], list[Tree], dict[int, Tree]]:
        """The pairs to score, targets first; the sources that are only held still; by group, those of which only the state
        of the prompt is needed."""
        index_of = {language: i for i, language in enumerate(self.languages)}
        targets: list[_Pair] = []
        sources: list[_Pair] = []
        held: list[Tree] = []
        stems: dict[int, Tree] = {}
        states = self.trained.states
        for g, example in enumerate(examples):
            prompt, chosen, rejected = (example[f"source_{part}"] for part in PARTS)
            trained = self.trained.sources and example["carries_source"]
            if trained or self.score_source:
                tree = Tree(prompt, chosen, rejected, pool=self.run_source, prompt_state=states)
                (said,) = example.get("source_reference", [{}])
                sources.append(_Pair(tree, g, index_of.get(self.source_language, -1), True, trained, said))
            else:
                if self.run_source:
                    held.append(Tree(prompt, chosen, rejected, score=False, pool=True))
                if states:
                    stems[g] = Tree(prompt, chosen[:1], rejected[:1], score=False, prompt_state=True)
            if not (self.trained.targets or self.score_source):
                continue
            languages = example["target_language"]
            of_targets = example.get("target_reference", [{}] * len(languages))
            columns = [example[f"target_{part}"] for part in PARTS]
            for language, said, prompt, chosen, rejected in zip(languages, of_targets, *columns, strict=True):
                tree = Tree(prompt, chosen, rejected, prompt_state=states)
                targets.append(_Pair(tree, g, index_of[language], False, self.trained.targets, said))
        return targets + sources, held, stems

    def _columns(self, pairs: Sequence[_Pair], examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What a loss reads of the pairs besides what the model says of them."""
        groups = [examples[pair.group] for pair in pairs]
        counts = [pair.trained and not example["filler"] for pair, example in zip(pairs, groups, strict=True)]
        counted = [pair.tree for pair, real in zip(pairs, counts, strict=True) if real]
        weights = [self.language_weights[pair.language] if pair.trained else 0.0 for pair in pairs]
        chosen = sum(len(tree.chosen) for tree in counted)
        totals = len(counted), chosen, chosen + sum(len(tree.prompt) - 1 for tree in counted)
        lengths = [(len(pair.tree.chosen), len(pair.tree.rejected)) for pair in pairs]
        columns: dict[str, Any] = {
            "reference_gap": torch.tensor(
                [example["reference_gap"] for example in groups], dtype=torch.float32
            ),
            "group_of_pair": torch.tensor([pair.group for pair in pairs], dtype=torch.long),
            "language": torch.tensor([pair.language for pair in pairs], dtype=torch.long),
            "is_source": torch.tensor([pair.is_source for pair in pairs], dtype=torch.bool),
            "lengths": torch.tensor(lengths, dtype=torch.long),
            "counts": torch.tensor(counts, dtype=torch.float32),
            "num_pairs": len(counted),
            "totals": totals,
            "step": step_means(max(len(counted), 1), *totals[1:]),
        }
        columns["weight"] = torch.tensor(weights, dtype=torch.float32) * columns["counts"]
        needed = {"logps": self.trained.reference, "shared": self.trained.shared}
        for name in (name for name, asked in needed.items() if asked):
            unknown = np.full(2, np.nan, dtype=np.float32)  # of a pair that is only scored
            values = [pair.said.get(name, unknown) for pair in pairs]
            columns[f"reference_{name}"] = torch.from_numpy(np.stack(values))
        return columns

    def _mismatched(self, pairs: Sequence[_Pair], examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The pairs' prompts with other pairs' responses."""
        others = [pair.said["other_responses"] for pair in pairs]
        trees = [
            Tree(pair.tree.prompt, chosen, rejected)
            for pair, (chosen, rejected) in zip(pairs, others, strict=True)
        ]
        sizes = [tree.size for tree in trees]
        calls = []
        for part in pack_rows(sizes, self.max_tokens_per_call or sum(sizes)):
            numbers = sorted(part)
            calls.append({**self._build([trees[i] for i in numbers]), "pairs": torch.tensor(numbers)})
        counts = [not examples[pair.group]["filler"] for pair in pairs]
        logps = [pair.said["other_logps"] for pair in pairs]
        lengths = [(len(tree.chosen), len(tree.rejected)) for tree in trees]
        return {
            "calls": calls,
            "reference_logps": torch.from_numpy(np.array(logps, dtype=np.float32).reshape(-1, 2)),
            "lengths": torch.tensor(lengths, dtype=torch.long).reshape(-1, 2),
            "counts": torch.tensor(counts, dtype=torch.float32),
        }

    def _call(
        self, pairs: Sequence[_Pair], stems: Mapping[int, Tree], held: Sequence[Tree] = ()
    ) -> dict[str, Any]:
        """Tensors of one call: pairs first, so that their scores are the head's output, whatever else is run."""
        call: dict[str, Any] = self._build([*(pair.tree for pair in pairs), *stems.values(), *held])
        if self.trained.states:
            call["prompts"] = _prompts([pair.group for pair in pairs], list(stems))
        return call

    def _build(self, trees: Sequence[Tree]) -> dict[str, Tensor]:
        return build_batch(
            trees,
            layout=self.shape.layout,
            max_tokens_per_row=self.shape.max_tokens_per_row,
            pad_token_id=self.shape.pad_token_id,
            pooling=self.shape.pooling,
            pad_to_multiple_of=self.pad_to_multiple_of,
            score_prompts=self.trained.prompts,
            score_shared=self.trained.shared,
        )


def _prompts(group_of_pair: Sequence[int], further: Sequence[int]) -> dict[str, Tensor]:
    """Where the states of each group's prompts are: those of the pairs first, then one more for each of some groups."""
    of_group: dict[int, list[int]] = {}
    for row, group in enumerate([*group_of_pair, *further]):
        of_group.setdefault(group, []).append(row)
    most = max(map(len, of_group.values()))
    place = {group: i for i, group in enumerate(of_group)}
    return {
        "rows": torch.tensor([rows + [0] * (most - len(rows)) for rows in of_group.values()]),
        "present": torch.tensor([[i < len(rows) for i in range(most)] for rows in of_group.values()]),
        "of_pair": torch.tensor([place[group] for group in group_of_pair]),
    }


def step_means(pairs: Any, chosen_tokens: Any, sequence_tokens: Any) -> dict[str, Any]:
    """Fields of :class:`mpo.modeling.pairs.StepMeans` about tokens, from sums over the pairs of a step."""
    return {"chosen_tokens": chosen_tokens / pairs, "sequence_tokens": sequence_tokens / pairs}


def language_weights(
    languages: Sequence[str], pairs: Mapping[str, int], weights: Mapping[str, float] | str | None
) -> list[float]:
    """Weight of each language, scaled so that the mean over all pairs is 1.

    Args:
        languages: Those of the pairs.
        pairs: Number of training pairs of each.
        weights: None for equal weights, ``"balanced"`` for the inverse of the number of pairs, or weights by language
            (1 where not named).

    Raises:
        ConfigError: A language is named that is not among ``languages``, or all pairs weigh 0.
    """
    if weights is None:
        return [1.0] * len(languages)
    if weights == "balanced":
        raw = [1.0 / pairs[language] if pairs.get(language) else 0.0 for language in languages]
    else:
        assert not isinstance(weights, str)
        if unknown := sorted(set(weights) - set(languages)):
            raise ConfigError(
                f"`language_weights` names {', '.join(unknown)}, but the languages of the pairs are "
                f"{', '.join(languages)}."
            )
        raw = [float(weights.get(language, 1.0)) for language in languages]
    counts = [pairs.get(language, 0) for language in languages]
    total = sum(w * n for w, n in zip(raw, counts, strict=True))
    if total == 0:
        present = ", ".join(language for language in languages if pairs.get(language))
        raise ConfigError(
            f"`language_weights` is 0 for every language that is trained on ({present}), so there is nothing to learn. "
            "Give at least one of them a weight above 0."
        )
    return [w * sum(counts) / total for w in raw]


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch's tensors, those in its parts too, to a device without waiting for the copy."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, dict):
            return to_device(value, device)
        return [moved(item) for item in value] if isinstance(value, list) else value

    return {name: moved(value) for name, value in batch.items()}
