"""Greedy answers to the probe prompts from the model in training: whole or divided over ranks, each rank a part of the prompts.

``generate`` is not used: a model that an engine has divided must be called as training calls it, by all ranks equally often.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mpo.common.progress import CountProgress
from mpo.errors import ModelError
from mpo.evaluation.answers import AnswerRow, Framing
from mpo.evaluation.engines.local import (
    by_length,
    head_input_in_one_piece,
    no_router_loss,
    read_answer,
    stop_tokens,
)
from mpo.evaluation.engines.rendering import render
from mpo.evaluation.prompts import Prompt
from mpo.modeling.padding import padded
from mpo.training.ranks import gathered
from mpo.training.sharding import CallablePolicy, inference, is_sharded

BATCH = 16
"""Prompts that are answered together."""


@dataclass(frozen=True)
class Questions:
    """Prompts for a model, and how they are asked.

    Attributes:
        policy: The model, which all ranks hold or share.
        tokenizer: Its tokenizer, with a chat template.
        max_new_tokens: Longest answer.
        template_kwargs: Extra arguments of the chat template.
    """

    policy: CallablePolicy
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    template_kwargs: Mapping[str, Any] | None = None

    def ask(self, prompts: Sequence[Prompt], title: str | None = None) -> list[AnswerRow]:
        """The model's most likely answer to each prompt. All ranks call this and get all answers.

        The model is in the mode that it was in afterwards, and random numbers are as if nothing had been asked.

        Args:
            prompts: The same on all ranks.
            title: Of the progress that the main process shows; None shows none.

        Raises:
            ModelError: A rank could not answer. All ranks raise it, but where one lets the others wait within a call of a
                divided model.
        """
        accelerator = self.policy.accelerator
        tokens = [
            render(self.tokenizer, Framing().conversation(prompt), self.template_kwargs) for prompt in prompts
        ]
        batches = by_length(tokens, BATCH)
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        together = is_sharded(accelerator) and accelerator.num_processes > 1
        if together:  # as many calls as the rank with the most; what is answered twice is dropped
            mine += batches[-1:] * (-(-len(batches) // accelerator.num_processes) - len(mine))
        shows = title is not None and accelerator.is_main_process
        found: dict[int, AnswerRow] = {}
        failure: str | None = None
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        try:
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices),
                inference(self.policy.callable(), accelerator) as model,
                head_input_in_one_piece(self.policy.model),
                CountProgress(str(title), sum(map(len, mine)), unit="prompt")
                if shows
                else nullcontext() as progress,
            ):
                for batch in mine:
                    answers = self._answers(model, [tokens[index] for index in batch], together)
                    for index, (text, finished) in zip(batch, answers, strict=True):
                        prompt = prompts[index]
                        found[index] = AnswerRow(
                            prompt.id, prompt.prompt_id, prompt.language, prompt.text, text, finished
                        )
                        if progress is not None:
                            progress.advance()
        except torch.distributed.DistError:
            raise
        except Exception as error:
            # The others are waiting for what this rank has found, whatever went wrong here.
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
        everything = gathered([(found, failure)], accelerator)
        failures = [failure for _, failure in everything if failure is not None]
        if failures:
            raise ModelError(failures[0])
        rows = {index: row for part, _ in everything for index, row in part.items()}
        return [rows[index] for index in range(len(prompts))]

    def _answers(self, model: Any, prompts: Sequence[list[int]], together: bool) -> list[tuple[str, bool]]:
        """Text of each answer, and whether it came to an end."""
        stops = stop_tokens(self.policy.model, self.tokenizer)
        pad = self.tokenizer.pad_token_id
        pad = stops[0] if pad is None else pad
        ids, mask = padded(prompts, self.policy.accelerator.device, fill=pad, side="left")
        extra = no_router_loss(self.policy.model)
        written = _written(model, ids, mask, stops, self.max_new_tokens, together, extra).tolist()
        answers = [
            read_answer(self.tokenizer, prompt, tokens, stops)
            for prompt, tokens in zip(prompts, written, strict=True)
        ]
        return [(answer.text, answer.finished) for answer in answers]


def _written(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    stops: Sequence[int],
    most: int,
    together: bool,
    extra: Mapping[str, Any],
) -> Tensor:
    """The most likely tokens one after another, ``[prompts, tokens]``; after one of ``stops`` that token again.

    Args:
        model: What to call.
        ids, mask: ``[prompts, longest]``, padded on the left.
        stops: Tokens that end a turn.
        most: Tokens at most.
        together: Whether all ranks go on until the last of them is done.
        extra: Further arguments of each call.
    """
    last_tokens = torch.tensor(stops, device=ids.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    cache, token, written = None, ids[:, -1], []
    for _ in range(most):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **extra,
        )
        cache = output.past_key_values
        token = torch.where(done, token, output.logits[:, -1].argmax(dim=-1))
        written.append(token)
        done = done | torch.isin(token, last_tokens)
        finished = done.all()
        if together:
            finished = finished.to(torch.int32)
            torch.distributed.all_reduce(finished, op=torch.distributed.ReduceOp.MIN)
        if finished:
            break
        ids, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.stack(written, dim=1)
