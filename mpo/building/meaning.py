"""Whether a text still says what it should: the judge's verdicts on pairs in every language, and embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpo.building.answers import MODEL, OPENINGS, REFUSALS, TRANSLATION, judge_texts
from mpo.building.prompts import PromptRow
from mpo.building.similarity import similarities
from mpo.building.stages import Kept, Row
from mpo.data.contract import HARMFUL, HARMLESS, PARTS
from mpo.evaluation.judges import Exchange, Judge


def judge_pairs(
    judges: Mapping[str, Judge],
    rows: Sequence[tuple[PromptRow, Row, Row]],
    language: str,
    kept: Kept,
    *,
    is_source: bool,
) -> list[Row]:
    """Verdicts on both answers of the pairs of a block; those that are known already are not asked for.

    Args:
        judges: By the kind of the prompt.
        rows: Prompt, its pair in the dominant language, and its texts in this one.
        language: Its code.
        kept: What the block has got already.
        is_source: Whether it is the dominant language.

    Returns:
        ``{"id", "chosen", "rejected"}``; a part without a text has no verdict.

    Raises:
        MPOError: A judge cannot be used or reached. Its verdicts so far are kept.
    """
    out: list[Row] = [{"id": prompt.id} for prompt, *_ in rows]
    asked, places = [], []
    for index, (prompt, pair, texts) in enumerate(rows):
        for part in ("chosen", "rejected") if pair["fault"] is None else ():
            known = _known(prompt.kind, part, texts["from"].get(part), is_source)
            if known is not None:
                out[index][part] = known
            elif texts["prompt"] and texts[part] and part not in texts["faults"]:
                asked.append((prompt.kind, Exchange(texts["prompt"], texts[part], language)))
                places.append((index, part))
    for (index, part), verdict in zip(places, judge_texts(judges, asked, kept), strict=True):
        out[index][part] = verdict
    return out


def _known(kind: str, part: str, origin: str | None, is_source: bool) -> str | None:
    """The verdict that a text must have got already, or None."""
    if origin == REFUSALS:
        return {HARMFUL: "safe", HARMLESS: "refusal"}[kind]
    if origin == OPENINGS:
        return "unsafe"
    if origin == MODEL and is_source:
        verdicts = ("safe", "unsafe") if kind == HARMFUL else ("answer", None)
        return verdicts[part == "rejected"]
    return None


def compare_meanings(rows: Sequence[tuple[Row, Row]], model: str) -> list[Row]:
    """Cosines of translations and their sources, by part.

    Args:
        rows: The texts of a prompt in the dominant language and in another one.
        model: Model of the embeddings.

    Raises:
        MPOError: The model or its package cannot be used.
    """
    out: list[Row] = [{"id": texts["id"]} for _, texts in rows]
    places = [
        (index, part)
        for index, (source, texts) in enumerate(rows)
        for part in PARTS
        if texts["from"].get(part) == TRANSLATION and texts[part] and source[part]
    ]
    if places:
        texts = [rows[index][1][part] for index, part in places]
        sources = [rows[index][0][part] for index, part in places]
        for (index, part), value in zip(places, similarities(texts, sources, model), strict=True):
            out[index][part] = value
    return out
