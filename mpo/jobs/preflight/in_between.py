"""How often a run measures its held-out pairs between the first step and the last, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

from mpo.common.words import counted
from mpo.training.recipe import Recipe
from mpo.training.workload import Schedule, Workload

MOST = 4
"""Measurements of a run that says nothing of them."""

SHARE = 0.05
"""Of the run's own work, what they may take together then."""

# Model passes over a token: forward and backward; an adapter's backward pass makes no gradients of the frozen weights.
_PASSES = {True: 2, False: 3}


@dataclass(frozen=True)
class InBetween:
    """When held-out pairs are measured within a run.

    Attributes:
        times: How often; 0 for never.
        every: Optimizer steps from one to the next; None for never, or where `eval_strategy` says when.
        share_of_one: What a single one takes, as a share of the training steps' work.
    """

    times: int
    every: int | None
    share_of_one: float

    @property
    def share(self) -> float:
        """What they take together, as a share of the training steps' work."""
        return self.times * self.share_of_one

    def to_text(self) -> str:
        """``before and after, and 4 times in between (about 3 % more work)``."""
        if self.every is not None:
            return f"before and after, and {counted(self.times, 'time')} in between (about {_percent(self.share)} more work)"
        return (
            "before and after; not in between, where once would be "
            f"about {_percent(self.share_of_one)} more work (`held_out_measurements: 1`)"
        )


def measured_in_between(
    recipe: Recipe, schedule: Schedule, work: Workload, held_out: Workload
) -> InBetween | None:
    """When a run measures what is held out, by `held_out_measurements`; None where `eval_strategy` says it.

    Args:
        recipe: The run.
        schedule: Its optimizer steps and epochs.
        work: One epoch of training.
        held_out: One pass over what is held out.
    """
    training = recipe.training
    if str(getattr(training.eval_strategy, "value", training.eval_strategy)) != "no":
        return None
    trained = max(work.tree_tokens * schedule.epochs, 1.0)
    share = held_out.tree_tokens / (trained * _PASSES[recipe.model.trains_adapter])
    wanted = recipe.data.held_out_measurements
    times = min(MOST, int(SHARE / share)) if wanted is None and share else wanted or 0
    steps = schedule.steps
    times = min(times, steps - 1)
    if times <= 0:
        return InBetween(0, None, share)
    every, rest = divmod(steps, times + 1)
    # Rounded up, there is none at the run's end, which is measured anyway; but few steps would have too few of them.
    if rest or (steps - 1) // (every + 1) >= times:
        every += 1
    return InBetween((steps - 1) // every, every, share)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "1 %"
