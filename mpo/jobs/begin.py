"""``mpo init``: from a model, data and a machine to a recipe that has been checked."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpo.common.characters import printable
from mpo.common.files import write_text
from mpo.common.recipe_files import PackagedRecipe, packaged_recipe, packaged_recipes
from mpo.common.words import listed, show_name
from mpo.errors import ConfigError, MPOError, StorageError, advised
from mpo.jobs.demo import DEFAULT_FOLDER, prepare_demo_model

if TYPE_CHECKING:
    from datasets import Dataset

    from mpo.jobs.fit import Machine

_FAMILIES = ("gemma", "qwen", "llama")  # each has a recipe of its name for groups of both kinds
_HARMFUL_ALONE = "_mpo"  # and another for pairs of harmful prompts alone
_WIDTH, _RATE = 4096, 2.0e-5  # hidden size and learning rate of the latter

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class Beginning:
    """What the user wants; None for what is to be asked or found out.

    Attributes:
        model: Folder or Hub name.
        data: File of pairs, or a name on the Hub.
        out: File of the recipe.
        template: The recipe of the package to begin with; by default one of the model's family, by the kinds of prompts in the data.
        source_language: Of the pairs.
        gpus: Number of GPUs; 0 for a CPU.
        gpu_memory: GB of each.
        yes: Ask nothing.
        force: Replace a file that is there.
    """

    model: str | None = None
    data: str | None = None
    out: str | None = None
    template: str | None = None
    source_language: str | None = None
    gpus: int | None = None
    gpu_memory: float | None = None
    yes: bool = False
    force: bool = False


def begin(wanted: Beginning, *, ask: Callable[[str], str] | None = None) -> Path:
    """Asks for what is missing, writes a recipe, plans it for the machine, checks it, and says how to run it.

    Args:
        wanted: What is known already.
        ask: Puts a question and returns the answer; None where nobody can be asked.

    Returns:
        The recipe.

    Raises:
        ConfigError: Something is missing and nobody can be asked.
        StorageError: The recipe is there already.
        MPOError: Model or data cannot be used; the recipe is kept.
    """
    model, data = _answers(wanted, None if wanted.yes else ask)
    name = re.sub(r"[^\w.-]+", "-", Path(model.rstrip("/")).name.lower()).strip("-.") or "model"
    out = Path(wanted.out or f"{name}.yaml")
    if out.suffix not in (".yaml", ".yml"):
        out = out.with_name(out.name + ".yaml")
    if _CONTROL.search(str(out)):
        raise ConfigError(
            f"--out: {show_name(str(out))} holds a line break or another control character. Choose another name."
        )
    if out.exists() and not wanted.force:
        raise StorageError(
            f"{out} is there already, and is kept. Choose another name with --out, or replace it with --force."
        )
    of_demo = model == str(DEFAULT_FOLDER) and Path(data).parts[-2:] == ("demo", "pairs.jsonl")
    tries = of_demo and wanted.template is None
    groups = _groups(data)
    template = _template("demo" if tries else wanted.template, model, groups)
    machine = _machine(wanted)
    values = {
        "model_name_or_path": model,
        "dataset": data,
        "source_language": wanted.source_language or _source_language(groups),
        "bf16": "true" if _has_bf16(machine) else "false",
        "output_dir": f"runs/{name}",
        **({} if tries or template.name in _FAMILIES else _learning_rate(model)),
    }
    comments = {
        "source_language": "language that the prompts are translated from",
        "dataset": "groups of both kinds: harmful prompts with a refusal, harmless ones with an answer",
    }
    if template.name not in _FAMILIES:
        comments = {
            "source_language": "language of the source pairs, whose gap the others are pulled to",
            "dataset": "pairs: a prompt with a safe and an unsafe answer, and its translations",
        }
    opening = _opening(template.name, out, machine)
    text = filled(template.path.read_text(encoding="utf-8"), values, comments, opening)
    write_text(out, text)
    print(f"Written: {out}, from the recipe {template.name}. Its lines say what they do.\n", flush=True)
    if wanted.template is None and template.name.endswith(_HARMFUL_ALONE):
        family = template.name.removesuffix(_HARMFUL_ALONE)
        print(
            (
                "These pairs were not looked at. If some of their prompts are harmless, begin with "
                if groups is None
                else "All prompts of these pairs are harmless: nothing in them teaches to refuse. For groups of both kinds, which `mpo data "
                "build` makes, there is "
                if not _counts(groups)["harmful"]
                else "No prompt of these pairs is known as harmless, and a model that is trained on harmful ones alone comes to "
                "refuse harmless ones, too; the run will measure it. For groups of both kinds, which `mpo data build` makes, there is "
            )
            + f"--template {family}.\n",
            flush=True,
        )
    command = f"mpo train {shlex.quote(str(out))}"
    try:
        if machine is not None:
            command = _plan(out, text, machine) or command
        _dry_run(out)
    except MPOError as error:
        raise advised(
            error,
            f"{out} is kept. Once that is mended, check it again with:\n  mpo train {shlex.quote(str(out))} --dry_run",
        ) from error
    print(f"\nNext:\n  {command}")
    return out


def filled(
    recipe: str,
    values: Mapping[str, str],
    comments: Mapping[str, str] | None = None,
    opening: str | None = None,
) -> str:
    """A recipe's text with other values, its comments kept.

    Args:
        recipe: The text.
        values: Value by key. A key that is commented out is set there; one that is not there is added at the end.
        comments: What is said of a key in place of what the recipe says.
        opening: Takes the place of the comment at the top.
    """
    if opening is not None:
        recipe = re.sub(r"\A(#.*\n)+", lambda _: opening, recipe)
    for key, value in values.items():
        written = _quoted(value)
        setting = f"{key}: {written}"
        found = re.search(
            rf"^(?:# )?{key}:[^#\n]*?(?P<said>[ \t]+#.*(?:\n[ \t]+#.*)*)?$", recipe, re.MULTILINE
        )
        if found is None:
            recipe = f"{recipe.rstrip()}\n{setting}\n"
            continue
        before = found["said"] or ""
        said = before.lstrip(" \t")
        column = found.start("said") - found.start() + len(before) - len(said)
        if comments and key in comments:
            said = f"# {comments[key]}"
        line = f"{setting.ljust(column - 2)}  {said}" if said else setting  # where the comment was
        recipe = recipe[: found.start()] + line + recipe[found.end() :]
    return recipe


def _quoted(value: str) -> str:
    """A text as YAML reads it back."""
    if _CONTROL.search(value):
        return json.dumps(value)
    return value if re.fullmatch(r"[\w./+-]+", value) else "'" + value.replace("'", "''") + "'"


# ----------------------------------------------------------------------------------------------------------- what is asked


def _answers(wanted: Beginning, ask: Callable[[str], str] | None) -> tuple[str, str]:
    """Model and data, given or asked for.

    Raises:
        ConfigError: One is missing, or cannot be used, and nobody can be asked.
    """
    questions: dict[str, tuple[str | None, str, Callable[[str], str]]] = {
        "--model": (
            wanted.model,
            "Model (a folder, or a name on the Hub such as Qwen/Qwen2.5-7B-Instruct; demo for a small one): ",
            _model,
        ),
        "--data": (wanted.data, "Pairs (a file, or a name on the Hub; demo for 36 mild ones): ", _data),
    }
    missing = [option for option, (given, _, _) in questions.items() if given is None]
    if missing and ask is None:
        raise ConfigError(
            f"Nobody can be asked here: give {listed(missing)}. For a try: mpo init --model demo --data demo"
        )
    found = []
    for given, question, check in questions.values():
        while True:
            try:
                answer = given if given is not None or ask is None else ask(question)
                found.append(check((answer or "").strip()))
                break
            except EOFError:
                raise ConfigError("Nobody answers: give --model and --data.") from None
            except MPOError as error:
                if given is not None:
                    raise
                print(printable(str(error)))
    return found[0], found[1]


def _model(name: str) -> str:
    folder = Path(name)
    if name == "demo" and not folder.exists():
        from mpo.common.progress import quiet_libraries

        quiet_libraries()
        print(f"The demo's model, of 135 million parameters, goes to {DEFAULT_FOLDER}.", flush=True)
        return str(prepare_demo_model(DEFAULT_FOLDER))
    if not name:
        raise ConfigError("A model is needed: a folder, or its name on the Hub (org/model).")
    if folder.is_file():
        raise ConfigError(
            f"{show_name(name)} is a file; expected a model's folder, or a name on the Hub (org/model)."
        )
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{name} holds an adapter; name its base model, and set `adapter_name_or_path: {name}` in the recipe to go on "
            "training it."
        )
    return name


def _data(name: str) -> str:
    from mpo.data.reading import looks_like_path, missing_file_error

    if name == "demo" and not os.path.exists(name):
        demo = packaged_recipe("demo")
        if demo is None:
            raise ConfigError("The demo's pairs are not in this installation; name a file of pairs.")
        file = demo.path.parent / "demo" / "pairs.jsonl"
        near = os.path.relpath(file)
        return str(file) if near.startswith(os.pardir) else near
    if not name:
        raise ConfigError(
            "Pairs are needed: a file, or the name of a dataset on the Hub. docs/data.md says how they look."
        )
    if os.path.isdir(name):
        raise ConfigError(f"{show_name(name)} is a folder; name the file of pairs in it.")
    if not os.path.isfile(name) and looks_like_path(name):
        raise missing_file_error(Path(name))
    return name


# --------------------------------------------------------------------------------------------------------- what is found out


def _template(name: str | None, model: str, groups: Dataset | None) -> PackagedRecipe:
    if name is None:
        told = f"{_configured(model).get('model_type', '')} {model}".lower()
        name = min((family for family in _FAMILIES if family in told), key=told.index, default="llama")
        if groups is None or not all(_counts(groups).values()):
            name += _HARMFUL_ALONE
    recipe = packaged_recipe(name)
    if recipe is None or "/" in recipe.name:
        names = [recipe.name for recipe in packaged_recipes() if "/" not in recipe.name]
        raise ConfigError(
            f"There is no training recipe {show_name(name)} in the package; expected one of {', '.join(names) or 'none'}."
        )
    return recipe


def _counts(groups: Dataset) -> dict[str, int]:
    """Number of groups of each kind."""
    from mpo.data.loading import count_kinds

    return count_kinds(groups)


def _machine(wanted: Beginning) -> Machine | None:
    """The GPUs; None for a CPU."""
    from mpo.common.machine import accelerators
    from mpo.jobs.fit import machine_or_this

    here = any(device.memory is not None for device in accelerators())
    if wanted.gpus == 0 or (wanted.gpus is None and wanted.gpu_memory is None and not here):
        return None
    gpus = wanted.gpus or (None if here else 1)
    return machine_or_this(gpus, wanted.gpu_memory, 8)


def _has_bf16(machine: Machine | None) -> bool:
    """Whether it computes in bfloat16; a machine that is not this one is taken to."""
    from mpo.common.machine import accelerators

    return machine is not None and all(device.bf16 for device in accelerators())


def _groups(data: str) -> Dataset | None:
    """The good groups of a file; None where it cannot be read, which the check of the recipe then says, or is on the Hub."""
    from mpo.data import load_groups

    try:
        return load_groups(data, bad_rows="drop").groups if os.path.isfile(data) else None
    except MPOError:
        return None


def _source_language(groups: Dataset | None) -> str:
    """The language of most of the first sources; English where that cannot be found out yet."""
    from mpo.data import detect_language

    if groups is None:
        return "en"
    try:
        first = groups.select(range(min(20, len(groups))))
        texts = [group["source"]["chosen"][-1]["content"] for group in first]
        labels = Counter(str(group["source"]["language"]) for group in first)
        found = Counter(map(detect_language, texts)) if {*labels} == {"en"} else labels
        return found.most_common(1)[0][0]
    except (MPOError, LookupError, TypeError):
        return "en"


def _configured(model: str) -> dict[str, Any]:
    """What ``config.json`` of a model in a folder holds; empty where there is none."""
    try:
        found = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _learning_rate(model: str) -> dict[str, str]:
    """For a model in a folder that is narrower than those of the recipes: their rate, scaled by its width."""
    config = _configured(model)
    try:
        width = int((config.get("text_config") or config)["hidden_size"])
    except (ValueError, TypeError, LookupError, AttributeError):
        return {}
    rate = f"{_RATE * _WIDTH / width:.1e}".replace("e-0", "e-")
    return {"learning_rate": rate} if 0 < width < _WIDTH / 2 else {}


def _opening(template: str, out: Path, machine: Machine | None) -> str:
    words = shlex.quote(str(out))
    where = "a CPU" if machine is None else str(machine)
    commands = {
        f"mpo train {words} --dry_run": "checks everything but the weights",
        f"mpo train {words}": "on one device",
        f"accelerate launch -m mpo.cli train {words}": "on every GPU of this machine",
    }
    width = max(map(len, commands))
    lines = [f"#   {command.ljust(width)}   {what}" for command, what in commands.items()]
    return "\n".join([f"# Made by `mpo init` from the recipe {template}, for {where}.", "#", *lines, ""])


# ---------------------------------------------------------------------------------------------------------------- the checks


def _plan(out: Path, text: str, machine: Machine) -> str | None:
    """Prints the plan of a recipe, with its base model quantised where that saves it from waiting in main memory.

    Returns:
        The command that launches it on several GPUs; None for one.
    """
    from mpo.common.progress import quiet_libraries
    from mpo.jobs.fit import Assumptions, planned
    from mpo.training.recipe import load_recipe

    quiet_libraries()
    plan = planned(load_recipe(out), machine, Assumptions())
    if plan.choice is None or plan.choice.memory.main_memory:
        write_text(out, filled(text, {"load_in_4bit": "true"}))
        smaller = planned(load_recipe(out), machine, Assumptions())
        if smaller.choice is not None and not smaller.choice.memory.main_memory:
            plan = smaller
            print("`load_in_4bit: true` is set in it: the whole model does not fit.\n")
        else:
            write_text(out, text)
    print(plan.text, flush=True)
    return plan.launch if machine.gpus > 1 else None


def _dry_run(recipe: Path) -> None:
    from mpo.jobs.train import train
    from mpo.training.recipe import load_recipe

    print(flush=True)
    train(load_recipe(recipe), dry_run=True)
