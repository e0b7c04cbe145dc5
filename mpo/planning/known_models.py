"""Published dimensions of well-known models, for plans and benchmarks that need no weights and no network.

A name stands for what the ``config.json`` of that model says of its size; weights, tokenizer and licence are not part
of it. Where the model is at hand, its own folder says the same and more.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from mpo.errors import ModelError

_LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (
        LlamaConfig,
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _LLAMA_ROPE,
        },
    ),
    "gemma-2": (Gemma2Config, {"architectures": ["Gemma2ForCausalLM"], "vocab_size": 256000}),
    "gemma-3": (
        Gemma3TextConfig,
        {
            "architectures": ["Gemma3ForCausalLM"],
            "vocab_size": 262144,
            "max_position_embeddings": 32768,
            "sliding_window": 512,
        },
    ),
    "qwen2.5": (
        Qwen2Config,
        {
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": 152064,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
}
# What the small models of a family have of their own.
_SMALL_LLAMA = {"rope_parameters": {**_LLAMA_ROPE, "factor": 32.0}, "tie_word_embeddings": True}
_SMALL_QWEN = {"vocab_size": 151936, "tie_word_embeddings": True}


def _heads(dim: int, scalar: int) -> dict[str, Any]:
    return {"head_dim": dim, "query_pre_attn_scalar": scalar, "tie_word_embeddings": True}


# Hidden size, intermediate size, layers, heads, heads of keys and values, and what else is set.
_MODELS: dict[str, tuple[int, int, int, int, int, dict[str, Any]]] = {
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, _SMALL_LLAMA),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, _SMALL_LLAMA),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, {}),
    "llama-3.1-70b": (8192, 28672, 80, 64, 8, {}),
    "llama-3.1-405b": (16384, 53248, 126, 128, 8, {}),
    "gemma-2-2b": (2304, 9216, 26, 8, 4, _heads(256, 256)),
    "gemma-2-9b": (3584, 14336, 42, 16, 8, _heads(256, 256)),
    "gemma-2-27b": (4608, 36864, 46, 32, 16, _heads(128, 144)),
    "gemma-3-270m": (640, 2048, 18, 4, 1, _heads(256, 256)),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, _SMALL_QWEN),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, _SMALL_QWEN),
    "qwen2.5-3b": (2048, 11008, 36, 16, 2, _SMALL_QWEN),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, {}),
    "qwen2.5-14b": (5120, 13824, 48, 40, 8, {}),
    "qwen2.5-32b": (5120, 27648, 64, 40, 8, {}),
    "qwen2.5-72b": (8192, 29568, 80, 64, 8, {}),
}

SHAPES: tuple[str, ...] = tuple(_MODELS)
"""Names that :func:`shape_config` knows."""


def shape_config(name: str) -> PretrainedConfig:
    """A new configuration with the published dimensions of a model.

    Args:
        name: One of :data:`SHAPES`, in any case; ``-instruct`` and ``-it`` endings and a Hub organisation before it are
            ignored, since they change nothing in the size.

    Raises:
        ModelError: The name is not known.
    """
    key = name.rpartition("/")[2].lower().removesuffix("-instruct").removesuffix("-it")
    if key not in _MODELS:
        raise ModelError(
            f"there are no dimensions of a model {name!r}; known are {', '.join(SHAPES)}. Any other model is given as a "
            "folder with its config.json."
        )
    kind, common = next(family for name, family in _FAMILIES.items() if key.startswith(name))
    hidden, intermediate, layers, heads, key_value_heads, own = _MODELS[key]
    return kind(
        **{
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            **copy.deepcopy({**common, **own}),
        }
    )
