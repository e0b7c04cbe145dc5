"""Which Accelerate configurations are refused or mended, and what a rank does that is not alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from mpo.errors import ConfigError
from mpo.training.sharding import check_sharding, sharding_name


@pytest.fixture(autouse=True)
def not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in ("DEEPSPEED", "FSDP"):
        monkeypatch.delenv(f"ACCELERATE_USE_{engine}", raising=False)


def accelerator(kind: DistributedType, **plugins: Any) -> Any:
    return SimpleNamespace(distributed_type=kind, num_processes=2, state=SimpleNamespace(**plugins))


def deepspeed(stage: int, **zero: Any) -> Any:
    config = {"zero_optimization": {"stage": stage, **zero}}
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=config)
    return accelerator(DistributedType.DEEPSPEED, deepspeed_plugin=plugin)


def fsdp(version: int, precision: str | None = None) -> Any:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version)
    if precision is not None:
        plugin.set_mixed_precision(precision)
    return accelerator(DistributedType.FSDP, fsdp_plugin=plugin)


def test_zero3_that_would_save_shards_only_is_refused() -> None:
    with pytest.raises(ConfigError, match="zero3_save_16bit_model: true"):
        check_sharding(deepspeed(3))
    check_sharding(deepspeed(3, stage3_gather_16bit_weights_on_model_save=True))
    check_sharding(deepspeed(2))


def test_fsdp1_is_refused() -> None:
    with pytest.raises(ConfigError, match="fsdp_version: 2"):
        check_sharding(fsdp(1))
    check_sharding(fsdp(2))


def test_fsdp_that_accelerate_has_set_aside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sharding(accelerator(DistributedType.MULTI_CPU))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="asks for FSDP"):
        check_sharding(accelerator(DistributedType.MULTI_CPU))
    check_sharding(fsdp(2))


def test_fsdp2_in_bf16_sums_gradients_in_float32_and_does_not_round_what_comes_out() -> None:
    half = fsdp(2, "bf16")
    policy = half.state.fsdp_plugin.mixed_precision_policy
    assert policy.output_dtype == torch.bfloat16 or policy.reduce_dtype == torch.bfloat16, "nothing to mend"
    check_sharding(half)
    policy = half.state.fsdp_plugin.mixed_precision_policy
    assert policy.param_dtype == torch.bfloat16
    assert policy.reduce_dtype == torch.float32
    assert policy.output_dtype is None


def test_a_sharding_has_the_name_that_a_checkpoint_carries() -> None:
    assert [sharding_name(deepspeed(stage)) for stage in (1, 2, 3)] == ["ZeRO-1", "ZeRO-2", "ZeRO-3"]
    assert sharding_name(fsdp(2)) == "FSDP2"
    assert sharding_name(accelerator(DistributedType.MULTI_GPU)) == "DDP"
