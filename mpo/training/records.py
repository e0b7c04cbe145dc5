"""What a model's pass over preference pairs leaves: one record per pair."""

from __future__ import annotations

from dataclasses import dataclass

from mpo.common.typed_json import Count, Number


@dataclass(frozen=True)
class PairScore:
    """Log-likelihoods of one preference pair under one model.

    All log-likelihoods are means over the response's tokens, in nats per token: ``r(x, y)`` of Zhao et al., ACL 2025
    (arXiv 2505.16869), the length-normalised reward of SimPO without its scale.

    Attributes:
        group: Index of the pair's group (a source and its translations) in the dataset.
        language: Language code of the pair.
        is_source: True for the dominant-language pair of the group.
        chosen: Mean log-likelihood per token of the chosen response.
        rejected: Mean log-likelihood per token of the rejected response.
        gap: Reward gap, ``chosen - rejected``.
        reference_gap: Reward gap of the group's *source* pair under the reference model.
    """

    group: Count
    language: str
    is_source: bool
    chosen: Number
    rejected: Number
    gap: Number
    reference_gap: Number


@dataclass(frozen=True)
class Scores:
    """Scores of a dataset under one model.

    Attributes:
        records: One record per pair, in the order of the dataset.
        retention: Mean over harmful sources of ``||h - h_ref||^2 / hidden_size``, or None where it was not computed.
        tokens: Number of tokens the model has read.
        harmless_groups: The groups of harmless prompts, by their index.
        harmless_retention: ``retention`` of their sources.
    """

    records: list[PairScore]
    retention: float | None
    tokens: int
    harmless_groups: frozenset[int] = frozenset()
    harmless_retention: float | None = None

    def of_kind(self, *, harmless: bool) -> list[PairScore]:
        """The records of one kind."""
        return [record for record in self.records if (record.group in self.harmless_groups) == harmless]
