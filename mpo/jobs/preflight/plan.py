"""What was found out about a recipe before it is run."""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import Dataset
from peft import PeftConfig
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from mpo.common.tables import fact_lines
from mpo.data import BadRow, LoadedGroups
from mpo.data.leaks import Leaks
from mpo.evaluation.probe.behavior import ProbePrompts
from mpo.jobs.preflight.in_between import InBetween
from mpo.modeling.loading import ModelSource
from mpo.training.recipe import Recipe
from mpo.training.workload import Schedule, Workload


@dataclass
class Plan:
    """A recipe that was found sound, with what was opened to find out.

    Attributes:
        recipe: The recipe, with `dtype` and `attn_implementation` filled in.
        source: Where the model comes from.
        config: The model's configuration.
        tokenizer: With a chat template.
        peft_config: Of the new adapter, or None.
        data: What was loaded, before the split.
        train, held_out: Groups; ``held_out`` is None where nothing is.
        tokenized: The groups to train on, as tokens.
        dropped: Bad rows that were left out.
        trainable, parameters: Numbers of trained weights and of the model's own.
        work: One epoch of training.
        languages: Number of training pairs of each target language.
        held_out_pairs: Number of held-out target pairs.
        schedule: Steps and epochs of the run.
        in_between: When the held-out pairs are measured within the run; None where nothing is held out, or `eval_strategy`
            says it.
        probe: What the model is asked before and after, or None.
        facts: What the printed plan says, in order.
        notes: Sentences about what the user may not have meant.
        leaks: Evaluation prompts in the training groups; None on any but the main process.
    """

    recipe: Recipe
    source: ModelSource
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    peft_config: PeftConfig | None
    data: LoadedGroups
    train: Dataset
    held_out: Dataset | None
    tokenized: Dataset
    dropped: list[BadRow]
    trainable: int
    parameters: int
    work: Workload
    languages: dict[str, int]
    held_out_pairs: int
    schedule: Schedule
    in_between: InBetween | None = None
    probe: ProbePrompts | None = None
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    leaks: Leaks | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.schedule.steps

    def to_text(self) -> str:
        """The plan, one fact per line."""
        return "\n".join([fact_lines(self.facts), *(f"Note: {note}" for note in self.notes)])
