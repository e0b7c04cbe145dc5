"""Objectives against TRL's trainers: the same loss on the same pairs, at the counted cost, and a race that nothing stops."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmarks import flops, lengths, objectives, race, step
from benchmarks.lengths import GroupLengths, PairLengths
from benchmarks.race import BASELINES, SIDES, STAND_IN, Case
from mpo.errors import ConfigError
from tests import processes
from tests.tiny import build_model, save_tiny

LENGTHS = [
    GroupLengths(PairLengths(3, 4, 6), (PairLengths(5, 9, 2), PairLengths(2, 3, 11), PairLengths(4, 2, 1))),
    GroupLengths(PairLengths(7, 2, 2), (PairLengths(3, 6, 5),)),
]
MAX_LENGTH = 16


def case(
    loss_type: str, train_on: str = "targets", lora: int = 4, family: str = "llama", **options: Any
) -> Case:
    config = build_model(family).config
    defaults: dict[str, Any] = {
        "groups": lengths.draw_tokens(LENGTHS, config.vocab_size),
        "order": [0, 1],
        "max_length": MAX_LENGTH,
        "settings": {"max_tokens_per_call": 10**6},
    }
    return Case(loss_type, train_on, lora, config, **{**defaults, **options})


def counted_steps(side: str, of: Case) -> list[dict[str, Any]]:
    """Loss and operations of each step of one side."""
    stack, readings = ExitStack(), []
    counter: list[Any] = []

    def start() -> None:
        counter[:] = [stack.enter_context(flops.counting())]

    def stop() -> dict[str, Any]:
        stack.close()
        return {"operations": counter[0].get_total_flops()}

    race.run(side, of, wait=lambda: None, start=start, stop=stop, report=readings.append)
    return readings


@pytest.mark.parametrize(
    ("loss_type", "train_on", "lora", "family"),
    [
        ("sigmoid", "targets", 4, "llama"),
        ("sft", "both", 0, "gemma2"),
        ("exo_pair", "both", 4, "llama"),
        ("simpo", "targets", 0, "llama"),
        ("cpo", "both", 4, "llama"),
        ("orpo", "both", 4, "llama"),
        ("kto", "targets", 4, "llama"),
        ("kto", "both", 0, "llama"),
        ("mpo", "targets", 4, "llama"),
        ("mlc", "targets", 4, "llama"),
    ],
)
def test_both_trainers_take_the_same_steps_at_the_cost_that_is_counted(
    loss_type: str, train_on: str, lora: int, family: str
) -> None:
    of = case(loss_type, train_on, lora, family)
    costs = flops.measure(of.model, lora)
    found = {side: counted_steps(side, of) for side in SIDES}
    others = objectives.mismatched(LENGTHS, MAX_LENGTH)
    for place, group in enumerate(LENGTHS):
        calls = objectives.calls(loss_type, group, train_on, others[place], MAX_LENGTH)
        here = sum(call.operations(costs) for call in calls.here)
        # What the counter sees of an objective itself is the gradient of MLC's singular values.
        assert found["here"][place]["operations"] == pytest.approx(
            here, rel=1e-3 if loss_type == "mlc" else 0
        )
        rows = 2 * len(of.pairs(place))
        # Without Triton, TRL's fused head reads every position but a row's last.
        theirs = [
            call if call.head == "logits_train" else call._replace(head_tokens=call.tokens - rows)
            for call in calls.trl
        ]
        assert found["TRL"][place]["operations"] == sum(call.operations(costs) for call in theirs)
        if loss_type in BASELINES:
            assert found["here"][place]["loss"] == pytest.approx(found["TRL"][place]["loss"], rel=1e-4)


def test_a_race_measures_each_process_and_says_what_failed_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    context = processes.context()  # made before the function that makes it is replaced
    monkeypatch.setattr(race.multiprocessing, "get_context", lambda _: context)
    of = case("sigmoid", order=[0, 0, 1])
    found = race.race(of)
    result = objectives.record(of, found, warmup=1)
    for side in SIDES:
        assert found[side]["error"] is None
        assert len(found[side]["steps"]) == 3
        assert found[side]["pairs_per_second"] > 0
    assert set(result["trl_over_here"]) == {"seconds", "cpu_seconds", "seconds_with_preparation_one_epoch"}
    broken = case("sigmoid", order=[0], settings={"max_targets_per_group": -1})
    found = race.race(broken, ["here"])
    assert found["here"]["error"].startswith("ConfigError")
    assert "trl_over_here" not in objectives.record(broken, found, warmup=0)


def test_every_objective_of_trl_is_named_with_its_trainer() -> None:
    from mpo.training import objectives as own

    assert set(own._known) >= set(race.NAMES)
    assert {name for name in own._known if name not in race.NAMES} == {"gap_retention"}  # of no `loss_type`
    assert race.baseline("rdpo") == STAND_IN
    assert all(race.baseline(name) != STAND_IN for name in BASELINES)


def test_ratios_are_medians_of_the_same_step() -> None:
    of = case("sigmoid", order=[0, 0, 1])
    readings = {"here": (9, 1, 2), "TRL": (9, 4, 2)}
    found: dict[str, dict[str, Any]] = {
        side: {
            "steps": [{"seconds": s, "cpu_seconds": s, "peak_bytes": 10 * s} for s in seconds],
            "preparation": 3.0,
            "error": None,
        }
        for side, seconds in readings.items()
    }
    result = objectives.record(of, found, warmup=1)
    assert result["trl_over_here"]["seconds"] == 2.5
    assert result["trl_over_here"]["seconds_with_preparation_one_epoch"] == 3 / (1.5 + 1.5)
    assert found["TRL"]["pairs_per_second"] == (3 / 4 + 1 / 2) / 2
    assert result["here_over_trl_in_peak_memory"] == 1


def test_the_command_keeps_what_it_has_measured_and_writes_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny("llama", tmp_path / "model")
    table = tmp_path / "lengths.csv"
    table.write_text(
        "source_id,source_prompt,source_chosen,source_rejected,target_prompt,target_chosen,target_rejected\n"
        "0,3,4,5,4,5,6\n0,3,4,5,6,7,8\n1,2,2,2,3,3,3\n"
    )
    out = tmp_path / "objectives.json"
    raced = []

    def readings(of: Case) -> dict[str, Any]:
        raced.append(of.loss_type)
        reading = {"seconds": 2.0, "cpu_seconds": 2.0, "peak_bytes": 2**30, "loss": 1.0}
        return {
            side: {"steps": [reading] * len(of.order), "preparation": 1.0, "error": None} for side in SIDES
        }

    costs = flops.measure(build_model("llama").config, 2)
    monkeypatch.setattr(flops, "costs_of", lambda shape, lora: costs)
    monkeypatch.setattr(objectives, "race", readings)

    def command(*loss_types: str) -> dict[str, Any]:
        arguments = ["--model", model, "--lengths", table, "--groups", 2, "--loss_type", *loss_types]
        arguments += ["--lora", 2, 0, "--device", "cpu", "--shapes", "gemma-3-270m", "--out", out]
        monkeypatch.setattr(sys, "argv", ["step", *map(str, arguments)])
        step.main()
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    result = command("sigmoid")
    assert raced == ["sigmoid"] * 4
    result = command("sigmoid", "mpo")
    assert raced == ["sigmoid"] * 4 + ["mpo"] * 2
    assert len(result["measured"]) == 6
    assert result["provenance"]["libraries"]["torch"]
    page = out.with_suffix(".md").read_text()
    assert "| sigmoid, source too, full | DPO sigmoid |" in page
    assert "mpo, targets, LoRA 2 | DPO sigmoid, another objective |" in page
    counts = result["counted"]["gemma-3-270m"]["sigmoid, targets, LoRA 2"]
    assert f"{counts['trl_over_here']:.2f}" in page and counts["trl_over_here"] > 1
    assert "Counted operations" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="`--steps` is -1"):
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--steps", "-1"])
        step.main()
