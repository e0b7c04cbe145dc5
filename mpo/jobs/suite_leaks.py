"""What a suite's models were trained on, and which of the suite's prompts stand in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from mpo.common.typed_json import write_typed
from mpo.data.leaks import find_leaks
from mpo.data.prompt_texts import training_texts
from mpo.evaluation.evaluation_texts import prompt_set_texts
from mpo.evaluation.prompts import PromptSet
from mpo.evaluation.results import LEAKS
from mpo.jobs.leak import leaks_result
from mpo.jobs.suite_recipe import SuiteRecipe


def write_leaks(
    out: Path, recipe: SuiteRecipe, prompts: Mapping[tuple[str, str], PromptSet], looked: str | None
) -> str | None:
    """Looks for the prompts in the training data, where these are known, and writes ``leaks.json``.

    Args:
        out: The suite's folder.
        recipe: The suite.
        prompts: Its prompt sets by measurement and name.
        looked: What this returned when the file was written; nothing is done anew where it would be the same.

    Returns:
        A hash of the training files and the prompts; None where no training data or no prompts are known.

    Raises:
        DataError: A training file cannot be read.
        StorageError: The file cannot be written.
    """
    files = training_files(recipe)
    if not files or not prompts:
        return None
    digest = hashlib.sha256()
    for file in files:
        path = Path(file)
        content = b""
        if path.is_file():
            with open(path, "rb") as opened:
                content = hashlib.file_digest(opened, "sha256").digest()
        digest.update(json.dumps([file, content.hex()]).encode("utf-8"))
    for (kind, name), loaded in prompts.items():
        digest.update(json.dumps([kind, name, loaded.fingerprint]).encode("utf-8"))
    if digest.hexdigest() == looked and (out / LEAKS).is_file():
        return looked
    print(f"\nLooking for the prompts in {', '.join(files)}", flush=True)
    asked = [
        text
        for (kind, name), loaded in prompts.items()
        for text in prompt_set_texts(loaded, f"{kind}/{name}")
    ]
    leaks = find_leaks(training_texts(files), asked)
    leaks.training = [Path(file).name for file in files]
    write_typed(out / LEAKS, leaks_result(leaks))
    print("\n".join(leaks.summary()), flush=True)
    return digest.hexdigest()


def training_files(recipe: SuiteRecipe) -> list[str]:
    """Local files that the suite's models were trained on, and what `training_data` names."""
    found = list(recipe.training_data or ())
    for name, model in recipe.models.items():
        for folder in (model.adapter, model.model):
            for file in _trained_on(folder):
                if Path(file).expanduser().is_file():
                    found.append(file)
                else:
                    print(
                        f"{name} was trained on {file}, which is not here: its prompts are not looked for in it. Name the "
                        "file with `training_data`.",
                        flush=True,
                    )
    unique = {str(Path(file).expanduser().resolve()) if Path(file).exists() else file: file for file in found}
    return list(unique.values())


def _trained_on(folder: str | None) -> list[str]:
    """The `dataset` of the recipe that lies in a model's folder."""
    path = Path(folder).expanduser() / "recipe.yaml" if folder else None
    if path is None or not path.is_file():
        return []
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    named = values.get("dataset") if isinstance(values, dict) else None
    files = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    return [file for file in files if isinstance(file, str)]
