"""The keys of a training recipe, and how a recipe is refused for a wrong one before torch is imported.

Most keys are fields of ``trl.DPOConfig`` and ``transformers.TrainingArguments``, and importing these takes seconds. Their
names, types and choices are read from the source of the installed libraries instead. What cannot be known that way is left
to :func:`mpo.training.recipe.load_recipe`, which reads the recipe again with the dataclasses themselves.
"""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mpo.common.typed_yaml import UNKNOWN, Document, Key
from mpo.training.foreign_keys import TRANSLATED

_PATHS = frozenset(
    {
        "dataset",
        "eval_dataset",
        "leak_against",
        "model_name_or_path",
        "adapter_name_or_path",
        "reference_model_name_or_path",
        "chat_template",
    }
)
OWNERS = ("ModelSettings", "DataSettings", "MPOConfig")


def read_recipe(path: str | Path, overrides: Sequence[str]) -> Document:
    """A training recipe with the words of the command line over it; see :class:`~mpo.common.typed_yaml.Document`."""
    return Document(path, overrides, renamed=TRANSLATED, paths=_PATHS)


def check_keys(path: str | Path, overrides: Sequence[str] = ()) -> None:
    """Refuses a recipe with wrong keys or values of the wrong type, in a fraction of a second.

    Raises:
        ConfigError: The file cannot be read, a key is unknown, a value does not have its type, or a secret is among them.
    """
    document = read_recipe(path, overrides)
    keys = source_keys()
    if keys is not None:
        document.values(keys)


def source_keys() -> dict[str, Key] | None:
    """All keys of a recipe by name, as the source has them; None where there is no source to read."""
    try:
        return {name: key for owner in OWNERS for name, key in _keys(owner).items()}
    except (OSError, SyntaxError, ValueError, LookupError):
        return None


def _keys(owner: str) -> dict[str, Key]:
    """The fields of a class and of its bases.

    Raises:
        LookupError: There is no source of it.
    """
    module, class_ = source_of(owner)
    constants = constants_of(module)
    keys: dict[str, Key] = {}
    for base in reversed(class_.bases):
        keys.update(_keys(ast.unparse(base).rpartition(".")[2]))
    for statement in class_.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name, hint = statement.target.id, evaluated(statement.annotation, _TYPES)
            if typing.ClassVar not in (hint, typing.get_origin(hint)):
                known = UNKNOWN if isinstance(hint, str) else hint
                keys[name] = Key(name, known, choices_of(statement.value, constants))
    return keys


def source_of(name: str) -> tuple[ast.Module, ast.ClassDef]:
    """The source of a class of settings, with its module's.

    Raises:
        LookupError: There is none.
    """
    for path in _files():
        text = path.read_text(encoding="utf-8")
        if f"\nclass {name}(" in text or f"\nclass {name}:" in text:
            module = ast.parse(text)
            for statement in module.body:
                if isinstance(statement, ast.ClassDef) and statement.name == name:
                    return module, statement
    raise LookupError(name)


def constants_of(module: ast.Module) -> dict[str, Any]:
    """The names that a module gives values, by name; :data:`UNKNOWN` where a value is no literal."""
    return {
        statement.targets[0].id: evaluated(statement.value, {})
        for statement in module.body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }


def _files() -> Iterator[Path]:
    """Where the classes may be, the nearest first. A top-level package is found without being imported."""
    here = Path(__file__).parent
    yield from (here / "recipe.py", here / "config.py", here / "harmless.py", here / "probe_settings.py")
    for package, pattern in (("trl", "trainer/*_config.py"), ("transformers", "training_args.py")):
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            yield from sorted(Path(folder).glob(pattern))


_TYPES: Mapping[str, Any] = {
    **{kind.__name__: kind for kind in (str, int, float, bool, list, dict, tuple)},
    **{name: getattr(typing, name) for name in ("Any", "ClassVar", "Literal", "Optional", "Union")},
}


def evaluated(expression: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression of literals and ``names``; :data:`UNKNOWN` where it needs anything else."""
    try:
        return eval(compile(ast.Expression(expression), "<source>", "eval"), {"__builtins__": {}}, {**names})
    except Exception:
        return UNKNOWN


def choices_of(value: ast.expr | None, constants: Mapping[str, Any]) -> tuple[Any, ...]:
    """The ``choices`` in the metadata of a field; none where they cannot be known."""
    for node in ast.walk(value) if value is not None else ():
        for key, item in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
            if isinstance(key, ast.Constant) and key.value == "choices":
                found = evaluated(item, {**constants, "list": list})
                return () if found is UNKNOWN else tuple(found)
    return ()
