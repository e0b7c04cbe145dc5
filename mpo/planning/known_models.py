"""Published dimensions of well-known models, for plans and benchmarks that need no weights and no network.

A name stands for what the ``config.json`` of that model says of its size; weights, tokenizer and licence are not part
of it. Where the model is at hand, its own folder says the same and more.
"""

from __future__ import annotations

from typing import Any

from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from mpo.errors import ModelError


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, *, factor: float = 8.0, tied: bool = False
) -> PretrainedConfig:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return LlamaConfig(
        **_common(hidden, intermediate, layers, heads, key_value_heads=8, vocab=128256, tied=tied),
        rope_parameters=rope,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        architectures=["LlamaForCausalLM"],
    )


def _gemma2(
    hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, head_dim: int, scalar: int
) -> PretrainedConfig:
    return Gemma2Config(
        **_common(hidden, intermediate, layers, heads, key_value_heads=key_value_heads, vocab=256000),
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
        architectures=["Gemma2ForCausalLM"],
    )


def _gemma3(
    hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int
) -> PretrainedConfig:
    return Gemma3TextConfig(
        **_common(hidden, intermediate, layers, heads, key_value_heads=key_value_heads, vocab=262144),
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        max_position_embeddings=32768,
        architectures=["Gemma3ForCausalLM"],
    )


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, *, vocab: int = 152064
) -> PretrainedConfig:
    tied = vocab == 151936  # the small ones, up to 3B, have the smaller vocabulary and tie it
    return Qwen2Config(
        **_common(
            hidden, intermediate, layers, heads, key_value_heads=key_value_heads, vocab=vocab, tied=tied
        ),
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        max_position_embeddings=32768,
        architectures=["Qwen2ForCausalLM"],
    )


def _common(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    *,
    key_value_heads: int,
    vocab: int,
    tied: bool = True,
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }


_BUILDERS: dict[str, Any] = {
    "llama-3.2-1b": lambda: _llama(2048, 8192, 16, 32, factor=32.0, tied=True),
    "llama-3.2-3b": lambda: _llama(3072, 8192, 28, 24, factor=32.0, tied=True),
    "llama-3.1-8b": lambda: _llama(4096, 14336, 32, 32),
    "llama-3.1-70b": lambda: _llama(8192, 28672, 80, 64),
    "llama-3.1-405b": lambda: _llama(16384, 53248, 126, 128),
    "gemma-2-2b": lambda: _gemma2(2304, 9216, 26, 8, 4, 256, 256),
    "gemma-2-9b": lambda: _gemma2(3584, 14336, 42, 16, 8, 256, 256),
    "gemma-2-27b": lambda: _gemma2(4608, 36864, 46, 32, 16, 128, 144),
    "gemma-3-270m": lambda: _gemma3(640, 2048, 18, 4, 1),
    "qwen2.5-0.5b": lambda: _qwen2(896, 4864, 24, 14, 2, vocab=151936),
    "qwen2.5-1.5b": lambda: _qwen2(1536, 8960, 28, 12, 2, vocab=151936),
    "qwen2.5-3b": lambda: _qwen2(2048, 11008, 36, 16, 2, vocab=151936),
    "qwen2.5-7b": lambda: _qwen2(3584, 18944, 28, 28, 4),
    "qwen2.5-14b": lambda: _qwen2(5120, 13824, 48, 40, 8),
    "qwen2.5-32b": lambda: _qwen2(5120, 27648, 64, 40, 8),
    "qwen2.5-72b": lambda: _qwen2(8192, 29568, 80, 64, 8),
}

SHAPES: tuple[str, ...] = tuple(_BUILDERS)
"""Names that :func:`shape_config` knows."""


def shape_config(name: str) -> PretrainedConfig:
    """
    A new configuration with the published dimensions of a model.

    Args:
        name: one of :data:`SHAPES`, in any case; ``-instruct`` and ``-it`` endings and a Hub organisation before it are
            ignored, since they change nothing in the size.

    Raises:
        ModelError: the name is not known.
    """
    key = name.rpartition("/")[2].lower().removesuffix("-instruct").removesuffix("-it")
    if key not in _BUILDERS:
        raise ModelError(
            f"there are no dimensions of a model {name!r}; known are {', '.join(SHAPES)}. Any other model is given as a "
            "folder with its config.json."
        )
    config: PretrainedConfig = _BUILDERS[key]()
    return config
