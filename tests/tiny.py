"""Tiny random models, tokenizers and data, built on the spot.

Nothing here needs a network or a file. The models have the parts of their large relatives that preference training
can get wrong: grouped key-value heads, soft-caps, sliding windows smaller than the texts, tied embeddings, biases,
rotary scaling, a router. Their weights are larger than a fresh model's, so that attention is far from uniform and a
wrong mask or position changes the result by much more than rounding.

From the shell, ``python -m tests.tiny --family gemma2 --out DIR`` saves one as a model folder.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

MODEL_FAMILIES = ("llama", "gemma2", "qwen2", "gemma3", "qwen3", "mixtral")
TOKENIZER_FAMILIES = ("llama", "gemma", "qwen")
LANGUAGES = ("zh", "ja", "ko", "ar", "bn", "sw")

VOCAB = 512  # tokens of every tokenizer here; a multiple of 256

# Words to train the tokenizers on and to make random texts from. Spaces are joined in where the script has them.
_WORDS: dict[str, tuple[str, ...]] = {
    "en": (
        "river",
        "please",
        "open",
        "the",
        "window",
        "I",
        "cannot",
        "help",
        "with",
        "that",
        "bread",
        "and",
        "seven",
    ),
    "zh": ("河流", "请", "打开", "窗户", "我", "不能", "帮助", "这个", "面包", "和", "七", "明天", "下雨"),
    "ja": (
        "川",
        "どうぞ",
        "開けて",
        "窓を",
        "わたしは",
        "できません",
        "それを",
        "手伝う",
        "パン",
        "そして",
        "七つ",
    ),
    "ko": (
        "강물",
        "제발",
        "열어",
        "창문을",
        "나는",
        "못해요",
        "그것을",
        "도와",
        "빵과",
        "그리고",
        "일곱",
        "내일",
    ),
    "ar": ("نهر", "من", "فضلك", "افتح", "النافذة", "أنا", "لا", "أستطيع", "مساعدة", "الخبز", "سبعة", "غدا"),
    "bn": ("নদী", "দয়া", "করে", "খুলুন", "জানালা", "আমি", "পারি", "না", "সাহায্য", "রুটি", "এবং", "সাত"),
    "sw": (
        "mto",
        "tafadhali",
        "fungua",
        "dirisha",
        "mimi",
        "siwezi",
        "kusaidia",
        "hiyo",
        "mkate",
        "na",
        "saba",
    ),
}
_NO_SPACES = {"zh", "ja"}

_LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('a system turn is not supported') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate between user and assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a tiny assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Per family: special tokens in the order of their ids, which of them are bos, eos and pad, and the chat template.
# As in the large relatives, Llama ends a text with its end of turn and has no padding token, Gemma's end of turn is
# not its end of text, and Qwen has no first token.
_SPECIAL: dict[str, tuple[tuple[str, ...], dict[str, str], str]] = {
    "llama": (
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        _LLAMA_TEMPLATE,
    ),
    "gemma": (
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        _GEMMA_TEMPLATE,
    ),
    "qwen": (
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        _QWEN_TEMPLATE,
    ),
}
_TOKENIZER_OF = {
    "llama": "llama",
    "mixtral": "llama",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "qwen": "qwen",
    "qwen2": "qwen",
    "qwen3": "qwen",
}


@lru_cache
def _trained_tokenizer(family: str) -> str:
    """JSON of a byte-level BPE of ``VOCAB`` tokens: all 256 bytes are tokens, so that every text round-trips."""
    special, names, _ = _SPECIAL[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if family == "qwen":
        # AutoTokenizer gives a saved qwen2 folder these parts whatever its files say, so train with them.
        qwen = Qwen2Tokenizer().backend_tokenizer
        tokenizer.normalizer, tokenizer.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        # A word is repeated as often as its rank demands, so that no two merges tie.
        (" ".join([word] * (index + 2)) for words in _WORDS.values() for index, word in enumerate(words)),
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            min_frequency=1,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        ),
    )
    if "bos_token" in names:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return tokenizer.to_str()


def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """
    Build a tokenizer of 512 tokens whose chat template has the shape of the family's.

    As in the large relatives, calling a llama or gemma tokenizer on a text adds the first token, which the chat
    template also writes; the gemma template refuses a system turn; the qwen template adds a system turn of its own;
    the llama tokenizer has no padding token. Every text round-trips, but qwen's comes back in Unicode's NFC.

    Args:
        family: ``llama``, ``gemma`` or ``qwen``, or a model family of :func:`build_model`.
    """
    family = _TOKENIZER_OF[family]
    _, names, template = _SPECIAL[family]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer(family)),
        chat_template=template,
        model_max_length=4096,
        padding_side="left" if family == "gemma" else "right",
        clean_up_tokenization_spaces=False,
        **names,
    )


def _config(
    family: str, *, layers: int, hidden: int, vocab: int | None, tie: bool | None, window: int
) -> Any:
    """Configuration of a tiny model; ``window`` positions are what a sliding layer sees, its own included."""
    tokenizer = build_tokenizer(family)
    common: dict[str, Any] = {
        "vocab_size": vocab or VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,  # the least that flex_attention's kernel takes on a GPU
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if tie is not None:
        common["tie_word_embeddings"] = tie
    alternating = ["full_attention" if index % 2 else "sliding_attention" for index in range(layers)]
    if family == "llama":
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        return LlamaConfig(**{"tie_word_embeddings": False, **common}, rope_parameters=rope)
    if family == "gemma2":
        return Gemma2Config(
            **common,
            query_pre_attn_scalar=16,
            sliding_window=window,
            layer_types=alternating,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=4.0,
        )
    if family == "gemma3":
        rope_per_type = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
        }
        return Gemma3TextConfig(
            **common,
            query_pre_attn_scalar=16,
            sliding_window=window,
            layer_types=alternating,
            rope_parameters=rope_per_type,
        )
    if family == "qwen2":
        # Qwen2 models have more rows in the vocabulary than their tokenizer has tokens.
        common["vocab_size"] = vocab or VOCAB + 64
        return Qwen2Config(**{"tie_word_embeddings": False, **common})
    if family == "qwen3":
        return Qwen3Config(**{"tie_word_embeddings": False, **common})
    if family == "mixtral":
        return MixtralConfig(
            **common,
            num_local_experts=4,
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=0.02,
        )
    raise ValueError(f"unknown family '{family}': expected one of {', '.join(MODEL_FAMILIES)}")


@torch.no_grad()
def _draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Draw weights with which hidden states keep their scale and neither attention nor output is flat."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            values *= 0.1
            if name.endswith(
                "weight"
            ):  # a norm: its gain is close to one, Gemma stores the distance from one
                values += 0.0 if model.config.model_type.startswith("gemma") else 1.0
        elif "embed_tokens" in name or "lm_head" in name:
            values *= 2.0 / parameter.shape[-1] ** 0.5
        else:
            sharp = any(part in name for part in ("q_proj", "k_proj", "router", "mlp.gate.weight"))
            values *= (2.0 if sharp else 1.0) / parameter.shape[-1] ** 0.5
        parameter.copy_(values)


def build_model(
    family: str,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    vocab: int | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "eager",
    tie: bool | None = None,
    sliding_window: int = 8,
) -> PreTrainedModel:
    """
    Build a random model. Weights depend on the family, the sizes and the seed, but not on the dtype: they are drawn
    in float32 and cast, so that a float64 model is the same function as its float32 twin.

    Args:
        family: one of ``MODEL_FAMILIES``. ``gemma2`` has soft-caps, alternating sliding windows and tied embeddings;
            ``gemma3`` has one rotary embedding per layer type; ``qwen2`` has biases and a vocabulary larger than the
            tokenizer's; ``mixtral`` has four experts and asks for its router loss.
        seed: of the weights.
        layers: number of layers; with two or more, the gemma models have both layer types.
        hidden: hidden size, a multiple of 4.
        vocab: rows of the embedding; by default those the family would have for this tokenizer.
        dtype: of the parameters. Buffers, such as rotary frequencies, stay in float32.
        attn_implementation: ``eager``, ``sdpa`` or ``flex_attention``. Gemma-2 cannot take ``sdpa``.
        tie: tied embeddings; by default as in the family (gemma: yes, others: no).
        sliding_window: positions that a sliding layer sees, the token's own included.

    Returns:
        The model in evaluation mode, as ``from_pretrained`` returns it.
    """
    config: PreTrainedConfig = _config(
        family, layers=layers, hidden=hidden, vocab=vocab, tie=tie, window=sliding_window
    )
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "dtype": torch.float32}
    if family == "mixtral":
        options["experts_implementation"] = "eager"  # the default's kernel takes no float64
    model = AutoModelForCausalLM.from_config(config, **options)
    _draw_weights(model, seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    tokenizer = build_tokenizer(family)
    end_of_turn = "<end_of_turn>" if _TOKENIZER_OF[family] == "gemma" else tokenizer.eos_token
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end_of_turn)}),
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval()


def save_tiny(family: str, folder: str | Path, **options: Any) -> Path:
    """Save a model and its tokenizer as a model folder; ``options`` are those of :func:`build_model`."""
    folder = Path(folder)
    build_model(family, **options).save_pretrained(folder)
    build_tokenizer(family).save_pretrained(folder)
    return folder


def random_text(rng: random.Random, language: str, words: int) -> str:
    """Text of ``words`` random words in the script of the language."""
    joint = "" if language in _NO_SPACES else " "
    return joint.join(rng.choice(_WORDS[language]) for _ in range(words))


def _random_pair(
    rng: random.Random, language: str, row: int, words: tuple[int, int], turns: int
) -> dict[str, Any]:
    def message(role: str) -> dict[str, str]:
        return {"role": role, "content": random_text(rng, language, rng.randint(*words))}

    prompt = [message("assistant" if index % 2 else "user") for index in range(2 * rng.randint(1, turns) - 1)]
    chosen = message("assistant")
    rejected = message("assistant")
    while rejected["content"] == chosen["content"]:
        rejected["content"] += random_text(rng, language, 1)
    return {"language": language, "prompt": prompt, "chosen": [chosen], "rejected": [rejected], "row": row}


def random_groups(
    rng: random.Random | int,
    n_groups: int,
    k_range: tuple[int, int] = (1, 4),
    languages: Sequence[str] = LANGUAGES,
    *,
    source_language: str = "en",
    words: tuple[int, int] = (1, 12),
    turns: int = 1,
) -> list[dict[str, Any]]:
    """
    Make group rows with texts of random length in several scripts.

    Args:
        rng: generator or seed; the same seed gives the same rows.
        n_groups: number of rows.
        k_range: fewest and most targets per source, both included. More targets than languages repeat languages.
        languages: target languages to draw from, a subset of ``LANGUAGES`` and ``en``.
        source_language: language of every source.
        words: fewest and most words per message, both included.
        turns: most user turns in a prompt; with 1, every prompt is one user message.

    Returns:
        Rows ``{"source": pair, "targets": [pair, ...], "origin": str}``. The source prompts of two rows differ.
    """
    if isinstance(rng, int):
        rng = random.Random(rng)
    groups: list[dict[str, Any]] = []
    row = 0
    for index in range(n_groups):
        source = _random_pair(rng, source_language, row, words, turns)
        source["prompt"][-1]["content"] += f" {index}"
        k = rng.randint(*k_range)
        drawn = [*rng.sample(list(languages), min(k, len(languages))), *rng.choices(languages, k=k)][:k]
        targets = [
            _random_pair(rng, language, row + offset, words, turns) for offset, language in enumerate(drawn)
        ]
        row += k
        groups.append({"source": source, "targets": targets, "origin": "random_groups"})
    return groups


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.tiny", description="Save a tiny random model folder."
    )
    parser.add_argument("--family", required=True, choices=MODEL_FAMILIES)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(save_tiny(arguments.family, arguments.out, seed=arguments.seed))


if __name__ == "__main__":
    _main()
