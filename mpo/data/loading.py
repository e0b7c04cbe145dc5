"""From files, Hub names and datasets to groups: one dataset row per source, with all its target pairs."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mpo.common import processes
from mpo.common.words import show_name
from mpo.data.contract import (
    HARMFUL,
    HARMLESS,
    ParsedRow,
    RowError,
    SourceLanguageError,
    is_blank,
    is_untranslated,
    messages_identity,
    messages_text,
    pair_digest,
    parse_row,
    texts_to_detect,
    two_kinds,
)
from mpo.data.faults import BadRow
from mpo.data.forms.recognition import advice, other_form
from mpo.data.grouping import CHUNK, GroupStore
from mpo.data.languages import UNDETERMINED, language_name, normalize_language_setting, same_language
from mpo.data.reading import Rows, looks_like_path, read_dataset, read_file, read_hub
from mpo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

_LOG = logging.getLogger(__name__)
_UNTRANSLATED = "is the source's text, untranslated (left out by `drop_untranslated`)."
SEVERAL_FROM = 16 << 20  # bytes of files that are read in several processes


@dataclass
class LoadedGroups:
    """What :func:`load_groups` returns.

    Attributes:
        groups: One row per group, with the columns ``source`` (a pair), ``targets`` (K >= 1 pairs) and
            ``origin`` (name of the file, or names of the files, it came from); and ``kind``, where a group is harmless.
        dropped: The bad rows that ``bad_rows="drop"`` left out.
        fingerprint: Hash of all texts, roles and languages in their order; the same on every machine.
        origin: The files or the dataset the groups came from.
    """

    groups: Dataset
    dropped: list[BadRow]
    fingerprint: str
    origin: str


def count_kinds(groups: Dataset) -> dict[str, int]:
    """Number of groups of each kind."""
    if "kind" not in groups.column_names:
        return {HARMFUL: len(groups), HARMLESS: 0}
    harmless = sum(kind == HARMLESS for kind in groups["kind"])
    return {HARMFUL: len(groups) - harmless, HARMLESS: harmless}


def load_groups(
    data: Any,
    *,
    source_language: str = "en",
    split: str = "train",
    bad_rows: str = "error",
    group_by_source: bool = True,
    limit: int | None = None,
    max_targets_per_group: int | None = None,
    languages: Iterable[str] | None = None,
    drop_untranslated: bool = False,
) -> LoadedGroups:
    """Load preference pairs in any accepted form as groups.

    Rows whose source pair is identical (in Unicode's composed form; texts are kept as they are) become one group, in
    the order in which sources first appear; targets keep their order. Every pair keeps the 0-based row it came from.

    Args:
        data: Path or paths of .json, .jsonl, .csv or .parquet files, the name of a dataset on the Hub, a
            ``datasets.Dataset`` (or a dictionary of splits), or a list of rows.
        source_language: Language of source pairs that carry no label.
        split: Which split of a Hub dataset or a dictionary of splits.
        bad_rows: ``"error"`` stops at the first row that breaks the contract. ``"drop"`` leaves such rows out
            and lists them; of a group with single bad targets only these are left out.
        group_by_source: False makes a group of every pair.
        limit: Keep the first N sources, with all their targets.
        max_targets_per_group: Divide groups with more targets into several with the same source. No pair is
            lost.
        languages: Keep only pairs whose target language is one of these (codes or names).
        drop_untranslated: Leave out target pairs whose chosen response is the source's, and list them among the dropped.

    Returns:
        The groups, what was dropped, the content's hash and where it came from.

    Raises:
        DataError: A file cannot be read, a row breaks the contract (with ``bad_rows="error"``), or nothing is
            left.
        ConfigError: A setting has an impossible value.
        DependencyError: A language must be detected and the detector is not installed.
    """
    loaded, found = _load(
        data,
        source_language=source_language,
        split=split,
        bad_rows=bad_rows,
        group_by_source=group_by_source,
        limit=limit,
        max_targets_per_group=max_targets_per_group,
        languages=languages,
        drop_untranslated=drop_untranslated,
    )
    if len(loaded.groups) == 0:
        if loaded.dropped:
            first = loaded.dropped[0]
            raise DataError(
                f"no good row is left: {len(loaded.dropped)} bad ones. The first is row {first.row}"
                + (f", field `{first.field}`" if first.field else "")
                + f": {first.reason}",
                file=loaded.origin,
            )
        raise DataError(
            f"no pair is in the languages asked for. Found: {', '.join(found)}.", file=loaded.origin
        )
    return loaded


def check_source_language(loaded: LoadedGroups, source_language: str) -> None:
    """Makes sure that there are sources in the dominant language: what is trained and measured goes by them.

    Raises:
        DataError: Every source is labelled with another one.
    """
    if (other := labelled_otherwise(loaded.groups, source_language)) is not None:
        raise DataError(
            f"every source is labelled as {language_name(other)}, but `source_language` is {source_language!r}. Set "
            f"`source_language: {other}` where that is meant, for training and evaluation data alike, or mend the labels.",
            file=loaded.origin,
        )


def labelled_otherwise(groups: Dataset, source_language: str) -> str | None:
    """The language of most sources, where not one of them is in the dominant language; else None.

    Args:
        groups: Groups as text.
        source_language: Code or name of the dominant language.
    """
    import pyarrow.compute as pc

    dominant = normalize_language_setting(source_language, "source_language")
    counts: Counter[str] = Counter()
    for table in groups.with_format("arrow").select_columns(["source"]).iter(batch_size=10_000):
        for value in pc.value_counts(pc.struct_field(table["source"], "language")).to_pylist():
            counts[value["values"]] += value["counts"]
    known = [code for code, _ in counts.most_common() if code != UNDETERMINED]
    return None if not known or any(same_language(code, dominant) for code in known) else known[0]


def as_groups(
    dataset: Any,
    *,
    source_language: str = "en",
    bad_rows: str = "error",
    group_by_source: bool = True,
    max_targets_per_group: int | None = None,
) -> Dataset:
    """Bring rows in any accepted form, groups included, into groups.

    Idempotent: with the same settings, groups come back as they are, rows and origins included.

    Args:
        dataset: A ``datasets.Dataset`` or anything else that :func:`load_groups` takes.
        source_language: The dominant language, that of sources without a label.
        bad_rows: As for :func:`load_groups`, like the settings that follow: ``"error"`` or ``"drop"``. To see what was dropped,
            call :func:`load_groups`.
        group_by_source: False makes a group of every pair.
        max_targets_per_group: Divide groups with more targets.

    Raises:
        DataError: A row breaks the contract, nothing is left, or no source is in ``source_language``.
    """
    loaded = load_groups(
        dataset,
        source_language=source_language,
        bad_rows=bad_rows,
        group_by_source=group_by_source,
        max_targets_per_group=max_targets_per_group,
    )
    check_source_language(loaded, source_language)
    return loaded.groups


def split_by_source(groups: Dataset, held_out: float | int, seed: int) -> tuple[Dataset, Dataset]:
    """Divide groups into a training and a held-out part, by source prompt.

    Groups with the same source prompt always go to the same side. Which sources are held out depends only on
    the prompts and the seed (they are ranked by a hash of both), not on the order of the rows nor on the
    machine. Of harmful and of harmless prompts the same share is held out, and of either at least one where several
    are held out and something of it is left to train on.

    Args:
        groups: Groups, as :func:`load_groups` returns them.
        held_out: Share of the source prompts (a float in [0, 1)), or their number (an int). A share above 0
            holds out at least one source and leaves at least one.
        seed: Another seed holds out others.

    Returns:
        The training groups and the held-out groups, each in the order of ``groups``.

    Raises:
        ConfigError: ``held_out`` is out of range, or would leave nothing to train on.
    """
    if isinstance(held_out, bool) or not isinstance(held_out, (int, float)) or not held_out >= 0:
        raise ConfigError(f"held_out: expected a share in [0, 1) or a number of sources, got {held_out!r}.")
    if isinstance(held_out, float) and held_out >= 1:
        raise ConfigError(
            f"held_out: a share must be below 1, got {held_out!r}. A number of sources is written as a whole number."
        )
    prompts = [_hash_prompt(source, seed) for source in groups["source"]]
    ranked = sorted(set(prompts))
    count = held_out
    if isinstance(held_out, float):
        count = 0 if held_out == 0 else max(1, round(held_out * len(ranked)))
        if count >= len(ranked) > 1:
            count = len(ranked) - 1
    if count and count >= len(ranked):
        raise ConfigError(
            f"held_out: {held_out!r} would leave nothing to train on; there are {len(ranked)} different source prompts."
        )
    if "kind" in groups.column_names:
        chosen = _of_each_kind(groups["kind"], prompts, int(count))
    else:
        chosen = set(ranked[: int(count)])
    kept = [index for index, prompt in enumerate(prompts) if prompt not in chosen]
    held = [index for index, prompt in enumerate(prompts) if prompt in chosen]
    return groups.select(kept), groups.select(held)


def _of_each_kind(kinds: Iterable[str], prompts: list[bytes], count: int) -> set[bytes]:
    """So many of the prompts, of either kind in proportion and the first by their hashes."""
    of_prompt = dict(zip(reversed(prompts), reversed(list(kinds)), strict=True))
    ranked = {
        kind: sorted(prompt for prompt, own in of_prompt.items() if own == kind)
        for kind in (HARMFUL, HARMLESS)
    }
    harmful, harmless = (len(ranked[kind]) for kind in (HARMFUL, HARMLESS))
    share = round(count * harmless / len(of_prompt))
    # Of each kind at least one on either side, as far as there are so many.
    share = max(share, count - harmful + 1, int(count > 1 and harmless > 1))
    share = min(share, harmless - 1, count - int(count > 1 and harmful > 1))
    of_harmless = min(max(share, count - harmful, 0), harmless, count)
    return {*ranked[HARMFUL][: count - of_harmless], *ranked[HARMLESS][:of_harmless]}


def _hash_prompt(source: Mapping[str, Any], seed: int) -> bytes:
    digest = hashlib.sha256(f"{seed}".encode())
    for message in messages_identity(source["prompt"]):
        for text in message:
            data = text.encode("utf-8")
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def _check_count(value: int | None, setting: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{setting}: expected a whole number of at least 1, or None, got {value!r}.")


def _load(
    data: Any,
    *,
    source_language: str,
    split: str = "train",
    bad_rows: str = "error",
    group_by_source: bool = True,
    limit: int | None = None,
    max_targets_per_group: int | None = None,
    languages: Iterable[str] | None = None,
    drop_untranslated: bool = False,
    mistaken: Counter[str] | None = None,
) -> tuple[LoadedGroups, list[str]]:
    """As :func:`load_groups`, but nothing left is no error; with it the target languages that were found.

    ``mistaken`` counts the languages that sources are in whose targets are in the language set as theirs.
    """
    from datasets import Dataset
    from datasets.table import InMemoryTable

    if bad_rows not in ("error", "drop"):
        raise ConfigError(f"bad_rows: expected 'error' or 'drop', got {bad_rows!r}.")
    _check_count(limit, "limit")
    _check_count(max_targets_per_group, "max_targets_per_group")
    dominant = normalize_language_setting(source_language, "source_language")
    wanted: set[str] | None = None
    if languages is not None:
        names = [languages] if isinstance(languages, str) else list(languages)
        if not names:
            raise ConfigError("languages: an empty list keeps nothing; leave it out to keep all.")
        wanted = {normalize_language_setting(name, "languages") for name in names}

    store = GroupStore(group_by_source=group_by_source, limit=limit)
    dropped: list[BadRow] = []
    found: dict[str, None] = {}
    origins: list[str] = []
    blank: list[str] = []

    def refuse(error: RowError) -> None:
        if mistaken is not None and isinstance(error, SourceLanguageError):
            mistaken[error.language] += 1
        if bad_rows == "error":
            raise RowError(
                f"{error.reason} (To leave bad rows out and list them: bad_rows='drop'.)",
                file=error.file,
                row=error.row,
                field=error.field,
            ) from error
        dropped.append(BadRow(error.file or "", error.row or 0, error.field, error.reason))

    number = _processes(data)
    for name, rows in _sources(data, split):
        origins.append(name)
        understood = False
        with closing(_parsed(name, rows, dominant, number)) as rows_parsed:
            for index, parsed, key, hint in rows_parsed:
                if isinstance(parsed, RowError):
                    if not understood and hint:
                        raise DataError(hint, file=name) from parsed
                    refuse(parsed)
                    continue
                understood = True
                for fault in parsed.errors:
                    refuse(fault)
                found.update(dict.fromkeys(target["language"] for target in parsed.targets))
                targets = [t for t in parsed.targets if wanted is None or t["language"] in wanted]
                if drop_untranslated:
                    for target in [t for t in targets if is_untranslated(t, parsed.source, "chosen")]:
                        targets.remove(target)
                        dropped.append(BadRow(name, target["row"], "chosen", _UNTRANSLATED))
                blank.extend(
                    f"{name} row {t['row']}" for t in targets if is_blank(messages_text(t["prompt"]))
                )
                if targets and not store.add(key, parsed.source, targets, parsed.origin or name, parsed.kind):
                    refuse(two_kinds(parsed.kind, file=name, row=index))
    if wanted and found and not wanted <= set(found):
        missing = ", ".join(sorted(wanted - set(found)))
        raise DataError(
            f"no pair is in {missing}. Languages found: {', '.join(found)}.", file=", ".join(origins)
        )
    if blank:
        shown = ", ".join(blank[:5]) + (", ..." if len(blank) > 5 else "")
        _LOG.warning("Empty target prompts, kept: %d (%s).", len(blank), shown)
    table, fingerprint = store.finish(max_targets_per_group)
    # Left to itself, a dataset pickles its whole table to hash it.
    where = hashlib.sha256(fingerprint.encode())
    for chunks in (table["origin"].chunks, [chunk.field("row") for chunk in table["source"].chunks]):
        # The digest of the whole column's list as it is written, without that list.
        where.update(b"[")
        for number, chunk in enumerate(chunks):
            where.update((", " if number else "").encode() + repr(chunk.to_pylist())[1:-1].encode("utf-8"))
        where.update(b"]")
    groups = Dataset(InMemoryTable(table), fingerprint=where.hexdigest()[:16])
    loaded = LoadedGroups(groups, dropped, fingerprint, ", ".join(origins))
    return loaded, list(found)


class _Parsed(NamedTuple):
    """What a row is, whatever stands before it.

    Attributes:
        number: 0-based row.
        row: What it holds, or why it breaks the contract.
        key: Its source's :func:`pair_digest`.
        hint: What form it is in, where it is in one that has to be converted.
    """

    number: int
    row: ParsedRow | RowError
    key: bytes = b""
    hint: str = ""


def _processes(data: Any) -> int:
    """Processes that data are worth: several where they are large files.

    A JSON list is held whole while it is read, and only once.
    """
    paths = [data] if isinstance(data, (str, os.PathLike)) else data
    if not isinstance(paths, (list, tuple)) or not all(
        isinstance(path, (str, os.PathLike)) for path in paths
    ):
        return 1
    files = [os.path.expanduser(path) for path in paths]
    if not all(os.path.isfile(file) and not file.lower().endswith(".json") for file in files):
        return 1
    return processes.available() if sum(map(os.path.getsize, files)) >= SEVERAL_FROM else 1


def _parsed(name: str, rows: Rows, source_language: str, number: int) -> Generator[_Parsed, None, None]:
    if number > 1:
        from mpo.data.detection import get_ready

        get_ready()
    parts = processes.in_order(partial(_parts, name, rows, source_language), number)
    with closing(parts):
        for part, failure in parts:
            yield from part
            if failure is not None:
                raise failure


def _parts(
    name: str, rows: Rows, source_language: str, first: int, step: int
) -> Iterator[tuple[list[_Parsed], Exception | None]]:
    """Part after part of the rows, and the fault of the file that they end with.

    Languages that will have to be detected are detected many at once.
    """
    from mpo.data.detection import expect

    failure: Exception | None = None
    for number in count():
        part: list[tuple[int, Any]] = []
        try:
            part.extend(islice(rows, CHUNK))
        except Exception as error:  # the rows before it are first looked at
            failure = error
        if not part and failure is None:
            return
        if number % step == first:
            if len(part) > 1:
                expect([text for _, row in part for text in texts_to_detect(row)])
            yield list(_each_parsed(name, part, source_language)), failure
        if failure is not None:
            return


def _each_parsed(name: str, part: list[tuple[int, Any]], source_language: str) -> Iterator[_Parsed]:
    understood = False
    for index, row in part:
        try:
            if isinstance(row, RowError):
                raise row
            parsed = parse_row(row, file=name, index=index, source_language=source_language)
        except RowError as error:
            form = None if understood else other_form(row)
            yield _Parsed(index, error, hint="" if form is None else advice(form, name, row))
        else:
            understood = True
            yield _Parsed(index, parsed, pair_digest(parsed.source))


def _sources(data: Any, split: str, *, prompts: bool = False) -> Iterator[tuple[str, Rows]]:
    """Name and rows of everything that ``data`` means; ``prompts``: prompts are enough, as in a .txt file."""
    if isinstance(data, (str, os.PathLike)):
        data = [data]
    if isinstance(data, (list, tuple)):
        if not data:
            raise DataError("no data: an empty list was given; expected files, or rows.")
        paths = [isinstance(item, (str, os.PathLike)) for item in data]
        if all(paths):
            yield from _named_sources([os.fspath(item) for item in data], split, prompts=prompts)
        elif any(paths):
            raise DataError("a list of data must hold either paths or rows; this one mixes them.")
        else:
            yield "list of rows", iter(enumerate(data))
        return
    if isinstance(data, dict) and not all(hasattr(value, "column_names") for value in data.values()):
        raise DataError(
            "an object was given as data; expected a list of rows. Put one row into a list, or build a dataset of "
            "columns with datasets.Dataset.from_dict."
        )
    if isinstance(data, dict) or hasattr(data, "column_names"):
        yield "dataset", read_dataset(data, "dataset", split)
        return
    hint = " Convert it with datasets.Dataset.from_pandas." if type(data).__name__ == "DataFrame" else ""
    raise DataError(
        f"cannot load data from a {type(data).__name__}; expected paths, a Hub name, a datasets.Dataset or a list of "
        f"rows.{hint}"
    )


def _named_sources(names: list[str], split: str, *, prompts: bool = False) -> Iterator[tuple[str, Rows]]:
    for name in names:
        if not name.strip():
            raise DataError("an empty text was given as data; expected a path or the name of a Hub dataset.")
    base = [Path(name).name for name in names]
    for name, short in zip(names, base, strict=True):
        path = Path(name).expanduser()
        if path.exists() or looks_like_path(name):
            # The file's own name reads best; where two files share it, the paths tell them apart.
            label = short if short and base.count(short) == 1 else name
            shown = show_path(label if path.exists() else name)
            yield show_path(label), read_file(path, shown, prompts=prompts)
        else:
            yield name, read_hub(name, split)


def show_path(name: str) -> str:
    """A file name as it may be printed."""
    return name if name.isprintable() else show_name(name)
