"""Evaluation prompts among the groups that a run trains on."""

from __future__ import annotations

from datasets import Dataset

from mpo.data.leaks import Leaks, find_leaks
from mpo.evaluation.evaluation_texts import evaluation_texts
from mpo.evaluation.probe import PROBE
from mpo.jobs.leak import group_texts
from mpo.training.recipe import Recipe


def leaks_of(recipe: Recipe, train: Dataset, origin: str) -> Leaks | None:
    """What is found in the training groups of the probe set and of `leak_against`.

    Args:
        recipe: The recipe.
        train: The groups that are trained on.
        origin: Where they came from.

    Returns:
        The leaks; None on any but the main process, which alone speaks and writes.

    Raises:
        DataError: A prompt set of `leak_against` cannot be read.
    """
    if recipe.training.process_index != 0:
        return None
    names = dict.fromkeys([*(recipe.data.leak_against or ()), PROBE])
    leaks = find_leaks(group_texts(train), [text for name in names for text in evaluation_texts(name)])
    leaks.training = [origin]
    return leaks
