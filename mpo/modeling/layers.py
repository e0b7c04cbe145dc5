"""Hidden states between the layers of a model, as they are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mpo.errors import ModelError


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a causal language model that reads tokens: everything but the LM head.

    Raises:
        ModelError: It has no list of blocks under a name that transformers uses.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ModelError(
            f"The blocks of {type(base).__name__} cannot be found: its decoder has no `layers`. States between layers are read "
            "from models that are built like Llama, Gemma, Qwen, Mistral or Phi."
        )
    found: nn.Module = decoder
    return found


@contextmanager
def watching(decoder: nn.Module, layers: Iterable[int], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Calls ``see(layer, states)`` when the states of a layer are computed.

    Args:
        decoder: From :func:`decoder_of`.
        layers: 0 for what enters the first block, i for what block i gives, before any norm.
        see: Given the layer and its states ``[rows, tokens, hidden]``.
    """
    blocks: Any = decoder.layers

    def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(0, args[0] if args else kwargs["hidden_states"])

    def leaving(number: int) -> Any:
        return lambda _module, _args, output: see(number, output[0] if isinstance(output, tuple) else output)

    hooks = []
    try:
        for number in layers:
            if number == 0:
                hooks.append(blocks[0].register_forward_pre_hook(entering, with_kwargs=True))
            else:
                hooks.append(blocks[number - 1].register_forward_hook(leaving(number)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
