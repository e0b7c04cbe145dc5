"""Statistics over a model's scores: the reward gap per language, before and after training."""

from __future__ import annotations

from mpo.evaluation.reward_gap import Comparison, RewardGapRow, RewardGapTable, compare, summarize
from mpo.training.records import PairScore, Scores

__all__ = ["Comparison", "PairScore", "RewardGapRow", "RewardGapTable", "Scores", "compare", "summarize"]
