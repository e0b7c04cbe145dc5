"""How near the meanings of two texts are: the cosine of their sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mpo.errors import DependencyError, ModelError


def import_sentence_transformers() -> Any:
    """The package.

    Raises:
        DependencyError: It is not installed.
    """
    try:
        import sentence_transformers
    except ImportError as error:
        raise DependencyError(
            'The filter `embedding` needs the package sentence-transformers: pip install "mpo-align[embeddings]". Without it, set '
            "`filters: {embedding: null}`; `back_translation` looks at the meaning, too."
        ) from error
    return sentence_transformers


@lru_cache(maxsize=1)
def _encoder(model: str) -> Any:
    package = import_sentence_transformers()
    try:
        return package.SentenceTransformer(model)
    except Exception as error:  # the Hub's and torch's, whatever they are
        raise ModelError(f"embedding_model: {model} cannot be loaded ({error}).") from None


def similarities(texts: Sequence[str], sources: Sequence[str], model: str) -> list[float]:
    """Cosines of the embeddings of each text and its source.

    Raises:
        DependencyError: sentence-transformers is not installed.
        ModelError: The model cannot be loaded.
    """
    encoder = _encoder(model)
    first, second = (
        encoder.encode(list(some), normalize_embeddings=True, show_progress_bar=False)
        for some in (texts, sources)
    )
    return [float(value) for value in (first * second).sum(axis=1)]
