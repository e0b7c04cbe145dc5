"""What a file of settings is: a recipe of one kind or another, or a file of another program, told by its keys."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mpo.common.words import listed


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        noun: What messages call it; a :class:`~mpo.common.typed_yaml.Document` of this kind has the same noun.
        command: What is done with it; ``{path}`` stands for the file.
        marks: Keys that no other kind has.
        home: Folder of the package's recipes of this kind.
        title: What it is called beside other kinds, where that is not the noun.
    """

    noun: str
    command: str
    marks: frozenset[str]
    home: str = ""
    title: str = ""

    def __str__(self) -> str:
        return self.title or self.noun


KINDS: tuple[Kind, ...] = (
    Kind(
        "a recipe",
        "mpo train {path}",
        frozenset(
            [
                "model_name_or_path",
                "dataset",
                "eval_dataset",
                "held_out",
                "learning_rate",
                "use_peft",
                "lora_r",
                "lora_alpha",
                "num_train_epochs",
                "max_steps",
                "per_device_train_batch_size",
                "gradient_accumulation_steps",
                "retain_weight",
                "loss_type",
                "warmup_steps",
            ]
        ),
        title="a training recipe",
    ),
    Kind(
        "a suite",
        "mpo evaluate suite {path}",
        frozenset(
            [
                "attack",
                "over_refusal",
                "reward_gap",
                "utility",
                "perplexity",
                "generation",
                "judge",
                "second_judge",
                "over_refusal_judge",
            ]
        ),
        "evaluation",
    ),
    Kind(
        "an analysis",
        "mpo analyze hidden-space {path}",
        frozenset(
            [
                "resamples",
                "folds",
                "layers",
                "pooling",
                "shown_layer",
                "embeddings",
                "tokens_per_batch",
                "components",
                "template",
            ]
        ),
        "hidden_space",
    ),
    Kind(
        "a build",
        "mpo data build {path}",
        frozenset(
            [
                "prompts",
                "answers",
                "translation",
                "back_translation",
                "filters",
                "leaks",
                "harmless_judge",
                "block",
            ]
        ),
        "data",
    ),
    Kind(
        "a comparison",
        "mpo compare {path}",
        frozenset(
            ["runs", "seeds", "base", "suite", "shared", "grid", "budget", "search", "validation_suite"]
        ),
        "compare",
    ),
    Kind(
        "a configuration of accelerate",
        "accelerate launch --config_file {path} scripts/train.py RECIPE",
        frozenset(
            ["compute_environment", "distributed_type", "deepspeed_config", "fsdp_config", "num_machines"]
        ),
        "accelerate",
    ),
    Kind(
        "a configuration of DeepSpeed",
        "accelerate launch --use_deepspeed --deepspeed_config_file {path} scripts/train.py RECIPE",
        frozenset(["zero_optimization", "train_micro_batch_size_per_gpu", "zero_allow_untested_optimizer"]),
    ),
    Kind(
        "a model's configuration",
        "mpo chat FOLDER",
        frozenset(
            [
                "model_type",
                "architectures",
                "hidden_size",
                "num_hidden_layers",
                "peft_type",
                "base_model_name_or_path",
            ]
        ),
    ),
    Kind(
        "a result of a run",
        "mpo report FOLDER",
        frozenset(["held_out_groups", "train_runtime", "data_fingerprint", "provenance"]),
    ),
)
# Where these stand together, whatever else does, the kind is clear.
_TOGETHER = {"an analysis": {"models", "data", "languages"}, "a build": {"prompts", "languages"}}


def home_of(noun: str) -> str:
    """Folder of the package's recipes of a kind."""
    return next((kind.home for kind in KINDS if kind.noun == noun), "")


def explaining(noun: str) -> str:
    """The command that explains the keys of a kind of recipe."""
    return "mpo keys" if noun == KINDS[0].noun else f"mpo keys --of {noun.split()[-1]}"


def kind_of(keys: Collection[str]) -> Kind | None:
    """The kind that most keys at the top of a file belong to; None where no key tells it."""
    scores = {kind: _score(kind, keys) for kind in KINDS}
    best = max(scores, key=lambda kind: scores[kind])
    return best if scores[best] else None


def another_kind(noun: str, given: object, keys: Sequence[str]) -> str | None:
    """One sentence where a file is of another kind than is expected; None where it may be of that kind.

    Args:
        noun: The expected kind.
        given: The file, or its name, as the user wrote it.
        keys: Its keys at the top.
    """
    expected = next((kind for kind in KINDS if kind.noun == noun), None)
    found = kind_of(keys)
    if expected is None or found is None or found is expected or _score(expected, keys):
        return None
    marks = [key for key in keys if key in found.marks] or sorted(_TOGETHER.get(found.noun, ()))
    return (
        f"{given}: this is {found}, by its keys {listed(f'`{mark}`' for mark in marks[:3])}; expected {expected}. Use it "
        f"with: {found.command.format(path=given)}"
    )


def _score(kind: Kind, keys: Collection[str]) -> int:
    together = _TOGETHER.get(kind.noun)
    return len(kind.marks & {*keys}) + (2 if together and together <= {*keys} else 0)
