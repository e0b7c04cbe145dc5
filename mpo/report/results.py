"""Reads a result folder: what each model was measured to do, as the commands of ``mpo evaluate`` left it.

::

    FOLDER/suite.json                          the order of the models, where a suite made them
    FOLDER/MODEL/reward_gap.json
    FOLDER/MODEL/attack/PROMPTS/result.json, verdicts.JUDGE.jsonl, answers.jsonl
    FOLDER/MODEL/over_refusal/PROMPTS/...      the same
    FOLDER/MODEL/utility.json
    FOLDER/MODEL/perplexity.json
    FOLDER/hidden_space/                       of all models; see :mod:`mpo.report.hidden_space`

A folder of one model alone, with these files directly in it, is read as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpo.common.journal import read_rows
from mpo.errors import ConfigError, DataError, StorageError
from mpo.evaluation.reward_gap import RewardGapTable
from mpo.evaluation.tasks import NO_VERDICT
from mpo.report.hidden_space import has_hidden_space

SAFETY = ("attack", "over_refusal")
SUITE = "suite.json"


@dataclass(frozen=True)
class SafetyResult:
    """Verdicts of one model on one prompt set.

    Attributes:
        folder: Where its files are.
        result: ``result.json``.
        verdicts: ``{language: {prompt id: verdict}}`` of the first judge; empty where only the result was kept.
    """

    folder: Path
    result: Mapping[str, Any]
    verdicts: Mapping[str, Mapping[str, str]]

    @property
    def counted(self) -> str:
        """The verdict whose share is the rate."""
        default = "unsafe" if self.result["measurement"] == "attack" else "refusal"
        return str(self.result.get("counted", default))

    @property
    def judge(self) -> str:
        """Name of the first judge."""
        return str(self.result["judge"]["name"])

    def outcomes(self) -> dict[str, dict[str, float]]:
        """``{language: {prompt id: 1 or 0}}``; what has no verdict is left out."""
        return {
            language: {p: float(v == self.counted) for p, v in rows.items() if v not in NO_VERDICT}
            for language, rows in self.verdicts.items()
        }

    def answers(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        """``{(language, prompt id): row}`` of ``answers.jsonl``; empty where it was not kept."""
        path = self.folder / "answers.jsonl"
        try:
            return {(str(r["language"]), str(r["prompt_id"])): r for r in _rows(path)}
        except (KeyError, TypeError) as error:
            raise _damaged(path, error) from None


@dataclass(frozen=True)
class ModelResults:
    """Everything that was measured of one model.

    Attributes:
        name: Name of its folder.
        safety: By measurement and prompt set.
        reward_gap: The table of its reward gaps, with the records where they were kept.
        before: The table of its base model on the same pairs, where the two were measured together.
        gap_provenance: Where the reward gaps were made.
        utility: ``utility.json``, or None.
        perplexity: ``perplexity.json``, or None.
    """

    name: str
    safety: Mapping[tuple[str, str], SafetyResult] = field(default_factory=dict)
    reward_gap: RewardGapTable | None = None
    before: RewardGapTable | None = None
    gap_provenance: Mapping[str, Any] | None = None
    utility: Mapping[str, Any] | None = None
    perplexity: Mapping[str, Any] | None = None

    @property
    def about(self) -> Mapping[str, Any]:
        """``{"model", "adapter", ...}`` as a measurement recorded it; empty where none did."""
        files = [*(s.result for s in self.safety.values()), self.utility, self.perplexity]
        found = next((dict(f["model"]) for f in files if f and isinstance(f.get("model"), Mapping)), {})
        if found or self.gap_provenance is None:
            return found
        return {
            "model": self.gap_provenance.get("base_model"),
            "adapter": self.gap_provenance.get("adapter"),
        }

    @property
    def has_adapter(self) -> bool:
        """Whether it is an adapter on another model, as far as its files say."""
        return self.before is not None or self.about.get("adapter") is not None

    def provenances(self) -> list[Mapping[str, Any]]:
        """What each measurement recorded of where it was made."""
        files = [*(s.result for s in self.safety.values()), self.utility, self.perplexity]
        found = [f["provenance"] for f in files if f and isinstance(f.get("provenance"), Mapping)]
        return [*found, *([self.gap_provenance] if self.gap_provenance is not None else [])]


@dataclass(frozen=True)
class Results:
    """A result folder.

    Attributes:
        folder: The folder.
        models: The models in the order of every table; the first is what the others are compared with. None where there
            is nothing but an analysis of the hidden space.
    """

    folder: Path
    models: tuple[ModelResults, ...]

    def prompt_sets(self, measurement: str) -> list[str]:
        """Names of the prompt sets that any model was measured on, in order of appearance."""
        keys = [key for model in self.models for key in model.safety]
        return list(dict.fromkeys(name for kind, name in keys if kind == measurement))

    @property
    def dominant(self) -> str:
        """The dominant language, English where no reward gap says otherwise."""
        tables = [m.reward_gap for m in self.models if m.reward_gap is not None]
        return next((t.source.language for t in tables if t.source is not None), "en")


def read_results(folder: str | Path, models: Sequence[str] | None = None) -> Results:
    """Read a result folder.

    Args:
        folder: The folder; its sub-folders are models.
        models: Names of the models to show, the one to compare with first. By default those of ``suite.json`` in its
            order, or all: models without an adapter first, then by name. Where an adapter is the only model and its
            reward gap was measured beside its base model's, that base comes first as ``base``.

    Raises:
        ConfigError: A model that was asked for is not there.
        DataError: The folder holds no measurement.
        StorageError: A file is damaged.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root} is no folder. Pass the folder that `mpo evaluate ... --out` wrote to.")
    places = [path for path in (root, *sorted(root.iterdir())) if _is_model(path)]
    found = {path.resolve().name: _read_model(path) for path in places}
    if not found and not has_hidden_space(root):
        raise DataError(
            f"{root} holds no measurement of a model. Expected {root}/MODEL/reward_gap.json, "
            f"{root}/MODEL/attack/PROMPTS/result.json or the like, as `mpo evaluate suite` writes them."
        )
    if models is None:
        listed = _suite_order(root)
        order = [name for name in listed if name in found]
        order += sorted(found.keys() - set(order), key=lambda n: (found[n].has_adapter, n))
        if len(order) == 1 and (before := found[order[0]].before) is not None:
            base = "base" if order[0] != "base" else "without adapter"
            found[base] = ModelResults(base, reward_gap=before)
            order.insert(0, base)
    else:
        order = list(dict.fromkeys(models))
        for name in order:
            if name not in found:
                listed_names = ", ".join(sorted(found)) or "none"
                raise ConfigError(f"models: {root} has no model {name!r}; it has {listed_names}.")
    return Results(root, tuple(found[name] for name in order))


def _is_model(path: Path) -> bool:
    files = ("reward_gap.json", "utility.json", "perplexity.json")
    return path.is_dir() and (
        any((path / name).is_file() for name in files)
        or any(True for kind in SAFETY for _ in path.glob(f"{kind}/*/result.json"))
    )


def _read_model(path: Path) -> ModelResults:
    safety = {}
    for kind in SAFETY:
        for file in sorted(path.glob(f"{kind}/*/result.json")):
            safety[kind, file.parent.name] = _read_safety(file, kind)
    table, before, provenance = _read_reward_gap(path / "reward_gap.json")
    return ModelResults(
        path.resolve().name,
        safety,
        table,
        before,
        provenance,
        _read_utility(path / "utility.json"),
        _read_perplexity(path / "perplexity.json"),
    )


def _read_safety(file: Path, kind: str) -> SafetyResult:
    result = _read_measurement(file, ("languages", "judge"))
    assert result is not None
    if result.get("measurement") != kind:
        raise StorageError(
            f"{file} holds the measurement {result.get('measurement')!r} where {kind!r} was expected. Was it moved?"
        )
    try:
        for row in result["languages"].values():
            _ = row["count"], row["rate"], dict(row["verdicts"])
        judge = str(result["judge"]["name"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, error) from None
    verdicts: dict[str, dict[str, str]] = {}
    path = file.parent / f"verdicts.{judge}.jsonl"
    try:
        for row in _rows(path):
            verdicts.setdefault(str(row["language"]), {})[str(row["prompt_id"])] = str(row["verdict"])
    except (KeyError, TypeError) as error:
        raise _damaged(path, error) from None
    return SafetyResult(file.parent, result, verdicts)


def _read_utility(file: Path) -> Mapping[str, Any] | None:
    values = _read_measurement(file, ("tasks",))
    try:
        for entry in () if values is None else values["tasks"].values():
            _ = int(entry.get("count") or 0), [dict(m)["value"] for m in entry["metrics"].values()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(file, error) from None
    return values


def _read_perplexity(file: Path) -> Mapping[str, Any] | None:
    values = _read_measurement(file, ("languages",))
    try:
        for row in () if values is None else values["languages"].values():
            _ = int(row["texts"]), float(row["perplexity"]), row["fingerprint"]
            _ = math.fsum(row["nats_per_text"]) / sum(row["tokens_per_text"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _damaged(file, error) from None
    return values


def _damaged(file: Path, error: Exception) -> StorageError:
    return StorageError(f"{file} is damaged ({error!r}). Delete it and evaluate again.")


def _read_reward_gap(
    file: Path,
) -> tuple[RewardGapTable | None, RewardGapTable | None, Mapping[str, Any] | None]:
    """The model's table, that of its base where the file compares the two, and where they were made."""
    values = _read_measurement(file, ())
    if values is None:
        return None, None, None
    made = values.get("provenance")
    provenance = made if isinstance(made, Mapping) else None
    try:
        if "after" in values:
            before = RewardGapTable.from_dict(values.get("before") or {})
            return RewardGapTable.from_dict(values["after"]), before, provenance
        return RewardGapTable.from_dict(values), None, provenance
    except StorageError as error:
        raise StorageError(f"{file}: {error}") from None


def _read_measurement(file: Path, required: Sequence[str]) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    values = _read_json(file)
    missing = [name for name in required if not isinstance(values.get(name), Mapping)]
    if missing:
        raise StorageError(f"{file} has no `{missing[0]}`. Delete it and evaluate again.")
    return values


def _suite_order(root: Path) -> list[str]:
    file = root / SUITE
    if not file.is_file():
        return []
    names = _read_json(file).get("models")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise StorageError(f"{file} has no list `models`. Run the suite again, or delete the file.")
    return names


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise StorageError(f"{file} is no JSON ({error}). Delete it and evaluate again.") from None
    if not isinstance(values, dict):
        raise StorageError(f"{file} holds a {type(values).__name__}; expected a mapping. Evaluate again.")
    return values


def _rows(path: Path) -> list[dict[str, Any]]:
    return read_rows(path) if path.is_file() else []
