"""All formulations compute the trainer's loss and gradient, and cost what the counting says they do."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import flops, lengths, step
from benchmarks.formulations import NAMES, Setting, available, build_setting, prepare
from benchmarks.lengths import GroupLengths, PairLengths
from mpo.modeling.head import attach_reward_gap_head
from mpo.training.trainer import MPOTrainer
from tests import runs
from tests.plain import relative_error
from tests.tiny import build_model, random_groups, save_tiny

CPU = torch.device("cpu")
LENGTHS = [
    GroupLengths(PairLengths(3, 4, 6), (PairLengths(5, 9, 2), PairLengths(2, 3, 11), PairLengths(4, 1, 1))),
    GroupLengths(PairLengths(7, 2, 2), (PairLengths(3, 6, 5),)),
]


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def take_gradients(model: Any) -> Tensor:
    """The gradient as one vector; the model has none afterwards."""
    found = torch.cat([p.grad.flatten() for p in trained(model).values() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


def trainer_of(family: str, folder: Path, lora: bool) -> MPOTrainer:
    options = {"peft_config": runs.lora()} if lora else {}
    return runs.trainer(
        save_tiny(family, folder / "model"),
        folder,
        random_groups(1, 2, (2, 3), words=(1, 6)),
        beta=1.5,
        max_grad_norm=0,
        per_device_train_batch_size=2,
        **options,
    )


@pytest.mark.parametrize(("family", "lora"), [("llama", True), ("gemma2", True), ("qwen2", False)])
def test_every_formulation_gives_the_trainers_loss_and_gradient(
    family: str, lora: bool, tmp_path: Path
) -> None:
    trainer = trainer_of(family, tmp_path, lora)
    reference = None if lora else build_model(family)
    if reference is not None:
        attach_reward_gap_head(reference)
    trainer._prepare_references()
    torch.manual_seed(5)
    with torch.no_grad():  # away from the reference, so that nothing is zero
        for parameter in trained(trainer.model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    (batch,) = trainer.get_train_dataloader()
    trainer.model.zero_grad()
    expected = trainer.training_step(trainer.model, batch, batch["num_pairs"])
    gradient = take_gradients(trainer.model)

    setting = Setting(trainer.model, reference, beta=1.5)
    groups = list(trainer.train_dataset.with_format(None))
    for group in groups:
        group["target_language"] = ["xx"] * len(group["target_language"])
    assert relative_error(expected, torch.zeros_like(expected)) > 1e-3
    names = available(trainer.model.config, CPU)
    if family != "gemma2":  # whose scores are bounded
        names.append("trees (varlen)")
    for name in names:
        if name == "TRL DPO":
            continue
        for options in ({}, {"row_tokens": 40}, {"call_tokens": 60}):
            found = prepare(name, setting, groups, folder=str(tmp_path), **options)(groups)
            assert relative_error(found, expected) <= 1e-5, name
            assert relative_error(take_gradients(trainer.model), gradient) <= 1e-4, name


@pytest.mark.parametrize("lora", [4, 0])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_step_costs_what_is_counted(family: str, lora: int, tmp_path: Path) -> None:
    config = build_model(family).config
    costs = flops.measure(config, lora)
    setting = build_setting(config, device=CPU, dtype=torch.float32, lora=lora)
    groups = lengths.draw_tokens(LENGTHS, config.vocab_size)
    counted_as = {
        "trees (tree)": "trees",
        "trees (sdpa)": "trees, masked rows",
        "trees (eager)": "trees, masked rows",
    }
    names = available(config, CPU)
    names.append(names.pop(names.index("TRL DPO")))  # it changes the policy's adapters
    for name in names:
        run = prepare(name, setting, groups, folder=str(tmp_path), row_tokens=48, call_tokens=0)
        for sizes, group in zip(LENGTHS, groups, strict=True):
            calls = flops.calls(counted_as.get(name, name), sizes, row_tokens=48)
            if name == "TRL DPO":
                # Without Triton, TRL's head reads every position but a row's last.
                rows = 2 * len(sizes.targets)
                calls = [call._replace(head_tokens=call.tokens - rows) for call in calls]
            expected = sum(call.operations(costs) for call in calls)
            assert flops.count(lambda run=run, group=group: run([group])) == expected, name


def test_the_reference_pass_costs_what_is_counted(tmp_path: Path) -> None:
    config = build_model("gemma2").config
    costs = flops.measure(config, 4)
    setting = build_setting(config, device=CPU, dtype=torch.float32, lora=4)
    groups = lengths.draw_tokens(LENGTHS, config.vocab_size)
    expected = sum(
        call.operations(costs) for sizes in LENGTHS for call in flops.calls(flops.REFERENCE, sizes)
    )
    found = flops.count(lambda: prepare("trees (tree)", setting, groups, folder=str(tmp_path)))
    assert found == expected


def test_full_fine_tuning_keeps_a_reference_that_does_not_move() -> None:
    setting = build_setting(build_model("llama").config, device=CPU, dtype=torch.bfloat16, lora=0)
    assert setting.reference is not None
    assert {p.dtype for p in setting.policy.parameters()} == {torch.float32}
    assert {p.dtype for p in setting.reference.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in setting.reference.parameters())


def test_a_formulation_that_runs_out_of_memory_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("no room\nfor it")

    monkeypatch.setattr("benchmarks.formulations.official", full)
    setting = build_setting(build_model("llama").config, device=CPU, dtype=torch.float32, lora=2)
    groups = lengths.draw_tokens(LENGTHS, 500)
    names = ["official", "trees (tree)"]
    found = step.measure(setting, groups, names, rounds=2, warmup=1, folder=str(tmp_path))
    assert found["official"].error == "out of memory: no room"
    assert found["official"].seconds == []
    assert len(found["trees (tree)"].seconds) == 2 * len(groups)
    assert found["trees (tree)"].error is None


def stubbed(
    monkeypatch: pytest.MonkeyPatch, steps: dict[str, Callable[[], None]], **options: Any
) -> dict[str, step.Measured]:
    """A measurement of formulations that only call a function."""

    def prepare(name: str, *arguments: Any, **named: Any) -> Callable[[Any], Tensor]:
        def run(groups: Any) -> Tensor:
            steps[name]()
            return torch.zeros(())

        return run

    monkeypatch.setattr("benchmarks.formulations.prepare", prepare)
    setting = Setting(torch.nn.Linear(1, 1), None)
    monkeypatch.setattr(Setting, "device", CPU)
    groups = lengths.draw_tokens(LENGTHS, 500)
    return step.measure(setting, groups, list(steps), rounds=2, warmup=1, keep_memory=False, **options)


@pytest.mark.parametrize("good_steps", [0, 3])
def test_a_formulation_that_fails_is_reported_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, good_steps: int
) -> None:
    calls = []

    def fails() -> None:
        calls.append(1)
        if len(calls) > good_steps:
            raise RuntimeError("no such kernel\nfor these heads")

    found = stubbed(monkeypatch, {"fails": fails, "works": lambda: None})
    assert found["fails"].error == "RuntimeError: no such kernel" and len(calls) == good_steps + 1
    assert found["works"].error is None and len(found["works"].seconds) == 2 * len(LENGTHS)


def test_a_slow_formulation_costs_those_before_it_no_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(step.time, "monotonic", lambda: clock[0])
    reports: list[dict[str, int]] = []

    def slow() -> None:
        assert reports == [{"quick": len(LENGTHS), "slow": 0}]
        clock[0] += 100

    found = stubbed(
        monkeypatch,
        {"quick": lambda: None, "slow": slow},
        deadline=50.0,
        report=lambda found: reports.append({name: len(entry.seconds) for name, entry in found.items()}),
    )
    assert found["quick"].error is None and len(found["quick"].seconds) == len(LENGTHS)
    assert found["slow"].error == "no time was left for a round" and found["slow"].seconds == []


def test_with_a_deadline_there_are_as_many_rounds_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"one": lambda: None, "other": lambda: None}
    for options in ({}, {"deadline": time.monotonic() + 600}):
        found = stubbed(monkeypatch, steps, **options)
        assert {len(entry.seconds) for entry in found.values()} == {2 * len(LENGTHS)}


@pytest.mark.parametrize(("family", "lora"), [("llama", 4), ("gemma2", 0)])
def test_costs_of_alike_layers_are_those_of_the_whole_model(family: str, lora: int) -> None:
    config = build_model(family, layers=6).config
    assert step.costs_of_alike_layers(config, lora) == flops.measure(config, lora)


def test_groups_are_taken_at_quantiles_of_their_tokens() -> None:
    groups = [GroupLengths(PairLengths(1, 1, 1), (PairLengths(n, 1, 1),)) for n in (4, 1, 3, 2)]
    assert [g.targets[0].prompt for g in step.spread(groups, [0, 0.5, 1])] == [1, 3, 4]
    assert [g.targets[0].prompt for g in step.spread(groups, [0.125, 0.375, 0.625, 0.875])] == [1, 2, 3, 4]


def test_times_are_means_over_groups_of_medians_over_rounds() -> None:
    assert step._mean_of_medians([1.0, 10.0, 2.0, 30.0, 9.0, 20.0], groups=2) == (2.0 + 20.0) / 2
    assert step._mean_of_medians([1.0, 10.0, 2.0], groups=2) == 5.5
    assert step._mean_of_medians([1.0], groups=2) is None


def test_a_profile_names_the_operators_and_leaves_no_gradient(tmp_path: Path) -> None:
    setting = build_setting(build_model("llama").config, device=CPU, dtype=torch.float32, lora=2)
    groups = lengths.draw_tokens(LENGTHS, 500)
    table = step.profiled("trees (tree)", setting, groups, folder=str(tmp_path))
    assert any("mm" in row[0] for row in table.rows)
    shares = [float(row[1].rstrip("%")) for row in table.rows]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 100.5
    assert all(parameter.grad is None for parameter in setting.policy.parameters())


def test_the_command_prints_a_table_and_writes_what_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny("llama", tmp_path / "model")
    table = tmp_path / "lengths.csv"
    header = (
        "source_id,source_prompt,source_chosen,source_rejected,target_prompt,target_chosen,target_rejected"
    )
    table.write_text(f"{header}\n0,3,4,5,4,5,6\n0,3,4,5,6,7,8\n1,2,2,2,3,3,3\n")
    out = tmp_path / "step.json"
    arguments = ["--model", model, "--lengths", table, "--groups", "2", "--rounds", "1", "--lora", "2"]
    monkeypatch.setattr(sys, "argv", ["step", *map(str, arguments), "--device", "cpu", "--out", str(out)])
    step.main()
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    for entry in result["formulations"]:
        assert entry["formulation"] in printed
        assert entry["error"] is None
        assert len(entry["seconds_of_steps"]) == 2
        assert entry["pairs_per_second"] == pytest.approx(1.5 / entry["seconds_per_step"])
    assert {entry["formulation"] for entry in result["formulations"]} == set(NAMES) - {
        "trees (flex_attention)",
        "trees (varlen)",
    }
    own = [e["losses"] for e in result["formulations"] if e["formulation"] != "TRL DPO"]
    for losses in own:
        assert losses == pytest.approx(own[0], rel=1e-4)
    assert result["provenance"]["libraries"]["torch"]
    assert not result["random_weights"]
