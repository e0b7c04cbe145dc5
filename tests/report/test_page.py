from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mpo.cli import main
from mpo.common.files import write_json
from mpo.errors import ConfigError, DataError, StorageError
from mpo.evaluation import RewardGapTable, compare, summarize
from mpo.report.measurement import SHARE, Cell, Change, Measurement, Row, Value
from mpo.report.page import write_report
from tests.evaluation.simulated import simulated_scores
from tests.report import browser
from tests.report.result_folder import (
    CODES,
    PROMPTS,
    write_hidden_space,
    write_perplexity,
    write_results,
    write_safety,
    write_utility,
)

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\u202e | `x` **y** [a](b)"


class _Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.folded_text, self.open_text, self._details = "", "", 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._details += tag == "details"

    def handle_endtag(self, tag: str) -> None:
        self._details -= tag == "details"

    def handle_data(self, data: str) -> None:
        if self._details:
            self.folded_text += data
        else:
            self.open_text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page whose prompts, answers, prompt set, task and model names all try to break out."""
    root = tmp_path_factory.mktemp("hostile")
    models = ("<img src=0>", "<img src=x onerror='\"&>")
    write_results(root, prompts=6, models=models)
    write_hidden_space(root, models[1])
    for model in models:
        prompt_set = root / model / "attack" / '<script>" onload="'
        given = ["unsafe", "safe", "unparsed"]  # the warning on the last one names the model
        verdicts = {"en": given, "zh": given[1:], "sw": given[:1]}  # enough for a correlation
        write_safety(prompt_set, "attack", verdicts, dict.fromkeys(PROMPTS, HOSTILE))
        file = prompt_set / "answers.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        file.write_text(
            "".join(json.dumps(row | {"answer": HOSTILE}) + "\n" for row in rows), encoding="utf-8"
        )
        utility = json.loads((root / model / "utility.json").read_text(encoding="utf-8"))
        utility["tasks"]["<script>task"] = utility["tasks"].pop("mgsm_direct_sw")
        (root / model / "utility.json").write_text(json.dumps(utility), encoding="utf-8")
    return write_report(root, title=f"T {HOSTILE}")[0]


# ------------------------------------------------------------------------------------------------------------ the page


def test_every_text_is_escaped_and_every_prompt_folded_away(hostile_page: Path) -> None:
    html = hostile_page.read_text(encoding="utf-8")
    both = _Tags(html), _Tags(hostile_page.with_name("answers.html").read_text(encoding="utf-8"))
    for parsed in both:
        assert {tag for tag, _ in parsed.tags}.isdisjoint(
            {"script", "img", "iframe", "object", "base", "form"}
        )
        assert not any(name.startswith("on") or name == "style" for _, attrs in parsed.tags for name in attrs)
        # The heading has it once in the open; prompts and answers have it only where they are folded.
        assert parsed.open_text.count("<script>document.title") == 2  # <title> and <h1>
    assert "document.title='owned'" not in both[0].folded_text
    assert both[1].folded_text.count("document.title='owned'") >= 2 * 6
    table = hostile_page.with_name("report.md").read_text(encoding="utf-8")
    assert "&lt;img" in table and "&lt;script" in table
    assert not any(sign in table for sign in ("<script", "<img", "\u202e"))


def test_codes_judges_ids_and_verdicts_are_inert_wherever_they_are_shown(tmp_path: Path) -> None:
    write_results(tmp_path, prompts=6)
    write_hidden_space(tmp_path)
    code, judge = '<script>sw\x1b[2J\u202e</script>" onload="', "<script>judge"
    name = "<img src=x onerror=alert(1)>"
    swaps = {
        '"sw"': json.dumps(code),
        '"refusal-phrases"': json.dumps(judge),
        '"prompt_id": "0"': f'"prompt_id": {json.dumps(name)}',
        '"invalid"': json.dumps(name),
        "exact_match,remove_whitespace": "<script>metric,x",
        '"torch"': json.dumps(name),
        '"org/model"': json.dumps(name),
    }
    for file in (*tmp_path.rglob("*.json"), *tmp_path.rglob("*.jsonl")):
        text = file.read_text(encoding="utf-8")
        for old, new in swaps.items():
            text = text.replace(old, new)
        file.write_text(text, encoding="utf-8")
        if file.name.startswith("verdicts."):
            file.rename(file.with_name(f"verdicts.{judge}.jsonl"))
    page, table = (path.read_text(encoding="utf-8") for path in write_report(tmp_path, title=f"T {code}"))
    parsed = _Tags(page)
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "img"})
    assert not any(key.startswith("on") for _, attrs in parsed.tags for key in attrs)
    assert page.count("&lt;script&gt;sw") > 5 and "&lt;script&gt;judge" in page and "&lt;img src=x" in page
    assert '<text class="point"' in page  # the chart that writes codes is there
    assert "&lt;script&gt;sw" in table
    assert not any(sign in table for sign in ("<script", "<img", "\x1b", "\u202e"))


def test_the_page_names_no_other_address_and_forbids_all(folder: Path) -> None:
    page = write_report(folder)[0]
    for name, other in (("report.html", "answers.html"), ("answers.html", "report.html")):
        html = page.with_name(name).read_text(encoding="utf-8")
        addresses = [
            value
            for _, attrs in _Tags(html).tags
            for name, value in attrs.items()
            if name in ("src", "href", "action", "data", "srcset", "xlink:href") and value
        ]
        assert other in addresses
        assert all(value.startswith(("#", "data:")) for value in addresses if value != other)
        assert "default-src 'none'" in html and "unsafe-inline" not in html
        assert not re.search(r"url\(|@import|https?://", html)


@pytest.mark.parametrize("name", ["report.html", "answers.html"])
def test_the_policy_allows_the_pages_own_style_and_nothing_else(folder: Path, name: str) -> None:
    html = write_report(folder)[0].with_name(name).read_text(encoding="utf-8")
    (policy,) = [str(attrs["content"]) for _, attrs in _Tags(html).tags if "http-equiv" in attrs]
    (style,) = re.findall("<style>(.*?)</style>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    assert dict(part.split(" ", 1) for part in policy.split("; ")) == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_ids_are_unique_and_every_link_has_its_target(folder: Path) -> None:
    tags = _Tags(write_report(folder)[0].read_text(encoding="utf-8")).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert _links(tags) == set(ids)


def _links(tags: list[tuple[str, dict[str, str | None]]]) -> set[str]:
    """Names of the places in the page itself that it links to."""
    return {str(attrs["href"])[1:] for tag, attrs in tags if tag == "a"} - {"answers.html"[1:]}


def _answers(folder: Path, **settings: Any) -> str:
    return write_report(folder, **settings)[0].with_name("answers.html").read_text(encoding="utf-8")


def test_prompts_are_on_their_own_page_alone_and_without_examples_nowhere(folder: Path) -> None:
    with_them = _answers(folder, examples=1)
    assert PROMPTS["bn"] in with_them and 'dir="auto" lang="ar"' in with_them
    assert PROMPTS["bn"] not in (folder / "report.html").read_text(encoding="utf-8")
    without = write_report(folder, examples=0)[0].read_text(encoding="utf-8")
    assert PROMPTS["bn"] not in without and "answers.html" not in without
    assert not (folder / "answers.html").exists()


def test_prompts_on_which_the_models_differ_are_shown_first(tmp_path: Path) -> None:
    for model, verdicts in (("a", ["safe"] * 5 + ["unsafe"]), ("b", ["safe"] * 6)):
        write_safety(tmp_path / model / "attack" / "set", "attack", {"en": verdicts})
    html = _answers(tmp_path, examples=1)
    assert "unsafe answer 5 in en" in html and "safe answer 0 in en" not in html


def test_every_answer_is_shown_under_its_models_name_and_a_long_one_is_said_to_be_cut(tmp_path: Path) -> None:
    for model, verdict in (("a", "unsafe"), ("b", "safe")):
        write_safety(tmp_path / model / "attack" / "set", "attack", {"en": [verdict]})
    html = _answers(tmp_path)
    shown = re.findall('<b>(.)</b> <span class="verdict">(.*?)</span></p><div[^>]*>(.*?)</div>', html)
    assert shown == [("a", "unsafe", "unsafe answer 0 in en"), ("b", "safe", "safe answer 0 in en")]
    file = tmp_path / "b" / "attack" / "set" / "answers.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace("safe answer", "x" * 2_500), encoding="utf-8")
    html = _answers(tmp_path)
    assert f">{'x' * 2_000} \N{HORIZONTAL ELLIPSIS} (2,508 characters)</div>" in html


# ---------------------------------------------------------------------------------------------------------- the numbers


def _cells(table: str, start: str) -> list[list[str]]:
    """Rows of the block of the Markdown table that begins with this measurement."""
    rows = [
        [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    first = next(n for n, row in enumerate(rows) if row[0].startswith(start))
    last = next((n for n in range(first + 1, len(rows)) if rows[n][0]), len(rows))
    return rows[first:last]


def test_the_table_has_the_rates_intervals_and_adjusted_p_values_of_scipy(tmp_path: Path) -> None:
    verdicts = {
        "en": (["safe"] * 20, ["safe"] * 20),
        "bn": (["unsafe"] * 16 + ["safe"] * 4, ["unsafe"] * 4 + ["safe"] * 16),
        "sw": (["unsafe"] * 10 + ["invalid"] * 10, ["invalid"] * 4 + ["unsafe"] * 6 + ["invalid"] * 10),
    }
    for n, model in enumerate(("base", "tuned")):
        write_safety(
            tmp_path / model / "attack" / "set", "attack", {code: v[n] for code, v in verdicts.items()}
        )
    rows = _cells(write_report(tmp_path)[1].read_text(encoding="utf-8"), "Attack success")
    assert [row[1] for row in rows] == ["English", "Bengali", "Swahili", "*Mean of languages*"]
    low, high = stats.binomtest(16, 20).proportion_ci(0.95, "wilson")
    assert rows[1][3] == f"80.0 \\[{100 * low:.1f}, {100 * high:.1f}\\]"
    assert rows[1][5].startswith("**\N{MINUS SIGN}60.0** ") and rows[2][5].startswith("\N{MINUS SIGN}20.0 ")
    # 12 prompts differ in Bengali, all one way, 4 in Swahili, none in English; three tests in all.
    p_values = [stats.binomtest(0, 12).pvalue * 3, stats.binomtest(0, 4).pvalue * 2]
    assert rows[1][6] == f"{p_values[0]:.3f}"
    assert [rows[2][6], rows[0][6]] == [f"{p_values[1]:.3f}", "1.000"]
    assert rows[3][3].startswith("43.3 ") and rows[3][4].startswith("16.7 ")


def test_a_chart_has_the_rows_values_and_intervals_of_its_table(folder: Path) -> None:
    page, table = (path.read_text(encoding="utf-8") for path in write_report(folder))
    section = re.search('<section id="reward-gap">.*?</section>', page)
    assert section is not None
    strips = re.findall('<span class="name">(.*?)</span>(.*?)<span class="values">(.*?)</span>', section[0])
    rows = _cells(table, "Reward gap")
    assert [name for name, _, _ in strips] == [row[1].strip("*") for row in rows]
    for (_, svg, values), row in zip(strips, rows, strict=True):
        assert values == " \N{RIGHTWARDS ARROW} ".join(row[n].split(" ")[0] for n in (3, 4))
        way, *marks = re.findall(r'<line class="way" x1="([\d.]+)%"|<svg x="([\d.]+)%"', svg)
        assert (
            min(float(x) for _, x in marks) == float(way[0]) and len(marks) == svg.count('class="band') == 2
        )
    # Places are linear in the numbers: the mean's lies where that of the languages says.
    places = [[float(x) for x in re.findall(r'<svg x="([\d.]+)%"', svg)] for _, svg, _ in strips]
    numbers = [[float(row[n].split(" ")[0].replace("\N{MINUS SIGN}", "-")) for n in (3, 4)] for row in rows]
    slope, start = np.polyfit(np.ravel(numbers[:2]), np.ravel(places[:2]), 1)
    assert np.ravel(places) == pytest.approx(start + slope * np.ravel(numbers), abs=0.1)


def test_the_page_and_its_charts_need_no_matplotlib(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = write_report(folder, out=tmp_path)[0].read_text(encoding="utf-8")
    assert page.count('<div class="chart" role="img"') == 5 and '<div class="chart plot"' in page


def test_every_measurement_has_a_block_and_all_rows_the_same_columns(folder: Path) -> None:
    table = write_report(folder)[1].read_text(encoding="utf-8")
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {7}
    names = [row[0].strip() for row in rows[2:] if row[0].strip()]
    assert names == [
        "Reward gap (nats per token)",
        "Attack success, multijail (%)",
        "Over-refusal, polyrefuse (%)",
        "Utility (%)",
        "Perplexity",
    ]
    assert _cells(table, "Reward gap")[0][1] == "English"
    assert len(_cells(table, "Attack success")) == len(CODES) + 1
    assert "Pearson" in table and "Spearman" in table


@pytest.mark.parametrize(
    ("change", "direction"),
    [
        (Change(0.2, 0.1, 0.3, 0.01), 1),
        (Change(-0.2, -0.3, -0.1, 0.01), -1),
        (Change(0.2, 0.1, 0.3), 1),
        (Change(0.2, 0.1, 0.3, 0.06), 0),
        (Change(0.2, -0.1, 0.3, 0.01), 0),
        (Change(-0.2, -0.3, 0.0), 0),
        (Change(0.2), 0),
        (None, 0),
    ],
)
def test_a_change_is_clear_where_interval_and_test_both_say_so(change: Change | None, direction: int) -> None:
    row = Row("Swahili", (Cell(Value(0.5)), Cell(Value(0.5), change)), 9)
    for better, names in (("higher", ("worse", None, "better")), ("lower", ("better", None, "worse"))):
        found = Measurement("a", "A", "A", SHARE, better, ("base", "tuned"), (row,), "")
        assert found.direction(change) == direction
        assert found.verdict(change) == names[1 + direction]
        assert found.moved(1, direction) == (["Swahili"] if change is not None else [])


def test_what_became_better_or_worse_is_called_so_everywhere(folder: Path, tmp_path: Path) -> None:
    for model, unsafe in (("a", 18), ("b", 2)):
        for kind, counted, other in (("attack", "unsafe", "safe"), ("over_refusal", "answer", "refusal")):
            words = [counted] * unsafe + [other] * (20 - unsafe)
            write_safety(tmp_path / model / kind / "set", kind, {"en": words, "sw": words})
    html = write_report(tmp_path)[0].read_text(encoding="utf-8")
    fall = "90.0\N{NO-BREAK SPACE}% \N{RIGHTWARDS ARROW} 10.0\N{NO-BREAK SPACE}% on the mean of 2 languages"
    rise = "10.0\N{NO-BREAK SPACE}% \N{RIGHTWARDS ARROW} 90.0\N{NO-BREAK SPACE}% on the mean of 2 languages"
    for title, kind, change in (
        ("Attack success: set", "better", fall),
        ("Refusals of harmless prompts: set", "worse", rise),
    ):
        assert f'<li class="tile {kind}"><div class="what">{title}</div>' in html
        (words,) = re.findall(rf"<li>{title}, b: (.*?)</li>", html)
        assert words.startswith(change) and words.endswith(f"; clearly {kind} in English and Swahili.")
    assert html.count('<td class="clear better">') == html.count('<td class="clear worse">') == 3
    # The perplexity of both languages rises, and it has no mean.
    html = write_report(folder, out=tmp_path)[0].read_text(encoding="utf-8")
    (tile,) = re.findall('<li class="tile (worse"><div class="what">Perplexity of text</div>.*?)</li>', html)
    assert (
        ">2 <" in tile and "of 2 languages clearly worse" in tile and ">0 clearly better, 0 without" in tile
    )


def test_p_values_of_tasks_are_adjusted_for_their_number(tmp_path: Path) -> None:
    right = {"base": (0, 0), "tuned": (10, 6)}  # of 20 items in two tasks
    for model, counts in right.items():
        tasks = {
            f"task{n}": {
                "count": 20,
                "metrics": {"acc,none": {"value": count / 20, "stderr": None}},
                "items": {"acc,none": [1.0] * count + [0.0] * (20 - count)},
            }
            for n, count in enumerate(counts)
        }
        write_json(tmp_path / model / "utility.json", {"measurement": "utility", "tasks": tasks})
    rows = _cells(write_report(tmp_path)[1].read_text(encoding="utf-8"), "Utility")
    smaller, larger = (stats.binomtest(0, count).pvalue for count in right["tuned"])
    assert [row[6] for row in rows] == [f"{2 * smaller:.3f}", f"{larger:.3f}"]
    # Other items cannot be paired: their difference is shown, and nothing that rests on pairs.
    file = tmp_path / "base" / "utility.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["tasks"]["task0"]["items"]["acc,none"].pop()
    file.write_text(json.dumps(values), encoding="utf-8")
    rows = _cells(write_report(tmp_path)[1].read_text(encoding="utf-8"), "Utility")
    assert rows[0][5:] == ["+50.0", "\N{EN DASH}"] and rows[1][6] == f"{larger:.3f}"


def test_the_perplexity_of_a_ruined_model_is_reported(tmp_path: Path) -> None:
    for n, model in enumerate(("base", "tuned")):
        write_perplexity(tmp_path / model, 0)
        file = tmp_path / model / "perplexity.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        values["languages"] = {"sw": values["languages"]["sw"]}
        values["languages"]["sw"] |= {"perplexity": 1e299, "nats_per_text": [n * 1e9] * 8}
        file.write_text(json.dumps(values), encoding="utf-8")
    (row,) = _cells(write_report(tmp_path)[1].read_text(encoding="utf-8"), "Perplexity")
    assert row[3].startswith("1000") and row[5].startswith("**+") and len(row[5]) > 300


@pytest.mark.parametrize("other", ["fingerprint", "tokens_per_text"])
def test_the_perplexities_of_other_texts_or_tokens_are_not_compared(tmp_path: Path, other: str) -> None:
    for n, model in enumerate(("base", "tuned")):
        write_perplexity(tmp_path / model, n)
    file = tmp_path / "tuned" / "perplexity.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    entry = values["languages"]["sw"]
    entry[other] = "g" if other == "fingerprint" else [n + 1 for n in entry[other]]
    file.write_text(json.dumps(values), encoding="utf-8")
    english, swahili = _cells(write_report(tmp_path)[1].read_text(encoding="utf-8"), "Perplexity")
    assert english[5].startswith("**+2.0") and swahili[5] == "\N{EN DASH}" != swahili[4]


def test_the_correlation_is_that_of_all_languages_with_both_numbers(folder: Path) -> None:
    table = write_report(folder)[1].read_text(encoding="utf-8")
    gaps = json.loads((folder / "base" / "reward_gap.json").read_text(encoding="utf-8"))
    rates = json.loads((folder / "base" / "attack" / "multijail" / "result.json").read_text(encoding="utf-8"))
    gap_of = {row.language: row.gap for row in RewardGapTable.from_dict(gaps).rows}
    rate_of = {code: row["rate"] for code, row in rates["languages"].items()}
    assert gap_of.keys() == rate_of.keys() == set(CODES)
    wanted = stats.pearsonr([gap_of[code] for code in CODES], [rate_of[code] for code in CODES]).statistic
    (found,) = re.findall(r"over 7 languages, base: Pearson (\S+) ", table)
    assert found.replace("\N{MINUS SIGN}", "-") == f"{wanted:.2f}"


def test_perplexity_changes_are_relative_and_paired_by_text(folder: Path) -> None:
    rows = _cells(write_report(folder)[1].read_text(encoding="utf-8"), "Perplexity")
    # 0.02 nats per token more in every text: exp(0.02) - 1 is 2.02 %.
    assert rows[0][5] == "**+2.0\N{NO-BREAK SPACE}%** \\[+2.0, +2.0\\]"


def test_models_come_in_the_suites_order_or_as_asked_for(tmp_path: Path) -> None:
    write_results(tmp_path, prompts=5, models=("zebra", "ant", "bee"))
    head = write_report(tmp_path)[1].read_text(encoding="utf-8").splitlines()[2]
    assert [head.index(name) for name in ("zebra", "ant", "bee")] == sorted(
        head.index(name) for name in ("zebra", "ant", "bee")
    )
    head = write_report(tmp_path, models=["bee", "zebra"])[1].read_text(encoding="utf-8").splitlines()[2]
    assert head.index("bee") < head.index("zebra") and "ant" not in head


def test_one_model_alone_is_reported_without_changes(tmp_path: Path) -> None:
    write_safety(
        tmp_path / "only" / "attack" / "set", "attack", {"en": ["unsafe", "safe"], "sw": ["safe", "safe"]}
    )
    page, table = (path.read_text(encoding="utf-8") for path in write_report(tmp_path))
    assert "Change" not in table and '<th scope="col">p</th>' not in page


def test_prompts_that_a_server_blocked_and_answers_that_were_cut_are_pointed_out(tmp_path: Path) -> None:
    write_safety(tmp_path / "m" / "attack" / "set", "attack", {"en": ["unsafe", "blocked", "safe"]})
    html = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "m: its server blocked 1 of 3 prompts." in html and "were cut off" not in html
    file = tmp_path / "m" / "attack" / "set" / "result.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    result["languages"]["en"]["cut_off"] = 2
    file.write_text(json.dumps(result), encoding="utf-8")
    assert "m: 2 of 3 answers were cut off" in write_report(tmp_path)[0].read_text(encoding="utf-8")


def test_different_judges_and_prompts_are_pointed_out(tmp_path: Path) -> None:
    for model in ("a", "b"):
        write_safety(tmp_path / model / "attack" / "set", "attack", {"en": ["unsafe", "unparsed", "safe"]})
    quiet = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "different judges" not in quiet and "1 of 3 replies of the judge name no verdict" in quiet
    file = tmp_path / "b" / "attack" / "set" / "result.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    result["judge"]["model"], result["prompts"]["fingerprint"] = "another", "another"
    file.write_text(json.dumps(result), encoding="utf-8")
    loud = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "different judges" in loud and "different prompts" in loud


# ------------------------------------------------------------------------------------------------- what is missing


def _write_gaps(file: Path) -> None:
    before, after = (summarize(scores, beta=1.0, resamples=200) for scores in simulated_scores())
    made = {"base_model": "org/model", "adapter": "runs/it", "created": "2026-01-01T00:00:00+00:00"}
    write_json(file, compare(before, after).to_dict(records=True) | {"provenance": made})


def _write_alone(folder: Path, measurement: str) -> None:
    match measurement:
        case "hidden space":
            write_hidden_space(folder)
        case "reward gap":
            _write_gaps(folder / "it" / "reward_gap.json")
        case "attack" | "over_refusal":
            write_safety(
                folder / "it" / measurement / "set",
                measurement,
                {"en": ["refusal", "unsafe"], "sw": ["safe"] * 2},
            )
        case "utility":
            write_utility(folder / "it", np.random.default_rng(0), 0)
        case "perplexity":
            write_perplexity(folder / "it", 0)


@pytest.mark.parametrize(
    ("measurement", "heading"),
    [
        ("hidden space", "Hidden space"),
        ("reward gap", "Reward gap"),
        ("attack", "Attack success: set"),
        ("over_refusal", "Refusals of harmless prompts: set"),
        ("utility", "Utility"),
        ("perplexity", "Perplexity of text"),
    ],
)
def test_one_measurement_alone_is_enough(
    tmp_path: Path, measurement: str, heading: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_alone(tmp_path, measurement)
    assert main(["report", str(tmp_path), "--title", "Alone"]) == 0
    page, table = (tmp_path / name for name in ("report.html", "report.md"))
    html, markdown = page.read_text(encoding="utf-8"), table.read_text(encoding="utf-8")
    assert (
        f"<h2>{heading}</h2>" in html and "| English |" in markdown
        if measurement != "utility"
        else "mgsm" in html
    )
    assert markdown.startswith("# Alone\n\n") and "None" not in markdown + html and "nan" not in markdown
    ids = {str(attrs["id"]) for _, attrs in _Tags(html).tags if "id" in attrs}
    assert _links(_Tags(html).tags) == ids


def test_an_adapters_reward_gap_alone_is_shown_against_its_base(tmp_path: Path) -> None:
    _write_gaps(tmp_path / "a-tuned" / "reward_gap.json")
    page, table = (path.read_text(encoding="utf-8") for path in write_report(tmp_path))
    assert [cell.strip() for cell in table.splitlines()[2].split("|")][4:7] == ["base", "a-tuned", "Change"]
    assert "<b>a-tuned</b> against <b>base</b>" in page
    assert "org/model" in page and "runs/it" in page  # where the numbers come from


def test_a_source_language_that_is_a_target_too_is_told_apart(tmp_path: Path) -> None:
    scores, _ = simulated_scores()
    records = [replace(r, language="en") if r.language == "sw" else r for r in scores]
    table = summarize(records, beta=1.0, resamples=200)
    write_json(tmp_path / "m" / "reward_gap.json", table.to_dict(records=True))
    labels = [row[1] for row in _cells(write_report(tmp_path)[1].read_text(encoding="utf-8"), "Reward gap")]
    assert "English (source)" in labels and "English (target)" in labels and "English" not in labels


def test_a_folder_of_one_model_is_read_as_well(tmp_path: Path) -> None:
    _write_gaps(tmp_path / "reward_gap.json")
    assert " against <b>base</b>" in write_report(tmp_path)[0].read_text(encoding="utf-8")


def test_a_base_comes_before_its_adapter_where_only_reward_gaps_were_measured(tmp_path: Path) -> None:
    _write_gaps(tmp_path / "a-tuned" / "reward_gap.json")
    before, _ = simulated_scores()
    write_json(
        tmp_path / "z-base" / "reward_gap.json",
        summarize(before, beta=1.0, resamples=200).to_dict(records=True),
    )
    head = write_report(tmp_path)[1].read_text(encoding="utf-8").splitlines()[2]
    assert 0 < head.index("z-base") < head.index("a-tuned")


def test_a_measurement_that_one_model_lacks_is_a_dash_and_not_a_comparison(tmp_path: Path) -> None:
    write_results(tmp_path, prompts=6)
    for lacking in ("base/perplexity.json", "tuned/utility.json", "tuned/reward_gap.json"):
        (tmp_path / lacking).unlink()
    for file in (tmp_path / "base" / "attack" / "multijail").iterdir():
        file.unlink()
    page, table = (path.read_text(encoding="utf-8") for path in write_report(tmp_path))
    assert (
        page.count('<div class="how">not compared</div>') == 2
    )  # perplexity and utility, which have no mean
    dash = "\N{EN DASH}"
    for row in _cells(table, "Perplexity"):
        assert row[3] == dash != row[4] and row[5:] == [dash, dash]
    for start in ("Utility", "Reward gap"):
        assert all(row[3] != dash == row[4] == row[5] for row in _cells(table, start))
    assert _cells(table, "Attack success")[-1][3] == dash


def test_a_language_without_one_readable_verdict_is_shown_without_a_rate(tmp_path: Path) -> None:
    for model in ("a", "b"):
        write_safety(
            tmp_path / model / "attack" / "set", "attack", {"en": ["unsafe", "safe"], "sw": ["unparsed"] * 2}
        )
    page, table = (path.read_text(encoding="utf-8") for path in write_report(tmp_path))
    dash = "\N{EN DASH}"
    assert [row[1:] for row in _cells(table, "Attack success")][1] == ["Swahili", "2", dash, dash, dash, dash]
    assert re.search(r'<th scope="row">Swahili</th>.*<td>100 / 100</td></tr>', page)


def test_the_number_of_languages_is_that_of_the_mean(folder: Path, tmp_path: Path) -> None:
    """The source is no target, and a language without a rate is in no mean."""
    page = write_report(folder, out=tmp_path)[0].read_text(encoding="utf-8")
    assert f"all targets ({len(CODES) - 1})" in page and f"on the mean of {len(CODES) - 1} languages" in page
    assert f"mean of languages ({len(CODES)})" in page
    verdicts = {"en": ["unsafe", "safe"], "bn": ["safe", "unsafe"], "sw": ["unparsed"] * 2}
    for model in ("a", "b"):
        write_safety(tmp_path / model / "attack" / "set", "attack", verdicts)
    page = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "mean of languages (2)" in page and "on the mean of 2 languages" in page


def test_every_table_says_the_confidence_of_its_own_intervals(tmp_path: Path) -> None:
    write_results(tmp_path, prompts=6)
    for file in tmp_path.glob("*/perplexity.json"):
        values = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(values | {"confidence": 0.8}), encoding="utf-8")
    page, table = (path.read_text(encoding="utf-8") for path in write_report(tmp_path))
    section = page[page.index('<section id="perplexity">') :]
    assert "[80\N{NO-BREAK SPACE}%]" in section and "[95\N{NO-BREAK SPACE}%]" not in section
    assert "Brackets: 95 % intervals, 80 % for Perplexity;" in table


# ------------------------------------------------------------------------------------------------------------ bad input


def test_bad_folders_and_names_are_explained(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no measurement"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="no model 'tunned'; it has base, tuned"):
        write_report(folder, models=["tunned"])


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"languages": {}}',
        '{"measurement": "over_refusal", "languages": {}, "judge": {"name": "j"}}',
        '{"measurement": "attack", "languages": {"en": {}}, "judge": {"name": "j"}}',
    ],
)
def test_a_folder_with_nothing_but_damaged_files_is_an_error_that_names_them(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_safety(tmp_path / "m" / "attack" / "set", "attack", {"en": ["safe"]})
    (tmp_path / "m" / "attack" / "set" / "result.json").write_text(content, encoding="utf-8")
    with pytest.raises(StorageError, match=r"m/attack/set/result\.json"):
        write_report(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert "m/attack/set/result.json" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (
            "attack/other/result.json",
            '{"measurement": "attack", "languages": {"en": {}}, "judge": {"name": "j"}}',
        ),
        ("attack/set/verdicts.refusal-phrases.jsonl", '{"language": "en"}\n'),
        ("attack/set/verdicts.refusal-phrases.jsonl", 'oops\n{"language": "en"}\n'),
        ("reward_gap.json", '{"beta": 1}'),
        ("utility.json", '{"tasks": 3}'),
        ("perplexity.json", "null"),
        ("perplexity.json", '{"languages": {"en": {"perplexity": null}}}'),
        ("utility.json", '{"tasks": {"t": {"metrics": {"acc,none": 0.5}}}}'),
        ("reward_gap.json", '{"after": {}}'),
        ("attack/set/answers.jsonl", '{"id": "0/en"}\n'),
        ("attack/set/answers.jsonl", "3\n"),
        ("../suite.json", '{"models": 3}'),
        ("../hidden_space/hidden_space.json", '{"models": {}}'),
        ("utility.json", '{"version": 99}'),
    ],
)
def test_a_damaged_file_is_left_out_and_named_and_the_rest_is_reported(
    tmp_path: Path, file: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_safety(tmp_path / "m" / "attack" / "set", "attack", {"en": ["safe", "unsafe"]})
    (tmp_path / "m" / file).parent.mkdir(exist_ok=True)
    (tmp_path / "m" / file).write_text(content, encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 0
    page, table = ((tmp_path / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    where = f"m/{file}".removeprefix("m/../")
    assert where in capsys.readouterr().err and where in page and where in table.replace("\\", "")
    assert [row[1:] for row in _cells(table, "Attack success")] == [["English", "2", "50.0 \\[9.5, 90.5\\]"]]


def test_rows_that_are_whole_are_reported_though_another_is_damaged(tmp_path: Path) -> None:
    verdicts = {"base": ["unsafe"] * 12, "tuned": ["safe"] * 12}
    for model, given in verdicts.items():
        write_safety(tmp_path / model / "attack" / "set", "attack", {"en": given})
    write_report(tmp_path)
    assert "Left out" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    (whole,) = _cells((tmp_path / "report.md").read_text(encoding="utf-8"), "Attack success")
    for name in ("verdicts.refusal-phrases.jsonl", "answers.jsonl"):
        file = tmp_path / "tuned" / "attack" / "set" / name
        lines = file.read_bytes().splitlines(keepends=True)
        lines[1], lines[4] = b"\xff\xfe damaged\n", b"[" * 5000 + b"\n"
        lines[6] = lines[6].replace(b"safe", b"safe \\ud83d")
        file.write_bytes(b"".join(lines))
    page, table = (path.read_text(encoding="utf-8") for path in write_report(tmp_path, examples=12))
    assert "verdicts.refusal-phrases.jsonl, line 2 " in page and "answers.jsonl, line 2 " in page
    assert page.count("1 more of its rows are damaged, too.") == table.count("1 more of its rows") == 2
    # Ten pairs are left of twelve: what holds half a surrogate pair is none of the damaged rows.
    (left,) = _cells(table, "Attack success")
    assert left[:5] == whole[:5] and left[5].startswith("**\N{MINUS SIGN}100.0**")
    assert (whole[6], left[6]) == ("<\N{THIN SPACE}0.001", f"{stats.binomtest(0, 10).pvalue:.3f}")
    answers = (tmp_path / "answers.html").read_text(encoding="utf-8")
    assert "safe \N{REPLACEMENT CHARACTER} answer 6 in en" in answers


def test_a_last_row_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    write_safety(tmp_path / "m" / "attack" / "set", "attack", {"en": ["safe", "unsafe"]})
    with (tmp_path / "m" / "attack" / "set" / "verdicts.refusal-phrases.jsonl").open("a") as file:
        file.write('{"id": "2/en", "lang')
    assert write_report(tmp_path)[0].is_file()


def test_the_command_writes_where_it_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(folder), "--out", str(tmp_path), "--title", "A & B", "--examples", "0"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert "<h1>A &amp; B</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "report.md").read_text(encoding="utf-8").startswith("# A &amp; B\n")


# ------------------------------------------------------------------------------------------------------- in a browser


def test_the_page_is_quiet_asks_for_nothing_and_fits_every_width(
    chromium: browser.Browser, folder: Path
) -> None:
    page = write_report(folder)[0]
    for width in (360, 390, 768, 1280):
        for scheme in ("light", "dark"):
            chromium.width(width)
            chromium.colours(scheme)
            chromium.open(page)
            assert chromium.console() == []
            assert [url for url in chromium.requests() if not url.startswith("data:")] == [page.as_uri()]
            assert chromium.run("return document.documentElement.scrollWidth <= innerWidth")
            light = (
                chromium.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
            )
            assert light == (scheme == "light")


def test_hostile_texts_do_nothing_when_everything_is_opened(
    chromium: browser.Browser, hostile_page: Path
) -> None:
    hostile_page = hostile_page.with_name("answers.html")
    chromium.open(hostile_page)
    chromium.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert chromium.run("return document.scripts.length + document.images.length") == 0
    assert chromium.run("return document.title").startswith("Prompts and answers: T <script>")
    texts = chromium.run("return [...document.querySelectorAll('.text')].map(e => e.textContent)")
    assert texts.count(HOSTILE) >= 2 * 3
    assert chromium.console() == []
    assert [url for url in chromium.requests() if not url.startswith("data:")] == [hostile_page.as_uri()]


def test_the_browser_would_have_told(chromium: browser.Browser, folder: Path, tmp_path: Path) -> None:
    page = write_report(folder, out=tmp_path)[0]
    html = page.read_text(encoding="utf-8")
    stray = '<img src="http://127.0.0.1:9/x.png"><script>document.title="owned"</script>'
    page.write_text(html.replace("<main>", f"<main>{stray}"), encoding="utf-8")
    chromium.open(page)
    blocked = " ".join(chromium.console())
    assert "img-src" in blocked and "script-src" in blocked  # the policy stops both, and says so
    without = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", html).replace(
        "<main>", f"<main>{stray}"
    )
    page.write_text(without, encoding="utf-8")
    chromium.open(page)
    assert "http://127.0.0.1:9/x.png" in chromium.requests()
    assert chromium.run("return document.title") == "owned"
