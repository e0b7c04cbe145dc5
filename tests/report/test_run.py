"""The folder of a training run as a report."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from mpo.cli import main
from mpo.common.files import write_json
from mpo.common.typed_json import write_typed
from mpo.errors import DataError
from mpo.evaluation import compare, summarize
from mpo.evaluation.results import TrainingMetrics
from mpo.report.effects import by_model
from mpo.report.folder import read_results
from mpo.report.page import write_report
from tests.evaluation.simulated import simulated_scores
from tests.report.result_folder import write_hidden_space, write_safety

PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


MEASURED = ("harmful_answered", "harmless_refused")


def _shift(count: int, before: float, after: float, low: float, high: float, p: float) -> dict[str, Any]:
    change = after - before
    return {
        "count": count,
        "before": before,
        "after": after,
        "change": change,
        "interval": [low, high],
        "p_value": p,
    }


def write_run(folder: Path, *, held_out: bool = True, probe: bool = False) -> Path:
    before, after = (summarize(scores, beta=1.0, resamples=200) for scores in simulated_scores())
    measured: dict[str, Any] = {}
    if held_out:
        change = compare(before, after).to_dict()["change"]
        measured = {"held_out_groups": 12, "before": before, "after": after, "change": change}
    metrics = TrainingMetrics(beta=1.0, steps=1_800, train_runtime=754.0, sources={"used": 48}, **measured)
    path = write_typed(folder / "metrics.json", metrics)
    (folder / "training_curve.png").write_bytes(PICTURE)
    if probe:
        attack = {
            "sw": _shift(16, 0.75, 0.125, -0.85, -0.3, 0.001),
            "zh": _shift(16, 0.5, 0.4, -0.3, 0.1, 0.6),
        }
        refused = {"sw": _shift(16, 0.1, 0.9, 0.5, 0.95, 0.001), "zh": _shift(16, 0.0, 0.0, -0.19, 0.19, 1.0)}
        mean = {
            "harmful_answered": _shift(16, 0.625, 0.2625, -0.5, -0.2, 0.001),
            "harmless_refused": _shift(16, 0.05, 0.45, 0.3, 0.5, 0.001),
        }
        values = json.loads(path.read_text(encoding="utf-8"))
        shares: dict[str, Any] = {
            "harmful_answered": {"languages": {}},
            "harmless_refused": {"languages": {}},
            "wording": {},
        }
        nothing: dict[str, Any] = {"languages": {}, "mean": None}
        values["behavior"] = {
            "prompts": {"origin": "probe set, version 1", "max_new_tokens": 48},
            "before": shares,
            "after": shares,
            "change": {
                "in_language": nothing,
                "repetitive": nothing,
                "harmful_answered": {"languages": attack, "mean": mean["harmful_answered"]},
                "harmless_refused": {"languages": refused, "mean": mean["harmless_refused"]},
            },
            "finding": {"level": "warning", "text": "Warning: this model refuses harmless prompts <b>."},
            "left_out": ["it"],
        }
        write_json(path, values)
    return folder


def test_a_runs_folder_is_reported_with_its_gaps_its_curve_and_what_is_known_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "my-run")
    assert main(["report", str(run)]) == 0
    page, table = ((run / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert "<b>my-run</b> against <b>base</b>" in page and "<h2>Reward gap</h2>" in page
    assert page.count("data:image/png;base64,") == 1 and base64.b64encode(PICTURE).decode() in page
    assert "<dt>Optimizer steps</dt><dd>1,800</dd>" in page and "<dd>12 min 34 s</dd>" in page
    assert "No prompt was asked." in page and "| English |" in table
    assert "answers.html" not in page + capsys.readouterr().out


def test_a_runs_probe_opens_its_report(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", probe=True))[0].read_text(encoding="utf-8")
    assert "Warning: this model refuses harmless prompts &lt;b&gt;." in page
    assert "run, on the mean of 2 languages: trades safety for refusals. Attack success 62.5" in page
    assert "trades safety for refusals in Swahili; not told apart (n too small) in Chinese." in page
    assert page.index('<figure class="plane">') < page.index("<h2>Reward gap</h2>")


def test_the_probes_answers_are_on_a_page_of_their_own(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", probe=True)
    rows = [
        {
            "id": f"{kind}-00{n}/{code}",
            "language": code,
            "prompt": f"<b>Prompt {n}?",
            "before": {"answer": "Yes.", "verdict": verdicts[0]},
            "after": {"answer": "Sorry <i>.", "verdict": verdicts[n % 2]},
        }
        for kind, verdicts in (("harmful", ("unsafe", "safe")), ("looks-harmful", ("answer", "refusal")))
        for n in range(3)
        for code in ("sw", "zh")
    ]
    lines = [json.dumps(row) for row in rows]
    (run / "probe_answers.jsonl").write_text(
        "".join(f"{line}\n" for line in [*lines, "oops"]), encoding="utf-8"
    )
    page = write_report(run, examples=2)[0].read_text(encoding="utf-8")
    answers = (run / "answers.html").read_text(encoding="utf-8")
    assert answers.count("<article") == 2 * 2 * 2 and 'name="changed"' in answers
    assert answers.count('changed"><p') == 2 * 2  # the second prompt of each set and language
    assert 'after training</b> <span class="verdict">refusal</span>' in answers
    assert "&lt;b&gt;Prompt 1?" in answers and "<b>Prompt" not in answers + page
    assert "Sorry" not in page and "probe_answers.jsonl, line 13 is no JSON" in page


def test_a_finding_that_all_is_well_is_no_warning_unless_a_language_was_not_asked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", probe=True)
    for level, left_out, is_warning in (
        ("warning", [], True),
        ("clear", [], False),
        ("clear", ["it"], True),
    ):
        values = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        values["behavior"] |= {"finding": {"level": level, "text": "What was found."}, "left_out": left_out}
        write_json(run / "metrics.json", values)
        page = write_report(run)[0].read_text(encoding="utf-8")
        assert ('<p class="warning">What was found.' in page) == is_warning
        assert page.count("What was found.") == 1


def test_a_warning_stays_one_beside_a_suite_and_what_the_suite_did_not_ask_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", held_out=False, probe=True)
    write_safety(run / "attack" / "set", "attack", {"sw": ["safe"] * 12})
    for level, is_warning in (("warning", True), ("as before", True), ("clear", False)):
        values = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        values["behavior"]["finding"] = {"level": level, "text": "What was found."}
        write_json(run / "metrics.json", values)
        page = write_report(run)[0].read_text(encoding="utf-8")
        assert ('<p class="warning">What was found.' in page) == is_warning
        assert page.count("What was found.") == 1
        # Swahili was asked by the probe, Italian was not.
        assert '<p class="warning">No harmless prompts were asked in Italian.' in page


def test_the_probes_words_are_as_strict_as_a_suites(tmp_path: Path) -> None:
    file = write_run(tmp_path / "run", probe=True) / "metrics.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    for languages in (values["behavior"]["change"][name]["languages"] for name in MEASURED):
        languages |= {code: _shift(16, 0.3, 0.3, -0.2, 0.2, 1.0) for code in ("ar", "ja")}
        languages["zh"] = _shift(16, 0.5, 0.1, -0.6, -0.02, 0.02)
    write_json(file, values)
    (found,) = by_model(read_results(file.parent)).values()
    # 0.02 alone is clear, and 3 * 0.02 is not: four languages, one of them clearer.
    assert {effect.label: effect.word for effect in found}["Chinese"] == "not told apart (n too small)"
    assert {effect.label: effect.word for effect in found}["Swahili"] == "trades safety for refusals"


def test_a_run_without_held_out_groups_still_has_its_curve(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", held_out=False))[0].read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "<h2>Reward gap</h2>" not in page
    assert "<dd>0 groups</dd>" in page


def test_measurements_in_a_runs_folder_come_first_and_its_own_gaps_beside_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_safety(run / "attack" / "set", "attack", {"en": ["safe", "unsafe"]})
    write_hidden_space(run)
    page = write_report(run)[0].read_text(encoding="utf-8")
    assert "Attack success: set" in page and "<h2>Reward gap</h2>" in page and "<h2>Hidden space</h2>" in page


@pytest.mark.parametrize("content", ["{", '{"steps": "many"}', '{"behavior": {"change": 3}}'])
def test_damaged_metrics_are_named(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.json").write_text(content, encoding="utf-8")
    assert main(["report", str(run)]) == 2
    assert "metrics.json" in capsys.readouterr().err and not (run / "report.html").exists()


def test_a_curve_that_is_no_picture_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    (run / "training_curve.png").write_bytes(b"<svg onload=1>")
    page = write_report(run)[0].read_text(encoding="utf-8")
    assert "training_curve.png is no PNG picture" in page and "onload" not in page
    assert "training_curve.png is no PNG picture" in capsys.readouterr().err


def test_a_folder_that_is_neither_says_what_it_should_have(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"or the metrics\.json of a training run"):
        write_report(tmp_path)
