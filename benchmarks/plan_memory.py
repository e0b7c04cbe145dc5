"""Compares the memory that ``mpo plan`` counts with that of the tensors of real training steps on a CPU.

    python -m benchmarks.plan_memory

Every run takes two optimizer steps of a small random Llama with real tensors, in float32 or in bfloat16 under autocast as on
one GPU (an adapter then has a base in bfloat16). All tensors are counted while they live (:class:`mpo.planning.activations.LiveMemory`); the second step, which has AdamW's states, is compared. Two things are not as on a
GPU, and are left out of the comparison: a CPU has no fused kernels for the LM head's tiles, so what the head takes is
measured alone and put into the plan; and its attention makes copies of keys and values that heads share, so the model has
none.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from mpo.common.tables import TextTable
from mpo.modeling.adapters import skip_input_casts
from mpo.modeling.head import attach_reward_gap_head
from mpo.modeling.trees import Tree, build_batch
from mpo.planning.activations import LiveMemory
from mpo.planning.memory import SHARDINGS, Memory, describe, memory
from mpo.training.sampling import to_device


@dataclass(frozen=True)
class Case:
    """What is trained: an adapter or all weights, with activations kept or recomputed, on trees of ``length`` tokens.

    ``half`` computes in bfloat16 under autocast, else all is float32.
    """

    adapter: bool
    recomputed: bool
    length: int
    trees: int = 1
    attention: str = "tree"
    half: bool = False

    @property
    def tokens(self) -> int:
        return self.length * self.trees

    @property
    def row(self) -> int:
        """Trees lie in one row under ``tree`` attention, each in its own under a mask."""
        return self.tokens if self.attention == "tree" else self.length


CASES = tuple(
    Case(adapter, recomputed, length, trees, attention, half)
    for half in (False, True)
    for attention in ("tree", "eager")
    for adapter in (False, True)
    for recomputed in (False, True)
    for length, trees in ((256, 1), (256, 4), (1024, 1))
)


def config(hidden: int = 256, layers: int = 6, vocab: int = 4096) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        vocab_size=vocab,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )


def lora(case: Case) -> LoraConfig | None:
    return (
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        if case.adapter
        else None
    )


def counted(model_config: PretrainedConfig, case: Case, *, head: bool = True) -> Memory:
    """What the plan says; with ``head`` the LM head's part is what it takes on a CPU."""
    adapter = lora(case)
    training = describe(
        model_config,
        adapter=adapter,
        half=case.half,
        bits=16 if case.half else 32,
        checkpointing=case.recomputed,
        attention=case.attention,
        tree_tokens=case.length,
        reference_tokens=1,
    )
    plan = memory(training, SHARDINGS[0], 1, case.tokens, case.row, adapter)
    return replace(plan, lm_head=head_peak(model_config, case)) if head else plan


def head_peak(model_config: PretrainedConfig, case: Case) -> int:
    """Peak bytes of the LM head in a step: those of a model without layers, beside its weights."""
    layerless = copy.deepcopy(model_config)
    layerless.num_hidden_layers = 0
    model = build(layerless, case)
    model.requires_grad_(not case.adapter)
    model.enable_input_require_grads()
    counter = LiveMemory()
    with counter:
        backward(model, batch(model_config, case), case)
    return counter.peak


def measured(model_config: PretrainedConfig, case: Case, device: str = "cpu") -> int:
    """Peak bytes of the second of two real training steps: of all live tensors, on CUDA what torch had allocated for it."""
    cuda = torch.device(device).type == "cuda"
    gc.collect()  # a model with the head is a cycle, and an earlier one would still lie on the GPU
    if cuda:
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() if cuda else 0
    inputs = to_device(batch(model_config, case), torch.device(device))
    counter = LiveMemory()
    with nullcontext() if cuda else counter:
        model = build(model_config, case, device)
        adapter = lora(case)
        if adapter is not None:
            model = get_peft_model(model, adapter)
            skip_input_casts(model)
            model.enable_input_require_grads()
        if case.recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=False
        )
        for _ in range(2):
            counter.peak = counter.current
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            backward(model, inputs, case)
            optimizer.step()
            optimizer.zero_grad()
    return torch.cuda.max_memory_allocated() - before if cuda else counter.peak


def batch(model_config: PretrainedConfig, case: Case) -> dict[str, Any]:
    """Trees of random tokens."""
    rng = random.Random(0)
    response = (case.length - case.length // 8) // 2  # prompts are short, as in real data
    trees = [
        Tree(
            *(
                [rng.randrange(3, model_config.vocab_size) for _ in range(n)]
                for n in (case.length - 2 * response, response, response)
            )
        )
        for _ in range(case.trees)
    ]
    return build_batch(trees, layout="tree", max_tokens_per_row=case.row, pad_token_id=0, pooling="mean")


def build(model_config: PretrainedConfig, case: Case, device: str = "cpu") -> Any:
    """A random model with the reward-gap head."""
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            model_config,
            attn_implementation=case.attention,
            dtype=torch.bfloat16 if case.half and case.adapter else torch.float32,
        )
    attach_reward_gap_head(model)
    return model


def backward(model: Any, inputs: dict[str, Any], case: Case) -> None:
    """Forward and backward pass of a loss on the gaps."""
    with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16, enabled=case.half):
        logps = model(reward_gap_head=True, **inputs).response_logps
    (logps[:, 0] - logps[:, 1]).square().mean().backward()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model_config = config(arguments.hidden, arguments.layers, arguments.vocab)
    rows = []
    for case in CASES:
        plan, real = counted(model_config, case), measured(model_config, case)
        rows.append(
            (
                "bf16" if case.half else "float32",
                "an adapter" if case.adapter else "all weights",
                "recomputed" if case.recomputed else "kept",
                case.attention,
                f"{case.trees} x {case.length:,}",
                f"{plan.tensors / 1e6:.1f}",
                f"{real / 1e6:.1f}",
                f"{plan.tensors / real - 1:+.1%}",
            )
        )
    table = TextTable(
        title="MB of live tensors in a training step on one CPU",
        header=(
            "Compute",
            "Trained",
            "Activations",
            "Attention",
            "Trees",
            "Counted",
            "Measured",
            "Deviation",
        ),
        rows=tuple(rows),
    )
    print(table.plain())


if __name__ == "__main__":
    main()
