"""Evaluation prompts in training data, from files to files; and what a run and a suite record of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from mpo.data.contract import RowError
from mpo.data.leaks import (
    CHARACTERS,
    MEANING,
    WORDS,
    Leaks,
    find_leaks,
    sentence_encoder,
)
from mpo.data.prompt_texts import TrainingText, training_texts
from mpo.errors import DataError
from mpo.evaluation.evaluation_texts import evaluation_texts
from mpo.evaluation.results import LeakedPrompts, LeaksResult


def measure_leaks(
    train: Sequence[str],
    against: Sequence[str],
    *,
    split: str = "train",
    characters: float = CHARACTERS,
    words: float = WORDS,
    embeddings: str | None = None,
    meaning: float = MEANING,
    device: str | None = None,
) -> Leaks:
    """Find evaluation prompts in training files.

    Args:
        train: Training files in any form, or names on the Hub.
        against: Prompt sets: files, names that :func:`~mpo.evaluation.prompts.load_prompts` knows, ``"probe"``, or files
            of pairs or groups, whose prompts are taken.
        split: Split of a training set on the Hub.
        characters: Least similarity of character n-grams.
        words: Least similarity of word pairs.
        embeddings: Model of sentence-transformers to compare by meaning, too.
        meaning: Least cosine.
        device: Of that model.

    Raises:
        MPOError: A file cannot be read, or a setting is out of range.
    """
    asked = [text for name in against for text in evaluation_texts(name)]
    skipped: list[RowError] = []
    leaks = find_leaks(
        training_texts(list(train), split=split, skipped=skipped),
        asked,
        characters=characters,
        words=words,
        encoder=None if embeddings is None else sentence_encoder(embeddings, device),
        meaning=meaning,
    )
    leaks.dropped = len(skipped)
    leaks.training = [os.path.basename(name) for name in train]
    if not leaks.rows:
        first = skipped[0] if skipped else "no rows."
        raise DataError(f"no prompt could be read: {first}", file=", ".join(leaks.training))
    return leaks


def group_texts(groups: Any) -> Iterator[TrainingText]:
    """The prompts of loaded groups, see :func:`mpo.data.load_groups`."""
    for table in groups.with_format("arrow").iter(1000):
        for group in table.to_pylist():
            pairs = (group["source"], *group["targets"])
            texts = [m["content"] for pair in pairs for m in pair["prompt"] if m["role"] == "user"]
            yield TrainingText(group["origin"], group["source"]["row"], tuple(texts))


def leaks_result(leaks: Leaks) -> LeaksResult:
    """What ``leaks.json`` holds: no texts."""
    return LeaksResult(
        training=leaks.training,
        rows=leaks.rows,
        sets={
            name: LeakedPrompts(
                total, leaks.found(name), [p.to_dict() for p in leaks.pairs if p.prompts == name]
            )
            for name, total in leaks.prompts.items()
        },
    )
