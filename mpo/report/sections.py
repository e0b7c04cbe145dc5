"""What a report page is made of: one section per measurement."""

from __future__ import annotations

from dataclasses import dataclass


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
    markdown: str
