"""MPO computed the slow and obvious way, to compare everything else with.

One un-padded sequence per forward pass of the plain ``transformers`` model, the logits of the whole
vocabulary, one ``log_softmax``, all of it in float64. No trees, no packing, no masks, nothing from ``mpo``.
The formulas are those of Zhao et al., ACL 2025 (arXiv 2505.16869), written out::

    r(x, y) = (1/|y|) sum_t log pi(y_t | x, y_<t)
    RG(x)   = r(x, y_w) - r(x, y_l)
    L1      = (beta RG_theta^t - RG_ref^d)^2
    L2      = ||h_theta^d - h_ref^d||^2 / hidden_size, averaged over chosen and rejected
    L       = mean over target pairs of (L1 + lambda L2)
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.kernels.chunked_logprob import ChunkedLogProbFunction


class Exact(TorchFunctionMode):
    """
    Inside this context, float32 means float64.

    Norms, rotary embeddings, softmax and log-likelihood kernels of the libraries ask for float32 by name even
    in a float64 model, which costs eight digits.
    """

    def __enter__(self) -> Exact:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._default)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        arguments = [_widened(value) for value in args]
        return func(*arguments, **{name: _widened(value) for name, value in (kwargs or {}).items()})


class ExactLogProbFunction(ChunkedLogProbFunction):
    """
    TRL's log-likelihood kernel with its gradient in float64, too.

    Autograd runs a backward pass outside of the context its forward pass was in.
    """

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        with Exact():
            return ChunkedLogProbFunction.backward(ctx, *gradients)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class Ids(NamedTuple):
    """A preference pair as token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Group(NamedTuple):
    """A source pair and its targets as token ids, with the targets' languages."""

    source: Ids
    targets: list[Ids]
    languages: list[str]


class Scored(NamedTuple):
    """``logps``: ``[2]``, ``r`` of chosen and rejected; ``pooled``: ``[2, H]``, the pooled states of both."""

    logps: Tensor
    pooled: Tensor

    @property
    def gap(self) -> Tensor:
        return self.logps[0] - self.logps[1]


# ---- Texts to token ids ------------------------------------------------------------------------------------


def pair_ids(
    tokenizer: PreTrainedTokenizerBase, pair: Mapping[str, Any], max_length: int | None = None
) -> Ids:
    """The prompt whole, the responses what the template renders after it, cut to ``max_length`` with it."""

    def encode(messages: list[Any], generation: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    prompt = encode(pair["prompt"], True)
    whole = [encode(pair["prompt"] + pair[name], False) for name in ("chosen", "rejected")]
    common = len(prompt)
    while any(ids[:common] != prompt[:common] for ids in whole):
        common -= 1
    return Ids(prompt[:common], *(ids[common:max_length] for ids in whole))


def group_ids(
    tokenizer: PreTrainedTokenizerBase, groups: Iterable[Mapping[str, Any]], max_length: int | None = None
) -> list[Group]:
    return [
        Group(
            pair_ids(tokenizer, group["source"], max_length),
            [pair_ids(tokenizer, target, max_length) for target in group["targets"]],
            [target["language"] for target in group["targets"]],
        )
        for group in groups
    ]


# ---- One sequence ------------------------------------------------------------------------------------------


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float64 whose attention is written out, with gradients for all of its parameters."""
    model = copy.deepcopy(model).double().eval()
    # A reward-gap head that was attached to the original would have been copied with it.
    model.__dict__.pop("forward", None)
    model.set_attn_implementation("eager")
    model.requires_grad_(True)
    model.zero_grad()
    return model


def run_sequence(model: PreTrainedModel, ids: Sequence[int], **options: Any) -> Any:
    """The model's own output for one sequence, with hidden states."""
    with Exact():
        return model(
            input_ids=torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False, **options
        )


def score_sequence(
    model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int], pooling: str
) -> tuple[Tensor, Tensor]:
    """``r(x, y)`` and the pooled final hidden state ``[H]`` of prompt and response."""
    output = run_sequence(model, [*prompt, *response])
    log_probs = torch.log_softmax(output.logits[0], dim=-1)
    likelihood = log_probs.new_zeros(())
    for place, token in enumerate(response):
        likelihood = likelihood + log_probs[len(prompt) + place - 1, token]
    states = output.hidden_states[-1][0]
    pooled = states.mean(dim=0) if pooling == "mean" else states[-1]
    return likelihood / len(response), pooled


def score_pair(model: PreTrainedModel, pair: Ids, pooling: str = "mean") -> Scored:
    chosen, chosen_state = score_sequence(model, pair.prompt, pair.chosen, pooling)
    rejected, rejected_state = score_sequence(model, pair.prompt, pair.rejected, pooling)
    return Scored(torch.stack([chosen, rejected]), torch.stack([chosen_state, rejected_state]))


# ---- The objective -----------------------------------------------------------------------------------------


def retention(policy: Scored, reference: Scored) -> Tensor:
    """``L2`` of one source."""
    hidden_size = policy.pooled.shape[1]
    chosen, rejected = (((policy.pooled[i] - reference.pooled[i]) ** 2).sum() / hidden_size for i in (0, 1))
    return (chosen + rejected) / 2


def reference_values(model: PreTrainedModel, groups: Sequence[Group], pooling: str) -> list[Scored]:
    """``RG_ref^d`` and ``h_ref^d`` of each group's source."""
    with torch.no_grad():
        return [score_pair(model, group.source, pooling) for group in groups]


def pair_losses(
    model: PreTrainedModel,
    groups: Sequence[Group],
    reference: Sequence[Scored],
    *,
    beta: float = 1.0,
    retain_weight: float = 1.0,
    pooling: str = "mean",
) -> list[tuple[str, Tensor]]:
    """Language and ``L1 + lambda L2`` of every target pair."""
    losses = []
    for group, constant in zip(groups, reference, strict=True):
        kept = retention(score_pair(model, group.source, pooling), constant) if retain_weight else 0.0
        for language, target in zip(group.languages, group.targets, strict=True):
            gap = score_pair(model, target).gap
            losses.append((language, (beta * gap - constant.gap) ** 2 + retain_weight * kept))
    return losses


def step_loss(
    model: PreTrainedModel,
    groups: Sequence[Group],
    reference: Sequence[Scored],
    *,
    language_weights: Mapping[str, float] | None = None,
    **options: Any,
) -> Tensor:
    """
    The mean over all target pairs, each weighing what its language weighs.

    Weights are scaled so that their mean over these pairs is 1; a language that is not named weighs 1 before.
    """
    losses = pair_losses(model, groups, reference, **options)
    weights = [(language_weights or {}).get(language, 1.0) for language, _ in losses]
    return sum(weight * loss for weight, (_, loss) in zip(weights, losses, strict=True)) / sum(weights)


def gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of every parameter, zero where the loss does not depend on one."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
    }


def router_loss(model: PreTrainedModel, passes: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """
    Load-balancing loss of a mixture of experts (Fedus et al., 2021, equations 4 to 6, with the top k experts
    counted): the number of experts times the sum over experts of (share of the tokens sent there) x (mean
    probability), tokens of all layers taken together.

    Args:
        passes: sequences, each with the places of the tokens that count.
    """
    probabilities = []
    for ids, places in passes:
        for layer in run_sequence(model, ids, output_router_logits=True).router_logits:
            probabilities.append(torch.softmax(layer.view(len(ids), -1)[list(places)], dim=-1))
    table = torch.cat(probabilities)
    tokens, experts = table.shape
    sent = torch.zeros(experts, dtype=torch.float64)
    for row in table.detach():
        for expert in row.argsort(descending=True)[: model.config.num_experts_per_tok]:
            sent[expert] += 1
    return experts * sum(sent[e] / tokens * table[:, e].mean() for e in range(experts))


# ---- LoRA --------------------------------------------------------------------------------------------------


def add_lora(model: PreTrainedModel, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> None:
    """
    Give linear layers the weight ``W + scale B A``, as a function of ``A`` and ``B``.

    Args:
        model: from :func:`plain_model`.
        factors: ``(A [r, in], B [out, r])`` of each layer, by its name in the model.
    """
    for name, (a, b) in factors.items():
        layer = model.get_submodule(name)
        frozen = layer._parameters.pop("weight").detach()
        layer.weight = frozen + scale * (b @ a)


# ---- Comparing ---------------------------------------------------------------------------------------------


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||``; where nothing was expected, ``||actual||``."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm()) / (float(expected.norm()) or 1.0)


def assert_same_tensors(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float
) -> None:
    """Every tensor is there and differs by at most ``tolerance``, each measured against its own size."""
    assert set(actual) == set(expected)
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def random_pair(rng: random.Random, longest: int = 9, vocabulary: tuple[int, int] = (10, 500)) -> Ids:
    """Random ids in three parts of 1 to ``longest`` tokens; often both responses begin with the same ones."""

    def part() -> list[int]:
        return [rng.randrange(*vocabulary) for _ in range(rng.randint(1, longest))]

    prompt, chosen, rejected = part(), part(), part()
    if rng.random() < 0.3:
        rejected = [*chosen[: rng.randint(1, len(chosen))], *rejected][:longest]
    return Ids(prompt, chosen, rejected)
