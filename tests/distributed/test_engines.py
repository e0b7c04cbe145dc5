"""Two processes compute what one does: under DDP, ZeRO-2, ZeRO-3 and FSDP2, for adapters and for all weights.

Each engine is started once and does everything in that start, since importing its libraries takes longer than the runs.
"""

from __future__ import annotations

import importlib.util
import json
import signal
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
from tests.distributed import fsdp_cases, scenarios
from tests.distributed.launching import launch
from tests.distributed.scenarios import SCENARIOS
from tests.plain import assert_same_tensors, relative_error
from tests.runs import differing

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
PROBE, STOPPED, SIGNAL = "probe:lora-adamw", "stopped:lora-adamw", "signal:full-adamw"
OBJECTIVES = [f"objectives:{name}" for name in scenarios.OBJECTIVES]
KILLED = "killed:full-adamw"  # the end of its launch, which fails
FURTHER = {
    "ddp": [*OBJECTIVES, "kinds", PROBE, STOPPED],
    "zero2": [SIGNAL],
    "zero3": [*OBJECTIVES, "kinds", PROBE, STOPPED],
    "fsdp2": [OBJECTIVES[-1], PROBE, STOPPED, SIGNAL, "heads"],
}
SOME = {"zero1": ["train:full-adamw", "half:full-adamw"]}  # shares its code with ZeRO-2


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that all runs start from, and the cache of the single process's reference."""
    folder = tmp_path_factory.mktemp("shared")
    scenarios.save_models(folder)
    return folder


@pytest.fixture(scope="session")
def alone(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process computes, by job: once for all engines."""
    folder = tmp_path_factory.mktemp("alone")

    @lru_cache
    def run(job: str) -> dict[str, Any]:
        kind, _, name = job.partition(":")
        place = folder / job.replace(":", "-")
        match kind:
            case "train":
                return {**scenarios.run(name, place, shared, 1), "weights": saved(place)}
            case "reference":
                return scenarios.run_with_reference(place, shared, 1)
            case "continued":
                return {**scenarios.run_continued(place, shared, 1), "weights": saved(place)}
            case "objectives":
                return scenarios.run_objectives(name, place, shared, 1)
            case "kinds":
                return scenarios.run_kinds(place, shared, 1)
            case "probe":
                return scenarios.run_probed(name, place, shared, 1)
        raise ValueError(job)

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
    killed = [KILLED] if engine == "ddp" else []
    status, written = launch(engine, [WORKER, out, own, *jobs, *further, *killed], limit=1200)
    done = [job for job in (*jobs, *further) if (out / f"{job.replace(':', '-')}.1.pt").is_file()]
    assert done == [*jobs, *further], written[-8000:]
    assert (status != 0) is bool(killed), written[-8000:]

    def found(job: str) -> tuple[dict[str, Any], dict[str, Any]]:
        first, second = (
            torch.load(out / f"{job.replace(':', '-')}.{rank}.pt", weights_only=False) for rank in (0, 1)
        )
        return first, second

    for name, scenario in SCENARIOS.items():
        if f"train:{name}" not in jobs:
            continue
        first, second = found(f"train:{name}")
        one, weights = alone(f"train:{name}"), saved(out / name)
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
        half, one = found("half:full-adamw")[0], alone("train:full-adamw")
        losses = [[float(log["loss"]) for log in run["history"]] for run in (half, one)]
        assert losses[0] == pytest.approx(losses[1], rel=0.05)
        assert losses[0] != pytest.approx(losses[1], rel=1e-6)
    for job in (job for job in further if job in OBJECTIVES):
        with subtests.test("what an objective needs of a whole step is of all ranks", job=job):
            first, second = found(job)
            _check_ranks_are_one(first, second, alone(job))
            logged = {f"loss/{name}" for name in scenarios.OBJECTIVES[job.partition(":")[2]]["loss_type"]}
            logged |= {"kl", "reward_gap/en"} if "loss/kto" in logged else set()
            assert logged | {"rewards/margins"} <= first["history"][0].keys()
    if "kinds" in further:
        with subtests.test("either kind's mean is over all ranks"):
            first, second = found("kinds")
            _check_ranks_are_one(first, second, alone("kinds"))
            assert {
                "harmless/loss/retention",
                "harmless/reward_gap/en",
                "harmless/retain_weight/en",
            } <= first["history"][0].keys()
    if PROBE in further:
        with subtests.test("two ranks ask what one process asks, and train what they train without asking"):
            _check_probe(*found(PROBE), alone(PROBE), out)
    if STOPPED in further:
        with subtests.test("both ranks stop at the same step, and load the same best checkpoint"):
            _check_stopped(*found(STOPPED), out / "stopped")
    if SIGNAL in further:
        with subtests.test("SIGTERM on one rank saves the step, and the run resumes"):
            _check_signal(*found(SIGNAL), out)
    if "heads" in further:
        for case in fsdp_cases.CASES:
            with subtests.test("each way to wrap the head gives the gradient of all ranks", case=str(case)):
                _check_head(case, *found("heads"))
        with subtests.test("computing in bf16 does not round the log-likelihoods to bf16"):
            logps = found("heads")[0]["rounded"]
            assert logps.dtype == torch.float32
            assert not torch.equal(logps, logps.bfloat16().float())
            torch.testing.assert_close(logps, fsdp_cases.rounded_alone(0), rtol=1e-2, atol=1e-2)
    if killed:
        with subtests.test("a killed rank ends the job with a message, and another number of ranks goes on"):
            _check_killed(written, out / "killed", shared, alone("train:full-adamw")["weights"])
    if jobs is not JOBS:
        return
    with subtests.test("an explicit reference is the reference"):
        first, second = found("reference")
        expected = alone("reference")
        assert relative_error(expected["reference_gap"], alone("train:full-sgd")["reference_gap"]) > 0.1
        for part in ("reference_gap", "reference_hidden"):
            assert relative_error(first[part], expected[part]) <= 1e-6
        assert first["losses"] == second["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    with subtests.test("an adapter is trained further, in float32 and over a base in bf16"):
        expected = alone("continued")
        before = load_file(shared / "adapter" / "adapter_model.safetensors")
        update = size_of_update(expected["weights"], before)
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


def _check_probe(first: dict[str, Any], second: dict[str, Any], one: dict[str, Any], out: Path) -> None:
    assert one["prompts"] == 42 and one["failure"] is None
    assert one["before"] != one["after"]
    assert first == second
    assert first["failure"] is None
    assert first["before"] == one["before"]
    assert first["steps"] == one["steps"] == [0, 1, 2, 3]
    asked, unasked = (
        load_file(out / name / "saved" / "adapter_model.safetensors") for name in ("probed", "plain")
    )
    assert not differing(asked, unasked)


def _check_stopped(first: dict[str, Any], second: dict[str, Any], folder: Path) -> None:
    assert first == second
    assert first["stopped"] is not None and first["failure"] is None
    assert first["steps"] == 2 and first["evaluated"] == [1, 2] and first["best"] == "checkpoint-1"
    best, last, kept = (
        load_file(folder / name / "adapter_model.safetensors")
        for name in ("checkpoint-1", "checkpoint-2", "saved")
    )
    assert not differing(kept, best) and differing(kept, last)


def _check_signal(first: dict[str, Any], second: dict[str, Any], out: Path) -> None:
    assert first == second
    assert first["code"] == 128 + signal.SIGTERM
    assert first["stopped at"] == 2 and first["checkpoints"] == ["checkpoint-2"]
    assert first["steps"] == [1, 2, 3]
    assert "learning_rate" in first["refused"]
    # Both divide the same sums alike: nothing is left to rounding.
    assert_same_tensors(saved(out / "signalled"), saved(out / "whole"), 0.0)


def _check_killed(written: str, folder: Path, shared: Path, whole: dict[str, Tensor]) -> None:
    assert "Signal 9 (SIGKILL)" in written and "worker.py FAILED" in written
    assert "Another process of this run was lost" in written
    assert "checkpoint-2: run the same command again" in written
    last = last_complete_checkpoint(folder)
    assert last is not None and last.name == "checkpoint-2"
    # Two ranks had two micro-batches of a step each; one process has all four.
    trainer = scenarios.build("full-adamw", folder, shared, 1, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model(str(folder / "saved"))
    before = starting(shared, "full-adamw", {})
    assert relative_error(size_of_update(saved(folder), before), size_of_update(whole, before)) <= 1e-3


def _check_head(case: fsdp_cases.Case, first: dict[Any, Any], second: dict[Any, Any]) -> None:
    losses, gradients = fsdp_cases.step_alone(case)
    # A base in bf16 rounds differently in other batches of matrix products.
    tolerance = 2e-2 if case.adapter else 1e-5
    for rank, loss in zip((first, second), losses, strict=True):
        assert float(rank[case]["loss"]) == pytest.approx(loss, rel=tolerance)
        assert_same_tensors(rank[case]["gradients"], gradients, tolerance)


def _comparable(found: dict[str, Any]) -> list[dict[str, float]]:
    # `epoch` counts micro-batches, of which two ranks have half as many.
    other = ("pairs_per_second", "epoch")
    return [{key: float(value) for key, value in log.items() if key not in other} for log in found["history"]]
