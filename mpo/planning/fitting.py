"""What fits: the ways to divide a model over GPUs, and the largest micro-batch of each."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpo.modeling.layout import ROW_TOKENS_DEFAULT, ROW_TOKENS_TREE_ATTENTION
from mpo.modeling.tree_attention import IMPLEMENTATION as TREE
from mpo.planning.memory import SHARDINGS, Memory, Sharding, Training, memory

TOKEN_BUDGETS = tuple(1024 * n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128))
_SMALLEST_ROW = 512


@dataclass(frozen=True)
class Choice:
    """A way to run: what is trained under which sharding.

    Attributes:
        sharding, training: Of the run.
        row: Longest packed row.
        tokens: The most that a micro-batch can have on each GPU, 0 if the run does not fit.
        memory: Of a GPU with that many tokens.
    """

    sharding: Sharding
    training: Training
    row: int
    tokens: int
    memory: Memory


def choices(
    training: Training,
    gpus: int,
    gpu_bytes: float,
    adapter: Any = None,
    *,
    needed: int,
    least: int,
    rows: Sequence[int],
    checkpointing: bool | None = None,
) -> list[Choice]:
    """Each possible sharding with the settings under which it takes ``needed`` tokens, else with those that take most.

    Args:
        training: What is trained; its own ``checkpointing`` is not looked at.
        gpus: Number of GPUs.
        gpu_bytes: Memory of each.
        adapter: ``peft`` configuration of the adapter, or None.
        needed: Tokens of the largest micro-batch.
        least: Tokens of the smallest micro-batch that is of use.
        rows: Lengths of packed rows to try, in order of preference.
        checkpointing: Whether activations are recomputed; None for what the trainer does by itself: always where the
            model is divided, elsewhere where memory asks for it.
    """
    found = []
    needed = max(least, needed)
    for sharding in SHARDINGS:
        if not possible(sharding, training, gpus):
            continue
        ways = [False, True] if sharding.engine == "torch" else [True]
        best: Choice | None = None
        for recomputes in ways if checkpointing is None else [checkpointing]:
            if best is not None and best.tokens >= needed:
                break
            variant = replace(training, checkpointing=recomputes)
            for row in rows:
                tokens, held = largest_budget(variant, sharding, gpus, gpu_bytes, row, adapter, needed, least)
                if best is None or tokens > best.tokens:
                    best = Choice(sharding, variant, row, tokens, held)
        assert best is not None
        found.append(best)
    return found


def row_lengths(given: int | None, attention: str) -> list[int]:
    """Lengths of packed rows to try: the one that is given, else the default and, under a mask, shorter ones."""
    if given is not None:
        return [given]
    if attention == TREE:
        return [ROW_TOKENS_TREE_ATTENTION]
    lengths = [ROW_TOKENS_DEFAULT]
    while lengths[-1] > _SMALLEST_ROW:
        lengths.append(lengths[-1] // 2)
    return lengths


def largest_budget(
    training: Training,
    sharding: Sharding,
    gpus: int,
    gpu_bytes: float,
    row_tokens: int,
    adapter: Any = None,
    wanted: int = TOKEN_BUDGETS[0],
    least: int = 1,
) -> tuple[int, Memory]:
    """The most tokens of a micro-batch that fit, 0 if none do, and the memory at that number (or at the least).

    Tried are :data:`TOKEN_BUDGETS` and the number that is ``wanted``, from the ``least`` that is of use.
    """
    budgets = sorted({least, *(tokens for tokens in (*TOKEN_BUDGETS, wanted) if tokens > least)})

    def needed(tokens: int) -> Memory:
        return memory(training, sharding, gpus, tokens, row_tokens, adapter)

    fitting = bisect_right(budgets, gpu_bytes, key=lambda tokens: needed(tokens).total)
    best = budgets[fitting - 1] if fitting else 0
    return best, needed(best or budgets[0])


def possible(sharding: Sharding, training: Training, gpus: int) -> bool:
    """Whether a sharding is for that many GPUs and that model."""
    if training.bits < 16 and (sharding.weights or sharding.engine == "deepspeed"):
        return False  # quantised weights are not divided
    if gpus == 1:
        return sharding.one_gpu or sharding.offload
    return not sharding.one_gpu


def best(choices: Sequence[Choice], needed: int) -> Choice | None:
    """The first choice that takes ``needed`` tokens, else the one that takes most; None if nothing fits.

    Weights wait in main memory only where nothing fits otherwise: smaller groups cost less time than moving weights.
    """
    fitting = [choice for choice in choices if choice.tokens > 0]
    fitting = [choice for choice in fitting if not choice.sharding.offload] or fitting
    for choice in fitting:
        if choice.tokens >= needed:
            return choice
    return max(fitting, key=lambda choice: choice.tokens, default=None)
