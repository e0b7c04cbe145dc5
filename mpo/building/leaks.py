"""Prompts of a build that stand in an evaluation: trained on, they would make its result say less."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mpo.building.prompts import Dropped, PromptRow
from mpo.data.leaks import Leak, find_leaks
from mpo.data.prompt_texts import TrainingText
from mpo.evaluation.evaluation_texts import evaluation_texts


def without_leaks(
    read: Callable[[], Iterator[PromptRow | Dropped]], against: Sequence[str], source_language: str
) -> Iterator[PromptRow | Dropped]:
    """The prompts without those that an evaluation has, which become dropped ones.

    Args:
        read: Gives the prompts anew each time.
        against: Evaluations, as :func:`mpo.evaluation.evaluation_texts.evaluation_texts` takes them.
        source_language: Code of the dominant language.

    Raises:
        DataError: A prompt set cannot be read.
    """
    evaluation = [text for name in against for text in evaluation_texts(name)]
    found: dict[str, Leak] = {}
    # Of each evaluation prompt only the nearest rows are named, so what is left is looked at again.
    while True:
        training = (
            TrainingText("prompts", number, tuple(row.texts.values()))
            for number, row in enumerate(read())
            if isinstance(row, PromptRow) and row.id not in found
        )
        pairs = sorted(
            find_leaks(training, evaluation).pairs, key=lambda leak: (leak.score, leak.kind == "exact")
        )
        numbers = {leak.row: leak for leak in pairs}  # the nearest of each row
        new = {
            row.id: numbers[number]
            for number, row in enumerate(read())
            if number in numbers and isinstance(row, PromptRow)
        }
        if not new:
            break
        found |= new
    for row in read():
        if isinstance(row, PromptRow) and row.id in found:
            leak = found[row.id]
            text = row.texts[source_language]
            reason = f"stands in {leak.prompts} ({leak.kind})"
            yield Dropped(row.id, "leaks", reason, source_language, "prompt", round(leak.score, 3), text=text)
        else:
            yield row
