"""What the keys of a recipe mean: how they are found and shown, and those of recipes that are dataclasses, from their docstrings."""

from __future__ import annotations

import inspect
import re
import textwrap
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from mpo.common.tables import fact_lines
from mpo.common.words import shortened

_ENTRY = re.compile(r"^    (?P<names>\w+(?:, \w+)*): (?P<text>.*)")
_WIDTH = 110


@dataclass(frozen=True)
class KeyHelp:
    """A key of a recipe.

    Attributes:
        name: The key; one of a mapping with the keys above it, ``answers.samples``.
        type: Its type as the source writes it.
        default: Its default as a recipe would write it.
        choices: The accepted values, where they are few and known.
        text: What it is for, in paragraphs.
        group: Whose key it is.
    """

    name: str
    type: str
    default: str
    choices: tuple[Any, ...]
    text: str
    group: str

    @property
    def line(self) -> str:
        """Its first sentence."""
        return re.split(r"(?<=[a-z`)\d])\. ", self.text.replace("\n", " "))[0].rstrip(".:")


def described_keys(kind: type, group: str, hidden: Collection[str] = ()) -> list[KeyHelp]:
    """The keys of a recipe that is a dataclass, those of mappings in it behind them.

    A mapping that stands in several places has its keys in the first one.

    Args:
        kind: The dataclass. Its docstring and those of its fields' classes explain the keys under ``Attributes``.
        group: Whose keys they are.
        hidden: Fields that are no keys.
    """
    return list(_walk(kind, group, "", {}, hidden))


def found_text(keys: Mapping[str, KeyHelp], word: str, command: str) -> str | None:
    """The one key that a word names, explained, or a line for each that has it in its name or explanation; None without any.

    Args:
        keys: The keys by name.
        word: A key, its last part where it is one of a mapping, or any word.
        command: What explains one of several, without its name.
    """
    wanted = word.removeprefix("--").replace("-", "_").lower()
    named = [key for key in keys.values() if wanted in (key.name, key.name.rpartition(".")[2])]
    by_name = named or [key for key in keys.values() if wanted in key.name]
    by_text = [key for key in keys.values() if key not in by_name and word.lower() in key.text.lower()]
    if len(by_name) == 1 and (named or not by_text):
        return key_detail(by_name[0])
    if not by_name and not by_text:
        return None
    return f"{key_lines([*by_name, *by_text])}\n\nOne of them explained: {command} NAME"


def key_lines(keys: Sequence[KeyHelp]) -> str:
    """A line for each key: its name and what it is for in one sentence."""
    width = max(len(key.name) for key in keys)
    return "\n".join(f"  {key.name.ljust(width)}  {shortened(key.line, _WIDTH - width)}" for key in keys)


def key_detail(key: KeyHelp) -> str:
    """Everything that is known of a key."""
    facts = {"Type": key.type, "Default": key.default or "none; it has to be set"}
    if key.choices:
        facts["Values"] = ", ".join(map(str, key.choices))
    facts["Of"] = key.group
    paragraphs = [textwrap.fill(" ".join(part.split()), _WIDTH) for part in key.text.split("\n\n")]
    return "\n\n".join([f"{key.name}\n{textwrap.indent(fact_lines(facts), '  ')}", *paragraphs])


def plain_text(text: str) -> str:
    """A docstring's text without marks of Markdown and Sphinx."""
    text = re.sub(r"<[^>]+>", "", text)
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)|\[(`[^\]]+`)\]\[[^\]]*\]", lambda m: m[1] or m[2], text)
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return text.replace("**", "").replace("[`~", "`").replace("`]", "`").replace("``", "`")


def written(value: Any) -> str:
    """A value as a recipe writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(written, value))}]" if isinstance(value, (list, tuple)) else str(value)


def _walk(
    kind: type, group: str, prefix: str, seen: dict[type, str], hidden: Collection[str] = ()
) -> Iterator[KeyHelp]:
    hints, texts = get_type_hints(kind), _attributes(kind)
    for field in fields(kind):
        if field.name in hidden:
            continue
        name, hint = f"{prefix}{field.name}", hints[field.name]
        inner, place = _mapping_in(hint)
        text = texts.get(field.name, "It has no description.")
        if inner is not None and inner in seen:
            text += f" Its keys are those of `{seen[inner]}`."
        factory = field.default_factory
        value = field.default if factory is MISSING else factory()
        default = "" if value is MISSING else "its keys'" if is_dataclass(value) else written(value)
        yield KeyHelp(name, _type_name(hint), default, tuple(field.metadata.get("choices", ())), text, group)
        if inner is not None and inner not in seen:
            seen[inner] = f"{name}{place}"
            yield from _walk(inner, group, f"{name}{place}.", seen)


def _attributes(kind: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each attribute; a class comes before its bases."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        names: list[str] = []
        section = False
        for line in inspect.cleandoc(vars(owner).get("__doc__") or "").splitlines():
            if line and not line.startswith(" "):
                section, names = line == "Attributes:", []
            elif section and (entry := _ENTRY.match(line)):
                names = entry["names"].split(", ")
                found.update(dict.fromkeys(names, entry["text"]))
            else:
                found.update({name: f"{found[name]} {line.strip()}".rstrip() for name in names})
    return {name: plain_text(text) for name, text in found.items()}


def _mapping_in(hint: Any) -> tuple[type | None, str]:
    """The dataclass that a value, or each of several, is made of, and what stands between its key and theirs."""
    if is_dataclass(hint) and isinstance(hint, type):
        return hint, ""
    between = {dict: ".NAME", Mapping: ".NAME", list: ".N", tuple: ".N"}.get(get_origin(hint), "")
    for part in get_args(hint):
        inner, place = _mapping_in(part)
        if inner is not None:
            return inner, between + place
    return None, ""


def _type_name(hint: Any) -> str:
    """A type as a person reads it."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(
            _type_name(part) for part in sorted(get_args(hint), key=lambda part: part is type(None))
        )
    if hint is type(None):
        return "null"
    inner, _ = _mapping_in(hint)
    if inner is hint:
        return "mapping"
    if (origin := get_origin(hint)) is not None:
        parts = [_type_name(part) for part in get_args(hint) if part is not Ellipsis]
        return f"{getattr(origin, '__name__', origin).lower()}[{', '.join(parts)}]"
    return str(getattr(hint, "__name__", hint))
