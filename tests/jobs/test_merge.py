from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mpo.common.typed_json import write_typed
from mpo.errors import ConfigError, ModelError, StorageError
from mpo.evaluation import compare, summarize
from mpo.evaluation.results import TrainingMetrics
from mpo.jobs.merge import merge_adapter
from tests.evaluation.simulated import simulated_scores
from tests.tiny import build_tokenizer, save_tiny

FAMILIES = ("llama", "gemma2", "qwen2")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, folder / family) for family in FAMILIES}


def save_adapter(model: Path, folder: Path, *, tokenizer: str | None = None, **options: object) -> Path:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    base = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(0)
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    if tokenizer is not None:
        build_tokenizer(tokenizer).save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(5, 500, (2, 17), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "kind", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"]
)
def test_the_merged_model_computes_what_the_adapter_computes(
    family: str, kind: dict, models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_adapter(models[family], tmp_path / "adapter", **kind)
    out = merge_adapter(adapter, tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(models[family])
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, adapter))
    merged = logits(AutoModelForCausalLM.from_pretrained(out))
    assert (expected - plain).abs().max() > 1e-2
    assert (merged - expected).norm() < 1e-5 * expected.norm()


def test_the_merged_folder_is_whole(models: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(models["llama"], tmp_path / "adapter")
    out = merge_adapter(adapter, tmp_path / "deep" / "merged")
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert not any(name.endswith((".bin", ".pt")) for name in names)
    assert AutoTokenizer.from_pretrained(out).chat_template == build_tokenizer("llama").chat_template
    before, after = (GenerationConfig.from_pretrained(folder) for folder in (models["llama"], out))
    assert before.eos_token_id == after.eos_token_id
    assert [path.name for path in out.parent.iterdir()] == ["merged"]


def test_weights_keep_the_type_of_the_base_unless_told_otherwise(
    models: dict[str, Path], tmp_path: Path
) -> None:
    half = save_tiny("llama", tmp_path / "half", dtype=torch.bfloat16)
    adapter = save_adapter(half, tmp_path / "adapter")
    kept = AutoModelForCausalLM.from_pretrained(merge_adapter(adapter, tmp_path / "kept"), dtype="auto")
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    asked = merge_adapter(adapter, tmp_path / "asked", dtype="float32")
    assert json.loads((asked / "config.json").read_text())["dtype"] == "float32"
    with pytest.raises(ConfigError, match="int8"):
        merge_adapter(adapter, tmp_path / "x", dtype="int8")


def test_sums_are_rounded_once(tmp_path: Path) -> None:
    half = save_tiny("llama", tmp_path / "half", dtype=torch.bfloat16)
    adapter = save_adapter(half, tmp_path / "adapter")
    exact = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32), adapter
    ).merge_and_unload()
    out = AutoModelForCausalLM.from_pretrained(merge_adapter(adapter, tmp_path / "merged"), dtype="auto")
    wanted = {name: p.to(torch.bfloat16) for name, p in exact.named_parameters()}
    for name, parameter in out.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


def test_the_tokenizer_of_the_adapter_comes_first(models: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(models["llama"], tmp_path / "adapter", tokenizer="llama")
    template = tmp_path / "adapter" / "chat_template.jinja"
    template.write_text("{# mine #}" + template.read_text())
    out = merge_adapter(adapter, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(out).chat_template.startswith("{# mine #}")


def test_another_base_may_be_named(models: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(models["llama"], tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "/gone/model"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"no model folder /gone/model.*`--base` names another"):
        merge_adapter(adapter, tmp_path / "merged")
    assert merge_adapter(adapter, tmp_path / "merged", base=str(models["llama"])).is_dir()
    with pytest.raises(ModelError, match="does not fit the model"):
        merge_adapter(adapter, tmp_path / "other", base=str(save_tiny("llama", tmp_path / "wide", hidden=48)))
    assert not (tmp_path / "other").exists()


def test_a_quantised_base_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(models["llama"], tmp_path / "adapter")
    base = save_tiny("llama", tmp_path / "quantised")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is quantised"):
        merge_adapter(adapter, tmp_path / "merged", base=str(base))


def test_nothing_is_overwritten(models: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(models["llama"], tmp_path / "adapter")
    full, empty, file = tmp_path / "full", tmp_path / "empty", tmp_path / "file"
    full.mkdir()
    (full / "precious").write_text("x")
    empty.mkdir()
    file.write_text("x")
    with pytest.raises(StorageError, match="is not empty"):
        merge_adapter(adapter, full)
    with pytest.raises(StorageError, match="is a file"):
        merge_adapter(adapter, file)
    assert merge_adapter(adapter, empty) == empty
    assert (full / "precious").read_text() == "x"


def test_a_failed_write_leaves_no_folder(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(models["llama"], tmp_path / "adapter")

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        merge_adapter(adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_an_adapter_that_is_a_pickle_or_no_adapter_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_adapter(models["llama"], tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="only a pickle"):
        merge_adapter(adapter, tmp_path / "merged")
    with pytest.raises(ModelError, match="It holds a whole model"):
        merge_adapter(models["llama"], tmp_path / "merged")
    with pytest.raises(ModelError, match="no model folder"):
        merge_adapter(tmp_path / "missing", tmp_path / "merged")


def _metrics(folder: Path) -> Path:
    before, after = (summarize(scores, beta=1.0, resamples=100) for scores in simulated_scores(groups=3))
    changed = compare(before, after)
    losses = {"before": 0.0, "after": 0.25}
    return write_typed(
        folder / "metrics.json",
        TrainingMetrics(
            beta=1.0, before=before, after=after, change=changed.to_dict()["change"], retention_loss=losses
        ),
    )


def test_the_adapters_measurements_are_on_the_merged_models_card(
    models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_adapter(models["llama"], tmp_path / "adapter")
    _metrics(adapter)
    card = (merge_adapter(adapter, tmp_path / "merged") / "README.md").read_text(encoding="utf-8")
    assert "A LoRA adapter folded into" in card and "| Swahili |" in card and "0 before, 0.25 after" in card


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.json", b"{"),
        ("metrics.json", b"\xff\xfe"),
        ("metrics.json", b"[]"),
        ("metrics.json", b"[" * 5000),
        ("metrics.json", b'{"beta": 1.0, "before": 3, "after": {}}'),
        ("metrics.json", b'{"beta": 1.0, "retention_loss": {"before": "x"}}'),
        ("metrics.json", b'{"beta": 1.0, "version": 99}'),
        ("provenance.json", b"no JSON"),
        ("provenance.json", b'{"libraries": ["torch"]}'),
        ("provenance.json", b'{"devices": {"accelerators": 3}}'),
        ("recipe.yaml", b"- no\n- mapping\n"),
    ],
)
def test_measurements_that_cannot_be_read_cost_the_card_and_not_the_model(
    models: dict[str, Path], tmp_path: Path, file: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter(models["llama"], tmp_path / "adapter")
    _metrics(adapter)
    (adapter / file).write_bytes(content)
    out = merge_adapter(adapter, tmp_path / "merged")
    assert (out / "model.safetensors").is_file() and not (out / "README.md").exists()
    assert "The merged model has no card" in capsys.readouterr().out
