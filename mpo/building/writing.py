"""What a build leaves behind: groups as Parquet and JSON Lines, what was dropped, counts, a data card and a page."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

import mpo
from mpo.building.filters import FILTERS, threshold
from mpo.building.plan import model_name, shown_name
from mpo.building.prompts import Dropped
from mpo.building.recipe import BuildRecipe
from mpo.building.screening import FILTER_STAGE, Counts, Side
from mpo.building.stages import Row, dumped
from mpo.common.characters import without_halves
from mpo.common.files import PART, write_text
from mpo.data.contract import PARTS, messages_text
from mpo.data.languages import language_name
from mpo.errors import StorageError
from mpo.report import charts
from mpo.report.rendering import Raw, Section, html, markdown, page
from mpo.report.tables import Shown

GROUPS, TABLE, DROPPED = "groups.jsonl", "groups.parquet", "dropped.jsonl"
CARD, PAGE, COUNTS, PROVENANCE = "README.md", "report.html", "build.json", "provenance.json"

_MOST_CHARACTERS = 2_000
_ROWS_AT_ONCE = 1024


def _schema() -> pa.Schema:
    text = pa.string()
    messages = pa.list_(pa.struct([("role", text), ("content", text)]))
    pair = pa.struct([("language", text), *((part, messages) for part in PARTS)])
    made_by = pa.struct([(part, text) for part in PARTS])
    return pa.schema(
        [
            ("source", pair),
            ("targets", pa.list_(pair)),
            ("kind", text),
            ("id", text),
            ("made_by", pa.struct([("source", made_by), ("targets", pa.list_(made_by))])),
            ("reward_gap", pa.float64()),
        ]
    )


class Output:
    """The files of groups and dropped texts, written while they come and named when all are there."""

    def __init__(self, folder: Path, examples: int) -> None:
        """Write into a folder.

        Args:
            folder: Where they go.
            examples: Dropped texts to keep per filter and language, for the page.
        """
        self.folder, self._examples = folder, examples
        self.examples: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        self.first: list[Row] = []
        self._waiting: list[Row] = []

    def __enter__(self) -> Output:
        self._paths = {name: self.folder / f".{name}{PART}" for name in (GROUPS, TABLE, DROPPED)}
        self._files: list[IO[str]] = []
        try:
            self._groups = self._open(GROUPS)
            self._dropped = self._open(DROPPED)
            self._table = pq.ParquetWriter(self._paths[TABLE], _schema(), compression="zstd")
        except OSError as error:
            raise self._failed(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write_table()
            self._table.close()
            for file in self._files:
                file.close()
            if kind is None:
                for name, path in self._paths.items():
                    os.replace(path, self.folder / name)
        except OSError as failure:
            raise self._failed(failure) from failure

    def drop(self, each: Dropped, source: str | None = None) -> None:
        """Writes what was left out.

        Args:
            each: What.
            source: The text it was made of, for the page.
        """
        self._write(
            self._dropped, {name: value for name, value in asdict(each).items() if value not in (None, [])}
        )
        kept = self.examples[each.reason][each.language or ""]
        if each.stage == FILTER_STAGE and len(kept) < self._examples:
            kept.append({**asdict(each), "source": source})

    def add(self, group: Row) -> None:
        """Writes a group."""
        self._write(self._groups, group)
        if len(self.first) < self._examples:
            self.first.append(group)
        self._waiting.append(group)
        if len(self._waiting) >= _ROWS_AT_ONCE:
            self._write_table()

    def _open(self, name: str) -> IO[str]:
        file = open(self._paths[name], "w", encoding="utf-8", newline="\n")  # noqa: SIM115 - closed by __exit__
        self._files.append(file)
        return file

    def _write(self, file: IO[str], row: Row) -> None:
        try:
            file.write(dumped(row))
        except OSError as error:
            raise self._failed(error) from error

    def _write_table(self) -> None:
        if self._waiting:
            try:
                self._table.write_table(
                    pa.Table.from_pylist(_without_halves(self._waiting), schema=_schema())
                )
            except OSError as error:
                raise self._failed(error) from error
            self._waiting.clear()

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(
            f"Cannot write the groups in {self.folder}: {error.strerror or error}. What the stages made is kept; make room, and "
            "run the same command again."
        )


def _without_halves(value: Any) -> Any:
    if isinstance(value, str):
        return without_halves(value)
    if isinstance(value, dict):
        return {key: _without_halves(item) for key, item in value.items()}
    return [_without_halves(item) for item in value] if isinstance(value, list) else value


def source_of(each: Dropped, sides: dict[str, Side], source_language: str) -> str | None:
    """The text that a dropped one was translated from."""
    if each.language is None or each.language == source_language or each.part is None:
        return None
    text = sides[source_language].texts[each.part]
    return None if text is None else str(text)


# --------------------------------------------------------------------------------------------------------------- for people


def write_card(folder: Path, recipe: BuildRecipe, counts: Counts) -> Path:
    """Writes ``README.md``, the data card."""
    found = counts.by_filter()
    languages = [recipe.source_language, *recipe.languages]
    model = recipe.model
    text = markdown(
        "data_card.md",
        title=recipe.page.title,
        metadata_languages=Raw(", ".join(languages)),
        groups=f"{counts.groups.total():,}",
        dominant=language_name(recipe.source_language),
        targets=[language_name(code) for code in recipe.languages],
        model=None if model is None else model_name(model),
        kinds=[
            (kind, f"{count:,}", f"{counts.pairs[kind]:,}", f"{counts.groups[kind]:,}")
            for kind, count in sorted(counts.prompts.items())
        ],
        languages=[
            (language_name(code), f"{made:,}", f"{counts.kept[code]:,}") for code, made in counts.made.items()
        ],
        gaps=(counts.gaps["positive"], counts.gaps.total()) if counts.gaps else None,
        filter_languages=[language_name(code) for code in languages],
        filters=[
            (name, shown, each.rule, [found[name][code] for code in languages])
            for name, each in FILTERS.items()
            if (shown := threshold(name, recipe.filters)) is not None
        ],
        stages=[
            (stage, reason, count)
            for stage, reasons in counts.by_stage().items()
            for reason, count in reasons.most_common()
        ],
        text_origins=sorted(counts.origins.items()),
        made=datetime.now(UTC).strftime("%Y-%m-%d"),
        version=mpo.__version__,
        data=", ".join(map(shown_name, recipe.prompts.data)),
    )
    return write_text(folder / CARD, text)


def write_page(folder: Path, recipe: BuildRecipe, counts: Counts, output: Output) -> Path:
    """Writes ``report.html``."""
    found = counts.by_filter()
    on = {name: shown for name in FILTERS if (shown := threshold(name, recipe.filters)) is not None}
    lead = (
        f"{counts.groups.total():,} groups of {counts.prompts.total():,} prompts, in {language_name(recipe.source_language)} and "
        f"{len(recipe.languages)} target languages."
    )
    body = html(
        "data_build.html",
        lead=lead,
        languages=[
            (
                language_name(code),
                False,
                [
                    Shown(f"{made:,}"),
                    Shown(f"{counts.kept[code]:,}"),
                    Shown(f"{counts.kept[code] / made:.0%}" if made else "-"),
                ],
            )
            for code, made in counts.made.items()
        ],
        filters=charts.bars({FILTERS[name].title: found[name].total() for name in on}, 0),
        rules=[(FILTERS[name].title, FILTERS[name].rule, shown) for name, shown in on.items()],
        stages=charts.bars(
            {
                f"{stage}: {reason}": count
                for stage, reasons in counts.by_stage().items()
                for reason, count in reasons.most_common(12)
            },
            0,
        ),
    )
    sections = [Section("counts", "What was made, and what was left out", body)]
    if recipe.page.examples:
        sections.append(Section("examples", "Examples", _examples(recipe, output)))
    tiles = [
        {"what": "Groups", "number": f"{counts.groups.total():,}", "unit": f"of {counts.prompts.total():,} prompts", "how": "", "strong": "", "kind": ""},
        {"what": "Target pairs", "number": f"{counts.kept.total():,}", "unit": f"of {counts.made.total():,} made", "how": "", "strong": "", "kind": ""},
    ]  # fmt: skip
    if counts.gaps:
        tiles.append(
            {"what": "Reward gap above 0", "number": f"{counts.gaps['positive']:,}", "unit": f"of {counts.gaps.total():,} harmful groups", "how": "under the model to be trained", "strong": "", "kind": ""}
        )  # fmt: skip
    text = page(
        "page.html",
        recipe.page.title,
        sections=sections,
        opening="",
        models=[],
        tiles=tiles,
        findings=[],
        answers_page=None,
    )
    return write_text(folder / PAGE, text)


def _examples(recipe: BuildRecipe, output: Output) -> str:
    filters = [
        (
            f"{each.title} ({sum(map(len, output.examples[name].values()))})",
            [
                {**example, "measured": f"{example['value']}, allowed {example['threshold']}"}
                for examples in output.examples[name].values()
                for example in examples
            ],
        )
        for name, each in FILTERS.items()
        if name in output.examples
    ]
    return html(
        "data_examples.html",
        filters=filters,
        groups=[
            {
                "id": group["id"],
                "kind": group["kind"],
                "pairs": [*map(_shown_pair, [group["source"], *group["targets"]])],
            }
            for group in output.first
        ],
        source_language=recipe.source_language,
        most=_MOST_CHARACTERS,
    )


def _shown_pair(pair: Row) -> dict[str, Any]:
    return {
        "name": language_name(pair["language"]),
        "language": pair["language"],
        "texts": [(part, messages_text(pair[part])) for part in PARTS],
    }
