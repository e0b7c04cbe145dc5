"""The Accelerate configurations say what the installed Accelerate understands, and the SLURM launcher has its three places."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from mpo.planning.memory import SHARDINGS, Sharding

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "accelerate"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
# What `accelerate launch` calls the parts of `deepspeed_config` and `fsdp_config` is what its own options are called.
OPTIONS = {action.dest for action in launch_command_parser()._actions}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_knows_every_key_of_a_configuration(path: Path) -> None:
    config: Any = load_config_from_file(str(path))  # refuses unknown keys of the first level only
    for part in (config.deepspeed_config, config.fsdp_config):
        assert set(part) <= OPTIONS
    engine = str(config.distributed_type.value)
    assert bool(config.deepspeed_config) == (engine == "DEEPSPEED")
    assert bool(config.fsdp_config) == (engine == "FSDP")
    header = path.read_text(encoding="utf-8").split("\ncompute_environment")[0]
    assert f"--config_file recipes/accelerate/{path.name}" in header
    for recipe in re.findall(r"recipes/\w+\.yaml", header):
        assert (ROOT / recipe).is_file()


@pytest.mark.parametrize("sharding", SHARDINGS, ids=lambda sharding: sharding.name)
def test_a_configuration_divides_what_the_plan_counts_as_divided(sharding: Sharding) -> None:
    config = yaml.safe_load((FOLDER / sharding.config).read_text(encoding="utf-8"))
    # What a recipe decides is not decided a second time.
    assert config["mixed_precision"] == "no"
    if sharding.engine == "deepspeed":
        part = config["deepspeed_config"]
        assert part["gradient_clipping"] == part["gradient_accumulation_steps"] == "auto"
        assert part["zero_stage"] == (3 if sharding.weights else 2 if sharding.gradients else 1)
        assert part["zero3_init_flag"] is part.get("zero3_save_16bit_model", False) is sharding.weights
        place = "cpu" if sharding.offload else "none"
        assert part["offload_optimizer_device"] == part["offload_param_device"] == place
    elif sharding.engine == "fsdp2":
        part = config["fsdp_config"]
        assert part["fsdp_version"] == 2
        assert part["fsdp_reshard_after_forward"] is True
        assert part["fsdp_offload_params"] is sharding.offload
        assert part["fsdp_activation_checkpointing"] is False
    else:
        assert config["distributed_type"] == ("NO" if sharding.one_gpu else "MULTI_GPU")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*_multi_node.yaml")), ids=lambda path: path.stem)
def test_several_machines_change_nothing_but_the_launch(path: Path) -> None:
    several = yaml.safe_load(path.read_text(encoding="utf-8"))
    one = yaml.safe_load((FOLDER / path.name.replace("_multi_node", "")).read_text(encoding="utf-8"))
    assert several["num_machines"] > 1 and several["num_processes"] % several["num_machines"] == 0
    launch = {"num_machines", "num_processes", "main_process_ip", "main_process_port"}
    assert {key for key in several if several[key] != one.get(key)} <= launch | {"deepspeed_config"}
    if "deepspeed_config" in one:
        assert several["deepspeed_config"] == {
            **one["deepspeed_config"],
            "deepspeed_multinode_launcher": "standard",
        }


def test_the_slurm_launcher_is_edited_in_three_places() -> None:
    text = (FOLDER / "slurm.sh").read_text(encoding="utf-8")
    assert re.findall(r"# <- (\d)\.", text) == ["1", "2", "3"]
    (config,) = re.findall(r"^config=(\S+)", text, re.MULTILINE)
    (recipe,) = re.findall(r"^recipe=\((\S+)", text, re.MULTILINE)
    assert (ROOT / config).is_file() and (ROOT / recipe).is_file()
    launched = set(re.findall(r"--(\w+) \"\$", text))
    assert launched == {
        "config_file",
        "num_machines",
        "num_processes",
        "machine_rank",
        "main_process_ip",
        "main_process_port",
    }
    assert launched <= OPTIONS
