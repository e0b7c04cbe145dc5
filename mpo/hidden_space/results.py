"""What an analysis found: estimates per model, layer and language, as JSON and as a table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpo.common.tables import TextTable, interval, printable_name, signed
from mpo.data.languages import language_name
from mpo.errors import StorageError
from mpo.hidden_space.compare import LanguageResult, LayerResult
from mpo.hidden_space.resampling import Estimate

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
    "pair_distance_ratio": "Pair distance",
    "pair_nearest": "Pair nearest",
    "pair_consistency": "Pair consistency",
}
"""Names of the measures in tables and pictures."""


@dataclass
class ModelResult:
    """One model, before and after.

    Attributes:
        name: what it is called.
        reference: model before; None for a model alone.
        aligned: model after; None where it is the reference with an adapter.
        adapter: the adapter.
        shown_layer: the layer of tables and pictures.
        layers: estimates by layer.
    """

    name: str
    reference: str | None
    aligned: str | None
    adapter: str | None
    shown_layer: str
    layers: dict[str, LayerResult] = field(default_factory=dict)

    @property
    def is_comparison(self) -> bool:
        """Whether there is a before."""
        return self.reference is not None

    @property
    def components(self) -> int:
        """The smallest number of principal components that was measured on."""
        (one, *_) = self.shown.languages.values()
        found = (re.fullmatch(r"between_class_ratio_(\d+)", measure) for measure in one.after)
        return min(int(match[1]) for match in found if match)

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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; an estimate is ``[value, low, high]``, with the p-value behind it where there is one."""
        return {
            "reference": self.reference,
            "aligned": self.aligned,
            "adapter": self.adapter,
            "shown_layer": self.shown_layer,
            "layers": {name: _layer_to_dict(layer) for name, layer in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, name: str, values: Mapping[str, Any]) -> ModelResult:
        """What :meth:`to_dict` gave."""
        return cls(
            name,
            values["reference"],
            values["aligned"],
            values["adapter"],
            values["shown_layer"],
            {layer: _layer_from_dict(found) for layer, found in values["layers"].items()},
        )


@dataclass
class HiddenSpace:
    """An analysis of one or more models on one set of texts.

    Attributes:
        data: name of the texts.
        source_language: language that the others are compared with.
        confidence: coverage of the intervals.
        settings: how it was embedded and measured.
        models: by name.
        provenance: where the numbers came from.
    """

    data: str
    source_language: str
    confidence: float
    settings: dict[str, Any] = field(default_factory=dict)
    models: dict[str, ModelResult] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "measurement": MEASUREMENT,
            "data": self.data,
            "source_language": self.source_language,
            "confidence": self.confidence,
            "settings": self.settings,
            "models": {name: model.to_dict() for name, model in self.models.items()},
            "provenance": self.provenance,
        }

    @classmethod
    def read(cls, folder: str | Path) -> HiddenSpace:
        """The analysis that was written to a folder.

        Raises:
            StorageError: there is none, or the file is damaged.
        """
        path = Path(folder) / FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                values["data"],
                values["source_language"],
                values["confidence"],
                values["settings"],
                {name: ModelResult.from_dict(name, model) for name, model in values["models"].items()},
                values["provenance"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{path} is no analysis of the hidden space ({type(error).__name__}: {error}). Analyse again to make one."
            ) from error


_GROUPS = ("before", "after", "change", "between")


def _layer_to_dict(layer: LayerResult) -> dict[str, Any]:
    return {
        "languages": {
            code: {
                "count": one.count,
                **{name: {m: e.to_list() for m, e in getattr(one, name).items()} for name in _GROUPS},
            }
            for code, one in layer.languages.items()
        },
        "cosines": {
            state: {a: {b: e.to_list() for b, e in row.items()} for a, row in matrix.items()}
            for state, matrix in layer.cosines.items()
        },
    }


def _layer_from_dict(values: Mapping[str, Any]) -> LayerResult:
    return LayerResult(
        {
            code: LanguageResult(
                one["count"],
                **{name: {m: Estimate.from_list(e) for m, e in one[name].items()} for name in _GROUPS},
            )
            for code, one in values["languages"].items()
        },
        {
            state: {a: {b: Estimate.from_list(e) for b, e in row.items()} for a, row in matrix.items()}
            for state, matrix in values["cosines"].items()
        },
    )
