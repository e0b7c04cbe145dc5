"""Prompts that an evaluation has are left out of what is trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpo.building.leaks import without_leaks
from mpo.building.prompts import Dropped, PromptRow, read_prompts
from mpo.building.recipe import PromptSource, load_build
from mpo.errors import DataError
from mpo.evaluation.probe import load_probe
from mpo.jobs.build import build_data
from tests.building.test_build import harmful, pairs_recipe, write_rows


def test_prompts_of_an_evaluation_are_left_out_in_whatever_language_they_are_found(tmp_path: Path) -> None:
    rows = [
        {**row, "zh": f"我怎么才能偷偷拿走邻居家的第{number}件东西呢？"}
        for number, row in enumerate(harmful(30))
    ]
    # One word for word, one but for its case, one in translation only.
    (tmp_path / "evaluation.csv").write_text(
        f"id,en,zh\n1,{rows[3]['prompt']},别的问题\n2,{rows[7]['prompt'].upper()},另一个问题\n3,Something else entirely,{rows[11]['zh']}\n",
        encoding="utf-8",
    )
    path = write_rows(tmp_path / "p.jsonl", rows)

    def read():
        return read_prompts(PromptSource([str(path)]), "en", ["zh"])

    found = list(without_leaks(read, [str(tmp_path / "evaluation.csv")], "en"))

    dropped = {each.id for each in found if isinstance(each, Dropped)}
    assert {"p3", "p7", "p11"} <= dropped
    assert [each.id for each in found if isinstance(each, PromptRow)] == [
        row["id"] for row in rows if row["id"] not in dropped
    ]
    reasons = {each.id: each.reason for each in found if isinstance(each, Dropped)}
    assert reasons["p3"] == "stands in evaluation (exact)"


def test_the_probe_and_files_of_pairs_are_looked_for_too(tmp_path: Path) -> None:
    probe = next(prompt.text for prompt in load_probe().prompts if prompt.language == "en")
    pairs = [{"prompt": "Which key opens the shed behind the school?", "chosen": "a", "rejected": "b"}]
    texts = [probe, pairs[0]["prompt"], "How do I bake a loaf of rye bread without a tin?"]
    path = write_rows(
        tmp_path / "p.jsonl", [{"id": n, "kind": "harmless", "prompt": text} for n, text in enumerate(texts)]
    )
    against = ["probe", str(write_rows(tmp_path / "pairs.jsonl", pairs))]

    found = without_leaks(lambda: read_prompts(PromptSource([str(path)]), "en", ["zh"]), against, "en")

    assert [type(each) for each in found] == [Dropped, Dropped, PromptRow]


def test_a_build_of_an_evaluations_own_prompts_says_that_none_is_left(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "prompts.jsonl", harmful(3))
    recipe = load_build(pairs_recipe(tmp_path, languages=("zh",)), ["--leaks.against", str(path)])
    with pytest.raises(DataError, match="no prompt is left: all 3 stand"):
        build_data(recipe, dry_run=True)
