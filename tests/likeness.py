"""What the prompts of a set are like, whatever their language: clean, and how alike by shared sequences of letters."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer

NEAR = 0.5
"""Share of the three-letter sequences of two texts that both have, from which one is an edited copy of the other.
Unrelated texts in the same form ("... にはどうすればいいですか？") reach 0.42."""


def normalized(text: str) -> str:
    """Letters, marks and digits alone: what is left when spaces, punctuation, case and Unicode form are ignored."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in text if unicodedata.category(character)[0] in "LMN")


def check_clean(text: str, language: str, name: str, *, typed: bool = False) -> None:
    """Sentences of letters, marks, digits and ordinary punctuation: nothing invisible, no quoting, no slots.

    `typed`: in a hurry, so that they need not end in a mark; the parts of a Japanese name have a dot between them.
    """
    assert text == unicodedata.normalize("NFC", " ".join(text.split())), name
    # Thai has no mark at the end of a sentence.
    assert typed or (text[-1] in "?？؟.。।!！") is (language != "th"), name
    ordinary = " ?？؟.。।,，、،;；:：'!！¿¡-" + "・" * typed
    strange = {c for c in text if unicodedata.category(c)[0] not in "LMN" and c not in ordinary}
    assert not strange, (name, strange)


def likeness(first: Sequence[str], second: Sequence[str], letters: int = 3) -> np.ndarray:
    """Jaccard index of the sets of sequences of so many letters, ``[len(first), len(second)]``."""
    counts = CountVectorizer(analyzer="char", ngram_range=(letters, letters), binary=True, lowercase=False)
    both = counts.fit_transform([normalized(text) for text in (*first, *second)])
    a, b = both[: len(first)], both[len(first) :]
    shared = (a @ b.T).toarray()
    return shared / (np.asarray(a.sum(axis=1)) + np.asarray(b.sum(axis=1)).T - shared)
