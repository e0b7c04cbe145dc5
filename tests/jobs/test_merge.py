from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from mpo.common.files import write_json
from mpo.errors import ConfigError, ModelError, StorageError
from mpo.evaluation import compare, summarize
from mpo.jobs.merge import merge_adapter
from mpo.modeling import opening
from tests.evaluation.simulated import simulated_scores
from tests.tiny import build_model, build_tokenizer, save_tiny

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


def draw_adapter(model: Path, folder: Path, **options: Any) -> Path:
    """An adapter every part of which does something."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **options})
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    policy.save_pretrained(folder)
    return folder


KINDS: list[dict[str, Any]] = [
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["embed_tokens", "lm_head"]},
    {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"], "target_modules": ["lm_head"]},
    {"trainable_token_indices": [7, 300]},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_embedding_or_head_is_folded_into_that_one_alone(
    kind: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    model = save_tiny("llama", tmp_path / "model", tie=tied)
    adapter = draw_adapter(model, tmp_path / "adapter", **kind)
    with torch.no_grad():
        expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter))
    out = merge_adapter(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert (logits(merged) - expected).norm() < 1e-5 * expected.norm()
    assert (logits(AutoModelForCausalLM.from_pretrained(model)) - expected).norm() > 1e-2 * expected.norm()
    # Other libraries tie by this setting alone.
    one = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert (
        json.loads((out / "config.json").read_text())["tie_word_embeddings"]
        == one
        == merged.config.tie_word_embeddings
    )
    stored = load_file(out / "model.safetensors")
    assert ("lm_head.weight" in stored) != one


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("damage", ["a module is not folded in", "a file is not what was saved"])
def test_a_result_that_computes_something_else_stops_with_nothing_left_behind(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, dtype: str
) -> None:
    adapter = save_adapter(models["llama"], tmp_path / "adapter")
    if damage == "a module is not folded in":
        merge = Linear.merge
        seen: list[Linear] = []

        def all_but_one(self: Linear, *args: Any, **kwargs: Any) -> None:
            seen.append(self)
            if len(seen) != 3:
                merge(self, *args, **kwargs)

        monkeypatch.setattr(Linear, "merge", all_but_one)
    else:
        save = PreTrainedModel.save_pretrained

        def damaged(self: Any, folder: Path, *args: Any, **kwargs: Any) -> None:
            save(self, folder, *args, **kwargs)
            tensors = load_file(Path(folder) / "model.safetensors")
            tensors["model.layers.0.mlp.up_proj.weight"] *= 1.05
            save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", damaged)
    with pytest.raises(ModelError, match=r"logits that differ by [\d.]+% from its own"):
        merge_adapter(adapter, tmp_path / "merged", dtype=dtype)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_rounding_to_the_saved_type_is_no_difference(models: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(models["gemma2"], tmp_path / "adapter")
    for dtype in ("bfloat16", "float16"):
        out = merge_adapter(adapter, tmp_path / dtype, dtype=dtype)
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def test_an_adapter_that_cannot_be_folded_in_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(build_model("llama"), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="cannot be folded into weights"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=str(models["llama"]))
    assert not (tmp_path / "merged").exists()


def test_another_base_is_refused_unless_it_is_named_and_named_then(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(models["llama"], tmp_path / "base"))
    adapter = save_adapter(base, tmp_path / "adapter")
    recorded = {"base_model_weights": opening.folder_content(str(base))}
    (adapter / "provenance.json").write_text(json.dumps(recorded))
    assert merge_adapter(adapter, tmp_path / "as it was").is_dir()
    save_tiny("llama", base, seed=1)
    with pytest.raises(
        ModelError, match=rf"{adapter} was trained on {base}, whose weights have changed since.*`--base`"
    ):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    said: list[str] = []
    monkeypatch.setattr(opening.logger, "warning_once", said.append)
    merge_adapter(adapter, tmp_path / "merged", base=str(base))
    other = save_tiny("llama", tmp_path / "other", seed=2)
    merge_adapter(adapter, tmp_path / "elsewhere", base=str(other))
    merge_adapter(adapter, tmp_path / "at home", base=str(models["llama"]))
    assert len(said) == 2 and "have changed since" in said[0]
    assert f"was trained on {base} and is put on another model, {other}" in said[1]


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


# ------------------------------------------------------------------------------------------------------------ the card


@pytest.fixture
def run(models: dict[str, Path], tmp_path: Path) -> Path:
    """An adapter with the files of the run that trained it."""
    adapter = save_adapter(models["llama"], tmp_path / "runs" / "it")
    before, after = (summarize(scores, beta=1.5, resamples=200) for scores in simulated_scores(groups=4))
    retention = {"before": 0.0, "after": 0.0123}
    metrics = compare(before, after).to_dict(records=True) | {"retention_loss": retention}
    write_json(adapter / "metrics.json", metrics)
    write_json(adapter / "provenance.json", {"mpo": "0.1.0", "devices": {"accelerators": {"H100": 2}}})
    (adapter / "recipe.yaml").write_text("beta: 1.5\nlora_r: 4\nlora_target_modules: [all-linear]\n")
    (adapter / "reward_gap.png").write_bytes(b"\x89PNG")
    return adapter


def test_the_card_of_a_merged_model_says_all_that_its_adapters_does(
    run: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    out = merge_adapter(run, tmp_path / "merged")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "A LoRA adapter folded into `llama`" in card and "This is the adapter `it` merged into" in card
    for line in ("| LoRA rank | 4 |", "| LoRA alpha | 8 |", "scale of the target gap | 1.5 |"):
        assert line in card
    names = ("down", "gate", "k", "o", "q", "up", "v")
    assert "| LoRA modules | {} |".format(", ".join(rf"{name}\_proj" for name in names)) in card
    before, after = (summarize(scores, beta=1.5, resamples=200) for scores in simulated_scores(groups=4))
    assert compare(before, after).to_markdown() in card and "pairs: 0 before, 0.0123 after." in card
    assert "```yaml\nbeta: 1.5\n" in card and "2 x H100" in card and "](reward_gap.png)" in card
    assert 'AutoModelForCausalLM.from_pretrained("merged"' in card and "adapter_config" not in card
    for name in ("metrics.json", "provenance.json", "recipe.yaml", "reward_gap.png"):
        assert (out / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize("name", ["metrics.json", "provenance.json", "recipe.yaml"])
def test_a_damaged_file_beside_the_adapter_is_named_in_the_card_of_the_merged_model(
    name: str, run: Path, tmp_path: Path
) -> None:
    (run / name).write_text("{", encoding="utf-8")
    out = merge_adapter(run, tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(out) is not None and not (out / name).exists()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"The adapter's `{name}` cannot be read" in card
    assert "| LoRA rank | 4 |" in card and ("| Language |" in card) == (name != "metrics.json")


def test_an_adapter_without_a_run_of_this_package_gets_no_card(
    models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_adapter(models["llama"], tmp_path / "adapter")
    assert not (merge_adapter(adapter, tmp_path / "merged") / "README.md").exists()
