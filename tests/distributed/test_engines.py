"""Two processes compute what one does: under DDP, ZeRO-2, ZeRO-3 and FSDP2, for adapters and for all weights.

Each engine is started once and does everything in that start, since importing its libraries takes longer than the runs.
"""

from __future__ import annotations

import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from mpo.errors import ConfigError
from mpo.training.checkpoints import is_complete, last_complete_checkpoint
from tests.distributed import scenarios
from tests.distributed.launching import launch
from tests.distributed.scenarios import SCENARIOS
from tests.plain import assert_same_tensors, relative_error

WORKER = Path(__file__).parent / "worker.py"
RESUMED = ("full-adamw", "lora-adamw")
JOBS = [
    *(f"train:{name}" for name in SCENARIOS),
    *(f"resume:{name}" for name in RESUMED),
    "poison:gradient",
    "poison:loss",
    "reference",
    "continued:whole",
    "continued:half",
    "half:full-adamw",
]
FURTHER = {"ddp": ["objectives", "kinds"], "zero3": ["objectives", "kinds"]}
SOME = {"zero1": ["train:full-adamw", "half:full-adamw"]}  # shares its code with ZeRO-2


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that all runs start from, and the cache of the single process's reference."""
    folder = tmp_path_factory.mktemp("shared")
    scenarios.save_models(folder)
    return folder


@pytest.fixture(scope="session")
def alone(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process computes, by scenario."""
    folder = tmp_path_factory.mktemp("alone")

    @lru_cache
    def run(name: str) -> dict[str, Any]:
        return {**scenarios.run(name, folder / name, shared, 1), "weights": saved(folder / name)}

    return run


def saved(folder: Path) -> dict[str, Tensor]:
    """What a run has saved, as any program would read it."""
    (file,) = (folder / "saved").glob("*model.safetensors")
    return load_file(file)


def starting(shared: Path, name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if SCENARIOS[name].adapter:
        # B is zero at first; A is what both runs share, and cancels.
        return {key: torch.zeros_like(value) for key, value in weights.items() if "lora_B" in key}
    return load_file(shared / f"model-{SCENARIOS[name].family}" / "model.safetensors")


def size_of_update(weights: dict[str, Tensor], before: dict[str, Tensor]) -> Tensor:
    return torch.cat([(weights[key] - before[key]).flatten().double() for key in sorted(before)])


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_two_ranks_compute_what_one_process_does(
    engine: str, shared: Path, alone: Any, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    # A cache of their own, or the ranks would find the reference that one process has computed.
    own = tmp_path / "shared"
    own.mkdir()
    for folder in [*shared.glob("model-*"), shared / "adapter"]:
        (own / folder.name).symlink_to(folder)
    out = tmp_path / "out"
    out.mkdir()
    jobs = SOME.get(engine, JOBS)
    further = FURTHER.get(engine, [])
    status, written = launch(engine, [WORKER, out, own, *jobs, *further], limit=480)
    assert status == 0, written[-8000:]

    def found(job: str) -> tuple[dict[str, Any], dict[str, Any]]:
        first, second = (
            torch.load(out / f"{job.replace(':', '-')}.{rank}.pt", weights_only=False) for rank in (0, 1)
        )
        return first, second

    for name, scenario in SCENARIOS.items():
        if f"train:{name}" not in jobs:
            continue
        first, second = found(f"train:{name}")
        one, weights = alone(name), saved(out / name)
        with subtests.test("the reference is the same, whoever computed which source", scenario=name):
            assert relative_error(first["reference_gap"], one["reference_gap"]) <= 1e-6
            assert relative_error(first["reference_hidden"], one["reference_hidden"]) <= 1e-6
        if scenario.optimizer == "sgd":
            with subtests.test("the gradient of the first step", scenario=name):
                assert_same_tensors(first["gradients"], one["gradients"], 1e-5)
            with subtests.test("the weights after three steps", scenario=name):
                assert_same_tensors(weights, one["weights"], 1e-5)
        else:
            with subtests.test("the whole update after three steps of AdamW", scenario=name):
                before = starting(shared, name, one["weights"])
                assert weights.keys() == one["weights"].keys()
                assert (
                    relative_error(size_of_update(weights, before), size_of_update(one["weights"], before))
                    <= 1e-3
                )
        with subtests.test("scores before and after, on both ranks", scenario=name):
            for when in ("before", "after"):
                assert first[when] == second[when]
                assert [row[:3] for row in first[when]] == [row[:3] for row in one[when]]
                for actual, expected in zip(first[when], one[when], strict=True):
                    assert actual[3:] == pytest.approx(expected[3:], rel=1e-4, abs=1e-4)
            evaluated = {key: value for key, value in one["evaluated"].items() if key != "epoch"}
            assert {key: first["evaluated"][key] for key in evaluated} == pytest.approx(
                evaluated, rel=1e-4, abs=1e-4
            )
        with subtests.test("what is logged is of all ranks", scenario=name):
            assert _comparable(first) == _comparable(second)
            for actual, expected in zip(_comparable(first), _comparable(one), strict=True):
                assert actual == pytest.approx(expected, rel=1e-4, abs=1e-4)
        with subtests.test("every group is on one rank, once", scenario=name):
            groups = [group for rank in (first, second) for batch, _ in rank["groups"] for group in batch]
            assert sorted(groups) == list(range(len(scenarios.rows())))
            assert any(a[1] != b[1] for a, b in zip(first["groups"], second["groups"], strict=True))
        with subtests.test("what is saved loads on one CPU", scenario=name):
            if not scenario.adapter:
                model = AutoModelForCausalLM.from_pretrained(out / name / "saved", dtype=torch.float32)
                state = model.state_dict()
                assert all(torch.equal(state[key], value) for key, value in weights.items())
                assert json.loads((out / name / "saved" / "config.json").read_text())["architectures"] == [
                    type(model).__name__
                ]

    with subtests.test("computing in bf16 moves the weights as float32 does"):
        half, one = found("half:full-adamw")[0], alone("full-adamw")
        losses = [[float(log["loss"]) for log in run["history"]] for run in (half, one)]
        assert losses[0] == pytest.approx(losses[1], rel=0.05)
        assert losses[0] != pytest.approx(losses[1], rel=1e-6)
    if "objectives" in further:
        with subtests.test("what an objective needs of a whole step is of all ranks"):
            first, second = found("objectives")
            one = scenarios.run_objectives(tmp_path / "objectives", shared, 1)
            _check_ranks_are_one(first, second, one)
            assert {"kl", "loss/kto", "loss/sft", "rewards/margins", "reward_gap/en"} <= first["history"][
                0
            ].keys()
    if "kinds" in further:
        with subtests.test("either kind's mean is over all ranks"):
            first, second = found("kinds")
            one = scenarios.run_kinds(tmp_path / "kinds", shared, 1)
            _check_ranks_are_one(first, second, one)
            assert {"harmless/loss/retention", "harmless/reward_gap/en"} <= first["history"][0].keys()
    if jobs is not JOBS:
        return
    with subtests.test("an explicit reference is the reference"):
        first, second = found("reference")
        expected = scenarios.run_with_reference(tmp_path / "reference", shared, 1)
        assert relative_error(expected["reference_gap"], alone("full-sgd")["reference_gap"]) > 0.1
        for part in ("reference_gap", "reference_hidden"):
            assert relative_error(first[part], expected[part]) <= 1e-6
        assert first["losses"] == second["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    with subtests.test("an adapter is trained further, in float32 and over a base in bf16"):
        expected = scenarios.run_continued(tmp_path / "continued", shared, 1)
        before = load_file(shared / "adapter" / "adapter_model.safetensors")
        update = size_of_update(saved(tmp_path / "continued"), before)
        for kind, tolerance in (("whole", 1e-5), ("half", 0.3)):
            first, second = found(f"continued:{kind}")
            assert relative_error(first["reference_gap"], expected["reference_gap"]) <= tolerance
            assert first["losses"] == second["losses"]
            moved = size_of_update(saved(out / f"continued-{kind}"), before)
            assert relative_error(moved, update) <= tolerance

    for name in RESUMED:
        with subtests.test("a resumed run ends where an uninterrupted one does", scenario=name):
            assert found(f"resume:{name}")[0] == {"steps": 3}
            assert_same_tensors(saved(out / f"{name}-resumed"), saved(out / name), 1e-6)
    for poison in ("gradient", "loss"):
        with subtests.test(
            "a step that is not finite on one rank stops all, before it is taken", poison=poison
        ):
            first, second = found(f"poison:{poison}")
            assert first == second
            assert f"the {poison} of step 3 is not finite" in first["error"]
            assert first["checkpoints"] == ["checkpoint-2"]
            folder = out / f"poison-{poison}" / "checkpoint-2"
            assert is_complete(folder)
            state = load_file(folder / "model.safetensors")
            # The weights of the second step, and not those after a third.
            good = load_file(out / "full-adamw-resumed" / "checkpoint-2" / "model.safetensors")
            assert_same_tensors(state, good, 1e-6)
    with subtests.test("a checkpoint is resumed, or it is said why not, on another number of ranks"):
        folder = out / "full-adamw-resumed"
        trainer = scenarios.build("full-adamw", folder, shared, 1)
        form = "FSDP2" if engine == "fsdp2" else f"ZeRO-{engine[-1]} on 2 ranks"
        if engine == "ddp":
            assert trainer.resolve_checkpoint("auto") == str(last_complete_checkpoint(folder))
        else:
            with pytest.raises(ConfigError, match=f"{form} needs them, and this run is whole"):
                trainer.resolve_checkpoint("auto")


def _check_ranks_are_one(first: dict[str, Any], second: dict[str, Any], one: dict[str, Any]) -> None:
    """Two ranks did what one process does."""
    assert_same_tensors(first["gradients"], one["gradients"], 2e-5)
    assert _comparable(first) == _comparable(second)
    for actual, expected in zip(_comparable(first), _comparable(one), strict=True):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert first["evaluated"] == second["evaluated"] == pytest.approx(one["evaluated"], rel=1e-4)


def _comparable(found: dict[str, Any]) -> list[dict[str, float]]:
    # `epoch` counts micro-batches, of which two ranks have half as many.
    other = ("pairs_per_second", "epoch")
    return [{key: float(value) for key, value in log.items() if key not in other} for log in found["history"]]


def test_a_killed_rank_ends_the_job_with_a_message_and_another_number_of_ranks_goes_on(
    shared: Path, alone: Any, tmp_path: Path
) -> None:
    status, written = launch("ddp", [WORKER, tmp_path, shared, "killed:full-adamw"], limit=120)
    assert status != 0
    assert "Signal 9 (SIGKILL)" in written and "worker.py FAILED" in written
    assert "Another process of this run was lost" in written
    assert "checkpoint-2: run the same command again" in written
    folder = tmp_path / "killed"
    last = last_complete_checkpoint(folder)
    assert last is not None and last.name == "checkpoint-2"
    # Two ranks had two micro-batches of a step each; one process has all four.
    trainer = scenarios.build("full-adamw", folder, shared, 1, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model(str(folder / "saved"))
    before = starting(shared, "full-adamw", {})
    expected = size_of_update(alone("full-adamw")["weights"], before)
    assert relative_error(size_of_update(saved(folder), before), expected) <= 1e-3
