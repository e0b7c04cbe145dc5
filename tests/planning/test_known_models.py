"""The dimensions of known models give the numbers of parameters that their makers publish."""

from __future__ import annotations

import pytest

from mpo.errors import ModelError
from mpo.modeling.loading import ModelSource, empty_model
from mpo.planning.known_models import SHAPES, shape_config

# Sizes of the safetensors of each model on the Hub, tied weights counted once.
PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_as_many_parameters_as_the_published_model(name: str) -> None:
    model = empty_model(shape_config(name), ModelSource(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


def test_a_name_on_the_hub_is_understood() -> None:
    assert shape_config("meta-llama/Llama-3.1-8B-Instruct").hidden_size == 4096
    assert shape_config("google/gemma-2-9b-it").head_dim == 256


def test_two_configurations_are_not_the_same_object() -> None:
    shape_config("qwen2.5-7b").hidden_size = 1
    assert shape_config("qwen2.5-7b").hidden_size == 3584


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"gpt-9.*llama-3\.1-8b"):
        shape_config("gpt-9")
