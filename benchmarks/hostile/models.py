"""Hostile model folders: other settings than weights, weights that are missing, and damaged files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.hostile.cases import EITHER, REFUSED, VALUES, Case


def _settings(**changes: Any) -> Callable[[Path, random.Random], None]:
    def change(model: Path, draw: random.Random) -> None:
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _any_setting(model: Path, draw: random.Random) -> None:
    settings = json.loads((model / "config.json").read_text())
    settings[draw.choice(list(settings))] = draw.choice(VALUES)
    (model / "config.json").write_text(json.dumps(settings))


def _tensors(model: Path, draw: random.Random, change: Callable[[dict[str, Any], str], None]) -> None:
    from safetensors.torch import load_file, save_file

    file = model / "model.safetensors"
    tensors = load_file(file)
    change(tensors, draw.choice(sorted(tensors)))
    save_file(tensors, file, {"format": "pt"})


def _missing(model: Path, draw: random.Random) -> None:
    def change(tensors: dict[str, Any], name: str) -> None:
        del tensors[name]

    _tensors(model, draw, change)


def _renamed(model: Path, draw: random.Random) -> None:
    _tensors(model, draw, lambda tensors, name: tensors.update({f"{name}.more": tensors.pop(name)}))


def _smaller(model: Path, draw: random.Random) -> None:
    _tensors(model, draw, lambda tensors, name: tensors.update({name: tensors[name][:-1].clone()}))


def _cut(name: str) -> Callable[[Path, random.Random], None]:
    def cut(model: Path, draw: random.Random) -> None:
        whole = (model / name).read_bytes()
        (model / name).write_bytes(whole[: draw.randrange(len(whole) - 1)])

    return cut


def _gone(name: str) -> Callable[[Path, random.Random], None]:
    return lambda model, draw: (model / name).unlink()


KINDS: dict[str, tuple[str, Callable[[Path, random.Random], None]]] = {
    "weights cut off": (REFUSED, _cut("model.safetensors")),
    "settings cut off": (REFUSED, _cut("config.json")),
    "tokenizer cut off": (REFUSED, _cut("tokenizer.json")),
    "no weights": (REFUSED, _gone("model.safetensors")),
    "no settings": (REFUSED, _gone("config.json")),
    "a tensor is missing": (REFUSED, _missing),
    "a tensor has another name": (REFUSED, _renamed),
    "a tensor has another size": (REFUSED, _smaller),
    "no layers": (REFUSED, _settings(num_hidden_layers=0)),
    "one layer": (REFUSED, _settings(num_hidden_layers=1)),
    "nine layers": (REFUSED, _settings(num_hidden_layers=9)),
    "negative size": (REFUSED, _settings(hidden_size=-1)),
    "no heads": (REFUSED, _settings(num_attention_heads=0)),
    "another vocabulary": (REFUSED, _settings(vocab_size=7)),
    "an unknown type": (REFUSED, _settings(model_type="\x1b[31mnone")),
    "any setting": (EITHER, _any_setting),
}


def cases(draw: random.Random, folder: Path, number: int) -> Iterator[Case]:
    """So many model folders, each opened and loaded as for a measurement."""
    from mpo.modeling.loading import ModelSource
    from mpo.modeling.opening import open_model
    from tests.tiny import save_tiny

    good = save_tiny("llama", folder / "good")
    for index in range(number):
        name = list(KINDS)[index] if index < len(KINDS) else draw.choice(list(KINDS))
        expected, change = KINDS[name]
        model = folder / str(index)
        shutil.copytree(good, model)
        change(model, draw)

        def run(model: Path = model) -> None:
            try:
                open_model(ModelSource(str(model)), device="cpu").load()
            finally:
                shutil.rmtree(model, ignore_errors=True)

        yield Case(name, expected, run)
