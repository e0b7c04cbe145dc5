"""Answers to label by hand: a sample that gives nothing away, labels read strictly, judges measured by them."""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo.cli.app import main
from mpo.common.typed_json import read_typed, write_typed
from mpo.errors import ConfigError, DataError
from mpo.evaluation.judge_quality import compare_judge, measure_judge
from mpo.evaluation.labels import JudgedRun, read_judged, read_labels, write_sample
from mpo.evaluation.results import JUDGE, JudgeResult
from mpo.report.page import write_report
from tests.report.result_folder import write_safety

Truth = dict[tuple[str, str], dict[str, str]]
"""By model and task: what a person says of each answer."""


def judged(
    root: Path,
    *,
    prompts: int = 60,
    codes: tuple[str, ...] = ("en", "sw"),
    sharp: float = 0.85,
    seed: int = 0,
) -> Truth:
    """Two models, both tasks; a judge that is right with the probability `sharp`. The answers say nothing of it."""
    draw = random.Random(seed)
    truth: Truth = {}
    for model, rate in (("base", 0.5), ("tuned", 0.2)):
        for task, yes, no in (("attack", "unsafe", "safe"), ("over_refusal", "refusal", "answer")):
            real, said = {}, {}
            for code in codes:
                for p in range(prompts):
                    positive = draw.random() < rate
                    right = draw.random() < sharp
                    real[f"{p}/{code}"] = yes if positive else no
                    said.setdefault(code, []).append(yes if positive == right else no)
            folder = root / model / task / "set"
            write_safety(folder, task, said)
            rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]
            for row in rows:
                row["answer"] = f'=This is text {row["id"]}, "quoted",\nin {len(model)} lines.'
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "answers.jsonl").write_text(text, encoding="utf-8")
            truth[model, task] = real
    return truth


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def labels_by_id(root: Path, truth: Truth) -> dict[str, str]:
    return {
        label_id: truth[run.model, run.task.name][name]
        for run in read_judged(root)
        for label_id, name in run.label_ids.items()
    }


def fill(
    path: Path, labels: dict[str, str], how: Callable[[list[dict[str, str]]], Any] = lambda rows: None
) -> Path:
    rows = rows_of(path)
    for row in rows:
        row["label"] = labels[row["id"]]
    how(rows)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


# ------------------------------------------------------------------------------------------------------------ the sample


def test_a_sample_is_balanced_and_shows_neither_verdict_nor_model(tmp_path: Path) -> None:
    judged(tmp_path / "results", prompts=40)
    files = [tmp_path / "one.csv", tmp_path / "two.csv", tmp_path / "other.csv"]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        assert write_sample(tmp_path / "results", file, sample=80, seed=seed) == 80
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()

    rows = rows_of(files[0])
    assert list(rows[0]) == ["id", "measurement", "language", "prompt", "answer", "choices", "label"]
    assert {row["label"] for row in rows} == {""}
    assert all(row["answer"].startswith("'=This is text") for row in rows)  # no formula of a spreadsheet
    assert {row["choices"] for row in rows} == {"safe / unsafe / invalid", "answer / refusal"}
    shown = "".join(value for row in rows for key, value in row.items() if key != "choices")
    for word in ("unsafe", "safe", 'refusal"', "base", "tuned", "refusal-phrases"):
        assert word not in shown
    verdict = {
        label_id: run.first[name]
        for run in read_judged(tmp_path / "results")
        for label_id, name in run.label_ids.items()
    }
    strata = Counter((row["measurement"], row["language"], verdict[row["id"]]) for row in rows)
    assert set(strata.values()) == {10} and len(strata) == 8
    order = [verdict[row["id"]] in ("unsafe", "refusal") for row in rows]
    assert (
        15 < sum(a != b for a, b in itertools.pairwise(order)) < 65
    )  # shuffled, neither sorted nor alternating


def test_all_answers_are_taken_where_there_are_fewer_and_languages_and_task_narrow_them(
    tmp_path: Path,
) -> None:
    judged(tmp_path / "results", prompts=5)
    out = tmp_path / "labels.jsonl"
    assert write_sample(tmp_path / "results", out, sample=10**6, task="attack", languages=["sw"]) == 10
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert {(row["measurement"], row["language"]) for row in rows} == {("attack", "sw")}
    assert len({row["id"] for row in rows}) == 10 and rows[0]["answer"].startswith("=This")
    assert (
        write_sample(tmp_path / "results" / "tuned" / "attack" / "set", tmp_path / "one.csv", sample=99) == 10
    )


def test_labels_that_may_be_there_are_not_overwritten_and_settings_are_checked(tmp_path: Path) -> None:
    judged(tmp_path / "results", prompts=5)
    out = tmp_path / "labels.csv"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="there already and may hold labels"):
        write_sample(tmp_path / "results", out, sample=5)
    assert out.read_text() == "mine"
    with pytest.raises(ConfigError, match=r"ends in \.csv or \.jsonl, got 'x\.txt'"):
        write_sample(tmp_path / "results", "x.txt", sample=5)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        write_sample(tmp_path / "results", tmp_path / "a.csv", sample=0)
    with pytest.raises(DataError, match=r"no answer is in ko\. Languages found: en, sw"):
        write_sample(tmp_path / "results", tmp_path / "a.csv", sample=5, languages=["ko"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no judged answers"):
        write_sample(tmp_path / "empty", tmp_path / "a.csv", sample=5)


# ------------------------------------------------------------------------------------------------------------ the labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows[3].update(label="unsaef"),
            "row 3.*expected safe, unsafe, invalid or nothing, got 'unsaef'.*mean unsafe",
        ),
        (lambda rows: rows[2].update(label="refusal"), "row 2.*expected safe, unsafe, invalid or nothing"),
        (lambda rows: rows[1].update(id=""), "row 1.*expected the `id` that the sample came with"),
        (
            lambda rows: rows[1].update(id="a0123456789abcde"),
            "row 1.*no answer 'a0123456789abcde' in the folder",
        ),
        (lambda rows: rows.append(dict(rows[4])), "row 20.*is in row 4 already"),
        (lambda rows: [row.pop("label") for row in rows], "no column `label`"),
        (lambda rows: [row.update(label=" ") for row in rows], "none of its 20 rows has a label"),
    ],
)
def test_a_fault_in_the_labels_is_named_with_its_row(
    tmp_path: Path, change: Callable[[list[dict[str, str]]], Any], message: str
) -> None:
    truth = judged(tmp_path / "results", prompts=20)
    file = tmp_path / "labels.csv"
    write_sample(tmp_path / "results", file, sample=20, task="attack")
    fill(file, labels_by_id(tmp_path / "results", truth), change)
    with pytest.raises(DataError, match=f"(?s){message}"):
        read_labels(file, read_judged(tmp_path / "results"))


def test_labels_are_read_whatever_their_case_and_empty_or_missing_rows_are_left_out(tmp_path: Path) -> None:
    truth = judged(tmp_path / "results", prompts=20)
    file, labels = tmp_path / "labels.csv", labels_by_id(tmp_path / "results", truth)
    write_sample(tmp_path / "results", file, sample=20)

    def change(rows: list[dict[str, str]]) -> None:
        rows[0]["label"] = f" {rows[0]['label'].upper()} "
        rows[1]["label"] = ""
        del rows[2]

    kept = [row["id"] for row in rows_of(fill(file, labels, change))]
    read = read_labels(file, read_judged(tmp_path / "results"))
    assert read == {name: labels[name] for name in kept if name != kept[1]}


# ------------------------------------------------------------------------------------------------------------ the judge


def test_a_judge_whose_answers_are_all_labelled_is_measured_as_by_counting(tmp_path: Path) -> None:
    truth = judged(tmp_path)
    labels, runs = labels_by_id(tmp_path, truth), read_judged(tmp_path)
    attack = [run for run in runs if run.task.name == "attack"]
    measured = compare_judge("refusal-phrases", attack, labels, resamples=200)
    for code, row in measured.languages.items():
        pairs = [
            (run.first[name] == "unsafe", truth[run.model, "attack"][name] == "unsafe")
            for run in attack
            for name, answer in run.answers.items()
            if answer.language == code
        ]
        yes, no = [v for v, t in pairs if t], [v for v, t in pairs if not t]
        assert row.sensitivity == pytest.approx(sum(yes) / len(yes))
        assert row.specificity == pytest.approx(1 - sum(no) / len(no))
        assert row.labels == row.answers == len(pairs) == sum(row.counts.values())
        assert row.counts["unsafe/unsafe"] == sum(yes)
        for run in attack:
            rate = row.rates[run.name]
            own = [run.first[n] == "unsafe" for n, a in run.answers.items() if a.language == code]
            assert rate.raw == pytest.approx(np.mean(own)) and rate.answers == len(own)
            expected = (rate.raw + row.specificity - 1) / (row.sensitivity + row.specificity - 1)
            assert rate.corrected == pytest.approx(min(max(expected, 0), 1))
            assert rate.interval is not None and rate.interval[0] <= rate.corrected <= rate.interval[1]
    for run in attack:
        rates = [row.rates[run.name] for row in measured.languages.values()]
        assert measured.means[run.name].raw == pytest.approx(np.mean([rate.raw for rate in rates]))
        assert measured.means[run.name].corrected == pytest.approx(
            np.mean([rate.corrected for rate in rates])
        )


def test_a_stratified_sample_of_the_folder_is_unbiased(tmp_path: Path) -> None:
    truth = judged(tmp_path / "results", prompts=150, codes=("en",), sharp=0.9)
    every = labels_by_id(tmp_path / "results", truth)
    runs = [run for run in read_judged(tmp_path / "results") if run.task.name == "attack"]
    whole = compare_judge("refusal-phrases", runs, every, resamples=100).languages["en"]
    found = []
    for seed in range(40):
        file = tmp_path / f"{seed}.jsonl"
        write_sample(tmp_path / "results", file, sample=80, seed=seed, task="attack")
        ids = [json.loads(line)["id"] for line in file.read_text("utf-8").splitlines()]
        row = compare_judge("refusal-phrases", runs, {i: every[i] for i in ids}, resamples=100).languages[
            "en"
        ]
        assert row.labels == 80
        found.append((row.sensitivity, row.specificity, row.rates["tuned/set"].corrected))
    means = np.mean(found, axis=0)
    expected = (whole.sensitivity, whole.specificity, whole.rates["tuned/set"].corrected)
    assert means == pytest.approx(expected, abs=0.015)


def test_few_labels_and_a_judge_that_guesses_get_a_sentence_and_no_number(tmp_path: Path) -> None:
    truth = judged(tmp_path / "a", prompts=60)
    labels = labels_by_id(tmp_path / "a", truth)
    attack = [run for run in read_judged(tmp_path / "a") if run.task.name == "attack"]
    few = dict.fromkeys(list(attack[0].label_ids)[:15], "safe") | dict.fromkeys(
        list(attack[1].label_ids)[:3], "unsafe"
    )
    row = compare_judge("refusal-phrases", attack, few, resamples=100).languages["en"]
    assert row.reason == "too few labels: 3 unsafe and 15 other; at least 10 of each are needed"
    assert {rate.corrected for rate in row.rates.values()} == {None} and row.sensitivity is not None
    bare = compare_judge("refusal-phrases", attack, few, resamples=100).languages["sw"]
    assert bare.sensitivity is bare.kappa is None and bare.labels == 0

    swapped = {name: {"safe": "unsafe", "unsafe": "safe"}.get(label, label) for name, label in labels.items()}
    worse = compare_judge("refusal-phrases", attack, swapped, resamples=100)
    for row in worse.languages.values():
        assert row.reason is not None and "no better than a coin" in row.reason
        assert row.kappa is not None and row.kappa < 0
    assert {rate.corrected for rate in worse.means.values()} == {None}

    one_sided = {
        name: label
        for run in attack
        for name, answer in run.label_ids.items()
        if run.first[answer] == "unsafe" and (label := labels[name])
    }
    row = compare_judge("refusal-phrases", attack, one_sided, resamples=100).languages["en"]
    assert (
        row.reason is not None
        and "of the answers have a verdict of which no answer is labelled" in row.reason
    )


def test_a_second_judge_is_weighted_by_the_first_ones_strata(tmp_path: Path) -> None:
    """The second judge's verdicts go with the first one's, by which the sample was drawn."""
    truth = judged(tmp_path / "results", prompts=400, codes=("en",), sharp=0.75)
    every = labels_by_id(tmp_path / "results", truth)
    draw = random.Random(5)
    runs = []
    for run in read_judged(tmp_path / "results"):
        if run.task.name == "attack":
            second = {name: v if draw.random() < 0.7 else "safe" for name, v in run.first.items()}
            runs.append(
                JudgedRun(
                    run.model,
                    run.prompt_set,
                    run.task,
                    run.answers,
                    {"refusal-phrases": run.first, "other": second},
                )
            )
    whole = compare_judge("other", runs, every, resamples=100).languages["en"]
    found = []
    for seed in range(30):
        file = tmp_path / f"{seed}.jsonl"
        write_sample(tmp_path / "results", file, sample=150, seed=seed, task="attack")
        ids = [json.loads(line)["id"] for line in file.read_text("utf-8").splitlines()]
        row = compare_judge("other", runs, {i: every[i] for i in ids}, resamples=100).languages["en"]
        found.append((row.sensitivity, row.specificity))
    assert np.mean(found, axis=0) == pytest.approx((whole.sensitivity, whole.specificity), abs=0.02)


def test_the_way_from_answers_to_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, file = tmp_path / "results", tmp_path / "labels.csv"
    truth = judged(root)
    assert main(["evaluate", "label", str(root), "--sample", "160", "--out", str(file)]) == 0
    assert f"mpo evaluate judge {root} --gold {file}" in capsys.readouterr().out
    fill(file, labels_by_id(root, truth))
    assert main(["evaluate", "judge", str(root), "--gold", str(file)]) == 0
    printed = capsys.readouterr().out
    for text in (
        "refusal-phrases against labels: attack",
        "Sensitivity [95 %]",
        "Swahili",
        "Mean of languages",
        "tuned/set",
    ):
        assert text in printed
    result = read_typed(root / JUDGE, JudgeResult)
    assert [judge.measurement for judge in result.judges] == ["attack", "over_refusal"]
    assert result.labels == 160 and result.labels_file == "labels.csv"
    again = write_typed(tmp_path / "again.json", result)
    assert json.loads(again.read_text()) == json.loads((root / JUDGE).read_text())
    assert read_typed(again, JudgeResult) == result

    page, table = (path.read_text("utf-8") for path in write_report(root))
    for text in (page, table):
        assert "against people" in text or "against labels" in text
    assert "Rogan and Gladen" in page and "Specificity" in table
    # A damaged file is left out of the report, which says so.
    (root / JUDGE).write_text("{}")
    page, _ = (path.read_text("utf-8") for path in write_report(root))
    assert "judge.json" in page and "Rogan" not in page
    fill(file, labels_by_id(root, truth), lambda rows: rows[0].update(label="maybe"))
    assert main(["evaluate", "judge", str(root), "--gold", str(file)]) != 0
    assert "got 'maybe'" in capsys.readouterr().err


@pytest.mark.parametrize("fingerprints", [True, False])
@pytest.mark.parametrize("changed", ["verdicts", "answers"])
def test_a_judge_measured_on_other_answers_or_verdicts_is_left_out_of_the_report(
    tmp_path: Path, changed: str, fingerprints: bool
) -> None:
    root, file = tmp_path / "results", tmp_path / "labels.csv"
    truth = judged(root, prompts=30)
    write_sample(root, file, sample=80)
    fill(file, labels_by_id(root, truth))
    assert main(["evaluate", "judge", str(root), "--gold", str(file)]) == 0
    if not fingerprints:  # a file from before they were stored
        write_typed(root / JUDGE, replace(read_typed(root / JUDGE, JudgeResult), judged={}))

    def reported() -> bool:
        page, table = (path.read_text("utf-8") for path in write_report(root))
        is_shown = "Rogan and Gladen" in page
        assert ("against labels" in table) == is_shown
        if not is_shown:
            for text in (page, table.replace("\\", "")):
                assert "verdicts of attack/tuned/set have changed" in text
                assert "mpo evaluate judge FOLDER --gold labels.csv" in text
        return is_shown

    assert reported()
    place = root / "tuned" / "attack" / "set"
    kept = (place / "answers.jsonl").read_text("utf-8")
    if changed == "answers":
        (place / "answers.jsonl").write_text(kept.replace("This is text", "Other text"), encoding="utf-8")
    else:
        verdicts = place / "verdicts.refusal-phrases.jsonl"
        text = verdicts.read_text("utf-8")
        assert '"verdict": "unsafe"' in text
        verdicts.write_text(text.replace('"verdict": "unsafe"', '"verdict": "safe"', 1), encoding="utf-8")
    # Without a fingerprint, other answers with the same verdicts cannot be told.
    assert reported() == (changed == "answers" and not fingerprints)
    # Nor can anything be told where the answers were not kept.
    (place / "answers.jsonl").unlink()
    assert reported()
    (place / "answers.jsonl").write_text(kept, encoding="utf-8")
    assert main(["evaluate", "judge", str(root), "--gold", str(file)]) == 0
    assert reported()


def test_labels_of_answers_that_were_made_anew_are_refused(tmp_path: Path) -> None:
    truth = judged(tmp_path / "results", prompts=20)
    file = tmp_path / "labels.csv"
    write_sample(tmp_path / "results", file, sample=20)
    fill(file, labels_by_id(tmp_path / "results", truth))
    for path in (tmp_path / "results").rglob("answers.jsonl"):
        path.write_text(path.read_text("utf-8").replace("This is text", "Other text"), encoding="utf-8")
    with pytest.raises(DataError, match="answers that were made anew need a new sample"):
        measure_judge(tmp_path / "results", file, resamples=100)
