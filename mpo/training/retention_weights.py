"""A weight of the retention of harmless pairs for each language, which a target adapts while the run goes on.

One weight for all languages holds some too tightly and others too loosely: how much a language would move depends on how well the
model tells harm from harmlessness in it. With a target, each language has the weight that brings it there: to a mean retention, or to
the share of harmless prompts x that greedy decoding refuses in the words of their rejected response y, made smooth::

    mean over x of  prod_t ( p(y_t | x, y_<t) / max_v p(v | x, y_<t) )^3

of which a prompt has 1 where greedy decoding says just that and at most an eighth where some token is half as likely as another one. The
probability of the refusal is no measure of it: where a model is unsure of its words, as in the languages that it knows least,
every answer is unlikely, and one of 8 % is the likeliest. This is the adaptive
coefficient of Ziegler et al. (2019), "Fine-Tuning Language Models from Human Preferences", arXiv 1909.08593, section 2.2, once for
each language::

    weight  <-  weight * exp(0.02 * clip(mean / target - 1, -1, 5))

There it is ``1 + 0.1 e`` with an error e of one batch, clipped at 0.2 on both sides. A step here has a few pairs of a language, of
which one in many has moved far, by many times the target: so the mean is a running one, the gain is small, and the clip lets such a
pair count as much as the many that have not moved, which leaves the weight where it is around the target. In the first
steps nothing has moved, so a weight falls only after its language has been at the target once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpo.common.log import get_logger
from mpo.common.words import listed
from mpo.modeling.pairs import PairTensors
from mpo.training.ranks import Ranks

logger = get_logger(__name__)

GAIN = 0.02
LARGEST_ERROR = 5.0
SHARPNESS = 3.0
"""The exponent. The higher, the nearer to the share, and the later it says that a refusal is coming."""
DECAY, SLOW_DECAY = 0.9, 0.98
"""Of the running mean that the weights follow, and of that by which a language is judged: a step weighs a tenth, a fiftieth."""
LOWEST, HIGHEST = 0.1, 10.0
"""Bounds of a weight, as multiples of the one that it began with. Where ten times holds too little, a hundred times holds no more and
lets nothing else be learned."""
_MISSED = 2.0  # times the target
_FIELDS = ("log_change", "reached", "mean", "seen", "slow_mean", "slow_seen")


class RetentionWeights:
    """The weights, one for each language.

    Args:
        languages: A pair's language is its index here.
        weight: What they begin with.
        target: Mean of a language that they aim at, above 0.
        device: Where the pairs are.
        of_refusals: Whether that is the share of harmless prompts that are refused, not the mean retention.
    """

    def __init__(
        self,
        languages: Sequence[str],
        weight: float,
        target: float,
        device: torch.device | str = "cpu",
        *,
        of_refusals: bool = False,
    ) -> None:
        self._languages, self._first, self._target = list(languages), weight, target
        self._of_refusals = of_refusals
        # Per language: log of weight / first weight; whether the mean has been at the target; running means of what has one, each
        # with the share of it that has been seen.
        self._state = {name: torch.zeros(len(languages), device=device) for name in _FIELDS}
        self._sums = torch.zeros((2, len(languages)), device=device)

    @classmethod
    def of(
        cls, args: Any, languages: Sequence[str], device: torch.device | str, *, harmless: bool
    ) -> RetentionWeights | None:
        """Those of a run's ``MPOConfig``, or None where it sets no target or ``harmless`` says that no group is harmless."""
        of_refusals = args.harmless_refusal_target is not None
        target = args.harmless_refusal_target if of_refusals else args.harmless_retain_target
        if not harmless or target is None:
            return None
        return cls(languages, args.harmless_retain_weight, target, device, of_refusals=of_refusals)

    @property
    def values(self) -> Tensor:
        """The weights, ``[languages]``."""
        return self._first * self._state["log_change"].exp()

    def add(self, pairs: PairTensors, counts: Tensor) -> None:
        """Add the harmless ones of this optimizer step's pairs, without waiting for the device.

        Args:
            pairs: T pairs.
            counts: ``[T]``, 1 for a pair that counts, 0 for a filler.
        """
        if pairs.is_harmless is None:
            return
        counts = (counts * pairs.is_harmless).to(self._sums.dtype)
        if self._of_refusals:
            assert pairs.below_greedy is not None
            values = (SHARPNESS * pairs.below_greedy[:, 1]).exp()
        else:
            values = pairs.retention.detach()
        self._sums.index_add_(1, pairs.language, torch.stack([values.to(self._sums.dtype) * counts, counts]))

    def forget_step(self) -> None:
        """Leave out what was added since the last :meth:`step`: the optimizer does not take that step."""
        self._sums.zero_()

    def step(self, ranks: Ranks, *, taken: bool = True) -> None:
        """Adapt the weights to the pairs added since the last call, of all ranks, which call this together.

        Args:
            ranks: The process group.
            taken: False on all ranks for a step that the optimizer skips, whose pairs do not count.
        """
        if not taken:
            self.forget_step()
            return
        if ranks.num_processes > 1:
            torch.distributed.all_reduce(self._sums)
        total, count = self._sums
        is_there, state = count > 0, self._state
        for prefix, decay in (("", DECAY), ("slow_", SLOW_DECAY)):
            part = torch.where(is_there, 1 - decay, 0.0)
            mean, seen = state[f"{prefix}mean"], state[f"{prefix}seen"]
            mean += part * (total / count.clamp(min=1) - mean)
            seen += part * (1 - seen)
        error = (self._means("") / self._target - 1).clamp(-1, LARGEST_ERROR)
        state["reached"].clamp_(min=(is_there & (error >= 0)).to(error.dtype))
        error = torch.where(state["reached"] > 0, error, error.clamp(min=0)) * is_there
        state["log_change"].add_(GAIN * error).clamp_(math.log(LOWEST), math.log(HIGHEST))
        self._sums.zero_()

    def _means(self, prefix: str) -> Tensor:
        return self._state[f"{prefix}mean"] / self._state[f"{prefix}seen"].clamp(min=1e-12)

    def log(self) -> dict[str, float]:
        """``harmless/retain_weight/<language>`` and the running mean of those seen, ``harmless/retention/<language>`` or
        ``harmless/refusal/<language>``."""
        found, name = {}, "refusal" if self._of_refusals else "retention"
        for language, weight, mean in self._of_seen(self.values, self._means("")):
            found[f"harmless/retain_weight/{language}"] = weight
            found[f"harmless/{name}/{language}"] = mean
        return found

    def missed(self) -> dict[str, float]:
        """Mean over about the last fifty steps of each language where it is more than twice the target."""
        means = self._of_seen(self._means("slow_"))
        return {language: mean for language, mean in means if mean > _MISSED * self._target}

    def warn_if_missed(self) -> None:
        """At the end of a run: say in which languages the target was not held."""
        if missed := self.missed():
            name = "harmless_refusal_target" if self._of_refusals else "harmless_retain_target"
            what = (
                "more harmless prompts of the data are refused"
                if self._of_refusals
                else "answers to harmless prompts have moved further"
            )
            logger.warning(
                f"`{name}: {self._target:g}` was not held in "
                f"{listed(f'{code} ({mean:.2g})' for code, mean in missed.items())}: there, {what}. Train for longer or at a "
                "lower rate, begin with a higher `harmless_retain_weight`, or add harmless prompts in these languages."
            )

    def summary(self) -> str:
        """Mean over about the last fifty steps and weight of each language, in one line; and which have never been at the target."""
        rows = self._of_seen(self._means("slow_"), self.values, self._state["reached"])
        held = listed(
            f"{language} {mean:.3f} (weight {weight:.3g}{'' if reached else ', as it began'})"
            for language, mean, weight, reached in rows
        )
        what = "Share refused" if self._of_refusals else "Retention"
        return f"{what} of harmless prompts, target {self._target:g}: {held}"

    def _of_seen(self, *columns: Tensor) -> list[tuple[Any, ...]]:
        rows = zip(
            self._languages,
            self._state["seen"].tolist(),
            *(column.tolist() for column in columns),
            strict=True,
        )
        return [(language, *values) for language, seen, *values in rows if seen]

    def state(self) -> dict[str, dict[str, float]]:
        """What :meth:`restore` takes, ready for JSON."""
        lists = {name: values.tolist() for name, values in self._state.items()}
        return {
            language: {name: values[place] for name, values in lists.items()}
            for place, language in enumerate(self._languages)
        }

    def restore(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Go on from what :meth:`state` returned; a language that is not in it begins anew."""
        self.forget_step()
        for name, values in self._state.items():
            own = [state.get(language, {}).get(name, 0.0) for language in self._languages]
            values.copy_(torch.tensor(own))
