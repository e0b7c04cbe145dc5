"""Jinja2 templates of the page and the model card: whatever they print is escaped, unless a template wrote it."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

import mpo
from mpo.common.characters import printable
from mpo.common.redaction import redact_text
from mpo.common.tables import escape_markdown, signed
from mpo.common.words import listed


@dataclass(frozen=True)
class Section:
    """One measurement, ready for the page and for the Markdown table.

    Attributes:
        anchor: Name of the section in links: lower-case letters, digits and hyphens.
        title: Heading, as plain text.
        html: Body for the page. Every text in it is escaped, and every picture is a ``data:`` URI.
        markdown: The same finding as GitHub-flavoured Markdown, escaped, without a heading; empty to leave it out.
    """

    anchor: str
    title: str
    html: str
    markdown: str = ""


class Raw(str):
    """Markdown that a template prints as it is."""


def html(template: str, **values: Any) -> str:
    """A template as HTML, without the line breaks between its tags."""
    return re.sub(r">\s*\n\s*<", "><", _HTML.get_template(template).render(values)).strip()


def markdown(template: str, **values: Any) -> str:
    """A template as Markdown, with every value redacted and escaped but :class:`Raw` ones."""
    return _MARKDOWN.get_template(template).render(values)


def page(template: str, title: str, *, rules: str = "", **values: Any) -> str:
    """A whole page, complete in itself.

    Args:
        template: Name of its template, which extends ``frame.html``.
        title: Its title.
        rules: Rules of style beside those that all pages have.
        **values: What the template needs.
    """
    style = resources.files("mpo.report").joinpath("page.css").read_text(encoding="utf-8") + rules
    values |= {
        "title": title,
        "style": style,
        "digest": base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii"),
        "made": datetime.now(UTC).strftime("%Y-%m-%d"),
        "version": mpo.__version__,
    }
    return html(template, **values) + "\n"


def fence(text: str, least: int = 1) -> str:
    """Backticks that are more in a row than any in the text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def code(text: object) -> Raw:
    """Inline code in Markdown, also inside a table and whatever backticks the text holds."""
    line = " ".join(redact_text(str(text)).split()).replace("|", "\\|") or " "
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return Raw(f"{fence(line)}{space}{line}{space}{fence(line)}")


def _escaped(value: object) -> str:
    return value if isinstance(value, Raw) else escape_markdown(redact_text(str(value)))


def _environment(**options: Any) -> Environment:
    return Environment(
        loader=PackageLoader("mpo.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )


def _inert(value: object) -> object:
    """Every text that a template shows and that is no markup, whatever file or model it came from."""
    return printable(value) if type(value) is str else value


def _in_block(text: str) -> Markup:
    """A text in a block of its own, at whose end its direction ends: shown with its characters of direction."""
    return Markup(escape(printable(text, directions=True)))


_HTML = _environment(autoescape=True, finalize=_inert)
_HTML.filters["in_block"] = _in_block
_HTML.filters["redact"] = redact_text
_MARKDOWN = _environment(finalize=_escaped, keep_trailing_newline=True)
_MARKDOWN.filters |= {"code": code, "listed": listed, "signed": signed}
