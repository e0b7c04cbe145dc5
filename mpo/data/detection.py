"""Detecting the language of many texts at once: the answers of :func:`mpo.data.languages.detect`, in a tenth of the time.

One text at a time, the classifier walks its automaton byte by byte in Python. Here it takes a byte of every text in a step,
and all texts of a script are scored by one sparse product. Where the two best languages are closer than float32 can tell
apart, and for texts without a feature, the classifier itself is asked, so that the answers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mpo.data import languages
from mpo.data.languages import Detection
from mpo.errors import DependencyError

_SCRIPT_LIMIT = 0x110000  # one past the last code point
_AT_ONCE = 4096
_NO_ASCII_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())
_ROUNDING = 4 * float(np.finfo(np.float32).eps)


def detect_all(texts: Sequence[str]) -> list[Detection]:
    """What :func:`mpo.data.languages.detect` says of each text.

    Raises:
        DependencyError: ``py3langid`` is missing and a text's script alone does not decide.
    """
    return [
        found
        for start in range(0, len(texts), _AT_ONCE)
        for found in _detect(texts[start : start + _AT_ONCE])
    ]


def expect(texts: Sequence[str]) -> None:
    """Detects texts that :func:`mpo.data.languages.detect` is about to be asked for, instead of those expected before."""
    languages.EXPECTED.clear()
    languages.EXPECTED.update(zip(texts, detect_all(texts), strict=True))


def get_ready() -> None:
    """Loads what detection works with, so that processes that are begun afterwards share it."""
    with suppress(DependencyError):  # which is no error where every pair is labelled
        _automaton()


def _detect(texts: Sequence[str]) -> list[Detection]:
    found: list[Detection | None] = [None] * len(texts)
    unsure: dict[
        str, list[tuple[int, int, str]]
    ] = {}  # script -> text, its letters, and what the classifier reads
    for index, (text, counts) in enumerate(zip(texts, _count_scripts(texts), strict=True)):
        script, letters, decided = languages.by_script(text, counts)
        if decided is not None or script is None:
            found[index] = decided
        else:
            unsure.setdefault(script, []).append(
                (index, letters, languages.classified_part(text, counts, script))
            )
    for script, several in unsure.items():
        for (index, letters, _), language in zip(
            several, _classify([kept for *_, kept in several], script), strict=True
        ):
            certain = letters >= languages.CERTAIN_LETTERS
            found[index] = (
                languages.detect_alone(texts[index])
                if language is None
                else Detection(language, letters, certain)
            )
    return [each for each in found if each is not None]


# ---- Scripts -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _scripts() -> tuple[list[str], npt.NDArray[np.int8]]:
    """Names of the scripts, and the index of each code point's: -1 for none, -2 where it was never looked up."""
    return languages.script_names(), np.full(_SCRIPT_LIMIT, -2, dtype=np.int8)


def _count_scripts(texts: Sequence[str]) -> list[dict[str, int]]:
    counts: list[dict[str, int]] = []
    others: list[int] = []  # texts with letters of which numpy has to look up the script
    for text in texts:
        if text.isascii():
            letters = len(text[: languages.TEXT_LIMIT].encode("ascii").translate(None, _NO_ASCII_LETTERS))
            counts.append({"Latin": letters} if letters else {})
        else:
            others.append(len(counts))
            counts.append({})
    for place, found in zip(others, _look_up_scripts([texts[place] for place in others]), strict=True):
        counts[place] = found
    return counts


def _look_up_scripts(texts: Sequence[str]) -> list[dict[str, int]]:
    names, script_of = _scripts()
    limited = [text[: languages.TEXT_LIMIT] for text in texts]
    points = np.frombuffer("".join(limited).encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
    scripts = script_of[points]
    if (scripts == -2).any():
        for point in np.unique(points[scripts == -2]).tolist():
            script = languages.script_of(chr(point))
            script_of[point] = -1 if script is None else names.index(script)
        scripts = script_of[points]
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in limited])
    letters = scripts >= 0
    table = np.bincount(owner[letters] * len(names) + scripts[letters], minlength=len(texts) * len(names))
    counts: list[dict[str, int]] = [{} for _ in texts]
    for place in np.flatnonzero(table).tolist():
        counts[place // len(names)][names[place % len(names)]] = int(table[place])
    return counts


# ---- The classifier ----------------------------------------------------------------------------------------------


class _Automaton(NamedTuple):
    following: npt.NDArray[np.uint32]
    row: npt.NDArray[np.int64]
    feature: npt.NDArray[np.int32]


@lru_cache(maxsize=1)
def _automaton() -> _Automaton:
    model = languages.classifier()
    return _Automaton(
        np.frombuffer(model.tk_nextmove, dtype=np.uint32),
        np.asarray(model.tk_row, dtype=np.int64) << 8,
        np.asarray(model.tk_output, dtype=np.int32),
    )


class _Weights(NamedTuple):
    labels: list[str]
    table: npt.NDArray[np.float32]  # [features, columns]
    prior: npt.NDArray[np.float32]
    label_of: npt.NDArray[np.int64]  # of each column; several may be one label's


@lru_cache(maxsize=32)
def _weights(script: str) -> _Weights:
    model, wanted = languages.classifier(), set(languages.languages_of_script(script))
    columns = [index for index, label in enumerate(model.nb_classes) if label in wanted]
    labels = list(dict.fromkeys(model.nb_classes[index] for index in columns))
    return _Weights(
        labels,
        np.ascontiguousarray(model.nb_ptc[:, columns], dtype=np.float32),
        model.nb_pc[columns],
        np.array([labels.index(model.nb_classes[index]) for index in columns], dtype=np.int64),
    )


def _classify(texts: Sequence[str], script: str) -> list[str | None]:
    """The classifier's best language among those of a script; None where the classifier itself must be asked."""
    from scipy.sparse import csr_matrix

    weights = _weights(script)
    if len(weights.labels) < 2:
        return [None] * len(texts)
    visits, counts, starts = _features(texts)
    matrix = csr_matrix(
        (np.log1p(counts.astype(np.float32)), visits, starts),
        shape=(len(texts), len(weights.table)),
        copy=False,
    )
    columns = matrix @ weights.table + weights.prior
    scores = np.full((len(texts), len(weights.labels)), -np.inf, dtype=np.float32)
    for column, label in enumerate(weights.label_of):
        np.maximum(scores[:, label], columns[:, column], out=scores[:, label])
    second, best = np.argpartition(scores, -2, axis=1)[:, -2:].T
    rows = np.arange(len(texts))
    margin = scores[rows, best] - scores[rows, second]
    number = np.diff(starts)
    # All weights are negative, so a score is as large as what was added up to it.
    sure = (number > 0) & (margin > _ROUNDING * (number + 2) * (np.abs(columns).max(axis=1) + 16))
    return [
        weights.labels[place] if known else None
        for place, known in zip(best.tolist(), sure.tolist(), strict=True)
    ]


def _features(texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Features that the automaton finds in each text, how often, and where each text's begin (as in a CSR matrix)."""
    following, row, feature = _automaton()
    encoded = [languages.classifier()._encode(text) for text in texts]
    order = sorted(range(len(texts)), key=lambda index: -len(encoded[index]))
    lengths = np.array([len(encoded[index]) for index in order])
    longest = int(lengths[0]) if len(lengths) else 0
    letters = np.zeros((len(texts), longest), dtype=np.uint8)
    for place, index in enumerate(order):
        letters[place, : lengths[place]] = np.frombuffer(encoded[index], dtype=np.uint8)
    letters = np.ascontiguousarray(letters.T)
    # Texts stand from the longest to the shortest: those that still have a byte are the first ones.
    active = np.searchsorted(-lengths, -np.arange(longest), side="left")
    size = len(feature) + 1
    whole = np.int32 if len(texts) * size < 1 << 31 else np.int64  # the smaller is sorted in half the time
    first_key = (np.asarray(order, dtype=np.int64) * size).astype(whole)
    found = [np.zeros(0, dtype=whole)]
    state = np.zeros(len(texts), dtype=np.int64)
    for position, number in enumerate(active.tolist()):
        state = following[row[state[:number]] + letters[position, :number]]
        features = feature[state]
        owners = np.flatnonzero(features >= 0)
        found.append(first_key[owners] + features[owners])
    keys = np.concatenate(found)
    keys.sort()
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    unique = keys[first]
    counts = np.diff(np.append(first, len(keys)))
    starts = np.searchsorted(unique, np.arange(len(texts) + 1) * size)
    return (unique % size).astype(np.int32), counts, starts.astype(np.int32)
