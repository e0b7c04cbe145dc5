"""Texts as sets of n-grams, hashed many at once, and the pairs of texts whose sets are alike.

The search is exact: it finds every pair from a threshold on. It compares only texts that share one of the rarer n-grams,
which is enough: of a set B, any pair with Jaccard similarity ``t`` or more shares at least ``ceil(t |B|)`` elements, so it
shares one of any ``|B| - ceil(t |B|) + 1`` (prefix filtering; Chaudhuri, Ganti and Kaushik, ICDE 2006). Products of sparse
matrices do the counting. On prompts this was faster than MinHash signatures, and it misses nothing
(``benchmarks/data_leak.py``).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]

_BITS = 40  # of a hash; the bits above hold the number of its text
_MASK = np.uint64((1 << _BITS) - 1)
MOST_TEXTS = 1 << (64 - _BITS)
"""Texts that can be hashed at once."""

_PAIRS_AT_ONCE = 200_000  # compared in full, some 50 n-grams each
_ALPHABET_N, _IDEOGRAPH_N = (
    5,
    2,
)  # letters of an n-gram; one Han or Hangul letter says what several of an alphabet say
_IDEOGRAPHS = 0x2E80  # code point from which on there are Han, kana and Hangul letters
_ASCII_WORD = re.compile(r"[a-z0-9]+")
# Multipliers of a multilinear hash: any odd numbers that look random.
_FACTORS = np.random.default_rng(20240517).integers(1, 1 << 63, 64, dtype=np.uint64) * np.uint64(
    2
) + np.uint64(1)


@lru_cache(maxsize=1)
def _words() -> Any:
    import regex  # the standard library's \w leaves out the vowel signs of Indic scripts

    return regex.compile(r"[\p{L}\p{M}\p{N}]+")


def normalised(text: str) -> str:
    """The words of a text in lower case, one blank apart: without punctuation, symbols and Unicode's other forms."""
    if text.isascii():
        return " ".join(_ASCII_WORD.findall(text.lower()))
    return " ".join(_words().findall(unicodedata.normalize("NFKC", text).casefold()))


@dataclass(frozen=True)
class Shingles:
    """The n-grams of several texts.

    Attributes:
        rows: ``[n-grams]`` number of the text.
        hashes: ``[n-grams]`` hash of 40 bits; each at most once per text.
        sizes: ``[texts]`` number of n-grams.
    """

    rows: Indices
    hashes: Hashes
    sizes: Indices


def character_shingles(texts: Sequence[str]) -> Shingles:
    """Five letters, blanks among them; two in texts that are mostly in Han, kana or Hangul.

    Args:
        texts: As :func:`normalised` gives them; at most :data:`MOST_TEXTS`.
    """
    codes, owners = _code_points([f" {text} ".ljust(_ALPHABET_N) for text in texts])
    heavy = np.bincount(owners[codes >= _IDEOGRAPHS], minlength=len(texts))
    letters = np.bincount(owners[codes != 32], minlength=len(texts))
    ideographic = 2 * heavy > letters
    found = []
    for n, wanted in ((_ALPHABET_N, ~ideographic), (_IDEOGRAPH_N, ideographic)):
        if not wanted.any():
            continue
        count = len(codes) - n + 1
        hashes = np.zeros(count, dtype=np.uint64)
        for place in range(n):
            hashes += codes[place : place + count] * _FACTORS[place]
        whole = (owners[:count] == owners[n - 1 :]) & wanted[owners[:count]]
        found.append((owners[:count][whole], _mixed(hashes[whole])))
    return _unique(found, len(texts))


def word_shingles(texts: Sequence[str]) -> Shingles:
    """Two words that follow each other, the beginning of the text being one.

    Args:
        texts: As :func:`normalised` gives them; at most :data:`MOST_TEXTS`.
    """
    codes, owners = _code_points([f" {text}" for text in texts])
    letters = codes != 32
    starts = np.flatnonzero(letters[1:] & ~letters[:-1]) + 1
    if not len(starts):
        return _unique([], len(texts))
    place = np.arange(len(codes)) - np.repeat(np.r_[0, starts], np.diff(np.r_[0, starts, len(codes)]))
    words = np.add.reduceat(np.where(letters, codes * _FACTORS[place % len(_FACTORS)], 0), starts)
    words = _mixed(words, bits=64)
    owner = owners[starts]
    before = np.where(np.r_[True, owner[1:] != owner[:-1]], np.uint64(0), np.r_[np.uint64(0), words[:-1]])
    return _unique([(owner, _mixed(words * _FACTORS[0] + before * _FACTORS[1]))], len(texts))


def _code_points(texts: Sequence[str]) -> tuple[Hashes, Indices]:
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    return codes.astype(np.uint64), np.repeat(np.arange(len(texts)), lengths)


def _mixed(hashes: Hashes, bits: int = _BITS) -> Hashes:
    """The hashes with their bits well mixed, as MurmurHash3 finishes."""
    hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return hashes >> np.uint64(64 - bits) if bits < 64 else hashes ^ (hashes >> np.uint64(33))


def _unique(found: Sequence[tuple[Indices, Hashes]], texts: int) -> Shingles:
    keys = [rows.astype(np.uint64) << np.uint64(_BITS) | hashes for rows, hashes in found]
    both = np.unique(np.concatenate(keys)) if keys else np.zeros(0, dtype=np.uint64)
    rows = (both >> np.uint64(_BITS)).astype(np.int64)
    return Shingles(rows, both & _MASK, np.bincount(rows, minlength=texts))


class SimilarTexts:
    """Finds which of some known texts a text is like.

    Args:
        known: Normalised texts.
        shingles: What sets they are compared by.
        threshold: Least Jaccard similarity, above 0 and at most 1.
    """

    def __init__(
        self, known: Sequence[str], shingles: Callable[[Sequence[str]], Shingles], threshold: float
    ) -> None:
        from scipy import sparse

        self._shingles, self._threshold = shingles, threshold
        found = shingles(known)
        self._sizes = found.sizes
        self._vocabulary, columns, frequency = np.unique(
            found.hashes, return_inverse=True, return_counts=True
        )
        shape = (len(known), len(self._vocabulary))
        self._sets = sparse.csr_array((np.ones(len(columns), np.int32), (found.rows, columns)), shape=shape)
        # Of each text, the rarest of its n-grams among the known texts.
        order = np.lexsort((frequency[columns], found.rows))
        first = np.cumsum(found.sizes) - found.sizes
        rank = np.arange(len(order)) - first[found.rows[order]]
        size = found.sizes[found.rows[order]]
        rare = order[rank < size - np.ceil(threshold * size - 1e-9) + 1]
        prefix = (np.ones(len(rare), np.int32), (found.rows[rare], columns[rare]))
        self._rare = sparse.csr_array(prefix, shape=shape).T.tocsr()

    def find(self, texts: Sequence[str]) -> tuple[Indices, Indices, npt.NDArray[np.float64]]:
        """Pairs that are alike: ``[pairs]`` numbers of ``texts``, numbers of known texts, and similarities."""
        from scipy import sparse

        found = self._shingles(texts)
        column = np.searchsorted(self._vocabulary, found.hashes)
        column[column == len(self._vocabulary)] = 0
        shared = self._vocabulary[column] == found.hashes if len(self._vocabulary) else column < 0
        rows, column = found.rows[shared], column[shared]
        # A text of which too little is known at all is like none of them.
        enough = np.bincount(rows, minlength=len(texts)) >= self._threshold * found.sizes - 1e-9
        kept = enough[rows]
        shape = (len(texts), len(self._vocabulary))
        sets = sparse.csr_array((np.ones(int(kept.sum()), np.int32), (rows[kept], column[kept])), shape=shape)
        pairs = (sets @ self._rare).tocoo()
        left, right = pairs.row.astype(np.int64), pairs.col.astype(np.int64)
        common = np.zeros(len(left))
        for start in range(0, len(left), _PAIRS_AT_ONCE):
            part = slice(start, start + _PAIRS_AT_ONCE)
            common[part] = sets[left[part]].multiply(self._sets[right[part]]).sum(axis=1)
        similarity = common / np.maximum(found.sizes[left] + self._sizes[right] - common, 1)
        alike = similarity >= self._threshold - 1e-9
        return left[alike], right[alike], similarity[alike]
