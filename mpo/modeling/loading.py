"""Opening models, adapters and tokenizers: checked before anything large is read, with errors a person can act on.

Only safetensors are read and no code of a model is run unless `trust_remote_code` asks for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mpo.common.files import did_you_mean
from mpo.common.words import counted
from mpo.data.tokenization import set_chat_template
from mpo.errors import ConfigError, ModelError
from mpo.modeling.layout import default_attention

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, and what may be done to read it."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def is_local(self) -> bool:
        return os.path.isdir(self.name)

    def hub_kwargs(self) -> dict[str, Any]:
        """Arguments of every ``from_pretrained``."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def load_config(source: ModelSource) -> PretrainedConfig:
    """Reads the model's configuration and checks that its weights are readable safetensors, without loading them.

    Raises:
        ModelError: There is no such folder or Hub name; it is gated, private or not in the cache while offline; the
            folder is no model folder; weights are missing, damaged or not safetensors; the architecture is unknown.
    """
    _require_plausible_name(source.name)
    if source.is_local:
        _check_folder(Path(source.name))
    with _opening(source.name, "configuration"):
        config = AutoConfig.from_pretrained(source.name, **source.hub_kwargs())
    for setting in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        value = getattr(config.get_text_config(), setting, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ModelError(
                f"The configuration of {source.name} has `{setting}: {value!r}`; expected a whole number of at least 1. Take the "
                "config.json that was saved with the weights."
            )
    if not config.architectures:
        raise ModelError(
            f"The configuration of {source.name} names no architecture (`architectures`), so it is unknown which model its "
            "weights belong to. Take the config.json that was saved with them."
        )
    if not source.is_local:
        _check_hub_files(source)
    return config


def load_tokenizer(
    source: ModelSource,
    chat_template: str | None = None,
    *,
    needs_template: bool = True,
    config: PretrainedConfig | None = None,
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer and makes sure that it has a chat template and a padding token.

    Args:
        source: Where from.
        chat_template: Replaces the tokenizer's own.
        needs_template: False for reading texts as they are; then neither is asked for.
        config: Of the model, where the tokenizer lies elsewhere: transformers picks the tokenizer's class by it.

    Raises:
        ModelError: There is no tokenizer, or no chat template and none is given.
    """
    _require_plausible_name(source.name)
    with _opening(source.name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.name, config=config, **source.hub_kwargs())
    if source.is_local and len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(
            f"The model folder {source.name} has no tokenizer (no tokenizer.json). Copy the tokenizer files of the "
            "model it was made from into it."
        )
    if needs_template:
        set_chat_template(tokenizer, chat_template, f"The tokenizer of {source.name}")
    tokenizer_: PreTrainedTokenizerBase = tokenizer
    return tokenizer_


def load_model(
    source: ModelSource,
    *,
    dtype: str | torch.dtype | None = "float32",
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    **init_kwargs: Any,
) -> PreTrainedModel:
    """Loads the weights, from safetensors only.

    Args:
        source: Where from.
        dtype: Type of the loaded weights, or ``"auto"`` for that of the checkpoint.
        attn_implementation: See :func:`pick_attention`.
        quantization_config: Of transformers, for 4 and 8 bits.
        init_kwargs: Further arguments of ``from_pretrained``.

    Raises:
        ModelError: The weights cannot be read.
    """
    from trl.trainer.utils import create_model_from_path

    if quantization_config is not None:
        init_kwargs["quantization_config"] = quantization_config
    with _opening(source.name, "weights"):
        loaded: Any = create_model_from_path(
            source.name,
            output_loading_info=True,
            dtype=dtype,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            **source.hub_kwargs(),
            **init_kwargs,
        )
    model, report = loaded
    unexpected = report["unexpected_keys"]
    if is_quantized(model.config):  # scales and zero points lie beside the weights that they belong to
        holders = {
            name for name, part in model.named_modules() if next(part.parameters(False), None) is not None
        }
        unexpected = {key for key in unexpected if not any(key.startswith(f"{name}.") for name in holders)}
    problem = _misfit(report["missing_keys"], unexpected)
    if problem:
        raise ModelError(
            f"The weights of {source.name} do not fit its configuration: {problem}. Is the config.json another model's, or "
            "the folder incomplete?"
        )
    return cast(PreTrainedModel, model)


def _misfit(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """How the tensors of a file differ from those that a model takes; empty where they do not."""
    parts = []
    for keys, what in ((sorted(missing), "missing"), (sorted(unexpected), "of no use to it")):
        if keys:
            parts.append(
                f"{counted(len(keys), 'tensor')} {'is' if len(keys) == 1 else 'are'} {what} ({keys[0]})"
            )
    return " and ".join(parts)


def load_adapter(
    model: PreTrainedModel, adapter: str, *, trainable: bool = False, revision: str | None = None
) -> Any:
    """Puts an existing PEFT adapter on a model, from safetensors only.

    Raises:
        ModelError: There is no such adapter, or it does not fit the model.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel, get_peft_model_state_dict

    adapter_settings(adapter, revision=revision)
    kwargs: dict[str, Any] = {"revision": revision} if revision else {}
    with _opening(adapter, "adapter"):
        try:
            config: Any = PeftConfig.from_pretrained(adapter, **kwargs)
            config.inference_mode = not trainable
            # What `PeftModel.from_pretrained` does; that one keeps to itself which tensors it found no use for.
            policy = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)(model, config)
            report = policy.load_adapter(
                adapter,
                "default",
                is_trainable=trainable,
                key_mapping=getattr(model, "_checkpoint_conversion_mapping", {}),
                **kwargs,
            )
        except (RuntimeError, ValueError, KeyError) as error:
            raise _misfitting_adapter(adapter, model, _first_sentence(error)) from error
    tensors = dict(policy.named_parameters(remove_duplicate=False))
    found = {id(tensor) for name, tensor in tensors.items() if name not in report.missing_keys}
    # A tensor that layers share (VB-LoRA) is in the file under one of its names.
    missing = {name for name in report.missing_keys if id(tensors.get(name)) not in found}
    if getattr(config, "bias", "none") != "none":  # PEFT looks for tensors of its own only
        stored = adapter_tensors(adapter, revision=revision)
        missing |= {key for key in get_peft_model_state_dict(policy) if key.endswith(".bias")} - stored
    # A prompt's tensors are loaded into its encoder, which has checks of its own and is no part of this report.
    problem = _misfit(missing, () if config.is_prompt_learning else report.unexpected_keys)
    if problem:
        raise _misfitting_adapter(adapter, model, f"{problem}.")
    return policy


def _misfitting_adapter(adapter: str, model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(
        f"The adapter {adapter} does not fit the model {model.config._name_or_path or 'given'}: {reason} Was it trained on "
        "another base model?"
    )


def adapter_tensors(adapter: str, *, revision: str | None = None) -> set[str]:
    """Names of the tensors in an adapter's safetensors file.

    Raises:
        ModelError: There is no such file, only a pickle, or the file is damaged or holds no tensor.
    """
    path = file_of(adapter, "adapter_model.safetensors", revision=revision)
    if path is None:
        if file_of(adapter, "adapter_model.bin", revision=revision) is not None:
            what = (
                ", only a pickle (adapter_model.bin), which could run code when read. Save it again as safetensors with a "
                "current version of PEFT."
            )
        elif os.path.isdir(adapter):
            what = ". Was its training cut off while saving?"
        else:
            what = f" on the Hub or, while offline, in the cache. `hf download {adapter}` fetches it where there is a network."
        raise ModelError(f"The adapter {adapter} has no adapter_model.safetensors{what}")
    names = _open_safetensors(path)
    if not names:
        raise ModelError(
            f"The adapter's {path} holds no tensor, so it would change nothing. Save the adapter again."
        )
    return names


def file_of(name: str, file: str, *, revision: str | None = None) -> Path | None:
    """A file of a model folder or a Hub repository; None where there is none, or none is in the cache while offline."""
    if os.path.isdir(name):
        path = Path(name) / file
        return path if path.is_file() else None
    from transformers.utils import cached_file

    with _opening(name, file):
        found = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return None if found is None else Path(found)


def adapter_settings(adapter: str, *, revision: str | None = None) -> dict[str, Any]:
    """The adapter's ``adapter_config.json``, after checking that its weights are safetensors.

    Raises:
        ModelError: There is no adapter, its configuration is damaged, or its weights are a pickle or missing.
    """
    _require_plausible_name(adapter)
    if os.path.isdir(adapter):
        path = Path(adapter) / "adapter_config.json"
        if not path.is_file():
            what = (
                "It holds a whole model: pass it as the model."
                if (Path(adapter) / "config.json").is_file()
                else ""
            )
            raise ModelError(
                f"{adapter} is no adapter folder: it has no adapter_config.json. {what}".rstrip()
            )
    else:
        from transformers.utils import cached_file

        with _opening(adapter, "adapter"):
            found = cached_file(adapter, "adapter_config.json", revision=revision)
        if found is None:
            raise ModelError(f"{adapter} has no adapter_config.json; it is no adapter.")
        path = Path(found)
    adapter_tensors(adapter, revision=revision)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"The adapter's {path} is damaged: {_first_sentence(error)}") from error
    if not isinstance(settings, dict) or "peft_type" not in settings:
        raise ModelError(f"{path} is not the configuration of a PEFT adapter: it names no `peft_type`.")
    return settings


def pick_attention(
    config: PretrainedConfig, wanted: str | None, *, layout: str = "tree", gpu: bool, compiled: bool = False
) -> str | None:
    """The attention implementation to load a model with.

    Gemma-2's attention soft-cap exists in ``tree``, ``eager`` and ``flex_attention`` only. Flash attention has no place for a
    tree's mask.

    Args:
        config: Of the model.
        wanted: The user's choice, or None.
        layout: ``"tree"`` or ``"padded"``, see ``MPOConfig.batch_layout``.
        gpu: Whether the model will run on a GPU (``flex_attention`` has no backward on a CPU).
        compiled: Whether it will be compiled. ``tree`` attention takes the trees' lengths as numbers, which compiled code
            would have to be compiled for anew in every step.

    Returns:
        The implementation, or None for the model's own default (padded rows, compiled models).

    Raises:
        ConfigError: The user's choice cannot work.
    """
    if wanted is None:
        return default_attention(config, "padded" if compiled else layout)
    if compiled and wanted == "tree":
        raise ConfigError(
            "`attn_implementation` is 'tree' with `torch_compile`, which would compile the model anew in every step. Set "
            "`sdpa`, `eager` or `flex_attention`, or remove `torch_compile`."
        )
    soft_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if soft_capped and wanted == "sdpa":
        raise ConfigError(
            f"`attn_implementation` is 'sdpa', but {config.model_type} caps its attention logits, which sdpa cannot do. "
            "Set `tree`, `eager` or, on a GPU, `flex_attention`."
        )
    if layout == "tree" and "flash" in wanted:
        raise ConfigError(
            f"`attn_implementation` is {wanted!r}, but flash attention cannot take the mask of a preference tree. Set "
            "`tree`, `sdpa`, `eager` or `flex_attention`, or `batch_layout: padded` (slower)."
        )
    if wanted == "flex_attention" and not gpu:
        raise ConfigError(
            "`attn_implementation` is 'flex_attention', which cannot be trained on a CPU. Set `tree`, `sdpa` or "
            "`eager`."
        )
    return wanted


def pick_device(wanted: str | None) -> torch.device:
    """The device to measure on: the user's choice, or a GPU where there is one.

    Raises:
        ConfigError: There is no such device.
    """
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"`device` is {wanted!r}; expected cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"`device` is {wanted!r}, but this machine has {torch.cuda.device_count()} GPUs for torch."
        )
    return device


def pick_dtype(device: torch.device) -> str:
    """The type to measure in where none is asked for: bfloat16 on a GPU that has it, else float32."""
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def empty_model(config: PretrainedConfig, source: ModelSource) -> PreTrainedModel:
    """The model's modules on torch's ``meta`` device: shapes and names, no memory."""
    import transformers
    from transformers.modeling_utils import set_zero3_state

    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    # Under ZeRO-3 transformers divides every new model over the ranks, unless it is told that this is under way already.
    with set_zero3_state(), torch.device("meta"):
        if architecture is not None and hasattr(architecture, "_from_config"):
            model = architecture._from_config(config)
        else:
            with _opening(source.name, "architecture"):
                model = transformers.AutoModelForCausalLM.from_config(
                    config, trust_remote_code=source.trust_remote_code
                )
    model.tie_weights()
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ModelError(
            f"{source.name} is a {type(model).__name__}, which has no language-model head. MPO needs a causal language "
            "model."
        )
    return model


def linear_layer_names(model: torch.nn.Module) -> list[str]:
    """Last parts of the names of the model's linear layers, sorted: what `lora_target_modules` may name."""
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
    )


def is_quantized(config: PretrainedConfig) -> bool:
    """Whether the checkpoint itself holds quantised weights (GPTQ, AWQ, bitsandbytes, ...)."""
    return getattr(config, "quantization_config", None) is not None


# -------------------------------------------------------------------------------------------------------------- checks


def _require_plausible_name(name: str) -> None:
    if os.path.isdir(name):
        return
    if os.path.isfile(name):
        raise ModelError(f"{name} is a file; expected a model folder or a name on the Hub such as org/model.")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name or name.endswith("/"):
        raise ModelError(f"There is no model folder {name} (looked in {os.getcwd()}).{did_you_mean(name)}")


def _check_folder(folder: Path) -> None:
    try:
        files = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise ModelError(f"The model folder {folder} cannot be read: {error.strerror or error}.") from None
    if "config.json" not in files:
        if "adapter_config.json" in files:
            raise ModelError(
                f"{folder} holds an adapter, not a model. Pass it as the adapter (`adapter_name_or_path`, `--adapter`) "
                "and its base model as the model, or fold the two with `mpo merge`."
            )
        listed = ", ".join(files[:6]) + (", ..." if len(files) > 6 else "") if files else "nothing"
        raise ModelError(f"{folder} is no model folder: it has no config.json (it holds {listed}).")
    if "model.safetensors.index.json" in files:
        try:
            index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
            shards = sorted(set(index["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise ModelError(f"{folder}/model.safetensors.index.json is damaged; copy it again.") from None
        missing = [shard for shard in shards if shard not in files]
        if missing:
            raise ModelError(
                f"The model folder {folder} lacks {len(missing)} of {len(shards)} weight files, among them {missing[0]}. "
                "Was the download cut off? Fetch it again."
            )
    else:
        shards = [name for name in files if name.endswith(".safetensors")]
    if not shards:
        _refuse_without_safetensors(str(folder), files)
    for shard in shards:
        _open_safetensors(folder / shard)


def _open_safetensors(path: Path) -> set[str]:
    """Names of the tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        # Opening reads the header and compares it with the file's size, which is what a broken download fails.
        with safe_open(str(path), framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"The weight file {path} is damaged or cut off ({_first_sentence(error)}) Fetch or save it again."
        ) from None


def _refuse_without_safetensors(name: str, files: list[str]) -> None:
    pickles = [file for file in files if file.endswith(_PICKLES) and "training_args" not in file]
    if any(file.endswith(".gguf") for file in files):
        raise ModelError(
            f"{name} holds GGUF weights only. Load it once with transformers (`gguf_file=...`), save it as safetensors, "
            "and pass that folder."
        )
    if pickles:
        raise ModelError(
            f"{name} has no safetensors, only {pickles[0]}: a pickle can run code when it is read, so it is not opened. "
            "Take a revision with safetensors, or convert it with `safetensors.torch.save_model` in a place you trust."
        )
    raise ModelError(f"{name} has no weights: expected model.safetensors or model-00001-of-....safetensors.")


def _check_hub_files(source: ModelSource) -> None:
    from huggingface_hub import HfApi
    from transformers.utils import cached_file

    files: list[str] | None = None
    if not _offline():
        try:
            files = HfApi().list_repo_files(source.name, revision=source.revision)
        except Exception:  # whatever the network did, the cached copy below decides
            files = None
    if files is None:
        path = cached_file(source.name, "config.json", revision=source.revision)
        if path is None:
            return
        files = os.listdir(os.path.dirname(path))
        if not any(file.endswith((".safetensors", *_PICKLES)) for file in files):
            raise ModelError(
                f"The Hub cannot be reached, and the cache holds the configuration of {source.name} but not its "
                "weights. Connect once, or run `hf download` for it where there is a network."
            )
    if not any(file.endswith(".safetensors") for file in files):
        _refuse_without_safetensors(source.name, files)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


# -------------------------------------------------------------------------------------------------------------- errors


@contextmanager
def _opening(name: str, part: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # what libraries raise at a damaged file is anything, an IndexError too
        raise translate_error(name, part, error) from error


def translate_error(name: str, part: str, error: BaseException) -> ModelError:
    """What went wrong in transformers or huggingface_hub while opening ``part`` of ``name``, and what to do."""
    from huggingface_hub import constants, errors

    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__

    def happened(*kinds: str) -> bool:
        types_ = tuple(kind for kind in (getattr(errors, name_, None) for name_ in kinds) if kind is not None)
        return any(isinstance(link, types_) for link in chain)

    text = " ".join(str(link) for link in chain)
    nor_folder = f"There is no folder {name} here either.{did_you_mean(name)}" if name.count("/") < 2 else ""
    if os.path.isdir(name):
        if "trust_remote_code" in text:
            return _remote_code(name)
        if "model type" in text or "model_type" in text:
            return ModelError(_unknown_architecture(name, text))
        if part == "tokenizer":
            return ModelError(
                f"The model folder {name} has no tokenizer that can be read ({_first_sentence(error)}) Copy the "
                "tokenizer files (tokenizer.json, tokenizer_config.json) of the model it was made from into it."
            )
        return ModelError(f"The {part} of {name} cannot be read: {_first_sentence(error)}")
    if happened("GatedRepoError"):
        return ModelError(
            f"{name} is gated. Accept its terms on https://huggingface.co/{name}, then let this machine sign in: set "
            "HF_TOKEN, or run `hf auth login`."
        )
    if happened("RevisionNotFoundError"):
        return ModelError(f"{name} is on the Hub, but not in the revision asked for. Check `model_revision`.")
    if happened("HFValidationError"):
        return ModelError(f"{name!r} is neither a folder nor a valid name on the Hub (org/model).")
    if happened("OfflineModeIsEnabled", "LocalEntryNotFoundError") or _offline():
        return ModelError(
            f"{name} is not in the cache ({constants.HF_HUB_CACHE}) and the Hub "
            + ("is switched off (HF_HUB_OFFLINE is set)" if _offline() else "cannot be reached")
            + f". {nor_folder} Check the spelling; download it where there is a network with `hf download {name}`, or "
            "pass a local folder. Gated and private models also need HF_TOKEN."
        )
    if happened("RepositoryNotFoundError"):
        return ModelError(
            f"{name} is not on the Hub, or it is private. {nor_folder} Check the spelling; for a private model set "
            "HF_TOKEN, or run `hf auth login`."
        )
    if "trust_remote_code" in text:
        return _remote_code(name)
    if "model type" in text or "model_type" in text:
        return ModelError(_unknown_architecture(name, text))
    if happened("EntryNotFoundError"):
        return ModelError(f"{name} is on the Hub, but has no {part}. Is it a causal language model?")
    return ModelError(f"The {part} of {name} cannot be opened: {_first_sentence(error)}")


def _remote_code(name: str) -> ModelError:
    return ModelError(
        f"{name} brings its own Python code, which is not run. If you have read and trust it, set "
        "`trust_remote_code: true`."
    )


def _unknown_architecture(name: str, text: str) -> str:
    import transformers

    return (
        f"transformers {transformers.__version__} does not know the architecture of {name} ({_first_sentence(text)}) "
        "Upgrade transformers, or check config.json."
    )


def _first_sentence(error: object) -> str:
    """First line of a library's message, short and without a stray line break."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    text = text if len(text) <= 240 else text[:237] + "..."
    return text if text.endswith((".", "!", "?")) else text + "."
