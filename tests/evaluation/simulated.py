"""Scores with known properties, in place of a model's."""

from __future__ import annotations

import numpy as np

from mpo.evaluation import PairScore

LANGUAGES = ("zh", "ja", "ko", "ar", "bn", "sw")


def simulated_scores(
    languages: tuple[str, ...] = LANGUAGES, groups: int = 12, seed: int = 0
) -> tuple[list[PairScore], list[PairScore]]:
    """Scores of the same pairs before and after a training that closes most of each target gap."""
    random = np.random.default_rng(seed)
    before, after = [], []
    for group in range(groups):
        reference = random.normal(0.57, 0.3)
        chosen = random.normal(-1.2, 0.2)
        before.append(score(group, "en", chosen, chosen - reference, reference, is_source=True))
        drifted = reference + random.normal(0.02, 0.03)
        after.append(score(group, "en", chosen + 0.05, chosen + 0.05 - drifted, reference, is_source=True))
        for number, language in enumerate(languages):
            gap = random.normal(-0.24 + 0.06 * (number % 9), 0.3)
            chosen = random.normal(-2.2, 0.2)
            before.append(score(group, language, chosen, chosen - gap, reference))
            gap = 0.35 * gap + 0.65 * reference + random.normal(-0.1, 0.1)
            chosen += random.normal(0.25, 0.1)
            after.append(score(group, language, chosen, chosen - gap, reference))
    return before, after


def score(
    group: int, language: str, chosen: float, rejected: float, reference: float, *, is_source: bool = False
) -> PairScore:
    """One record, its gap computed from its log-likelihoods."""
    return PairScore(
        group, language, is_source, float(chosen), float(rejected), float(chosen - rejected), float(reference)
    )
