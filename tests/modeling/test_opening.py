"""A model is opened as it was trained: its adapter's tokenizer and template, its own base, all of its tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from mpo.errors import ModelError
from mpo.modeling import opening
from mpo.modeling.identity import identify_module
from mpo.modeling.loading import ModelSource
from mpo.modeling.opening import OpenedModel, open_model, trained_template_kwargs
from tests.evaluation.adapters import save_model_and_adapter
from tests.tiny import build_model, build_tokenizer, save_tiny

OWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("opening")
    save_model_and_adapter(root)
    return root


@pytest.fixture
def place(saved: Path, tmp_path: Path) -> Path:
    for name in ("model", "adapter"):
        shutil.copytree(saved / name, tmp_path / name)
    name_base(tmp_path / "adapter", tmp_path / "model")
    return tmp_path


def name_base(adapter: Path, base: Path | str) -> None:
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))


def opened(place: Path, **settings: Any) -> OpenedModel:
    return open_model(
        ModelSource(str(place / "model")), adapter=str(place / "adapter"), device="cpu", **settings
    )


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    warnings: list[str] = []
    monkeypatch.setattr(opening.logger, "warning_once", warnings.append)
    return warnings


# ---- Tokenizer and template ----------------------------------------------------------------------------------------


def test_the_adapters_tokenizer_and_template_come_before_its_bases(place: Path) -> None:
    tokenizer = build_tokenizer("llama")
    tokenizer.add_tokens(["river"])
    tokenizer.chat_template = OWN
    tokenizer.save_pretrained(place / "adapter")
    found = opened(place).tokenizer
    assert found.chat_template == OWN and len(found) == len(tokenizer)
    assert found.pad_token is not None
    other = "{{ messages[0].content }}"
    assert opened(place, chat_template=other).tokenizer.chat_template == other
    assert len(opened(place, chat_template=other).tokenizer) == len(tokenizer)


def test_an_adapter_without_a_tokenizer_has_its_bases(place: Path) -> None:
    base = AutoTokenizer.from_pretrained(place / "model")
    found = opened(place).tokenizer
    assert found.chat_template == base.chat_template and found.get_vocab() == base.get_vocab()


def test_an_adapter_may_bring_a_tokenizer_without_a_template_or_a_template_alone(place: Path) -> None:
    base = build_tokenizer("llama").chat_template
    (place / "adapter" / "chat_template.jinja").write_text(OWN)
    assert opened(place).tokenizer.chat_template == OWN
    (place / "adapter" / "chat_template.jinja").unlink()
    tokenizer = build_tokenizer("llama")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(place / "adapter")
    assert opened(place).tokenizer.chat_template == base


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_a_tokenizer_that_was_saved_beside_an_adapter_gives_the_same_tokens(
    family: str, tmp_path: Path
) -> None:
    save_model_and_adapter(tmp_path, family)
    before = opened(tmp_path).tokenizer
    before.save_pretrained(tmp_path / "adapter")
    after = opened(tmp_path).tokenizer
    for text in ("The river, please.", "请打开窗户 \N{SNOWMAN}", "e\N{COMBINING ACUTE ACCENT} নদী"):
        assert after(text)["input_ids"] == before(text)["input_ids"]


def recipe(folder: Path, text: str) -> None:
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")


def test_template_arguments_are_those_of_the_training(place: Path) -> None:
    source, adapter = ModelSource(str(place / "model")), str(place / "adapter")
    assert trained_template_kwargs(source, adapter) == {}
    recipe(place / "model", "chat_template_kwargs: {enable_thinking: true, depth: 2}")
    assert opened(place).chat_template_kwargs == {"enable_thinking": True, "depth": 2}
    recipe(place / "adapter", "beta: 1.0\nchat_template_kwargs:\n  enable_thinking: false\n")
    assert opened(place).chat_template_kwargs == {"enable_thinking": False}
    recipe(place / "adapter", "beta: 1.0")
    assert opened(place).chat_template_kwargs == {}, (
        "trained without any, on a base that was trained with some"
    )
    assert opened(place, chat_template_kwargs={"a": 1}).chat_template_kwargs == {"a": 1}


@pytest.mark.parametrize(
    "text", ["beta: [", "chat_template_kwargs: thinking off", "chat_template_kwargs: [1]"]
)
def test_a_damaged_recipe_is_not_passed_over(place: Path, text: str) -> None:
    recipe(place / "adapter", text)
    with pytest.raises(ModelError, match=r"recipe\.yaml is to say with which `chat_template_kwargs`"):
        opened(place)
    assert opened(place, chat_template_kwargs={}).chat_template_kwargs == {}


# ---- The adapter's tensors -----------------------------------------------------------------------------------------


def change_tensors(place: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = place / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def test_an_adapter_without_any_tensor_is_refused_before_weights_are_read(place: Path) -> None:
    change_tensors(place, lambda _: {})
    with pytest.raises(ModelError, match="holds no tensor"):
        opened(place)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: dict(list(t.items())[1:]), r"1 tensor is missing \(base_model\S+lora_A"),
        (lambda t: {k: v for k, v in t.items() if "lora_A" in k}, "14 tensors are missing"),
        (
            lambda t: {**t, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 32)},
            "1 tensor is of no use to it",
        ),
        (
            lambda t: {k.replace("layers", "blocks"): v for k, v in t.items()},
            "28 tensors are missing .* and 28 tensors are of no use",
        ),
        (lambda t: {k: v[:1].contiguous() for k, v in t.items()}, "does not fit the model"),
    ],
    ids=["one is missing", "all B are missing", "one too many", "another model's", "another rank"],
)
def test_an_adapter_whose_tensors_do_not_fit_is_refused(place: Path, change: Any, message: str) -> None:
    change_tensors(place, change)
    with pytest.raises(ModelError, match=message) as caught:
        opened(place).load()
    assert str(place / "adapter") in str(caught.value) and str(place / "model") in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": "all", "target_modules": ["q_proj"]},
        {"bias": "lora_only", "target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"use_dora": True, "target_modules": "all-linear"},
        {"trainable_token_indices": [5, 9], "target_modules": ["q_proj"]},
        {"rank_pattern": {"q_proj": 2}, "target_modules": "all-linear"},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_adapters_of_all_kinds_are_loaded_with_each_of_their_tensors_and_refused_without_one(
    tmp_path: Path, settings: dict[str, Any], task: str | None
) -> None:
    save_tiny("qwen2", tmp_path / "model")  # with biases
    torch.manual_seed(0)
    policy = get_peft_model(build_model("qwen2"), LoraConfig(r=4, task_type=task, **settings))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    policy.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        expected = policy.eval()(input_ids=ids).logits
        torch.testing.assert_close(opened(tmp_path).load()(input_ids=ids).logits, expected, atol=1e-3, rtol=0)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    kinds = {name.rpartition(".")[2] if "lora" not in name else name.split("lora_")[1] for name in tensors}
    for kind in kinds:
        left_out = next(name for name in tensors if name.endswith(kind))
        if left_out.endswith("base_layer.weight"):  # the base model's own, which PEFT saves along
            continue
        save_file(
            {name: tensor for name, tensor in tensors.items() if name != left_out},
            tmp_path / "adapter" / "adapter_model.safetensors",
        )
        with pytest.raises(ModelError, match="does not fit the model"):
            opened(tmp_path).load()


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(target_modules=["q_proj"]),
        VeraConfig(target_modules=["q_proj"], r=4),
        VBLoRAConfig(target_modules=["q_proj", "v_proj"], vector_length=4, num_vectors=8, r=2),
        PromptTuningConfig(num_virtual_tokens=2),
        PrefixTuningConfig(num_virtual_tokens=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_what_other_kinds_of_adapters_share_or_keep_elsewhere_is_no_misfit(
    place: Path, config: PeftConfig
) -> None:
    config.task_type = "CAUSAL_LM"
    shutil.rmtree(place / "adapter")
    get_peft_model(build_model("llama"), config).save_pretrained(place / "adapter")
    expected = PeftModel.from_pretrained(build_model("llama"), place / "adapter").state_dict()
    found = opened(place).load().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_an_adapter_is_loaded_to_be_read_or_to_be_trained(place: Path) -> None:
    read, trained = opened(place).load(), opened(place, trained=True).load()
    assert not read.training and not any(p.requires_grad for p in read.parameters())
    names = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name for name in names)


def test_checks_come_before_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    assert opened(place).identity().adapter is not None
    (place / "adapter" / "adapter_model.safetensors").rename(place / "adapter" / "adapter_model.bin")
    with pytest.raises(ModelError, match="only a pickle"):
        opened(place)


# ---- The Hub -------------------------------------------------------------------------------------------------------


def put_on_hub(cache: Path, folder: Path, name: str, commit: str) -> None:
    """As a download leaves it; the network is switched off."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)


def test_a_model_and_an_adapter_of_the_hub_are_opened_alike(
    place: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build_tokenizer("llama")
    tokenizer.chat_template = OWN
    tokenizer.save_pretrained(place / "adapter")
    recipe(place / "adapter", "chat_template_kwargs: {quiet: true}")
    name_base(place / "adapter", "org/model")
    cache, commits = place / "hub", {"model": "1" * 40, "adapter": "2" * 40}
    for name, commit in commits.items():
        put_on_hub(cache, place / name, f"org/{name}", commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    found = open_model(ModelSource("org/model"), adapter="org/adapter", device="cpu")
    assert found.tokenizer.chat_template == OWN and found.chat_template_kwargs == {"quiet": True}
    identity = found.identity()
    assert identity.model == f"hub:org/model@{commits['model']}"
    assert identity.adapter == f"hub:org/adapter@{commits['adapter']}"
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        assert torch.equal(found.load()(input_ids=ids).logits, opened(place).load()(input_ids=ids).logits)
    assert identify_module(found.load(with_adapter=False), files=found.source).model.startswith(
        identity.model
    )
    assert [text for text in said if "org/adapter" in text] == []
    (cache / "models--org--adapter" / "snapshots" / commits["adapter"] / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"while offline, in the cache\. `hf download org/adapter`"):
        open_model(ModelSource("org/model"), adapter="org/adapter", device="cpu")


# ---- The adapter's base --------------------------------------------------------------------------------------------


def test_another_base_of_the_same_shape_is_named_with_the_adapters_own(place: Path, said: list[str]) -> None:
    other = save_tiny("llama", place / "other", seed=1)
    opened(place)
    assert not said
    open_model(ModelSource(str(other)), adapter=str(place / "adapter"), device="cpu")
    (text,) = said
    assert f"was trained on {place / 'model'} and is put on another model, {other}" in text


def test_a_base_that_was_only_moved_is_the_same(
    place: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(place / "model", place / "copy")
    open_model(ModelSource(str(copy)), adapter=str(place / "adapter"), device="cpu")
    monkeypatch.chdir(place)
    open_model(ModelSource("model"), adapter="adapter", device="cpu")
    name_base(place / "adapter", "")
    open_model(ModelSource(str(copy)), adapter=str(place / "adapter"), device="cpu")
    assert not said


def test_a_base_that_is_gone_is_known_by_the_content_that_training_recorded(
    place: Path, said: list[str]
) -> None:
    content = opening.folder_content(str(place / "model"))
    (place / "adapter" / "provenance.json").write_text(json.dumps({"base_model_weights": content}))
    name_base(place / "adapter", "/gone/model")
    opened(place)
    assert not said
    save_tiny("llama", place / "model", seed=1)
    opened(place)
    assert "was trained on /gone/model and is put on another model" in said[0]
    name_base(place / "adapter", place / "model")
    opened(place)
    assert f"was trained on {place / 'model'}, whose weights have changed since" in said[1]


def test_a_base_of_the_hub_is_known_by_its_name(place: Path, said: list[str]) -> None:
    name_base(place / "adapter", "org/base")
    opened(place)
    assert f"was trained on org/base and is put on another model, {place / 'model'}" in said[0]
