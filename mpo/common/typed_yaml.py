"""A recipe: YAML whose values are text until a schema gives them types, with ``--key value`` over it.

A value takes the type of its field. That avoids the surprises of YAML 1.1, where ``1e-4`` is a string, ``no`` (Norwegian)
is false and ``1:30`` is ninety. All mistakes of a recipe are reported together, each with its file and line.

pydantic's ``TypeAdapter`` would not shorten this: it knows no lines, and nearly every rule for a value (``no`` is text
where text is accepted, one value may stand for a list, ``1e2`` is 100) would be a validator of its own.
"""

from __future__ import annotations

import functools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from mpo.common.characters import printable
from mpo.common.files import read_named
from mpo.common.recipe_files import find_recipe
from mpo.common.recipe_kinds import another_kind, explaining, home_of
from mpo.common.redaction import REDACTED, is_secret_name, redact_text
from mpo.common.words import nearest, shortened
from mpo.errors import ConfigError, MPOError

T = TypeVar("T")


COMMAND_LINE = "command line"
UNKNOWN = object()
"""Type of a key whose values are not looked at."""

_NULLS = ("", "~", "null", "Null", "NULL")
_TRUE, _FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")
_INT = re.compile(r"[-+]?\d+")
_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_LINES = "indented lines of the form `key: value`"
_INSTEAD = (
    "Remove it and set the environment variable instead: HF_TOKEN for the Hub (or run `hf auth login`), WANDB_API_KEY for "
    "Weights & Biases."
)


@dataclass(frozen=True)
class Key:
    """A key that a recipe may have.

    Attributes:
        name: The key.
        hint: Type of its values; :data:`UNKNOWN` accepts any and reads none.
        choices: The accepted values, where there are few.
        default: Value of the field where it is not set.
        required: It has to be set.
    """

    name: str
    hint: Any
    choices: tuple[Any, ...] = ()
    default: Any = None
    required: bool = False


@functools.cache
def keys_of(kind: type) -> dict[str, Key]:
    """The fields of a dataclass as keys, by name."""
    hints, keys = typing.get_type_hints(kind), {}
    for option in fields(kind):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        choices = tuple(option.metadata.get("choices", ()))
        keys[option.name] = Key(option.name, hints[option.name], choices, default, default is MISSING)
    return keys


@dataclass
class _Node:
    """A value without a type yet.

    Attributes:
        value: Text, or a list or mapping of such values.
        place: File and line of its key, or the command line.
        plain: Text without quotes, which may stand for a number, a truth value or nothing.
        flag: An option of the command line without a value.
    """

    value: str | list[_Node] | dict[str, _Node]
    place: str
    plain: bool = False
    flag: bool = False

    def bare(self) -> Any:
        """The value in Python's own lists and dictionaries."""
        if isinstance(self.value, dict):
            return {name: item.bare() for name, item in self.value.items()}
        return [item.bare() for item in self.value] if isinstance(self.value, list) else self.value

    @property
    def is_null(self) -> bool:
        return self.plain and self.value in _NULLS


class _Mismatch(Exception):
    """A value does not have its field's type; ``detail`` may say what exactly is wrong."""

    def __init__(self, node: _Node, detail: str = "") -> None:
        self.place, self.detail = node.place, detail


class Document:
    """A recipe's file with the words of the command line over it.

    Args:
        path: YAML file: a mapping. Or the bare name of a recipe of the package, see
            :func:`~mpo.common.recipe_files.find_recipe`.
        overrides: Command-line words: ``--key value``, ``--key=value``, ``--flag`` (true), ``--key a b`` (a list),
            ``--key.entry value`` (an entry of a mapping), ``--key.0.entry value`` (an entry of the first of a list),
            ``--key null``.
        noun: What messages call the recipe; :data:`~mpo.common.recipe_kinds.KINDS` tells kinds apart by it.
        renamed: Names that others have for keys, each with what to do about it: ``use `max_length` ``.
        paths: Keys, on any level, whose values may be files: what is not in the working folder but beside the recipe is
            found there.

    Raises:
        ConfigError: The file cannot be read, is no mapping, or is of another kind. Other mistakes are kept until :meth:`check`.
    """

    def __init__(
        self,
        path: str | Path,
        overrides: Sequence[str] = (),
        *,
        noun: str = "a recipe",
        renamed: Mapping[str, str] | None = None,
        paths: frozenset[str] = frozenset(),
    ) -> None:
        self.path, self.noun, self.paths = find_recipe(path, home_of(noun)), noun, paths
        self._renamed = renamed or {}
        self._mistakes: list[str] = []
        self._translated = 0
        self._root = _Node(self._read(path), str(self.path))
        self._override(overrides)

    def default(self, key: str, value: str) -> None:
        """Gives a key that is not set a value."""
        assert isinstance(self._root.value, dict)
        self._root.value.setdefault(key, _Node(value, str(self.path)))

    def place(self, key: str) -> str:
        """File and line of a key, or the file where it is not set."""
        assert isinstance(self._root.value, dict)
        return self._root.value.get(key, self._root).place

    def refused(self, error: Exception) -> None:
        """Keeps what a check of values said until :meth:`check`, with the place of the key that it begins with."""
        self.wrong(_place_of(error, self._root), str(error).lstrip("-"))

    def wrong(self, place: str, text: str) -> None:
        """Keeps a mistake until :meth:`check`."""
        self._mistakes.append(printable(f"{place}: {text}"))

    def check(self) -> None:
        """Refuses the recipe if anything in it is wrong.

        Raises:
            ConfigError: It names every mistake with its place.
        """
        mistakes = [*dict.fromkeys(self._mistakes)]
        if (number := len(mistakes)) > 1:
            if self._translated > 2:  # a file of another program
                mistakes.append("A recipe with our keys to begin with: `mpo recipes copy llama`.")
            raise ConfigError("\n  ".join([f"{number} settings are wrong:", *mistakes]))
        if mistakes:
            raise ConfigError(mistakes[0])

    def values(self, keys: Mapping[str, Key]) -> dict[str, Any]:
        """What is set of a flat recipe, in its order and with the types of its keys. No value becomes a dataclass.

        Raises:
            ConfigError: A key is unknown or set twice, a value does not have its key's type, or a secret is among them.
        """
        flat = {
            name: replace(key, hint=Union[tuple(m for m in _members(key.hint) if not _is_section(m))])  # noqa: UP007
            for name, key in keys.items()
            if key.hint is not UNKNOWN
        }
        found = self._fields(self._root, {**keys, **flat}, "")
        self.check()
        return found

    def build(self, kind: type[T], **given: Any) -> T:
        """A dataclass from the whole recipe; ``given`` are fields that are no keys.

        Raises:
            ConfigError: A key is unknown, missing or set twice, a value does not have its type or is refused by its
                dataclass, or a secret is among them.
        """
        built = self._section(self._root, kind, "", given)
        self.check()
        assert isinstance(built, kind)
        return built

    # --------------------------------------------------------------------------------------------------------- reading

    def _read(self, given: str | Path) -> dict[str, _Node]:
        path = self.path
        try:
            content = read_named(path)
        except OSError as error:
            raise ConfigError(f"The recipe {path} cannot be read: {error.strerror or error}.") from None
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise ConfigError(
                f"{path}, line {line}: the recipe is not UTF-8 text. Save it as UTF-8."
            ) from None
        node = _compose(text, str(path))
        if node is None:
            raise ConfigError(f"The recipe {path} is empty; expected lines of the form `key: value`.")
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                f"{path}, line {node.start_mark.line + 1}: the recipe must be a mapping, lines of the form `key: value`; "
                f"this is a {'list' if isinstance(node, yaml.SequenceNode) else 'single value'}."
            )
        root = self._node(node, str(path)).value
        assert isinstance(root, dict)
        if other := another_kind(self.noun, given, list(root)):
            raise ConfigError(printable(other))
        return root

    def _node(self, node: yaml.Node, name: str, place: str | None = None) -> _Node:
        def line(of: yaml.Node) -> str:
            return name if name == COMMAND_LINE else f"{name}, line {of.start_mark.line + 1}"

        place = place or line(node)
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
            self.wrong(line(node), f"the tag {node.tag!r} is not accepted in a recipe; remove it.")
        if isinstance(node, yaml.ScalarNode):
            return _Node(node.value, place, plain=node.style is None)
        if isinstance(node, yaml.SequenceNode):
            return _Node([self._node(item, name) for item in node.value], place)
        entries: dict[str, _Node] = {}
        for key_node, value in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.wrong(line(key_node), "a key must be a word, not a list or a mapping.")
            elif key_node.value in entries:
                self.wrong(line(key_node), f"`{key_node.value}` is set twice; remove one of the two.")
            else:
                entries[key_node.value] = self._node(value, name, line(key_node))
        return _Node(entries, place)

    # -------------------------------------------------------------------------------------------------------- overrides

    def _override(self, words: Sequence[str]) -> None:
        groups: list[tuple[str, list[_Node]]] = []
        takes_more = False
        for word in words:
            option, equals, value = word.partition("=")
            if word.startswith("--") and word != "--":
                groups.append((option, [_Node(value, COMMAND_LINE, plain=True)] if equals else []))
                takes_more = not equals
            elif takes_more and word != "--":
                groups[-1][1].append(_Node(word, COMMAND_LINE, plain=True))
            else:
                shown = REDACTED if _is_secret(word) else word
                self.wrong(COMMAND_LINE, f"{shown!r} stands alone; expected `--key value`.")
        for option, items in groups:
            base, *entry = option[2:].split(".")
            path = [base.replace("-", "_"), *entry]
            if not all(path):
                self.wrong(COMMAND_LINE, f"`{option}` names no key; expected `--key value`.")
                continue
            flag = _Node("true", COMMAND_LINE, plain=True, flag=True)
            given = flag if not items else items[0] if len(items) == 1 else _Node([*items], COMMAND_LINE)
            self._enter(self._root, path, given, option)

    def _enter(self, parent: _Node, path: list[str], given: _Node, option: str) -> None:
        """Sets an entry below ``parent``, and makes the mappings on the way to it."""
        if parent.is_null:
            parent.value, parent.place = {}, COMMAND_LINE
        if isinstance(parent.value, str):
            whole = ".".join(option[2:].split(".")[: -len(path)])
            self.wrong(
                COMMAND_LINE,
                f"`{option}` sets an entry of a mapping, but the recipe sets the whole to {_show(parent)}. Set the whole "
                f"instead, for example `--{whole} '{{{path[0]}: {_show(given)}}}'`.",
            )
        elif isinstance(parent.value, list):
            if not (path[0].isdecimal() and int(path[0]) < len(parent.value)):
                self.wrong(
                    COMMAND_LINE,
                    f"`{option}`: there is no entry {path[0]!r}; expected a number below {len(parent.value)}.",
                )
            elif path[1:]:
                self._enter(parent.value[int(path[0])], path[1:], given, option)
            else:
                parent.value[int(path[0])] = given
        else:
            # Names of models and languages may hold dots themselves.
            lengths = (n for n in range(len(path), 1, -1) if ".".join(path[:n]) in parent.value)
            length = next(lengths, 1)
            name = ".".join(path[:length])
            if path[length:]:
                below = parent.value.setdefault(name, _Node({}, COMMAND_LINE))
                self._enter(below, path[length:], given, option)
            else:
                parent.value[name] = given

    # ------------------------------------------------------------------------------------------------------------ typing

    def _fields(self, parent: _Node, keys: Mapping[str, Key], path: str) -> dict[str, Any]:
        """The typed values of a mapping by key; what is wrong with them is kept."""
        assert isinstance(parent.value, dict)
        prefix = f"{path}." if path else ""
        found: dict[str, Any] = {}
        absent = {name for name, key in keys.items() if key.required}
        for name, given in parent.value.items():
            shown = f"{prefix}{name}"
            key = keys.get(name)
            node = given if key is None else self._opened(given, key.hint)
            # The keys of a section are looked at with the section; here, that it holds a secret is all that is wrong.
            if self._refuse_secret(name, node, shown) and not (key and _holds_sections(key.hint)):
                absent.discard(name)
            elif key is None:
                absent.discard(self._refuse_unknown(name, keys, node.place, prefix))
            elif not (node.is_null and _section_of(key.hint) and type(None) not in _members(key.hint)):
                absent.discard(name)
                found[name] = self._field(node, key, shown)
        for name in keys:
            if name in absent:
                self.wrong(parent.place, f"{f'`{path}`' if path else self.noun} needs `{name}`.")
        return found

    def _field(self, node: _Node, key: Key, shown: str) -> Any:
        if key.hint is UNKNOWN:
            return None
        members = _members(key.hint)
        try:
            if node.flag and not {bool, Any} & set(members):
                self.wrong(node.place, f"`--{shown}` needs a value: {_describe(key)}.")
                return None
            value = self._typed(node, key.hint, shown, key.default)
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if key.choices and item is not None and item not in key.choices:
                    raise _Mismatch(node)
        except _Mismatch as error:
            expected = _describe(key) + (f" ({error.detail})" if error.detail else "")
            several = isinstance(node.value, (list, dict)) and not any(
                _is_list(member) or _is_mapping(member) for member in members
            )
            text = f"`{shown}` is {_show(node)}; expected {'one value, ' if several else ''}{expected}."
            if several and isinstance(node.value, dict) and node.place == COMMAND_LINE:
                entry = f"--{shown}.{next(iter(node.value))}"
                text = f"`{entry}` sets an entry of a mapping, but `{shown}` takes {expected}."
            self.wrong(error.place, text)
            return None
        return beside(value, self.path.parent) if key.name in self.paths else value

    def _section(
        self, node: _Node, kind: type, path: str, given: Mapping[str, Any] | None = None, base: Any = None
    ) -> Any:
        """The dataclass ``kind`` from a mapping, or None where anything in it is wrong; what it leaves out is as in ``base``."""
        before = len(self._mistakes)
        node = self._opened(node, kind)
        if not isinstance(node.value, dict):
            self.wrong(node.place, f"`{path}` is {_show(node)}; expected {_LINES}.")
            return None
        keys = {name: key for name, key in keys_of(kind).items() if name not in (given or {})}
        if base is not None:
            keys = {name: replace(key, required=False) for name, key in keys.items()}
        values = self._fields(node, keys, path)
        if len(self._mistakes) > before:
            return None
        try:
            return kind(**values, **(given or {})) if base is None else replace(base, **values)
        except MPOError as error:
            self.wrong(_place_of(error, node), f"`{path}`: {error}" if path else str(error))
            return None

    def _opened(self, node: _Node, hint: Any) -> _Node:
        """A list or mapping that the command line gives as YAML, where the key takes one."""
        text = node.value
        if not (isinstance(text, str) and node.plain and text.lstrip()[:1] in ("{", "[")):
            return node
        wanted = _is_list if text.lstrip()[0] == "[" else _is_mapping
        if hint is UNKNOWN or not any(wanted(member) for member in _members(hint)):
            return node
        composed = _compose(text, node.place)
        return node if composed is None else self._node(composed, node.place)

    def _typed(self, node: _Node, hint: Any, shown: str, default: Any = None) -> Any:
        """A value in the type ``hint``; a mapping that is there by ``default`` keeps what is not set anew.

        Raises:
            _Mismatch: It does not have it.
        """
        members = _members(hint)
        if node.is_null and type(None) in members:
            return None
        section = _section_of(hint)
        if section is not None:
            return self._section(node, section, shown, base=default if isinstance(default, section) else None)
        if isinstance(node.value, str):
            return self._text(node, members, shown)
        for member in members:
            if isinstance(node.value, dict) and _is_mapping(member):
                inner = (*get_args(member), Any, Any)[1]
                return {
                    name: self._typed(item, inner, f"{shown}.{name}") for name, item in node.value.items()
                }
            if _is_list(member):
                if isinstance(node.value, list):
                    return self._items(node, node.value, member, shown)
                if _section_of((*get_args(member), Any)[0]):
                    return self._items(node, [node], member, shown)
        raise _Mismatch(node)

    def _items(self, parent: _Node, nodes: Sequence[_Node], member: Any, shown: str) -> Any:
        """A list or tuple of values in the types of its items."""
        kind = get_origin(member) or list
        hints = get_args(member) or (Any,)
        if kind is list or hints[-1] is Ellipsis:
            hints = (hints[0],) * len(nodes)
        if len(hints) != len(nodes):
            raise _Mismatch(parent, f"{len(hints)} of them")
        pairs = zip(nodes, hints, strict=True)
        return kind(self._typed(item, hint, f"{shown}.{i}") for i, (item, hint) in enumerate(pairs))

    def _text(self, node: _Node, members: tuple[Any, ...], shown: str) -> Any:
        assert isinstance(node.value, str)
        text = node.value.strip(" \t\r\n") if node.plain else node.value
        takes_text = str in members
        literals = _literals(members)
        if Any in members:
            return _resolve(text) if node.plain else text
        for truth, words in ((True, ("yes", "on", "1")), (False, ("no", "off", "0"))):
            # Beside text ("no" may be a value of its own) only true and false are truth values.
            accepted = (str(truth).lower(), *(() if takes_text else words))
            if (bool in members or any(item is truth for item in literals)) and text.lower() in accepted:
                return truth
        for item in literals:
            if not isinstance(item, bool) and str(item) == text:
                return item
        number = _number(text)
        if int in members and number is not None:
            written_as_share = float in members and isinstance(number, float)
            if float(number).is_integer() and not written_as_share:
                return int(number)
            if float not in members:
                raise _Mismatch(node, "not a whole number")
        if float in members and number is not None:
            return float(number)
        for member in members:
            if isinstance(member, type) and issubclass(member, Enum):
                known = [str(item.value) for item in member]
                if text in known:
                    return text
                near = next((one for one in known if text and one.startswith(text)), nearest(text, known))
                raise _Mismatch(node, f"did you mean {near!r}?" if near else f"one of {', '.join(known)}")
        if takes_text:
            return text
        for member in members:
            if _is_list(member):
                return self._items(node, [node], member, shown)
        raise _Mismatch(node)

    # ---------------------------------------------------------------------------------------------------------- refusals

    def _refuse_unknown(self, name: str, keys: Mapping[str, Key], place: str, prefix: str) -> str | None:
        """Keeps that a key is unknown, and gives the one that was most likely meant."""
        base, dot, entry = name.partition(".")
        shown = f"{prefix}{name}"
        near = nearest(name, keys, 0.0)
        if dot and base in keys:
            text = (
                f"is not a key. In a recipe write the mapping out (`{base}:` and an indented `{entry}:`); "
                f"`--{shown} value` works on the command line."
            )
        elif name in self._renamed and not prefix:
            text = f"is not a key of {self.noun}; {self._renamed[name]}."
            self._translated += 1
        else:
            text = f"is not a key of {self.noun}; the nearest is `{prefix}{near}`."
            if not nearest(name, keys, 0.6):
                text += f" All keys: `{explaining(self.noun)}`."
        self.wrong(place, f"`{shown}` {text}")
        return near

    def _refuse_secret(self, name: str, node: _Node, shown: str) -> bool:
        """Keeps that a key or a value is a token or a password, and says whether it is; it is not repeated."""
        if _is_secret(name):
            self.wrong(node.place, f"a key looks like a token or a password. {_INSTEAD}")
        elif is_secret_name(name):
            place = "must not stand in a recipe or on a command line, where others can read it"
            self.wrong(node.place, f"`{shown}` {place}. {_INSTEAD}")
        elif isinstance(node.value, dict):
            return sum(self._refuse_secret(k, item, f"{shown}.{k}") for k, item in node.value.items()) > 0
        elif isinstance(node.value, list):
            return sum(self._refuse_secret("", item, f"{shown}.{i}") for i, item in enumerate(node.value)) > 0
        elif _is_secret(node.value):
            self.wrong(node.place, f"the value of `{shown}` looks like a token or a password. {_INSTEAD}")
        else:
            return False
        return True


def beside(value: Any, folder: Path) -> Any:
    """``value`` with each path in it that is not in the working folder but in ``folder`` made to lead there."""
    if isinstance(value, (list, tuple)):
        return type(value)(beside(item, folder) for item in value)
    if isinstance(value, dict):
        return {name: beside(item, folder) for name, item in value.items()}
    if not isinstance(value, str) or not value:
        return value
    try:
        path = Path(value).expanduser()
        return next((str(found) for found in (path, folder / path) if found.exists()), value)
    except (OSError, RuntimeError, ValueError):  # no path: a text, longer than a file's name can be
        return value


def _place_of(error: Exception, node: _Node) -> str:
    """The place of the key that a message begins with, or of the whole."""
    named = re.match(r"`?(\w+)[`:=]", str(error))
    entries = node.value if isinstance(node.value, dict) else {}
    return entries[named[1]].place if named and named[1] in entries else node.place


def _compose(text: str, name: str) -> yaml.Node | None:
    """The nodes of a YAML text.

    Raises:
        ConfigError: It is no YAML; the message has line and column.
    """
    try:
        # `compose` builds nodes only: no tag is ever turned into an object.
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        hint = " Indent with spaces, not tabs." if "'\\t'" in problem else ""
        raise ConfigError(f"{name}{where}: this is not valid YAML: {problem}.{hint}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise ConfigError(
            f"{name}, line {line}, column {column}: the control character {error.character!r} is not allowed in YAML."
        ) from None
    except RecursionError:
        raise ConfigError(
            f"{name}: the recipe is nested too deeply; expected lines of the form `key: value`."
        ) from None


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            problem = "anchors and aliases are not accepted in a recipe; write the value out"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        return super().compose_node(parent, index)


def _number(text: str) -> int | float | None:
    if len(text) > 40:  # no setting is that long; Python itself refuses to convert very long digits
        return None
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        return number if abs(number) != float("inf") else None
    return None


def _resolve(text: str) -> Any:
    """Type of unquoted text where a field leaves it open: YAML 1.2's core rules, by which `no` and `on` are words."""
    if text in _NULLS:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    number = _number(text)
    return text if number is None else number


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _literals(members: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(item for hint in members if get_origin(hint) is Literal for item in get_args(hint))


def _is_list(hint: Any) -> bool:
    return hint is Any or (get_origin(hint) or hint) in (list, tuple)


def _is_mapping(hint: Any) -> bool:
    return hint is Any or (get_origin(hint) or hint) in (dict, Mapping) or _is_section(hint)


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)


def _section_of(hint: Any) -> Any:
    return next(filter(_is_section, _members(hint)), None)


def _holds_sections(hint: Any) -> bool:
    return any(map(_is_section, [*_members(hint), *(a for m in _members(hint) for a in get_args(m))]))


def _is_secret(text: str) -> bool:
    return REDACTED in redact_text(text)


def _describe(key: Key) -> str:
    members, words = _members(key.hint), []
    choices = key.choices or (() if str in members else _literals(members))
    if choices:
        return " or ".join(map(repr, choices))
    of = {(int,): " of whole numbers", (float,): " of numbers"}
    enums = any(isinstance(member, type) and issubclass(member, Enum) for member in members)
    for kind, word in ((int, "a whole number"), (float, "a number"), (bool, "true or false")):
        if kind in members:
            words.append(word)
    if enums or str in members:
        words.append("a name that transformers knows" if enums else "text")
    words += [f"a list{of.get(get_args(member)[:1], '')}" for member in members if _is_list(member)]
    words += [f"a mapping{of.get(get_args(member)[1:], '')}" for member in members if _is_mapping(member)]
    if type(None) in members:
        words.append("null")
    return " or ".join(words) or "something that cannot be written in a recipe; remove it"


def _show(node: _Node) -> str:
    text = repr(node.bare())
    return REDACTED if _is_secret(text) else shortened(text)
