"""What an analysis found: estimates per model, layer and language, as JSON and as a table."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mpo.common.provenance import Result
from mpo.common.tables import TextTable, interval, printable_name, signed
from mpo.common.typed_json import NO_KEY_IF_EMPTY, Confidence, named_by_key, read_typed
from mpo.data.languages import language_name
from mpo.hidden_space.compare import LanguageResult, LayerResult
from mpo.hidden_space.language_silhouette import Silhouettes

FILE = "hidden_space.json"
MEASUREMENT = "hidden_space"

LABELS = {
    "between_class_ratio": "Between-class ratio",
    "between_class_variance": "Between-class variance",
    "explained_variance": "Explained variance",
    "fisher_ratio": "Fisher ratio",
    "bhattacharyya": "Bhattacharyya",
    "silhouette": "Silhouette",
    "probe_auroc": "Probe AUROC",
    "transfer_auroc": "Transfer AUROC",
    "source_cosine": "Cosine to source",
    "cka": "CKA",
    "direction_cosine": "Direction kept",
    "harmless_drift": "Harmless drift",
    "harmful_drift": "Harmful drift",
    "harmless_to_harmful": "Harmless shift on harm direction",
    "harmful_to_harmful": "Harmful shift on harm direction",
    "harmless_to_source": "Harmless shift to source",
    "harmful_to_source": "Harmful shift to source",
    "pair_distance_ratio": "Pair distance",
    "pair_nearest": "Pair nearest",
    "pair_consistency": "Pair consistency",
}
"""Names of the measures in tables and pictures."""


@dataclass
class ModelResult:
    """One model, before and after.

    Attributes:
        name: What it is called.
        reference: Model before; None for a model alone.
        aligned: Model after; None where it is the reference with an adapter.
        adapter: The adapter.
        shown_layer: The layer of tables and pictures.
        layers: Estimates by layer.
        silhouettes: By layer and state, of all languages together; empty with one language and in older files.
    """

    name: Annotated[str, Field(exclude=True)]
    reference: str | None
    aligned: str | None
    adapter: str | None
    shown_layer: str
    layers: dict[str, LayerResult] = field(default_factory=dict)
    silhouettes: Annotated[dict[str, dict[str, Silhouettes]], NO_KEY_IF_EMPTY] = field(default_factory=dict)

    @property
    def is_comparison(self) -> bool:
        """Whether there is a before."""
        return self.reference is not None

    @property
    def components(self) -> int:
        """The smallest number of principal components that was measured on."""
        return min(self._numbers_of_components)

    @property
    def _numbers_of_components(self) -> list[int]:
        measures = [measure for one in self.shown.languages.values() for measure in one.after]
        found = (re.fullmatch(r"between_class_ratio_([0-9]{1,9})", measure) for measure in measures)
        return [int(match[1]) for match in found if match]

    @property
    def shown(self) -> LayerResult:
        """Estimates of the shown layer."""
        return self.layers[self.shown_layer]

    def text_table(self, confidence: float) -> TextTable:
        """The measures to look at first, per language, in the shown layer."""
        rows = [
            (printable_name(language_name(code)), *self._cells(one))
            for code, one in self.shown.languages.items()
        ]
        on = f"{self.components} PC{'s' if self.components > 1 else ''}"
        principal = {1: "principal component", 2: "two principal components"}.get(
            self.components, f"{self.components} principal components"
        )
        header = ["Language", f"Ratio on {on}"]
        if self.is_comparison:
            header += [f"Change [{100 * confidence:g} %]", "In one plane"]
        header += ["Probe", "Transfer"]
        notes = [
            f"Ratio: part of the variance on the first {principal} that lies between the classes.",
            "Probe, Transfer: AUROC of a linear probe trained in the language, and in the source language.",
        ]
        if self.is_comparison:
            header.append("Drift")
            notes[0] = (
                f"Ratio: part of the variance on the first {principal} that lies between the classes, each "
                "model\non its own components; its change on these, and in one plane that both models share."
            )
            notes.append(
                "Drift: mean distance that harmless texts moved, in units of the spread of all texts before."
            )
        layer = "after the final norm" if self.shown_layer == "norm" else f"layer {self.shown_layer}"
        return TextTable(
            title=f"Hidden space of {self.name}, {layer}{', before -> after' if self.is_comparison else ''}",
            header=tuple(header),
            rows=tuple(rows),
            notes=tuple(notes),
            emphasis=frozenset({2} if self.is_comparison else {1}),
        )

    def _cells(self, one: LanguageResult) -> list[str]:
        def both(measure: str, digits: int = 2) -> str:
            states = [state for state in (one.before, one.after) if state]
            values = [state[measure].value for state in states if measure in state]
            return " -> ".join(f"{value:.{digits}f}" for value in values) or "-"

        def moved(measure: str) -> str:
            if measure not in one.change:
                return "-"
            change = one.change[measure]
            return f"{signed(change.value)} {interval(change.low, change.high)}"

        ratio = f"between_class_ratio_{self.components}"
        cells = [both(ratio, 3)]
        if self.is_comparison:
            cells += [moved(ratio), moved(f"{ratio}_shared")]
        cells += [both("probe_auroc"), both("transfer_auroc")]
        if self.is_comparison:
            moved_by = one.between.get("harmless_drift")
            cells.append("-" if moved_by is None else f"{moved_by.value:.2f}")
        return cells


@dataclass(frozen=True)
class HiddenSpace(Result):
    """An analysis of one or more models on one set of texts; an estimate is ``[value, low, high]`` in its file, followed by
    the p-value where there is one.

    Attributes:
        data: Name of the texts.
        source_language: Language that the others are compared with.
        confidence: Coverage of the intervals.
        settings: How it was embedded and measured.
        models: By name.
    """

    data: str
    source_language: str
    confidence: Confidence
    settings: dict[str, Any] = field(default_factory=dict)
    models: Annotated[dict[str, ModelResult], named_by_key("name")] = field(default_factory=dict)
    measurement: Literal["hidden_space"] = "hidden_space"

    def __post_init__(self) -> None:
        for name, model in self.models.items():
            if model.shown_layer not in model.layers:
                raise ValueError(f"`shown_layer` of {name!r} to be one of its `layers`")
            if not model._numbers_of_components:
                raise ValueError(f"a `between_class_ratio_N` in the shown layer of {name!r}")

    @classmethod
    def read(cls, folder: str | Path) -> HiddenSpace:
        """The analysis that was written to a folder.

        Raises:
            StorageError: There is none, or the file is damaged.
        """
        return read_typed(
            Path(folder) / FILE, cls, "So it is no analysis of the hidden space; analyse again to make one."
        )
