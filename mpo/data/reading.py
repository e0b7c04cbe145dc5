"""Reading rows from files, one at a time, with the place of every fault.

JSON, JSON Lines and CSV are parsed here with the standard library and handed to ``datasets`` as validated
rows: its own readers infer one Arrow schema first, so that a row of another type ends in a traceback that
names no row.
Parquet files (which carry a schema) and Hub datasets are read through ``datasets``.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from mpo.common.words import nearest, show_name
from mpo.data.contract import RowError
from mpo.data.forms.recognition import other_form
from mpo.errors import DataError, DependencyError

Rows = Iterator[tuple[int, Any]]
"""0-based row number and the row, or the :class:`RowError` that says why it could not be read."""

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_TEXT = ".txt"
_JSON_LINES = (".jsonl", ".ndjson")

_SIGNATURES: list[tuple[bytes, str]] = [
    (b"\x1f\x8b", "is gzip-compressed. Decompress it first (gunzip)"),
    (b"PK\x03\x04", "is a zip archive. Unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is zstd-compressed. Decompress it first (unzstd)"),
    (b"BZh", "is bzip2-compressed. Decompress it first (bunzip2)"),
    (b"\xfd7zXZ", "is xz-compressed. Decompress it first (unxz)"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the data itself. Fetch the data (git lfs pull)"),
    (b"/annex/objects/", "is a git-annex pointer, not the data itself. Fetch the data (git annex get)"),
    (b"<!DOCTYPE", "is an HTML page, not data. Download the raw file"),
    (b"<!doctype", "is an HTML page, not data. Download the raw file"),
    (b"<html", "is an HTML page, not data. Download the raw file"),
    (b"ARROW1", "is an Arrow file. Load it with datasets.Dataset.from_file and pass the dataset"),
    (b"\x80\x04", "is a Python pickle, which is never loaded. Store the rows as JSON Lines"),
    (b"\x80\x05", "is a Python pickle, which is never loaded. Store the rows as JSON Lines"),
    (b"\x00\x00\xfe\xff", "is UTF-32 text. Convert it to UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\xff\xfe\x00\x00", "is UTF-32 text. Convert it to UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\xff\xfe", "is UTF-16 text. Convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "is UTF-16 text. Convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
]
_PARQUET = b"PAR1"
_BOM = b"\xef\xbb\xbf"


def looks_like_path(name: str) -> bool:
    """True where a name can only mean a local file, not a dataset on the Hub."""
    return (
        name.endswith(SUFFIXES + _JSON_LINES)
        or name.startswith((".", "/", "~"))
        or "\\" in name
        or name.count("/") > 1
        or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is None
    )


def missing_file_error(path: Path) -> DataError:
    """The error for a file that is not there, with the nearest name beside it."""
    folder = path.parent
    if not folder.is_dir():
        return DataError(f"no such file; the folder {str(folder)!r} does not exist either.", file=str(path))
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        names = []
    near = nearest(path.name, names)
    hint = f" Did you mean {show_name(near)!r}?" if near else ""
    return DataError(f"no such file.{hint} The folder is {str(folder.resolve())!r}.", file=str(path))


def read_file(path: Path, name: str, *, prompts: bool = False) -> Rows:
    """Rows of a local file, streamed.

    Args:
        path: The file. Its suffix says how it is read.
        name: How errors call it.
        prompts: Prompts are enough: a .txt file has one a line.

    Raises:
        DataError: The file as a whole cannot be read: it is missing, empty, a folder, compressed, in another
            encoding or format, or its structure breaks off. Faults of single rows are yielded instead.
    """
    head = _head(path, name)
    suffix = path.suffix.lower()
    known = (*SUFFIXES, _TEXT) if prompts else SUFFIXES
    if suffix not in (*known, *_JSON_LINES):
        near = nearest(suffix, known)
        hint = f" Did you mean {near}?" if near else ""
        raise DataError(f"unsupported suffix {suffix!r}.{hint} Supported: {', '.join(known)}.", file=name)
    start = head.removeprefix(_BOM).lstrip()
    for signature, text in _SIGNATURES:
        if head.startswith(signature) or start.startswith(signature):
            raise DataError(f"{text}.", file=name)
    if head.startswith(_PARQUET) != (suffix == ".parquet"):
        if suffix == ".parquet":
            raise DataError(
                "is no Parquet file: its first bytes are not PAR1. Give it its own suffix.", file=name
            )
        raise DataError(f"is a Parquet file named {suffix}. Rename it to .parquet.", file=name)
    if suffix == ".parquet":
        yield from _parquet(path, name)
    elif suffix == ".csv":
        yield from _csv(path, name)
    elif suffix == _TEXT:
        yield from _text_lines(path, name)
    elif suffix in _JSON_LINES:
        yield from _json_lines(path, name)
    else:
        yield from _json(path, name)


def _head(path: Path, name: str) -> bytes:
    try:
        if path.is_dir():
            files = sorted(file.name for file in path.iterdir())
            if "dataset_info.json" in files or "dataset_dict.json" in files:
                raise DataError(
                    "is a folder that datasets has saved. Load it with datasets.load_from_disk and pass the dataset.",
                    file=name,
                )
            data = [file for file in files if file.endswith(SUFFIXES)][:5]
            hint = f" Give its files one by one: {', '.join(map(show_name, data))}." if data else ""
            raise DataError(f"is a folder; expected a file.{hint}", file=name)
        if not path.exists():
            raise missing_file_error(path)
        if not path.is_file():
            raise DataError("is a pipe or a device; expected a file. Write the rows to one first.", file=name)
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}.", file=name) from error
    if not head.removeprefix(_BOM).strip():
        raise DataError("is empty; expected rows.", file=name)
    return head


class _Flaw(ValueError):
    """A fault inside one JSON value that the parser itself accepts."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                # Marked instead of raised: inside a list the parser could not go on behind this row.
                result[key] = _DuplicateKey(key)
            seen.add(key)
    return result


class _DuplicateKey:
    def __init__(self, key: str) -> None:
        self.key = key


def _find_duplicate(value: Any, path: str = "") -> str | None:
    if isinstance(value, _DuplicateKey):
        return path
    if isinstance(value, dict):
        items = ((f"{path}.{key}" if path else str(key), item) for key, item in value.items())
    elif isinstance(value, list):
        items = ((f"{path}[{index}]", item) for index, item in enumerate(value))
    else:
        return None
    for step, item in items:
        found = _find_duplicate(item, step)
        if found:
            return found
    return None


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _checked(value: Any, name: str, row: int) -> Any:
    """The value, or the error of a row that holds a field twice."""
    found = _find_duplicate(value)
    if found:
        return RowError(
            "stands twice in the same object; keep one.", file=name, row=row, field=show_name(found)
        )
    return value


def _decode(raw: bytes, name: str, row: int | None, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            raise RowError(
                f"{where}: the text breaks off inside a character; the file is truncated. Fetch it again.",
                file=name,
                row=row,
            ) from error
        raise RowError(
            f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start}. {_conversion(raw[max(0, error.start - 1000) : error.start + 10_000])}",
            file=name,
            row=row,
        ) from error


def _conversion(raw: bytes) -> str:
    """How to bring bytes to UTF-8; Latin-1 is named where they read as words of it."""
    text = raw.decode("latin-1")
    foreign = [place for place, letter in enumerate(text) if letter >= "\x80"]
    # In Latin-1, accented letters stand alone between plain ones; in other encodings, high bytes stand together.
    neighbours = sum(second == first + 1 for first, second in pairwise(foreign))
    accents = all(text[place] in "¡«°»¿" or text[place].isalpha() for place in foreign)
    if accents and 4 * neighbours <= len(foreign):
        return "Convert it to UTF-8 (it looks like Latin-1: iconv -f LATIN1 -t UTF-8)."
    return (
        "Save it as UTF-8 in the program that wrote it, or convert it from the encoding it is in (Chinese is often GB18030, "
        "Japanese Shift_JIS, Korean EUC-KR, Arabic WINDOWS-1256: iconv -f ENCODING -t UTF-8)."
    )


def _bad_json(error: Exception, name: str, row: int, where: str, *, ended: bool = False) -> RowError:
    if isinstance(error, RecursionError):
        reason = f"{where}: lists or objects are nested too deeply."
    elif ended:
        reason = f"{where}: the text breaks off inside this row; the file is truncated. Fetch it again."
    elif isinstance(error, json.JSONDecodeError):
        reason = f"{where}: not JSON: {error.msg}."
    else:
        reason = f"{where}: not JSON that can be read: {error}."
    return RowError(reason, file=name, row=row)


def _json_lines(path: Path, name: str) -> Rows:
    row = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(_BOM)
            if not raw.strip():
                continue
            value: Any
            try:
                value = _checked(_DECODER.decode(_decode(raw, name, row, f"line {number}")), name, row)
            except RowError as error:
                value = error
            except (ValueError, RecursionError) as error:
                if row == 0 and raw.lstrip().startswith(b"["):
                    raise DataError(
                        f"line {number} opens a JSON list; in JSON Lines every line is one row. "
                        "Rename the file to .json.",
                        file=name,
                    ) from error
                column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                ended = isinstance(error, json.JSONDecodeError) and not raw.endswith(b"\n")
                value = _bad_json(error, name, row, f"line {number}{column}", ended=ended)
            yield row, value
            row += 1


_SPACE = re.compile(r"[ \t\r\n]*")


def _text_lines(path: Path, name: str) -> Rows:
    """The prompts of a text file, one a line; empty lines are none."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file):
            raw = raw.removeprefix(_BOM) if number == 0 else raw
            try:
                text = _decode(raw, name, number, f"line {number + 1}").strip()
            except RowError as error:
                yield number, error
                continue
            if text:
                yield number, {"prompt": text}


def _json(path: Path, name: str) -> Rows:
    """Rows of a JSON list, or of JSON objects one after another, decoded one at a time."""
    raw = path.read_bytes().removeprefix(_BOM)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            _decode(raw, name, None, "the file")
        # Cut inside a character: the decoder says in which row.
        text = raw[: error.start].decode("utf-8") + "\ufffd"
    del raw

    def skip(position: int) -> int:
        match = _SPACE.match(text, position)
        return match.end() if match else position

    def where(position: int) -> str:
        line = text.count("\n", 0, position) + 1
        return f"line {line}, column {position - text.rfind(chr(10), 0, position)}"

    def decode(position: int, row: int) -> tuple[Any, int]:
        try:
            return _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else position
            # The decoder points at the opening quote of a string that does not end.
            open_end = isinstance(error, json.JSONDecodeError) and (
                skip(at) >= len(text) or error.msg.startswith("Unterminated string")
            )
            raise _bad_json(error, name, row, where(at), ended=open_end) from error

    position = skip(0)
    if text[position] not in "[{":
        try:
            value, _ = _DECODER.raw_decode(text, position)
        except ValueError as error:
            raise DataError(
                f"{where(position)}: not JSON; expected a list of rows, which begins with '['.", file=name
            ) from error
        kind = {str: "one text", bool: "one boolean", type(None): "null"}.get(type(value), "one number")
        raise DataError(f"holds {kind}; expected a list of rows.", file=name)

    row = 0
    if text[position] == "{":
        while position < len(text):
            value, position = decode(position, row)
            if row == 0 and not _is_row(value):
                keys = ", ".join(f"`{show_name(key)}`" for key in list(value)[:8])
                raise DataError(
                    f"holds one object with the keys {keys or '(none)'}; expected a list of rows. If the rows are "
                    "under one of these keys, store that list on its own.",
                    file=name,
                )
            yield row, _checked(value, name, row)
            row += 1
            position = skip(position)
            if position < len(text) and text[position] not in "{,":
                raise DataError(
                    f"{where(position)}: expected another row or the end of the file.", file=name, row=row
                )
            if position < len(text) and text[position] == ",":
                raise DataError(
                    f"{where(position)}: rows divided by commas must stand in a list: put [ before the first and ] "
                    "behind the last.",
                    file=name,
                    row=row,
                )
        return

    position = skip(position + 1)
    if position < len(text) and text[position] == "]":
        raise DataError("is an empty list; expected rows.", file=name)
    while True:
        if position >= len(text):
            raise DataError(
                f"{where(position)}: the list does not end; the file is truncated. Fetch it again.",
                file=name,
                row=row,
            )
        value, position = decode(position, row)
        yield row, _checked(value, name, row)
        row += 1
        position = skip(position)
        if position >= len(text):
            raise DataError(
                f"{where(position)}: the list does not end; the file is truncated. Fetch it again.",
                file=name,
                row=row,
            )
        if text[position] == "]":
            if skip(position + 1) < len(text):
                raise DataError(
                    f"{where(skip(position + 1))}: text behind the end of the list.", file=name, row=row - 1
                )
            return
        if text[position] != ",":
            raise DataError(
                f"{where(position)}: expected ',' or ']' behind row {row - 1}.", file=name, row=row
            )
        position = skip(position + 1)


def _is_row(value: Any) -> bool:
    return other_form(value) is not None or (
        isinstance(value, dict)
        and any(key in ("source", "targets") or str(key).startswith(("source_", "target_")) for key in value)
    )


@contextmanager
def _long_csv_fields() -> Iterator[None]:
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv(path: Path, name: str) -> Rows:
    line = 0

    def lines(file: Any) -> Iterator[str]:
        nonlocal line
        for number, raw in enumerate(file, start=1):
            line = number
            text = raw.removeprefix(_BOM) if number == 1 else raw
            yield _decode(text, name, max(row, 0), f"line {number}")

    row = -1  # the header
    with open(path, "rb") as file, _long_csv_fields():
        reader = csv.reader(lines(file), strict=True)
        header: list[str] = []
        while True:
            first = line + 1
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                raise DataError(
                    f"line {first}: broken CSV: {error}. Check the quotes: a text with commas, quotes or line breaks "
                    'stands in double quotes, and a quote inside it is written twice ("").',
                    file=name,
                    row=max(row, 0),
                ) from error
            if not cells:
                continue
            if row < 0:
                header = [cell.strip() for cell in cells]
                _check_header(header, name)
                row = 0
                continue
            value: Any = dict(zip(header, cells, strict=False))
            if len(cells) != len(header):
                value = RowError(
                    f"line {first}: has {len(cells)} cells, the header has {len(header)}. Check commas and quotes.",
                    file=name,
                    row=row,
                    field=show_name(header[min(len(cells), len(header) - 1)]),
                )
            yield row, value
            row += 1
    if row <= 0:
        raise DataError("has a header and no rows.", file=name)


def _check_header(header: list[str], name: str) -> None:
    for index, column in enumerate(header):
        if column in header[:index]:
            raise DataError("the column stands twice in the header.", file=name, field=show_name(column))
    if len(header) == 1:
        for mark, kind in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if mark in header[0]:
                raise DataError(
                    f"the header is divided by {kind}; expected commas. Save it as comma-separated.",
                    file=name,
                )


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:  # pragma: no cover - a dependency of trl
        raise DependencyError("Loading data needs the package datasets: pip install datasets") from error
    return datasets


def _parquet(path: Path, name: str) -> Rows:
    import pyarrow as pa

    datasets = _datasets()
    row = 0
    try:
        # The name is taken as a pattern otherwise, and brackets in it would match nothing.
        rows = datasets.load_dataset(
            "parquet", data_files=glob.escape(str(path.resolve())), split="train", streaming=True
        )
        for row, value in enumerate(rows):
            yield row, value
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"damaged or not a Parquet file: {_first_line(error)} Fetch or write it again.",
            file=name,
            row=row,
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    text = text if len(text) <= 200 else text[:197] + "..."
    return text if text.endswith(".") else text + "."


def read_hub(name: str, split: str) -> Rows:
    """Rows of a dataset on the Hub, or in its local cache.

    Raises:
        DataError: It cannot be loaded: no network and not in the cache, no such dataset or split, several
            configurations.
    """
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:
        # What load_dataset raises is no contract: connection errors, ValueErrors, huggingface_hub's own
        # types.
        near = nearest(name, sorted(os.listdir(".")))
        hint = f" A file {show_name(near)!r} is in this folder; did you mean that?" if near else ""
        raise DataError(
            f"is no local file, and could not be loaded from the Hub: {_first_line(error)}{hint} Check the name, the "
            "network and HF_HUB_OFFLINE. For a dataset with several configurations, load it with "
            "datasets.load_dataset(name, configuration) and pass that.",
            file=name,
        ) from error
    yield from read_dataset(rows, name, split)


def read_dataset(data: Any, name: str, split: str) -> Rows:
    """Rows of a ``datasets.Dataset``, ``IterableDataset``, or of one split of a dictionary of them.

    Raises:
        DataError: The dictionary has no such split, or the dataset has no rows.
    """
    if isinstance(data, dict):
        if split not in data:
            found = ", ".join(repr(show_name(key)) for key in data)
            raise DataError(f"has no split {split!r}. Its splits are {found or 'none'}.", file=name)
        data = data[split]
    if getattr(data, "format", None):
        data = data.with_format(None)
    row = -1
    for row, value in enumerate(data):
        yield row, value
    if row < 0:
        raise DataError("is empty; expected rows.", file=name)
