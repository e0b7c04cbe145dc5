"""The policy that training starts from, and its tokenizer: opened by name, or as they were given."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id

from mpo.data.tokenization import set_chat_template
from mpo.errors import ModelError
from mpo.modeling.loading import ModelSource, load_tokenizer
from mpo.modeling.opening import OpenedModel, open_model
from mpo.training.config import MPOConfig

# Arguments of `from_pretrained` that are passed on by name or set here.
_OWN_INIT_KWARGS = ("revision", "trust_remote_code", "use_safetensors", "dtype", "attn_implementation")


def open_policy(
    model: Any, tokenizer: Any, args: MPOConfig, quantization_config: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and its tokenizer, loaded where they are not yet, with the chat template that training uses.

    Raises:
        ModelError: Model or tokenizer cannot be loaded or used.
    """
    if isinstance(model, str):
        opened = _open(model, args, tokenizer)
        tokenizer, args.chat_template_kwargs = opened.tokenizer, opened.chat_template_kwargs or None
        model = opened.load(quantization_config=quantization_config, **_init_kwargs(args))
    name = get_config_model_id(model.config)
    if tokenizer is None:
        if not name:
            raise ModelError(
                "the model was not loaded from anywhere: pass its tokenizer as `processing_class`."
            )
        tokenizer = load_tokenizer(source_of(name, args), args.chat_template)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(
            f"`processing_class` is a {type(tokenizer).__name__}; MPO trains on text and needs a tokenizer."
        )
    set_chat_template(tokenizer, args.chat_template, name or "the tokenizer")
    return model, tokenizer


def source_of(name: str, args: MPOConfig) -> ModelSource:
    """Where a model of this name is read from, as the settings say."""
    kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    return ModelSource(name, kwargs.get("revision"), args.trust_remote_code)


def _open(name: str, args: MPOConfig, tokenizer: PreTrainedTokenizerBase | None) -> OpenedModel:
    given: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    return open_model(
        source_of(name, args),
        tokenizer=tokenizer,
        chat_template=args.chat_template,
        chat_template_kwargs=args.chat_template_kwargs,  # type: ignore[arg-type]
        dtype=given.get("dtype", "float32"),
        device=args.device,
        attn_implementation=given.get("attn_implementation"),
        layout=args.batch_layout,
        trained=True,
        compiled=bool(args.torch_compile),
    )


def _init_kwargs(args: MPOConfig) -> dict[str, Any]:
    kwargs = {k: v for k, v in (args.model_init_kwargs or {}).items() if k not in _OWN_INIT_KWARGS}  # type: ignore[union-attr]
    if args.distributed_state is not None and args.distributed_state.distributed_type in (
        "MULTI_GPU",
        "DEEPSPEED",
    ):
        kwargs["device_map"] = None
    return kwargs
