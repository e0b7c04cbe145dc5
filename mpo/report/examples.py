"""Prompts and answers behind the numbers: escaped, in their own direction of writing, and folded away twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpo.evaluation.answers import AnswerRow
from mpo.report.build import in_order
from mpo.report.folder import Results, SafetyRun
from mpo.report.measurement import MIXED, shown_language
from mpo.report.rendering import Section, html

_MOST_CHARACTERS = 2_000


def examples_section(results: Results, per_language: int) -> Section | None:
    """The first prompts of each language, those on which the models differ before all others.

    Args:
        results: The result folder.
        per_language: Prompts per language and prompt set; 0 leaves the section out.
    """
    sets = [
        (f"{'Harmful' if kind == 'attack' else 'Harmless'} prompts: {name}", languages)
        for kind in ("attack", "over_refusal")
        for name in results.prompt_sets(kind)
        if per_language > 0 and (languages := _prompt_set(results, kind, name, per_language))
    ]
    if not sets:
        return None
    return Section("answers", "Prompts and answers", html("examples.html", sets=sets, most=_MOST_CHARACTERS))


def _prompt_set(
    results: Results, kind: str, name: str, per_language: int
) -> list[tuple[str, str, list[Any]]]:
    """``(name of the language, its code, exchanges)`` of each language with answers."""
    found = {m.name: result for m in results.models if (result := m.safety.get((kind, name))) is not None}
    answers = {model: result.answers() for model, result in found.items()}
    out = []
    for code in in_order({code for result in found.values() for code in result.verdicts}, results.dominant):
        verdicts = [result.verdicts.get(code, {}) for result in found.values()]
        ids = list(dict.fromkeys(p for rows in verdicts for p in rows))
        ids.sort(key=lambda p: len({rows.get(p) for rows in verdicts}) == 1)  # stable: differing ones first
        shown = [p for p in ids if any((code, p) in rows for rows in answers.values())][:per_language]
        if shown:
            exchanges = [_exchange(code, p, found, answers) for p in shown]
            out.append((shown_language(code), "" if code == MIXED else code, exchanges))
    return out


def _exchange(
    code: str,
    prompt_id: str,
    found: Mapping[str, SafetyRun],
    answers: Mapping[str, Mapping[tuple[str, str], AnswerRow]],
) -> tuple[str, str, list[tuple[str, str, str]]]:
    """``(prompt id, prompt, [(model, verdict, answer)])``."""
    rows = {model: rows[code, prompt_id] for model, rows in answers.items() if (code, prompt_id) in rows}
    given = [
        (model, found[model].verdicts.get(code, {}).get(prompt_id, "not judged"), row.answer)
        for model, row in rows.items()
    ]
    return prompt_id, next(iter(rows.values())).prompt, given
