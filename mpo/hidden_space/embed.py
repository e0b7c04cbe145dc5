"""Embedding texts: the hidden states of a model after reading a text, pooled, from any of its layers.

**Layers** are counted in the residual stream. Layer 0 is what enters the first block: the token embeddings, with the
factor that Gemma puts on them. Layer i is what block i gives, before any norm. ``norm`` is the last block's output after
the model's final norm, which is what the LM head reads and what transformers returns as the last hidden state. (The last
entry of transformers' ``hidden_states`` is ``norm``, too: the output of the last block itself is not in that list.)

**Pooling**: ``last`` is the state at the last token, ``mean`` the mean over all tokens of the text, template and special
tokens included. Both are computed in float32 inside the forward pass, so that no layer's states are kept.

Texts are padded on the right and batched by length. Nothing is generated and the LM head is not run.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, tqdm
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mpo.common.provenance import collect
from mpo.data.tokenization import render
from mpo.errors import ConfigError, DataError
from mpo.hidden_space.resampling import Array
from mpo.hidden_space.settings import NORM, POOLINGS, EmbeddingSettings
from mpo.hidden_space.store import EmbeddingStore, EmbeddingWriter, is_complete
from mpo.hidden_space.texts import TextSet
from mpo.modeling.layers import decoder_of, watching
from mpo.modeling.loading import ModelSource, pick_device
from mpo.modeling.opening import open_model
from mpo.modeling.padding import padded
from mpo.training.ranks import Ranks

_COMMIT_EVERY = 10.0  # seconds of work that a kill may cost


def resolve_layers(wanted: Sequence[str], blocks: int) -> list[str]:
    """Names of layers, in order and each once.

    Args:
        wanted: ``all``, numbers from ``-blocks`` to ``blocks``, ``norm``.
        blocks: Number of the model's blocks.

    Raises:
        ConfigError: There is no such layer.
    """
    numbers: set[int] = set()
    for name in wanted:
        if name == "all":
            numbers.update(range(blocks + 2))
        elif name == NORM:
            numbers.add(blocks + 1)
        else:
            try:
                number = int(name)
            except ValueError:
                number = blocks + 1
            if not -blocks <= number <= blocks:
                raise ConfigError(
                    f"`layers` holds {name!r}; expected all, norm, or numbers from 0 (embeddings) to {blocks} (after the "
                    "last block), or negative ones that count from there."
                )
            numbers.add(number + blocks + 1 if number < 0 else number)
    if not numbers:
        raise ConfigError("`layers` is empty; expected all, norm, or numbers of layers.")
    return [NORM if number > blocks else str(number) for number in sorted(numbers)]


# --------------------------------------------------------------------------------------------------------- the model


def pool(states: Tensor, mask: Tensor, poolings: Sequence[str]) -> Tensor:
    """Pool the states of each text in float32.

    Args:
        states: ``[b, t, hidden]``.
        mask: ``[b, t]`` booleans, True for tokens of the text, on whichever side the padding is.
        poolings: Of ``last`` and ``mean``.

    Returns:
        ``[poolings, b, hidden]`` float32.
    """
    out = []
    for name in poolings:
        if name == "last":
            last = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)
            out.append(states[torch.arange(len(states), device=states.device), last].float())
        else:
            # Padding may hold anything, infinities included, so it is replaced and not multiplied by 0.
            total = torch.where(mask[..., None], states.float(), 0.0).sum(dim=1)
            out.append(total / mask.sum(dim=1, keepdim=True))
    return torch.stack(out)


def pooled_states(
    decoder: nn.Module, input_ids: Tensor, mask: Tensor, layers: Sequence[str], poolings: Sequence[str]
) -> Array:
    """One forward pass, pooled in every layer while it runs.

    Args:
        decoder: From :func:`decoder_of`.
        input_ids: ``[b, t]``.
        mask: ``[b, t]``, 1 or True for tokens of the text.
        layers: From :func:`resolve_layers`.
        poolings: Of ``last`` and ``mean``.

    Returns:
        ``[layers, poolings, b, hidden]`` float32.
    """
    found: dict[str, Tensor] = {}
    mask = mask.bool()
    numbers = [int(name) for name in layers if name != NORM]
    with watching(decoder, numbers, lambda i, states: found.update({str(i): pool(states, mask, poolings)})):
        output = decoder(
            input_ids=input_ids,
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        )
    if NORM in layers:
        found[NORM] = pool(output.last_hidden_state, mask, poolings)
    return torch.stack([found[name] for name in layers]).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------- the texts


def tokenize(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[list[int]], int]:
    """Token ids of each text, and how many texts were cut.

    Raises:
        DataError: The template alone is longer than `max_length`, or a text has no token.
    """
    rendered = partial(_render_chat, template_kwargs=template_kwargs) if template == "chat" else _render_raw
    tokens, cut = [], 0
    for number, text in enumerate(texts):
        ids = rendered(tokenizer, text)
        if len(ids) > max_length:
            ids, cut = _shortened(tokenizer, text, rendered, max_length), cut + 1
        if not ids:
            raise DataError("the text has no token.", row=number)
        tokens.append(ids)
    return tokens, cut


def _render_raw(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _render_chat(
    tokenizer: PreTrainedTokenizerBase, text: str, template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    return render(tokenizer, [{"role": "user", "content": text}], template_kwargs)


def _shortened(tokenizer: PreTrainedTokenizerBase, text: str, rendered: Any, max_length: int) -> list[int]:
    """The rendering of the longest beginning of the text that fits.

    Cut in characters, not in tokens: tokens decoded again are at times other text, above all at the end, where a
    character of several tokens would be left in halves.
    """
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if len(rendered(tokenizer, text[:middle])) <= max_length:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        raise DataError(
            f"the chat template alone fills `max_length` = {max_length} tokens. Raise `max_length`."
        )
    ids: list[int] = rendered(tokenizer, text[:low])
    return ids


def batches_by_length(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Rows by falling length, in batches of at most so many tokens, padding included, but of at least one text."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # The first text of a batch is its longest.
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens_per_batch:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


# ----------------------------------------------------------------------------------------------------------- the pass


def process_group(device: torch.device) -> PartialState:
    """The processes that a launcher has started, or this one alone.

    Accelerate joins processes on CPUs only when it is told that they are on CPUs; otherwise each takes itself for the only
    one.

    Args:
        device: That a process alone would use.
    """
    return PartialState(cpu=device.type == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU"))


class Embedder:
    """One model, and its adapter if it has one, which embeds texts without it and with it.

    The weights are loaded when they are first needed: nothing is loaded for embeddings that are on disk already.

    Args:
        source: The model.
        settings: How to embed.
        adapter: Folder or Hub name of an adapter.
        ranks: Process group; by default Accelerate's.
    """

    def __init__(
        self,
        source: ModelSource,
        settings: EmbeddingSettings,
        *,
        adapter: str | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.source, self.settings, self.adapter = source, settings, adapter
        device = pick_device(settings.device)
        self.ranks: Ranks = process_group(device) if ranks is None else ranks
        several = self.ranks.num_processes > 1
        if several and device.index is not None:
            raise ConfigError(
                f"`device` is {settings.device!r}, but {self.ranks.num_processes} processes are launched, of which each takes "
                f"a device of its own. Write `device: {device.type}` or leave it out; `CUDA_VISIBLE_DEVICES` chooses among "
                "GPUs."
            )
        self.opened = open_model(
            source,
            adapter=adapter,
            chat_template=settings.chat_template,
            chat_template_kwargs=settings.chat_template_kwargs,
            needs_template=settings.template == "chat",
            dtype=settings.dtype,
            device=self.ranks.device if several else device,
            attn_implementation=settings.attn_implementation,
        )
        self.device = self.opened.device
        self._model: Any = None

    @property
    def text_config(self) -> Any:
        """Configuration of the language model, also where it is part of a larger one."""
        return self.opened.config.get_text_config()

    @property
    def layers(self) -> list[str]:
        """Names of the layers that are embedded, in order.

        Raises:
            ConfigError: The model lacks one of them.
        """
        return resolve_layers(self.settings.layers, self.text_config.num_hidden_layers)

    def embed(self, texts: TextSet, folder: str | Path, *, with_adapter: bool = False) -> EmbeddingStore:
        """Embed texts into a store, or open the store where they are already.

        All ranks call this; each embeds its part of the texts, and all get the store.

        Args:
            texts: What to embed.
            folder: Of the store, on a disk that all ranks share.
            with_adapter: With the adapter switched on.

        Raises:
            MPOError: The model, the texts or the folder cannot be used.
        """
        if with_adapter and self.adapter is None:
            raise ConfigError(f"{self.source.name} is to be embedded with an adapter, but none is given.")
        tokens, cut = tokenize(
            texts.texts,
            self.opened.tokenizer,
            self.settings.template,
            self.settings.max_length,
            self.opened.chat_template_kwargs,
        )
        identity = self._identity(texts, tokens, with_adapter)
        complete = is_complete(folder, identity)
        self.ranks.wait_for_everyone()  # before any rank makes or renames anything
        if complete:
            return EmbeddingStore(folder)
        writer = EmbeddingWriter(folder, identity, self.ranks.process_index)
        if self.ranks.is_main_process:
            writer.prepare()
        self.ranks.wait_for_everyone()
        writer.open()
        try:
            self._run(writer, tokens, with_adapter)
        finally:
            writer.close()
        self.ranks.wait_for_everyone()
        if self.ranks.is_main_process:
            columns = {
                "language": list(texts.language),
                "harmful": texts.harmful.tolist(),
                "unit": texts.unit.tolist(),
                "tokens": [len(ids) for ids in tokens],
            }
            writer.finish(columns, self._provenance(texts, cut, with_adapter))
        self.ranks.wait_for_everyone()
        return EmbeddingStore(folder)

    def release(self) -> None:
        """Give the memory of the weights back."""
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _identity(
        self, texts: TextSet, tokens: Sequence[Sequence[int]], with_adapter: bool
    ) -> dict[str, Any]:
        digest = xxhash.xxh3_128()
        for ids in tokens:
            digest.update(np.asarray([len(ids), *ids], dtype="<i4").tobytes())
        reader = self.opened.identity(with_adapter=with_adapter)
        return {
            "weights": reader.model,
            "adapter": reader.adapter,
            "rows": texts.fingerprint,
            "token_ids": digest.hexdigest(),
            "texts": len(tokens),
            "layers": self.layers,
            "poolings": [name for name in POOLINGS if name in self.settings.poolings],
            "hidden_size": self.text_config.hidden_size,
            "dtype": reader.dtype,
            "attention": reader.attention,
        }

    def _provenance(self, texts: TextSet, cut: int, with_adapter: bool) -> dict[str, Any]:
        return collect(
            base_model=self.source.name,
            adapter=self.adapter if with_adapter else None,
            precision=str(self.opened.dtype),
            data_fingerprint=texts.fingerprint,
            settings={name: value for name, value in asdict(self.settings).items() if value is not None},
            texts_cut=cut,
        )

    def _load(self) -> Any:
        if self._model is None:
            self._model = self.opened.load()
        return self._model

    def _run(self, writer: EmbeddingWriter, tokens: Sequence[list[int]], with_adapter: bool) -> None:
        done = writer.done()
        self.ranks.wait_for_everyone()  # all ranks have read the journals before any adds to them
        left = [row for row in range(len(tokens)) if row not in done]
        if not left:
            return
        budget = self.settings.tokens_per_batch or (2048 if self.device.type == "cpu" else 16384)
        batches = batches_by_length([len(tokens[row]) for row in left], budget)
        mine = batches[self.ranks.process_index :: self.ranks.num_processes]
        model = self._load()
        decoder = decoder_of(model)
        layers, poolings = writer.identity["layers"], writer.identity["poolings"]
        off = self.adapter is not None and not with_adapter
        last_commit = time.monotonic()
        with model.disable_adapter() if off else nullcontext(), torch.inference_mode():
            bar = tqdm(
                mine,
                desc=f"Embedding {len(left)} texts{' with the adapter' if with_adapter else ''}",
                disable=bool(os.environ.get("TQDM_DISABLE", "")),
            )
            for batch in bar:
                rows = [left[place] for place in batch]
                input_ids, mask = padded([tokens[row] for row in rows], self.device)
                found = pooled_states(decoder, input_ids, mask, layers, poolings)
                writer.write(rows, {name: found[:, place] for place, name in enumerate(poolings)})
                if time.monotonic() - last_commit > _COMMIT_EVERY:
                    writer.commit()
                    last_commit = time.monotonic()
            writer.commit()
