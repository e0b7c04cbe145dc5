"""Likelihood of plain texts under a model, without the logits of a whole row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from mpo.errors import DataError
from mpo.modeling.head import logit_scale
from mpo.modeling.padding import padded


def text_likelihoods(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 1024,
    batch_size: int = 8,
) -> list[tuple[float, int]]:
    """Log-likelihood of each text, and the number of tokens it is of: all but the text's first.

    Args:
        model: A causal language model or a PEFT model of one.
        tokenizer: Of the model; its own special tokens are added.
        texts: Any texts.
        max_length: Texts are cut to this many tokens.
        batch_size: Texts per model call.

    Returns:
        ``[(sum of the tokens' log-probabilities in nats, number of tokens)]`` in the order of the texts; (0, 0) for a
        text of less than two tokens.
    """
    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model
    config = base.config.get_text_config()
    head = base.get_output_embeddings()
    device = head.weight.device
    ids = [tokenizer(text)["input_ids"][:max_length] for text in texts]
    scored = [(0.0, 0)] * len(ids)
    order = sorted((n for n, i in enumerate(ids) if len(i) >= 2), key=lambda n: len(ids[n]))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            tokens, mask = padded([ids[n] for n in numbers], device)
            with torch.no_grad():
                hidden = base.base_model(
                    input_ids=tokens, attention_mask=mask, use_cache=False
                ).last_hidden_state
                predicts = mask[:, 1:].bool()
                log_probs = ChunkedLogProbFunction.apply(
                    hidden[:, :-1][predicts],
                    head.weight,
                    getattr(head, "bias", None),
                    tokens[:, 1:][predicts],
                    1.0,
                    8192,
                    getattr(config, "final_logit_softcapping", None),
                    logit_scale(config),
                    (),
                )[0]
            counts = [len(ids[n]) - 1 for n in numbers]
            for n, part in zip(numbers, log_probs.double().split(counts), strict=True):
                scored[n] = (float(part.sum()), len(ids[n]) - 1)
    finally:
        model.train(was_training)
    return scored


def perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 1024,
    batch_size: int = 8,
) -> float:
    """Perplexity of texts: ``exp`` of the mean negative log-likelihood per token but the first of each text.

    Args:
        model, tokenizer, texts, max_length, batch_size: As for :func:`text_likelihoods`.

    Raises:
        DataError: No text has two tokens.
    """
    scored = text_likelihoods(model, tokenizer, texts, max_length=max_length, batch_size=batch_size)
    tokens = sum(count for _, count in scored)
    if not tokens:
        raise DataError("no text has two tokens or more, so there is nothing to predict.")
    return math.exp(-math.fsum(total for total, _ in scored) / tokens)
