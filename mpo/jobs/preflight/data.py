"""The pairs of a recipe: found, loaded and divided into those that are trained on and those held out."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from mpo.common.files import did_you_mean
from mpo.data import BadRow, LoadedGroups, load_groups, split_by_source
from mpo.data.contract import answers_read, messages_identity
from mpo.data.loading import check_source_language
from mpo.data.refusals import opens_with_refusal
from mpo.errors import DataError
from mpo.training.harmless import harmless_groups
from mpo.training.recipe import DATA_SUFFIXES, Recipe

_BEGINNING = 12
"""Characters of a refusal in which two are compared."""
_LOOKED_AT = 1000
"""Groups of each kind whose refusals are compared: a plan is to begin soon, however large the data."""


def check_data_files(recipe: Recipe) -> None:
    """Make sure that local files are there.

    Raises:
        DataError: One is not.
    """
    for key in ("dataset", "eval_dataset", "leak_against"):
        value = getattr(recipe.data, key)
        for name in [value] if isinstance(value, str) else value or []:
            if Path(name).is_file():
                continue
            if Path(name).suffix.lower() in DATA_SUFFIXES or name.startswith(("/", ".", "~")):
                from mpo.building.writing import GROUPS, TABLE  # of no use to a run that begins

                places = sorted({os.getcwd(), str(recipe.source_path.resolve().parent)})
                raise DataError(
                    f"there is no such file (looked in {' and '.join(places)}).{did_you_mean(name)} Set `{key}`"
                    + (
                        ", or make it: `mpo data build data/refuse_or_answer --model.model MODEL --out FOLDER`."
                        if Path(name).name in (GROUPS, TABLE)
                        else "."
                    ),
                    file=name,
                )


def load_data(recipe: Recipe) -> tuple[LoadedGroups, Dataset, Dataset | None, list[BadRow]]:
    """What was loaded, the groups to train on, those held out (None where nothing is) and the bad rows left out.

    Raises:
        DataError: The data cannot be used, or none of their sources is in the dominant language.
    """
    data, training = recipe.data, recipe.training
    settings: dict[str, Any] = {
        "source_language": training.source_language,
        "bad_rows": training.bad_rows,
        "languages": data.languages,
        "drop_untranslated": data.drop_untranslated,
    }
    with training.main_process_first(desc="loading the data"):
        loaded = load_groups(data.dataset, split=data.dataset_split, limit=data.limit, **settings)
        check_source_language(loaded, training.source_language)
        if data.eval_dataset is not None:
            other = load_groups(data.eval_dataset, split=data.dataset_split, **settings)
            check_source_language(other, training.source_language)
            return loaded, loaded.groups, other.groups, [*loaded.dropped, *other.dropped]
        train, held_out = split_by_source(loaded.groups, data.held_out, data.held_out_seed)
    return loaded, train, held_out if len(held_out) else None, loaded.dropped


def harmless_refused(groups: Dataset, train_on: str) -> dict[str, int]:
    """How many chosen responses to harmless prompts refuse, by language; without those that have none.

    Args:
        groups: Groups as text.
        train_on: Which of their pairs are looked at: ``targets``, ``source`` or ``both``.
    """
    found: Counter[str] = Counter()
    for group in groups.select(np.flatnonzero(harmless_groups(groups))).select_columns(["source", "targets"]):
        source = group["source"]
        sides = {"targets": group["targets"], "source": [source], "both": [source, *group["targets"]]}
        for pair in sides[train_on]:
            # As in `mpo data check`, a refusal in the source's language is one.
            if opens_with_refusal(answers_read(pair)["chosen"], pair["language"], source["language"]):
                found[pair["language"]] += 1
    return dict(found)


def other_refusals(groups: Dataset) -> list[str]:
    """Languages in which most refusals of harmless prompts begin otherwise than every refusal of a harmful one that is taught.

    Args:
        groups: Groups as text: chosen responses to harmful prompts are what is taught, rejected ones to harmless prompts what
            tokens are held along, of about a thousand groups each, spread over the data. What refuses neither way counts for
            nothing.
    """
    harmless = harmless_groups(groups)
    found: list[defaultdict[str, list[str]]] = []
    for kind, part in ((~harmless, "chosen"), (harmless, "rejected")):
        begins: defaultdict[str, list[str]] = defaultdict(list)
        places = np.flatnonzero(kind)
        some = groups.select(places[:: 1 + len(places) // _LOOKED_AT])
        for group in some.select_columns(["source", "targets"]):
            for pair in (group["source"], *group["targets"]):
                text = answers_read(pair)[part]
                if opens_with_refusal(text, pair["language"], group["source"]["language"]):
                    begins[pair["language"]].append(text.strip()[:_BEGINNING].casefold())
        found.append(begins)
    taught, held = found
    known = {language: set(begins) for language, begins in taught.items()}
    return sorted(
        language
        for language, begins in held.items()
        if language in known and 2 * sum(begin in known[language] for begin in begins) < len(begins)
    )


def shared_sources(train: Dataset, held_out: Dataset) -> int:
    """Number of prompts in the dominant language that are in both."""

    def prompts(groups: Dataset) -> set[bytes]:
        return {
            hashlib.sha256(repr(messages_identity(source["prompt"])).encode()).digest()
            for source in groups["source"]
        }

    return len(prompts(train) & prompts(held_out))
