"""What is let through: every text of a pair against the filters, block by block, and the groups that are left."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpo.building.answers import MODEL, TRANSLATION
from mpo.building.filters import FILTERS, Failure, FilterSettings, Text, failures
from mpo.building.prompts import Dropped, PromptRow
from mpo.building.stages import Row
from mpo.building.translation.segments import without_code
from mpo.data.contract import HARMFUL, HARMLESS, PARTS, same_response
from mpo.data.detection import detect_all

FILTER_STAGE = "filters"


@dataclass(frozen=True)
class Side:
    """What the stages have on a prompt in one language.

    Attributes:
        texts: ``prompt``, ``chosen``, ``rejected``, ``from`` and ``faults``.
        verdicts: The judge's, by part; empty where none was asked.
        back: Back-translations by part; empty where there are none.
        similarity: Cosines by part; empty where there are none.
    """

    texts: Row
    verdicts: Mapping[str, Any] = field(default_factory=dict)
    back: Mapping[str, Any] = field(default_factory=dict)
    similarity: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Counts:
    """What was made and what was left out.

    Attributes:
        prompts: By kind.
        pairs: Prompts with a pair in the dominant language, by kind.
        groups: Groups that are left, by kind.
        made: Target pairs that had all their texts, by language.
        kept: Target pairs that are left, by language.
        dropped: Texts that were left out, by ``(stage, language or "", part or "", reason)``.
        origins: Texts of the groups, by where they come from.
        gaps: Groups of harmful prompts by whether their reward gap under the model is above 0: ``positive`` and ``not positive``.
    """

    prompts: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    origins: Counter[str] = field(default_factory=Counter)
    gaps: Counter[str] = field(default_factory=Counter)

    def drop(self, each: Dropped) -> None:
        """Counts what was left out."""
        self.dropped[each.stage, each.language or "", each.part or "", each.reason] += 1

    def by_filter(self) -> dict[str, Counter[str]]:
        """Texts that each filter left out, by language."""
        out: dict[str, Counter[str]] = {name: Counter() for name in FILTERS}
        for (stage, language, _, reason), count in self.dropped.items():
            if stage == FILTER_STAGE:
                out[reason][language] += count
        return out

    def by_stage(self) -> dict[str, Counter[str]]:
        """What was left out in the other stages, by reason."""
        out: dict[str, Counter[str]] = defaultdict(Counter)
        for (stage, _, _, reason), count in self.dropped.items():
            if stage != FILTER_STAGE:
                out[stage][reason] += count
        return dict(out)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            "prompts": dict(self.prompts),
            "pairs": dict(self.pairs),
            "groups": dict(self.groups),
            "target_pairs": {
                code: {"made": count, "kept": self.kept[code]} for code, count in self.made.items()
            },
            "dropped": [
                {
                    "stage": stage,
                    "language": language or None,
                    "part": part or None,
                    "reason": reason,
                    "count": n,
                }
                for (stage, language, part, reason), n in sorted(self.dropped.items())
            ],
            "texts_by_origin": dict(sorted(self.origins.items())),
            "reward_gap": dict(self.gaps),
        }


class Screen:
    """Decides on the pairs of a block."""

    def __init__(
        self,
        settings: FilterSettings,
        source_language: str,
        languages: Sequence[str],
        *,
        any_answer: bool = False,
    ) -> None:
        """Keep the settings. ``any_answer``: the model's own answers to harmless prompts pass no filter."""
        self.settings, self.source_language, self.languages = settings, source_language, languages
        self.any_answer = any_answer
        self.counts = Counts(made=Counter(dict.fromkeys(languages, 0)))

    def block(
        self, rows: Sequence[tuple[PromptRow, Row, Mapping[str, Side]]]
    ) -> Iterator[tuple[Row | None, list[Dropped]]]:
        """The group of each prompt, or None, and what was left out on the way.

        Args:
            rows: Prompt, its pair in the dominant language, and what there is by language, the dominant one too.
        """
        texts = [
            without_code(text) for _, pair, sides in rows if pair["fault"] is None for text in _texts(sides)
        ]
        detected = iter(detect_all(texts))
        for prompt, pair, sides in rows:
            self.counts.prompts[prompt.kind] += 1
            dropped: list[Dropped] = []
            found = {
                code: self._side(prompt, code, side, sides[self.source_language], detected, dropped)
                for code, side in sides.items()
                if pair["fault"] is None
            }
            group = self._group(prompt, pair, sides, found, dropped)
            for each in dropped:
                self.counts.drop(each)
            yield group, dropped

    def _side(
        self,
        prompt: PromptRow,
        code: str,
        side: Side,
        source: Side,
        detected: Iterator[Any],
        dropped: list[Dropped],
    ) -> bool:
        """Whether all texts of a language are let through; takes their detections from the front."""
        good = not side.texts["faults"]
        for part, fault in side.texts["faults"].items():
            stage = "translation" if side.texts["from"].get(part) == TRANSLATION else "answers"
            dropped.append(Dropped(prompt.id, stage, fault, code, part, text=side.texts[part]))
        complete = all(side.texts[part] for part in PARTS)
        if good and complete and code != self.source_language:
            self.counts.made[code] += 1
        for part in PARTS:
            text = side.texts[part]
            if not text:
                good = False
                continue
            found = next(detected)
            if part in side.texts["faults"]:
                continue
            origin = side.texts["from"].get(part)
            if self.any_answer and (prompt.kind, part, origin) == (HARMLESS, "chosen", MODEL):
                continue
            is_translation = origin == TRANSLATION
            failed = failures(
                Text(
                    part,
                    prompt.kind,
                    text,
                    code,
                    source.texts[part] if is_translation else None,
                    self.source_language,
                    found,
                    side.verdicts.get(part),
                    side.back.get(part),
                    side.similarity.get(part),
                ),
                self.settings,
            )
            if failed:
                good = False
                dropped.append(_dropped(prompt.id, code, part, text, failed))
        if good and same_response(side.texts["chosen"], side.texts["rejected"]):
            reason = "rejected is equal to chosen"
            dropped.append(
                Dropped(prompt.id, "groups", reason, code, "rejected", text=side.texts["rejected"])
            )
            return False
        return good

    def _group(
        self,
        prompt: PromptRow,
        pair: Row,
        sides: Mapping[str, Side],
        found: Mapping[str, bool],
        dropped: list[Dropped],
    ) -> Row | None:
        if pair["fault"] is not None:
            dropped.append(Dropped(prompt.id, "answers", pair["fault"], self.source_language))
            return None
        self.counts.pairs[prompt.kind] += 1
        kept = [code for code in self.languages if found[code]]
        if not found[self.source_language]:
            return None
        if not kept:
            dropped.append(Dropped(prompt.id, "groups", "no target language is left"))
            return None
        self.counts.groups[prompt.kind] += 1
        self.counts.kept.update(kept)
        # A helpful answer against a short refusal may well have a negative gap, and teaches nothing wrong.
        if pair["gap"] is not None and prompt.kind == HARMFUL:
            self.counts.gaps["positive" if pair["gap"] > 0 else "not positive"] += 1
        origins = [sides[code].texts["from"] for code in (self.source_language, *kept)]
        self.counts.origins.update(place for each in origins for place in each.values())
        return {
            "source": _pair(self.source_language, sides[self.source_language].texts),
            "targets": [_pair(code, sides[code].texts) for code in kept],
            "kind": prompt.kind,
            "id": prompt.id,
            "made_by": {
                "source": origins[0],
                "targets": [{part: each[part] for part in PARTS} for each in origins[1:]],
            },
            "reward_gap": pair["gap"],
        }


def _texts(sides: Mapping[str, Side]) -> Iterator[str]:
    for side in sides.values():
        for part in PARTS:
            if side.texts[part]:
                yield side.texts[part]


def _dropped(prompt_id: str, code: str, part: str, text: str, failed: Sequence[Failure]) -> Dropped:
    first, *others = failed
    also = [each.filter for each in others]
    return Dropped(
        prompt_id, FILTER_STAGE, first.filter, code, part, first.value, first.threshold, also, text
    )


def _pair(language: str, texts: Row) -> Row:
    return {
        "language": language,
        "prompt": [{"role": "user", "content": texts["prompt"]}],
        "chosen": [{"role": "assistant", "content": texts["chosen"]}],
        "rejected": [{"role": "assistant", "content": texts["rejected"]}],
    }
