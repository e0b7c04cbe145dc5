"""The report's section on the hidden space: a table per model, its pictures, and how to read them."""

from __future__ import annotations

import base64
from pathlib import Path

from mpo.common.redaction import redact_text
from mpo.common.tables import escape_markdown
from mpo.common.words import listed, number, with_arrows
from mpo.data.languages import language_name
from mpo.errors import StorageError
from mpo.hidden_space.results import FILE, MEASUREMENT, HiddenSpace, ModelResult
from mpo.report.rendering import Section, html
from mpo.report.tables import Shown

PICTURES = {
    "clusters": "Harmful and harmless texts before and after, in the plane that both models share",
    "measures": "Measures of separation per language, with their change",
    "directions": "Cosines between the languages' harm directions",
    "layers": "Separation by layer",
    "silhouettes": "Whether texts lie by harm or by language, by layer",
}
"""Endings of the picture files, in the order of the page, and what they show."""


def has_hidden_space(folder: Path) -> bool:
    """Whether a result folder has an analysis of the hidden space."""
    return (folder / MEASUREMENT / FILE).is_file()


def hidden_space_section(folder: Path) -> Section | None:
    """The section of a result folder, or None where there was no such analysis.

    Raises:
        StorageError: The analysis is damaged.
    """
    if not has_hidden_space(folder):
        return None
    place = folder / MEASUREMENT
    result = HiddenSpace.read(place)
    models, markdown = [], []
    for model in result.models.values():
        table = model.text_table(result.confidence)
        pictures = {
            caption: picture
            for ending, caption in PICTURES.items()
            if (picture := place / f"{model.name}.{ending}.png").is_file()
        }
        models.append(
            {
                "table": table,
                "rows": [
                    (name, False, [Shown(with_arrows(text)) for text in cells]) for name, *cells in table.rows
                ],
                "finding": _finding(model),
                "pictures": [(caption, _encoded(picture)) for caption, picture in pictures.items()],
            }
        )
        markdown.append(f"**{escape_markdown(redact_text(table.title))}**\n\n{table.markdown()}")
    body = html("hidden_space.html", models=models)
    return Section("hidden-space", "Hidden space", body, "\n\n".join(markdown))


def _finding(model: ModelResult) -> str:
    """One sentence on what changed for certain."""
    if not model.is_comparison:
        return ""
    measure = f"between_class_ratio_{model.components}"
    languages = model.shown.languages
    is_shared = any(f"{measure}_shared" in one.change for one in languages.values())
    changes = {
        code: one.change.get(f"{measure}_shared" if is_shared else measure) for code, one in languages.items()
    }
    clear = [
        f"{language_name(code)} ({number(change.value, 3, signed=True)})"
        for code, change in changes.items()
        if change is not None and change.is_clear
    ]
    components = {1: "component", 2: "two components"}.get(model.components, f"{model.components} components")
    on = f"the {components} that both models share" if is_shared else f"each model's first {components}"
    return (
        f"The share of variance that lies between harmful and harmless texts, on {on}, changed clearly in "
        f"{listed(clear) or 'no language'}."
    )


def _encoded(picture: Path) -> str:
    try:
        return base64.b64encode(picture.read_bytes()).decode("ascii")
    except OSError as error:
        raise StorageError(f"The picture {picture} cannot be read: {error.strerror or error}.") from error
