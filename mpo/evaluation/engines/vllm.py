"""Answers from vLLM, in this process."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from mpo.errors import ConfigError, DependencyError
from mpo.evaluation.engines.engine import Answer, Conversation, Generation, ModelChoice
from mpo.evaluation.engines.rendering import render

_AT_ONCE = 256  # conversations handed over together: enough to fill vLLM's batches, and few to lose
_LEAST_RANK = 16  # vLLM makes room for adapters of ranks that are powers of two


class VLLMEngine:
    """vLLM makes its batches as it goes, so its greedy answers may differ in a last digit from one run to the next."""

    def __init__(self, choice: ModelChoice, generation: Generation) -> None:
        self.choice, self.generation = choice, generation
        self.opened = choice.open()
        self.rank = 0
        if (found := self.opened.adapter_settings) is not None:
            if found["peft_type"] != "LORA":
                raise ConfigError(
                    f"engine: vLLM takes LoRA adapters, and {choice.adapter} is {found['peft_type']}. Take `transformers`."
                )
            for setting in ("use_dora", "modules_to_save"):
                if found.get(setting):
                    raise ConfigError(
                        f"engine: vLLM takes no adapter with `{setting}`, which {choice.adapter} has. Take `transformers`, "
                        "or fold the adapter into its base with `mpo merge`."
                    )
            self.rank = max(int(found.get("r", 0)), *(found.get("rank_pattern") or {}).values(), 0)
        self._vllm = _import_vllm()
        self._llm: Any = None

    def settings(self) -> dict[str, Any]:
        return {
            "engine": "vllm",
            **self.opened.identity().to_dict(),
            **self.generation.settings(),
        }

    def describe(self) -> dict[str, Any]:
        return {"name": "vllm", "version": getattr(self._vllm, "__version__", None)}

    def generate(
        self, conversations: Sequence[Conversation], done: Collection[int]
    ) -> Iterator[tuple[int, Answer]]:
        missing = [index for index in range(len(conversations)) if index not in done]
        for start in range(0, len(missing), _AT_ONCE):
            part = missing[start : start + _AT_ONCE]
            prompts = [
                render(self.opened.tokenizer, conversations[index], self.opened.chat_template_kwargs)
                for index in part
            ]
            outputs = self._load().generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [self._sampling(index) for index in part],
                lora_request=self._adapter(),
                use_tqdm=False,
            )
            for index, output in zip(part, outputs, strict=True):
                first = output.outputs[0]
                yield index, Answer(first.text, first.finish_reason != "length")

    def close(self) -> None:
        self._llm = None

    def _load(self) -> Any:
        if self._llm is None:
            options: dict[str, Any] = {}
            if self.choice.adapter is not None:
                options = {"enable_lora": True, "max_lora_rank": _rank_for(self.rank)}
            self._llm = self._vllm.LLM(
                model=self.choice.model,
                revision=self.choice.revision,
                dtype=self.choice.dtype or "auto",
                trust_remote_code=self.choice.trust_remote_code,
                seed=self.generation.seed,
                **options,
            )
        return self._llm

    def _sampling(self, index: int) -> Any:
        generation = self.generation
        return self._vllm.SamplingParams(
            max_tokens=generation.max_new_tokens,
            temperature=generation.temperature,
            top_p=generation.top_p,
            seed=None if generation.greedy else generation.seed + index,
        )

    def _adapter(self) -> Any:
        if self.choice.adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest("adapter", 1, _local_folder(self.choice.adapter, self.choice.adapter_revision))


def _rank_for(rank: int) -> int:
    """The least rank that vLLM can make room for and that holds the adapter's."""
    return max(_LEAST_RANK, 1 << (rank - 1).bit_length())


def _local_folder(adapter: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    return adapter if os.path.isdir(adapter) else snapshot_download(adapter, revision=revision)


def _import_vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise DependencyError(
            'The engine `vllm` needs the package vllm: pip install "mpo-align[vllm]". `--engine transformers` needs nothing '
            "more."
        ) from error
    return vllm
