"""What a training run asks its model before and after, and what it says of the answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpo.common.characters import without_halves
from mpo.common.files import write_text
from mpo.common.words import listed
from mpo.data.languages import language_name
from mpo.evaluation.probe.behavior import ANSWERED, REFUSED, Answered, ProbePrompts
from mpo.evaluation.probe.change import BehaviorChange
from mpo.report.run import PROBE_ANSWERS

if TYPE_CHECKING:
    from mpo.evaluation.probe.watch import ProbeWatch
    from mpo.training.trainer import MPOTrainer


@dataclass(frozen=True)
class Probed:
    """What came of the probe.

    Attributes:
        sentence: What ends the run and opens the card.
        change: What has changed; None where the probe failed, before or after.
        before, after: The answers, with `change`.
    """

    sentence: str
    change: BehaviorChange | None = None
    before: Answered | None = None
    after: Answered | None = None


def start_probe(
    trainer: MPOTrainer, prompts: ProbePrompts | None, say: Callable[[str], None]
) -> ProbeWatch | None:
    """Ask the starting model, and have the trainer go on asking; None where there is nothing to ask. All ranks call this."""
    if prompts is None:
        return None
    from mpo.evaluation.probe.watch import ProbeWatch

    watch = ProbeWatch(trainer, prompts)
    trainer.add_callback(watch)
    if (answered := watch.start()) is not None:
        shares = answered.metrics()
        parts = [
            f"{words} {shares[f'probe/{measure}']:.0%}"
            for measure, words in ((ANSWERED, "harmful ones answered"), (REFUSED, "harmless ones refused"))
            if f"probe/{measure}" in shares
        ]
        say(f"Probe prompts before training: {', '.join(parts) or 'no answer could be judged'}")
    return watch


def finish_probe(watch: ProbeWatch | None, trainer: MPOTrainer) -> Probed | None:
    """Ask the trained model and compare; None where nothing was to be asked. All ranks call this."""
    if watch is None:
        if not trainer.args.behavior_probe:
            return None
        names = listed(language_name(code) for code in _trained(trainer))
        return Probed(
            f"It was not measured what this model does: the probe set has no prompts in {names}. `probe_languages: [en]`, for "
            "example, asks in another language."
        )
    change = watch.finish()
    if change is None:
        return Probed(f"It could not be measured what this model does: the probe failed ({watch.failure}).")
    return Probed(change.sentence, change, watch.before, watch.after)


def _trained(trainer: MPOTrainer) -> list[str]:
    """Codes of the source language and of those that are trained."""
    return list(dict.fromkeys([trainer.args.source_language, *trainer.languages]))


def write_probe_answers(folder: Path, probed: Probed) -> None:
    """Write what was asked and answered, one prompt a line.

    Raises:
        StorageError: The file cannot be written.
    """
    before, after = probed.before, probed.after
    if before is None or after is None:
        return
    lines = [
        json.dumps(
            {
                "id": old.id,
                "language": old.language,
                "prompt": old.prompt,
                "before": {"answer": old.answer, "verdict": before.verdicts[old.id]},
                "after": {"answer": new.answer, "verdict": after.verdicts[new.id]},
            },
            ensure_ascii=False,
        )
        for old, new in zip(before.answers, after.answers, strict=True)
    ]
    write_text(folder / PROBE_ANSWERS, "".join(f"{without_halves(line)}\n" for line in lines))
