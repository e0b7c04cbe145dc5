"""What a model does with the probe prompts: harmful ones answered, harmless ones refused, in which language, and babble.

Answers are judged as ``mpo evaluate`` judges them with ``refusal-phrases``, and their language and repetition measured by
:mod:`mpo.evaluation.wording`, so that a number here means what it means there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

from mpo.common.statistics import Outcomes
from mpo.common.typed_json import Share, named_by_key
from mpo.evaluation.answers import AnswerRow
from mpo.evaluation.judges import JudgeChoice, make_judge
from mpo.evaluation.probe import PROBE_LANGUAGES, load_probe
from mpo.evaluation.prompts import Prompt, PromptSet
from mpo.evaluation.rates import RateTable, balanced_share, tabulate
from mpo.evaluation.tasks import ATTACK, NO_VERDICT, OVER_REFUSAL, Task
from mpo.evaluation.verdicts import judge_unwritten
from mpo.evaluation.wording import (
    Wording,
    in_language_asked,
    in_no_known_language,
    measure_wording,
    repeats_itself,
)

ANSWERED, REFUSED, IN_LANGUAGE, UNKNOWN, REPETITIVE = MEASURES = (
    "harmful_answered",
    "harmless_refused",
    "in_language",
    "language_unknown",
    "repetitive",
)
"""What is measured, each a share of 0 or 1 per prompt."""

JUDGE = JudgeChoice("refusal-phrases")


@dataclass(frozen=True)
class ProbePrompts:
    """What a run asks its model.

    Attributes:
        harmful: Prompts that a safe assistant refuses.
        harmless: Harmless ones, and as many, or all there are, that only look harmful.
        left_out: Languages that are not asked.
    """

    harmful: PromptSet
    harmless: PromptSet
    left_out: tuple[str, ...] = ()

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """All of them."""
        return (*self.harmful.prompts, *self.harmless.prompts)

    @property
    def languages(self) -> list[str]:
        """Codes of their languages."""
        return self.harmful.languages

    @property
    def per_language(self) -> tuple[int, int]:
        """How many harmful and harmless prompts there are in each language."""
        count = len(self.languages)
        return len(self.harmful.prompts) // count, len(self.harmless.prompts) // count


def choose_prompts(languages: Iterable[str], per_kind: int) -> ProbePrompts | None:
    """So many probe prompts of each kind in each of these languages, the same every time.

    Args:
        languages: Codes; those that the probe set does not have are left out and named in the result.
        per_kind: Prompts of each kind per language, as far as the set has them.

    Returns:
        The prompts; None where none of the languages is in the set, or ``per_kind`` is 0.
    """
    wanted = list(dict.fromkeys(languages))
    known = [code for code in wanted if code in PROBE_LANGUAGES]
    if not known or not per_kind:
        return None
    harmful, harmless, looks = (
        load_probe(known, kinds=[kind], limit=per_kind) for kind in ("harmful", "harmless", "looks_harmful")
    )
    both = replace(harmless, prompts=(*harmless.prompts, *looks.prompts))
    return ProbePrompts(harmful, both, tuple(code for code in wanted if code not in known))


@dataclass(frozen=True, kw_only=True)
class Behavior:
    """What a model did at one moment.

    Attributes:
        harmful_answered: Verdicts on the harmful prompts; the rate is that of ``unsafe``.
        harmless_refused: Verdicts on the harmless ones; the rate is that of ``refusal``.
        wording: Language and repetition of all answers, by the prompts' language.
        balanced: See :func:`mpo.evaluation.rates.balanced_share`; None where no verdict could be read.
    """

    harmful_answered: RateTable
    harmless_refused: RateTable
    wording: Annotated[dict[str, Wording], named_by_key("language")]
    balanced: Share | None = None


@dataclass(frozen=True)
class Answered:
    """Probe prompts with a model's answers, judged.

    Attributes:
        prompts: The prompts.
        answers: One per prompt, in their order.
        verdicts: The verdict of each, by its id.
    """

    prompts: ProbePrompts
    answers: tuple[AnswerRow, ...]
    verdicts: Mapping[str, str]

    @classmethod
    def judged(cls, prompts: ProbePrompts, answers: Sequence[AnswerRow]) -> Answered:
        """Judge the answers to all prompts, in the prompts' order."""
        count = len(prompts.harmful.prompts)
        verdicts = {
            **judge_unwritten(make_judge(JUDGE, ATTACK), ATTACK, answers[:count]),
            **judge_unwritten(make_judge(JUDGE, OVER_REFUSAL), OVER_REFUSAL, answers[count:]),
        }
        return cls(prompts, tuple(answers), verdicts)

    @property
    def harmful(self) -> tuple[AnswerRow, ...]:
        """Answers to the harmful prompts."""
        return self.answers[: len(self.prompts.harmful.prompts)]

    @property
    def harmless(self) -> tuple[AnswerRow, ...]:
        """Answers to the harmless ones."""
        return self.answers[len(self.prompts.harmful.prompts) :]

    @cached_property
    def behavior(self) -> Behavior:
        """Its rates, with intervals."""
        attack = tabulate(ATTACK, self.harmful, self.verdicts)
        refusal = tabulate(OVER_REFUSAL, self.harmless, self.verdicts)
        wording = measure_wording(self.answers, self.verdicts)
        rates = (
            {row.language: row.rate for row in table.rows if row.rate is not None}
            for table in (attack, refusal)
        )
        return Behavior(
            harmful_answered=attack,
            harmless_refused=refusal,
            wording=wording,
            balanced=balanced_share(*rates),
        )

    @cached_property
    def outcomes(self) -> dict[str, Outcomes]:
        """``{measure: {language: {prompt id: 1 or 0}}}``; what cannot be told is left out."""
        return {
            ANSWERED: self._counted(ATTACK, self.harmful),
            REFUSED: self._counted(OVER_REFUSAL, self.harmless),
            IN_LANGUAGE: in_language_asked(self.answers),
            UNKNOWN: in_no_known_language(self.answers, self._refusals),
            REPETITIVE: repeats_itself(self.answers),
        }

    @property
    def _refusals(self) -> set[str]:
        """Ids of the answers that refuse: short as they are, their phrases are of a language."""
        return {id for id, verdict in self.verdicts.items() if verdict in ("safe", OVER_REFUSAL.counted)}

    def _counted(self, task: Task, answers: Sequence[AnswerRow]) -> Outcomes:
        found: dict[str, dict[str, float]] = {}
        for row in answers:
            if (verdict := self.verdicts[row.id]) not in NO_VERDICT:
                found.setdefault(row.language, {})[row.prompt_id] = float(verdict == task.counted)
        return found

    def metrics(self) -> dict[str, float]:
        """As they are logged: ``probe/MEASURE/LANGUAGE``, ``probe/MEASURE``, its mean over languages, ``probe/balanced``."""
        logged: dict[str, float] = {}
        for measure, outcomes in self.outcomes.items():
            shares = {code: sum(of.values()) / len(of) for code, of in outcomes.items() if of}
            logged |= {f"probe/{measure}/{code}": share for code, share in shares.items()}
            if shares:
                logged[f"probe/{measure}"] = sum(shares.values()) / len(shares)
        if self.behavior.balanced is not None:
            logged["probe/balanced"] = self.behavior.balanced
        return logged
