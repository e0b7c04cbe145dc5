"""Equal identities compute the same, and whatever changes what is computed changes the identity."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer

from mpo.modeling import identity as subject
from mpo.modeling.identity import (
    ModelIdentity,
    computing_settings,
    fingerprint_folder,
    identify_module,
)
from mpo.modeling.loading import ModelSource
from mpo.modeling.opening import open_model
from tests import runs
from tests.evaluation.adapters import save_model_and_adapter
from tests.tiny import build_model, save_tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("identity")
    save_model_and_adapter(root)
    return root


@pytest.fixture
def folders(place: Path, tmp_path: Path) -> Path:
    """Copies of the model and the adapter, to be changed."""
    for name in ("model", "adapter"):
        shutil.copytree(place / name, tmp_path / name)
    return tmp_path


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def identity(folders: Path, **settings: Any) -> ModelIdentity:
    opened = open_model(
        ModelSource(str(folders / "model")), adapter=str(folders / "adapter"), device="cpu", **settings
    )
    return opened.identity()


# ---- Files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 9},
        {"use_rslora": True},
        {"use_dora": True},
        {"alpha_pattern": {"q_proj": 1}},
        {"rank_pattern": {"q_proj": 2}},
        {"bias": "all"},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"layers_to_transform": [0]},
        {"target_modules": ["q_proj"]},
        {"a_setting_of_next_year": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_of_an_adapter_that_changes_what_it_computes_is_part_of_who_it_is(
    folders: Path, changes: dict[str, Any]
) -> None:
    before = identity(folders)
    edit(folders / "adapter" / "adapter_config.json", **changes)
    after = identity(folders)
    assert after.adapter != before.adapter and after.digest != before.digest
    assert after.model == before.model


def test_paths_versions_and_the_order_of_a_set_are_not(folders: Path) -> None:
    before = identity(folders)
    file = folders / "adapter" / "adapter_config.json"
    targets = json.loads(file.read_text())["target_modules"]
    edit(
        file,
        base_model_name_or_path="elsewhere",
        revision="main",
        inference_mode=False,
        peft_version="0",
        task_type=None,
        lora_dropout=0.3,
        target_modules=targets[::-1],
    )
    edit(folders / "model" / "config.json", transformers_version="0", use_cache=False, _name_or_path="x")
    moved = shutil.move(folders / "adapter", folders / "moved")
    shutil.move(moved, folders / "adapter")
    assert identity(folders) == before


def new_token(folders: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders / "model")
    tokenizer.add_tokens(["river"])
    tokenizer.save_pretrained(folders / "model")


def other_template(folders: Path) -> None:
    file = folders / "model" / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


def other_weights(folders: Path) -> None:
    save_tiny("llama", folders / "model", seed=1)


CHANGES: dict[str, Callable[[Path], None]] = {
    "weights": other_weights,
    "config.json": lambda folders: edit(folders / "model" / "config.json", rms_norm_eps=0.1),
    "end tokens": lambda folders: edit(folders / "model" / "generation_config.json", eos_token_id=[7]),
    "quantization": lambda folders: edit(
        folders / "model" / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}
    ),
    "tokenizer": new_token,
    "chat template": other_template,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_another_identity(folders: Path, change: str) -> None:
    before = identity(folders)
    CHANGES[change](folders)
    after = identity(folders)
    assert after.digest != before.digest
    assert after.adapter == before.adapter


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bfloat16"},
        {"attn_implementation": "eager"},
        {"chat_template": "{{ messages[0].content }}"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_how_a_model_is_opened_is_part_of_who_it_is(place: Path, settings: dict[str, Any]) -> None:
    assert identity(place, **settings).digest != identity(place).digest
    assert identity(place, **settings) == identity(place, **settings)
    json.dumps(identity(place, **settings).to_dict())


def test_the_checkpoints_own_type_is_that_type(place: Path) -> None:
    assert identity(place, dtype="auto") == identity(place, dtype="float32")


def test_what_another_library_saved_as_the_same_template_and_tokenizer_is_the_same(folders: Path) -> None:
    before = identity(folders)
    opened = open_model(ModelSource(str(folders / "model")), device="cpu")
    opened.tokenizer("a text", truncation=True, max_length=2, padding="max_length")  # leaves both set
    opened.tokenizer.save_pretrained(folders / "adapter")
    after = identity(folders)
    assert (after.tokenizer, after.chat_template) == (before.tokenizer, before.chat_template)


def test_the_order_of_layers_is_no_order_of_a_set() -> None:
    layers = ["full_attention", "sliding_attention"]
    assert computing_settings({"layer_types": layers}) != computing_settings({"layer_types": layers[::-1]})
    assert computing_settings({"nested": {"use_cache": True, "rope_theta": 1.0}}) == {
        "nested": {"rope_theta": 1.0}
    }


def test_a_large_file_is_read_once_until_it_changes(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    plain = subject.hash_file
    monkeypatch.setattr(subject, "hash_file", lambda path: (read.append(path), plain(path))[1])
    first = [fingerprint_folder(folders / "model") for _ in range(3)]
    assert len(set(first)) == 1 and len(read) == 1
    weights = folders / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint_folder(folders / "model") != first[0] and len(read) == 2


# ---- Models in memory ----------------------------------------------------------------------------------------------


def adapted(seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(build_model("llama"), runs.lora(init_lora_weights=False, **settings))


def scaled(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    return model


@pytest.mark.parametrize(
    "other",
    [
        lambda: adapted(lora_alpha=64),
        lambda: adapted(use_rslora=True),
        lambda: adapted(alpha_pattern={"q_proj": 1}),
        lambda: adapted(seed=1),
        lambda: scaled(adapted()),
        lambda: build_model("llama"),
    ],
    ids=["lora_alpha", "use_rslora", "alpha_pattern", "tensors", "scaled since", "no adapter"],
)
def test_adapters_in_memory_that_compute_something_else_are_told_apart(other: Callable[[], Any]) -> None:
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert (other().eval()(ids).logits - adapted().eval()(ids).logits).abs().max() > 1e-3
    assert identify_module(other()).digest != identify_module(adapted()).digest
    assert identify_module(adapted()) == identify_module(adapted())


def test_a_switched_off_adapters_settings_do_not_count(place: Path) -> None:
    model = str(place / "model")
    off = [
        identify_module(adapted(lora_alpha=a), adapter_on=False, files=ModelSource(model)).digest
        for a in (8, 64)
    ]
    assert off[0] == off[1] == identify_module(build_model("llama"), files=ModelSource(model)).digest


def test_files_and_configuration_both_count_for_a_model_that_was_read_from_files(place: Path) -> None:
    model = build_model("llama")
    before = identify_module(model, files=ModelSource(str(place / "model")))
    assert before.model.startswith("files:")
    changed = copy.deepcopy(model)
    changed.config.rms_norm_eps = 0.1
    assert identify_module(changed, files=ModelSource(str(place / "model"))).model != before.model


def test_weights_that_are_divided_over_ranks_equal_no_others() -> None:
    model = build_model("llama").to("meta")  # as under ZeRO-3, the tensors are not here
    first, second = identify_module(model), identify_module(model)
    assert first.model.startswith("unknown:") and first.digest != second.digest


def test_an_adapter_that_is_loaded_has_the_identity_of_its_copy_in_memory(place: Path) -> None:
    loaded = [PeftModel.from_pretrained(build_model("llama"), str(place / "adapter")) for _ in range(2)]
    assert identify_module(loaded[0]) == identify_module(loaded[1])
