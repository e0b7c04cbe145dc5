"""What the keys of a recipe mean: how they are found and shown, and those of recipes that are dataclasses, from their docstrings."""

from __future__ import annotations

import inspect
import re
import textwrap
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from mpo.common.tables import fact_lines
from mpo.common.words import shortened

_ENTRY = re.compile(r"^    (?P<names>\w+(?:, \w+)*): (?P<text>.*)")
_WIDTH = 110


@dataclass(frozen=True)
class KeyHelp:
    """A key of a recipe.

    Attributes:
        name: The key; one of a mapping with the keys above it, ``answers.samples``. ``NAME`` stands for any name, ``N`` for a place
            in a list.
        type: Its type as the source writes it.
        default: Its default as a recipe would write it.
        choices: The accepted values, where they are few and known.
        text: What it is for, in paragraphs.
        group: Whose key it is.
        place: What stands between a mapping's key and those in it, such as ``.NAME``.
        inside: The key under which those of this mapping are listed; empty where it is none.
    """

    name: str
    type: str
    default: str
    choices: tuple[Any, ...]
    text: str
    group: str
    place: str = ""
    inside: str = ""

    @property
    def line(self) -> str:
        """Its first sentence."""
        return re.split(r"(?<=[a-z`)\d])\. ", self.text.replace("\n", " "))[0].rstrip(".:")


def described_keys(
    kind: type, group: str, hidden: Collection[str] = (), defaults: Mapping[str, str] | None = None
) -> list[KeyHelp]:
    """The keys of a recipe that is a dataclass, those of mappings in it behind them.

    A mapping that stands in several places has its keys in the first one.

    Args:
        kind: The dataclass. Its docstring and those of its fields' classes explain the keys under ``Attributes``.
        group: Whose keys they are.
        hidden: Fields that are no keys.
        defaults: Defaults that are not the dataclass's.
    """
    found = _walk(kind, group, "", {}, None)
    return [
        replace(key, default=(defaults or {}).get(key.name, key.default))
        for key in found
        if key.name not in hidden
    ]


def find_key(keys: Mapping[str, KeyHelp], name: str) -> KeyHelp | None:
    """The key of a name, in which any name stands for ``NAME`` and any number for ``N``; None without one.

    Args:
        keys: The keys by name.
        name: Such as ``models.0.adapter``; in lower case, with underscores.
    """
    for key in keys.values():
        if re.fullmatch(_pattern(key.name), name):
            return key
    for key in keys.values():
        if key.inside and (found := re.match(_pattern(f"{key.name}{key.place}."), name)):
            real = f"{key.inside}.{name[found.end() :]}".lower()
            if real != name:
                return find_key(keys, real)
    return None


def found_text(keys: Mapping[str, KeyHelp], word: str, command: str) -> str | None:
    """The one key that a word names, explained, or a line for each that has it in its name or explanation; None without any.

    Args:
        keys: The keys by name.
        word: A key, its last part where it is one of a mapping, or any words.
        command: What explains one of several, without its name.
    """
    wanted = as_name(word)
    if key := find_key(keys, wanted):
        own = [other for other in keys.values() if key.inside and other.name.startswith(f"{key.inside}.")]
        return key_detail(key) + (f"\n\n{key_lines(own)}" if own else "")
    named = keys_ending_in(keys, wanted)
    by_name = named or [key for key in keys.values() if wanted in key.name.lower()]
    by_text = [key for key in keys.values() if key not in by_name and word.lower() in key.text.lower()]
    if len(by_name) == 1 and (named or not by_text):
        return key_detail(by_name[0])
    if not by_name and not by_text:
        return None
    return f"{key_lines([*by_name, *by_text])}\n\nOne of them explained: {command} NAME"


def keys_ending_in(keys: Mapping[str, KeyHelp], name: str) -> list[KeyHelp]:
    """The keys whose last part is a name."""
    return [key for key in keys.values() if key.name.rpartition(".")[2] == name]


def as_name(word: str) -> str:
    """A word as keys are written: ``--max-length`` and ``max length`` are ``max_length``."""
    return "_".join(word.removeprefix("--").replace("-", " ").split()).lower()


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


def _pattern(name: str) -> str:
    """What matches a key's name in lower case, whatever stands for ``NAME`` and ``N``."""
    return re.sub(r"(?<=\\\.)N(?=\\\.|$)", r"(\\d+|n)", re.escape(name).replace("NAME", r"[^.]+"))


def _walk(kind: type, group: str, prefix: str, seen: dict[type, str], made: Any) -> Iterator[KeyHelp]:
    """The keys of a dataclass; ``made`` is the one that is there by default, None where each field has its own default."""
    hints, texts = get_type_hints(kind), _attributes(kind)
    for field in fields(kind):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        inner, place = _mapping_in(hint)
        text = texts.get(field.name, "It has no description.")
        if inner is not None and inner in seen:
            text += f" Its keys are those of `{seen[inner]}`."
        factory = field.default_factory
        value = field.default if factory is MISSING else factory()
        if made is not None:
            value = getattr(made, field.name)
        inside = "" if inner is None else seen.get(inner, f"{name}{place}")
        default = (
            "" if value is MISSING else "that of each key in it" if is_dataclass(value) else written(value)
        )
        choices = tuple(field.metadata.get("choices", ()))
        yield KeyHelp(name, _type_name(hint), default, choices, text, group, place, inside)
        if inner is not None and inner not in seen:
            seen[inner] = inside
            yield from _walk(inner, group, f"{inside}.", seen, value if isinstance(value, inner) else None)


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
        parts = [part for part in get_args(hint) if part not in (Path, type(None))]
        return " or ".join([*map(_type_name, parts), *["null"] * (type(None) in get_args(hint))])
    if is_dataclass(hint):
        return "mapping"
    if (origin := get_origin(hint)) is not None:
        names = [_type_name(part) for part in get_args(hint) if part is not Ellipsis]
        return f"list of {names[0]}" if origin in (list, tuple) else f"mapping of {names[-1]}"
    return "anything" if hint is Any else str(getattr(hint, "__name__", hint))
