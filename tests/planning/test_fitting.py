"""The largest micro-batch fits, the next does not, and the best way to run is the first that takes a group."""

from __future__ import annotations

from mpo.planning.fitting import Choice, best, largest_budget, possible
from mpo.planning.known_models import shape_config
from mpo.planning.memory import SHARDINGS, Sharding, describe, memory

BY_NAME = {sharding.name: sharding for sharding in SHARDINGS}


def test_the_largest_budget_fits_and_the_next_does_not() -> None:
    training = describe(shape_config("llama-3.2-1b"))
    sharding = BY_NAME["ZeRO-2"]
    tokens, needed = largest_budget(training, sharding, 8, 24e9, 2048)
    assert tokens > 0 and needed.total <= 24e9
    assert memory(training, sharding, 8, 2 * tokens, 2048).total > 24e9
    assert largest_budget(training, sharding, 8, 1e9, 2048)[0] == 0
    # What is less than the least is of no use, and the least itself is tried.
    held = memory(training, sharding, 8, 1300, 2048)
    for spare, tokens in ((1.0, 1300), (-1.0, 0)):
        assert largest_budget(training, sharding, 8, held.total + spare, 2048, least=1300) == (tokens, held)


def test_the_first_sharding_that_takes_a_group_is_the_best() -> None:
    training = describe(shape_config("llama-3.2-1b"))
    needed = memory(training, BY_NAME["DDP"], 2, 1024, 1024)

    def choice(tokens: int, offload: bool = False) -> Choice:
        return Choice(Sharding("", "", "torch", offload=offload), training, 1024, tokens, needed)

    one, two, three, offloaded = choice(0), choice(512), choice(4096), choice(65536, offload=True)
    assert best([one, two, three, offloaded], 400) is two
    assert best([one, two, three, offloaded], 512) is two
    assert best([one, two, three, offloaded], 9999) is three
    assert best([one, offloaded], 400) is offloaded
    assert best([one], 1) is None


def test_quantised_weights_are_not_divided_and_one_gpu_is_for_one() -> None:
    training = describe(shape_config("llama-3.2-1b"), bits=4)
    assert [s.name for s in SHARDINGS if possible(s, training, 8)] == ["DDP"]
    assert [s.name for s in SHARDINGS if possible(s, describe(shape_config("llama-3.2-1b")), 1)] == [
        "one GPU",
        "FSDP2 offload",
        "ZeRO-3 offload",
    ]
