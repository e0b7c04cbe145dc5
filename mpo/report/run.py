"""The folder of a training run, as a report shows it: its gaps before and after, its probe, its curve."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mpo.common.provenance import Provenance, Result
from mpo.common.tables import printable_name
from mpo.common.typed_json import FROM_LIST, Count, Number, Share, read_typed
from mpo.common.words import counted, duration
from mpo.errors import StorageError
from mpo.evaluation.results import METRICS, RewardGapResult, TrainingMetrics
from mpo.report.rendering import Section, html

CURVE = "training_curve.png"
"""Picture of a run's course: in its own folder, or in a model's folder of the results."""

PROVENANCE = "provenance.json"

_MOST_BYTES = 5_000_000
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Shift:
    """A share on the same probe prompts before and after training.

    Attributes:
        count: Number of prompts; of a mean over languages, translations counted once.
        before: The share before.
        after: The share after.
        change: ``after - before``.
        interval: Of the change; None where there is none.
        p_value: Of its test.
    """

    count: Count
    before: Share
    after: Share
    change: Number
    interval: Annotated[tuple[Number, Number], FROM_LIST] | None = None
    p_value: Share | None = None


@dataclass(frozen=True)
class Shifts:
    """The changes of one measure, by language, and that of their mean."""

    languages: dict[str, Shift] = field(default_factory=dict)
    mean: Shift | None = None


@dataclass(frozen=True)
class Finding:
    """What the run said of its probe."""

    text: str


@dataclass(frozen=True)
class Probe:
    """What the model does with the probe prompts, as the run measured it.

    Attributes:
        change: By measure; ``harmful_answered`` and ``harmless_refused`` are the axes of the plane.
        finding: Its last word.
        left_out: Languages that were trained and not asked in.
    """

    change: dict[str, Shifts]
    finding: Finding | None = None
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Behavior(Result):
    """The part of ``metrics.json`` that holds the probe."""

    behavior: Probe | None = None


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        metrics: ``metrics.json``.
        provenance: ``provenance.json``; empty where it is not there.
        probe: Its behaviour; None where it was not asked anything.
    """

    metrics: TrainingMetrics
    provenance: Provenance
    probe: Probe | None

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
    probe = read_typed(folder / METRICS, _Behavior).behavior
    file = folder / PROVENANCE
    return Run(metrics, read_typed(file, Provenance) if file.is_file() else {}, probe)


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
