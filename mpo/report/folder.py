"""A result folder: what each model was measured to do, as the commands of ``mpo evaluate`` left it.

The files are those of :mod:`mpo.evaluation.results`, each model's in a folder of its name. A folder of one model alone, with
these files directly in it, is read as well, and so is the folder of a training run. A file that is damaged is left out, and so is a row of a journal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from mpo.common.journal import read_rows
from mpo.common.provenance import Provenance
from mpo.common.typed_json import read_typed
from mpo.errors import ConfigError, DataError, StorageError
from mpo.evaluation.answers import FILE, AnswerRow
from mpo.evaluation.rates import tabulate
from mpo.evaluation.results import (
    LEAKS,
    METRICS,
    MT_BENCH,
    PERPLEXITY,
    REWARD_GAP,
    SAFETY,
    SUITE,
    UTILITY,
    LeaksResult,
    MTBenchResult,
    PerplexityResult,
    RewardGapResult,
    SafetyResult,
    SuiteIndex,
    UtilityResult,
    read_reward_gap,
)
from mpo.evaluation.reward_gap import RewardGapTable
from mpo.evaluation.tasks import NO_VERDICT, TASKS
from mpo.evaluation.verdicts import VerdictRow, verdicts_file
from mpo.evaluation.wording import in_language_asked
from mpo.report.hidden_space import has_hidden_space
from mpo.report.run import Run, is_run, read_run

T = TypeVar("T")


class LeftOut(list[str]):
    """What could not be read, a sentence each."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def add(self, error: object) -> None:
        """Notes an error, with the paths in it as they are inside the folder."""
        self.append(str(error).replace(f"{self.root}/", ""))

    def unless(self, read: Callable[..., T], *arguments: Any) -> T | None:
        """What a function reads, or None where it finds its file damaged."""
        try:
            return read(*arguments)
        except OSError as error:  # also where a damaged file names one that the system refuses to look for
            self.add(error)
            return None

    def rows(self, path: Path, kind: type[T]) -> list[T]:
        """The rows of a journal that are whole; none where there is no such file."""
        damaged: list[str] = []
        rows = self.unless(lambda: read_rows(path, kind, damaged) if path.is_file() else [])
        if damaged:
            more = f" {len(damaged) - 1} more of its rows are damaged, too." if len(damaged) > 1 else ""
            self.add(f"{damaged[0].rstrip()}{more}")
        return rows or []


@dataclass(frozen=True)
class SafetyRun:
    """Verdicts of one model on one prompt set.

    Attributes:
        folder: Where its files are.
        result: ``result.json``.
        verdicts: ``{language: {prompt id: verdict}}`` of the first judge; empty where only the result was kept.
        left_out: Takes what cannot be read.
    """

    folder: Path
    result: SafetyResult
    verdicts: Mapping[str, Mapping[str, str]]
    left_out: LeftOut

    @property
    def judge(self) -> str:
        """Name of the first judge."""
        return str(self.result.judge["name"])

    def outcomes(self) -> dict[str, dict[str, float]]:
        """``{language: {prompt id: 1 or 0}}``; what has no verdict is left out."""
        counted = self.result.counted or TASKS[self.result.measurement].counted
        return {
            language: {p: float(v == counted) for p, v in rows.items() if v not in NO_VERDICT}
            for language, rows in self.verdicts.items()
        }

    @cached_property
    def in_language_asked(self) -> dict[str, dict[str, float]]:
        """``{language: {prompt id: 1 or 0}}``: whether the answer is in the language of its prompt, where it can be told."""
        return in_language_asked(list(self.answers().values()))

    def without(self, prompt_ids: Collection[str]) -> SafetyRun | None:
        """The run as if these prompts had not been asked; None where its answers were not kept."""
        kept = [row for row in self.answers().values() if row.prompt_id not in prompt_ids]
        verdicts = {row.id: self.verdicts.get(row.language, {}).get(row.prompt_id) for row in kept}
        judged = {name: verdict for name, verdict in verdicts.items() if verdict is not None}
        kept = [row for row in kept if row.id in judged]
        if not kept:
            return None
        table = tabulate(TASKS[self.result.measurement], kept, judged, self.result.confidence)
        result = replace(self.result, languages=table.languages, average=table.average, second_judge=None)
        by_language: dict[str, dict[str, str]] = {}
        for row in kept:
            by_language.setdefault(row.language, {})[row.prompt_id] = judged[row.id]
        return replace(self, result=result, verdicts=by_language)

    def answers(self) -> dict[tuple[str, str], AnswerRow]:
        """``{(language, prompt id): row}`` of ``answers.jsonl``; empty where it was not kept."""
        rows = self.left_out.rows(self.folder / FILE, AnswerRow)
        return {(row.language, row.prompt_id): row for row in rows}


@dataclass(frozen=True)
class ModelResults:
    """Everything that was measured of one model.

    Attributes:
        name: Name of its folder.
        safety: By measurement and prompt set.
        gaps: Its reward gaps, with those of its base model where the two were measured together.
        utility: Scores of lm-evaluation-harness.
        perplexity: Perplexity of texts.
        mt_bench: Grades of dialogues.
    """

    name: str
    safety: Mapping[tuple[str, str], SafetyRun] = field(default_factory=dict)
    gaps: RewardGapResult | None = None
    utility: UtilityResult | None = None
    perplexity: PerplexityResult | None = None
    mt_bench: MTBenchResult | None = None

    @property
    def reward_gap(self) -> RewardGapTable | None:
        """The table of its reward gaps."""
        return None if self.gaps is None else self.gaps.after

    @property
    def before(self) -> RewardGapTable | None:
        """The table of its base model on the same pairs."""
        return None if self.gaps is None else self.gaps.before

    @cached_property
    def _files(self) -> list[SafetyResult | UtilityResult | PerplexityResult | MTBenchResult]:
        runs = (run.result for run in self.safety.values())
        files = (*runs, self.utility, self.perplexity, self.mt_bench)
        return [file for file in files if file is not None]

    @property
    def is_empty(self) -> bool:
        """Whether nothing could be read of it."""
        return self.gaps is None and not self._files

    @property
    def about(self) -> Mapping[str, Any]:
        """``{"model", "adapter", ...}`` as a measurement recorded it; empty where none did."""
        found = next((file.model for file in self._files if file.model), {})
        if found or self.gaps is None:
            return found
        made = self.gaps.provenance
        return {"model": made.get("base_model"), "adapter": made.get("adapter")} if made else {}

    @property
    def has_adapter(self) -> bool:
        """Whether it is an adapter on another model, as far as its files say."""
        return self.before is not None or self.about.get("adapter") is not None

    def provenances(self) -> list[Provenance]:
        """What each measurement recorded of where it was made."""
        files = [*self._files, *(() if self.gaps is None else (self.gaps,))]
        return [file.provenance for file in files if file.provenance]


@dataclass(frozen=True)
class Results:
    """A result folder.

    Attributes:
        folder: The folder.
        models: The models in the order of every table; the first is what the others are compared with. None where there
            is nothing but an analysis of the hidden space.
        left_out: What could not be read, a sentence each; grows while more is read.
        run: The training run, where the folder is that of one.
        leaks: Which prompts stand in the training data, where a suite has looked.
    """

    folder: Path
    models: tuple[ModelResults, ...]
    left_out: LeftOut
    run: Run | None = None
    leaks: LeaksResult | None = None

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
        StorageError: It cannot be listed.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(
            f"{root} is no folder. Pass the folder that `mpo evaluate ... --out` or `mpo train` wrote to."
        )
    left_out = LeftOut(root)
    try:
        places = [path for path in (root, *sorted(root.iterdir())) if _is_model(path)]
    except OSError as error:
        raise StorageError(f"{root} cannot be read: {error.strerror or error}.") from error
    found = {path.resolve().name: _read_model(path, left_out) for path in places}
    run = left_out.unless(read_run, root) if is_run(root) else None
    if run is not None and run.gaps is not None:
        name = root.resolve().name
        measured = found.get(name, ModelResults(name))
        found[name] = measured if measured.gaps is not None else replace(measured, gaps=run.gaps)
    if not found and not has_hidden_space(root) and not is_run(root):
        raise DataError(
            f"{root} holds no measurement of a model. Expected {root}/MODEL/{REWARD_GAP}, "
            f"{root}/MODEL/attack/PROMPTS/{SAFETY} or the like, as `mpo evaluate suite` writes them, or the {METRICS} of a "
            "training run."
        )
    if models is None:
        order = _default_order(root, found, left_out)
        if len(order) == 1 and (before := found[order[0]].before) is not None:
            base = "base" if order[0] != "base" else "without adapter"
            found[base] = ModelResults(base, gaps=RewardGapResult(after=before))
            order.insert(0, base)
    else:
        order = list(dict.fromkeys(models))
        for name in order:
            if name not in found:
                listed_names = ", ".join(sorted(found)) or "none"
                raise ConfigError(f"models: {root} has no model {name!r}; it has {listed_names}.")
    leaks = left_out.unless(read_typed, root / LEAKS, LeaksResult) if (root / LEAKS).is_file() else None
    return Results(root, tuple(found[name] for name in order), left_out, run, leaks)


def _is_model(path: Path) -> bool:
    return path.is_dir() and (
        any((path / name).is_file() for name in (REWARD_GAP, UTILITY, PERPLEXITY, MT_BENCH))
        or any(True for kind in TASKS for _ in path.glob(f"{kind}/*/{SAFETY}"))
    )


def _default_order(root: Path, found: Mapping[str, ModelResults], left_out: LeftOut) -> list[str]:
    file = root / SUITE
    suite = left_out.unless(read_typed, file, SuiteIndex) if file.is_file() else None
    names = {name for name, model in found.items() if not model.is_empty}
    order = [name for name in dict.fromkeys(suite.models if suite else ()) if name in names]
    return order + sorted(names - set(order), key=lambda n: (found[n].has_adapter, n))


def _read_model(path: Path, left_out: LeftOut) -> ModelResults:
    def read(name: str, reader: Callable[..., T], *kind: Any) -> T | None:
        file = path / name
        return left_out.unless(reader, file, *kind) if file.is_file() else None

    safety = {
        (kind, file.parent.name): run
        for kind in TASKS
        for file in sorted(path.glob(f"{kind}/*/{SAFETY}"))
        if (run := left_out.unless(_read_safety, file, kind, left_out)) is not None
    }
    return ModelResults(
        path.resolve().name,
        safety,
        read(REWARD_GAP, read_reward_gap),
        read(UTILITY, read_typed, UtilityResult),
        read(PERPLEXITY, read_typed, PerplexityResult),
        read(MT_BENCH, read_typed, MTBenchResult),
    )


def _read_safety(file: Path, kind: str, left_out: LeftOut) -> SafetyRun:
    result = read_typed(file, SafetyResult)
    if result.measurement != kind:
        raise StorageError(
            f"{file} holds the measurement {result.measurement!r}; expected {kind!r}, as its folder is called. Move it "
            "back to where it was written."
        )
    verdicts: dict[str, dict[str, str]] = {}
    for row in left_out.rows(verdicts_file(file.parent, str(result.judge["name"])), VerdictRow):
        verdicts.setdefault(row.language, {})[row.prompt_id] = row.verdict
    return SafetyRun(file.parent, result, verdicts, left_out)
