"""The page of prompts and answers, and what can be chosen on it without a script."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from mpo.report.answers import collect
from mpo.report.folder import read_results
from mpo.report.page import write_report
from tests.report import browser
from tests.report.result_folder import PROMPTS, write_results, write_safety

VERDICTS = {
    "base": {"en": ["unsafe", "safe", "safe"], "ar": ["unsafe", "unsafe", "invalid"], "bn": ["safe"] * 3},
    "tuned": {"en": ["safe", "safe", "safe"], "ar": ["safe", "unsafe", "safe"], "bn": ["safe"] * 3},
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("answers")
    for model, given in VERDICTS.items():
        write_safety(root / model / "attack" / "jail", "attack", given)
        refused = {code: ["refusal" if model == "tuned" else "answer", "answer"] for code in ("en", "sw")}
        write_safety(root / model / "over_refusal" / "easy", "over_refusal", refused)
    long = root / "tuned" / "attack" / "jail" / "answers.jsonl"
    rows = [json.loads(line) for line in long.read_text(encoding="utf-8").splitlines()]
    rows[0]["answer"] = "word " * 200
    long.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return write_report(root)[0].with_name("answers.html")


def test_every_exchange_has_the_classes_of_what_it_is(page: Path) -> None:
    found = collect(read_results(page.parent), 40)
    assert found is not None
    assert found.sets == ["Harmful: jail", "Harmless: easy"]
    assert sorted(found.languages) == ["Arabic", "Bengali", "English", "Swahili"]
    assert len(found.exchanges) == 3 * 3 + 2 * 2
    for exchange in found.exchanges:
        kind, language, verdicts = exchange.numbers
        assert found.sets[kind] == exchange.prompt_set and found.languages[language] == exchange.language
        assert {found.verdicts[n] for n in verdicts} == {given.verdict for given in exchange.given}
        assert exchange.is_changed == (len({given.verdict for given in exchange.given}) == 2)
        assert [given.model for given in exchange.given] == ["base", "tuned"]
    assert sum(exchange.is_changed for exchange in found.exchanges) == 1 + 2 + 2


def test_options_say_how_many_prompts_they_show(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    options = dict(re.findall(r'autocomplete="off"> ([^<]*?) <span class="faint">(\d+)</span>', html))
    assert options == {
        "Harmful: jail": "9",
        "Harmless: easy": "4",
        "English": "5",
        "Arabic": "3",
        "Bengali": "3",
        "Swahili": "2",
        "unsafe": "3",
        "safe": "8",
        "invalid": "1",
        "answer": "4",
        "refusal": "2",
    }


def test_a_long_answer_is_folded_and_whole(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    (long,) = re.findall('<details class="long">(.*?)</details>', html)
    assert long.startswith("<summary>") and long.count("word ") > 200
    assert "<script" not in html and "<form" not in html


def test_one_model_alone_has_nothing_to_compare(tmp_path: Path) -> None:
    write_safety(tmp_path / "m" / "attack" / "jail", "attack", {"en": ["safe"]}, PROMPTS)
    html = write_report(tmp_path)[0].with_name("answers.html").read_text(encoding="utf-8")
    assert 'type="checkbox"' not in html and 'type="radio"' not in html


# ------------------------------------------------------------------------------------------------------- in a browser


def _choose(chromium: browser.Browser, label: str) -> None:
    assert chromium.run(
        f"const l = [...document.querySelectorAll('label')].find(l => l.textContent.trim().startsWith({label!r}));"
        "l.click(); return l.querySelector('input').checked"
    )


def _shown(chromium: browser.Browser, count: int) -> list[str]:
    """What is shown once so many exchanges are, or after five seconds: a busy browser lays a page out later."""
    until = time.monotonic() + 5
    while True:
        found: list[str] = chromium.run(
            "return [...document.querySelectorAll('.exchange')].filter(e => e.checkVisibility({contentVisibilityAuto: true}))"
            ".map(e => e.querySelector('p').textContent)"
        )
        if len(found) == count or time.monotonic() > until:
            return found
        time.sleep(0.05)


def test_what_is_chosen_is_shown_without_a_script(chromium: browser.Browser, page: Path) -> None:
    chromium.width(1280)
    chromium.open(page)
    assert _shown(chromium, 0) == []  # folded away
    chromium.run("document.querySelector('.folded').open = true")
    assert len(_shown(chromium, 13)) == 13
    _choose(chromium, "English")
    shown = _shown(chromium, 5)
    assert len(shown) == 5 and all(text.startswith("English") for text in shown)
    _choose(chromium, "Harmful")
    assert len(_shown(chromium, 3)) == 3
    _choose(chromium, "unsafe")
    assert _shown(chromium, 1) == ["English · Harmful: jail · prompt 0"]
    counter = "return getComputedStyle(document.querySelector('.shown'), '::before').content"
    assert chromium.run(counter) == "counter(shown)"
    chromium.open(page)
    chromium.run("document.querySelector('.folded').open = true")
    _choose(chromium, "only where")
    assert len(_shown(chromium, 5)) == 5
    assert chromium.run("return document.scripts.length") == 0 and chromium.console() == []


def test_models_stand_side_by_side_and_below_each_other_on_a_telephone(
    chromium: browser.Browser, page: Path
) -> None:
    tops = (
        "return [...document.querySelector('.side-by-side').children].map(e => e.getBoundingClientRect().top)"
    )
    for width, is_side_by_side in ((1280, True), (390, False)):
        for scheme in ("light", "dark"):
            chromium.width(width)
            chromium.colours(scheme)
            chromium.open(page)
            chromium.run("document.querySelectorAll('details').forEach(d => d.open = true)")
            first, second = chromium.run(tops)
            assert (first == second) == is_side_by_side
            assert chromium.run("return document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("field", ["id", "prompt_id", "language", "verdict", "reply"])
def test_nothing_in_a_verdict_acts_on_the_page_of_answers(tmp_path: Path, field: str) -> None:
    results = write_results(tmp_path / "results", prompts=2)
    for path in results.rglob("verdicts*.jsonl"):
        first, *others = path.read_text(encoding="utf-8").splitlines()
        row = {**json.loads(first), field: "a\x1b[31m\u202e<script>alert(1)</script>"}
        path.write_text("\n".join([json.dumps(row), *others]) + "\n", encoding="utf-8")
    write_report(results)
    page = (results / "answers.html").read_text(encoding="utf-8")
    assert not any(sign in page for sign in ("\x1b", "\u202e", "<script>alert"))
