"""One optimizer step's gradients, computed in each of the ways that the benchmarks compare.

All but TRL's DPO compute the same loss, the mean over the target pairs of ``(beta RG - RG_ref)^2 + retention``, and the
same gradient; ``tests/benchmarks/test_step.py`` holds them to the trainer's step. The official formulation is written
here as plainly as its paper states it, with one correction: padding is not averaged into the retention term.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from benchmarks import varlen
from mpo.data.contract import PARTS
from mpo.errors import ConfigError
from mpo.modeling.head import attach_reward_gap_head
from mpo.modeling.layout import CALL_TOKENS, batch_shape, call_on_trees
from mpo.modeling.loss import mpo_loss, reward_gap
from mpo.modeling.pairs import PairTensors, run_in_calls, run_model
from mpo.modeling.tree_attention import IMPLEMENTATION as TREE
from mpo.modeling.trees import Tree
from mpo.training.sampling import GroupCollator, to_device

Group = Mapping[str, Any]
Pair = tuple[list[int], list[int], list[int]]

_PAD = 0


@dataclass
class Setting:
    """
    What a step works on.

    Attributes:
        policy: the model to train, with a LoRA adapter or without; it has the reward-gap head.
        reference: the frozen starting policy of full fine-tuning; None with LoRA, where it is the policy without adapter.
        beta: scale of the target gap.
        autocast: dtype of mixed precision, or None.
    """

    policy: Any
    reference: PreTrainedModel | None
    beta: float = 1.0
    autocast: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.policy.device
        return device

    def computing(self) -> Any:
        """The context in which models are called."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    @contextlib.contextmanager
    def frozen(self) -> Any:
        """The reference, to be called without gradients."""
        off = self.policy.disable_adapter() if self.reference is None else contextlib.nullcontext()
        with torch.no_grad(), off:
            yield self.policy if self.reference is None else self.reference

    def attend_with(self, attention: str) -> None:
        """Choose the attention implementation of all models."""
        for model in (self.policy, self.reference):
            if model is not None:
                (
                    model.get_base_model() if hasattr(model, "get_base_model") else model
                ).set_attn_implementation(attention)


def plain_attention(config: PretrainedConfig) -> str:
    """What a padded batch is attended with: ``eager`` where scores are soft-capped, which ``sdpa`` cannot do."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"


def build_setting(
    source: PretrainedConfig | str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    lora: int = 16,
    beta: float = 1.0,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
) -> Setting:
    """
    A model to measure steps of.

    Args:
        source: a config, of which a model with random weights is made on the device, or a model folder.
        device: where.
        dtype: of the weights that are not trained; what is trained is float32.
        lora: rank of an adapter on all linear layers, 0 for full fine-tuning.
        beta, autocast: see :class:`Setting`.
        checkpointing: recompute activations in the backward pass.
    """
    if isinstance(source, str):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype if lora else torch.float32).to(
            device
        )
    else:
        with device:
            model = AutoModelForCausalLM.from_config(source, dtype=dtype if lora else torch.float32)
    model.config.pad_token_id = _PAD
    attach_reward_gap_head(model)
    reference = None
    if lora:
        adapter = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear")
        policy: Any = get_peft_model(model, adapter)
    else:
        policy = model
        reference = copy.deepcopy(model).to(dtype).requires_grad_(False).eval()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora:
            model.enable_input_require_grads()
    return Setting(policy.train(), reference, beta, autocast)


# ---- The official formulation ---------------------------------------------------------------------------------------


def official(setting: Setting, groups: Sequence[Group], *, batched: bool = False) -> Tensor:
    """
    Separate passes of padded sequences, the reference live, the logits of every token in float32.

    Args:
        setting: models.
        groups: tokenized groups.
        batched: all pairs of a group in one batch, instead of one pair at a time.

    Returns:
        The step's loss; its gradient has been added to the policy's parameters.
    """
    count = sum(len(group["target_prompt"]) for group in groups)
    total = torch.zeros((), device=setting.device)
    for group in groups:
        pairs = list(zip(*(group[f"target_{part}"] for part in PARTS), strict=True))
        source = tuple(group[f"source_{part}"] for part in PARTS)
        for batch in [pairs] if batched else [[pair] for pair in pairs]:
            sources = [source] * len(batch)
            with setting.computing():
                source_states = _padded_pass(setting.policy, sources)[1]
                target_logps = _padded_pass(setting.policy, batch)[0]
                with setting.frozen() as reference:
                    reference_logps, reference_states = _padded_pass(reference, sources)
            gap = target_logps[:, 0] - target_logps[:, 1]
            kept = (source_states - reference_states).square().mean(dim=(1, 2))
            reference_gap = reference_logps[:, 0] - reference_logps[:, 1]
            loss = ((setting.beta * gap - reference_gap).square() + kept).sum() / count
            loss.backward()
            total += loss.detach()
    return total


def _padded_pass(model: Any, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """
    Run chosen and rejected of B pairs as 2 B rows, padded to a multiple of 8.

    Returns:
        ``[B, 2]`` mean log-likelihood per response token, and ``[B, 2, H]`` mean final hidden state over real tokens.
    """
    sequences = [(pair[0], pair[branch]) for branch in (1, 2) for pair in pairs]
    length = -(-max(len(prompt) + len(response) for prompt, response in sequences) // 8) * 8
    ids = torch.full((len(sequences), length), _PAD)
    real = torch.zeros_like(ids)
    scored = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        real[row, :end] = 1
        scored[row, len(prompt) : end] = 1
    ids, real, scored = (tensor.to(model.device) for tensor in (ids, real, scored))
    outputs = model(input_ids=ids, attention_mask=real, use_cache=False, output_hidden_states=True)
    log_probs = torch.log_softmax(outputs.logits[:, :-1].float(), dim=-1)
    token_logps = log_probs.gather(2, ids[:, 1:, None]).squeeze(2) * scored[:, 1:]
    logps = token_logps.sum(dim=1) / scored.sum(dim=1)
    states = outputs.hidden_states[-1].float() * real[:, :, None]
    pooled = states.sum(dim=1) / real.sum(dim=1, keepdim=True)
    return logps.view(2, -1).T, pooled.view(2, len(pairs), -1).transpose(0, 1)


# ---- The trainer's formulations ------------------------------------------------------------------------------------


class Own:
    """
    The trainer's step: sources once, their reference from a pass made before, packed trees or padded rows.

    Args:
        setting: models.
        groups: all groups that will be asked for; their reference is computed here.
        layout: ``"tree"`` or ``"padded"``.
        attention: implementation.
        row_tokens, call_tokens: budgets; None for the trainer's default, 0 for no limit of a call.
    """

    def __init__(
        self,
        setting: Setting,
        groups: Sequence[Group],
        *,
        layout: str,
        attention: str,
        row_tokens: int | None = None,
        call_tokens: int | None = None,
    ) -> None:
        self.setting = setting
        self.attention = attention
        shape = batch_shape(
            setting.device,
            layout=layout,
            pad_token_id=_PAD,
            pooling="mean",
            max_tokens_per_row=row_tokens,
            attention=attention,
        )
        # flex_attention works in blocks of 128 tokens.
        self.collator = GroupCollator(
            languages=["xx"],
            language_weights=[1.0],
            shape=shape,
            pad_to_multiple_of=128 if attention == "flex_attention" else None,
            max_tokens_per_call=CALL_TOKENS.get(setting.device.type)
            if call_tokens is None
            else call_tokens or None,
        )
        self.reference: dict[int, tuple[float, np.ndarray]] = {}
        setting.attend_with(attention)
        for group in groups:
            source = Tree(*(group[f"source_{part}"] for part in PARTS), score=True, pool=True)
            with setting.computing(), setting.frozen() as reference:
                output = call_on_trees(reference, [source], shape, setting.device)
            gap = float(output.response_logps[0, 0] - output.response_logps[0, 1])
            self.reference[id(group)] = gap, output.pooled[0].float().cpu().numpy()

    def __call__(self, groups: Sequence[Group]) -> Tensor:
        """The step's loss; its gradient has been added to the policy's parameters."""
        setting = self.setting
        examples = []
        for place, group in enumerate(groups):
            gap, hidden = self.reference[id(group)]
            examples.append(
                {**group, "group": place, "filler": False, "reference_gap": gap, "reference_hidden": hidden}
            )
        batch = self.collator(examples)
        batch = {
            name: [to_device(call, setting.device) for call in value]
            if name == "calls"
            else to_device(value, setting.device)
            if name == "source_call"
            else value
            for name, value in to_device(batch, setting.device).items()
        }
        total = torch.zeros((), device=setting.device)

        def backward(pairs: PairTensors, _: Tensor | None = None) -> None:
            gap = reward_gap(pairs.chosen_logps, pairs.rejected_logps)
            losses = mpo_loss(gap, pairs.reference_gap, pairs.retention, beta=setting.beta)
            loss = losses.sum() / batch["num_pairs"]
            loss.backward()
            total.add_(loss.detach())

        with setting.computing():
            if "calls" in batch:
                run_in_calls(setting.policy, batch, backward)
            else:
                backward(run_model(setting.policy, batch)[0])
        return total


# ---- TRL's DPO -----------------------------------------------------------------------------------------------------


class Dpo:
    """
    A yardstick: TRL's ``DPOTrainer`` on the same target pairs, a group's pairs in one batch, its reference live.

    It trains the same parameters for another loss, and makes no pass over the sources.
    """

    def __init__(self, setting: Setting, folder: str) -> None:
        from datasets import Dataset
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        class Prepared(DPOTrainer):  # type: ignore[misc]
            def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
                return dataset

        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<pad>": _PAD}, unk_token="<pad>")),
            pad_token="<pad>",
            eos_token="<pad>",
        )
        empty = Dataset.from_dict({"prompt_ids": [[1]], "chosen_ids": [[1]], "rejected_ids": [[2]]})
        self.setting = setting
        self.trainer = Prepared(
            model=setting.policy,
            ref_model=setting.reference,
            args=DPOConfig(
                output_dir=folder,
                beta=0.1,
                bf16=setting.autocast is torch.bfloat16,
                gradient_checkpointing=False,
                use_cpu=setting.device.type == "cpu",
                report_to="none",
                remove_unused_columns=False,
            ),
            train_dataset=empty,
            processing_class=tokenizer,
        )
        if "ref" in getattr(setting.policy, "peft_config", {}):
            # The adapter is new, so the base model without it is the reference, and TRL's copy of it is not needed.
            setting.policy.delete_adapter("ref")
        self.collator = DataCollatorForPreference(pad_token_id=_PAD)

    def __call__(self, groups: Sequence[Group]) -> Tensor:
        """DPO's loss, the mean over groups of the mean over their pairs; its gradient has been added."""
        total = torch.zeros((), device=self.setting.device)
        for group in groups:
            pairs = zip(*(group[f"target_{part}"] for part in PARTS), strict=True)
            batch = self.collator(
                [{f"{part}_ids": ids for part, ids in zip(PARTS, pair, strict=True)} for pair in pairs]
            )
            batch = to_device(batch, self.setting.device)
            with self.setting.computing():
                loss = self.trainer._compute_loss(self.trainer.model, batch, False) / len(groups)
            loss.backward()
            total += loss.detach()
        return total


# ---- By name -------------------------------------------------------------------------------------------------------

NAMES = (
    "official",
    "official, batched",
    "TRL DPO",
    "padded",
    "trees (tree)",
    "trees (sdpa)",
    "trees (eager)",
    "trees (flex_attention)",
    "trees (varlen)",
)


def available(config: PretrainedConfig, device: torch.device) -> list[str]:
    """
    The formulations that a model and a device can run.

    ``sdpa`` and the kernel for sequences of any length have no soft-cap; ``flex_attention`` does not train on a CPU. On a
    CPU that kernel's stand-in runs where it is asked for by name.
    """
    names = list(NAMES)
    if plain_attention(config) == "eager":
        names.remove("trees (sdpa)")
    if device.type == "cpu":
        names.remove("trees (flex_attention)")
    if plain_attention(config) == "eager" or device.type == "cpu" or varlen.torch_kernel() is None:
        names.remove("trees (varlen)")
    return names


def prepare(
    name: str,
    setting: Setting,
    groups: Sequence[Group],
    *,
    folder: str,
    row_tokens: int | None = None,
    call_tokens: int | None = None,
) -> Callable[[Sequence[Group]], Tensor]:
    """
    A function that computes the gradient of a step on groups and returns its loss.

    Args:
        name: one of :data:`NAMES`.
        setting: models, shared by all formulations.
        groups: all groups that the function will be called with.
        folder: that TRL's trainer may write to.
        row_tokens, call_tokens: see :class:`Own`.
    """
    plain = plain_attention(setting.policy.config)
    attention = name.partition("(")[2].rstrip(")") or plain
    kernel = None
    if attention == "varlen":
        attention = TREE
        kernel = varlen.plain_kernel if setting.device.type == "cpu" else varlen.torch_kernel()
        if kernel is None:
            raise ConfigError(
                "this torch has no `varlen_attn`; leave `trees (varlen)` out of `--formulations`."
            )
    if name.startswith("official"):
        batched = name != "official"
        step: Callable[[Sequence[Group]], Tensor] = lambda chosen: official(setting, chosen, batched=batched)  # noqa: E731
    elif name == "TRL DPO":
        step = Dpo(setting, folder)
    else:
        layout = "padded" if name == "padded" else "tree"
        limit = row_tokens if layout == "tree" and attention != TREE else None
        with varlen.in_place_of_trees(kernel):
            step = Own(
                setting, groups, layout=layout, attention=attention, row_tokens=limit, call_tokens=call_tokens
            )

    def run(chosen: Sequence[Group]) -> Tensor:
        setting.attend_with(attention)
        with varlen.in_place_of_trees(kernel):
            return step(chosen)

    return run
