"""The model card: what was trained, how, what it changed per language, and what that does not show."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mpo.common.citations import HIDDEN_SPACE_BIBTEX, MPO_BIBTEX
from mpo.common.files import write_text
from mpo.common.redaction import portable_path, redact, redact_text
from mpo.common.tables import escape_markdown, signed
from mpo.data.languages import language_name
from mpo.errors import ConfigError, DataError
from mpo.evaluation.reward_gap import Change, Comparison, RewardGapTable, compare, sort_languages

TRAINING_CURVE = "training_curve.png"
REWARD_GAP = "reward_gap.png"

# Recipe keys worth a line of their own, in the order of the card.
_SETTINGS = {
    "beta": "\N{GREEK SMALL LETTER BETA}, scale of the target gap",
    "retain_weight": "\N{GREEK SMALL LETTER LAMDA}, weight of the retention term",
    "retain_pooling": "Pooling of the retention term",
    "min_source_gap": "Least reference gap of a source",
    "language_weights": "Weights of the languages",
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
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA",
    "load_in_4bit": "Base in 4 bit",
    "dtype": "Type of the weights",
    "seed": "Seed",
}
_LORA_SETTINGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "use_rslora")


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
    license: str | None = None,
    model_name: str | None = None,
    repository: str | None = None,
    merged: bool = False,
) -> Path:
    """Write ``README.md``: Hub metadata and a card that a person can judge the model by.

    Nothing is looked up on the Hub. Every text that comes from outside is escaped, and secrets, user names and home
    folders are taken out.

    Args:
        folder: The model's folder. The pictures and files of the run (``reward_gap.png``, ``training_curve.png``,
            ``recipe.yaml``, ``metrics.json``, ``provenance.json``) are shown and named where they already lie in it.
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
        license: Licence id for the metadata. Left out where it is not given: the base model's terms decide.
        model_name: Title; by default the base model's name with ``-MPO``.
        repository: Hub id the model is, or will be, under; used in the loading example.
        merged: True for a whole model made by folding a trained adapter into its base.

    Returns:
        The path of the card.

    Raises:
        DataError: The tables hold different languages.
        ConfigError: `recipe_yaml` is no YAML mapping, or `license` is no licence id.
        StorageError: The file cannot be written.
    """
    if comparison is None and before is not None and after is not None and before.records and after.records:
        comparison = compare(before, after)
    if comparison is not None:
        before, after = comparison.before, comparison.after
    if before is not None and after is not None and _languages(before) != _languages(after):
        raise DataError("Before and after hold different languages. Evaluate both on the same data.")
    folder = Path(folder)
    recipe_yaml = redact_text(recipe_yaml).strip()
    values = redact(_read_recipe(recipe_yaml) if settings is None else dict(settings))
    hub_id = base_model if _is_hub_id(base_model) else None
    shown_base = hub_id or (
        portable_path(base_model) if os.path.exists(base_model) else redact_text(base_model)
    )
    title = model_name or f"{os.path.basename(shown_base.rstrip('/'))}-MPO"
    targets = sort_languages(languages)
    sections = [
        f"# {escape_markdown(redact_text(title))}",
        _summary(hub_id, shown_base, _kind(peft, merged), targets, source_language),
        _results(folder, before, after, comparison, retention),
        _loading(folder, hub_id, shown_base, peft, repository),
        _training(folder, values, peft or merged, dataset_name, recipe_yaml, provenance),
        _limits(source_language, before is not None and after is not None),
        _citations(),
    ]
    metadata = _metadata(hub_id, peft, [source_language, *targets], dataset_name, license)
    body = "\n\n".join(section for section in sections if section)
    return write_text(folder / "README.md", f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")


def _languages(table: RewardGapTable) -> list[tuple[str, bool]]:
    return [(row.language, row.is_source) for row in table.rows]


def _metadata(
    hub_id: str | None, peft: bool, languages: Sequence[str], dataset_name: str | None, license: str | None
) -> ModelCardData:
    if license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.\-+]*", license):
        raise ConfigError(
            f"`license` is {license!r}; expected an id as the Hub lists them, such as 'apache-2.0' or 'llama3.1'."
        )
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
        license=license,
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


def _kind(peft: bool, merged: bool) -> str:
    if peft:
        return "A LoRA adapter for"
    return "A LoRA adapter folded into" if merged else "A full fine-tune of"


def _summary(hub_id: str | None, base: str, what: str, targets: Sequence[str], source: str) -> str:
    model = f"[{escape_markdown(base)}](https://huggingface.co/{base})" if hub_id else _code(base)
    names = [escape_markdown(language_name(code)) for code in targets]
    listed = (
        names[0]
        if len(names) == 1
        else ", ".join(names[:-1]) + f" and {names[-1]}"
        if names
        else "no language"
    )
    dominant = escape_markdown(language_name(source))
    return (
        f"{what} {model}, trained with *Multilingual reward gaP Optimization* (MPO). The aim: to tell safe from unsafe "
        f"responses in {listed} as clearly as in {dominant}.\n\n"
        "The **reward gap** of a prompt is the mean log-likelihood per token of its safe response minus that of its "
        f"unsafe one. MPO moves each target language's gap towards the gap that the starting model has in {dominant}, "
        f"and holds the model's hidden states in {dominant} where they were."
    )


# -------------------------------------------------------------------------------------------------------------- results


def _results(
    folder: Path,
    before: RewardGapTable | None,
    after: RewardGapTable | None,
    comparison: Comparison | None,
    retention: tuple[float, float] | None,
) -> str:
    if before is None or after is None:
        return "## Results\n\nNothing was held out in this run, so its effect was not measured."
    parts = [
        "## Results",
        " ".join([_headline(before, after, comparison), *_warnings(before, after, comparison)]),
        _table(before, after, comparison),
        f"Gaps in nats per token, on {before.groups} held-out groups (a prompt with its translations). "
        + (
            f"Change: mean over pairs, with its {100 * before.confidence:g} % bootstrap interval over groups. "
            if comparison
            else ""
        )
        + "Chosen: change of the safe response's log-likelihood per token. Error: mean (\N{GREEK SMALL LETTER BETA} "
        "\N{MULTIPLICATION SIGN} gap \N{MINUS SIGN} reference gap)\N{SUPERSCRIPT TWO}, what training lowers; "
        f"\N{GREEK SMALL LETTER BETA} = {before.beta:g}, reference gap {signed(before.reference_gap)}.",
    ]
    if retention is not None:
        parts.append(
            f"Retention term on the held-out {escape_markdown(before.source_label)} pairs: {retention[0]:.4g} before, "
            f"{retention[1]:.4g} after."
        )
    if (folder / REWARD_GAP).is_file():
        parts.append(f"![Reward gap per language before and after training, with intervals]({REWARD_GAP})")
    return "\n\n".join(parts)


def _headline(before: RewardGapTable, after: RewardGapTable, comparison: Comparison | None) -> str:
    if before.all_targets is None or after.all_targets is None:
        return "There were no held-out target pairs."
    text = (
        f"Over all {before.all_targets.pairs} held-out target pairs, the mean reward gap went from "
        f"**{signed(before.all_targets.gap)}** to **{signed(after.all_targets.gap)}**"
    )
    change = comparison.all_targets if comparison is not None else None
    if change is not None and change.ci_low is not None and change.ci_high is not None:
        text += (
            f" (change {signed(change.change)}, {100 * before.confidence:g} % interval {signed(change.ci_low)} to "
            f"{signed(change.ci_high)})"
        )
    return (
        f"{text}, and the share of pairs with a positive gap from {before.all_targets.positive:.0%} to "
        f"{after.all_targets.positive:.0%}."
    )


def _warnings(before: RewardGapTable, after: RewardGapTable, comparison: Comparison | None) -> list[str]:
    """What a reader must not overlook: no clear change, a source that fell, chosen responses that became unlikely."""
    out = []
    changes: Sequence[Change] = comparison.changes if comparison is not None else ()
    unclear = [
        change.language
        for change in changes
        if not change.is_source and change.ci_low is not None and change.ci_high is not None
        if change.ci_low <= 0 <= change.ci_high
    ]
    fell = [
        change.language
        for change in changes
        if not change.is_source and change.ci_high is not None and change.ci_high < 0
    ]
    if fell:
        out.append(f"**In {_names(fell)} the gap fell.**")
    if unclear:
        out.append(f"In {_names(unclear)} the interval of the change includes zero.")
    source = next((change for change in changes if change.is_source), None)
    if source is not None and source.ci_high is not None and source.ci_high < 0:
        out.append(f"**The gap in {_names([source.language])} fell by {-source.change:.3f}.**")
    dropped = [
        old.language
        for old, new in zip(before.targets, after.targets, strict=True)
        if new.chosen < old.chosen and new.gap > old.gap
    ]
    if dropped:
        out.append(
            f"In {_names(dropped)} the safe responses themselves became less likely while the gap rose; the model "
            "moved away from the unsafe ones faster, not towards the safe ones."
        )
    return out


def _names(codes: Sequence[str]) -> str:
    return ", ".join(escape_markdown(language_name(code)) for code in codes)


def _table(before: RewardGapTable, after: RewardGapTable, comparison: Comparison | None) -> str:
    if comparison is not None:
        return comparison.to_markdown()
    arrow = "\N{RIGHTWARDS ARROW}"
    lines = ["| Language | Pairs | Gap | Gap &gt; 0 | Chosen |", "| :-- | --: | --: | --: | --: |"]
    for old, new in zip(before.rows, after.rows, strict=True):
        lines.append(
            f"| {escape_markdown(before.label(old))} | {old.pairs} | {signed(old.gap)} {arrow} {signed(new.gap)} "
            f"| {old.positive:.0%} {arrow} {new.positive:.0%} | {signed(new.chosen - old.chosen, 2)} |"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- loading and training


def _loading(folder: Path, hub_id: str | None, base: str, peft: bool, repository: str | None) -> str:
    place = repository if repository and _is_hub_id(repository) else _safe_name(folder)
    loader, library = (
        ("AutoPeftModelForCausalLM", "peft") if peft else ("AutoModelForCausalLM", "transformers")
    )
    lines = [
        f"from {library} import {loader}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {loader}.from_pretrained({place!r}, dtype="auto")',
        f"tokenizer = AutoTokenizer.from_pretrained({place!r})",
    ]
    text = "## Use\n\n```python\n" + "\n".join(lines).replace("'", '"') + "\n```"
    if peft and hub_id is None:
        text += (
            f"\n\nThe adapter was trained on a local copy of its base model ({_code(base)}); "
            "`adapter_config.json` says where it was."
        )
    if peft:
        text += "\n\n`mpo merge` folds the adapter into its base model."
    return text


def _safe_name(folder: Path) -> str:
    name = redact_text(folder.resolve().name)
    return name if re.fullmatch(r"[\w.\-]+", name) else "path/to/this/folder"


def _training(
    folder: Path,
    settings: Mapping[str, Any],
    adapter: bool,
    dataset_name: str | None,
    recipe_yaml: str,
    provenance: Mapping[str, Any] | None,
) -> str:
    rows = []
    if dataset_name:
        rows.append(("Data", _dataset(dataset_name)))
    facts = redact(dict(provenance or {}))
    for key, label in (("data_fingerprint", "Fingerprint of the data"), ("precision", "Precision")):
        if facts.get(key):
            rows.append((label, _code(str(facts[key]))))
    for key, label in _SETTINGS.items():
        value = settings.get(key)
        if (
            value is None
            or value is False
            or (key in _LORA_SETTINGS and not adapter)
            or (key == "max_steps" and value == -1)
        ):
            continue
        rows.append((label, _setting(value)))
    accelerators = (facts.get("devices") or {}).get("accelerators")
    if accelerators:
        rows.append(
            ("Hardware", escape_markdown(", ".join(f"{n} x {name}" for name, n in accelerators.items())))
        )
    elif facts.get("devices"):
        rows.append(("Hardware", "CPU"))
    libraries = facts.get("libraries") or {}
    versions = [
        f"{name} {libraries[name]}" for name in ("torch", "transformers", "trl", "peft") if name in libraries
    ]
    if "mpo" in facts:
        versions.insert(0, f"mpo {facts['mpo']}")
    if versions:
        rows.append(("Versions", escape_markdown(", ".join(versions))))
    parts = ["## Training"]
    if rows:
        parts.append(
            "\n".join(["| | |", "| :-- | :-- |", *(f"| {label} | {value} |" for label, value in rows)])
        )
    if (folder / TRAINING_CURVE).is_file():
        parts.append(f"![Loss, and reward gap per language, over the training steps]({TRAINING_CURVE})")
    if recipe_yaml:
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", recipe_yaml)), default=0))
        parts.append(
            f"<details>\n<summary>Recipe</summary>\n\n{fence}yaml\n{recipe_yaml}\n{fence}\n\n</details>"
        )
    files = {
        "recipe.yaml": "repeats this run",
        "metrics.json": "holds all numbers",
        "provenance.json": "the versions of all libraries",
    }
    found = [f"`{name}` {what}" for name, what in files.items() if (folder / name).is_file()]
    if found:
        parts.append(", ".join(found) + ".")
    return "\n\n".join(parts)


def _dataset(name: str) -> str:
    if _is_hub_id(name):
        return f"[{escape_markdown(name)}](https://huggingface.co/datasets/{name})"
    return _code(portable_path(name) if os.path.exists(name) else redact_text(name))


def _setting(value: Any) -> str:
    if value is True:
        return "yes"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        value = ", ".join(f"{key} {item}" for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return escape_markdown(str(value))


def _code(text: str) -> str:
    """`text` as inline code, also inside a table and whatever backticks it holds."""
    line = " ".join(text.split()).replace("|", "\\|") or " "
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def _read_recipe(recipe_yaml: str) -> dict[str, Any]:
    """All keys of a recipe, those in sections beside those at the top."""
    import yaml

    try:
        values = yaml.safe_load(recipe_yaml) if recipe_yaml else {}
    except yaml.YAMLError as error:
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


# ------------------------------------------------------------------------------------------------- limits and citations


def _limits(source: str, measured: bool) -> str:
    dominant = escape_markdown(language_name(source))
    points = [
        "The reward gap is a proxy. It says which of two *given* responses the model finds more likely, not what the "
        "model writes when it is asked. Measure the attack success rate before relying on it.",
        "It was not measured whether the model now also refuses harmless requests, or answers others worse.",
        f"MPO copies the safety of {dominant}, with its faults: what the base model does not refuse in {dominant}, it "
        "is not taught to refuse elsewhere.",
        "Languages, dialects, code-switching and kinds of attack that are not in the training data may be unchanged.",
    ]
    if measured:
        points.insert(
            1,
            "The intervals describe chance in drawing held-out prompts; they say nothing about other kinds of prompts, "
            "other translations or another seed.",
        )
    points.append("Training pairs contain unsafe text. The terms of the base model and of the data apply.")
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points)


def _citations() -> str:
    return (
        "## Citation\n\nThe method, and the study of representations that motivates measuring each language on its "
        f"own:\n\n```bibtex\n{MPO_BIBTEX}\n\n{HIDDEN_SPACE_BIBTEX}\n```"
    )
