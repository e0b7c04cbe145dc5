"""The documented place of :func:`score_groups` and :func:`perplexity`."""

from mpo.modeling.likelihoods import perplexity
from mpo.modeling.pairs import PairTensors
from mpo.training.records import PairScore, Scores
from mpo.training.scoring import score_groups

__all__ = ["PairScore", "PairTensors", "Scores", "perplexity", "score_groups"]
