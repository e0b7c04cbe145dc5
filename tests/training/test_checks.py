"""What the trainer refuses, before it spends time, and in which words."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig
from trl import DPOConfig

from mpo.errors import ConfigError, DataError, DependencyError, ModelError, MPOError, StorageError
from mpo.training.trainer import MPOTrainer
from tests import runs
from tests.tiny import build_model, build_tokenizer, save_tiny

pytestmark = pytest.mark.usefixtures("accelerator_of_its_own")


def refuse(model: Any, tmp_path: Path, rows: Any, match: str, **arguments: Any) -> None:
    with pytest.raises(MPOError, match=match):
        runs.trainer(model, tmp_path, rows, **arguments)


@pytest.mark.parametrize(
    "settings",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=lambda settings: type(settings).__name__,
)
def test_virtual_tokens_are_refused(model: Path, rows: Any, tmp_path: Path, settings: Any) -> None:
    refuse(model, tmp_path, rows, "virtual tokens", peft_config=settings)


def test_virtual_tokens_of_a_wrapped_model_are_refused(rows: Any, tmp_path: Path) -> None:
    policy = get_peft_model(
        build_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    refuse(policy, tmp_path, rows, "virtual tokens", processing_class=build_tokenizer("llama"))


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_trained_copy_of_the_vocabulary_is_refused(
    model: Path, rows: Any, tmp_path: Path, module: str
) -> None:
    refuse(model, tmp_path, rows, module, peft_config=runs.lora(modules_to_save=[module]))


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], "lm_head|.*q_proj"])
def test_an_adapter_on_the_head_is_refused(model: Path, rows: Any, tmp_path: Path, targets: Any) -> None:
    refuse(model, tmp_path, rows, "lm_head", peft_config=runs.lora(target_modules=targets))


def test_an_adapter_on_an_embedding_that_is_also_the_head_is_refused(tmp_path: Path, rows: Any) -> None:
    tied = save_tiny("gemma2", tmp_path / "tied")
    settings = runs.lora(target_modules=["embed_tokens"], ensure_weight_tying=True)
    refuse(tied, tmp_path, rows, "lm_head", peft_config=settings)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_weights_of_half_precision_is_refused(
    model: Path, rows: Any, tmp_path: Path, dtype: str
) -> None:
    refuse(model, tmp_path, rows, "rounded away", model_init_kwargs={"dtype": dtype})
    loaded = build_model("llama", dtype=getattr(torch, dtype))
    refuse(loaded, tmp_path, rows, "rounded away", processing_class=build_tokenizer("llama"))


def test_an_adapter_on_a_base_of_half_precision_is_trained_in_float32(
    model: Path, rows: Any, tmp_path: Path
) -> None:
    trainer = runs.trainer(
        model, tmp_path, rows, max_steps=1, model_init_kwargs={"dtype": "bfloat16"}, peft_config=runs.lora()
    )
    dtypes = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert dtypes == {torch.float32} and trainer.model.dtype is not torch.float32
    trainer.train()


def test_arguments_that_mean_nothing_here_are_refused(model: Path, rows: Any, tmp_path: Path) -> None:
    settings = runs.config(tmp_path)
    for name in ("data_collator", "compute_metrics"):
        with pytest.raises(ConfigError, match=name):
            MPOTrainer(str(model), args=settings, train_dataset=rows, **{name: lambda *_: None})
    with pytest.raises(ConfigError, match="MPOConfig"):
        MPOTrainer(str(model), args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=rows)
    with pytest.raises(DataError, match="train_dataset"):
        MPOTrainer(str(model), args=settings)
    loaded = build_model("llama")
    with pytest.raises(ConfigError, match="ref_model"):
        MPOTrainer(loaded, ref_model=loaded, args=settings, train_dataset=rows)
    with pytest.raises(ConfigError, match="quantization_config"):
        MPOTrainer(
            loaded,
            args=settings,
            train_dataset=rows,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        )
    with pytest.raises(ModelError, match="tokenizer"):
        MPOTrainer(loaded, args=settings, train_dataset=rows, processing_class=object())
    with pytest.raises(ModelError, match="tokenizer"):
        MPOTrainer(loaded, args=settings, train_dataset=rows)


def test_offloading_activations_needs_an_accelerator(model: Path, rows: Any, tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(ConfigError, match="activation_offloading"):
        runs.trainer(model, tmp_path, rows, activation_offloading=True, max_steps=1)


@pytest.mark.parametrize(
    ("package", "settings"),
    [
        ("liger_kernel", {"use_liger_kernel": True}),
        ("bitsandbytes", {"optim": "adamw_bnb_8bit"}),
        ("bitsandbytes", {"optim": "paged_adamw_8bit"}),
        ("torchao", {"optim": "adamw_torch_4bit"}),
    ],
)
def test_an_optional_package_that_is_missing_is_named(
    model: Path, rows: Any, tmp_path: Path, package: str, settings: dict[str, Any]
) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(DependencyError, match="pip install"):  # when it is made, before the reference pass
        runs.trainer(model, tmp_path, rows, max_steps=1, **settings)


def remove(*patterns: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return change


def to_pickle(folder: Path) -> None:
    remove("*.safetensors")(folder)
    torch.save(build_model("llama").state_dict(), folder / "pytorch_model.bin")


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings.update(changes)
        kept = {name: value for name, value in settings.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")

    return change


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tokenizer": (remove("tokenizer*", "chat_template*", "special_tokens*"), "tokenizer"),
    "no chat template": (remove("chat_template*"), "chat template"),
    "pickled weights only": (to_pickle, "safetensors"),
    "no weights": (remove("*.safetensors"), "safetensors"),
    "no configuration": (remove("config.json"), "config"),
    "a configuration cut off": (cut("config.json", 30), "config"),
    "a configuration that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "config"),
    "an unknown architecture": (edit_config(model_type="nonsense"), "nonsense"),
    "no architecture": (edit_config(architectures=None), "architecture"),
    "weights cut off in the header": (cut("model.safetensors", 1000), "safetensors"),
    "weights cut off at the end": (cut("model.safetensors", -1000), "safetensors"),
    "an empty file of weights": (cut("model.safetensors", 0), "safetensors"),
    "weights of something else": (
        lambda folder: save_file({"a": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"}),
        "weights",
    ),
    "a damaged tokenizer": (cut("tokenizer.json", 100), "tokenizer"),
    "no folder": (shutil.rmtree, "model"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_folder_is_an_error_that_says_what_is_wrong(
    model: Path, rows: Any, tmp_path: Path, name: str
) -> None:
    change, expected = BROKEN[name]
    folder = Path(shutil.copytree(model, tmp_path / "broken"))
    change(folder)
    with pytest.raises(ModelError) as error:
        runs.trainer(folder, tmp_path, rows)
    assert expected in str(error.value)


def test_no_weights_are_read_from_a_pickle(model: Path, rows: Any, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    folder = Path(shutil.copytree(model, tmp_path / "broken"))
    remove("*.safetensors")(folder)
    torch.save({"model.norm.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError):
        runs.trainer(folder, tmp_path, rows)
    assert not (tmp_path / "executed").exists()


def test_a_chat_template_can_be_given_as_text_or_file(model: Path, rows: Any, tmp_path: Path) -> None:
    template = build_tokenizer("llama").chat_template
    folder = Path(shutil.copytree(model, tmp_path / "bare"))
    remove("chat_template*")(folder)
    (tmp_path / "template.jinja").write_text(template, encoding="utf-8")
    expected = list(runs.trainer(model, tmp_path, rows).train_dataset["source_prompt"])
    for given in (template, str(tmp_path / "template.jinja")):
        trainer = runs.trainer(folder, tmp_path, rows, chat_template=given)
        assert list(trainer.train_dataset["source_prompt"]) == expected
    refuse(folder, tmp_path, rows, "neither Jinja text nor an existing file", chat_template="absent.jinja")


def test_a_folder_that_cannot_hold_the_run_is_an_error_before_the_first_step(
    model: Path, rows: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        runs.trainer(model, tmp_path, rows, output_dir=str(tmp_path / "file" / "out"), max_steps=1)
