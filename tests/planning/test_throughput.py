"""Operations, bytes sent and efficiency are the arithmetic that they say."""

from __future__ import annotations

from dataclasses import replace

from mpo.planning.known_models import shape_config
from mpo.planning.memory import SHARDINGS, describe
from mpo.planning.throughput import efficiency, reference_flops, sent_per_step, step_flops
from tests.runs import lora

BY_NAME = {sharding.name: sharding for sharding in SHARDINGS}


def test_operations_are_six_per_weight_and_token_and_eight_when_recomputed() -> None:
    config_ = shape_config("llama-3.1-8b")
    multiplied = 8_030_261_248 - 128256 * 4096
    kept = describe(config_, checkpointing=False)
    assert step_flops(kept, 10, 0) == 10 * 6 * multiplied
    assert step_flops(describe(config_, checkpointing=True), 10, 0) == 10 * 8 * multiplied
    # Attention: scores and their sum over values, 2 operations each, three passes.
    attention = 4 * 4096 * 100 * 32
    assert step_flops(kept, 1, 100) - step_flops(kept, 1, 0) == 3 * attention
    again = replace(kept, checkpointing=True)
    assert step_flops(again, 1, 100) - step_flops(again, 1, 0) == 4 * attention
    # Frozen weights have no gradient of their own; the reference pass has none at all.
    assert step_flops(replace(kept, adapter=True), 10, 0) == 10 * 4 * multiplied
    assert reference_flops(kept, 10, 0) == 10 * 2 * multiplied
    assert reference_flops(again, 1, 100) - reference_flops(again, 1, 0) == attention


def test_a_head_that_is_the_embedding_is_multiplied() -> None:
    tied = describe(shape_config("llama-3.2-1b"), checkpointing=False)
    assert step_flops(tied, 1, 0) == 6 * tied.parameters


def test_what_is_sent_is_counted_as_on_paper() -> None:
    training = describe(shape_config("llama-3.1-8b"))
    size, ring = 8_030_261_248, 7 / 8
    assert sent_per_step(training, BY_NAME["DDP"], 8) == 2 * ring * 4 * size
    assert sent_per_step(training, BY_NAME["ZeRO-2"], 8) == ring * 4 * size
    assert sent_per_step(training, BY_NAME["ZeRO-3"], 8) == ring * 6 * size
    assert sent_per_step(training, BY_NAME["FSDP2"], 8) == ring * 8 * size
    # Three calls gather the weights three times.
    assert sent_per_step(training, BY_NAME["ZeRO-3"], 8, 3) == 3 * sent_per_step(
        training, BY_NAME["ZeRO-3"], 8
    )
    # ZeRO-1 and DDP sum gradients once per step, ZeRO-2 after each micro-batch; both gather weights once.
    assert sent_per_step(training, BY_NAME["DDP"], 8, 3) == 2 * ring * 4 * size
    assert sent_per_step(training, BY_NAME["ZeRO-1"], 8, 3) == ring * 4 * size
    assert sent_per_step(training, BY_NAME["ZeRO-2"], 8, 3) == ring * (3 * 2 + 2) * size
    adapted = describe(shape_config("llama-3.1-8b"), adapter=lora(r=4))
    trained = adapted.trained
    assert sent_per_step(adapted, BY_NAME["DDP"], 8) == 2 * ring * 4 * trained
    assert sent_per_step(adapted, BY_NAME["ZeRO-3"], 8) == ring * (4 * (size + trained) + 2 * trained)


def test_communication_hides_behind_a_share_of_the_computing() -> None:
    assert efficiency(1.0, 10.0, 10.0, 0.0) == 0.5
    assert efficiency(1.0, 10.0, 10.0, 1.0) == 1.0
    assert efficiency(2.0, 30.0, 10.0, 0.8) == 2.0 / (2.0 + 3.0 - 0.8 * 2.0)
