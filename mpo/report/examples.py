"""Prompts and answers behind the numbers: escaped, in their own direction of writing, and folded away twice."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from mpo.evaluation.answers import AnswerRow
from mpo.report.build import in_order
from mpo.report.folder import Results, SafetyRun
from mpo.report.measurement import MIXED, shown_language
from mpo.report.sections import Section

_MOST_CHARACTERS = 2_000


def examples_section(results: Results, per_language: int) -> Section | None:
    """The first prompts of each language, those on which the models differ before all others.

    Args:
        results: The result folder.
        per_language: Prompts per language and prompt set; 0 leaves the section out.
    """
    if per_language < 1:
        return None
    sets = [(kind, name) for kind in ("attack", "over_refusal") for name in results.prompt_sets(kind)]
    parts = [_prompt_set(results, kind, name, per_language) for kind, name in sets]
    body = "".join(parts)
    if not body:
        return None
    html = (
        "<p>Some prompts and answers, so that a reader can check the judge. Where models differ in their verdict, those "
        "prompts come first, so this is no sample of all answers.</p>"
        '<details class="folded"><summary>Harmful text: open only if you need to read it</summary>'
        f"{body}</details>"
    )
    return Section("answers", "Prompts and answers", html, "")


def _prompt_set(results: Results, kind: str, name: str, per_language: int) -> str:
    found = [(model.name, model.safety.get((kind, name))) for model in results.models]
    answers = {model: result.answers() for model, result in found if result is not None}
    if not any(answers.values()):
        return ""
    codes = in_order({code for _, r in found if r for code in r.verdicts}, results.dominant)
    title = f"{'Harmful' if kind == 'attack' else 'Harmless'} prompts: {name}"
    out = []
    for code in codes:
        verdicts = {model: result.verdicts.get(code, {}) for model, result in found if result is not None}
        ids = list(dict.fromkeys(p for rows in verdicts.values() for p in rows))
        ids.sort(
            key=lambda p: len({rows.get(p) for rows in verdicts.values()}) == 1
        )  # stable: differing ones first
        shown = [p for p in ids if any((code, p) in rows for rows in answers.values())][:per_language]
        if shown:
            body = "".join(_exchange(code, p, found, answers) for p in shown)
            out.append(f"<details><summary>{escape(shown_language(code))}</summary>{body}</details>")
    return f"<h3>{escape(title)}</h3>{''.join(out)}" if out else ""


def _exchange(
    code: str,
    prompt_id: str,
    found: list[tuple[str, SafetyRun | None]],
    answers: Mapping[str, Mapping[tuple[str, str], AnswerRow]],
) -> str:
    rows = [rows[code, prompt_id] for rows in answers.values() if (code, prompt_id) in rows]
    parts = [f'<p class="faint small">Prompt {escape(prompt_id)}</p>{_text(rows[0].prompt, code)}']
    for model, result in found:
        row = answers.get(model, {}).get((code, prompt_id))
        if result is not None and row is not None:
            verdict = result.verdicts.get(code, {}).get(prompt_id, "not judged")
            parts.append(
                f'<p class="small"><b>{escape(model)}</b> <span class="verdict">{escape(verdict)}</span></p>'
                f"{_text(row.answer, code)}"
            )
    return f'<div class="exchange">{"".join(parts)}</div>'


def _text(shown: str, code: str) -> str:
    cut = len(shown) > _MOST_CHARACTERS
    more = f" \N{HORIZONTAL ELLIPSIS} ({len(shown):,} characters)" if cut else ""
    lang = f' lang="{escape(code)}"' if code != MIXED else ""
    body = escape(shown[:_MOST_CHARACTERS]) or '<span class="faint">(empty)</span>'
    return f'<div class="text" dir="auto"{lang}>{body}{escape(more)}</div>'
