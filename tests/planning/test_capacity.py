"""What ``mpo plan`` counts is what tensors take, and its arithmetic is the arithmetic it says."""

from __future__ import annotations

import gc
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.plan_memory import Case, config, counted, measured
from mpo.cli import main
from mpo.cli.plan import _Data, _launch, _needed, _row_lengths
from mpo.planning.capacity import (
    SHARDINGS,
    Choice,
    Memory,
    Sharding,
    best,
    describe,
    efficiency,
    largest_budget,
    memory,
    possible,
    reference_flops,
    sent_per_step,
    step_flops,
)
from mpo.planning.live_memory import LiveMemory
from mpo.planning.shapes import shape_config
from mpo.training.recipe import load_recipe
from tests.runs import lora
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
BY_NAME = {sharding.name: sharding for sharding in SHARDINGS}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_count_while_they_live_and_views_do_not(device: str) -> None:
    before = torch.zeros(1000, device=device)
    with LiveMemory() as counter:
        first = before + 1
        view = first.view(10, 100)[2:]
        assert counter.current == counter.peak == 4000
        second = view * 2
        assert counter.current == 4000 + 3200
        del first, view
        gc.collect()
        assert counter.current == 3200
        del second
        gc.collect()
        assert counter.current == 0
        assert counter.peak == 7200


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("attention", ["tree", "eager"])
def test_the_count_is_within_5_percent_of_the_tensors_of_a_real_step(
    adapter: bool, recomputed: bool, half: bool, attention: str
) -> None:
    model = config(hidden=128, layers=4, vocab=1024)
    case = Case(adapter, recomputed, length=512, trees=2, attention=attention, half=half)
    assert counted(model, case).tensors == pytest.approx(measured(model, case), rel=0.05)


def test_bounded_scores_are_kept_and_plain_ones_are_not() -> None:
    config_ = shape_config("gemma-2-9b")
    config_.num_hidden_layers = 4
    config_.layer_types = ["full_attention"] * 4

    def activations(tree_tokens: int) -> float:
        described = describe(
            config_, adapter=None, attention="tree", checkpointing=False, tree_tokens=tree_tokens
        )
        return memory(described, BY_NAME["one GPU"], 1, 4096, 4096).activations

    capped = activations(1024) - activations(512)
    config_.attn_logit_softcapping = None
    assert abs(activations(1024) - activations(512)) < 0.01 * capped


def test_sixteen_bytes_per_weight_are_divided_as_each_sharding_divides_them() -> None:
    training = describe(shape_config("llama-3.1-8b"))
    parameters, gpus = 8_030_261_248, 8

    def state(name: str) -> tuple[float, float, float]:
        found = memory(training, BY_NAME[name], gpus, 1024, 1024)
        return found.weights, found.gradients, found.optimizer

    assert state("DDP") == (4 * parameters, 4 * parameters, 8 * parameters)
    assert state("ZeRO-1") == (2 * parameters, 2 * parameters, 12 * parameters / gpus)
    assert state("ZeRO-2") == (2 * parameters, 2 * parameters / gpus, 12 * parameters / gpus)
    assert state("ZeRO-3") == (2 * parameters / gpus, 2 * parameters / gpus, 12 * parameters / gpus)
    assert state("FSDP2") == (4 * parameters / gpus, 4 * parameters / gpus, 8 * parameters / gpus)
    for name in ("FSDP2 offload", "ZeRO-3 offload"):
        assert state(name) == (0, 0, 0)
        assert memory(training, BY_NAME[name], gpus, 1024, 1024).main_memory == 16 * parameters / gpus
    assert memory(training, BY_NAME["ZeRO-3"], gpus, 1024, 1024).main_memory == 0


def test_a_frozen_base_is_held_as_it_is_stored_and_an_adapter_in_float32() -> None:
    adapter = lora(r=4)
    parameters, outside_layers = 8_030_261_248, 2 * 128256 * 4096 + 4096
    for bits, base in (
        (16, 2 * parameters),
        (4, (parameters - outside_layers) * 4.125 / 8 + 2 * outside_layers),
    ):
        training = describe(shape_config("llama-3.1-8b"), adapter=adapter, bits=bits)
        found = memory(training, BY_NAME["DDP"], 8, 1024, 1024, adapter)
        assert found.weights == base + 4 * training.trained
        assert (found.gradients, found.optimizer) == (4 * training.trained, 8 * training.trained)


def test_the_peak_is_the_largest_of_what_is_not_held_at_once() -> None:
    held = Memory(
        weights=1,
        gradients=16,
        optimizer=2,
        buffers=4,
        forward=10,
        activations=8,
        layer=3,
        lm_head=5,
        reference=0,
        main_memory=1000,
    )
    # Gradients come to be while activations go; those of an earlier micro-batch are there already.
    assert held.tensors == 1 + 2 + 4 + 16
    assert replace(held, gradients=12).tensors == 1 + 2 + 4 + 8 + 5
    assert replace(held, accumulates=True).tensors == 1 + 2 + 4 + 8 + 5 + 16
    # Casts of all weights may be there in the forward pass and gone in the other.
    assert replace(held, forward=40).tensors == 1 + 2 + 4 + 40
    # Before the first step there are neither gradients nor optimizer states.
    assert replace(held, reference=100).tensors == 1 + 4 + 100
    assert held.total == (23 + 2.5e9) / 0.95


def test_the_largest_budget_fits_and_the_next_does_not() -> None:
    training = describe(shape_config("llama-3.2-1b"))
    sharding = BY_NAME["ZeRO-2"]
    tokens, needed = largest_budget(training, sharding, 8, 24e9, 2048)
    assert tokens > 0 and needed.total <= 24e9
    assert memory(training, sharding, 8, 2 * tokens, 2048).total > 24e9
    assert largest_budget(training, sharding, 8, 1e9, 2048)[0] == 0
    # What is less than the least is of no use, and the least itself is tried.
    held = memory(training, sharding, 8, 1300, 2048)
    for spare, tokens in ((1.0, 1300), (-1.0, 0)):
        assert largest_budget(training, sharding, 8, held.total + spare, 2048, least=1300) == (tokens, held)


def test_a_row_has_room_for_a_tree() -> None:
    training = describe(shape_config("llama-3.2-1b"), tree_tokens=700)
    sharding = BY_NAME["one GPU"]
    assert memory(training, sharding, 1, 2100, 512) == memory(training, sharding, 1, 2100, 700)


def test_a_mixture_of_experts_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny("mixtral", tmp_path / "model")
    words = [str(ROOT / "recipes" / "llama_full.yaml"), "--model", str(folder), "--gpus", "2"]
    for more in ((), ("--use_peft", "true")):
        assert "Best " in plan(capsys, *words, *more)


def test_operations_are_six_per_weight_and_token_and_eight_when_recomputed() -> None:
    config_ = shape_config("llama-3.1-8b")
    multiplied = 8_030_261_248 - 128256 * 4096
    kept = describe(config_, checkpointing=False)
    assert step_flops(kept, 10, 0) == 10 * 6 * multiplied
    assert step_flops(describe(config_, checkpointing=True), 10, 0) == 10 * 8 * multiplied
    # Attention: scores and their sum over values, 2 operations each, three passes.
    attention = 4 * 4096 * 100 * 32
    assert step_flops(kept, 1, 100) - step_flops(kept, 1, 0) == 3 * attention
    again = replace(kept, checkpointing=True)
    assert step_flops(again, 1, 100) - step_flops(again, 1, 0) == 4 * attention
    # Frozen weights have no gradient of their own; the reference pass has none at all.
    assert step_flops(replace(kept, adapter=True), 10, 0) == 10 * 4 * multiplied
    assert reference_flops(kept, 10, 0) == 10 * 2 * multiplied
    assert reference_flops(again, 1, 100) - reference_flops(again, 1, 0) == attention


def test_a_head_that_is_the_embedding_is_multiplied() -> None:
    tied = describe(shape_config("llama-3.2-1b"), checkpointing=False)
    assert step_flops(tied, 1, 0) == 6 * tied.parameters


def test_what_is_sent_is_counted_as_on_paper() -> None:
    training = describe(shape_config("llama-3.1-8b"))
    size, ring = 8_030_261_248, 7 / 8
    assert sent_per_step(training, BY_NAME["DDP"], 8) == 2 * ring * 4 * size
    assert sent_per_step(training, BY_NAME["ZeRO-2"], 8) == ring * 4 * size
    assert sent_per_step(training, BY_NAME["ZeRO-3"], 8) == ring * 6 * size
    assert sent_per_step(training, BY_NAME["FSDP2"], 8) == ring * 8 * size
    # Three calls gather the weights three times.
    assert sent_per_step(training, BY_NAME["ZeRO-3"], 8, 3) == 3 * sent_per_step(
        training, BY_NAME["ZeRO-3"], 8
    )
    # ZeRO-1 and DDP sum gradients once per step, ZeRO-2 after each micro-batch; both gather weights once.
    assert sent_per_step(training, BY_NAME["DDP"], 8, 3) == 2 * ring * 4 * size
    assert sent_per_step(training, BY_NAME["ZeRO-1"], 8, 3) == ring * 4 * size
    assert sent_per_step(training, BY_NAME["ZeRO-2"], 8, 3) == ring * (3 * 2 + 2) * size
    adapted = describe(shape_config("llama-3.1-8b"), adapter=lora(r=4))
    trained = adapted.trained
    assert sent_per_step(adapted, BY_NAME["DDP"], 8) == 2 * ring * 4 * trained
    assert sent_per_step(adapted, BY_NAME["ZeRO-3"], 8) == ring * (4 * (size + trained) + 2 * trained)


def test_communication_hides_behind_a_share_of_the_computing() -> None:
    assert efficiency(1.0, 10.0, 10.0, 0.0) == 0.5
    assert efficiency(1.0, 10.0, 10.0, 1.0) == 1.0
    assert efficiency(2.0, 30.0, 10.0, 0.8) == 2.0 / (2.0 + 3.0 - 0.8 * 2.0)


def test_the_first_sharding_that_takes_a_group_is_the_best() -> None:
    training = describe(shape_config("llama-3.2-1b"))
    needed = memory(training, BY_NAME["DDP"], 2, 1024, 1024)

    def choice(tokens: int, offload: bool = False) -> Choice:
        return Choice(Sharding("", "", "torch", offload=offload), training, 1024, tokens, needed)

    one, two, three, offloaded = choice(0), choice(512), choice(4096), choice(65536, offload=True)
    assert best([one, two, three, offloaded], 400) is two
    assert best([one, two, three, offloaded], 512) is two
    assert best([one, two, three, offloaded], 9999) is three
    assert best([one, offloaded], 400) is offloaded
    assert best([one], 1) is None


def test_quantised_weights_are_not_divided_and_one_gpu_is_for_one() -> None:
    training = describe(shape_config("llama-3.2-1b"), bits=4)
    assert [s.name for s in SHARDINGS if possible(s, training, 8)] == ["DDP"]
    assert [s.name for s in SHARDINGS if possible(s, describe(shape_config("llama-3.2-1b")), 1)] == [
        "one GPU",
        "FSDP2 offload",
        "ZeRO-3 offload",
    ]


def test_every_sharding_has_its_accelerate_configuration() -> None:
    for sharding in SHARDINGS:
        assert (ROOT / "recipes" / "accelerate" / sharding.config).is_file()


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
    data = _Data("", 1, 1, 700, 300, group_tokens=700, tree_tokens=350)
    assert _needed(recipe, data) == 3 * 700


def recomputed(printed: str) -> dict[str, str]:
    return {
        line.split("  ")[0]: "yes" if " yes " in line else "no"
        for line in printed.splitlines()
        if line.split("  ")[0] in BY_NAME
    }


def test_activations_are_recomputed_where_the_trainer_would(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(ROOT / "recipes" / "llama.yaml"), "--gpus", "8", "--model", "llama-3.2-1b"]
    ample = recomputed(plan(capsys, *words, "--gpu_memory", "80"))
    assert ample["DDP"] == "no" and ample["ZeRO-3"] == "yes"
    assert recomputed(plan(capsys, *words, "--gpu_memory", "10"))["DDP"] == "yes"
    insisting = plan(capsys, *words, "--gpu_memory", "10", "--gradient_checkpointing", "false")
    assert set(recomputed(insisting).values()) == {"no"}


def test_what_cannot_hold_one_target_and_its_source_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(ROOT / "recipes" / "llama.yaml"), "--model", "llama-3.2-1b", "--gpus", "8"]
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
    recipe = load_recipe(ROOT / "recipes" / "llama_full.yaml", ())
    training = describe(shape_config("llama-3.2-1b"))
    row = _row_lengths(recipe, training.attention)[0]
    held = memory(training, sharding, 16, 1024, row)
    words = shlex.split(_launch(recipe, Choice(sharding, training, row, 1024, held), 16, 2))
    assert words[:2] == ["accelerate", "launch"]
    script = words.index("scripts/train.py")
    assert words[script:] == ["scripts/train.py", str(ROOT / "recipes" / "llama_full.yaml")]
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
