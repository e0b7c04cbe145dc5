"""The tiny models have the parts that they are there to exercise."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import torch
from jinja2.exceptions import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import (
    _WORDS,
    LANGUAGES,
    MODEL_FAMILIES,
    TOKENIZER_FAMILIES,
    build_model,
    build_tokenizer,
    random_groups,
    save_tiny,
)

TEXTS = (*(" ".join(words) for words in _WORDS.values()), "naïve café, 12 345\n\n\tend 😀\u200f")
IDS = torch.randint(8, 500, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids).logits


@pytest.mark.parametrize("family", TOKENIZER_FAMILIES)
def test_a_tokenizer_gives_every_script_back(family: str) -> None:
    tokenizer = build_tokenizer(family)
    for text in TEXTS:
        expected = unicodedata.normalize("NFC", text) if family == "qwen" else text
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == expected


@pytest.mark.parametrize("family", TOKENIZER_FAMILIES)
def test_a_rendered_prompt_is_the_beginning_of_prompt_and_response(family: str) -> None:
    tokenizer = build_tokenizer(family)
    prompt = [{"role": "user", "content": TEXTS[0]}]
    whole = [*prompt, {"role": "assistant", "content": TEXTS[1]}]
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert tokenizer.apply_chat_template(whole, return_dict=False)[: len(start)] == start


def test_the_templates_treat_a_system_turn_as_their_families_do() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert "Be brief." in build_tokenizer("llama").apply_chat_template(turns, tokenize=False)
    assert "tiny assistant" in build_tokenizer("qwen").apply_chat_template(turns[1:], tokenize=False)
    assert "tiny assistant" not in build_tokenizer("qwen").apply_chat_template(turns, tokenize=False)
    with pytest.raises(TemplateError, match="system"):
        build_tokenizer("gemma").apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_a_saved_model_and_its_tokenizer_come_back_the_same(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path, seed=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(_logits(model), _logits(build_model(family, seed=3)), rtol=0, atol=0)
    tokenizer, built = AutoTokenizer.from_pretrained(tmp_path), build_tokenizer(family)
    assert tokenizer.chat_template == built.chat_template
    assert tokenizer.special_tokens_map == built.special_tokens_map
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == built(text)["input_ids"]


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_a_float64_model_is_the_same_function_as_its_float32_twin(family: str) -> None:
    wide = _logits(build_model(family, dtype=torch.float64))
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), _logits(build_model(family)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_a_far_token_changes_the_output_and_a_later_one_does_not(family: str) -> None:
    model = build_model(family)
    changed = IDS.clone()
    changed[:, 5] = (changed[:, 5] + 11) % 500
    difference = (_logits(model, changed) - _logits(model)).abs().amax(-1)
    assert difference[:, :5].max() == 0
    assert difference[:, -1].min() > 1e-2


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_the_sliding_window_and_the_soft_caps_bite(family: str) -> None:
    narrow, wide = build_model(family), build_model(family, sliding_window=4096)
    difference = (_logits(narrow) - _logits(wide)).abs().amax(-1)
    assert difference[:, :8].max() == 0 and difference[:, 8:].max() > 0.1
    if family == "gemma2":
        cap = narrow.config.final_logit_softcapping
        assert 0.8 * cap < _logits(narrow).abs().max() < cap
        wide.config.attn_logit_softcapping = None
        for layer in wide.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        uncapped = (_logits(build_model(family, sliding_window=4096)) - _logits(wide)).abs().max()
        assert uncapped > 0.1


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_models_differ_by_seed_and_share_key_value_heads(family: str) -> None:
    model = build_model(family)
    assert (_logits(model) - _logits(build_model(family, seed=1))).abs().max() > 0.1
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == family.startswith("gemma")


def test_random_groups_follow_the_contract() -> None:
    groups = random_groups(5, 40, (1, 8))
    assert groups == random_groups(5, 40, (1, 8)) != random_groups(6, 40, (1, 8))
    assert {len(group["targets"]) for group in groups} == set(range(1, 9))
    prompts = {group["source"]["prompt"][-1]["content"] for group in groups}
    assert len(prompts) == len(groups)
    for group in groups:
        assert group["source"]["language"] == "en" and group["origin"]
        for pair in (group["source"], *group["targets"]):
            assert pair["prompt"][-1]["role"] == "user"
            assert pair["chosen"][0]["role"] == pair["rejected"][0]["role"] == "assistant"
            assert pair["chosen"] != pair["rejected"] and pair["chosen"][0]["content"]
        assert {pair["language"] for pair in group["targets"]} <= set(LANGUAGES)
