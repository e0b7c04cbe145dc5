"""Answers to the prompts: sampled from the model to be trained, read, and two of them made a pair."""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mpo.building.prompts import PromptRow
from mpo.building.recipe import AnswerSettings
from mpo.building.refusals import Refusals
from mpo.building.stages import Kept, Row
from mpo.building.translation.segments import without_code
from mpo.data.contract import HARMFUL, same_response
from mpo.data.languages import detect, known_to_detection, same_language
from mpo.data.reasoning import split_reasoning
from mpo.data.refusals import opens_with_refusal
from mpo.errors import ModelError
from mpo.evaluation.engines import Answer, Engine, ModelChoice
from mpo.evaluation.judges import Exchange, Judge
from mpo.evaluation.wording import is_repetitive

_LAST_SENTENCE = re.compile(r"(?s)\A(.*[.!?।؟…。！？][\"'”’」』）)\]]*)")

DATA, MODEL, REJECTING_MODEL, REFUSALS, OPENINGS, TRANSLATION = (
    "data", "model", "rejecting_model", "refusals", "openings", "translation",
)  # fmt: skip
"""Where a text comes from."""


def sample(engine: Engine, prompts: Sequence[tuple[str | None, int]], kept: Kept) -> list[list[Row]]:
    """Answers to the prompts of a block.

    Args:
        engine: What answers.
        prompts: A prompt and how many answers to it are wanted; none to a prompt that is None.
        kept: What the block has got already.

    Returns:
        For each prompt its answers, ``{"text", "finished", "fault"}`` each; ``fault`` says why there is none, else it is None.

    Raises:
        MPOError: The model cannot be used or reached. Its answers so far are kept.
    """
    wanted = [
        (f"{place}.{number}", text)
        for place, (text, count) in enumerate(prompts)
        if text is not None
        for number in range(count)
    ]
    conversations = [[{"role": "user", "content": text}] for _, text in wanted]
    done = {index for index, (name, _) in enumerate(wanted) if name in kept}
    for index, answer in engine.generate(conversations, done):
        kept.keep(wanted[index][0], _read(answer))
    return [
        [] if text is None else [kept[f"{place}.{number}"] for number in range(count)]
        for place, (text, count) in enumerate(prompts)
    ]


def _read(answer: Answer) -> Row:
    parts = split_reasoning(answer.text)
    text = parts.answer.strip()
    thought = bool(parts.reasoning or answer.reasoning)
    fault = None
    if answer.blocked is not None:
        fault = "the server withheld the answer"
    elif not parts.complete or (thought and not text and not answer.finished):
        fault = "still reasoning when it was cut off"
    elif not text:
        fault = "no text"
    return {"text": text, "finished": answer.finished, "fault": fault}


def usable(answer: Row, language: str, unfinished: str) -> tuple[str, str | None]:
    """The text of an answer as it would be trained on, and what speaks against that; None where nothing does.

    Args:
        answer: One of :func:`sample`.
        language: Code of the language that it should be in.
        unfinished: ``drop`` or ``cut``, see :class:`~mpo.building.recipe.AnswerSettings`.
    """
    text = str(answer["text"])
    if answer["fault"] is not None:
        return text, str(answer["fault"])
    if not answer["finished"]:
        whole = _LAST_SENTENCE.match(text) if unfinished == "cut" else None
        if whole is None:
            return text, "cut off at max_new_tokens"
        text = whole[1]
    if is_repetitive(text):
        return text, "repeats itself"
    found = detect(without_code(text))
    if found.certain and known_to_detection([language]) and not same_language(found.language, language):
        return text, f"in another language ({found.language})"
    return text, None


def _taken(answer: Row, language: str, settings: AnswerSettings) -> tuple[str, str | None]:
    """As :func:`usable`, for an answer to a harmless prompt."""
    if settings.takes_any_harmless:
        return str(answer["text"]), answer["fault"]
    return usable(answer, language, settings.unfinished)


def own_answer(
    answers: Sequence[Row], language: str, settings: AnswerSettings
) -> tuple[str | None, str | None]:
    """The first answer to a harmless prompt that is taken, or None and why the last one is not."""
    fault: str | None = "no answer"
    for answer in answers:
        text, fault = _taken(answer, language, settings)
        if fault is None and not settings.takes_any_harmless and opens_with_refusal(text, language, "en"):
            fault = "the model refuses"
        if fault is None:
            return text, None
    return None, fault


def judge_texts(judges: Mapping[str, Judge], asked: Sequence[tuple[str, Exchange]], kept: Kept) -> list[str]:
    """Verdicts on answers.

    Args:
        judges: By the kind of the prompt.
        asked: The kind of the prompt, and what is judged.
        kept: What the block has got already.

    Raises:
        MPOError: A judge cannot be used or reached. Its verdicts so far are kept.
    """
    for kind, judge in judges.items():
        left = [index for index, (each, _) in enumerate(asked) if each == kind and str(index) not in kept]
        for place, verdict in judge.judge([asked[index][1] for index in left]) if left else ():
            kept.keep(str(left[place]), verdict.verdict)
    return [kept[str(index)] for index in range(len(asked))]


def judge_samples(
    judges: Mapping[str, Judge],
    rows: Sequence[tuple[PromptRow, Row]],
    language: str,
    unfinished: str,
    kept: Kept,
) -> list[Row]:
    """The verdict on each sampled answer of a block; None on those that are of no use."""
    asked, places = [], []
    verdicts: list[list[str | None]] = [[None] * len(row["answers"]) for _, row in rows]
    for index, (prompt, row) in enumerate(rows):
        for number, answer in enumerate(row["answers"]):
            text, fault = usable(answer, language, unfinished)
            if fault is None:
                asked.append((prompt.kind, Exchange(prompt.texts[language], text, language)))
                places.append((index, number))
    for (index, number), verdict in zip(places, judge_texts(judges, asked, kept), strict=True):
        verdicts[index][number] = verdict
    return [{"id": prompt.id, "verdicts": given} for (prompt, _), given in zip(rows, verdicts, strict=True)]


class Gaps:
    """Reward gaps of pairs under the model to be trained, whose weights are read with the first one."""

    def __init__(self, choice: ModelChoice) -> None:
        self._choice = replace(choice, engine="transformers")
        self._policy: Any = None

    def of(self, pairs: Sequence[tuple[str, Sequence[str], str]]) -> list[list[float]]:
        """The gap of each chosen answer against the rejected one.

        Args:
            pairs: Prompt, chosen answers, rejected answer.

        Returns:
            Nats per token, one for each chosen answer.

        Raises:
            MPOError: The model cannot be used.
        """
        from datasets import Dataset

        from mpo.evaluation.policy import load_policy
        from mpo.training.scoring import score_groups

        if not pairs:
            return []
        if self._policy is None:
            self._policy = load_policy(self._choice)
        policy = self._policy

        def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
            return {
                "language": "und",
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "row": 0,
            }

        groups = [
            {
                "source": pair(prompt, chosen[0], rejected),
                "targets": [pair(prompt, each, rejected) for each in chosen],
                "origin": "the build",
            }
            for prompt, chosen, rejected in pairs
        ]
        scores = score_groups(
            policy.model,
            Dataset.from_list(groups),
            policy.tokenizer,
            source_language="en",
            max_length=None,
            template_kwargs=policy.chat_template_kwargs,
            progress=False,
        )
        found: list[list[float]] = [[] for _ in pairs]
        for record in scores.records:
            if not record.is_source:
                found[record.group].append(record.gap)
        if [len(gaps) for gaps in found] != [len(chosen) for _, chosen, _ in pairs]:
            raise ModelError("The model's scores do not belong to the answers that were asked about.")
        return found

    def close(self) -> None:
        """Gives the memory of the weights back."""
        self._policy = None
        gc.collect()


class PairMaker:
    """Makes a pair of the answers to a prompt, in the dominant language."""

    def __init__(
        self,
        settings: AnswerSettings,
        language: str,
        refusals: Refusals,
        openings: Refusals,
        gaps: Gaps | None,
    ) -> None:
        """Keep the settings.

        Args:
            settings: Where answers come from.
            language: Code of the dominant language.
            refusals: Refusals by language.
            openings: Openings of answers that comply, by language.
            gaps: The gaps by which an answer is chosen; None takes the first.
        """
        self.settings, self.language, self.gaps = settings, language, gaps
        self.refusals, self.openings = refusals, openings

    def make(self, rows: Sequence[tuple[PromptRow, Row, Row, Row]], kept: Kept) -> list[Row]:
        """Pairs of a block.

        Args:
            rows: Prompt, its sampled answers, their verdicts, and the rejecting model's answers.
            kept: What the block has got already.

        Returns:
            ``{"id", "chosen", "rejected", "from", "gap", "safe", "fault"}``: the texts, where each comes from, the reward gap or
            None, how many sampled answers were safe (or helpful), and why there is no pair, or None.
        """
        out, candidates = [], []
        for prompt, samples, verdicts, rejecting in rows:
            row, chosen = self._pair(prompt, samples["answers"], verdicts["verdicts"], rejecting["answers"])
            out.append(row)
            candidates.append(chosen)
        scored = [index for index, row in enumerate(out) if row["fault"] is None]
        if self.gaps is not None and scored:
            asked = [(rows[i][0].texts[self.language], candidates[i], out[i]["rejected"]) for i in scored]
            for index, gaps in zip(scored, self.gaps.of(asked), strict=True):
                best = max(range(len(gaps)), key=gaps.__getitem__)
                out[index] |= {"chosen": candidates[index][best], "gap": gaps[best]}
        return out

    def _pair(
        self,
        prompt: PromptRow,
        answers: Sequence[Row],
        verdicts: Sequence[str | None],
        rejecting: Sequence[Row],
    ) -> tuple[Row, list[str]]:
        """A pair with its first chosen answer, and all that may be chosen."""
        wanted = "safe" if prompt.kind == HARMFUL else "answer"
        if prompt.kind != HARMFUL and self.settings.takes_any_harmless:
            read = [_taken(answer, self.language, self.settings) for answer in answers]
            good = [text for text, why in read if why is None]
        else:
            read = [usable(answer, self.language, self.settings.unfinished) for answer in answers]
            good = [text for (text, _), verdict in zip(read, verdicts, strict=True) if verdict == wanted]
        bad = [text for (text, _), verdict in zip(read, verdicts, strict=True) if verdict == "unsafe"]
        rejected, rejected_from = self._rejected(prompt, good, bad, rejecting)
        chosen, chosen_from, fault = list(dict.fromkeys(good)), MODEL, None
        if self.settings.chosen == "column":
            chosen, chosen_from = [prompt.chosen] if prompt.chosen else [], DATA
            fault = None if chosen else "no `chosen` in the data"
        elif prompt.kind == HARMFUL and (
            self.settings.chosen == "refusal" or (not chosen and self.settings.never_safe == "refusal")
        ):
            refusal = self.refusals.for_prompt(prompt.id, self.language)
            chosen, chosen_from = [refusal] if refusal else [], REFUSALS
            never = "" if self.settings.chosen == "refusal" else "never answered safely, and "
            fault = None if chosen else f"{never}no refusal in {self.language} is given"
        elif not chosen:
            fault = self._why(
                read, "never answered safely" if prompt.kind == HARMFUL else "the model refuses"
            )
        if fault is None and rejected is None:
            fault = "no rejected answer"
        chosen = [text for text in chosen if rejected is None or not same_response(text, rejected)]
        if fault is None and not chosen:
            fault = "chosen is equal to rejected"
        row = {
            "id": prompt.id,
            "chosen": chosen[0] if fault is None else None,
            "rejected": rejected if fault is None else None,
            "from": {"chosen": chosen_from, "rejected": rejected_from},
            "gap": None,
            "safe": len(good),
            "fault": fault,
        }
        return row, chosen

    def _rejected(
        self, prompt: PromptRow, good: Sequence[str], bad: Sequence[str], rejecting: Sequence[Row]
    ) -> tuple[str | None, str]:
        if prompt.kind != HARMFUL:
            if prompt.rejected is not None and "column" in self.settings.rejected:
                return prompt.rejected, DATA
            # An own answer that is the list's refusal, to the letter, is held as it is, beside another one.
            own = good[0] if good else None
            return self.refusals.for_prompt(prompt.id, self.language, unlike=own), REFUSALS
        for place in self.settings.rejected:
            if place == "column" and prompt.rejected is not None:
                return prompt.rejected, DATA
            if place == "own" and bad:
                return bad[0], MODEL
            if place == "model":
                for answer in rejecting:
                    text, fault = usable(answer, self.language, self.settings.unfinished)
                    if fault is None:
                        return text, REJECTING_MODEL
            if place == "opening" and (opening := self.openings.for_prompt(prompt.id, self.language)):
                return opening, OPENINGS
        return None, DATA

    @staticmethod
    def _why(read: Sequence[tuple[str, str | None]], otherwise: str) -> str:
        """Why no answer is of use: what is wrong with the last one, where something is."""
        faults = [fault for _, fault in read]
        return str(faults[-1]) if faults and all(faults) else otherwise
