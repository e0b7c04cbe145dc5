"""Floating-point operations of one epoch, counted for each way of computing the same MPO step.

No timing, no weights: models are built on torch's ``meta`` device and ``torch.utils.flop_counter`` counts what their
operators would do. It runs anywhere.

    python -m benchmarks.flops --lengths token_lengths.csv --file gemma

**How it counts.** The operations of a model call are a polynomial: so many per token for the linear layers (L), so many
per pair of tokens whose attention score is computed (A), so many per token whose logits are computed (H). The counter
is run on the whole model, with its backward pass, at two lengths, which gives L and A; a call at a third length checks
them; H is counted on the head. An epoch is then summed over the lengths of the data:

    operations of a call = L * tokens + A * scores + H * tokens at the head

Multiplications and additions count one each. Norms, softmax, rotary embeddings and the optimizer count nothing, here as
in every such figure.

**What the counter does not see.** It has no formula for the in-place ``addmm_`` of TRL's log-likelihood kernel; it gets
one here. It counts attention under a mask in full. So does the first table: the scores are those that the attention
computes, ``rows * length ** 2`` where a mask covers a whole row, the sum of ``length ** 2`` over the branches of all
trees where the trees' own attention runs (:mod:`mpo.modeling.tree_attention`). The second table counts only the scores that a
token may see, for every formulation alike: what a kernel that skips masked blocks comes close to.

**The formulations.** Of all pairs of a group:

- official: as in the paper's code. Each target pair alone. The policy runs target and source, the reference, which is
  live, runs the source; chosen and rejected are two padded rows, their length a multiple of 8. Logits of every token.
- official, batched: the same with all pairs of a group in one batch.
- TRL DPO: a yardstick with another objective. The policy and the live reference run the target pairs, padded together;
  logits of response tokens only.
- padded: the trainer's padded layout. The source once, no reference model, logits of target response tokens only.
- trees, masked rows: preference trees in rows of at most ``--row_tokens`` tokens, under a dense mask.
- trees: preference trees in one row, attended branch by branch. The trainer's default.

The reference of the last three is one pass over the unique sources, done once, whatever the number of epochs; it is a
line of its own.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PretrainedConfig
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from benchmarks import command, lengths
from benchmarks.lengths import GroupLengths, PairLengths
from mpo.common.tables import TextTable
from mpo.errors import ConfigError
from mpo.modeling.logprobs import FrozenHeadLogProbs
from mpo.modeling.masks import attention_mask
from mpo.modeling.trees import even_rows
from mpo.planning.known_models import shape_config

DEFAULT_SHAPES = ("llama-3.1-8b", "gemma-2-9b", "qwen2.5-7b")
FORMULATIONS = ("official", "official, batched", "TRL DPO", "padded", "trees, masked rows", "trees")
REFERENCE = "reference pass, once"


def _in_place_addmm(target: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    """Operations of ``target += left @ right``, from the shapes."""
    return 2 * left[0] * left[1] * right[1]


_FORMULAS = {torch.ops.aten.addmm_: _in_place_addmm}


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count floating-point operations, with attention written out so that the counter sees it."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        yield counter


def count(function: Callable[[], Any]) -> int:
    """Floating-point operations of a function."""
    with counting() as counter:
        function()
    total: int = counter.get_total_flops()
    return total


# ---- The cost of a model's parts -----------------------------------------------------------------------------------


class Backbone(NamedTuple):
    """Operations of everything below the LM head: ``token`` per token, ``score`` per pair of tokens and attended."""

    token: int
    score: int

    def of(self, tokens: int, scores: int) -> int:
        return self.token * tokens + self.score * scores


@dataclass(frozen=True)
class Costs:
    """
    What a model's parts cost.

    Attributes:
        train: backbone of the policy, forward and backward.
        reference: backbone of the reference, forward.
        policy: backbone of the policy, forward.
        logits: a token's logits, forward.
        logits_train: a token's logits, forward and backward.
        kernel_train: a token's log-likelihood in TRL's kernel, forward and backward; forward alone is as ``logits``.
        own_train: the same in the trainer's head.
        lora: rank of the adapter, 0 for full fine-tuning.
    """

    train: Backbone
    reference: Backbone
    policy: Backbone
    logits: int
    logits_train: int
    kernel_train: int
    own_train: int
    lora: int


def measure(config: PretrainedConfig, lora: int = 16) -> Costs:
    """
    Count what the parts of a model cost.

    Args:
        config: of the model, of any size; nothing is allocated.
        lora: rank of an adapter on all linear layers, 0 for full fine-tuning.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
        if lora:
            model = get_peft_model(model, LoraConfig(r=lora, target_modules="all-linear"))
    head = model.get_output_embeddings().weight.shape
    options = {"head_trained": not lora}
    return Costs(
        train=_backbone(model, trained=True),
        reference=_backbone(model, trained=False, adapter=False),
        policy=_backbone(model, trained=False),
        logits=_head(head, _logits, trained=False, **options),
        logits_train=_head(head, _logits, trained=True, **options),
        kernel_train=_head(head, _kernel, trained=True, **options),
        own_train=_head(head, _own if lora else _kernel, trained=True, **options),
        lora=lora,
    )


def _backbone(model: Any, trained: bool, adapter: bool = True) -> Backbone:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()

    def call(length: int) -> int:
        ids = torch.zeros((1, length), dtype=torch.long, device="meta")
        positions = torch.arange(length, device="meta")[None]
        mask = attention_mask(config, ids, ids, positions, base.dtype)

        def run() -> None:
            hidden = base.base_model(
                input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
            ).last_hidden_state
            if trained:
                hidden.sum().backward()

        off = model.disable_adapter() if not adapter and base is not model else nullcontext()
        with torch.set_grad_enabled(trained), off:
            return count(run)

    # a * n + b * n^2 at n = 8 and 16, and a third point to see that this is all there is.
    first, second, third = call(8), call(16), call(40)
    score, rest = divmod(second - 2 * first, 2 * 8 * 8)
    token, more = divmod(first - score * 8 * 8, 8)
    if rest or more or third != token * 40 + score * 40 * 40:
        raise ConfigError(
            f"the operations of {config.model_type} are no quadratic function of the length ({first}, {second} and "
            f"{third} at 8, 16 and 40 tokens), so an epoch cannot be summed from them."
        )
    return Backbone(token, score)


def _head(
    shape: torch.Size, log_probs: Callable[..., torch.Tensor], *, head_trained: bool, trained: bool
) -> int:
    tokens = 8

    # Tensors without memory, of a device type that TRL's kernel can ask about autocast.
    with FakeTensorMode(), torch.set_grad_enabled(trained):
        weight = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=head_trained)
        hidden = torch.zeros((tokens, shape[1]), dtype=torch.bfloat16, requires_grad=trained)
        labels = torch.zeros(tokens, dtype=torch.long)

        def run() -> None:
            values = log_probs(hidden, weight, labels)
            if trained:
                values.sum().backward()

        return count(run) // tokens


def _logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight).float()
    return torch.log_softmax(logits, dim=-1).gather(1, labels[:, None])


def _kernel(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    values: torch.Tensor = ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, 32768, None, 1.0, ()
    )[0]
    return values


def _own(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    values: torch.Tensor = FrozenHeadLogProbs.apply(hidden, weight, None, labels, None, 1.0, True)[0]
    return values


# ---- The calls of each formulation ---------------------------------------------------------------------------------


class Call(NamedTuple):
    """
    One call of a model.

    Attributes:
        part: backbone, a field of :class:`Costs`.
        tokens: places of all rows, padding included.
        scores: pairs of tokens whose attention is computed.
        visible: pairs of tokens of which one may see the other.
        head: which cost of the head, a field of :class:`Costs`, or None.
        head_tokens: tokens whose logits are computed.
    """

    part: str
    tokens: int
    scores: int
    visible: int
    head: str | None = None
    head_tokens: int = 0

    def operations(self, costs: Costs, visible_only: bool = False) -> int:
        backbone: Backbone = getattr(costs, self.part)
        total = backbone.of(self.tokens, self.visible if visible_only else self.scores)
        return total + (getattr(costs, self.head) * self.head_tokens if self.head else 0)


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def visible_scores(pair: PairLengths) -> int:
    """Pairs of tokens of a tree of which one sees the other: the prompt once, each branch with it."""
    prompt = _triangle(pair.prompt)
    return sum(_triangle(branch) for branch in pair.branches) - prompt


def padded(part: str, pairs: Sequence[PairLengths], multiple: int = 1, **head: Any) -> Call:
    """A call on two rows for each pair, all as long as the longest."""
    length = -(-max(max(pair.branches) for pair in pairs) // multiple) * multiple
    rows = 2 * len(pairs)
    visible = sum(_triangle(branch) for pair in pairs for branch in pair.branches)
    return Call(part, rows * length, rows * length**2, visible, **head)


def _official(pairs: Sequence[PairLengths], sources: Sequence[PairLengths]) -> Iterator[Call]:
    for part, batch, head in (
        ("train", sources, "logits"),
        ("train", pairs, "logits_train"),
        ("reference", sources, "logits"),
    ):
        call = padded(part, batch, multiple=8)
        yield call._replace(head=head, head_tokens=call.tokens)


def trees(part: str, trees: Sequence[PairLengths], row_tokens: int | None = None, **head: Any) -> Call:
    """A call on trees in rows of at most ``row_tokens`` under a mask, or in one row attended branch by branch."""
    visible = sum(map(visible_scores, trees))
    if row_tokens is None:
        scores = sum(branch**2 for tree in trees for branch in tree.branches)
        return Call(part, sum(tree.tree for tree in trees), scores, visible, **head)
    sizes = [tree.tree for tree in trees]
    rows = even_rows(sizes, row_tokens)
    length = max(sum(sizes[i] for i in row) for row in rows)
    return Call(part, len(rows) * length, len(rows) * length**2, visible, **head)


def calls(formulation: str, group: GroupLengths, row_tokens: int = 2048) -> list[Call]:
    """
    The model calls that a formulation makes for the target pairs of a group.

    Args:
        formulation: one of :data:`FORMULATIONS`, or :data:`REFERENCE`.
        group: lengths.
        row_tokens: row budget under a mask.
    """
    responses = sum(pair.responses for pair in group.targets)
    if formulation == "official":
        return [call for pair in group.targets for call in _official([pair], [group.source])]
    if formulation == "official, batched":
        return list(_official(group.targets, [group.source] * len(group.targets)))
    if formulation == "TRL DPO":
        return [
            padded("train", group.targets, head="kernel_train", head_tokens=responses),
            padded("reference", group.targets, head="logits", head_tokens=responses),
        ]
    own = {"head": "own_train", "head_tokens": responses}
    if formulation == "padded":
        return [padded("train", group.trees, **own)]
    if formulation == "trees, masked rows":
        return [trees("train", group.trees, row_tokens, **own)]
    if formulation == "trees":
        return [trees("train", group.trees, **own)]
    if formulation == REFERENCE:
        return [trees("reference", [group.source], head="logits", head_tokens=group.source.responses)]
    raise ConfigError(f"there is no formulation {formulation!r}; expected one of {', '.join(FORMULATIONS)}.")


def epoch(
    costs: Costs, groups: Sequence[GroupLengths], row_tokens: int = 2048, visible_only: bool = False
) -> dict[str, int]:
    """Operations of one epoch in each formulation, and of the one reference pass."""
    return {
        name: sum(
            call.operations(costs, visible_only)
            for group in groups
            for call in calls(name, group, row_tokens)
        )
        for name in (*FORMULATIONS, REFERENCE)
    }


# ---- The command ---------------------------------------------------------------------------------------------------


@lru_cache
def costs_of(shape: str, lora: int) -> Costs:
    """What the parts of a known shape cost."""
    return measure(shape_config(shape), lora)


def report(
    shapes: Sequence[str],
    groups: Sequence[GroupLengths],
    *,
    lora: int,
    row_tokens: int,
    name: str,
    epochs: int = 2,
) -> dict[str, Any]:
    """Count all shapes, print two tables, return the numbers."""
    found: dict[str, Any] = {}
    for visible_only in (False, True):
        kind = "scores that a token may see" if visible_only else "scores that are computed"
        rows: list[tuple[str, ...]] = []
        rules = set()
        for shape in shapes:
            costs = costs_of(shape, lora)
            totals = epoch(costs, groups, row_tokens, visible_only)
            rules.add(len(rows))
            official, ours = totals["official"], totals["trees"]
            for formulation, operations in totals.items():
                ratio = "" if formulation == REFERENCE else f"{official / operations:.2f}"
                rows.append((shape, formulation, f"{operations / 1e15:.2f}", ratio))
            with_reference = official * epochs / (ours * epochs + totals[REFERENCE])
            rows.append((shape, f"trees and reference, {epochs} epochs", "", f"{with_reference:.2f}"))
            found.setdefault(shape, {"costs": costs_dict(costs)})[
                "visible" if visible_only else "computed"
            ] = {
                "operations": totals,
                "official_over_trees": official / ours,
                "official_over_trees_and_reference": with_reference,
            }
        pairs = sum(len(group.targets) for group in groups)
        TextTable(
            title=f"{name}: {pairs} pairs, {len(groups)} sources; attention: {kind}",
            header=("Shape", "Formulation", "PFLOP", "Official / this"),
            rows=tuple(rows),
            rules=frozenset(rules - {0}),
            notes=(f"{_adaptation(lora)}; masked rows of at most {row_tokens} tokens.",),
        ).show()
        print()
    return found


def costs_dict(costs: Costs) -> dict[str, Any]:
    """The costs as plain numbers."""
    return {
        name: value._asdict() if isinstance(value, Backbone) else value for name, value in vars(costs).items()
    }


def _adaptation(lora: int) -> str:
    return f"LoRA of rank {lora} on all linear layers" if lora else "full fine-tuning"


def main() -> None:
    """Count, print and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flops", description=__doc__.splitlines()[0])
    lengths.add_options(parser)
    parser.add_argument("--shapes", nargs="+", default=list(DEFAULT_SHAPES), help="model shapes by name")
    parser.add_argument(
        "--lora", type=int, default=16, help="rank of the adapter; 0 is full fine-tuning (16)"
    )
    parser.add_argument(
        "--row_tokens", type=int, default=2048, help="row budget of trees under a mask (2048)"
    )
    parser.add_argument("--out", default="runs/benchmarks/flops.json")
    options = parser.parse_args()
    groups = lengths.from_options(options)
    name = options.file or (options.lengths or options.data).rpartition("/")[2]
    result = report(options.shapes, groups, lora=options.lora, row_tokens=options.row_tokens, name=name)
    command.save(
        options.out,
        {
            "data": name,
            "lora": options.lora,
            "row_tokens": options.row_tokens,
            "max_length": options.max_length,
            "template_tokens": options.template_tokens,
            "shapes": result,
        },
    )


if __name__ == "__main__":
    command.run(main)
