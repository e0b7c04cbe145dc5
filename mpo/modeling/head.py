"""The reward-gap head: what MPO reads from a model, in one call of it.

The head is attached to the model's ``forward``, so the one call goes through whatever wraps the model: PEFT,
DistributedDataParallel, FSDP or DeepSpeed. It runs the LM head only at the positions where what it says is needed, in
tiles, and never builds the logits of a whole row.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from mpo.errors import ModelError
from mpo.modeling.layers import decoder_of, watching
from mpo.modeling.logprobs import FrozenHeadDivergence, FrozenHeadLogProbs, below_greedy
from mpo.modeling.loss import segment_mean, segment_sum
from mpo.modeling.masks import attention_mask as tree_attention_mask
from mpo.modeling.tree_attention import IMPLEMENTATION as TREE_IMPLEMENTATION

# Width of a vocabulary tile. A tile of 4096 tokens x 32768 words fills a GPU; a CPU's cache prefers it narrower.
_TILE_WIDTH = {"cpu": 8192}
_TILE_WIDTH_DEFAULT = 32768


@dataclass
class RewardGapOutput(ModelOutput):
    """What one call of a model with the reward-gap head returns.

    Attributes:
        response_logps: ``[T, 2]``, mean log-likelihood per token of the chosen and the rejected response of each scored
            tree, in nats, float32.
        first_logps: ``[T, 2]``, log-likelihood of each response's first token, float32.
        below_greedy: ``[T, 2]``, how far the log-likelihood of each response is below that of what greedy decoding takes in place of
            each of its tokens, summed over them: 0 where it would say just this; no gradient; where the batch asks for it.
        pooled: ``[P, 2, H]``, pooled final hidden state (after the final norm) of prompt + chosen and prompt +
            rejected of each pooled tree, float32.
        shared_logps: ``[T, 2]``, log-likelihood of as many first tokens of each response as the shorter one has, summed;
            where the batch asks for it.
        prompt_logps: ``[T]``, log-likelihood of the prompt's tokens but its first, summed; where the batch asks for it.
        prompt_states: ``[Q, H]``, hidden state of the prompt's token that each tree asks for, after the final norm or, with
            ``state_layer``, at that layer; float32.
        kept_states: ``[N, H]``, final hidden states of the tokens that are kept, of one tree after another, float32; where
            the batch has no states to compare them with.
        moved: ``[K]``, how far each kept tree is from the states that the batch has, in the mean of three parts: the mean over
            the prompt's tokens before its last one; the decision, that is the last one and each token of the rejected response
            times the probability of coming to it; and the mean over the chosen response. It is of a divergence of the next token
            in nats with ``kept_by``, ``KL(p_ref || p)`` with ``"kl"``, ``KL(p || p_ref)`` with ``"reverse_kl"``, and with
            ``"mixed_kl"`` the former in the first of these parts and the latter in the others; else of
            ``||h - h_ref||^2 / hidden_size``.
        aux_loss: Scalar, the load-balancing loss of a mixture-of-experts model, else None.
    """

    response_logps: Tensor | None = None
    first_logps: Tensor | None = None
    below_greedy: Tensor | None = None
    pooled: Tensor | None = None
    shared_logps: Tensor | None = None
    prompt_logps: Tensor | None = None
    prompt_states: Tensor | None = None
    kept_states: Tensor | None = None
    moved: Tensor | None = None
    aux_loss: Tensor | None = None


def attach_reward_gap_head(model: PreTrainedModel) -> None:
    """Add the head to a causal language model: ``model(reward_gap_head=True, **batch)`` returns a
    :class:`RewardGapOutput`, where ``batch`` holds the tensors of :func:`mpo.modeling.trees.build_batch`.

    Without ``reward_gap_head`` the model's forward is unchanged, so generation and saving are, too. Attaching twice does
    nothing. Attach to the bare model, before PEFT or any sharding wraps it.

    Raises:
        ModelError: The model has no output embeddings, so it is not a causal language model.
    """
    if getattr(model, "_has_reward_gap_head", False):
        return
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ModelError(
            f"{type(model).__name__} has no LM head; MPO needs a causal language model (AutoModelForCausalLM)."
        )
    if "forward" in vars(model):  # a wrapper that was put on this one model, for example by Accelerate
        model._forward_without_head = model.forward  # type: ignore[assignment]

    # `generate` validates its arguments against the signature, so the original one is kept.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, reward_gap_head: bool = False, **kwargs: Any) -> Any:
        if reward_gap_head:
            return _reward_gap_forward(self, **kwargs)
        # Both are looked up on `self`, which in a copy of the model is the copy.
        own = vars(self).get("_forward_without_head")
        return type(self).forward(self, *args, **kwargs) if own is None else own(*args, **kwargs)

    model.forward = types.MethodType(forward, model)
    model._has_reward_gap_head = True  # type: ignore[assignment]


def _reward_gap_forward(
    model: PreTrainedModel,
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    score_index: Tensor,
    score_labels: Tensor,
    score_lengths: Tensor,
    pool_index: Tensor,
    pool_lengths: Tensor,
    attention_mask: Tensor | None = None,
    tree_ids: Tensor | None = None,
    branch_ids: Tensor | None = None,
    tree_spans: tuple[int, ...] | None = None,
    score_shared: Tensor | None = None,
    score_greedy: bool = False,
    prompt_index: Tensor | None = None,
    prompt_labels: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    state_index: Tensor | None = None,
    state_layer: int | None = None,
    kept_index: Tensor | None = None,
    kept_lengths: Tensor | None = None,
    kept_paths: Tensor | None = None,
    kept_prompts: Tensor | None = None,
    kept_answers: Tensor | None = None,
    kept_states: Tensor | None = None,
    kept_by: str | None = None,
    output_router_logits: bool = False,
    **ignored: Any,
) -> RewardGapOutput:
    config = model.config.get_text_config()
    real_tokens = attention_mask
    mask: Any = attention_mask
    if tree_ids is not None:
        assert branch_ids is not None
        mask = tree_attention_mask(
            config, tree_ids, branch_ids, position_ids, _compute_dtype(model, input_ids)
        )
        real_tokens = tree_ids >= 0
    extra: dict[str, Any] = {"output_router_logits": True} if output_router_logits else {}
    if config._attn_implementation == TREE_IMPLEMENTATION and tree_spans is not None:
        extra["tree_spans"] = tree_spans
    between: dict[int, Tensor] = {}
    # The states after the last layer are those after the norm, as in transformers' `hidden_states`.
    if state_layer is None or state_layer == config.num_hidden_layers:
        watch: Any = nullcontext()
    else:
        watch = watching(decoder_of(model), [state_layer], between.__setitem__)
    with watch:
        # Looked up at each call, since PEFT and FSDP replace modules after the head was attached.
        outputs = model.base_model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False, **extra
        )
    hidden = outputs.last_hidden_state.flatten(0, 1)
    prompts = None
    if prompt_index is not None and prompt_labels is not None and prompt_lengths is not None:
        prompts = (prompt_index, prompt_labels, prompt_lengths)
    kept = None
    if kept_index is not None:
        kept = _Kept(kept_index, kept_lengths, kept_paths, (kept_prompts, kept_answers), kept_states, kept_by)
    scores = _log_likelihoods(
        model,
        config,
        hidden,
        (score_index, score_labels, score_lengths),
        score_shared,
        score_greedy,
        prompts,
        None if kept is None or kept.states is None else kept,
    )
    return RewardGapOutput(
        pooled=_pooled(hidden, pool_index, pool_lengths),
        prompt_states=None if state_index is None else _states(_at_layer(hidden, between), state_index),
        kept_states=_states(hidden, kept.places) if kept is not None and kept.states is None else None,
        **scores,
        aux_loss=_router_loss(config, outputs, real_tokens) if output_router_logits else None,
    )


def _at_layer(hidden: Tensor, between: dict[int, Tensor]) -> Tensor:
    """The states ``[tokens, hidden]`` of the layer that was watched, the final ones where none was."""
    for layer, states in between.items():
        if hidden.requires_grad and not states.requires_grad:
            raise ModelError(
                f"No gradient comes to the states of layer {layer} (`state_layer`): nothing is trained below, or its activations are "
                "recomputed in a way that hides them. Choose a higher layer, or set `gradient_checkpointing: false`."
            )
        return states.flatten(0, 1)
    return hidden


@torch.compiler.disable
def _states(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden.index_select(0, index).to(torch.promote_types(hidden.dtype, torch.float32))


@torch.compiler.disable
def _pooled(hidden: Tensor, index: Tensor, lengths: Tensor) -> Tensor:
    if lengths.numel() == 0:
        return hidden.new_zeros(
            (0, 2, hidden.shape[-1]), dtype=torch.promote_types(hidden.dtype, torch.float32)
        )
    return segment_mean(hidden.index_select(0, index), lengths).unflatten(0, (-1, 2))


class _Kept(NamedTuple):
    """The tokens that are kept, see :func:`mpo.modeling.trees.build_batch`, the reference's states there, if they are known, and
    the divergence they are held by. ``kinds`` are the places of prompts' and of answers' among them."""

    places: Tensor
    lengths: Any
    paths: Any
    kinds: Any
    states: Any
    by: str | None


def _mean_of_parts(distances: Tensor, logps: Tensor, kept: _Kept) -> Tensor:
    """``[K]``, the mean of each tree's three parts, those that have a token: prompt, decision and chosen response.

    In one mean over all tokens those that the answer is decided at would be few of a hundred. A language may begin answers and
    refusals with one token; then the next ones decide, on a path that no answer takes. So the rejected response belongs to the
    decision, each of its tokens as far as the model would come to it::

        D(x) + sum_t p(y_1 .. y_t | x) D(x, y_1 .. y_t)

    which is what a divergence of whole answers, ``KL(p || p_ref)``, has along this path.

    Args:
        distances: ``[M]``, of the tokens that are kept.
        logps: ``[N]``, of those that are scored.
        kept: Which they are.
    """
    lengths = kept.lengths.to(distances.device)
    sums = segment_sum(distances, lengths).unflatten(0, (-1, 4))
    scored, own = kept.paths.to(distances.device)
    # One more entry, which is 0, for the places that are -1.
    on_path = torch.cat([logps, logps.new_zeros(1)])[scored].cumsum(dim=1).exp()
    along = torch.cat([distances, distances.new_zeros(1)])[own]
    decision = sums[:, 1] + (on_path * along).sum(dim=1)
    lengths = lengths.unflatten(0, (-1, 4))
    parts = decision + sums[:, 0] / lengths[:, 0].clamp(min=1) + sums[:, 2] / lengths[:, 2].clamp(min=1)
    return parts / (lengths[:, :3] > 0).sum(dim=1)


_Scored = tuple[
    Tensor, Tensor, Tensor
]  # positions that predict tokens, the tokens, and how many belong together


@torch.compiler.disable
def _log_likelihoods(
    model: PreTrainedModel,
    config: Any,
    hidden: Tensor,
    responses: _Scored,
    shared: Tensor | None,
    greedy: bool,
    prompts: _Scored | None,
    kept: _Kept | None,
) -> dict[str, Tensor | None]:
    """The fields of :class:`RewardGapOutput` that the LM head is run for."""
    index, labels, lengths = responses
    if lengths.numel() == 0:
        nothing = hidden.new_zeros((0, 2), dtype=torch.float32)
        return {
            "response_logps": nothing,
            "first_logps": nothing,
            "below_greedy": nothing if greedy else None,
            "shared_logps": None if shared is None else nothing,
            "prompt_logps": None if prompts is None else nothing[:, 0],
        }
    if prompts is not None:
        index, labels = torch.cat([index, prompts[0]]), torch.cat([labels, prompts[1]])
    # One call of the head for all: where it is sharded, a call is a collective.
    divergent = kept if kept is not None and kept.by else None
    values, below, distances = _token_logps(model, config, hidden, index, labels, greedy, divergent)
    lengths = lengths.to(values.device)
    found: dict[str, Tensor | None] = {}
    if kept is not None:
        if not kept.by:
            own = _states(hidden, kept.places)
            distances = (own - kept.states.to(own)).square().mean(dim=-1).to(values.device)
        found["moved"] = _mean_of_parts(distances, values, kept)
    if prompts is not None:
        values, rest = values.split([responses[0].shape[0], prompts[0].shape[0]])
        found["prompt_logps"] = segment_sum(rest, prompts[2].to(values.device))
    per_response = {
        "response_logps": segment_mean(values, lengths),
        "first_logps": values.index_select(0, lengths.cumsum(0) - lengths),
    }
    if shared is not None:
        per_response["shared_logps"] = segment_sum(values * shared.to(values.device), lengths)
    if greedy:
        per_response["below_greedy"] = segment_sum(below[: len(values)].detach(), lengths)
    return found | {name: of_each.unflatten(0, (-1, 2)) for name, of_each in per_response.items()}


def _token_logps(
    model: PreTrainedModel,
    config: Any,
    hidden: Tensor,
    index: Tensor,
    labels: Tensor,
    greedy: bool,
    kept: _Kept | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-likelihood ``[N]`` of each token under the state before it, with ``greedy`` how far that is below what greedy decoding
    takes, and the divergence ``[M]`` at each kept one; empty where they are not asked for."""
    head = model.get_output_embeddings()
    # With a model split over devices (`device_map`), the last layer may lie elsewhere than the head.
    device = head.weight.device

    def log_probs(states: Tensor) -> Tensor:
        scored, held = states.split([index.shape[0], states.shape[0] - index.shape[0]])
        weight, bias = head.weight, getattr(head, "bias", None)
        if isinstance(weight, DTensor):
            raise ModelError(
                "the LM head is split over devices (tensor parallelism), which the reward-gap head does not read. Shard the "
                "model with FSDP2 or DeepSpeed instead (recipes/accelerate)."
            )
        softcap, scale = getattr(config, "final_logit_softcapping", None), logit_scale(config)
        below: Tensor | None
        if _is_frozen(weight, bias, scored):
            needs_gradient = torch.is_grad_enabled() and scored.requires_grad
            values, below = FrozenHeadLogProbs.apply(
                scored, weight, bias, labels.to(device), softcap, scale, needs_gradient, greedy
            )
        else:
            tile_width = _TILE_WIDTH.get(device.type, _TILE_WIDTH_DEFAULT)
            values = ChunkedLogProbFunction.apply(
                scored, weight, bias, labels.to(device), 1.0, tile_width, softcap, scale, ()
            )[0]
            below = below_greedy(scored, weight, bias, labels.to(device), softcap, scale) if greedy else None
        parts = [values] if below is None else [values, below]
        if kept is None:
            return torch.cat(parts)
        own, then = held.to(weight.dtype), kept.states.to(device)

        def divergence(own: Tensor, then: Tensor, reverse: bool) -> Tensor:
            with torch.autocast(device.type, enabled=False):
                found: Tensor = FrozenHeadDivergence.apply(
                    own, then, weight, bias, softcap, scale, held.requires_grad, reverse
                )
            return found.to(values.dtype)

        if kept.by != "mixed_kl":
            return torch.cat([*parts, divergence(own, then, kept.by == "reverse_kl")])
        kinds = [places.to(device) for places in kept.kinds]
        both = [divergence(own[places], then[places], bool(reverse)) for reverse, places in enumerate(kinds)]
        return torch.cat([*parts, torch.cat(both)[torch.argsort(torch.cat(kinds))]])

    read = index if kept is None else torch.cat([index, kept.places])
    found = _call_as(head, log_probs, hidden.index_select(0, read).to(device))
    scored, held = index.shape[0], read.shape[0] - index.shape[0]
    return found.split([scored, scored if greedy else 0, held])


def _call_as(module: nn.Module, function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Call a module with another function in place of its ``forward``.

    FSDP2 and ZeRO-3 gather a module's weights, and later reduce their gradients, in hooks around its call. Whoever reads
    a weight without that call finds a shard of it, and the gradient of each rank stays its own.
    """
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        result: Tensor = module(value)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
    return result


def _is_frozen(weight: Tensor, bias: Tensor | None, hidden: Tensor) -> bool:
    """Whether the head is not trained and computes in the dtype it is stored in, as it does under LoRA."""
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    same_dtype = weight.dtype == hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        same_dtype = same_dtype and hidden.dtype == torch.get_autocast_dtype(hidden.device.type)
    return not trained and same_dtype


def logit_scale(config: Any) -> float:
    """Factor a family multiplies its logits by: Cohere and Falcon-H1 multiply, Granite and MiniCPM divide."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def _compute_dtype(model: PreTrainedModel, input_ids: Tensor) -> torch.dtype:
    device_type = input_ids.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return model.dtype


def _router_loss(config: Any, outputs: Any, real_tokens: Tensor | None) -> Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(config, "num_experts", None) or config.num_local_experts
    loss = load_balancing_loss_func(outputs.router_logits, experts, config.num_experts_per_tok, real_tokens)
    assert isinstance(loss, Tensor)
    return loss
