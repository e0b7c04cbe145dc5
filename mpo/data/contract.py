"""The data contract: one row, in any accepted form, becomes a source pair and its target pairs.

Accepted forms of a row:

- canonical groups: ``{"source": pair, "targets": [pair, ...]}``, a pair being
  ``{"language": ..., "prompt": ..., "chosen": ..., "rejected": ...}``;
- flat rows: ``source_prompt``, ``source_chosen``, ``source_rejected``, ``target_prompt``, ``target_chosen``,
  ``target_rejected``, and optionally ``target_language`` and ``source_language``;
- the official MPO rows: as flat rows, with ``source_conversations`` and ``target_conversations`` for the
  prompts.

Groups and flat rows may say of which ``kind`` their prompt is: ``harmful``, to be refused, or ``harmless``, to be
answered. Without it they are harmful.

Wherever messages are expected, plain text stands for one user message (a prompt) or one assistant message (a
response), and ``{"from": "human", "value": ...}`` for ``{"role": "user", "content": ...}``.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mpo.common.characters import half_character
from mpo.common.words import nearest, show_name
from mpo.data.languages import (
    UNDETERMINED,
    detect_pair_language,
    language_name,
    normalize_language,
    same_language,
)
from mpo.data.reasoning import split_reasoning
from mpo.errors import DataError

Pair = dict[str, Any]
"""``{"language": str, "prompt": messages, "chosen": messages, "rejected": messages, "row": int}``"""

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
PARTS = ("prompt", "chosen", "rejected")
"""What a pair is made of, in the order of a tree."""

_OPTIONAL = ("target_language", "source_language")

HARMFUL, HARMLESS = "harmful", "harmless"
KINDS = (HARMFUL, HARMLESS)
"""Of prompts: those to be refused and those to be answered."""


class RowError(DataError):
    """One row breaks the contract. ``reason`` is the message without file, row and field."""

    def __init__(self, reason: str, *, file: str | None, row: int | None, field: str | None = None) -> None:
        self.reason = reason
        super().__init__(reason, file=file, row=row, field=field)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[RowError], texts: tuple[str, ...], attributes: dict[str, Any]) -> RowError:
    """An error as another process of this machine raised it."""
    error = kind.__new__(kind, *texts)
    error.__dict__.update(attributes)
    return error


@dataclass
class ParsedRow:
    """One row after validation.

    Attributes:
        source: The source pair.
        targets: The target pairs that are good.
        errors: One error per target pair that is not; a row's only target pair is its only error then.
        origin: Origin that the row itself carries (groups that were loaded before), or None.
        kind: One of :data:`KINDS`.
    """

    source: Pair
    targets: list[Pair]
    errors: list[RowError] = field(default_factory=list)
    origin: str | None = None
    kind: str = HARMFUL


class _Place(NamedTuple):
    """Where a value stands: for error messages."""

    file: str
    row: int
    path: str = ""

    def at(self, step: str | int) -> _Place:
        path = (
            f"{self.path}[{step}]" if isinstance(step, int) else f"{self.path}.{step}" if self.path else step
        )
        return _Place(self.file, self.row, path)

    def error(self, reason: str) -> RowError:
        return RowError(reason, file=self.file, row=self.row, field=self.path or None)


# Letters by their Unicode category that are drawn as nothing: Hangul and Khmer fillers, the empty Braille
# pattern, the combining grapheme joiner. Space, control and format characters are known by their category.
_BLANK_LETTERS = frozenset("\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\u034f")


def is_blank(text: str) -> bool:
    """True for a text that shows nothing: empty, or only whitespace, zero-width, direction-mark and BOM characters."""
    for character in text:
        if character in _BLANK_LETTERS or "\ufe00" <= character <= "\ufe0f":
            continue
        if unicodedata.category(character) not in ("Zs", "Zl", "Zp", "Cc", "Cf"):
            return False
    return True


# Format characters (category Cf) of everyday texts: soft hyphen, direction marks, zero-width characters, BOM.
_FORMAT = re.compile("[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]")


def normal_form(text: str) -> str:
    """The text as it is compared with others: composed (NFC), since the same letters are stored in several ways."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _visible(text: str) -> str:
    """The text's normal form without the blanks around it and the direction marks and joiners inside it."""
    return (text if text.isascii() else _FORMAT.sub("", normal_form(text))).strip()


def same_response(chosen: str, rejected: str) -> bool:
    """True where two responses differ in blanks around them, invisible characters or Unicode form at most: no preference."""
    return _visible(chosen) == _visible(rejected)


def _columns(row: Mapping[Any, Any]) -> str:
    names = [f"`{show_name(key)}`" for key in row]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "none"


def _describe(value: object) -> str:
    """A value's kind, never its text: the data is harmful on purpose, and errors end up in logs."""
    if value is None:
        return "null"
    if isinstance(value, float) and value != value:
        return "NaN (an empty cell?)"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (bytes, bytearray)):
        return "bytes"
    return f"a value of type {type(value).__name__}"


def _required(row: Mapping[Any, Any], name: str, place: _Place, known: Iterable[str]) -> Any:
    if name not in row:
        known = set(known)
        strangers = [key for key in row if isinstance(key, str) and key not in known]
        near = nearest(name, strangers)
        hint = f" Did you mean `{name}` by `{show_name(near)}`?" if near else ""
        raise place.at(name).error(f"missing.{hint} The fields found are {_columns(row)}.")
    value = row[name]
    if value is None or (isinstance(value, float) and value != value):
        raise place.at(name).error(f"is {_describe(value)}; expected a text or a list of messages.")
    return value


# Lists that were written into a text cell (by a spreadsheet, or pandas' to_csv) would be trained on as their
# own source code.
_WRITTEN_LIST = re.compile(r"\s*\[?\s*\{\s*['\"](?:role|content|from|value)['\"]\s*:")


def _check_text(text: object, place: _Place, *, may_be_blank: bool = False) -> str:
    if not isinstance(text, str):
        raise place.error(f"is {_describe(text)}; expected a text.")
    if problem := half_character(text):
        raise place.error(problem)
    if is_blank(text) and not may_be_blank:
        kind = "is empty" if not text else "is empty: it holds only whitespace or invisible characters"
        raise place.error(f"{kind}. Expected text.")
    return text


def _message(value: object, place: _Place, *, may_be_blank: bool = False) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise place.error(
            f'is {_describe(value)}; expected a message such as {{"role": "user", "content": "..."}}.'
        )
    style = (
        ("from", "value")
        if value.get("role") is None and value.get("from") is not None
        else ("role", "content")
    )
    for key in ("tool_calls", "function_call", "tool_call_id"):
        if value.get(key):
            raise place.at(key).error("tool calls are not supported. Take such rows out.")
    for key in style:
        if value.get(key) is None:
            near = nearest(key, [k for k in value if isinstance(k, str) and k not in style])
            hint = f" Did you mean `{key}` by `{show_name(near)}`?" if near else ""
            problem = "is null" if key in value else "missing"
            raise place.at(key).error(f"{problem}; a message has `{style[0]}` and `{style[1]}`.{hint}")
    role = value[style[0]]
    if not isinstance(role, str):
        raise place.at(style[0]).error(f"is {_describe(role)}; expected a role such as 'user'.")
    if role not in _ROLES:
        near = nearest(role.strip().lower(), _ROLES)
        hint = f" Did you mean {near!r}?" if near else ""
        raise place.at(style[0]).error(
            f"unknown role {show_name(role)!r}.{hint} Known roles: {', '.join(map(repr, _ROLES))}."
        )
    content = value[style[1]]
    if isinstance(content, (list, tuple)):
        raise place.at(style[1]).error("is a list of parts; only text messages are supported. Give one text.")
    blank = may_be_blank and _ROLES[role] == "user"
    return {"role": _ROLES[role], "content": _check_text(content, place.at(style[1]), may_be_blank=blank)}


def _messages(value: object, place: _Place, *, role: str, may_be_blank: bool = False) -> list[dict[str, str]]:
    """Normalise a prompt (``role="user"``) or a response (``role="assistant"``) to a list of messages."""
    if isinstance(value, str):
        text = _check_text(value, place, may_be_blank=may_be_blank)
        if _WRITTEN_LIST.match(text):
            raise place.error(
                "is a list of messages written as a text. Store it as JSON Lines or Parquet, where lists stay "
                "lists, or give the plain text of the message."
            )
        return [{"role": role, "content": text}]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise place.error(f"is {_describe(value)}; expected a text or a list of messages.")
    if not value:
        raise place.error("is an empty list; expected at least one message.")
    messages = [
        _message(message, place.at(index), may_be_blank=may_be_blank) for index, message in enumerate(value)
    ]
    if role == "user":
        for index, message in enumerate(messages):
            if message["role"] == "system" and index > 0:
                raise place.at(index).error("a system message stands only at the beginning of a prompt.")
        if messages[-1]["role"] != "user":
            raise place.at(len(messages) - 1).error(
                f"the last message of a prompt must be from 'user', this one is from {messages[-1]['role']!r}. "
                "The answers belong into chosen and rejected."
            )
    else:
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                raise place.at(index).error(
                    f"a response must be from 'assistant', this message is from {message['role']!r}. "
                    "A response holds the answer only; the conversation before it belongs into the prompt."
                )
    return messages


def messages_text(messages: Iterable[Mapping[str, str]]) -> str:
    """The contents of messages, one after another."""
    contents = [message["content"] for message in messages]
    return contents[0] if len(contents) == 1 else "\n".join(contents)


def answers_read(pair: Mapping[str, Any], texts: Mapping[str, str] | None = None) -> dict[str, str]:
    """What is read of a pair's three parts: the prompt, and the responses without a model's reasoning.

    Args:
        pair: The pair.
        texts: Its texts, where they are known. Those without reasoning come back as the same objects.
    """
    texts = texts or {part: messages_text(pair[part]) for part in PARTS}
    return {part: text if part == "prompt" else split_reasoning(text).answer for part, text in texts.items()}


def _label(value: object, place: _Place) -> str | None:
    """A normalised language label, or None where there is none."""
    if value is None or (isinstance(value, float) and value != value):
        return None
    if not isinstance(value, str):
        raise place.error(f"is {_describe(value)}; expected a language code such as 'bn'.")
    if is_blank(value):
        return None
    if value.strip().lower() == UNDETERMINED:
        return UNDETERMINED
    try:
        return normalize_language(value.strip())
    except DataError as error:
        raise place.error(str(error)) from None


def _kind(row: Mapping[Any, Any], place: _Place) -> str:
    """The kind that a row states, or harmful."""
    value, place = row.get("kind"), place.at("kind")
    if value is None or (isinstance(value, float) and value != value) or value == "":
        return HARMFUL
    if not isinstance(value, str):
        raise place.error(f"is {_describe(value)}; expected 'harmful' or 'harmless'.")
    if value not in KINDS:
        near = nearest(value.strip().lower(), KINDS)
        hint = f" Did you mean {near!r}?" if near else ""
        raise place.error(
            f"is {show_name(value)!r}; expected 'harmful' (as without the field) or 'harmless'.{hint}"
        )
    return value


def two_kinds(kind: str, *, file: str, row: int) -> RowError:
    """The error of a row whose source is of another kind earlier in the data."""
    other = KINDS[1 - KINDS.index(kind)]
    return _Place(file, row, "kind").error(
        f"is {kind!r}, but the same source is {other!r} in an earlier row. Give all rows of a source one kind."
    )


def _pair(parts: Mapping[str, tuple[object, _Place]], row: int, *, is_source: bool) -> Pair:
    """The pair's messages, validated; its language is filled in by the caller.

    A target's user message may be empty: the published MPO data has such a prompt, and both its responses are
    sound. :func:`mpo.data.check_data` reports them. An empty source prompt is refused, since sources are told
    apart by it.
    """
    pair: Pair = {"language": "", "row": row}
    for part in PARTS:
        value, place = parts[part]
        if part == "prompt":
            pair[part] = _messages(value, place, role="user", may_be_blank=not is_source)
        else:
            pair[part] = _messages(value, place, role="assistant")
    if same_response(messages_text(pair["chosen"]), messages_text(pair["rejected"])):
        raise parts["rejected"][1].error("equal to chosen. A preference pair needs two different responses.")
    return pair


class SourceLanguageError(RowError):
    """A target is in what is set as the language of the source, and the source is in ``language``."""

    def __init__(self, language: str, setting: str, place: _Place) -> None:
        self.language = language
        super().__init__(
            f"the source is in {language_name(language)}, but `source_language` is {setting!r}, the language of this "
            f"target. Set `source_language: {language}`.",
            file=place.file,
            row=place.row,
            field=place.path or None,
        )


def _require_source_language(source: Pair, place: _Place) -> None:
    prompt, chosen, rejected = answers_read(source).values()
    found = detect_pair_language(prompt, chosen, rejected, source_language=UNDETERMINED)
    if found != UNDETERMINED and not same_language(found, source["language"]):
        raise SourceLanguageError(found, source["language"], place)


def _target_language(pair: Pair, label: str | None, source: Pair, place: _Place) -> str:
    dominant = source["language"]
    if label is not None:
        if label == dominant and label != UNDETERMINED:
            _require_source_language(source, place)
            raise place.error(
                f"is {label!r}, the language of the source. Targets are in other languages; if the source is "
                "not in that language, set source_language."
            )
        return label
    prompt, chosen, rejected = answers_read(pair).values()
    language = detect_pair_language(prompt, chosen, rejected, dominant)
    if language == dominant and language != UNDETERMINED:
        _require_source_language(source, place)
        raise place.error(
            f"no label given, and prompt, chosen and rejected are all in {language_name(dominant)}, the language of "
            "the source. Translate them, label them, or set source_language if the source is in another language."
        )
    return language


def _own_row(value: Mapping[Any, Any], default: int) -> int:
    row = value.get("row")
    return row if isinstance(row, int) and not isinstance(row, bool) and row >= 0 else default


def _canonical(row: Mapping[Any, Any], place: _Place, source_language: str) -> ParsedRow:
    known = ("language", *PARTS, "row")
    origin = row.get("origin")
    origin = origin if isinstance(origin, str) and origin else None

    def read(value: object, where: _Place, *, is_source: bool) -> tuple[Pair, str | None]:
        if not isinstance(value, Mapping):
            raise where.error(f"is {_describe(value)}; expected an object with prompt, chosen and rejected.")
        parts = {part: (_required(value, part, where, known), where.at(part)) for part in PARTS}
        # Groups that were loaded before say which file and row a pair came from; anything else comes from
        # here.
        pair = _pair(parts, place.row if origin is None else _own_row(value, place.row), is_source=is_source)
        return pair, _label(value.get("language"), where.at("language"))

    for name in ("source", "targets"):
        _required(row, name, place, ("source", "targets", "origin"))
    source, label = read(row["source"], place.at("source"), is_source=True)
    source["language"] = label or source_language
    targets = row["targets"]
    where = place.at("targets")
    if not isinstance(targets, (list, tuple)):
        raise where.error(f"is {_describe(targets)}; expected a list of pairs.")
    if not targets:
        raise where.error("is an empty list; expected at least one target pair.")
    parsed = ParsedRow(source, [], origin=origin, kind=_kind(row, place))
    for index, value in enumerate(targets):
        try:
            pair, label = read(value, where.at(index), is_source=False)
            pair["language"] = _target_language(pair, label, source, where.at(index).at("language"))
        except RowError as error:
            parsed.errors.append(error)
        else:
            parsed.targets.append(pair)
    return parsed


def _flat(row: Mapping[Any, Any], place: _Place, source_language: str, prompt: str) -> ParsedRow:
    names = {
        side: {part: f"{side}_{prompt if part == 'prompt' else part}" for part in PARTS}
        for side in ("source", "target")
    }
    known = {*names["source"].values(), *names["target"].values(), *_OPTIONAL, "kind"}
    values = {
        side: {part: (_required(row, name, place, known), place.at(name)) for part, name in parts.items()}
        for side, parts in names.items()
    }
    for key in row:
        # A label under a name that is nearly right would otherwise be ignored, and a detected one used
        # instead.
        if isinstance(key, str) and key not in known:
            near = nearest(key, [name for name in _OPTIONAL if name not in row])
            if key in ("language", "lang"):
                near = None if "target_language" in row else "target_language"
            if near:
                raise place.at(key).error(
                    f"unknown column. Did you mean `{near}`? Rename it, or take it out."
                )
    source = _pair(values["source"], place.row, is_source=True)
    source["language"] = _label(row.get("source_language"), place.at("source_language")) or source_language
    target = _pair(values["target"], place.row, is_source=False)
    label = _label(row.get("target_language"), place.at("target_language"))
    target["language"] = _target_language(target, label, source, place.at("target_language"))
    return ParsedRow(source, [target], kind=_kind(row, place))


def parse_row(row: object, *, file: str, index: int, source_language: str = "en") -> ParsedRow:
    """Validate one row and normalise it.

    Args:
        row: The row, in any of the forms that the module lists.
        file: Name of the file or dataset, for errors.
        index: 0-based row in it; becomes ``row`` of every pair.
        source_language: Normalised code of the source pairs that carry no label of their own.

    Raises:
        RowError: A :class:`~mpo.errors.DataError` that names file, row and field. Errors in single target
            pairs of a canonical group are collected in ``ParsedRow.errors`` instead, so that the good ones
            can be kept.
    """
    place = _Place(file, index)
    if not isinstance(row, Mapping):
        raise place.error(f"is {_describe(row)}; expected an object with named fields.")
    if "targets" in row or isinstance(row.get("source"), Mapping):
        return _canonical(row, place, source_language)
    if any(isinstance(key, str) and key.endswith("_conversations") for key in row):
        return _flat(row, place, source_language, "conversations")
    return _flat(row, place, source_language, "prompt")


def is_untranslated(target: Mapping[str, Any], source: Mapping[str, Any], part: str) -> bool:
    """True where a target's text is its source's, but for blanks, and has letters."""
    return is_same_text(messages_text(target[part]), messages_text(source[part]))


def is_same_text(text: str, original: str) -> bool:
    """True where two texts are the same, but for blanks, and have letters."""
    # Nearly all pairs of texts differ in their first word already, which needs no normal form of the whole.
    first = [normal_form(word) for whole in (text, original) for word in whole.split(maxsplit=1)[:1]]
    if len(first) < 2 or first[0] != first[1]:
        return False
    words = normal_form(text).split()
    return words == normal_form(original).split() and any(any(map(str.isalpha, word)) for word in words)


def texts_to_detect(row: object) -> list[str]:
    """Texts of a raw row whose language :func:`parse_row` will most likely detect: those of targets without a label.

    A guess that only saves time; :func:`parse_row` takes any other text as well.
    """
    if not isinstance(row, Mapping):
        return []
    values: list[object]
    if isinstance(targets := row.get("targets"), (list, tuple)):
        pairs = [pair for pair in targets if isinstance(pair, Mapping) and not pair.get("language")]
        values = [pair.get(part) for pair in pairs for part in PARTS]
    elif row.get("target_language"):
        return []
    else:
        values = [row.get(f"target_{part}") for part in (*PARTS, "conversations")]
    return [split_reasoning(text).answer for value in values if (text := _raw_text(value)) is not None]


def _raw_text(value: object) -> str | None:
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping):
        value = value.get("content") or value.get("value")
    return value if isinstance(value, str) else None


def messages_identity(messages: Iterable[Mapping[str, str]]) -> tuple[tuple[str, str], ...]:
    """What makes two lists of messages the same: roles, and contents in their normal form."""
    return tuple((message["role"], normal_form(message["content"])) for message in messages)


def pair_digest(pair: Mapping[str, Any], parts: Iterable[str] = PARTS, *more: str) -> bytes:
    """A hash that pairs of one language share whose parts have the same messages; texts of all pairs would fill memory."""
    # The length before each text keeps "ab", "c" apart from "a", "bc".
    language = pair["language"].encode("utf-8")
    pieces = [b"%d:" % len(language), language]
    for part in parts:
        messages = pair[part]
        pieces.append(b"%d;" % len(messages))
        for message in messages:
            role, content = message["role"].encode("utf-8"), normal_form(message["content"]).encode("utf-8")
            pieces += (b"%d:" % len(role), role, b"%d:" % len(content), content)
    for text in more:
        data = text.encode("utf-8")
        pieces += (b"%d:" % len(data), data)
    return hashlib.blake2b(b"".join(pieces), digest_size=16).digest()
