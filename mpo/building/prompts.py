"""The prompts of a build: rows of a file, of the Hub or of the package, each with its kind and the texts that are given."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mpo.building.recipe import PromptSource
from mpo.building.starter import everyday_rows, starter_rows
from mpo.common.characters import half_character
from mpo.common.words import nearest, show_name
from mpo.data.contract import HARMFUL, HARMLESS, KINDS, RowError, is_blank, normal_form
from mpo.data.forms.readers import PROMPT_COLUMNS, holds_turns
from mpo.data.forms.recognition import as_columns, form_of, is_group, is_plain
from mpo.data.languages import normalize_language
from mpo.data.reading import Rows, looks_like_path, missing_file_error, read_file, read_hub
from mpo.errors import DataError

STARTER, STARTER_HARMLESS, EVERYDAY, DEMO = "starter", "starter-harmless", "starter-everyday", "demo"
_DEMO_ROWS = 8  # of each kind

# What the package's own sets call a harmless prompt in words that also stand in harmful ones.
_OTHER_KINDS = {"looks_harmful": HARMLESS}


@dataclass(frozen=True)
class PromptRow:
    """A prompt.

    Attributes:
        id: Unique within the build.
        kind: ``harmful`` or ``harmless``.
        texts: The prompt by language; the dominant language is there.
        chosen: An answer that is given in the dominant language; None where there is none.
        rejected: The same of the rejected answer.
    """

    id: str
    kind: str
    texts: dict[str, str]
    chosen: str | None = None
    rejected: str | None = None


@dataclass
class Dropped:
    """A text that was left out, ready for JSON.

    Attributes:
        id: Of the prompt.
        stage: Where.
        reason: A filter's name, or why in words.
        language, part: Of the text; None where the whole prompt is meant.
        value, threshold: What a filter measured and allowed.
        also: Other filters that it fails.
        text: It.
    """

    id: str
    stage: str
    reason: str
    language: str | None = None
    part: str | None = None
    value: Any = None
    threshold: Any = None
    also: list[str] = field(default_factory=list)
    text: str | None = None


def read_prompts(
    source: PromptSource, source_language: str, languages: Sequence[str]
) -> Iterator[PromptRow | Dropped]:
    """The prompts in their order, and what was left out: bad rows where those are to be dropped, and duplicates.

    Args:
        source: Where they are.
        source_language: Code of the dominant language.
        languages: Codes of the target languages.

    Raises:
        DataError: A file cannot be read, its columns cannot be understood, or a row is bad.
    """
    seen: set[bytes] = set()
    ids: set[str] = set()
    kept = 0
    for name in source.data:
        for number, row in _open(name, source.dataset_split):
            if kept == source.limit:
                return
            where = f"{os.path.basename(name)}:{number}"
            try:
                _refuse_other_forms(row, name, source)
                found = _row(row, name, number, source, source_language, languages, where)
                if found.id in ids:
                    raise RowError(
                        f"the id {show_name(found.id)!r} is there twice. Give every prompt an id of its own.",
                        file=name, row=number, field="id",
                    )  # fmt: skip
            except RowError as error:
                if source.bad_rows == "error":
                    raise
                yield Dropped(where, "prompts", "bad row", value=error.reason)
                continue
            text = " ".join(normal_form(found.texts[source_language]).casefold().split())
            digest = hashlib.blake2b(text.encode("utf-8"), digest_size=12).digest()
            if digest in seen:
                yield Dropped(found.id, "prompts", "duplicate", source_language, "prompt", text=text)
                continue
            seen.add(digest)
            ids.add(found.id)
            kept += 1
            yield found
    if not kept:
        raise DataError("no prompt is left.", file=", ".join(source.data))


def _open(name: str, split: str) -> Rows:
    if name in (STARTER, STARTER_HARMLESS, EVERYDAY, DEMO):
        return _starter(name)
    path = Path(name).expanduser()
    if path.is_file():
        return read_file(path, name, prompts=True)
    if looks_like_path(name):
        raise missing_file_error(path)
    return read_hub(name, split)


def _refuse_other_forms(row: Any, name: str, source: PromptSource) -> None:
    """Rows whose answers, or whose prompts, would be lost if they were read as prompts.

    Raises:
        DataError: The file holds such rows.
    """
    if source.prompt_column is not None or not isinstance(row, Mapping) or "texts" in row:
        return
    row = as_columns(row)
    if is_group(row):
        raise DataError(
            "holds groups already: pairs with their translations. `mpo train` takes it as it is.", file=name
        )
    form = form_of(row)
    if form is None or is_plain(form):
        return
    raise DataError(
        f"holds {form.title}. Make plain rows of it first: `mpo data convert {show_name(name)} --output pairs.jsonl`. To take "
        "the prompts alone, name their column: `prompts.prompt_column`.",
        file=name,
    )


def _starter(name: str) -> Rows:
    """The prompts that come with the package."""
    rows = [asdict(row) for row in (everyday_rows() if name == EVERYDAY else starter_rows())]
    if name == DEMO:
        rows = [row for kind in KINDS for row in islice((r for r in rows if r["kind"] == kind), _DEMO_ROWS)]
    if name == STARTER_HARMLESS:
        rows = [row for row in rows if row["kind"] != HARMFUL]
    return iter([*enumerate(rows)])


def _row(
    row: Any,
    name: str,
    number: int,
    source: PromptSource,
    source_language: str,
    languages: Sequence[str],
    where: str,
) -> PromptRow:
    def bad(reason: str, column: str | None = None) -> RowError:
        return RowError(reason, file=name, row=number, field=column)

    if isinstance(row, RowError):
        raise row
    row = as_columns(row, () if source.prompt_column is None else (source.prompt_column,))
    if not isinstance(row, Mapping):
        raise bad(f"expected an object with named fields, got {type(row).__name__}.")
    texts = _given_texts(row, source_language, languages, source.prompt_column, bad)
    kind = row.get("kind")
    if _blank(kind):
        kind = source.kind
    kind = _OTHER_KINDS.get(str(kind), kind)
    if kind is None:
        raise bad(
            "nothing says whether the prompt is harmful or harmless. Add a column `kind`, or set `prompts: {kind: harmful}` for all.",
            "kind",
        )
    if kind not in KINDS:
        near = nearest(str(kind), KINDS)
        raise bad(
            f"expected {HARMFUL!r} or {HARMLESS!r}, got {show_name(kind)!r}.{f' Did you mean {near!r}?' if near else ''}",
            "kind",
        )
    given = row.get("id")
    answers = {
        part: None if _blank(row.get(part)) else _text(row[part], part, "assistant", bad)
        for part in ("chosen", "rejected")
    }
    return PromptRow(where if _blank(given) else str(given), kind, texts, **answers)


def _given_texts(
    row: Mapping[str, Any],
    source_language: str,
    languages: Sequence[str],
    prompt_column: str | None,
    bad: Any,
) -> dict[str, str]:
    """The prompt by language: of an object ``texts``, of columns called like languages, and of the column of the prompt."""
    texts: dict[str, str] = {}
    # Not a set: a resumed build compares what is made of them, and a set has another order in every process.
    wanted = tuple(dict.fromkeys([source_language, *languages]))
    object_ = row.get("texts")
    if isinstance(object_, Mapping):
        for label, text in object_.items():
            try:
                code = normalize_language(str(label))
            except DataError as error:
                raise bad(str(error), "texts") from None
            if code in wanted and not _blank(text):
                texts[code] = _text(text, f"texts.{label}", "user", bad)
    for code in wanted:
        if code not in texts and isinstance(row.get(code), str) and not _blank(row[code]):
            texts[code] = _text(row[code], code, "user", bad)
    if prompt_column is not None and prompt_column not in row:
        raise bad(
            f"there is no column {show_name(prompt_column)!r} (`prompts.prompt_column`). Its columns are "
            f"{', '.join(f'`{show_name(column)}`' for column in row) or 'none'}."
        )
    column = prompt_column or next((c for c in PROMPT_COLUMNS if not _blank(row.get(c))), None)
    if column is not None and (prompt_column or source_language not in texts):
        texts[source_language] = _text(row[column], column, "user", bad)
        if column == "instruction" and prompt_column is None and not _blank(row.get("input")):
            texts[source_language] += f"\n{_text(row['input'], 'input', 'user', bad)}"
    if source_language not in texts:
        raise bad(
            f"no prompt was found. Its columns are {', '.join(f'`{show_name(column)}`' for column in row) or 'none'}. Expected "
            f"`prompt`, `{source_language}` or `texts: {{{source_language}: ...}}`; name another with `prompts.prompt_column`."
        )
    return texts


def _text(value: Any, column: str, role: str, bad: Any) -> str:
    """A text, or the only message of a list of them (the last, behind the prompt, of an answer)."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(m, Mapping) for m in value):
        if role == "user" and len(value) > 1:
            raise bad(
                "is a conversation; expected a prompt of one turn, which is what is translated. `prompts: {bad_rows: drop}` leaves "
                "such rows out.",
                column,
            )
        if role == "assistant":
            said_by = [message.get("role") or message.get("from") for message in value]
            if said_by[-1] in ("user", "human", "system"):
                raise bad("ends with a message of the user's; expected the assistant's answer.", column)
            if len([who for who in said_by if who in ("assistant", "gpt")]) > 1:
                raise bad("holds several messages of the assistant; expected one answer.", column)
        value = value[-1].get("content", value[-1].get("value"))
    elif isinstance(value, Mapping):
        value = value.get("content", value.get("value"))
    if not isinstance(value, str) or is_blank(value):
        raise bad(f"expected a text, got {'nothing' if _blank(value) else type(value).__name__}.", column)
    if role == "user" and holds_turns(value):
        raise bad(
            "is a written dialog of several turns; `mpo data convert` makes prompts of such rows.", column
        )
    if problem := half_character(value):
        raise bad(f"the text {problem}", column)
    return value


def _blank(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and is_blank(value))
