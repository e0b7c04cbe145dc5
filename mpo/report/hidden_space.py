"""The report's section on the hidden space: a table per model, its pictures, and how to read them."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from mpo.common.redaction import redact_text
from mpo.common.tables import TextTable, escape_markdown
from mpo.data.languages import language_name
from mpo.errors import StorageError
from mpo.hidden_space.results import FILE, MEASUREMENT, HiddenSpace, ModelResult
from mpo.report.sections import Section

PICTURES = {
    "clusters": "Harmful and harmless texts before and after, in the plane that both models share",
    "measures": "Measures of separation per language, with their change",
    "directions": "Cosines between the languages' harm directions",
    "layers": "Separation by layer",
}
"""Endings of the picture files, in the order of the page, and what they show."""

_LEAD = (
    "How far apart a model holds harmful and harmless texts, in its hidden states and per language. Nothing is generated: "
    "this shows what the model represents, not what it answers."
)
_READING = (
    "A larger part of the variance between the classes does not make them easier to tell apart: look at the probe. A "
    "probe trained in the source language that works in another one shows that both represent harm along the same "
    "direction."
)


def has_hidden_space(folder: Path) -> bool:
    """Whether a result folder has an analysis of the hidden space."""
    return (folder / MEASUREMENT / FILE).is_file()


def hidden_space_section(folder: Path) -> Section | None:
    """
    The section of a result folder, or None where there was no such analysis.

    Raises:
        StorageError: the analysis is damaged.
    """
    if not has_hidden_space(folder):
        return None
    place = folder / MEASUREMENT
    result = HiddenSpace.read(place)
    parts = [f"<p>{escape(_LEAD)}</p>"]
    markdown = []
    for model in result.models.values():
        table = model.text_table(result.confidence)
        parts.append(f"<h3>{escape(redact_text(table.title))}</h3>{_findings(model)}{_table(table)}")
        parts += [
            f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{_encoded(picture)}">'
            f"<figcaption>{escape(caption)}.</figcaption></figure>"
            for ending, caption in PICTURES.items()
            if (picture := place / f"{model.name}.{ending}.png").is_file()
        ]
        markdown.append(f"**{escape_markdown(redact_text(table.title))}**\n\n{table.markdown()}")
    parts.append(f'<p class="faint small">{escape(_READING)}</p>')
    return Section("hidden-space", "Hidden space", "".join(parts), "\n\n".join(markdown))


def _findings(model: ModelResult) -> str:
    """One sentence on what changed for certain."""
    if not model.is_comparison:
        return ""
    clear = []
    measure = f"between_class_ratio_{model.components}"
    is_shared = any(f"{measure}_shared" in one.change for one in model.shown.languages.values())
    for code, one in model.shown.languages.items():
        change = one.change.get(f"{measure}_shared" if is_shared else measure)
        if change is None:
            continue
        if change.low is not None and change.high is not None and (change.low > 0 or change.high < 0):
            clear.append(f"{language_name(code)} ({change.value:+.3f})")
    number = {1: "component", 2: "two components"}.get(model.components, f"{model.components} components")
    what = (
        f"The share of variance that lies between harmful and harmless texts, on the {number} that both models share,"
        if is_shared
        else f"The share of variance that lies between harmful and harmless texts, on each model's first {number},"
    )
    text = (
        f"{what} changed clearly in {', '.join(clear)}."
        if clear
        else f"{what} changed clearly in no language."
    )
    return f"<p>{escape(text)}</p>"


def _table(table: TextTable) -> str:
    header = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell.replace(' -> ', ' → '))}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    notes = "".join(f'<p class="faint small">{escape(note)}</p>' for note in table.notes)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>{notes}'


def _encoded(picture: Path) -> str:
    try:
        return base64.b64encode(picture.read_bytes()).decode("ascii")
    except OSError as error:
        raise StorageError(f"The picture {picture} cannot be read: {error.strerror or error}.") from error
