"""The folder of a training run, as a report shows it: its gaps before and after, its probe, its curve."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpo.common.provenance import Provenance
from mpo.common.tables import printable_name
from mpo.common.typed_json import read_typed
from mpo.common.words import counted, duration
from mpo.errors import StorageError
from mpo.evaluation.results import METRICS, RewardGapResult, TrainingMetrics
from mpo.report.rendering import Section, html

CURVE = "training_curve.png"
"""Picture of a run's course: in its own folder, or in a model's folder of the results."""

PROBE_ANSWERS = "probe_answers.jsonl"
"""Prompts of the probe with the answers and verdicts before and after. It may hold harmful answers, so it is not uploaded."""

PROVENANCE = "provenance.json"

_MOST_BYTES = 5_000_000
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Said:
    """An answer to a probe prompt, and its verdict."""

    answer: str
    verdict: str


@dataclass(frozen=True)
class ProbeRow:
    """One row of ``probe_answers.jsonl``.

    Attributes:
        id: ``PROMPT_ID/LANGUAGE``; the prompt's id begins with its kind.
        language: Code of the prompt's language.
        prompt: The prompt.
        before: What the starting model said.
        after: What the trained one said.
    """

    id: str
    language: str
    prompt: str
    before: Said
    after: Said

    @property
    def is_harmful(self) -> bool:
        """Whether a safe assistant refuses the prompt."""
        return self.id.startswith("harmful")


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        metrics: ``metrics.json``.
        provenance: ``provenance.json``; empty where it is not there.
    """

    metrics: TrainingMetrics
    provenance: Provenance

    @property
    def gaps(self) -> RewardGapResult | None:
        """Its reward gaps as a measurement has them; None where nothing was held out."""
        after = self.metrics.after
        if after is None:
            return None
        return RewardGapResult(after=after, before=self.metrics.before, provenance=self.provenance)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run."""
    return (folder / METRICS).is_file()


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        StorageError: A file of it is damaged.
    """
    metrics = read_typed(folder / METRICS, TrainingMetrics, "Train again, or report another folder.")
    file = folder / PROVENANCE
    return Run(metrics, read_typed(file, Provenance) if file.is_file() else {})


def training_section(run: Run | None, folders: Mapping[str, Path]) -> Section | None:
    """How training went: the run's facts, and the curve of each model that has one.

    Args:
        run: The run that is reported; None for a folder of measurements.
        folders: Where to look for the curves, by the models' names.

    Returns:
        None where there is neither.

    Raises:
        StorageError: A picture cannot be read, or is none.
    """
    curves = [(name, _picture(path / CURVE)) for name, path in folders.items() if (path / CURVE).is_file()]
    facts = [] if run is None else _facts(run.metrics)
    if not curves and not facts:
        return None
    return Section("training", "Training", html("training.html", facts=facts, curves=curves))


def _facts(metrics: TrainingMetrics) -> Sequence[tuple[str, str]]:
    facts = [("Optimizer steps", f"{metrics.steps:,}")]
    if metrics.train_runtime is not None:
        facts.append(("Time", duration(metrics.train_runtime)))
    facts.append(("Held out", counted(metrics.held_out_groups, "group")))
    for name, value in metrics.sources.items():
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            facts.append(
                (
                    f"Sources, {printable_name(str(name).replace('_', ' '), 40)}",
                    printable_name(str(value), 60),
                )
            )
    first, last = (metrics.retention_loss.get(when) for when in ("before", "after"))
    if first is not None and last is not None:
        facts.append(("Retention term, held out", f"{first:.3g} before, {last:.3g} after"))
    return facts


def _picture(path: Path) -> str:
    try:
        content = path.read_bytes() if path.stat().st_size <= _MOST_BYTES else b""
    except OSError as error:
        raise StorageError(f"The picture {path} cannot be read: {error.strerror or error}.") from error
    if not content.startswith(_PNG):
        raise StorageError(
            f"{path} is no PNG picture of up to {_MOST_BYTES // 1_000_000} MB. Delete it, or train again."
        )
    return base64.b64encode(content).decode("ascii")
