"""A recipe: one flat YAML that describes a training run, and the ``--key value`` overrides of its keys.

The keys of a recipe are the fields of three dataclasses: :class:`ModelSettings` (``trl.ModelConfig``),
:class:`DataSettings` and :class:`~mpo.training.config.MPOConfig`. No key means two things, so none needs a section.

Values are read as text and take the type of their field. That avoids the surprises of YAML 1.1, where ``1e-4`` is a
string, ``no`` (Norwegian) is false and ``1:30`` is ninety.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin
from unittest import mock

import torch
import yaml
from trl import ModelConfig

from mpo.common.redaction import REDACTED, is_secret_name, redact_text
from mpo.errors import ConfigError, DependencyError, MPOError
from mpo.training.config import MPOConfig

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
LORA_INITS = ("gaussian", "orthogonal")


@dataclass
class ModelSettings(ModelConfig):
    r"""
    The model to align: ``trl.ModelConfig`` with MPO's defaults, and what it has no field for.

    Parameters:
        dtype (`str`, *optional*):
            Type of the loaded weights. Unset: `bfloat16` (or `float16`) for the frozen base under an adapter in mixed
            precision, `float32` for everything else: full fine-tuning needs float32 master weights, or its updates
            vanish.
        lora_target_modules (`list[str]`, *optional*, defaults to `"all-linear"`):
            Modules that get an adapter. `all-linear` is every linear layer but the output head.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout inside the adapter. Needs `disable_dropout: false`, which otherwise silences it.
        init_lora_weights (`str`, *optional*):
            `gaussian` or `orthogonal` instead of PEFT's default. Only initialisations that leave the model's output
            unchanged are accepted, because the reference is the model before the first step.
        adapter_name_or_path (`str`, *optional*):
            Existing adapter to go on training from: a folder, or its name on the Hub.
        reference_model_name_or_path (`str`, *optional*):
            Model that supplies the reference instead of the starting policy. It must share the tokenizer.
    """

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the loaded weights; unset picks what the kind of training needs.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Modules that get an adapter."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout inside the adapter."})
    init_lora_weights: str | None = field(
        default=None, metadata={"help": "Initialisation of the adapter.", "choices": list(LORA_INITS)}
    )
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Adapter to go on training from."}
    )
    reference_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Explicit reference model."}
    )

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter is trained, new or existing, over a frozen base."""
        return self.use_peft or self.adapter_name_or_path is not None


@dataclass
class DataSettings:
    r"""
    The pairs to train on, and those held out.

    Parameters:
        dataset (`str` or `list[str]`):
            Local `.json`, `.jsonl`, `.csv` or `.parquet` file(s), or the name of a dataset on the Hub. Relative paths
            count from the working directory, then from the recipe's folder.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub dataset.
        eval_dataset (`str` or `list[str]`, *optional*):
            Pairs to measure on before and after training, instead of a held-out part of `dataset`.
        held_out (`float` or `int`, *optional*, defaults to `0.1`):
            Part of the *sources* that is kept out of training, a fraction below 1 or a number of sources. 0 trains on
            everything and measures nothing.
        held_out_seed (`int`, *optional*, defaults to `0`):
            Seed of that split.
        limit (`int`, *optional*):
            Keep the first so many sources.
        languages (`list[str]`, *optional*):
            Keep only these target languages (ISO 639-1 codes).
    """

    dataset: str | list[str] | None = field(default=None, metadata={"help": "Training pairs."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    eval_dataset: str | list[str] | None = field(default=None, metadata={"help": "Pairs to measure on."})
    held_out: float | int = field(default=0.1, metadata={"help": "Sources kept out of training."})
    held_out_seed: int = field(default=0, metadata={"help": "Seed of the held-out split."})
    limit: int | None = field(default=None, metadata={"help": "Keep the first so many sources."})
    languages: list[str] | None = field(default=None, metadata={"help": "Target languages to keep."})

    def __post_init__(self) -> None:
        fraction = isinstance(self.held_out, float)
        if self.held_out < 0 or (fraction and self.held_out >= 1):
            raise ConfigError(
                f"`held_out` is {self.held_out}; expected a fraction of the sources from 0 to below 1, or a whole "
                "number of sources."
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"`limit` is {self.limit}; expected a number of sources of at least 1.")
        if self.languages is not None and not self.languages:
            raise ConfigError(
                "`languages` is empty; expected target languages such as [bn, sw], or nothing for all."
            )
        for code in self.languages or []:
            if not code.strip() or "," in code:
                raise ConfigError(
                    f"`languages` holds {code!r}, which is not a language; write `languages: [bn, sw]` in a recipe and "
                    "`--languages bn sw` on the command line."
                )


@dataclass
class Recipe:
    """A training run, resolved: what to train, on what, and how.

    Attributes:
        model: The model and its adapter.
        data: The pairs.
        training: Everything the trainer takes.
        source_path: The file the recipe came from.
        given: What the recipe and the overrides set, in their order, with the types of their fields.
        unavailable: Sentences about settings that this machine cannot honour, for example bf16 without a GPU. Such a
            recipe can be planned (``--dry_run``) but not run.
        overrides: The words of the command line that changed the file's settings.
    """

    model: ModelSettings
    data: DataSettings
    training: MPOConfig
    source_path: Path
    given: dict[str, Any]
    unavailable: list[str] = field(default_factory=list)
    overrides: tuple[str, ...] = ()

    def command(self, **changes: str) -> str:
        """The command line that runs this recipe again, with the same overrides and some changed."""
        groups: list[list[str]] = []
        for word in self.overrides:
            if word.startswith("--") or not groups:
                groups.append([word])
            else:
                groups[-1].append(word)
        kept = [
            word
            for group in groups
            if group[0][2:].partition("=")[0].replace("-", "_") not in changes
            for word in group
        ]
        changed = [word for key, value in changes.items() for word in (f"--{key}", value)]
        return shlex.join(["mpo", "train", str(self.source_path), *kept, *changed])

    def to_dict(self) -> dict[str, Any]:
        """Everything that was given plus everything that differs from the defaults; never a token."""
        resolved = {key: _plain_value(value) for key, value in self.given.items()}
        resolved["output_dir"] = str(self.training.output_dir)
        # bf16 depends on the machine unless it is set, so a resolved recipe always says which it was.
        resolved.setdefault("bf16", bool(self.training.bf16))
        defaults = (ModelSettings(), DataSettings(), _default_training(self.training.output_dir))
        settings: tuple[Any, ...] = (self.model, self.data, self.training)
        for current, default in zip(settings, defaults, strict=True):
            for option in fields(current):
                value = getattr(current, option.name)
                # Filled in by a run, from settings of their own and for this machine.
                if option.name in ("model_init_kwargs", "ddp_backend"):
                    continue
                if (
                    option.name in resolved
                    or is_secret_name(option.name)
                    or value == getattr(default, option.name)
                ):
                    continue
                plain = _plain_value(value)
                if plain is not _NOT_PLAIN:
                    resolved[option.name] = plain
        for key in ("dataset", "eval_dataset"):
            if key in resolved:
                resolved[key] = getattr(self.data, key)
        for key in ("model_name_or_path", "adapter_name_or_path", "reference_model_name_or_path"):
            if key in resolved:
                resolved[key] = getattr(self.model, key)
        return resolved

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; :func:`load_recipe` reads it back to the same settings."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)


class _Defaults(MPOConfig):
    """Settings alone: a second ``MPOConfig`` would set up the device and the process group anew, without the run's own."""

    _setup_devices = torch.device("cpu")
    _n_gpu = 0
    distributed_state = None


def _default_training(output_dir: str | None) -> MPOConfig:
    # A DeepSpeed configuration would take the place of the run's own, and end with these settings.
    with mock.patch.dict(os.environ, ACCELERATE_USE_DEEPSPEED="false"):
        return _Defaults(output_dir=output_dir)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies the overrides of the command line.

    Args:
        path: YAML file.
        overrides: Command-line words: ``--key value``, ``--key=value``, ``--flag`` (true), ``--key a b`` (a list),
            ``--key.entry value`` (an entry of a mapping), ``--key null``.

    Raises:
        ConfigError: The file cannot be read or parsed; a key is unknown or set twice; a value does not have the type of
            its field or contradicts another; a token or password stands in the recipe.
        DependencyError: A setting needs a package that is not installed.
    """
    source = Path(path)
    known = recipe_fields()
    raw, places = read_yaml(source)
    for key in raw:
        _require_known(key, known, places[key])
    for key, entry, value in _parse_overrides(overrides):
        shown = f"--{key}" + (f".{entry}" if entry else "")
        _require_known(key, known, "command line")
        _refuse_secret_key(f"{key}.{entry}" if entry else key, "command line")
        places[key] = "command line"
        if entry is None:
            raw[key] = value
        else:
            raw[key] = _with_entry(raw.get(key), entry, value, shown, known[key].hint)

    given: dict[str, Any] = {}
    for key, value in raw.items():
        given[key] = typed(key, value, known[key], places[key])
        refuse_secret_value(key, given[key], places[key])
    given.setdefault("output_dir", f"runs/{source.stem}")
    recipe = _build(given, source, places)
    recipe.overrides = tuple(overrides)
    return recipe


@dataclass(frozen=True)
class RecipeField:
    """A key a recipe may have: the dataclass it belongs to, its type and its accepted values."""

    name: str
    owner: type
    hint: Any
    choices: tuple[str, ...]
    default: Any


def settings_in_effect(recipe: Recipe) -> dict[str, Any]:
    """Every setting that has a value YAML can hold, defaults included; never a token."""
    values: dict[str, Any] = {}
    settings: tuple[Any, ...] = (recipe.model, recipe.data, recipe.training)
    for part in settings:
        for option in fields(part):
            plain = _plain_value(getattr(part, option.name))
            if plain is not None and plain is not _NOT_PLAIN and not is_secret_name(option.name):
                values[option.name] = plain
    return values


def recipe_fields() -> dict[str, RecipeField]:
    """All keys a recipe may have, by name."""
    result: dict[str, RecipeField] = {}
    for owner in (ModelSettings, DataSettings, MPOConfig):
        hints = typing.get_type_hints(owner)
        for option in fields(owner):
            default = option.default if option.default_factory is MISSING else option.default_factory()
            choices = tuple(option.metadata.get("choices", ()))
            result[option.name] = RecipeField(option.name, owner, hints[option.name], choices, default)
    return result


# ------------------------------------------------------------------------------------------------------------ reading


class _Plain(str):
    """Text that was written without quotes: it may stand for a number, a truth value or nothing."""


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None,
                None,
                "anchors and aliases are not accepted in a recipe; write the value out",
                event.start_mark,
            )
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in a YAML file, its scalars still text for :func:`typed`, and the place of each of its keys.

    Raises:
        ConfigError: The file cannot be read or is no such mapping; the message has the line.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        near = sorted(str(p) for p in Path("recipes").glob("*.yaml")) if Path("recipes").is_dir() else []
        hint = f" Recipes here: {', '.join(near)}." if near else ""
        raise ConfigError(f"There is no recipe {path}.{hint}") from None
    except OSError as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error.strerror or error}.") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line}: the recipe is not UTF-8 text. Save it as UTF-8.") from None
    node = _compose(text, str(path))
    if node is None:
        raise ConfigError(f"The recipe {path} is empty; expected lines of the form `key: value`.")
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{path}, {_place(node)}: the recipe must be a mapping, lines of the form `key: value`; "
            f"this is a {'list' if isinstance(node, yaml.SequenceNode) else 'single value'}."
        )
    places = {
        key.value: f"{path}, {_place(key)}" for key, _ in node.value if isinstance(key, yaml.ScalarNode)
    }
    values = _from_node(node, str(path))
    return values, places


def _compose(text: str, name: str) -> yaml.Node | None:
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
        line, column = (
            text.count("\n", 0, error.position) + 1,
            error.position - text.rfind("\n", 0, error.position),
        )
        raise ConfigError(
            f"{name}, line {line}, column {column}: the control character {error.character!r} is not allowed in YAML."
        ) from None
    except RecursionError:
        raise ConfigError(
            f"{name}: the recipe is nested too deeply; expected lines of the form `key: value`."
        ) from None


def _place(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _from_node(node: yaml.Node, name: str) -> Any:
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
        raise ConfigError(
            f"{name}, {_place(node)}: the tag {node.tag!r} is not accepted in a recipe; remove it."
        )
    if isinstance(node, yaml.ScalarNode):
        return _Plain(node.value) if node.style is None else str(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_from_node(item, name) for item in node.value]
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{name}, {_place(key_node)}: a key must be a word, not a list or a mapping.")
        key = str(key_node.value)
        if key in result:
            raise ConfigError(f"{name}, {_place(key_node)}: `{key}` is set twice; remove one of the two.")
        _refuse_secret_key(key, f"{name}, {_place(key_node)}")
        result[key] = _from_node(value_node, name)
    return result


# ---------------------------------------------------------------------------------------------------------- overrides


def _parse_overrides(words: Sequence[str]) -> list[tuple[str, str | None, Any]]:
    """Turns command-line words into (key, entry of a mapping or None, untyped value)."""
    parsed: list[tuple[str, str | None, Any]] = []
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"{word!r} stands alone on the command line; expected `--key value`.")
        name, equals, value = word[2:].partition("=")
        base, dot, entry = name.partition(".")
        key = base.replace("-", "_")
        if not key or (dot and not entry):
            raise ConfigError(f"{word!r} names no key; expected `--key value`.")
        values = [_Plain(value)] if equals else []
        if not equals:
            while index < len(words) and not words[index].startswith("--"):
                values.append(_Plain(words[index]))
                index += 1
        given: Any = _FLAG if not values else values[0] if len(values) == 1 else list(values)
        parsed.append((key, entry if dot else None, given))
    return parsed


def _with_entry(current: Any, entry: str, value: Any, shown: str, hint: Any) -> dict[str, Any]:
    if not any(_is_mapping(member) for member in _members(hint)):
        raise ConfigError(
            f"`{shown}` sets an entry of a mapping, but {shown.split('.')[0]!r} takes {_describe(hint)}."
        )
    if current is None or (isinstance(current, _Plain) and current in _NULLS):
        current = {}
    if not isinstance(current, dict):
        raise ConfigError(
            f"`{shown}` sets an entry of a mapping, but the recipe sets the whole to {str(current)!r}. "
            f"Set the whole instead, for example `{shown.split('.')[0]} '{{{entry}: {value}}}'`."
        )
    head, dot, rest = entry.partition(".")
    result = dict(current)
    result[head] = _with_entry(result.get(head), rest, value, shown, dict[str, Any]) if dot else value
    return result


# --------------------------------------------------------------------------------------------------------------- types

_NULLS = ("", "~", "null", "Null", "NULL")
_TRUE, _FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")
_INT = re.compile(r"[-+]?\d+")
_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_FLAG = object()
_NOT_PLAIN = object()


class _Mismatch(Exception):
    """A value does not have its field's type. ``args[0]`` may add what exactly is wrong."""


def typed(key: str, value: Any, known: RecipeField, place: str) -> Any:
    """A value of :func:`read_yaml` in the type of its field.

    Raises:
        ConfigError: It does not have that type, or is none of the field's choices.
    """
    if value is _FLAG:
        if bool not in _members(known.hint):
            raise ConfigError(f"{place}: `--{key}` needs a value: {_describe(known.hint)}.")
        return True
    try:
        result = _coerce(value, known.hint)
        for item in result if isinstance(result, list) else [result]:
            if known.choices and item is not None and item not in known.choices:
                raise _Mismatch
    except _Mismatch as error:
        expected = " or ".join(repr(c) for c in known.choices) if known.choices else _describe(known.hint)
        detail = f" ({error})" if str(error) else ""
        raise ConfigError(f"{place}: `{key}` is {_show(value)}; expected {expected}{detail}.") from None
    return result


def _coerce(value: Any, hint: Any) -> Any:
    """Gives ``value`` (text, or lists and mappings of text) the type ``hint``; raises :class:`_Mismatch`."""
    members = _members(hint)
    if isinstance(value, _Plain) and value in _NULLS and type(None) in members:
        return None
    if value is _FLAG:  # an entry of a mapping: `--chat_template_kwargs.flag`
        value = _Plain("true")
    if isinstance(value, dict):
        return _coerce_mapping(value, members)
    if isinstance(value, list):
        return _coerce_list(value, members)
    return _coerce_text(value, members)


def _coerce_mapping(value: dict[str, Any], members: tuple[Any, ...]) -> Any:
    if Any in members:
        return {key: _coerce(item, Any) for key, item in value.items()}
    for member in members:
        if _is_mapping(member):
            arguments = get_args(member)
            return {key: _coerce(item, arguments[1] if arguments else Any) for key, item in value.items()}
    raise _Mismatch


def _coerce_list(value: list[Any], members: tuple[Any, ...]) -> Any:
    if Any in members:
        return [_coerce(item, Any) for item in value]
    for member in members:
        if _is_list(member):
            arguments = get_args(member)
            return [_coerce(item, arguments[0] if arguments else Any) for item in value]
    raise _Mismatch


def _coerce_text(value: str, members: tuple[Any, ...]) -> Any:
    text = str(value).strip(" \t\r\n") if isinstance(value, _Plain) else str(value)
    takes_text = str in members
    if isinstance(value, _Plain) and text[:1] in ("{", "["):
        wanted = _is_mapping if text[0] == "{" else _is_list
        if any(wanted(member) for member in members):
            node = _compose(text, "command line")
            if node is not None:
                return _coerce(_from_node(node, "command line"), Union[members])  # noqa: UP007 (built at run time)
    if Any in members:
        return _resolve(text) if isinstance(value, _Plain) else text
    if bool in members or any(get_origin(member) is Literal for member in members):
        lowered = text.lower()
        # Beside text ("no" may be a value of its own) only true and false are truth values.
        if lowered in ("true", *(() if takes_text else ("yes", "on", "1"))):
            return True
        if lowered in ("false", *(() if takes_text else ("no", "off", "0"))):
            return False
    if int in members:
        number = _number(text)
        if (
            number is not None
            and float(number).is_integer()
            and not (float in members and isinstance(number, float))
        ):
            return int(number)
        if number is not None and float not in members:
            raise _Mismatch("not a whole number")
    if float in members:
        number = _number(text)
        if number is not None:
            return float(number)
    for member in members:
        if isinstance(member, type) and issubclass(member, Enum):
            values = [str(item.value) for item in member]
            if text in values:
                return text
            near = [value for value in values if value.startswith(text)]
            near = near or difflib.get_close_matches(text, values, n=1)
            raise _Mismatch(f"did you mean {near[0]!r}?" if near else f"one of {', '.join(values)}")
    if takes_text:
        return text
    for member in members:
        if get_origin(member) is list:
            return [_coerce(value, get_args(member)[0])]
    raise _Mismatch


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


def _is_list(hint: Any) -> bool:
    return (get_origin(hint) or hint) in (list,)


def _is_mapping(hint: Any) -> bool:
    return hint is Any or hint is dict or get_origin(hint) is dict


def _describe(hint: Any) -> str:
    members, words = _members(hint), []
    if int in members:
        words.append("a whole number")
    if float in members:
        words.append("a number")
    if bool in members:
        words.append("true or false")
    for member in members:
        if isinstance(member, type) and issubclass(member, Enum):
            words.append("a name that transformers knows")
    if str in members and not any(isinstance(m, type) and issubclass(m, Enum) for m in members):
        words.append("text")
    if any(_is_list(member) for member in members):
        words.append("a list")
    if any(_is_mapping(member) for member in members):
        words.append("a mapping")
    if type(None) in members:
        words.append("null")
    return " or ".join(words) or "something that cannot be written in a recipe; remove it"


def _show(value: Any) -> str:
    def bare(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: bare(entry) for key, entry in item.items()}
        if isinstance(item, list):
            return [bare(entry) for entry in item]
        return str(item) if isinstance(item, str) else item

    text = repr(bare(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _plain_value(value: Any) -> Any:
    """``value`` as YAML can hold it, or ``_NOT_PLAIN`` for objects that only live in memory."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_plain_value(item) for item in value]
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in items) else items
    if isinstance(value, dict):
        entries = {str(key): _plain_value(item) for key, item in value.items()}
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in entries.values()) else entries
    return _NOT_PLAIN


# -------------------------------------------------------------------------------------------------------------- checks


def _refuse_secret_key(key: str, place: str) -> None:
    if is_secret_name(key):
        raise ConfigError(
            f"{place}: `{key}` must not stand in a recipe or on a command line, where others can read it. Remove it "
            "and set the environment variable instead: HF_TOKEN for the Hub (or run `hf auth login`), WANDB_API_KEY "
            "for Weights & Biases."
        )


def refuse_secret_value(key: str, value: Any, place: str) -> None:
    """Refuses a value that looks like a token or a password, wherever it stands in lists and mappings.

    Raises:
        ConfigError: It does; the message does not repeat it.
    """
    if isinstance(value, Mapping):
        items: Iterable[Any] = value.values()
    elif isinstance(value, list):
        items = value
    else:
        if isinstance(value, str) and REDACTED in redact_text(value):
            raise ConfigError(
                f"{place}: the value of `{key}` looks like a token or a password. Remove it and set the environment "
                "variable instead (HF_TOKEN for the Hub, WANDB_API_KEY for Weights & Biases)."
            )
        return
    for item in items:
        refuse_secret_value(key, item, place)


def _require_known(key: str, known: Mapping[str, RecipeField], place: str) -> None:
    if key in known:
        return
    _refuse_secret_key(key, place)
    base = key.partition(".")[0]
    if base in known and "." in key:
        raise ConfigError(
            f"{place}: `{key}` is not a key. In a recipe write the mapping out (`{base}:` and an indented "
            f"`{key.partition('.')[2]}:`); `--{key} value` works on the command line."
        )
    renamed = {
        "warmup_ratio": "`warmup_steps`: a value below 1 is a ratio",
        "torch_dtype": "`dtype`",
        "lambda": "`retain_weight`",
        "model": "`model_name_or_path`",
        "adapter": "`adapter_name_or_path`",
        "data": "`dataset`",
        "dataset_name": "`dataset`",
        "dataset_train_split": "`dataset_split`",
        "lr": "`learning_rate`",
        "lora_rank": "`lora_r`",
        "cutoff_len": "`max_length`",
        "pref_beta": "`beta`",
    }
    if key in renamed:
        raise ConfigError(f"{place}: `{key}` is not a key of a recipe; use {renamed[key]}.")
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    close = difflib.SequenceMatcher(None, key, near[0]).ratio() >= 0.6
    raise ConfigError(
        f"{place}: `{key}` is not a key of a recipe; "
        + (
            f"did you mean `{near[0]}`?"
            if close
            else f"the nearest is `{near[0]}`. All keys are in docs/recipes.md."
        )
    )


def _build(given: dict[str, Any], source: Path, places: Mapping[str, str]) -> Recipe:
    known = recipe_fields()
    parts: dict[type, dict[str, Any]] = {ModelSettings: {}, DataSettings: {}, MPOConfig: {}}
    for key, value in given.items():
        parts[known[key].owner][key] = value.copy() if isinstance(value, (dict, list)) else value
    unavailable = _set_aside_unavailable(parts[MPOConfig])
    built: dict[type, Any] = {}
    for owner, values in parts.items():
        try:
            built[owner] = owner(**values)
        except MPOError as error:
            raise type(error)(f"{source}: {error}") from None
        except ImportError as error:  # transformers imports DeepSpeed as soon as a configuration names it
            needed = "deepspeed" if "deepspeed" in str(error) else str(error.name or "")
            raise DependencyError(
                f"{source}: a setting needs a package that is not installed: {error} Install it with "
                f"`pip install {needed or 'the package named above'}`."
            ) from None
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(f"{source}: {str(error).lstrip('-')}") from None
    recipe = Recipe(built[ModelSettings], built[DataSettings], built[MPOConfig], source, given, unavailable)
    _check_together(recipe, places)
    _resolve_paths(recipe)
    return recipe


def _set_aside_unavailable(training: dict[str, Any]) -> list[str]:
    """Takes out settings that ``TrainingArguments`` refuses on this machine, so that a plan can still be made here."""
    if training.get("use_cpu"):
        return []
    unavailable = []
    cuda = torch.cuda.is_available()
    if training.get("bf16") and not (cuda and torch.cuda.is_bf16_supported()) and not _other_accelerator():
        training["bf16"] = False
        unavailable.append("`bf16` is on, but this machine has no accelerator with bf16")
    if training.get("fp16") and not cuda and not _other_accelerator():
        training["fp16"] = False
        unavailable.append("`fp16` is on, but this machine has no accelerator")
    if training.get("tf32") and not cuda:
        training["tf32"] = None
        unavailable.append("`tf32` is on, but this machine has no CUDA GPU")
    return unavailable


def _other_accelerator() -> bool:
    return any(hasattr(torch, kind) and getattr(torch, kind).is_available() for kind in ("xpu", "npu"))


def _check_together(recipe: Recipe, places: Mapping[str, str]) -> None:
    model, data, training, given = recipe.model, recipe.data, recipe.training, recipe.given

    def refuse(key: str, text: str) -> typing.NoReturn:
        raise ConfigError(f"{places.get(key, recipe.source_path)}: {text}")

    if model.model_name_or_path is None:
        raise ConfigError(
            f"{recipe.source_path}: no model; set `model_name_or_path` to a folder or a name on the Hub, in the recipe "
            "or with `--model_name_or_path`."
        )
    if not data.dataset:
        raise ConfigError(
            f"{recipe.source_path}: no data; set `dataset` to a file of pairs or a name on the Hub, in the recipe or "
            "with `--dataset`."
        )
    for key, value in given.items():
        belongs_to_adapter = key.startswith("lora_") or key in ("use_dora", "use_rslora", "init_lora_weights")
        if belongs_to_adapter and value and not model.trains_adapter and "use_peft" not in given:
            refuse(
                key, f"`{key}` is set, but no adapter is trained. Set `use_peft: true`, or remove `{key}`."
            )
    if model.lora_r < 1 and model.use_peft:
        refuse("lora_r", f"`lora_r` is {model.lora_r}; expected a rank of at least 1.")
    if model.lora_task_type != "CAUSAL_LM":
        refuse(
            "lora_task_type", f"`lora_task_type` is {model.lora_task_type!r}; MPO trains `CAUSAL_LM` models."
        )
    if model.use_peft and model.lora_dropout > 0 and training.disable_dropout:
        refuse(
            "lora_dropout",
            f"`lora_dropout` is {model.lora_dropout}, but `disable_dropout` is on (the default) and silences it. "
            "Set `disable_dropout: false`, or `lora_dropout: 0`.",
        )
    if (model.load_in_4bit or model.load_in_8bit) and not model.trains_adapter:
        key = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
        refuse(
            key,
            f"`{key}` works with an adapter only: quantised weights cannot be trained. Set `use_peft: true`.",
        )
    if data.eval_dataset is not None and given.get("held_out"):
        refuse(
            "held_out",
            "`held_out` and `eval_dataset` are both set; measure either on a part of `dataset` or on another "
            "data set. Remove one of them.",
        )
    if data.languages and training.source_language in data.languages:
        refuse(
            "languages",
            f"`languages` holds {training.source_language!r}, which is the source language; it names target languages "
            "only. Remove it there, or change `source_language`.",
        )
    measures = data.eval_dataset is not None or data.held_out > 0
    if str(getattr(training.eval_strategy, "value", training.eval_strategy)) != "no" and not measures:
        refuse(
            "eval_strategy",
            "`eval_strategy` is set, but nothing is held out; set `held_out` or `eval_dataset`.",
        )
    own = {
        "dtype": "dtype",
        "torch_dtype": "dtype",
        "revision": "model_revision",
        "attn_implementation": "attn_implementation",
        "trust_remote_code": "trust_remote_code",
        "quantization_config": "load_in_4bit",
    }
    for key in training.model_init_kwargs or {}:
        if key in own:
            refuse(
                "model_init_kwargs",
                f"`model_init_kwargs.{key}` has a key of its own; set `{own[key]}` instead.",
            )
        if key in ("use_safetensors", "weights_only"):
            refuse(
                "model_init_kwargs",
                f"`model_init_kwargs.{key}` cannot be changed: weights load from safetensors.",
            )


def _resolve_paths(recipe: Recipe) -> None:
    def resolved(value: str) -> str:
        path = Path(value).expanduser()
        if not path.is_absolute() and not path.exists():
            beside = recipe.source_path.parent / path
            if beside.exists():
                return str(beside)
        return str(path) if path.exists() else value

    data, model = recipe.data, recipe.model
    for key in ("dataset", "eval_dataset"):
        value = getattr(data, key)
        if value is not None:
            setattr(
                data, key, resolved(value) if isinstance(value, str) else [resolved(item) for item in value]
            )
    for key in ("model_name_or_path", "adapter_name_or_path", "reference_model_name_or_path"):
        value = getattr(model, key)
        if value is not None:
            setattr(model, key, resolved(value))
