"""What each key of a recipe means: read, like :mod:`mpo.training.recipe_keys`, from the source, so that torch is not imported."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import replace

from mpo.common.key_help import KeyHelp, as_name, found_text, key_detail, key_lines, plain_text, written
from mpo.common.typed_yaml import UNKNOWN
from mpo.common.words import nearest, show_name
from mpo.errors import ConfigError
from mpo.training.foreign_keys import TRANSLATED
from mpo.training.recipe_keys import OWNERS, choices_of, constants_of, evaluated, source_of

_GROUPS = {
    "DataSettings": "the data",
    "ModelSettings": "the model",
    "MPOConfig": "the objective and the step",
    "HarmlessSettings": "harmless groups",
    "ProbeSettings": "the probe",
}
_OTHERS = "training, as in TRL and transformers"
_USUAL = [
    "output_dir",
    "learning_rate",
    "max_length",
    "gradient_accumulation_steps",
    "max_steps",
    "weight_decay",
    "optim",
    "seed",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "eval_strategy",
    "eval_steps",
    "report_to",
    "resume_from_checkpoint",
    "push_to_hub",
    "model_name_or_path",
    "attn_implementation",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "load_in_4bit",
    "use_liger_kernel",
]
_ENTRY = re.compile(r"^(?P<names>[a-z]\w*(?:, [a-z]\w*)*) ?(?:\((?P<type>.*)\))?:\s*$")


def explained_keys() -> dict[str, KeyHelp]:
    """All keys of a recipe by name, ours first.

    Raises:
        ConfigError: The source of the installed libraries cannot be read.
    """
    try:
        found: dict[str, KeyHelp] = {}
        for owner in OWNERS:
            found |= _keys(owner)
    except (OSError, SyntaxError, ValueError, LookupError):
        raise ConfigError(
            "The keys cannot be read from the source of the installed libraries; docs/recipes.md has them."
        ) from None
    order = [*_GROUPS.values(), _OTHERS]
    return dict(sorted(found.items(), key=lambda item: order.index(item[1].group)))


def keys_text(word: str | None = None, *, everything: bool = False) -> str:
    """One key explained, the keys that a word finds, or an overview.

    Args:
        word: A key, or a word of its name or explanation.
        everything: Show all keys in the overview.

    Raises:
        ConfigError: Nothing is found; the message names the nearest key.
    """
    keys = explained_keys()
    if word is None:
        return _overview(keys, everything)
    name = as_name(word)
    if name in keys:
        return key_detail(keys[name])
    if name in TRANSLATED:
        named = [keys[key] for key in re.findall(r"`(\w+)(?::[^`]*)?`", TRANSLATED[name]) if key in keys]
        details = "\n\n".join(map(key_detail, {key.name: key for key in named}.values()))
        return f"`{name}` is not a key of a recipe; {TRANSLATED[name]}.\n\n{details}".rstrip()
    if found := found_text(keys, word, "mpo keys"):
        return found
    near = nearest(name, keys)
    meant = f"Did you mean `{near}`?" if near else "`mpo keys --all` shows every key."
    raise ConfigError(f"No key of a recipe is called `{show_name(word)}` or speaks of it. {meant}")


def _overview(keys: Mapping[str, KeyHelp], everything: bool) -> str:
    parts = []
    for group in [*_GROUPS.values(), _OTHERS]:
        inside = [key for key in keys.values() if key.group == group]
        if group == _OTHERS and not everything:
            inside = [keys[name] for name in _USUAL if name in keys and keys[name].group == group]
        parts += [f"Keys of {group}\n{key_lines(inside)}"] if inside else []
    hidden = (
        0 if everything else sum(key.group == _OTHERS and key.name not in _USUAL for key in keys.values())
    )
    more = f"{hidden} more keys of TRL and transformers: mpo keys --all\n" if hidden else ""
    return "\n\n".join(
        [
            *parts,
            f"{more}One of them explained, or a word looked for: mpo keys WORD\nKeys of other recipes: mpo keys --of build (or suite, analysis, comparison)",
        ]
    )


# ------------------------------------------------------------------------------------------------------------ the source


def _keys(owner: str) -> dict[str, KeyHelp]:
    """The keys of a class and of its bases; what a class says of a key comes before what its bases say.

    Raises:
        LookupError: There is no source of it.
    """
    module, class_ = source_of(owner)
    constants = constants_of(module)
    keys: dict[str, KeyHelp] = {}
    for base in reversed(class_.bases):
        keys.update(_keys(ast.unparse(base).rpartition(".")[2]))
    described = dict(_described(ast.get_docstring(class_) or ""))
    for statement in class_.body:
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        name, type_ = statement.target.id, ast.unparse(statement.annotation)
        if name.startswith("_") or "ClassVar" in type_:
            continue
        before = keys[name].text if name in keys else ""
        own = _metadata_help(statement.value)
        text = described.get(name) or (own if owner in _GROUPS else before) or before or own
        keys[name] = KeyHelp(
            name,
            type_,
            _default(statement.value),
            choices_of(statement.value, constants),
            text or "It has no description.",
            _GROUPS.get(owner, _OTHERS),
        )
    for name, text in described.items():  # described anew, though the field is the base's
        if name in keys and owner in _GROUPS:
            keys[name] = replace(keys[name], text=text)
    return keys


def _described(docstring: str) -> Iterator[tuple[str, str]]:
    """Names and texts of the entries of a docstring in the style of transformers; several names may share an entry."""
    names: list[str] = []
    lines: list[str] = []
    indent = 0
    for line in [*docstring.splitlines(), "end"]:
        depth = len(line) - len(line.lstrip())
        if line.strip() and depth <= indent:
            text = textwrap.dedent("\n".join(lines)).strip()
            yield from ((name, plain_text(text)) for name in names if text)
            names, lines = [], []
        if (found := _ENTRY.match(line.strip())) and not names and depth:
            names, indent = found["names"].split(", "), depth
        elif names:
            lines.append(line)


def _metadata_help(value: ast.expr | None) -> str:
    for node in ast.walk(value) if value is not None else ():
        for key, item in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
            if isinstance(key, ast.Constant) and key.value == "help":
                text = evaluated(item, {})
                return "" if text is UNKNOWN else str(text)
    return ""


def _default(value: ast.expr | None) -> str:
    """The default as a recipe writes it; nothing where there is none."""
    if value is None:
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        factory = given.get("default_factory")
        if isinstance(factory, ast.Lambda):
            return _written(factory.body)
        return _written(given["default"]) if "default" in given else "{}" if factory is not None else ""
    return _written(value)


def _written(expression: ast.expr) -> str:
    value = evaluated(expression, {})
    return "chosen by transformers" if value is UNKNOWN else written(value)
