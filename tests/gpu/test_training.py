"""Runs on the device: the loss goes down in every precision and with every option, and no step waits for the device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from mpo.planning.activations import Layers, layer_peaks
from mpo.training.trainer import MPOTrainer
from tests import runs
from tests.tiny import build_model, random_groups, save_tiny

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, folder / family, hidden=64) for family in ("llama", "gemma2", "qwen2")}


def trainer(model: Path, folder: Path, device: torch.device, **settings: Any) -> MPOTrainer:
    defaults: dict[str, Any] = {
        "use_cpu": device.type == "cpu",
        "rows": random_groups(0, 8, (1, 3), words=(1, 6)),
        "max_grad_norm": 1.0,
        "bf16": False,
    }
    return runs.trainer(model, folder, **{**defaults, **settings})


def fall(run: MPOTrainer) -> float:
    """Loss on the trained pairs after a run, over the loss before it."""
    before = run.evaluate()["eval_loss"]
    run.train()
    after = run.evaluate()["eval_loss"]
    assert math.isfinite(after)
    return after / before


PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "bf16 base": {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}},
    "fp16": {"fp16": True},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_the_loss_of_a_lora_run_goes_down(
    models: dict[str, Path], tmp_path: Path, device: torch.device, family: str, precision: str
) -> None:
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("fp16 mixed precision needs a GPU")
    rows = random_groups(0, 8, (1, 3), words=(1, 6))
    run = trainer(
        models[family],
        tmp_path,
        device,
        eval_dataset=rows,
        peft_config=runs.lora(),
        num_train_epochs=4,
        **PRECISIONS[precision],
    )
    assert fall(run) < 0.6
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_the_loss_of_full_fine_tuning_goes_down(
    models: dict[str, Path], tmp_path: Path, device: torch.device
) -> None:
    rows = random_groups(0, 8, (1, 3), words=(1, 6))
    run = trainer(
        models["llama"],
        tmp_path,
        device,
        eval_dataset=rows,
        bf16=True,
        learning_rate=2e-3,
        num_train_epochs=4,
        max_tokens_per_batch=600,
    )
    assert fall(run) < 0.6


def first_step(run: MPOTrainer) -> tuple[float, dict[str, Tensor]]:
    """Loss of the first step and the gradients it leaves."""
    gradients: dict[str, Tensor] = {}
    original = run._get_grad_norm

    def keep(model: Any, grad_norm: Any = None) -> Any:
        for name, parameter in run.model.named_parameters():
            if parameter.grad is not None:
                gradients.setdefault(name, parameter.grad.detach().double().cpu())
        return original(model, grad_norm=grad_norm)

    run._get_grad_norm = keep  # type: ignore[method-assign]
    run.train()
    return run.state.log_history[0]["loss"], gradients


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all gradients together, relative."""
    assert found.keys() == expected.keys()
    vectors = [torch.cat([g.flatten() for _, g in sorted(part.items())]) for part in (found, expected)]
    return float((vectors[0] - vectors[1]).norm() / vectors[1].norm())


def same_first_step(
    model: Path, folder: Path, device: torch.device, tolerance: float, **settings: Any
) -> None:
    """A step with these settings against one without."""
    common = {"max_steps": 1, "max_grad_norm": 1e9}
    expected_loss, expected = first_step(trainer(model, folder / "plain", device, **common))
    loss, found = first_step(trainer(model, folder / "with", device, **common, **settings))
    assert math.isclose(loss, expected_loss, rel_tol=tolerance)
    assert difference(found, expected) <= tolerance


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_compiled_model_gives_the_same_step(
    models: dict[str, Path], tmp_path: Path, device: torch.device, family: str
) -> None:
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    same_first_step(models[family], tmp_path, device, 1e-3, torch_compile=True, torch_compile_backend=backend)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


def test_recomputed_activations_give_the_same_step(
    models: dict[str, Path], tmp_path: Path, device: torch.device
) -> None:
    same_first_step(models["llama"], tmp_path, device, 1e-5, gradient_checkpointing=True)


def test_offloaded_activations_give_the_same_step(
    models: dict[str, Path], tmp_path: Path, cuda: torch.device
) -> None:
    same_first_step(models["llama"], tmp_path, cuda, 1e-5, activation_offloading=True)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_liger_kernels_give_the_same_step(
    models: dict[str, Path], tmp_path: Path, cuda: torch.device, family: str
) -> None:
    pytest.importorskip("liger_kernel")
    same_first_step(models[family], tmp_path, cuda, 2e-3, use_liger_kernel=True)


@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_the_loss_goes_down_with_an_optimizer_of_bitsandbytes(
    models: dict[str, Path], tmp_path: Path, cuda: torch.device, optimizer: str
) -> None:
    pytest.importorskip("bitsandbytes")
    rows = random_groups(0, 8, (1, 3), words=(1, 6))
    run = trainer(
        models["llama"],
        tmp_path,
        cuda,
        eval_dataset=rows,
        peft_config=runs.lora(),
        num_train_epochs=4,
        optim=optimizer,
    )
    assert fall(run) < 0.7


def test_the_loss_of_a_qlora_run_goes_down_and_its_reference_is_the_quantised_base(
    models: dict[str, Path], tmp_path: Path, cuda: torch.device
) -> None:
    pytest.importorskip("bitsandbytes")
    rows = random_groups(0, 8, (1, 3), words=(1, 6))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    run = trainer(
        models["llama"],
        tmp_path,
        cuda,
        eval_dataset=rows,
        peft_config=runs.lora(),
        quantization_config=quantization,
        bf16=True,
        num_train_epochs=4,
        model_init_kwargs={"dtype": "bfloat16", "device_map": {"": "cuda:0"}},
    )
    for record in run.score().records:
        if record.is_source:
            assert abs(record.gap - record.reference_gap) < 0.05
    assert fall(run) < 0.7


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("lora", [False, True])
def test_no_step_waits_for_the_device(
    models: dict[str, Path], tmp_path: Path, cuda: torch.device, family: str, lora: bool
) -> None:
    peft = {"peft_config": runs.lora()} if lora else {}
    run = trainer(models[family], tmp_path, cuda, per_device_train_batch_size=2, **peft)
    batches = list(run.get_train_dataloader())
    model = run.model.to(cuda).train()
    for batch in batches[:2]:  # the first may choose kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if batch is batches[1] else "default")
        try:
            run.compute_loss(model, run._prepare_inputs(batch)).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_layers_of_a_step_take_on_the_device_what_is_counted(
    cuda: torch.device, weights: torch.dtype, checkpointing: bool
) -> None:
    layers, rows, length = 6, 4, 1024
    model = build_model("llama", layers=layers, hidden=256, attn_implementation="sdpa", dtype=weights).to(
        cuda
    )
    how = Layers(model.config, attention="sdpa", weights=weights, checkpointing=checkpointing)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    positions = torch.arange(length, device=cuda).expand(rows, length)
    mask = torch.ones(length, length, dtype=torch.bool, device=cuda).tril().expand(rows, 1, -1, -1)
    states = torch.randn(rows, length, 256, dtype=weights, device=cuda, requires_grad=True)
    taken = []
    for _ in range(2):  # the first run takes workspaces that stay
        before = torch.cuda.memory_allocated(cuda)
        torch.cuda.reset_peak_memory_stats(cuda)
        with torch.autocast("cuda", torch.bfloat16, enabled=how.autocast):
            output = model.model(
                inputs_embeds=states, position_ids=positions, attention_mask=mask, use_cache=False
            ).last_hidden_state
        forward = torch.cuda.max_memory_allocated(cuda) - before
        torch.cuda.reset_peak_memory_stats(cuda)
        output.backward(torch.randn_like(output))
        taken = [forward, torch.cuda.max_memory_allocated(cuda) - before]
        states.grad = output = None
    for peak, real in zip(layer_peaks(how, layers, rows, length), taken, strict=True):
        assert peak.total == pytest.approx(real, rel=0.15)
