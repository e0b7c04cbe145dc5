"""Two ranks ask a model what one process asks it, each a part of the prompts, and train what they train without asking."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import scenarios
from tests.distributed.launching import launch
from tests.runs import differing

WORKER = Path(__file__).parent / "worker.py"
SCENARIO = "lora-adamw"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    scenarios.save_models(folder)
    return folder


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_two_ranks_ask_what_one_process_asks_and_train_what_they_train(
    engine: str, shared: Path, tmp_path: Path
) -> None:
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    alone = scenarios.run_probed(SCENARIO, tmp_path / "alone", shared, 1)
    assert alone["prompts"] == 42 and alone["failure"] is None
    assert alone["before"] != alone["after"]

    status, written = launch(engine, [WORKER, tmp_path, shared, f"probe:{SCENARIO}"], limit=480)

    assert status == 0, written[-8000:]
    found: list[dict[str, Any]] = [
        torch.load(tmp_path / f"probe-{SCENARIO}.{rank}.pt", weights_only=False) for rank in (0, 1)
    ]
    assert found[0] == found[1]
    for ranks in found:
        assert ranks["failure"] is None
        assert ranks["before"] == alone["before"]
        assert ranks["steps"] == alone["steps"] == [0, 1, 2, 3]
    asked, unasked = (
        load_file(tmp_path / name / "saved" / "adapter_model.safetensors") for name in ("probed", "plain")
    )
    assert not differing(asked, unasked)
