"""When a run measures its held-out pairs between its first step and its last."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpo.errors import ConfigError
from mpo.jobs.preflight.in_between import MOST, SHARE, measured_in_between
from mpo.training.recipe import Recipe, load_recipe
from mpo.training.workload import Schedule, Workload


def recipe(folder: Path, *lines: str) -> Recipe:
    path = folder / "r.yaml"
    given = ["model_name_or_path: m", "dataset: d.jsonl", "use_cpu: true", "bf16: false", *lines]
    path.write_text("\n".join(given) + "\n", encoding="utf-8")
    return load_recipe(path)


def work(tokens: int) -> Workload:
    return Workload(
        np.array([tokens]), pairs=1, tree_tokens=tokens, trees=1, longest_tree=1, reference_tokens=0
    )


@pytest.mark.parametrize(
    ("lines", "held_out", "steps", "times", "every"),
    [
        (["use_peft: true"], 10, 100, 4, 21),  # 10 of 2 x 1000 tokens' passes each
        (["use_peft: true"], 30, 100, 3, 26),  # 1.5 % each
        (["use_peft: true"], 110, 100, 0, None),  # 5.5 %
        ([], 110, 100, 1, 51),  # a backward pass over all weights: 3.7 %
        (["use_peft: true", "held_out_measurements: 2"], 500, 26, 2, 9),
        (["use_peft: true", "held_out_measurements: 0"], 10, 100, 0, None),
        (["use_peft: true", "held_out_measurements: 9"], 10, 4, 3, 1),
        (["use_peft: true", "held_out_measurements: 4"], 10, 8, 3, 2),  # steps 2, 4 and 6
        (["use_peft: true"], 10, 1, 0, None),
    ],
)
def test_unset_it_is_measured_as_often_as_is_cheap(
    lines: list[str], held_out: int, steps: int, times: int, every: int | None, tmp_path: Path
) -> None:
    found = measured_in_between(
        recipe(tmp_path, *lines), Schedule(steps, steps, 1.0), work(1000), work(held_out)
    )
    assert found is not None
    assert (found.times, found.every) == (times, every)
    assert found.times <= MOST or "held_out_measurements: 9" in lines
    if not any("held_out_measurements" in line for line in lines):
        assert found.share <= SHARE
    if every is not None:
        assert [step for step in range(1, steps) if step % every == 0] == [
            every * n for n in range(1, times + 1)
        ]
    assert ("in between (about" in found.to_text()) == (every is not None)
    if times == 0:
        assert "held_out_measurements: 1" in found.to_text()


def test_where_eval_strategy_says_when_it_is_left_alone(tmp_path: Path) -> None:
    given = recipe(tmp_path, "eval_strategy: epoch")
    assert measured_in_between(given, Schedule(9, 9, 1.0), work(1000), work(1)) is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["held_out_measurements: -1"], "expected 0 for none"),
        (["held_out_measurements: 2", "held_out: 0"], "nothing is held out"),
        (["held_out_measurements: 2", "eval_strategy: epoch"], "both say when"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(tmp_path, *lines)
