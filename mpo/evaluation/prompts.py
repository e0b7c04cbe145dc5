"""Prompt sets: requests in several languages, from published files, from a user's own, or from the Hub.

Three shapes of table are told apart by their columns:

- *wide*: one column per language, as MultiJail and AdvBench-X are published;
- *long*: a column with the language and one with the prompt, as most people keep their own;
- *one language per file*, which the file's name ends in (``harmful_test_ar.json``), as PolyRefuse is published.

CSRT is a table of its own: each prompt mixes languages, and its column is called ``csrt``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo.common.characters import half_character
from mpo.common.checks import check_limit, check_name
from mpo.common.files import read_named_text
from mpo.common.words import show_name
from mpo.data import LANGUAGES, normalize_language
from mpo.data.contract import RowError
from mpo.data.forms.readers import PROMPT_COLUMNS
from mpo.data.languages import language_of_file, normalize_language_setting
from mpo.data.reading import Rows, looks_like_path, missing_file_error, read_file, read_hub
from mpo.errors import ConfigError, DataError

SLOT = "{prompt}"
"""Where a template takes the prompt."""

MIXED = "mul"
"""Language of prompts that mix several: the code that ISO 639-2 has for them."""

_LANGUAGE_COLUMNS = ("language", "lang")
_ID_COLUMNS = ("prompt_id", "id")

_ON_THE_HUB = {"multijail": "DAMO-NLP-SG/MultiJail", "csrt": "walledai/CSRT"}
_NOT_ON_THE_HUB = {
    "advbench-x": "AdvBench-X is published as a CSV file with one column per language",
    "polyrefuse": (
        "PolyRefuse is published as JSON files, one per language, in github.com/mainlp/Multilingual-Refusal"
    ),
}


@dataclass(frozen=True)
class Prompt:
    """One request in one language.

    Attributes:
        prompt_id: The same for the translations of one request.
        language: Code of its language, :data:`MIXED` for several at once.
        text: The request, exactly as it is in the data.
    """

    prompt_id: str
    language: str
    text: str

    @property
    def id(self) -> str:
        """Unique within a prompt set."""
        return f"{self.prompt_id}/{self.language}"


@dataclass(frozen=True)
class PromptSet:
    """Requests in the order of the data.

    Attributes:
        name: Short name, which the results' folder is called.
        prompts: The requests. No two have the same id.
        origin: Files or dataset they came from, for people to read.
        dropped: Bad cells that ``bad_rows="drop"`` left out.
    """

    name: str
    prompts: tuple[Prompt, ...]
    origin: str
    dropped: int = 0

    @property
    def languages(self) -> list[str]:
        """Codes of the languages, in the order in which they first appear."""
        return list(dict.fromkeys(prompt.language for prompt in self.prompts))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all ids and texts in their order; the same on every machine, wherever the file lies."""
        digest = hashlib.sha256(b"mpo prompts 1")
        for prompt in self.prompts:
            for text in (prompt.prompt_id, prompt.language, prompt.text):
                data = text.encode("utf-8", "surrogatepass")
                digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


@dataclass(frozen=True)
class _Columns:
    """How the rows of one file become prompts: text columns with their languages, or a column that names it."""

    texts: tuple[tuple[str, str | None], ...]
    language: str | None = None
    fallback: str | None = None  # text column where the first is missing


def load_prompts(
    source: str | Sequence[str],
    *,
    name: str | None = None,
    languages: Sequence[str] | None = None,
    limit: int | None = None,
    prompt_column: str | None = None,
    language_column: str | None = None,
    language: str | None = None,
    split: str = "train",
    bad_rows: str = "error",
) -> PromptSet:
    """Reads a prompt set.

    Args:
        source: File or files (.csv, .json, .jsonl, .parquet), ``multijail``, ``csrt``, or a dataset on the Hub.
        name: Name of the set; by default that of the dataset or the file, without the language at its end.
        languages: Keep only these, codes or names.
        limit: Keep the first so many requests, with all their translations.
        prompt_column: Column with the prompt, where it cannot be guessed.
        language_column: Column with the language, where it cannot be guessed.
        language: Language of prompts that carry no label.
        split: Split of a Hub dataset.
        bad_rows: ``"error"`` stops at an empty prompt or an unknown language; ``"drop"`` leaves it out and counts it.

    Raises:
        DataError: There is no such file or dataset, its columns cannot be understood, a row is bad, two prompts have
            the same id, no prompt is in one of ``languages``, or nothing is left.
        ConfigError: A setting has an impossible value.
    """
    if bad_rows not in ("error", "drop"):
        raise ConfigError(f"bad_rows: expected 'error' or 'drop', got {bad_rows!r}.")
    check_limit(limit)
    if name is not None:
        check_name(name)
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise ConfigError("prompts: expected the name of a prompt set, or at least one file.")
    if language is not None:
        language = normalize_language_setting(language, "prompt_language")
    keep = (
        None if languages is None else {normalize_language_setting(code, "languages") for code in languages}
    )
    prompts: dict[str, Prompt] = {}
    dropped = 0
    for each in sources:
        rows, label, fallback_language = _open(each, split, language)
        for found in _prompts(rows, label, prompt_column, language_column, fallback_language):
            if isinstance(found, RowError):
                if bad_rows == "error":
                    raise found
                dropped += 1
            elif found.id in prompts:
                raise DataError(
                    f"the prompt {found.prompt_id!r} in {found.language} is there twice. Give every prompt an id of its own "
                    "in a column `id`, and its translations the same.",
                    file=label,
                )
            else:
                prompts[found.id] = found
    kept = _select(prompts.values(), keep, limit)
    origin = ", ".join(show_name(os.path.basename(each)) for each in sources)
    present = {prompt.language for prompt in prompts.values()}
    missing = set() if keep is None else keep - present
    if missing or not kept:
        gone = f"in {', '.join(sorted(missing))}" if missing else "left"
        raise DataError(
            f"no prompt is {gone}. Languages found: "
            f"{', '.join(sorted(present)) or 'none'}; bad rows: {dropped}.",
            file=origin,
        )
    return PromptSet(name or _set_name(sources), tuple(kept), origin, dropped)


def load_template(text_or_file: str) -> str:
    """A template for prompts, such as MultiJail's intentional scenario: a text that says where the prompt goes.

    Args:
        text_or_file: Text with the slot ``{prompt}``, or a file that holds such a text.

    Raises:
        ConfigError: There is no such file, or the text has no slot.
    """
    text = text_or_file
    if SLOT not in text:
        try:
            text = read_named_text(text_or_file)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"template: {show_name(text_or_file)!r} has no slot {SLOT} and is no file that can be read ({error}). Expected "
                f"a text with {SLOT} where the prompt goes, or a file with such a text."
            ) from None
        if SLOT not in text:
            raise ConfigError(f"template: {text_or_file} has no slot {SLOT}. Write it where the prompt goes.")
    return text


def fill_template(template: str | None, prompt: str) -> str:
    """The template with the prompt in its slot; the prompt itself without a template.

    Other braces stay as they are, also those of the prompt.
    """
    return prompt if template is None else template.replace(SLOT, prompt)


# ------------------------------------------------------------------------------------------------------------- reading


def _open(source: str, split: str, language: str | None) -> tuple[Rows, str, str | None]:
    """Rows, how errors call their origin, and the language of rows without a label."""
    path = Path(source).expanduser()
    if path.is_file():
        return read_file(path, source), source, language or language_of_file(path)
    known = source.lower()
    if known in _NOT_ON_THE_HUB:
        raise DataError(
            f"{_NOT_ON_THE_HUB[known]}, not as a dataset on the Hub. Download it and pass the file(s) instead of the name.",
            file=source,
        )
    if known not in _ON_THE_HUB and looks_like_path(source):
        raise missing_file_error(path)
    dataset = _ON_THE_HUB.get(known, source)
    return read_hub(dataset, split), dataset, language or (MIXED if known == "csrt" else None)


def _set_name(sources: Sequence[str]) -> str:
    first = sources[0]
    path = Path(first).expanduser()
    stem = path.stem if path.is_file() else first
    if path.is_file() and (code := language_of_file(path)) is not None and len(sources) > 1:
        stem = stem[: -len(code) - 1]
    return re.sub(r"[^\w.-]+", "_", stem).strip("._").lower() or "prompts"


def _prompts(
    rows: Rows,
    label: str,
    prompt_column: str | None,
    language_column: str | None,
    language: str | None,
) -> Iterator[Prompt | RowError]:
    """Prompts of one file or dataset, and an error for each cell that holds none."""
    every = list(rows)
    columns: _Columns | None = None
    counts: dict[str, int] = {}
    for number, row in every:
        if isinstance(row, RowError):
            yield row
            continue
        if not isinstance(row, Mapping):
            yield RowError(
                f"expected an object with named fields, got {type(row).__name__}.", file=label, row=number
            )
            continue
        if columns is None:
            header = _header(row for _, row in every)
            columns = _columns(header, label, prompt_column, language_column, language)
        for column, code in columns.texts:
            text = row.get(column)
            if text is None and columns.fallback is not None:
                column, text = columns.fallback, row.get(columns.fallback)
            try:
                written = code if code is not None else _row_language(row, columns.language, language)
            except DataError as error:
                yield RowError(str(error), file=label, row=number, field=columns.language)
                continue
            # A bad cell counts, too: the prompts behind it stay the translations of the others' n-th.
            count = counts.get(written, 0)
            counts[written] = count + 1
            if not isinstance(text, str) or not text.strip():
                yield RowError("expected a prompt, got nothing.", file=label, row=number, field=column)
                continue
            if problem := half_character(text):
                yield RowError(f"the prompt {problem}", file=label, row=number, field=column)
                continue
            yield Prompt(_prompt_id(row, count if columns.language is not None else number), written, text)


def _header(rows: Iterable[Any]) -> dict[str, Any]:
    """All columns of a table with the first value that is not blank: no row need have every language."""
    header: dict[str, Any] = {}
    for row in rows:
        if isinstance(row, Mapping):
            for name, value in row.items():
                if _is_blank(header.get(name)):
                    header[name] = None if _is_blank(value) else value
    return header


def _is_blank(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _columns(
    row: Mapping[str, Any],
    label: str,
    prompt_column: str | None,
    language_column: str | None,
    language: str | None,
) -> _Columns:
    names = {str(name).strip().lower(): str(name) for name in row}
    for setting, wanted in (("prompt_column", prompt_column), ("language_column", language_column)):
        if wanted is not None and wanted not in row:
            raise DataError(
                f"there is no column {show_name(wanted)!r} (`{setting}`). Its columns are {_listed(row)}.",
                file=label,
            )
    own = language_column or _first(names, _LANGUAGE_COLUMNS)
    if prompt_column is None and language_column is None and "csrt" in names:
        return _Columns(((names["csrt"], language or MIXED),))
    if prompt_column is None and "instruction_translated" in names and "instruction" in names:
        # Files in the original language need not repeat it under the other name.
        fallback = names["instruction"] if language == "en" else None
        return _Columns(((names["instruction_translated"], _known(language, label)),), fallback=fallback)
    wide = [] if own or prompt_column else _language_columns(row)
    if len(wide) > 1 or (wide and _first(names, PROMPT_COLUMNS) is None):
        return _Columns(tuple(wide))
    text = prompt_column or _first(names, PROMPT_COLUMNS)
    if text is None:
        raise DataError(
            f"no column with prompts was found. Its columns are {_listed(row)}. Expected one column per language (`en`, `bn`, "
            "...), or `language` and `prompt`; name others with `prompt_column` and `language_column`.",
            file=label,
        )
    return _Columns(((text, None if own else _known(language, label)),), language=own)


def _language_columns(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Columns that are called like a language and do not hold something else: an `id` is rarely Indonesian."""
    found = []
    for name, value in row.items():
        column = str(name).strip()
        if value is not None and not isinstance(value, str):
            continue
        text = (value or "").strip()
        if text and not any(c.isalpha() for c in text):
            continue
        if column.lower() in _ID_COLUMNS and " " not in text:
            continue
        try:
            code = normalize_language(column)
        except DataError:
            continue
        # Three letters are rather a word (`cat`, `tag`) than one of ISO 639-3's 8,000 codes.
        if code in LANGUAGES and len(column) != 3:
            found.append((str(name), code))
    return found


def _row_language(row: Mapping[str, Any], column: str | None, default: str | None) -> str:
    label = None if column is None else row.get(column)
    if isinstance(label, str) and label.strip():
        return normalize_language(label)
    if default is not None:
        return default
    raise DataError("expected a language code such as 'bn', got nothing.")


def _known(language: str | None, label: str) -> str:
    if language is None:
        raise DataError(
            "nothing says which language the prompts are in. Add a column `language`, end the file's name in the code "
            "(prompts_bn.json), or set `prompt_language`.",
            file=label,
        )
    return language


def _prompt_id(row: Mapping[str, Any], default: int) -> str:
    for name in _ID_COLUMNS:
        value = row.get(name)
        if not _is_blank(value):
            return str(value).strip()
    return str(default)


def _select(prompts: Iterable[Prompt], languages: set[str] | None, limit: int | None) -> list[Prompt]:
    kept = [prompt for prompt in prompts if languages is None or prompt.language in languages]
    first = set(list(dict.fromkeys(prompt.prompt_id for prompt in kept))[:limit])
    return [prompt for prompt in kept if prompt.prompt_id in first]


def _first(names: Mapping[str, str], wanted: Iterable[str]) -> str | None:
    return next((names[name] for name in wanted if name in names), None)


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(f"`{show_name(name)}`" for name in row) or "none"
