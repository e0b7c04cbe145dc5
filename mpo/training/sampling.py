"""The tensors that are made of a micro-batch's groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from mpo.common.log import get_logger
from mpo.data.contract import HARMLESS, PARTS
from mpo.errors import ConfigError
from mpo.modeling.layout import BatchShape
from mpo.modeling.pairs import places_by_kind
from mpo.modeling.trees import Tree, build_batch, pack_rows
from mpo.training.config import MPOConfig
from mpo.training.harmless import BY_HEAD, POOLED, harmless_groups
from mpo.training.objectives import MISMATCHED, PROMPT, REFERENCE, STATES
from mpo.training.order import EpochSampler
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


def count_languages(tokenized: Dataset) -> dict[str, int]:
    """Number of target pairs of each language of a tokenized dataset."""
    counts: dict[str, int] = {}
    for table in tokenized.with_format("arrow").select_columns(["target_language"]).iter(batch_size=10_000):
        values = pc.value_counts(pc.list_flatten(table["target_language"]))
        for value in values.to_pylist():
            counts[value["values"]] = counts.get(value["values"], 0) + value["counts"]
    return counts


def without_harmless(groups: Dataset) -> dict[str, tuple[int, int]]:
    """
    Languages that training shows with refusals alone, or nearly so: their share of harmless pairs is less than half of that over
    all target languages. What a model then learns to refuse is the language.

    Args:
        groups: Tokenized groups.

    Returns:
        Harmful and harmless pairs of each such language; empty where no group is harmless.
    """
    harmless = harmless_groups(groups)
    if not harmless.any():
        return {}
    harmful, answered = (
        count_languages(groups.select(np.flatnonzero(kind))) for kind in (~harmless, harmless)
    )
    usual = sum(answered.values()) / (sum(answered.values()) + sum(harmful.values()))
    return {
        language: (count, answered.get(language, 0))
        for language, count in harmful.items()
        if answered.get(language, 0) < usual / 2 * (count + answered.get(language, 0))
    }


def cut_short(groups: Dataset, limit: int | None) -> dict[str, float]:
    """
    Languages most of whose chosen responses to harmful prompts fill the limit of a response: what they are trained on ends before
    they do.

    Args:
        groups: Tokenized groups.
        limit: ``max_response_length``, by which they were cut.

    Returns:
        Share of such responses, above one half, by target language.
    """
    lengths: dict[str, list[int]] = {}
    if limit is not None:
        harmful = groups.select(np.flatnonzero(~harmless_groups(groups)))
        for group in harmful.select_columns(["target_language", "target_chosen"]):
            for language, chosen in zip(group["target_language"], group["target_chosen"], strict=True):
                lengths.setdefault(language, []).append(len(chosen))
    shares = {language: float(np.mean(np.asarray(found) >= limit)) for language, found in lengths.items()}
    return {language: share for language, share in shares.items() if share > 0.5}


def target_languages(*datasets: Dataset) -> list[str]:
    """Target languages of tokenized datasets, sorted."""
    return sorted({language for dataset in datasets for language in count_languages(dataset)})


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
        state_position: Token of a prompt whose hidden states in all languages of its group are needed, from -1 for the last;
            0 for none.
        state_layer: Of which layer, see :class:`mpo.training.config.MPOConfig`.
        holds_source: Whether the group's source is held where it is.
        holds_own: Whether the trained pairs' own chosen responses are, by their pooled states.
        keeps_tokens: Whether they are, token by token, and their prompts and rejected responses with them.
        keeps_by: By which divergence of what the model says after each token; None for its states.
    """

    targets: bool = True
    sources: bool = False
    reference: bool = False
    prompts: bool = False
    shared: bool = False
    mismatched: bool = False
    state_position: int = 0
    state_layer: int | None = None
    holds_source: bool = False
    holds_own: bool = False
    keeps_tokens: bool = False
    keeps_by: str | None = None

    @classmethod
    def by(cls, args: MPOConfig) -> Trained:
        """As a run's settings ask for it."""
        objectives = args.objectives
        trains = bool(objectives.by_name) or args.keeps_own
        return cls(
            targets=trains and args.train_on != "source",
            sources=trains and args.train_on != "targets",
            reference=REFERENCE in objectives.needs,
            prompts=PROMPT in objectives.needs,
            shared=objectives.needs_shared,
            mismatched=MISMATCHED in objectives.needs,
            state_position=args.state_position if STATES in objectives.needs else 0,
            state_layer=args.state_layer,
            holds_source=args.holds_sources,
            holds_own=args.keeps_own and args.harmless_retention == POOLED,
            keeps_tokens=args.keeps_tokens,
            keeps_by=args.harmless_retention
            if args.keeps_own and args.harmless_retention in BY_HEAD
            else None,
        )


class _Pair(NamedTuple):
    """A pair to score: its tree, its group in the batch, and whether it is the group's source."""

    tree: Tree
    group: int
    language: int
    is_source: bool
    trained: bool
    said: Mapping[str, Any]  # by the reference of it, see `GroupReference.row`
    harmless: bool = False


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
        harmless: What ``trained`` is, for harmless groups; None where the data have none.
        harmless_weights: What ``language_weights`` is, for them.

    The output has the tensors of :func:`mpo.modeling.trees.build_batch` and, with G groups and T pairs, targets first:

    - ``reference_gap``: ``[T]`` float32, the reference's gap on the pair's source, NaN where it is not known
    - ``reference_hidden``: ``[P, 2, H]`` float32, of the P sequences that are held (only if some are), and
      ``held_of_pair`` ``[T]``, the row of them that a pair's retention is of, or -1
    - ``kept_states``: ``[N, H]`` float32, the reference's of the K pairs that are kept token by token, ``kept_by``, and
      ``kept_of_pair`` ``[T]``, which of these a pair is, or -1 (only if some are)
    - ``reference_logps``, ``reference_shared``: ``[T, 2]`` float32, of the pair's own responses (only if needed)
    - ``group_of_pair``: ``[T]``, the pair's group in this batch
    - ``language``, ``is_source``: ``[T]``
    - ``score_greedy``, where the data have harmless groups: asks the head for ``below_greedy``
    - ``lengths``: ``[T, 2]``, tokens of the chosen and the rejected response
    - ``counts``, ``weight``: ``[T]`` float32, 0 for fillers and pairs that are only scored
    - ``num_pairs``: pairs that count; ``totals``: the same, their tokens and groups, see :func:`step_of`
    - ``step``: the means of this batch; the trainer puts those of the whole step in their place
    - ``prompts``, only if needed: where the states of each group's prompts are among the call's, ``rows`` ``[G, L]``, which
      of these are ``present``, and ``of_pair`` ``[T]``, the pair's row of them; with ``state_layer``
    - ``mismatched``, only if needed: ``calls``, tensors of calls on the trained pairs' prompts with another pair's
      responses; ``reference_logps`` and ``lengths`` of these, ``[T, 2]``; ``counts`` ``[T]``
    - ``calls`` instead of the tensors of one call, where the batch is split: a list of such tensors, each with ``pairs``,
      the pairs of the call, and ``source_call``, the tensors of the sources that are held still, or None
    - ``groups``: the groups' places in the dataset, ``origins`` and ``rows`` where they came from, ``fillers``

    With harmless groups in the data ``weight`` makes a mean over each kind: it has a factor from ``kind_factors`` ``[2]``,
    the pairs that count over those of the kind. There are also ``is_harmless`` ``[T]``; ``by_kind``, the places of either
    kind; ``harmless_step``; ``holds_own`` ``[P]``, True where a pair's own chosen response is held; and ``held_of_group``
    ``[G]``. ``totals`` has those of the harmless pairs after those of the harmful ones.
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
    harmless: Trained | None = None
    harmless_weights: Sequence[float] = ()

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pairs, held, stems = self._pairs(examples)
        size = sum(tree.size for tree in [*(pair.tree for pair in pairs), *stems.values(), *held.values()])
        limit = self.max_tokens_per_call
        batch: dict[str, Any]
        if limit is None or self.score_source or size <= limit:
            batch = self._call(pairs, stems, held.values()) | self._held(pairs, held, examples)
        else:
            batch = {"calls": [], "source_call": self._build(list(held.values())) if held else None}
            batch |= self._held(pairs, held, examples, own=False)
            # The languages of a prompt stay together where their states are compared.
            whole = [[i for i, pair in enumerate(pairs) if pair.group == g] for g in range(len(examples))]
            units = whole if self.trained.state_position else [[i] for i in range(len(pairs))]
            sizes = [sum(pairs[i].tree.size for i in unit) for unit in units]
            for part in pack_rows(sizes, limit):
                numbers = sorted(i for unit in part for i in units[unit])
                own = {g: stems[g] for g in part if g in stems} if self.trained.state_position else {}
                of_call = [pairs[i] for i in numbers]
                call = self._call(of_call, own) | self._held(of_call, held, examples)
                batch["calls"].append({**call, "pairs": torch.tensor(numbers)})
            # What counts a batch's tokens reads them here.
            ids = [call["input_ids"].flatten() for call in batch["calls"]]
            batch["input_ids"] = torch.cat(
                ids + ([batch["source_call"]["input_ids"].flatten()] if held else [])
            )
        batch |= self._columns(pairs, examples)
        if self.trained.mismatched:
            trained = [pair for pair in pairs if pair.trained]
            # At least one, so that all ranks make a call.
            batch["mismatched"] = self._mismatched(
                [pair for pair in trained if not pair.harmless] or trained[:1], examples
            )
        batch["groups"] = [example["group"] for example in examples]
        batch["origins"] = [example["origin"] for example in examples]
        batch["rows"] = [list(example["row"]) for example in examples]
        batch["fillers"] = [bool(example["filler"]) for example in examples]
        return batch

    def weigh_languages(self, groups: Dataset, weights: Mapping[str, float] | str | None) -> None:
        """Weight the languages so that the mean weight is 1 over the pairs of these tokenized groups."""
        harmless = harmless_groups(groups)
        if self.harmless is not None and harmless.any():
            own = groups.select(np.flatnonzero(harmless))
            self.harmless_weights = self._weights(own, self.harmless, weights)
            groups = groups.select(np.flatnonzero(~harmless))
        if len(groups):
            self.language_weights = self._weights(groups, self.trained, weights)

    def _weights(
        self, groups: Dataset, trained: Trained, weights: Mapping[str, float] | str | None
    ) -> list[float]:
        counts = count_languages(groups) if trained.targets else {}
        if trained.sources:
            sources = len(unique_sources(groups)[1])
            counts[self.source_language] = counts.get(self.source_language, 0) + sources
        if not counts:  # nothing of these groups is trained on
            return [1.0] * len(self.languages)
        return language_weights(self.languages, counts, weights)

    def _pairs(
        self, examples: Sequence[Mapping[str, Any]]
    ) -> tuple[list[_Pair], dict[int, Tree], dict[int, Tree]]:
        """The pairs to score, targets first; by group, the sources that are only held still; and those of which only the
        state of the prompt is needed."""
        index_of = {language: i for i, language in enumerate(self.languages)}
        targets: list[_Pair] = []
        sources: list[_Pair] = []
        held: dict[int, Tree] = {}
        stems: dict[int, Tree] = {}
        for g, example in enumerate(examples):
            harmless, asked = self._asked(example)
            state, own = asked.state_position, asked.holds_own
            # An evaluation measures the retention of every source.
            pools = self.run_source if self.score_source or not harmless else asked.holds_source
            prompt, chosen, rejected = (example[f"source_{part}"] for part in PARTS)
            trained = asked.sources and example["carries_source"]
            if trained or self.score_source:
                pool, keep = pools or (own and trained), asked.keeps_tokens and trained
                tree = Tree(prompt, chosen, rejected, pool=pool, prompt_state=state, keep=keep)
                (said,) = example.get("source_reference", [{}])
                language = index_of.get(self.source_language, -1)
                sources.append(_Pair(tree, g, language, True, trained, said, harmless))
            else:
                if pools:
                    held[g] = Tree(prompt, chosen, rejected, score=False, pool=True)
                if state:
                    stems[g] = Tree(prompt, chosen[:1], rejected[:1], score=False, prompt_state=state)
            if not (asked.targets or self.score_source):
                continue
            languages = example["target_language"]
            of_targets = example.get("target_reference", [{}] * len(languages))
            columns = [example[f"target_{part}"] for part in PARTS]
            for language, said, prompt, chosen, rejected in zip(languages, of_targets, *columns, strict=True):
                pool, keep = own and asked.targets, asked.keeps_tokens and asked.targets
                tree = Tree(prompt, chosen, rejected, pool=pool, prompt_state=state, keep=keep)
                targets.append(_Pair(tree, g, index_of[language], False, asked.targets, said, harmless))
        return targets + sources, held, stems

    def _asked(self, example: Mapping[str, Any]) -> tuple[bool, Trained]:
        """Whether a group is harmless, and what of it is trained on."""
        harmless = self.harmless is not None and example.get("kind") == HARMLESS
        return harmless, self.harmless if harmless and self.harmless is not None else self.trained

    def _held(
        self,
        pairs: Sequence[_Pair],
        held: Mapping[int, Tree],
        examples: Sequence[Mapping[str, Any]],
        *,
        own: bool = True,
    ) -> dict[str, Any]:
        """What is held still: of the pairs of a call those that are pooled, with ``own``, and then the sources."""
        pooled = [i for i, pair in enumerate(pairs) if own and pair.tree.pool]
        row_of_group = {g: len(pooled) + row for row, g in enumerate(held)}
        row_of_group |= {pairs[i].group: row for row, i in enumerate(pooled) if pairs[i].is_source}
        # A pair of a group that is kept token by token has nothing to do with pooled states.
        asked = [self._asked(examples[pair.group])[1] for pair in pairs]
        keeps = [own and pair.trained and of.holds_own for pair, of in zip(pairs, asked, strict=True)]
        row_of_pair = [
            -1 if of.keeps_tokens else row_of_group.get(pair.group, -1)
            for pair, of in zip(pairs, asked, strict=True)
        ]
        states = []
        for row, i in enumerate(pooled):
            pair = pairs[i]
            if keeps[i]:
                row_of_pair[i] = row
            states.append(examples[pair.group]["reference_hidden"] if pair.is_source else pair.said["hidden"])
        states += [examples[g]["reference_hidden"] for g in held]
        found: dict[str, Any] = {"held_of_pair": torch.tensor(row_of_pair, dtype=torch.long)}
        if states:
            found["reference_hidden"] = torch.from_numpy(
                np.stack([np.asarray(state, dtype=np.float32) for state in states])
            )
        if self.harmless is not None:
            of_group = [row_of_group.get(g, -1) for g in range(len(examples))]
            found |= self._kept(pairs) if own else {}
            found |= {
                "held_of_group": torch.tensor(of_group, dtype=torch.long),
                "holds_own": torch.tensor([keeps[i] for i in pooled] + [False] * len(held), dtype=torch.bool),
                "by_kind": list(places_by_kind(_is_harmless(pairs))),
            }
        return found

    def _kept(self, pairs: Sequence[_Pair]) -> dict[str, Any]:
        """What the reference has of the pairs of a call that are kept token by token."""
        kept = [i for i, pair in enumerate(pairs) if pair.tree.keep]
        if not kept or self.harmless is None:
            return {}
        row_of_pair = np.full(len(pairs), -1)
        row_of_pair[kept] = np.arange(len(kept))
        states = np.concatenate([pairs[i].said["token_states"] for i in kept])
        return {
            "kept_states": torch.from_numpy(states),
            "kept_of_pair": torch.from_numpy(row_of_pair),
            "kept_by": self.harmless.keeps_by,
        }

    def _columns(self, pairs: Sequence[_Pair], examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What a loss reads of the pairs besides what the model says of them."""
        groups = [examples[pair.group] for pair in pairs]
        counts = [pair.trained and not example["filler"] for pair, example in zip(pairs, groups, strict=True)]
        counted = [pair for pair, real in zip(pairs, counts, strict=True) if real]
        totals = _totals(counted)
        weights = [
            (self.harmless_weights if pair.harmless else self.language_weights)[pair.language]
            if pair.trained
            else 0.0
            for pair in pairs
        ]
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
        }
        if self.harmless is not None:
            columns["totals"] = (
                *_totals([pair for pair in counted if not pair.harmless]),
                *_totals([pair for pair in counted if pair.harmless]),
            )
            columns["is_harmless"] = _is_harmless(pairs)
        columns |= step_of(columns["totals"])
        columns["weight"] = torch.tensor(weights, dtype=torch.float32) * columns["counts"]
        asked = [self.trained] + ([] if self.harmless is None else [self.harmless])
        needed = {"logps": any(x.reference for x in asked), "shared": any(x.shared for x in asked)}
        for name in (name for name, asked in needed.items() if asked):
            unknown = np.full(2, np.nan, dtype=np.float32)  # of a pair that is only scored
            values = [pair.said.get(name, unknown) for pair in pairs]
            columns[f"reference_{name}"] = torch.from_numpy(np.stack(values))
        return columns

    def _mismatched(self, pairs: Sequence[_Pair], examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The pairs' prompts with other pairs' responses."""
        own = [(pair.tree.chosen, pair.tree.rejected) for pair in pairs]
        others = [pair.said.get("other_responses", these) for pair, these in zip(pairs, own, strict=True)]
        trees = [
            Tree(pair.tree.prompt, chosen, rejected)
            for pair, (chosen, rejected) in zip(pairs, others, strict=True)
        ]
        sizes = [tree.size for tree in trees]
        calls = []
        for part in pack_rows(sizes, self.max_tokens_per_call or sum(sizes)):
            numbers = sorted(part)
            calls.append({**self._build([trees[i] for i in numbers]), "pairs": torch.tensor(numbers)})
        counts = [not (examples[pair.group]["filler"] or pair.harmless) for pair in pairs]
        logps = [pair.said.get("other_logps", (0.0, 0.0)) for pair in pairs]
        lengths = [(len(tree.chosen), len(tree.rejected)) for tree in trees]
        return {
            "calls": calls,
            "reference_logps": torch.from_numpy(np.array(logps, dtype=np.float32).reshape(-1, 2)),
            "lengths": torch.tensor(lengths, dtype=torch.long).reshape(-1, 2),
            "counts": torch.tensor(counts, dtype=torch.float32),
        }

    def _call(
        self, pairs: Sequence[_Pair], stems: Mapping[int, Tree], held: Iterable[Tree] = ()
    ) -> dict[str, Any]:
        """Tensors of one call: pairs first, so that their scores are the head's output, whatever else is run."""
        call: dict[str, Any] = self._build([*(pair.tree for pair in pairs), *stems.values(), *held])
        if any(pair.tree.prompt_state for pair in pairs):
            call |= {"prompts": _prompts(pairs, list(stems)), "state_layer": self.trained.state_layer}
        if self.harmless is not None and not self.score_source:
            call["score_greedy"] = True
        return call

    def _build(self, trees: Sequence[Tree]) -> dict[str, Tensor]:
        return build_batch(
            trees,
            layout=self.shape.layout,
            max_tokens_per_row=self.shape.max_tokens_per_row,
            pad_token_id=self.shape.pad_token_id,
            pooling=self.shape.pooling,
            pad_to_multiple_of=self.pad_to_multiple_of,
            score_prompts=self.trained.prompts or (self.harmless is not None and self.harmless.prompts),
            score_shared=self.trained.shared or (self.harmless is not None and self.harmless.shared),
        )


def _is_harmless(pairs: Sequence[_Pair]) -> Tensor:
    return torch.tensor([pair.harmless for pair in pairs], dtype=torch.bool)


def _totals(pairs: Sequence[_Pair]) -> tuple[int, int, int, int]:
    """Number of pairs, tokens of their chosen responses, of prompts and chosen responses but the first, and groups."""
    chosen = sum(len(pair.tree.chosen) for pair in pairs)
    groups = len({pair.group for pair in pairs})
    return len(pairs), chosen, chosen + sum(len(pair.tree.prompt) - 1 for pair in pairs), groups


def _prompts(pairs: Sequence[_Pair], further: Sequence[int]) -> dict[str, Tensor]:
    """Where the states of each group's prompts are: those of the pairs first, then one more for each of some groups."""
    of_group: dict[int, list[int]] = {}
    groups = [pair.group for pair in pairs if pair.tree.prompt_state]
    for row, group in enumerate([*groups, *further]):
        of_group.setdefault(group, []).append(row)
    most = max(map(len, of_group.values()))
    place = {group: i for i, group in enumerate(of_group)}
    return {
        "rows": torch.tensor([rows + [0] * (most - len(rows)) for rows in of_group.values()]),
        "present": torch.tensor([[i < len(rows) for i in range(most)] for rows in of_group.values()]),
        "of_pair": torch.tensor([place.get(pair.group, 0) for pair in pairs]),
    }


def step_means(pairs: Any, chosen_tokens: Any, sequence_tokens: Any, groups: Any) -> dict[str, Any]:
    """Fields of :class:`mpo.modeling.pairs.StepMeans` but ``kl``, from sums over the pairs of a step."""
    return {
        "chosen_tokens": chosen_tokens / pairs,
        "sequence_tokens": sequence_tokens / pairs,
        "prompts": groups / pairs,
    }


def pair_weights(inputs: dict[str, Any]) -> Tensor:
    """``[T]``, what the pairs of a micro-batch weigh: in the mean over all, or in one over each kind."""
    weight: Tensor = inputs["weight"]
    if "is_harmless" in inputs:
        weight = weight * inputs["kind_factors"][inputs["is_harmless"].long()]
    return weight


def step_of(totals: Sequence[Any]) -> dict[str, Any]:
    """What a batch says of its optimizer step.

    Args:
        totals: Of the step: number of pairs, tokens of their chosen responses, of prompts and chosen responses but the first,
            and groups; where there are kinds, of the harmful pairs and then of the harmless ones.

    Returns:
        ``step`` and, where there are kinds, ``harmless_step`` and ``kind_factors``.
    """

    def at_least_one(number: Any) -> Any:
        return number.clamp(min=1) if isinstance(number, Tensor) else max(number, 1)

    # A filler may be of a kind that the step has no pairs of.
    found: dict[str, Any] = {"step": step_means(*map(at_least_one, totals[:4]))}
    if len(totals) > 4:
        of_kinds = totals[0], totals[4]
        factors = [sum(of_kinds) / at_least_one(count) for count in of_kinds]
        found["harmless_step"] = step_means(*map(at_least_one, totals[4:]))
        found["kind_factors"] = torch.stack(
            [torch.as_tensor(factor, dtype=torch.float32) for factor in factors]
        )
    return found


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
