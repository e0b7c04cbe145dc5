"""The texts of a pair in a target language: given, translated, the model's own, or of the list of refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpo.building.answers import DATA, MODEL, OPENINGS, REFUSALS, TRANSLATION, own_answer
from mpo.building.prompts import PromptRow
from mpo.building.recipe import AnswerSettings
from mpo.building.refusals import Refusals
from mpo.building.stages import Kept, Row
from mpo.building.texts import translate_texts
from mpo.building.translation import TranslationChoice, Translator
from mpo.data.contract import HARMFUL, PARTS


@dataclass(frozen=True)
class Target:
    """A target language and what translates into it.

    Attributes:
        language: Its code.
        source_language: Code of the dominant language.
        translator: What translates; None where every text is given.
        choice: Its settings.
        stock: Refusals and openings by language.
        settings: Where answers come from.
        skips: Whether a prompt that is not given in this language gets no pair in it.
    """

    language: str
    source_language: str
    translator: Translator | None
    choice: TranslationChoice
    stock: Mapping[str, Refusals]
    settings: AnswerSettings
    skips: bool = False

    def prompts(self, rows: Sequence[PromptRow], kept: Kept) -> list[Row]:
        """The harmless prompts of a block in this language, which the model is to answer.

        Returns:
            ``{"id", "text", "from", "fault"}``; ``text`` is None for harmful prompts, which wait for their answers.
        """
        out: list[Row] = [{"id": row.id, "text": None, "from": None, "fault": None} for row in rows]
        asked = {}
        for index, prompt in enumerate(rows):
            if prompt.kind == HARMFUL:
                continue
            if self.language in prompt.texts:
                out[index] |= {"text": prompt.texts[self.language], "from": DATA}
            elif not self.skips:
                asked[str(index)] = prompt.texts[self.source_language]
        for name, made in self._translate(asked, kept).items():
            out[int(name)] |= {"text": made.text or None, "from": TRANSLATION, "fault": made.fault}
        return out

    def texts(self, rows: Sequence[tuple[PromptRow, Row, Row, Row]], kept: Kept) -> list[Row]:
        """The texts of the pairs of a block in this language.

        Args:
            rows: Prompt, its pair in the dominant language, its row of :meth:`prompts`, and the model's own answers in this
                language.
            kept: What the block has got already.

        Returns:
            ``{"id", "prompt", "chosen", "rejected", "from", "faults"}``; a text is None where there is none, and ``faults`` say
            why, by its part. All are None where there is no pair.
        """
        out = []
        asked: dict[str, str] = {}
        for index, (prompt, pair, given, own) in enumerate(rows):
            row: Row = {"id": prompt.id, **dict.fromkeys(PARTS), "from": {}, "faults": {}}
            out.append(row)
            if pair["fault"] is not None or (self.skips and self.language not in prompt.texts):
                continue
            if prompt.kind == HARMFUL:
                self._harmful(row, prompt, pair)
            else:
                self._harmless(row, prompt, pair, given, own)
            originals = {"prompt": prompt.texts[self.source_language], **pair}
            for part in PARTS:
                if row[part] is None and part not in row["faults"]:
                    asked[f"{index} {part}"] = originals[part]
        for name, made in self._translate(asked, kept).items():
            place, part = name.split()
            row = out[int(place)]
            row[part], row["from"][part] = made.text or None, TRANSLATION
            if made.fault is not None:
                row["faults"][part] = made.fault
        return out

    def back(self, rows: Sequence[tuple[Row, Row]], kept: Kept) -> list[Row]:
        """The translations of a block, translated back.

        Args:
            rows: Prompt's row (unused) and row of :meth:`texts`.
            kept: What the block has got already.
        """
        out: list[Row] = [{"id": row["id"], **dict.fromkeys(PARTS)} for _, row in rows]
        asked = {
            f"{index} {part}": row[part]
            for index, (_, row) in enumerate(rows)
            for part in PARTS
            if row["from"].get(part) == TRANSLATION and part not in row["faults"] and row[part]
        }
        for name, made in self._translate(asked, kept, back=True).items():
            place, part = name.split()
            out[int(place)][part] = made.text
        return out

    def _harmful(self, row: Row, prompt: PromptRow, pair: Row) -> None:
        if self.language in prompt.texts:
            row["prompt"], row["from"]["prompt"] = prompt.texts[self.language], DATA
        for part in ("chosen", "rejected"):
            if pair["from"][part] in (REFUSALS, OPENINGS):
                self._stock(row, prompt, part, pair["from"][part])

    def _harmless(self, row: Row, prompt: PromptRow, pair: Row, given: Row, own: Row) -> None:
        row["prompt"], row["from"]["prompt"] = given["text"], given["from"]
        if given["fault"] is not None:
            row["faults"]["prompt"] = given["fault"]
        if pair["from"]["chosen"] == MODEL:
            row["from"]["chosen"] = MODEL
            row["chosen"], fault = own_answer(own["answers"], self.language, self.settings)
            if fault is not None:
                row["faults"]["chosen"] = fault
        if pair["from"]["rejected"] == REFUSALS:
            self._stock(row, prompt, "rejected", REFUSALS, unlike=row["chosen"])

    def _stock(self, row: Row, prompt: PromptRow, part: str, origin: str, unlike: str | None = None) -> None:
        text = self.stock[origin].for_prompt(prompt.id, self.language, unlike)
        if text is not None:
            row[part], row["from"][part] = text, origin

    def _translate(self, asked: dict[str, str], kept: Kept, *, back: bool = False) -> dict[str, Any]:
        if not asked:
            return {}
        translator = self.translator
        if translator is None:
            from mpo.building.translation import make_translator

            translator = make_translator(self.choice)  # raises: nothing translates
        codes = (self.source_language, self.language)
        source, target = reversed(codes) if back else codes
        return translate_texts(asked, translator, self.choice, source=source, target=target, kept=kept)
