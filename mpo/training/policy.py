"""The policy that training starts from, and its tokenizer: opened by name, or as they were given."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id

from mpo.data.tokenization import set_chat_template
from mpo.errors import ModelError
from mpo.modeling.loading import ModelSource, load_config, load_model, load_tokenizer, pick_attention
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
    named = isinstance(model, str)
    name: Any = model if named else get_config_model_id(model.config)
    if tokenizer is None:
        if not name:
            raise ModelError(
                "the model was not loaded from anywhere: pass its tokenizer as `processing_class`."
            )
        tokenizer = load_tokenizer(_source(name, args), args.chat_template)
    if named:
        model = _load(name, args, quantization_config)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(
            f"`processing_class` is a {type(tokenizer).__name__}; MPO trains on text and needs a tokenizer."
        )
    set_chat_template(tokenizer, args.chat_template, get_config_model_id(model.config) or "the tokenizer")
    return model, tokenizer


def _source(name: str, args: MPOConfig) -> ModelSource:
    kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    return ModelSource(name, kwargs.get("revision"), args.trust_remote_code)


def _load(name: str, args: MPOConfig, quantization_config: Any) -> PreTrainedModel:
    source = _source(name, args)
    given: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    kwargs = {k: v for k, v in given.items() if k not in _OWN_INIT_KWARGS}
    if args.distributed_state is not None and args.distributed_state.distributed_type in (
        "MULTI_GPU",
        "DEEPSPEED",
    ):
        kwargs["device_map"] = None
    attention = pick_attention(
        load_config(source),
        given.get("attn_implementation"),
        layout=args.batch_layout,
        gpu=args.device.type != "cpu",
        compiled=bool(args.torch_compile),
    )
    return load_model(
        source,
        dtype=given.get("dtype", "float32"),
        attn_implementation=attention,
        quantization_config=quantization_config,
        **kwargs,
    )
