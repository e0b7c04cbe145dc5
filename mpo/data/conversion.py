"""From files in the forms that people have to plain pairs in one language, or to groups where there is a file per language."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mpo.common.characters import half_character, printable
from mpo.common.files import refuse_input, whole_file
from mpo.common.words import counted
from mpo.data.contract import PARTS, RowError, _columns, _label, _Place, normal_form
from mpo.data.faults import BadRow, grouped_faults
from mpo.data.forms.readers import PlainRow, holds_marks, read_column
from mpo.data.forms.recognition import (
    Form,
    as_columns,
    form_of,
    header_of,
    is_empty,
    is_group,
    known_columns,
    unread_columns,
)
from mpo.data.languages import (
    language_name,
    language_of_file,
    normalize_language_setting,
    same_language,
)
from mpo.data.loading import _named_sources, show_path
from mpo.data.reading import Rows
from mpo.errors import ConfigError, DataError

_FAULTS_SHOWN = 12
_LOOKED_AT = 200  # rows by which a file's form is known
_KEPT = ("id", "prompt_id", "kind")
_LANGUAGE_COLUMNS = ("language", "lang")
ROW = "row"
"""The key that joins files by the number of the row, where they have no column of this name."""


@dataclass
class ConvertedFile:
    """What one file was and gave.

    Attributes:
        name: The file or dataset.
        form: What it holds, as in ``"HH-RLHF's dialogs (...)"``.
        rows: Rows read.
    """

    name: str
    form: str
    rows: int = 0


@dataclass
class Conversion:
    """The result of :func:`convert`.

    Attributes:
        output: The file written.
        files: What each input was.
        written: Rows of the output: pairs and prompts, or groups.
        parts: Number of written rows by what they have: ``pairs``, ``prompts with chosen``, ``prompts with rejected``,
            ``prompts``; or ``groups`` and ``translations``.
        left_out: Number of sound rows that were not written, by reason.
        dropped: Bad rows.
        notes: What a person should look at.
    """

    output: Path
    files: list[ConvertedFile] = field(default_factory=list)
    written: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    dropped: list[BadRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_text(self) -> str:
        """What was read, written and left out, for a person."""
        lines = [f"{file.name} holds {file.form}: {counted(file.rows, 'row')}." for file in self.files]
        parts = ", ".join(_counted(number, what) for what, number in self.parts.items())
        lines.append(f"Written to {self.output}: {parts}.")
        lines += [f"Left out: {number:,} {reason}." for reason, number in self.left_out.items()]
        if self.dropped:
            lines.append(f"Bad rows, left out: {len(self.dropped):,}.")
            faults = grouped_faults(self.dropped)
            lines += [f"  {fault.place()}: {fault.reason}" for fault in faults[:_FAULTS_SHOWN]]
            if len(faults) > _FAULTS_SHOWN:
                lines.append(f"  and {counted(len(faults) - _FAULTS_SHOWN, 'other kind')} of fault")
        return printable("\n".join([*lines, *self.notes]))


def convert(
    inputs: str | Sequence[str] | Mapping[str, str],
    output: str | Path,
    *,
    key: str | None = None,
    source_language: str = "en",
    keep: Iterable[str] = (),
    split: str = "train",
    bad_rows: str = "error",
) -> Conversion:
    """Bring prompts and preference pairs, in any form of :data:`mpo.data.forms.FORMS`, into the project's own.

    Without ``key`` the output holds plain rows in the source language, as ``mpo data build`` reads them: ``prompt``, and
    ``chosen`` and ``rejected`` where the row has them, each a text, or a list of messages where there are several; with
    ``id``, ``prompt_id`` and ``kind`` where the input has these. With ``key`` the inputs hold translations of each other,
    and the output is groups. Rows of one source in another language than the file says may carry a column ``language``.

    Args:
        inputs: Files (.json, .jsonl, .csv, .parquet; .txt with a prompt a line), names on the Hub; or by language code.
        output: A .jsonl file. It is written whole or not at all.
        key: Column whose value a source and its translations share, or ``"row"`` where row n of every file is the same.
        source_language: Language of plain rows, and of the sources of groups.
        keep: Further columns that go into plain rows as they are.
        split: Split of a dataset on the Hub.
        bad_rows: ``"error"`` stops at the first row that cannot be understood, ``"drop"`` leaves such rows out.

    Raises:
        DataError: A file cannot be read, has no known form, or nothing is left; or a row is bad.
        ConfigError: A setting has an impossible value.
        StorageError: The output cannot be written.
    """
    if bad_rows not in ("error", "drop"):
        raise ConfigError(f"bad_rows: expected 'error' or 'drop', got {bad_rows!r}.")
    dominant = normalize_language_setting(source_language, "source_language")
    named = _named_inputs(inputs)
    target = Path(output).expanduser()
    if target.suffix.lower() != ".jsonl":
        raise ConfigError(f"output: expected a .jsonl file, got {show_path(str(output))!r}.")
    refuse_input(target, (name for name, _ in named))
    if key is None and any(code is not None for _, code in named):
        raise ConfigError(
            "key: files by language are joined by a column that translations share. Name it (`--key id`), or say `--key row` "
            "where row n of every file is the same."
        )
    result = Conversion(target)

    def refuse(error: RowError) -> None:
        if bad_rows == "error":
            raise RowError(
                f"{error.reason} (To leave bad rows out and list them: bad_rows='drop'.)",
                file=error.file,
                row=error.row,
                field=error.field,
            ) from error
        result.dropped.append(BadRow(error.file or "", error.row or 0, error.field, error.reason))

    made = (
        _plain(named, result, refuse, dominant, (*_KEPT, *keep), split)
        if key is None
        else _groups(named, result, refuse, dominant, key, split)
    )
    with whole_file(target) as file:
        for row in made:
            file.write(json.dumps(row, ensure_ascii=False, default=str).encode("utf-8") + b"\n")
            result.written += 1
        if not result.written:
            raise _nothing_left(result)
    return result


def _counted(number: int, what: str) -> str:
    noun, blank, more = what.partition(" ")
    return counted(number, noun.removesuffix("s")) + blank + more


def _named_inputs(inputs: str | Sequence[str] | Mapping[str, str]) -> list[tuple[str, str | None]]:
    if isinstance(inputs, Mapping):
        return [(file, normalize_language_setting(code, "language")) for code, file in inputs.items()]
    names = [inputs] if isinstance(inputs, str) else list(inputs)
    if not names:
        raise ConfigError("inputs: expected at least one file.")
    return [(name, None) for name in names]


def _nothing_left(result: Conversion) -> DataError:
    origin = ", ".join(file.name for file in result.files)
    if result.dropped:
        first = result.dropped[0]
        place = f"row {first.row}" + (f", field `{first.field}`" if first.field else "")
        return DataError(
            f"no good row is left: {len(result.dropped)} bad ones. The first is {place}: {first.reason}",
            file=origin,
        )
    reasons = "; ".join(f"{count} {reason}" for reason, count in result.left_out.items())
    return DataError(f"no row is left: {reasons or 'the files have none'}.", file=origin)


@dataclass
class _Opened:
    """A file whose form is known."""

    name: str
    rows: Rows
    form: Form
    columns: frozenset[str]
    language: str | None


def _open(
    name: str, split: str, language: str | None, dominant: str, result: Conversion, keep: Sequence[str]
) -> _Opened:
    path = Path(name).expanduser()
    ((label, rows),) = _named_sources([name], split, prompts=True)
    rows = ((number, as_columns(row, keep)) for number, row in rows)
    first = list(islice(rows, _LOOKED_AT))
    sound = [row for _, row in first if not isinstance(row, RowError)]
    header = header_of(sound)
    if is_group(header):
        raise DataError(
            "holds groups already: pairs with a source and its translations. There is nothing to convert; `mpo train` takes "
            "it as it is.",
            file=label,
        )
    form = form_of(header)
    if form is None:
        if not sound and first and isinstance(first[0][1], RowError):
            raise first[0][1]
        found = _columns(header) if header else "none (its rows are no objects)"
        raise DataError(
            f"the form of its rows is not known. {known_columns()}. The columns found are {found}.",
            file=label,
        )
    if form.name == "wide-prompts" and dominant not in header:
        raise DataError(
            f"has one column per language and none for the source language {dominant!r}. Its columns are {_columns(header)}; "
            "set source_language.",
            file=label,
        )
    result.files.append(ConvertedFile(label, form.title))
    if form.guessed:
        result.notes.append(
            f"{label}: nothing says where the prompts end; they were taken to be what `chosen` and `rejected` begin with. "
            "Look at some of them."
        )
    columns = frozenset(str(column) for column, value in header.items() if not is_empty(value))
    return _Opened(label, chain(first, rows), form, columns, language or language_of_file(path))


def _read(
    opened: _Opened, dominant: str, result: Conversion, refuse: Any
) -> Iterator[tuple[_Place, Any, PlainRow, str | None]]:
    """Place, raw row, what it holds, and the language in its own column."""
    counts = result.files[-1]
    labels = next((name for name in _LANGUAGE_COLUMNS if name in opened.columns), None)
    for index, row in opened.rows:
        counts.rows += 1
        place = _Place(opened.name, index)
        try:
            if isinstance(row, RowError):
                raise row
            if not isinstance(row, Mapping):
                raise place.error("is no object; expected named fields.")
            if opened.form.name == "wide-prompts":
                plain = read_column(row, dominant, place)
            else:
                plain = opened.form.read(row, place, opened.columns)
            language = _label(row.get(labels), place.at(labels)) if labels else None
        except RowError as error:
            refuse(error)
            continue
        yield place, row, plain, language


def _plain(
    named: Sequence[tuple[str, str | None]],
    result: Conversion,
    refuse: Any,
    dominant: str,
    keep: Sequence[str],
    split: str,
) -> Iterator[dict[str, Any]]:
    for name, _ in named:
        opened = _open(name, split, None, dominant, result, keep)
        if unread := unread_columns(opened.form, opened.columns - {*keep}):
            shown = _columns(dict.fromkeys(unread))
            result.notes.append(f"{opened.name}: columns left out: {shown}. `--keep` takes them along.")
        longer = marked = 0
        for place, row, plain, language in _read(opened, dominant, result, refuse):
            if language is not None and not same_language(language, dominant):
                result.left_out[f"in another language than {language_name(dominant)}"] += 1
                continue
            kept = {column: row[column] for column in keep if not is_empty(row.get(column))}
            broken = next(
                (c for c, value in kept.items() if half_character(str(value))),
                None,
            )
            if broken is not None:
                refuse(place.at(broken).error("holds half a character, which was cut in two."))
                continue
            result.parts[_has(plain)] += 1
            longer += len(plain.prompt) > 1
            marked += any(holds_marks(message["content"]) for message in plain.messages())
            yield {**kept, **plain.to_dict()}
        if longer:
            result.notes.append(
                f"{opened.name}: {counted(longer, 'prompt')} with a system message or several turns. `mpo data build` translates "
                "prompts of one turn; `--prompts.bad_rows drop` leaves the others out and counts them."
            )
        if marked:
            result.notes.append(
                f"{opened.name}: marks of a chat template (`<|im_start|>`, `[INST]`, ...) in the texts of {counted(marked, 'row')}. "
                "They would be trained on as text, inside the model's own. Take them out."
            )


def _has(row: PlainRow) -> str:
    if row.chosen is not None and row.rejected is not None:
        return "pairs"
    beside = "chosen" if row.chosen is not None else "rejected" if row.rejected is not None else None
    return f"prompts with {beside} alone" if beside else "prompts"


def _groups(
    named: Sequence[tuple[str, str | None]],
    result: Conversion,
    refuse: Any,
    dominant: str,
    key: str,
    split: str,
) -> Iterator[dict[str, Any]]:
    sources: dict[str, dict[str, Any]] = {}
    targets: dict[str, list[dict[str, Any]]] = {}
    places: dict[tuple[str, str], _Place] = {}
    for name, code in named:
        opened = _open(name, split, code, dominant, result, (key, *_KEPT))
        if not opened.form.pairs:
            raise DataError(
                f"holds {opened.form.title}. Groups need a chosen and a rejected response in every language: make them with "
                "`mpo data build`, from the prompts in the source language.",
                file=opened.name,
            )
        for place, row, plain, label in _read(opened, dominant, result, refuse):
            try:
                language = label or opened.language
                if language is None:
                    raise place.error(
                        "nothing says which language this row is in. Give files by language (`--language bn=FILE`), end "
                        "their names in the code (pairs_bn.jsonl), or add a column `language`."
                    )
                joined = _key(row, key, place)
                if plain.chosen is None or plain.rejected is None:
                    raise place.error("has no two responses to prefer one of; groups need both.")
                if (before := places.get((joined, language))) is not None:
                    raise place.at(key).error(
                        f"the key stands twice in {language}: {before.file}, row {before.row} has it, too."
                    )
            except RowError as error:
                refuse(error)
                continue
            places[joined, language] = place
            pair = {"language": language, **{part: getattr(plain, part) for part in PARTS}}
            if language == dominant:
                sources[joined] = pair
            else:
                targets.setdefault(joined, []).append(pair)
    if not sources:
        languages = ", ".join(sorted({language for _, language in places})) or "none"
        raise DataError(
            f"no pair is in the source language {dominant!r}. Languages found: {languages}. Set source_language, or give "
            "the file with the sources.",
            file=", ".join(file.name for file in result.files),
        )
    for joined, found in targets.items():
        if joined not in sources:
            for pair in found:
                place = places[joined, pair["language"]]
                refuse(place.at(key).error(f"no row in {language_name(dominant)} has this key."))
    for joined, source in sources.items():
        if joined not in targets:
            result.left_out["without a translation"] += 1
            continue
        result.parts["groups"] += 1
        result.parts["translations"] += len(targets[joined])
        yield {"source": source, "targets": targets[joined]}


def _key(row: Mapping[str, Any], key: str, place: _Place) -> str:
    if key not in row:
        if key == ROW:
            return str(place.row)
        raise place.at(key).error(f"missing; rows are joined by it. The fields found are {_columns(row)}.")
    value = row[key]
    if is_empty(value) or isinstance(value, (Mapping, list, tuple)) or not str(value).strip():
        raise place.at(key).error("is empty or no single value; rows are joined by it.")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas writes a column of whole numbers with a gap in it as 1.0
    return normal_form(str(value).strip())
