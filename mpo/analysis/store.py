"""The earlier place of :mod:`mpo.hidden_space.store`."""

from mpo.hidden_space.store import EmbeddingStore

__all__ = ["EmbeddingStore"]
