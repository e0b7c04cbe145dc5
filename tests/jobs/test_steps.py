"""The plan of ``mpo plan``, the dry run and the training itself take the same steps."""

from __future__ import annotations

import io
import itertools
import json
import re
from contextlib import nullcontext, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpo.cli import main
from mpo.errors import DataError
from mpo.jobs.preflight import make_plan
from mpo.jobs.train import _build_trainer
from mpo.planning.memory import Memory
from mpo.training.recipe import Recipe, load_recipe
from tests.tiny import random_groups, save_tiny


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model, and data with groups of very different sizes."""
    folder = tmp_path_factory.mktemp("files")
    rows = random_groups(5, 9, (1, 12), ("ar", "bn", "ja", "sw", "zh"))
    for number, row in enumerate(rows):
        row.pop("origin")
        row["targets"] = row["targets"][: 1 + number % 5]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return {"model_name_or_path": str(save_tiny("llama", folder / "model")), "dataset": str(data)}


@pytest.fixture(autouse=True)
def ample_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything fits, which need not be counted here."""
    held = Memory(**dict.fromkeys((option.name for option in fields(Memory)), 0))
    monkeypatch.setattr("mpo.planning.fitting.largest_budget", lambda *_: (10**6, held))


@pytest.fixture
def write(tmp_path: Path, files: dict[str, str]):
    def _write(**settings: Any) -> Path:
        values = {
            **files,
            "held_out": 2,
            "num_train_epochs": 1,
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "behavior_probe": 0,
            "reference_cache_dir": str(tmp_path / "cache"),
            "output_dir": str(tmp_path / "out"),
            **settings,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return _write


def dry_run_steps(recipe: Recipe) -> int:
    plan = make_plan(recipe, on_this_machine=False)
    assert plan.facts["Steps"].startswith(f"{plan.steps} optimizer steps")
    return plan.steps


def planned_steps(path: Path, *gpus: int) -> list[int]:
    """What ``mpo plan`` prints for machines of so many GPUs."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(["plan", str(path), "--machines", *(f"{count}x80" for count in gpus)]) == 0
    rows = re.findall(r"^\d+ x 80 GB .*", printed.getvalue(), re.MULTILINE)
    return [int(re.split(r" {2,}", row)[6].replace(",", "")) for row in rows]


SETTINGS: list[dict[str, Any]] = [
    {"gradient_accumulation_steps": 3, "num_train_epochs": 1.5},
    {"group_by_source": False, "per_device_train_batch_size": 3},
    {"group_by_source": False, "max_tokens_per_batch": 300},
    {"max_targets_per_group": 2, "gradient_accumulation_steps": 2},
    {"max_tokens_per_batch": 150},
    {"max_tokens_per_batch": 400, "gradient_accumulation_steps": 2, "num_train_epochs": 2.5},
    {"max_tokens_per_batch": 400, "retain_weight": 0.0},
    {"max_tokens_per_batch": 400, "batch_layout": "padded"},
    {"max_tokens_per_batch": 100_000, "max_targets_per_group": 1},
    {"max_steps": 4, "max_tokens_per_batch": 200},
    {"per_device_train_batch_size": 2, "dataloader_drop_last": True, "num_train_epochs": 2},
    {"max_tokens_per_batch": 500, "dataloader_drop_last": True, "gradient_accumulation_steps": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_as_many_steps_are_planned_and_announced_as_are_trained(write, settings: dict[str, Any]) -> None:
    path = write(**settings)
    (planned,) = planned_steps(path, 1)
    assert dry_run_steps(load_recipe(path)) == planned
    trainer = _build_trainer(make_plan(load_recipe(path)))
    trainer.train()
    assert trainer.state.global_step == planned


@pytest.mark.parametrize("settings", SETTINGS[1:8] + SETTINGS[9:10], ids=str)
def test_as_many_steps_are_planned_for_several_gpus_as_their_dry_run_announces(
    write, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    path = write(**settings)
    recipe = load_recipe(path)
    announced = []
    for gpus in range(1, 9):
        with monkeypatch.context() as patch:
            patch.setattr(type(recipe.training), "world_size", gpus)
            patch.setattr(type(recipe.training), "main_process_first", lambda *_, **__: nullcontext())
            announced.append(dry_run_steps(recipe))
    assert planned_steps(path, *range(1, 9)) == announced
    assert all(more >= less for more, less in itertools.pairwise(announced))
    assert "max_steps" in settings or announced[0] > announced[-1]


def test_a_smaller_budget_of_tokens_makes_more_steps(write) -> None:
    steps = [planned_steps(write(max_tokens_per_batch=tokens), 2)[0] for tokens in (100, 400, 100_000)]
    assert steps[0] > steps[1] > steps[2] == 1


@pytest.mark.parametrize(
    ("settings", "steps"),
    # 100 sources with 6 targets, 650 tokens each: groups of 7 trees, or of 2 where a target stands alone.
    [
        ({}, [13, 34]),
        ({"max_tokens_per_batch": 10_000}, [7, 17]),
        ({"max_tokens_per_batch": 10_000, "gradient_accumulation_steps": 4}, [2, 5]),
        ({"max_tokens_per_batch": 8_000, "retain_weight": 0}, [7, 17]),
        ({"group_by_source": False}, [75, 200]),
        ({"max_targets_per_group": 4}, [25, 67]),
        ({"per_device_train_batch_size": 3, "dataloader_drop_last": True}, [4, 11]),
        ({"max_steps": 9, "max_tokens_per_batch": 10_000}, [9, 9]),
    ],
    ids=str,
)
def test_data_that_are_not_there_are_assumed_with_the_same_arithmetic(
    write, tmp_path: Path, settings: dict[str, Any], steps: list[int]
) -> None:
    assert planned_steps(write(dataset=str(tmp_path / "none.jsonl"), **settings), 8, 3) == steps


def test_too_few_groups_for_a_micro_batch_are_found_before_anything_is_loaded(
    write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(per_device_train_batch_size=8, dataloader_drop_last=True)
    message = "7 groups are less than one micro-batch on each of 1 ranks"
    with pytest.raises(DataError, match=message):
        make_plan(load_recipe(path), on_this_machine=False)
    assert main(["plan", str(path), "--gpus", "1"]) == 2
    assert message in capsys.readouterr().err
