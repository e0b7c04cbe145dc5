from __future__ import annotations

import json
import os
import platform
import socket
from importlib import metadata
from pathlib import Path

import pytest

import mpo
from mpo.common.provenance import collect, library_versions, write_json

TOKEN = "hf_" + "Ab3dEf6hIj9lMn2pQr5tUv8xYz1bCd4fGh7"


def test_it_holds_the_versions_the_hardware_and_what_was_given() -> None:
    entries = collect(seed=3, precision="bf16", data_fingerprint="abc", training_pairs=600)
    assert entries["mpo"] == mpo.__version__ and entries["python"] == platform.python_version()
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets"):
        assert entries["libraries"][name] == metadata.version(name)
    assert entries["devices"]["cpu"] and entries["devices"]["cores"] == os.cpu_count()
    assert (entries["seed"], entries["precision"], entries["data_fingerprint"]) == (3, "bf16", "abc")
    assert entries["training_pairs"] == 600 and "base_model" not in entries
    assert json.loads(json.dumps(entries)) == entries


def test_a_library_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def without_deepspeed(name: str) -> str:
        if name == "deepspeed":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", without_deepspeed)
    assert "deepspeed" not in library_versions() and "torch" in library_versions()


def test_nothing_in_it_tells_who_ran_it_or_holds_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "somebody"
    model = home / "models" / "llama"
    model.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "somebody")
    argv = [
        f"{home}/bin/mpo",
        "train",
        f"{home}/r.yaml",
        "--hub_token",
        "plain",
        f"--note={TOKEN}",
        "--beta",
        "1.5",
    ]
    path = write_json(tmp_path / "provenance.json", collect(argv=argv, base_model=str(model)))
    text = path.read_text()
    for hidden in ("somebody", str(tmp_path), TOKEN, "plain", socket.gethostname()):
        assert hidden not in text
    entries = json.loads(text)
    assert entries["command"] == ["mpo", "train", "~/r.yaml", "--hub_token", "[redacted]", "--note=[redacted]", "--beta", "1.5"]  # fmt: skip
    assert entries["base_model"] == "llama"


def test_a_hub_id_is_kept_as_the_base_model() -> None:
    assert collect(base_model="org/name")["base_model"] == "org/name"
