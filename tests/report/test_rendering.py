"""The templates escape what they print, and none prints what is not there."""

from __future__ import annotations

from importlib import resources

import pytest
from jinja2 import UndefinedError

from mpo.report import rendering

TEMPLATES = {
    path.name: path.read_text(encoding="utf-8")
    for path in resources.files("mpo.report").joinpath("templates").iterdir()
}
HOSTILE = "<script>`x`</script> | \u202e**y** [a](b)"


def test_what_an_html_template_prints_is_escaped() -> None:
    acting = f"{HOSTILE}\x1b[2J"
    text = rendering.html("provenance.html", models=[(acting, [(acting, acting)])])
    assert "<script" not in text and text.count("&lt;script&gt;") == 3
    assert (
        "\x1b" not in text and "\u202e" not in text and text.count("\\x1b[2J") == text.count("\\u202e") == 3
    )


def test_only_the_style_and_the_finished_sections_are_printed_as_they_are() -> None:
    html = {name: text for name, text in TEMPLATES.items() if name.endswith(".html")}
    assert len(html) > 5
    assert {name: text.count("| safe") for name, text in html.items() if "safe }}" in text} == {
        "answers_page.html": 1,
        "comparison.html": 1,
        "comparison_plane.html": 1,
        "frame.html": 1,
        "opening.html": 2,
        "page.html": 2,
    }
    assert not any(word in text for text in TEMPLATES.values() for word in ("autoescape", "|safe", "Markup"))


def test_what_a_markdown_template_prints_is_escaped_and_without_secrets() -> None:
    token = "hf_" + "Ab3dEf6hIj9lMn2pQr5tUv8xYz1bCd4fGh7"
    template = rendering._MARKDOWN.from_string("{{ given }} {{ given | code }} {{ [given, 1] | listed }}")
    text = template.render(given=f"{HOSTILE} {token}")
    escaped = r"&lt;script&gt;\`x\`&lt;/script&gt; \| \*\*y\*\* \[a\](b) \[redacted\]"
    assert text.startswith(escaped) and text.count(escaped) == 2 and token not in text
    assert rendering._MARKDOWN.from_string("{{ given }}").render(given=rendering.Raw("**a**")) == "**a**"


def test_backticks_in_a_text_do_not_end_its_code() -> None:
    for text, wanted in (
        ("a", "`a`"),
        ("a`b", "``a`b``"),
        ("``", "``` `` ```"),
        ("a|b", r"`a\|b`"),
        ("", "` `"),
    ):
        assert rendering.code(text) == wanted
    assert rendering.fence("```` in it", 3) == "`````" and rendering.fence("", 3) == "```"


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_value_that_is_not_there_is_an_error(name: str) -> None:
    if "{{" not in TEMPLATES[name] or name in ("charts.html", "tables.html"):  # words alone, or macros alone
        return
    with pytest.raises(UndefinedError, match="is undefined"):
        rendering.markdown(name) if name.endswith(".md") else rendering.html(name)


def test_a_text_in_a_block_keeps_its_direction_and_no_control_character() -> None:
    template = rendering._HTML.from_string("{{ given }}|{{ given | in_block }}")
    assert template.render(given="\u200fسلام<b>\x1b[2J") == (
        "\\u200fسلام&lt;b&gt;\\x1b[2J|\u200fسلام&lt;b&gt;\\x1b[2J"
    )
