"""What the head reads from a model equals what the model's own logits and hidden states say."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    Cohere2Config,
    CohereConfig,
    GraniteConfig,
    PhiConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from mpo.errors import ModelError
from mpo.modeling.adapters import skip_input_casts
from mpo.modeling.head import attach_reward_gap_head
from mpo.modeling.trees import Tree, build_batch
from tests.plain import (
    Exact,
    ExactLogProbFunction,
    Ids,
    assert_same_tensors,
    gradients,
    plain_model,
    random_pair,
    relative_error,
    router_loss,
    run_sequence,
    score_pair,
)
from tests.tiny import build_model

_SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def other_family(name: str) -> PreTrainedModel:
    """Models whose path from the last hidden state to the logits is more than a matrix."""
    configs = {
        "cohere": lambda: CohereConfig(**_SIZES, logit_scale=0.4),
        "cohere2": lambda: Cohere2Config(**_SIZES, logit_scale=0.4, sliding_window=5),
        "granite": lambda: GraniteConfig(**_SIZES, logits_scaling=2.5, embedding_multiplier=3.0),
        "phi": lambda: PhiConfig(**_SIZES),  # a bias on the logits
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        configs[name](), attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.double().eval()


def draw(seed: int, count: int) -> list[Ids]:
    rng = random.Random(seed)
    return [random_pair(rng) for _ in range(count)]


def call(model: PreTrainedModel, trees: list[Tree], layout: str = "tree", **options: Any) -> Any:
    batch = build_batch(trees, layout=layout, max_tokens_per_row=40, pad_token_id=0, pooling="mean")
    return model(reward_gap_head=True, **batch, **options)


@pytest.mark.parametrize("family", ["cohere", "cohere2", "granite", "phi"])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_scaled_and_biased_logits_are_read_as_the_model_computes_them(
    family: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpo.modeling.head.ChunkedLogProbFunction", ExactLogProbFunction)
    model = other_family(family)
    reference = plain_model(model)
    attach_reward_gap_head(model)
    pairs = draw(1, 3)
    with Exact():
        found = call(model, [Tree(*pair) for pair in pairs], layout).response_logps
    expected = torch.stack([score_pair(reference, pair).logps for pair in pairs])
    assert relative_error(found, expected) <= 1e-9
    direction = torch.randn(3, 2, dtype=torch.float64)
    assert_same_tensors(
        gradients((found * direction).sum(), dict(model.named_parameters())),
        gradients((expected * direction).sum(), dict(reference.named_parameters())),
        1e-9,
    )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("family", "layout", "layer", "position"),
    [
        ("gemma2", "tree", None, -1),
        ("llama", "padded", 1, -2),
        ("qwen2", "tree", 0, -3),
        ("gemma2", "tree", 2, -2),
    ],
)
def test_prompts_first_tokens_and_states_are_read_where_they_are_asked_for(
    family: str,
    layout: str,
    layer: int | None,
    position: int,
    frozen: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mpo.modeling.head.ChunkedLogProbFunction", ExactLogProbFunction)
    model = build_model(family, dtype=torch.float64, tie=False)
    model.get_output_embeddings().requires_grad_(not frozen)
    reference = plain_model(model)
    attach_reward_gap_head(model)
    pairs = [*draw(5, 4), Ids([7], [11, 12, 13], [14])]  # the prompt of the last predicts nothing of its own
    said = pairs[1].prompt
    for _ in pairs[1].rejected:
        said = [*said, int(run_sequence(reference, said).logits[0, -1].argmax())]
    pairs[1] = pairs[1]._replace(rejected=said[len(pairs[1].prompt) :])
    trees = [Tree(*pair, prompt_state=position * (i % 2 == 0)) for i, pair in enumerate(pairs)]
    trees.insert(2, Tree(*draw(6, 1)[0], score=False, pool=True))
    options = {"layout": layout, "max_tokens_per_row": 40, "pad_token_id": 0, "pooling": "mean"}
    with Exact():
        batch = build_batch(trees, **options, score_prompts=True, score_shared=True)  # type: ignore[arg-type]
        found = model(reward_gap_head=True, **batch, state_layer=layer, score_greedy=True)
    prompts, shared, states, below = [], [], [], []
    for i, pair in enumerate(pairs):
        outputs = [run_sequence(reference, [*pair.prompt, *part]) for part in (pair.chosen, pair.rejected)]
        log_probs = [torch.log_softmax(output.logits[0], dim=-1) for output in outputs]
        prompts.append(
            sum(log_probs[0][t - 1, pair.prompt[t]] for t in range(1, len(pair.prompt)))
            + 0.0 * log_probs[0].sum()
        )
        least, start = min(len(pair.chosen), len(pair.rejected)), len(pair.prompt) - 1
        for part, values in zip((pair.chosen, pair.rejected), log_probs, strict=True):
            shared.append(sum(values[start + t, part[t]] for t in range(least)))
            behind = [values[start + t, token] - values[start + t].max() for t, token in enumerate(part)]
            below.append(torch.stack(behind).sum().detach())
        if i % 2 == 0:
            of_layer = outputs[0].hidden_states[-1 if layer is None else layer]
            states.append(of_layer[0, max(start + 1 + position, 0)])
    expected = [torch.stack(prompts), torch.stack(shared).view(-1, 2), torch.stack(states)]
    expected += [torch.stack([score_pair(reference, pair).logps for pair in pairs])]
    given = [found.prompt_logps, found.shared_logps, found.prompt_states, found.response_logps]
    assert found.below_greedy[1, 1] == 0 and not found.below_greedy.requires_grad
    assert relative_error(found.below_greedy, torch.stack(below).view(-1, 2)) <= 1e-9
    total, plain = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for seed, (value, wanted) in enumerate(zip(given, expected, strict=True)):
        assert value.shape == wanted.shape
        assert relative_error(value, wanted) <= 1e-9
        direction = torch.randn(
            wanted.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        total, plain = total + (value * direction).sum(), plain + (wanted * direction).sum()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert_same_tensors(
        gradients(total, {n: p for n, p in model.named_parameters() if n in trained}),
        gradients(plain, {n: p for n, p in reference.named_parameters() if n in trained}),
        1e-7,
    )


@pytest.mark.parametrize("tile", [7, 512, 600])
def test_the_width_of_the_vocabulary_tiles_changes_nothing(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpo.modeling.head._TILE_WIDTH", {"cpu": tile})
    model = build_model("gemma2", dtype=torch.float64)
    reference = plain_model(model)
    attach_reward_gap_head(model)
    pair = draw(2, 1)[0]
    with Exact():
        found = call(model, [Tree(*pair)]).response_logps
    assert relative_error(found, score_pair(reference, pair).logps[None]) <= 1e-9


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_its_flag_the_model_is_what_it_was(family: str) -> None:
    model = build_model(family)
    ids = torch.arange(20, 32)[None]
    before = model(input_ids=ids).logits
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    attach_reward_gap_head(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)


@pytest.mark.parametrize("trained", [True, False])
def test_the_lm_head_is_called_once_since_sharding_gathers_its_weights_around_that_call(
    trained: bool,
) -> None:
    model = build_model("llama").requires_grad_(trained)
    attach_reward_gap_head(model)
    weight = model.lm_head.weight
    events: list[str] = []

    def gather(module: torch.nn.Module, inputs: Any) -> None:
        events.append("gathered")
        module.weight = torch.nn.Parameter(weight.detach() * 2, requires_grad=trained)

    def divide(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        events.append("divided")
        module.weight = weight

    expected = build_model("llama")
    with torch.no_grad():
        expected.lm_head.weight.mul_(2)
    attach_reward_gap_head(expected)
    model.lm_head.register_forward_pre_hook(gather)
    model.lm_head.register_forward_hook(divide)
    trees = [Tree(*pair) for pair in draw(5, 3)]
    found = call(model, trees).response_logps
    assert events == ["gathered", "divided"]
    torch.testing.assert_close(found, call(expected, trees).response_logps)


def emptied(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.mark.usefixtures("accelerator_of_its_own")
@pytest.mark.parametrize("wrapped", ["not", "before", "after"])
def test_a_copy_computes_with_its_own_weights(wrapped: str) -> None:
    model: Any = build_model("llama")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(model) if wrapped == "before" else model
    attach_reward_gap_head(model)
    model = accelerator.prepare(model) if wrapped == "after" else model
    ids = torch.arange(20, 32)[None]
    trees = [Tree(*pair) for pair in draw(5, 2)]
    with torch.no_grad():
        logits, generated = (
            model(input_ids=ids).logits,
            model.generate(ids, max_new_tokens=4, do_sample=False),
        )
        scores = call(model, trees).response_logps
        other = emptied(copy.deepcopy(model))
        again = copy.deepcopy(other)
        again.load_state_dict(model.state_dict())
        for same in (model, again):  # a copy of a copy too
            assert torch.equal(same(input_ids=ids).logits, logits)
            assert torch.equal(same.generate(ids, max_new_tokens=4, do_sample=False), generated)
            assert torch.equal(call(same, trees).response_logps, scores)
        assert not other(input_ids=ids).logits.any()
        assert other.generate(ids, max_new_tokens=4, do_sample=False)[0, 12:].tolist() == [0] * 4
        # Every token has the same chance.
        torch.testing.assert_close(
            call(other, trees).response_logps, torch.full_like(scores, -math.log(512)), atol=1e-2, rtol=0
        )


def test_a_copy_of_an_adapted_model_computes_with_its_own_adapter() -> None:
    bare = build_model("llama")
    attach_reward_gap_head(bare)
    model = get_peft_model(bare, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    skip_input_casts(model)
    ids = torch.arange(20, 32)[None]
    with torch.no_grad():
        before, plain = model(input_ids=ids).logits, build_model("llama")(input_ids=ids).logits
        other = copy.deepcopy(model)
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        torch.testing.assert_close(other(input_ids=ids).logits, plain)
        assert torch.equal(model(input_ids=ids).logits, before) and not torch.allclose(before, plain)


def test_attaching_twice_does_nothing() -> None:
    model = build_model("llama")
    attach_reward_gap_head(model)
    forward = model.forward
    attach_reward_gap_head(model)
    assert model.forward == forward


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), BertModel(BertConfig(**_SIZES))])
def test_a_model_without_an_lm_head_is_refused(model: Any) -> None:
    with pytest.raises(ModelError, match="LM head"):
        attach_reward_gap_head(model)


def test_what_was_not_asked_for_is_not_computed() -> None:
    model = build_model("llama")
    attach_reward_gap_head(model)
    pairs = draw(3, 2)
    nothing = call(model, [Tree(*pair, False, False) for pair in pairs])
    assert nothing.response_logps.shape == (0, 2)
    assert nothing.pooled.shape == (0, 2, 32)
    assert nothing.aux_loss is None
    mixed = call(model, [Tree(*pairs[0], True, False), Tree(*pairs[1], False, True)])
    assert mixed.response_logps.shape == (1, 2)
    assert mixed.pooled.shape == (1, 2, 32)


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_the_router_loss_counts_every_token_that_was_read_and_no_padding(layout: str) -> None:
    model = build_model("mixtral", dtype=torch.float64)
    reference = plain_model(model)
    attach_reward_gap_head(model)
    pairs = draw(4, 4)
    passes: list[tuple[list[int], range]] = []
    for pair in pairs:
        chosen, rejected = [*pair.prompt, *pair.chosen], [*pair.prompt, *pair.rejected]
        # A tree reads its prompt once, two rows read it twice.
        first = len(pair.prompt) if layout == "tree" else 0
        passes += [(chosen, range(len(chosen))), (rejected, range(first, len(rejected)))]
    with Exact():
        found: Tensor = call(
            model, [Tree(*pair) for pair in pairs], layout, output_router_logits=True
        ).aux_loss
    expected = router_loss(reference, passes)
    assert relative_error(found, expected) <= 1e-9
    assert_same_tensors(
        gradients(found, dict(model.named_parameters())),
        gradients(expected, dict(reference.named_parameters())),
        1e-9,
    )


def test_states_that_no_gradient_reaches_are_refused() -> None:
    model = build_model("llama")
    attach_reward_gap_head(model)
    model.get_input_embeddings().requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    trees = [Tree([1, 2], [3], [4], prompt_state=-1)]
    batch = build_batch(trees, layout="tree", max_tokens_per_row=8, pad_token_id=0, pooling="mean")
    assert model(reward_gap_head=True, **batch, state_layer=2).prompt_states.requires_grad
    with pytest.raises(ModelError, match="No gradient comes to the states of layer 1"):
        model(reward_gap_head=True, **batch, state_layer=1)
