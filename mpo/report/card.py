"""The model card: what was trained, how, what it changed per language, and what that does not show."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mpo.common.citations import HIDDEN_SPACE_BIBTEX, MPO_BIBTEX
from mpo.common.files import write_bytes, write_text
from mpo.common.log import get_logger
from mpo.common.provenance import Provenance
from mpo.common.redaction import portable_path, redact, redact_text
from mpo.common.tables import escape_markdown
from mpo.common.typed_json import read_typed
from mpo.common.words import listed, with_arrows
from mpo.data.contract import HARMLESS
from mpo.data.languages import language_name
from mpo.data.leaks import counts_in_words
from mpo.errors import ConfigError, DataError, MPOError
from mpo.evaluation.probe.change import BehaviorChange
from mpo.evaluation.results import LEAKS, LeaksResult, TrainingMetrics
from mpo.evaluation.reward_gap import Change, Comparison, RewardGapTable, compare, sort_languages
from mpo.report.rendering import Raw, code, fence, markdown
from mpo.training.objectives import find_objective

_log = get_logger(__name__)

_OF_HARMLESS = {
    "harmless_loss_type": "Objective of harmless groups",
    "harmless_loss_weight": "Its weight",
    "harmless_retention": "Harmless prompts held by",
    "harmless_retain_weight": "Weight of that",
    "harmless_share": "Share of harmless groups in a step",
    "harmless_max_response_length": "Tokens of their responses",
}
_MPO = "*Multilingual reward gaP Optimization* (MPO)"
# Recipe keys worth a line of their own, in the order of the card.
_SETTINGS = {
    "loss_type": "Objective",
    "loss_weights": "Weights of the objectives",
    "train_on": "Trained on",
    "beta": "\N{GREEK SMALL LETTER BETA}, scale of the target gap",
    "retain_weight": "\N{GREEK SMALL LETTER LAMDA}, weight of the retention term",
    "retain_pooling": "Pooling of the retention term",
    "min_source_gap": "Least reference gap of a source",
    "language_weights": "Weights of the languages",
    **_OF_HARMLESS,
    "learning_rate": "Learning rate",
    "lr_scheduler_type": "Learning-rate schedule",
    "warmup_steps": "Warm-up (steps, or a ratio below 1)",
    "num_train_epochs": "Epochs",
    "max_steps": "Steps at most",
    "per_device_train_batch_size": "Groups per device",
    "gradient_accumulation_steps": "Gradient accumulation",
    "weight_decay": "Weight decay",
    "max_length": "Longest prompt and response (tokens)",
    "lora_r": "LoRA rank",
    "lora_alpha": "LoRA alpha",
    "lora_dropout": "LoRA dropout",
    "lora_target_modules": "LoRA modules",
    "lora_first_layer": "First layer with LoRA",
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA",
    "load_in_4bit": "Base in 4 bit",
    "dtype": "Type of the weights",
    "seed": "Seed",
}
# The adapter's own names of its settings.
_ADAPTER_SETTINGS = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}
_PICTURES = ("reward_gap.png", "training_curve.png", "overview.png", "behavior.png")
_FILES = ("recipe.yaml", "metrics.json", "provenance.json", LEAKS, *_PICTURES)


def write_card(
    folder: str | Path,
    *,
    base_model: str,
    peft: bool,
    languages: Sequence[str],
    source_language: str,
    before: RewardGapTable | None = None,
    after: RewardGapTable | None = None,
    comparison: Comparison | None = None,
    recipe_yaml: str = "",
    provenance: Mapping[str, Any] | None = None,
    dataset_name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    retention: tuple[float, float] | None = None,
    harmless: Comparison | None = None,
    behavior: BehaviorChange | None = None,
    finding: str | None = None,
    repository: str | None = None,
    merged_from: str | None = None,
    unread: Sequence[str] = (),
) -> Path:
    """Write ``README.md``: Hub metadata and a card that a person can judge the model by.

    Nothing is looked up on the Hub. Every text that comes from outside is escaped, and secrets, user names and home
    folders are taken out.

    Args:
        folder: The model's folder. The pictures and files of the run (``reward_gap.png``, ``training_curve.png``,
            ``overview.png``, ``behavior.png``, ``recipe.yaml``, ``metrics.json``, ``provenance.json``) are shown and named where they already
            lie in it.
        base_model: Hub id of the model that was aligned, or a local folder; only a Hub id enters the metadata.
        peft: True for an adapter, False for a whole model.
        languages: Target languages (ISO 639-1).
        source_language: The dominant language.
        before: Held-out table before training; taken from `comparison` where that is given.
        after: Held-out table after training. With both, and their records, the paired change is added.
        comparison: Both tables with their paired change.
        recipe_yaml: The resolved recipe, shown whole and folded away.
        provenance: What :func:`mpo.common.provenance.collect` returned.
        dataset_name: Hub id, or file, of the training data; only a Hub id enters the metadata.
        settings: Resolved settings; by default those read from `recipe_yaml`.
        retention: Retention term on the held-out sources before and after training.
        harmless: The change on held-out harmless groups.
        behavior: What the model does with the probe prompts, before and after.
        finding: What the card opens with, behind what `comparison` has fallen by; by default the sentence of `behavior`, or
            that nothing was asked.
        repository: Hub id the model is, or will be, under, or the name of its folder, for the loading example; by
            default the name of `folder`.
        merged_from: Name of the adapter that was merged into the base; None where this is no merged model.
        unread: Files of the adapter that could not be read.

    Returns:
        The path of the card.

    Raises:
        DataError: The tables hold different languages.
        ConfigError: `recipe_yaml` is no YAML mapping.
        StorageError: The file cannot be written.
    """
    if comparison is None and before is not None and after is not None:
        comparison = _compared(before, after)
    if comparison is not None:
        before, after = comparison.before, comparison.after
    folder = Path(folder)
    recipe = redact_text(recipe_yaml).strip()
    values = redact(_read_settings(recipe) if settings is None else dict(settings))
    objectives = _objectives(values)
    by_mpo = "mpo" in objectives
    both_kinds = _both_kinds(provenance)
    hub_id = base_model if _is_hub_id(base_model) else None
    shown_base = hub_id or _shown_path(base_model)
    targets = sort_languages(languages)
    kind = "A LoRA adapter for" if peft else "A full fine-tune of"
    place = repository or folder.resolve().name
    text = markdown(
        "card.md",
        metadata=Raw(_metadata(hub_id, peft, [source_language, *targets], dataset_name).to_yaml()),
        title=f"{os.path.basename(shown_base.rstrip('/'))}-{'MPO' if by_mpo else 'aligned'}",
        method=Raw(listed(_MPO if name == "mpo" else code(name) for name in objectives)),
        by_mpo=by_mpo,
        held=both_kinds and values.get("harmless_retention", "none") != "none",
        kind=kind if merged_from is None else "A LoRA adapter folded into",
        base=_linked(base_model),
        targets=[language_name(language) for language in targets] or ["no language"],
        dominant=language_name(source_language),
        merged_from=None if merged_from is None else _shown_path(merged_from),
        before=before,
        after=after,
        **_findings(before, after, comparison),
        retention=retention,
        harmless=None if harmless is None else Raw(harmless.harmless_table().markdown()),
        behavior=behavior,
        behavior_table=None if behavior is None else Raw(behavior.to_markdown()),
        opening=with_arrows(_opening(comparison, behavior, finding)),
        peft=peft,
        is_local=hub_id is None,
        library="peft" if peft else "transformers",
        loader=Raw("AutoPeftModelForCausalLM" if peft else "AutoModelForCausalLM"),
        place=Raw(place if _is_hub_id(place) or _is_plain(place) else "path/to/this/folder"),
        facts=[
            *_facts(values, peft or merged_from is not None, dataset_name, provenance),
            *_leak_facts(folder / LEAKS),
        ],
        recipe=Raw(recipe),
        fence=Raw(fence(recipe, 3)),
        files=[name for name in _FILES if (folder / name).is_file()],
        unread=unread,
        citations=Raw(f"{MPO_BIBTEX}\n\n{HIDDEN_SPACE_BIBTEX}"),
    )
    return write_text(folder / "README.md", text)


def write_merged_card(
    folder: Path, *, adapter: Path, base_model: str, adapter_settings: Mapping[str, Any], name: str
) -> Path | None:
    """Take the files of an adapter's run along, which hold for the merged model too, and write its card.

    A file that cannot be read stays behind, and the card says so.

    Args:
        folder: Folder of the merged model.
        adapter: Folder of the adapter.
        base_model: The model that it was merged into.
        adapter_settings: Its ``adapter_config.json``, which says more than the recipe of what was merged.
        name: Under which the folder will be loaded.

    Returns:
        The path of the card; None where nothing beside the adapter tells of a run of this package.

    Raises:
        StorageError: A file cannot be written.
    """
    unread = []

    def take(file: str, read: Callable[[Path], Any], missing: Any) -> Any:
        if not (adapter / file).is_file():
            return missing
        try:
            value, content = read(adapter / file), (adapter / file).read_bytes()
        except (MPOError, OSError, ValueError) as error:
            unread.append(file)
            _log.warning(f"The merged model's card leaves out what {adapter / file} holds: {error}")
            return missing
        write_bytes(folder / file, content)
        return value

    recipe, settings = take("recipe.yaml", _read_recipe, ("", {}))
    before, after, retention, behavior = take("metrics.json", _read_metrics, (None, None, None, None))
    provenance = take("provenance.json", lambda file: read_typed(file, Provenance), None)
    if not (unread or recipe or provenance or before or behavior):
        return None
    for picture in _PICTURES:
        take(picture, bool, None)
    take(LEAKS, lambda file: read_typed(file, LeaksResult), None)
    languages = settings.get("languages") if after is None else [row.language for row in after.targets]
    if languages is None and behavior is not None:
        languages = [
            code
            for code in behavior.after.harmless_refused.languages
            if code != settings.get("source_language", "en")
        ]
    dominant = (
        settings.get("source_language") if after is None or after.source is None else after.source.language
    )
    own = {key: adapter_settings.get(own) for own, key in _ADAPTER_SETTINGS.items()}
    if isinstance(own["lora_target_modules"], (list, set)):  # "all-linear" has become a name per layer
        own["lora_target_modules"] = sorted({str(m).rpartition(".")[2] for m in own["lora_target_modules"]})
    return write_card(
        folder,
        base_model=base_model,
        peft=False,
        languages=[str(language) for language in languages] if isinstance(languages, list) else [],
        source_language=str(dominant or "en"),
        before=before,
        after=after,
        recipe_yaml=recipe,
        provenance=provenance,
        settings=settings | {key: value for key, value in own.items() if value is not None},
        retention=retention,
        behavior=behavior,
        repository=name,
        merged_from=str(adapter),
        unread=unread,
    )


def _read_recipe(file: Path) -> tuple[str, dict[str, Any]]:
    text = file.read_text(encoding="utf-8")
    return text, _read_settings(redact_text(text))


def _read_metrics(
    file: Path,
) -> tuple[RewardGapTable | None, RewardGapTable | None, tuple[float, float] | None, BehaviorChange | None]:
    """The tables before and after, the retention term and the probe, each None where it was not measured."""
    metrics = read_typed(file, TrainingMetrics)
    before, after, behavior = metrics.before, metrics.after, metrics.behavior
    if before is None or after is None:
        return None, None, None, behavior
    _compared(before, after)  # tables that do not belong together are damage, too
    first, last = (metrics.retention_loss.get(when) for when in ("before", "after"))
    return before, after, None if first is None or last is None else (first, last), behavior


def _opening(comparison: Comparison | None, behavior: BehaviorChange | None, finding: str | None) -> str:
    if finding is None and behavior is not None:
        finding = behavior.sentence
    asked = (
        finding
        or "It was not measured what this model does when it is asked, neither before nor after training."
    )
    fallen = None if comparison is None else comparison.fallen()
    return asked if fallen is None else f"{fallen} {asked}"


def _compared(before: RewardGapTable, after: RewardGapTable) -> Comparison | None:
    """The paired change; None for tables without records."""
    old, new = ([(row.language, row.is_source) for row in table.rows] for table in (before, after))
    if old != new:
        raise DataError("Before and after hold different languages. Evaluate both on the same data.")
    return compare(before, after) if before.records and after.records else None


def _read_settings(recipe_yaml: str) -> dict[str, Any]:
    """All keys of a recipe, those in sections beside those at the top.

    Raises:
        ConfigError: The text is no YAML mapping.
    """
    try:
        values = yaml.safe_load(recipe_yaml) if recipe_yaml else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError for a date that does not exist
        raise ConfigError(
            f"`recipe_yaml` is no YAML: {error}. Pass the text of the resolved recipe."
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"`recipe_yaml` holds a {type(values).__name__}; expected a mapping of settings.")
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in _SETTINGS:
            flat.update(value)
        flat[str(key)] = value
    return flat


def _metadata(
    hub_id: str | None, peft: bool, languages: Sequence[str], dataset_name: str | None
) -> ModelCardData:
    tags = ["mpo", "trl", "safety", "multilingual", "alignment", "preference-optimization"]
    if peft:
        tags.append("lora")
        if hub_id:
            tags.append(f"base_model:adapter:{hub_id}")
    codes = [code for code in languages if re.fullmatch(r"[a-z]{2,3}", code) and code != "und"]
    more: dict[str, Any] = {}
    if hub_id:
        more["base_model_relation"] = "adapter" if peft else "finetune"
    return ModelCardData(
        base_model=hub_id,
        library_name="peft" if peft else "transformers",
        pipeline_tag="text-generation",
        language=list(dict.fromkeys(codes)) or None,
        datasets=[dataset_name] if dataset_name and _is_hub_id(dataset_name) else None,
        tags=tags,
        **more,
    )


def _is_hub_id(name: str) -> bool:
    """Whether `name` is ``namespace/name`` and no folder or file here."""
    if name.count("/") != 1 or os.path.exists(name) or name.endswith((".json", ".jsonl", ".csv", ".parquet")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith((".", "~", "-"))


def _is_plain(name: str) -> bool:
    """Whether a folder's name may be shown in code."""
    return bool(re.fullmatch(r"[\w.\-]+", name)) and redact_text(name) == name


def _shown_path(name: str) -> str:
    return portable_path(name) if os.path.exists(name) else redact_text(name)


def _linked(name: str, kind: str = "") -> Raw:
    """A link to the Hub, or a local name as code."""
    if not _is_hub_id(name):
        return code(_shown_path(name))
    return Raw(f"[{escape_markdown(name)}](https://huggingface.co/{kind}{name})")


def _findings(
    before: RewardGapTable | None, after: RewardGapTable | None, comparison: Comparison | None
) -> dict[str, Any]:
    """What a reader must not overlook: no clear change, a source that fell, chosen responses that became unlikely."""
    changes = comparison.changes if comparison is not None else ()
    pairs = [] if before is None or after is None else list(zip(before.rows, after.rows, strict=True))

    def targets(direction: int) -> list[str]:
        return [language_name(c.language) for c in changes if not c.is_source and _direction(c) == direction]

    return {
        "comparison": None if comparison is None else Raw(comparison.to_markdown()),
        "change": None if comparison is None else comparison.all_targets,
        "percent": None if before is None else f"{100 * before.confidence:g}",
        "rows": pairs,
        "fell": targets(-1),
        "unclear": targets(0),
        "source_fell": next((-c.change for c in changes if c.is_source and _direction(c) == -1), None),
        "unlikely": [
            language_name(old.language)
            for old, new in pairs
            if not old.is_source and new.chosen < old.chosen and new.gap > old.gap
        ],
    }


def _direction(change: Change) -> int | None:
    """1 or -1 where the interval of a change leaves zero out, else 0; None where there is no interval."""
    if change.ci_low is None or change.ci_high is None:
        return None
    return (change.ci_low > 0) - (change.ci_high < 0)


def _facts(
    settings: Mapping[str, Any], adapter: bool, dataset_name: str | None, provenance: Mapping[str, Any] | None
) -> list[tuple[str, str]]:
    """Data, settings, hardware and versions, each with its label."""
    found = redact(dict(provenance or {}))
    idle = _idle(settings, both_kinds=_both_kinds(provenance))
    out: list[tuple[str, str]] = []
    if dataset_name:
        out.append(("Data", _linked(dataset_name, "datasets/")))
    for key, label in (("data_fingerprint", "Fingerprint of the data"), ("precision", "Precision")):
        if found.get(key):
            out.append((label, code(found[key])))
    for key, label in _SETTINGS.items():
        value = settings.get(key)
        unused = value is None or value is False or key in idle or (key == "max_steps" and value == -1)
        if not unused and (adapter or key not in _ADAPTER_SETTINGS.values()):
            if key == "beta" and "mpo" not in _objectives(settings):
                label = label.partition(",")[0]
            out.append((label, _setting(value)))
    kinds = _mapping(found.get("groups_by_kind"))
    if kinds:
        out.append(("Groups", ", ".join(f"{number} {kind}" for kind, number in kinds.items())))
    if isinstance(changes := found.get("resume_changes"), list) and changes:
        out.append(("Changed where the run was resumed", "; ".join(map(str, changes))))
    devices, libraries = _mapping(found.get("devices")), _mapping(found.get("libraries"))
    accelerators = _mapping(devices.get("accelerators"))
    if devices:
        out.append(("Hardware", ", ".join(f"{n} x {name}" for name, n in accelerators.items()) or "CPU"))
    versions = {
        "mpo": found.get("mpo"),
        **{name: libraries.get(name) for name in ("torch", "transformers", "trl", "peft")},
    }
    if any(versions.values()):
        out.append(
            ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version))
        )
    return out


def _objectives(settings: Mapping[str, Any]) -> list[str]:
    names = settings.get("loss_type") or ["mpo"]
    return [str(name) for name in ([names] if isinstance(names, str) else names)]


def _both_kinds(provenance: Mapping[str, Any] | None) -> bool:
    """Whether some of the groups are harmless."""
    return bool(_mapping((provenance or {}).get("groups_by_kind")).get(HARMLESS))


def _idle(settings: Mapping[str, Any], *, both_kinds: bool) -> set[str]:
    """Settings that nothing in the run reads."""
    idle = set() if both_kinds else {*_OF_HARMLESS}
    if settings.get("harmless_loss_type") == ["none"]:
        idle.add("harmless_loss_weight")
    if settings.get("harmless_retention", "none") == "none":
        idle |= {"harmless_retention", "harmless_retain_weight"}
    try:
        reads = {option for name in _objectives(settings) for option in find_objective(name).reads}
    except MPOError:  # an objective of a package that is not installed here
        return idle
    idle |= {"beta", "retain_weight"} - reads
    if "retain_weight" in idle and (not both_kinds or settings.get("harmless_retention") != "hidden"):
        idle.add("retain_pooling")
    return idle


def _leak_facts(file: Path) -> list[tuple[str, str]]:
    """How many evaluation prompts stand in the training data, where a run has looked."""
    if not file.is_file():
        return []
    try:
        sets = read_typed(file, LeaksResult).sets
    except MPOError as error:
        _log.warning(f"The card leaves out what {file} holds: {error}")
        return []
    counts = {name: (len(leaked.found), leaked.prompts) for name, leaked in sets.items()}
    return [("Evaluation prompts in the training data", counts_in_words(counts))] if counts else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _setting(value: Any) -> str:
    if value is True:
        return "yes"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
