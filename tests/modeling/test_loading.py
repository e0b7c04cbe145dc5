from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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
