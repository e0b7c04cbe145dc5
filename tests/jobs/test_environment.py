"""What `mpo env` says of a machine, and what it hides."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from mpo.cli import app
from mpo.common import machine
from mpo.jobs.environment import EXTRAS, environment, environment_text

ROOT = Path(__file__).resolve().parents[2]


def test_the_extras_are_those_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"dev"}


def test_secrets_are_hidden_and_settings_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret-of-mine")
    monkeypatch.setenv("WANDB_MODE", "offline\x1b[31m")
    monkeypatch.setenv("SOMETHING_ELSE", "not asked for")
    for words in (["env"], ["env", "--json"]):
        assert app.main(words) == 0
        out = capsys.readouterr().out
        assert "aaaaaaaa" not in out and "a-secret-of-mine" not in out and "\x1b" not in out
        assert "WANDB_MODE" in out and "SOMETHING_ELSE" not in out
    found = json.loads(out)
    assert found["variables"]["HF_TOKEN"] == "[redacted]"
    assert found["libraries"]["torch"] and found["memory"] > 1e8 and found["cores"] >= 1


def test_a_gpu_that_torch_cannot_use_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(machine, "accelerators", lambda: ())
    monkeypatch.setattr("mpo.common.machine.shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "is a build for CPUs" in (machine.unused_gpu() or "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "hidden from this process" in (machine.unused_gpu() or "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "its driver works" in (machine.unused_gpu() or "")
    monkeypatch.setattr(machine, "accelerators", lambda: (machine.Accelerator("H100", 85 * 10**9, True),))
    assert machine.unused_gpu() is None


def test_devices_of_the_same_kind_share_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = (machine.Accelerator("NVIDIA H100", 85 * 10**9, True),) * 2
    monkeypatch.setattr("mpo.jobs.environment.accelerators", lambda: cards)
    assert "2 x NVIDIA H100, 85 GB" in environment_text()
    assert environment()["accelerators"][1] == {"name": "NVIDIA H100", "memory": 85 * 10**9, "bf16": True}
