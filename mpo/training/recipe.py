"""A recipe: one flat YAML that describes a training run, and the ``--key value`` overrides of its keys.

The keys of a recipe are the fields of three dataclasses: :class:`ModelSettings` (``trl.ModelConfig``),
:class:`DataSettings` and :class:`~mpo.training.config.MPOConfig`. No key means two things, so none needs a section.
:mod:`mpo.common.typed_yaml` reads it, with the names and paths that :mod:`mpo.training.recipe_keys` adds.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from trl import ModelConfig

from mpo.common.checks import is_at_least_0
from mpo.common.redaction import is_secret_name
from mpo.common.typed_yaml import Document, Key, keys_of
from mpo.errors import ConfigError, DependencyError, MPOError
from mpo.training.config import MPOConfig
from mpo.training.recipe_keys import read_recipe

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
LORA_INITS = ("gaussian", "orthogonal")
_NOT_PLAIN = object()


@dataclass
class ModelSettings(ModelConfig):
    r"""The model to align: ``trl.ModelConfig`` with MPO's defaults, and what it has no field for.

    Args:
        dtype (`str`, *optional*):
            Type of the loaded weights. Unset: `bfloat16` (or `float16`) for the frozen base under an adapter in mixed
            precision, `float32` for everything else: full fine-tuning needs float32 master weights, or its updates
            vanish.
        lora_target_modules (`list[str]`, *optional*, defaults to `"all-linear"`):
            Modules that get an adapter. `all-linear` is every linear layer but the output head.
        lora_first_layer (`float`, *optional*, defaults to `0`):
            First layer that gets an adapter: its number, counted from 0, or below 1 a share of the model's layers. What is
            below stays as it is, and nothing is computed backward through it.
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
    lora_first_layer: float = field(
        default=0, metadata={"help": "First layer that gets an adapter; below 1, a share of the layers."}
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
    r"""The pairs to train on, and those held out.

    Args:
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
        held_out_measurements (`int`, *optional*):
            How often the held-out pairs are measured within the run, for its curve; before and after it they are in any
            case. Unset: up to 4 times, as often as takes no more than about 5 % of the run. `eval_strategy` sets it instead.
        limit (`int`, *optional*):
            Keep the first so many sources.
        languages (`list[str]`, *optional*):
            Keep only these target languages (ISO 639-1 codes).
        drop_untranslated (`bool`, *optional*, defaults to `False`):
            Leave out target pairs whose chosen response is the source's own text.
        leak_against (`list[str]`, *optional*):
            Prompt sets to look for in the training data, besides the probe set: files, or names that
            `mpo data leak --against` takes.
    """

    dataset: str | list[str] | None = field(default=None, metadata={"help": "Training pairs."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    eval_dataset: str | list[str] | None = field(default=None, metadata={"help": "Pairs to measure on."})
    held_out: float | int = field(default=0.1, metadata={"help": "Sources kept out of training."})
    held_out_seed: int = field(default=0, metadata={"help": "Seed of the held-out split."})
    held_out_measurements: int | None = field(
        default=None,
        metadata={"help": "Measurements of the held-out pairs within the run; unset: up to 4, where cheap."},
    )
    limit: int | None = field(default=None, metadata={"help": "Keep the first so many sources."})
    languages: list[str] | None = field(default=None, metadata={"help": "Target languages to keep."})
    drop_untranslated: bool = field(
        default=False, metadata={"help": "Leave out pairs whose chosen response is the source's text."}
    )
    leak_against: list[str] | None = field(
        default=None, metadata={"help": "Prompt sets to look for in the training data."}
    )

    def __post_init__(self) -> None:
        fraction = isinstance(self.held_out, float)
        if self.held_out < 0 or (fraction and self.held_out >= 1):
            raise ConfigError(
                f"`held_out` is {self.held_out}; expected a fraction of the sources from 0 to below 1, or a whole "
                "number of sources."
            )
        if self.held_out_measurements is not None and self.held_out_measurements < 0:
            raise ConfigError(
                f"`held_out_measurements` is {self.held_out_measurements}; expected 0 for none within the run, or a number."
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
        as_built: All settings right after loading, as YAML can hold them.
    """

    model: ModelSettings
    data: DataSettings
    training: MPOConfig
    source_path: Path
    given: dict[str, Any]
    unavailable: list[str] = field(default_factory=list)
    overrides: tuple[str, ...] = ()
    as_built: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.as_built = self.as_built or _plain_settings(self)

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
        """Everything that was given plus everything that was changed since; never a token."""
        resolved = {key: _plain_value(value) for key, value in self.given.items()}
        resolved["output_dir"] = str(self.training.output_dir)
        # bf16 depends on the machine unless it is set, so a resolved recipe always says which it was.
        resolved.setdefault("bf16", bool(self.training.bf16))
        for name, value in _plain_settings(self).items():
            # A run fills in `model_init_kwargs` itself, from settings of their own.
            if name not in resolved and value != self.as_built.get(name) and name != "model_init_kwargs":
                resolved[name] = value
        return resolved

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; :func:`load_recipe` reads it back to the same settings."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)


_OWNERS: tuple[type, ...] = (ModelSettings, DataSettings, MPOConfig)


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
    document = read_recipe(path, overrides)
    document.default("output_dir", f"runs/{document.path.stem}")
    given = document.values(recipe_fields())
    parts = [{name: copy.copy(given[name]) for name in keys_of(owner) if name in given} for owner in _OWNERS]
    unavailable = _set_aside_unavailable(parts[-1])
    model, data, training = (
        _built(owner, part, document) for owner, part in zip(_OWNERS, parts, strict=True)
    )
    document.check()
    recipe = Recipe(model, data, training, document.path, given, unavailable, tuple(overrides))
    _check_together(recipe, document)
    document.check()
    return recipe


def recipe_fields() -> dict[str, Key]:
    """All keys a recipe may have, by name."""
    return {name: key for owner in _OWNERS for name, key in keys_of(owner).items()}


def settings_in_effect(recipe: Recipe) -> dict[str, Any]:
    """Every setting that has a value YAML can hold, defaults included; never a token."""
    return {name: value for name, value in _plain_settings(recipe).items() if value is not None}


def _plain_settings(recipe: Recipe) -> dict[str, Any]:
    parts: tuple[Any, ...] = (recipe.model, recipe.data, recipe.training)
    settings = {
        option.name: _plain_value(getattr(part, option.name)) for part in parts for option in fields(part)
    }
    return {n: value for n, value in settings.items() if value is not _NOT_PLAIN and not is_secret_name(n)}


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


def _built(owner: Any, values: dict[str, Any], document: Document) -> Any:
    """The dataclass ``owner``; what it refuses is a mistake of the document."""
    try:
        return owner(**values)
    except DependencyError as error:
        raise DependencyError(f"{document.path}: {error}") from None
    except ImportError as error:  # transformers imports DeepSpeed as soon as a configuration names it
        needed = "deepspeed" if "deepspeed" in str(error) else str(error.name or "")
        raise DependencyError(
            f"{document.path}: a setting needs a package that is not installed: {error} Install it with "
            f"`pip install {needed or 'the package named above'}`."
        ) from None
    except (MPOError, ValueError, TypeError, OSError) as error:
        document.refused(error)
        return None


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


def _check_together(recipe: Recipe, document: Document) -> None:
    """Keeps what is wrong with settings that are right each for itself."""
    model, data, training, given = recipe.model, recipe.data, recipe.training, recipe.given

    def refuse(key: str, text: str) -> None:
        document.wrong(document.place(key), text)

    if model.model_name_or_path is None:
        refuse(
            "model_name_or_path",
            "no model; set `model_name_or_path` to a folder or a name on the Hub, in the recipe or with "
            "`--model_name_or_path`.",
        )
    if not data.dataset:
        refuse(
            "dataset",
            "no data; set `dataset` to a file of pairs or a name on the Hub, in the recipe or with `--dataset`.",
        )
    for key, value in given.items():
        belongs_to_adapter = key.startswith("lora_") or key in ("use_dora", "use_rslora", "init_lora_weights")
        if belongs_to_adapter and value and not model.trains_adapter and "use_peft" not in given:
            refuse(
                key, f"`{key}` is set, but no adapter is trained. Set `use_peft: true`, or remove `{key}`."
            )
    if model.lora_r < 1 and model.use_peft:
        refuse("lora_r", f"`lora_r` is {model.lora_r}; expected a rank of at least 1.")
    first = model.lora_first_layer
    if not is_at_least_0(first) or (first >= 1 and first != int(first)):
        refuse(
            "lora_first_layer",
            f"`lora_first_layer` is {first!r}; expected a layer's number, counted from 0, or below 1 a share of the layers.",
        )
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
    evaluates = str(getattr(training.eval_strategy, "value", training.eval_strategy)) != "no"
    for key, is_set in (
        ("eval_strategy", evaluates),
        ("held_out_measurements", bool(data.held_out_measurements)),
    ):
        if is_set and not measures:
            refuse(key, f"`{key}` is set, but nothing is held out; set `held_out` or `eval_dataset`.")
    if evaluates and data.held_out_measurements:
        refuse(
            "held_out_measurements",
            "`held_out_measurements` and `eval_strategy` both say when the held-out pairs are measured. Remove one of them.",
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
