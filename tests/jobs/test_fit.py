"""``mpo plan``: its text follows from what is counted."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mpo.cli import main
from mpo.common.machine import Accelerator
from mpo.jobs import fit
from mpo.jobs.fit import Machine, launch_command, machine_or_this
from mpo.modeling.loading import ModelSource, load_tokenizer
from mpo.planning.fitting import Choice, row_lengths
from mpo.planning.known_models import shape_config
from mpo.planning.memory import SHARDINGS, Sharding, describe, memory
from mpo.planning.throughput import efficiency, reference_flops, sent_per_step, step_flops
from mpo.training.recipe import load_recipe
from mpo.training.workload import largest_micro_batch
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
BY_NAME = {sharding.name: sharding for sharding in SHARDINGS}


def test_a_mixture_of_experts_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny("mixtral", tmp_path / "model")
    words = [str(ROOT / "recipes" / "llama_full.yaml"), "--model", str(folder), "--gpus", "2"]
    for more in ((), ("--use_peft", "true")):
        assert "Best " in plan(capsys, *words, *more)


def test_every_sharding_has_its_accelerate_configuration() -> None:
    folder = ROOT / "recipes" / "accelerate"
    for sharding in SHARDINGS:
        assert (folder / sharding.config).is_file()
        several = folder / sharding.config.replace(".yaml", "_multi_node.yaml")
        assert several.is_file() is sharding.multi_node


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_a_folder_needs_nothing_but_its_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = save_tiny("qwen2", tmp_path / "whole")
    folder = tmp_path / "config-only"
    folder.mkdir()
    shutil.copy(whole / "config.json", folder)
    recipe = str(ROOT / "recipes" / "qwen_full.yaml")
    printed = plan(capsys, recipe, "--gpus", "8", "--gpu-memory", "24", "--model", str(folder))
    assert "ZeRO-2" in printed and "accelerate launch --config_file recipes/accelerate/" in printed


def test_the_data_are_counted_where_they_are_at_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    recipe = str(ROOT / "recipes" / "smoke.yaml")
    printed = plan(capsys, recipe, "--gpus", "2", "--gpu_memory", "24", "--model_name_or_path", str(folder))
    assert "pairs.jsonl: 6 groups, 36 pairs" in printed
    assert "3 optimizer steps" in printed


def test_a_micro_batch_of_several_groups_must_have_room_for_all() -> None:
    words = ("--per_device_train_batch_size", "3")
    recipe = load_recipe(ROOT / "recipes" / "llama_full.yaml", words)
    assert largest_micro_batch(np.array([700, 650, 700, 700, 100]), recipe.training) == 3 * 700


def lines(printed: str) -> dict[str, str]:
    """The facts below the table, by their names."""
    found = (re.match(r"(\w+) +(.+)", line) for line in printed.splitlines())
    return {match[1]: match[2] for match in found if match}


def test_what_is_said_of_micro_batches_by_tokens_is_about_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(ROOT / "recipes" / "llama_mpo.yaml"), "--model", "llama-3.2-1b", "--gpus", "8"]
    ample = plan(capsys, *words, "--max_tokens_per_batch", "12000", "--scaling")
    facts = lines(ample)
    room = re.fullmatch(r"for `max_tokens_per_batch: (\d+)`, .*", facts["Room"])
    assert room is not None and int(room[1]) > 12_000
    # Two groups of 4,550 tokens in each micro-batch, on eight GPUs; 100 groups in all.
    assert facts["Steps"].startswith("14 optimizer steps, 910,000 tokens in 2 epochs")
    assert "9,100 tokens" in next(line for line in ample.splitlines() if "on more GPUs" in line)

    narrow = ("--gpu_memory", "8", "--gradient_checkpointing", "true")
    tight = lines(plan(capsys, *words, *narrow, "--max_tokens_per_batch", "100000"))
    said = re.fullmatch(
        r"a micro-batch has up to 100,000 tokens\. Set `max_tokens_per_batch: (\d+)`", tight["Note"]
    )
    assert said is not None and 4550 <= int(said[1]) < 100_000
    assert f"a micro-batch of {int(said[1]):,} tokens" in tight["Best"]
    groups = lines(plan(capsys, *words, *narrow, "--per_device_train_batch_size", "30"))
    said = re.fullmatch(
        r"a micro-batch of 30 groups has up to 136,500 tokens\. Set `per_device_train_batch_size: (\d+)` and "
        r"`gradient_accumulation_steps: (\d+)`",
        groups["Note"],
    )
    assert said is not None and int(said[1]) * int(said[2]) >= 30 > int(said[1]) * (int(said[2]) - 1)


def test_what_is_said_of_a_micro_batch_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(ROOT / "recipes" / "llama_mpo.yaml"), "--gpus", "1", "--per_device_train_batch_size", "2"]
    note = lines(plan(capsys, *words, "--gpu_memory", "24"))["Note"]
    assert re.search(
        r"up to 9,100 tokens\. Set `max_tokens_per_call: \d+`, which changes nothing else$", note
    )
    # Of one group, on several GPUs: nothing smaller is left but a part of it.
    small = ["--model", "llama-3.2-1b", "--gpu_memory", "8", "--gradient_checkpointing", "true"]
    words = [words[0], "--gpus", "8", *small, "--tree_tokens", "3000"]
    note = lines(plan(capsys, *words))["Note"]
    assert re.match(
        r"a micro-batch of 1 group has .*\. Divide groups with `max_targets_per_group: [1-5]`", note
    )


def test_data_that_are_not_here_are_assumed_to_have_both_kinds_where_a_step_has(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        str(ROOT / "recipes" / "llama.yaml"),
        "--model",
        "llama-3.2-1b",
        "--gpus",
        "1",
        "--max_steps",
        "-1",
    ]
    facts = lines(plan(capsys, *words, "--num_train_epochs", "1", "--harmless_share", "0.25"))
    assert facts["Data"].endswith("100 groups of 6 pairs, 650 tokens per tree, 25% of them harmless")
    # 75 harmful groups and 25 harmless ones, two in a step, of seven trees each.
    assert facts["Steps"] == "50 optimizer steps, 455,000 tokens in 1 epochs"


def test_a_tokenizer_in_the_hubs_cache_is_at_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    recipe = str(ROOT / "recipes" / "smoke.yaml")
    words = [recipe, "--gpus", "1", "--model", str(folder), "--model_name_or_path", "org/tiny"]
    assert "assumed, since " in plan(capsys, *words)
    cached = str(folder / "tokenizer_config.json")
    monkeypatch.setattr(fit, "try_to_load_from_cache", lambda *_, **__: cached)
    monkeypatch.setattr(fit, "load_tokenizer", lambda *_: load_tokenizer(ModelSource(str(folder))))
    assert "pairs.jsonl: 6 groups, 36 pairs" in plan(capsys, *words)


def test_machines_have_nodes_of_any_size(capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(ROOT / "recipes" / "llama_mpo.yaml"), "--model", "llama-3.2-1b", "--gpus_per_node", "6"]
    assert "12 x 80 GB" in plan(capsys, *words, "--machines", "12x80")


def recomputed(printed: str) -> dict[str, str]:
    return {
        line.split("  ")[0]: "yes" if " yes " in line else "no"
        for line in printed.splitlines()
        if line.split("  ")[0] in BY_NAME
    }


def test_activations_are_recomputed_where_the_trainer_would(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(ROOT / "recipes" / "llama_mpo.yaml"), "--gpus", "8", "--model", "llama-3.2-1b"]
    ample = recomputed(plan(capsys, *words, "--gpu_memory", "80"))
    assert ample["DDP"] == "no" and ample["ZeRO-3"] == "yes"
    assert recomputed(plan(capsys, *words, "--gpu_memory", "10"))["DDP"] == "yes"
    insisting = plan(capsys, *words, "--gpu_memory", "10", "--gradient_checkpointing", "false")
    assert set(recomputed(insisting).values()) == {"no"}


def test_what_cannot_hold_one_target_and_its_source_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(ROOT / "recipes" / "llama_mpo.yaml"), "--model", "llama-3.2-1b", "--gpus", "8"]
    words += ["--gpu_memory", "10"]

    def tokens(*more: str) -> int:
        row = next(line for line in plan(capsys, *words, *more).splitlines() if line.startswith("DDP"))
        return int(row.split()[-1].replace(",", ""))

    held = tokens("--tree_tokens", "650")
    assert held > 2 * 650
    assert tokens("--tree_tokens", "20000") == 0


def test_machines_are_compared_by_their_best_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(ROOT / "recipes" / "llama_full.yaml"), "--model", "llama-3.2-1b"]
    printed = plan(capsys, *words, "--machines", "1x2", "1x24", "8x24")
    rows = dict(re.findall(r"^(\d x \d+ GB) +(\S+ \S+|\S+) ", printed, re.MULTILINE))
    assert list(rows) == ["1 x 2 GB", "1 x 24 GB", "8 x 24 GB"]
    assert rows["1 x 2 GB"] == "nothing fits"
    alone = plan(capsys, *words, "--gpus", "8", "--gpu_memory", "24")
    assert f"Best    {rows['8 x 24 GB']}: " in alone


def test_the_plan_for_several_machines_launches_and_sends_between_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(ROOT / "recipes" / "llama_full.yaml"), "--gpus", "16", "--gpu_memory", "40", "--scaling"]
    steps = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    printed = plan(capsys, *words, *steps, "--groups", "2048", "--targets", "1", "--utilisation", "0.5")
    (name,) = re.findall(r"^Best +(\S+): a micro-batch", printed, re.MULTILINE)
    sharding, training = BY_NAME[name], describe(shape_config("llama-3.1-8b"))
    # Two epochs of 2048 groups, 16 x 2 x 4 in a step; each has two trees, and the whole source pass one.
    assert "32 optimizer steps, 5,324,800 tokens in 2 epochs" in printed
    work = step_flops(training, 5_324_800, 325) + reference_flops(training, 2048 * 650, 325)
    minutes = work / (16 * 312e12 * 0.5) / 60
    assert f"{minutes:.0f} minutes at 50% of 312 TFLOP/s" in printed
    sent = sent_per_step(training, sharding, 16, 4)
    assert sent > sent_per_step(training, sharding, 16), (
        "accumulation costs nothing here, so this shows nothing"
    )
    assert f"{sent / 1e9:.3g} GB by each GPU in a step" in printed
    # Inside a machine at 300 GB/s, between machines at 25.
    computing = step_flops(training, 2 * 2 * 650, 325) / (312e12 * 0.5)
    for gpus, link in ((8, 300e9), (16, 25e9)):
        row = next(line.split() for line in printed.splitlines() if re.match(rf"{gpus} +\d", line))
        sent = sent_per_step(training, sharding, gpus)
        assert row[1:3] == [f"{sent / 1e9:.1f}", f"{sent / link:.2f}"]
        assert row[3:5] == [f"{efficiency(computing, sent, link, overlap):.0%}" for overlap in (0, 0.8)]


@pytest.mark.parametrize("sharding", SHARDINGS[1:], ids=lambda sharding: sharding.name)
def test_several_machines_are_launched_without_a_launcher_of_deepspeeds_own(sharding: Sharding) -> None:
    overrides = ("--output_dir", "runs/two words")
    recipe = load_recipe(ROOT / "recipes" / "llama_full.yaml", overrides)
    training = describe(shape_config("llama-3.2-1b"))
    row = row_lengths(None, training.attention)[0]
    held = memory(training, sharding, 16, 1024, row)
    choice = Choice(sharding, training, row, 1024, held)
    words = shlex.split(launch_command(recipe, choice, Machine(16, 80, 8), row))
    assert words[:2] == ["accelerate", "launch"]
    script = words.index("scripts/train.py")
    assert words[script:] == ["scripts/train.py", str(ROOT / "recipes" / "llama_full.yaml"), *overrides]
    options = dict(zip(words[2:script:2], words[3:script:2], strict=True))
    assert (options["--num_machines"], options["--num_processes"]) == ("2", "16")
    assert options["--machine_rank"] == "RANK"
    config = ROOT / options["--config_file"]
    assert config.name in (sharding.config, sharding.config.replace(".yaml", "_multi_node.yaml"))
    part = yaml.safe_load(config.read_text(encoding="utf-8")).get("deepspeed_config", {})
    chosen = options.get("--deepspeed_multinode_launcher", part.get("deepspeed_multinode_launcher"))
    assert chosen == ("standard" if sharding.engine == "deepspeed" else None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--machines", "8x80", "80"], "`--machines` has '80'; expected"),
        (["--machines", "12x80"], "not a multiple of the 8 GPUs"),
        (["--gpus", "0"], "`--gpus` is 0"),
        (["--utilisation", "2"], "`--utilisation` is 2"),
        (["--gpus", "12"], "not a multiple of the 8 GPUs"),
        (["--lerning_rate", "1"], "lerning_rate"),
    ],
)
def test_what_cannot_be_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(ROOT / "recipes" / "llama_full.yaml"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_misspelt_option_of_the_plan_is_named_with_the_nearest(capsys: pytest.CaptureFixture[Any]) -> None:
    assert main(["plan", str(ROOT / "recipes" / "llama_full.yaml"), "--gpu", "8"]) == 2
    message = capsys.readouterr().err
    assert (
        "`--gpu` is neither an option of `mpo plan` nor a key of a recipe; did you mean `--gpus`?" in message
    )


def test_only_the_plan_takes_keys_of_a_recipe_among_its_options(capsys: pytest.CaptureFixture[Any]) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "adapter", "--out", "folder", "--learning_rate", "1"])
    assert "unrecognized arguments: --learning_rate 1" in capsys.readouterr().err


def test_the_machine_is_this_one_where_nothing_is_said_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cards = (Accelerator("a", 24 * 10**9, True), Accelerator("b", 16 * 10**9, True))
    monkeypatch.setattr("mpo.jobs.fit.accelerators", lambda: cards)
    assert machine_or_this(None, None, 8) == Machine(2, 16, 8)
    assert machine_or_this(1, None, 8) == Machine(1, 16, 8)
    assert machine_or_this(None, 80, 8) == Machine(2, 80, 8)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("mpo.jobs.fit.accelerators", lambda: ())
    assert machine_or_this(None, None, 8) == Machine(8, 80, 8)
    assert "8 are assumed" in capsys.readouterr().out
