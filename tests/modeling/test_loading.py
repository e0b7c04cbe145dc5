from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config

from mpo.errors import ConfigError, ModelError
from mpo.modeling.loading import (
    ModelSource,
    adapter_settings,
    empty_model,
    linear_layer_names,
    load_config,
    load_model,
    load_tokenizer,
    pick_attention,
    translate_error,
)
from tests.tiny import build_model, save_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def remove(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def rewrite(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def truncate_weights(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def gguf_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")


def adapter_only(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def lost_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "has no config.json"),
        (remove("model.safetensors"), "has no weights"),
        (pickle_only, "only pytorch_model.bin: a pickle can run code"),
        (gguf_only, "holds GGUF weights only"),
        (adapter_only, "holds an adapter, not a model"),
        (truncate_weights, "damaged or cut off"),
        (rewrite("model.safetensors", b""), "damaged or cut off"),
        (lost_shard, "lacks 1 of 2 weight files, among them model-00002"),
        (rewrite("model.safetensors.index.json", "[]"), "index.json is damaged"),
        (rewrite("config.json", "{"), "not a valid JSON"),
        (rewrite("config.json", "[]"), "does not know the architecture"),
        (rewrite("config.json", '{"model_type": "unheard_of"}'), "does not know the architecture"),
        (lambda folder: edit_config(folder, dtype=[]), "configuration of .* cannot be read"),
        (
            rewrite("config.json", '{"model_type": "own", "auto_map": {"AutoConfig": "evil.Config"}}'),
            "brings its own Python code, which is not run",
        ),
    ],
)
def test_a_damaged_model_folder_is_a_clear_error(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    load_config(ModelSource(str(folder)))
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load_config(ModelSource(str(folder)))


def test_code_in_a_model_folder_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Config: pass\n")
    rewrite("config.json", '{"model_type": "own", "auto_map": {"AutoConfig": "evil.Config"}}')(folder)
    with pytest.raises(ModelError):
        load_config(ModelSource(str(folder)))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("tokenizer.json"), "no tokenizer"),
        (remove("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"), "no tokenizer"),
        (remove("chat_template.jinja"), "no chat template"),
        (rewrite("tokenizer.json", "{"), "no tokenizer that can be read"),
    ],
)
def test_a_model_folder_without_tokenizer_or_template_is_a_clear_error(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(ModelSource(str(folder)))


def test_a_chat_template_may_be_given(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert load_tokenizer(ModelSource(str(folder)), template).chat_template == template


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/model", "There is no model folder"),
        ("./model", "There is no model folder"),
        ("runs/demo/nothing", "There is no model folder"),
        ("bad name!!", "neither a folder nor a valid name"),
        ("org/unknown-model", "not in the cache .*HF_HUB_OFFLINE.*hf download org/unknown-model"),
    ],
)
def test_a_model_that_is_nowhere_says_what_to_do(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_config(ModelSource(name))


def test_a_file_is_no_model(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        load_config(ModelSource(str(folder / "config.json")))


def test_errors_of_the_hub_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    monkeypatch.setattr("mpo.modeling.loading._offline", lambda: False)
    response = SimpleNamespace(headers={}, request=None, status_code=403, url="", text="")

    def wrapped(kind: str) -> OSError:
        error = OSError("wrapped by transformers")
        error.__cause__ = getattr(errors, kind)("no", response=response)  # type: ignore[call-arg]
        return error

    for kind, message in (
        ("GatedRepoError", "is gated. Accept its terms on https://huggingface.co/org/m"),
        ("RepositoryNotFoundError", "is not on the Hub, or it is private"),
        ("RevisionNotFoundError", "not in the revision"),
    ):
        assert message in str(translate_error("org/m", "configuration", wrapped(kind))), kind
    unreachable = OSError("wrapped")
    unreachable.__cause__ = errors.LocalEntryNotFoundError("no")
    assert "the Hub cannot be reached" in str(translate_error("org/m", "configuration", unreachable))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "mixtral"])
def test_an_empty_model_has_the_parameters_of_the_real_one_and_no_memory(family: str, tmp_path: Path) -> None:
    source = ModelSource(str(save_tiny(family, tmp_path / family)))
    empty = empty_model(load_config(source), source)
    real = build_model(family)
    assert sum(p.numel() for p in empty.parameters()) == sum(p.numel() for p in real.parameters())
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert linear_layer_names(empty) == linear_layer_names(real)


def test_an_empty_model_stays_whole_under_zero3(saved: Path) -> None:
    pytest.importorskip("deepspeed")
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    settings = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    source = ModelSource(str(saved))
    empty = empty_model(load_config(source), source)
    assert is_deepspeed_zero3_enabled() and settings.is_zero3()
    assert all(p.is_meta and not hasattr(p, "ds_id") and p.numel() for p in empty.parameters())


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def add_tensors(folder: Path, *names: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, **{name: torch.ones(4) for name in names}}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, r"18 tensors are of no use to it \(model\.layers\.0"),
        ({"num_hidden_layers": 1}, r"9 tensors are of no use to it \(model\.layers\.1"),
        ({"num_hidden_layers": 3}, r"9 tensors are missing \(model\.layers\.2"),
        ({"attention_bias": True}, "8 tensors are missing"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "6 tensors are missing"),
        ({"architectures": ["LlamaModel"]}, r"1 tensor is of no use to it \(lm_head\.weight\)"),
    ],
)
def test_weights_that_do_not_fit_their_configuration_are_refused(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(ModelSource(str(folder)))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_bias_that_the_configuration_does_not_know_is_refused(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / family)
    add_tensors(folder, "model.layers.1.self_attn.o_proj.bias")
    with pytest.raises(
        ModelError, match=r"1 tensor is of no use to it \(model.layers.1.self_attn.o_proj.bias"
    ):
        load_model(ModelSource(str(folder)))


def test_what_old_checkpoints_hold_and_no_library_reads_is_no_misfit(folder: Path, tmp_path: Path) -> None:
    add_tensors(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    load_model(ModelSource(str(folder)))
    tied = save_tiny("gemma2", tmp_path / "tied")
    tensors = load_file(tied / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file({**tensors, **head}, tied / "model.safetensors")
    load_model(ModelSource(str(tied)))
    # DeepSeek's layers for predicting several tokens, which the class itself lists as not read.
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deepseek")
    add_tensors(tmp_path / "deepseek", "model.layers.61.embed_tokens.weight")
    load_model(ModelSource(str(tmp_path / "deepseek")))


def test_scales_beside_quantised_weights_are_no_misfit_but_layers_without_a_place_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpo.modeling.loading.is_quantized", lambda config: True)
    add_tensors(folder, "model.layers.0.mlp.up_proj.weight.absmax", "model.layers.0.mlp.up_proj.qzeros")
    load_model(ModelSource(str(folder)))
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"9 tensors are of no use to it \(model.layers.1"):
        load_model(ModelSource(str(folder)))


def test_a_loaded_model_has_the_type_and_attention_asked_for(saved: Path) -> None:
    model = load_model(ModelSource(str(saved)), dtype="bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_attention_is_chosen_so_that_soft_caps_and_tree_masks_hold() -> None:
    llama, gemma = build_model("llama").config, build_model("gemma2").config
    assert pick_attention(llama, None, gpu=False) == "tree"
    assert pick_attention(llama, None, layout="padded", gpu=False) is None
    assert pick_attention(gemma, None, layout="padded", gpu=False) == "eager"
    assert pick_attention(gemma, "flex_attention", gpu=True) == "flex_attention"
    assert pick_attention(llama, "flash_attention_2", layout="padded", gpu=True) == "flash_attention_2"
    for config, wanted, gpu, message in (
        (gemma, "sdpa", True, "caps its attention logits"),
        (llama, "flash_attention_2", True, "cannot take the mask of a preference tree"),
        (llama, "flex_attention", False, "cannot be trained on a CPU"),
    ):
        with pytest.raises(ConfigError, match=message):
            pick_attention(config, wanted, gpu=gpu)


def test_adapter_folders_are_checked(tmp_path: Path, saved: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        adapter_settings(str(folder))
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="cut off while saving"):
        adapter_settings(str(folder))
    shutil.copy(saved / "model.safetensors", folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="is damaged"):
        adapter_settings(str(folder))
    (folder / "adapter_config.json").write_text('{"r": 3}')
    with pytest.raises(ModelError, match="names no `peft_type`"):
        adapter_settings(str(folder))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3}')
    assert adapter_settings(str(folder))["r"] == 3
