"""Embeddings: the right layer, the right tokens, the same whatever the batch; stores that survive kills and ranks."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers import processors

from mpo.errors import ConfigError, DataError, ModelError, StorageError
from mpo.hidden_space import embed as module
from mpo.hidden_space import store as store_module
from mpo.hidden_space.embed import (
    Embedder,
    EmbeddingSettings,
    batches_by_length,
    decoder_of,
    pool,
    pooled_states,
    resolve_layers,
    tokenize,
)
from mpo.hidden_space.store import EmbeddingStore, EmbeddingWriter, is_complete
from mpo.hidden_space.texts import TextSet
from mpo.modeling import opening
from mpo.modeling.loading import ModelSource
from mpo.modeling.padding import padded
from tests import processes
from tests.tiny import build_model, build_tokenizer, random_text, save_tiny

FAMILIES = ("llama", "gemma2", "qwen2")
EVERYTHING = EmbeddingSettings(layers=("all",), poolings=("last", "mean"), device="cpu")


def texts_of(count: int, seed: int = 0) -> TextSet:
    import random

    rng = random.Random(seed)
    texts = tuple(random_text(rng, rng.choice(("en", "zh", "ar")), rng.randint(1, 25)) for _ in range(count))
    harmful = np.arange(count) % 2 == 0
    return TextSet(texts, ("en",) * count, harmful, np.arange(count), "of these texts")


class Rank:
    """One of several processes, played by a thread."""

    device = torch.device("cpu")

    def __init__(self, index: int, count: int, barrier: threading.Barrier) -> None:
        self.process_index, self.num_processes, self._barrier = index, count, barrier
        self.is_main_process = index == 0

    def wait_for_everyone(self) -> None:
        self._barrier.wait()


def alone() -> Rank:
    return Rank(0, 1, threading.Barrier(1))


def everything(store: EmbeddingStore) -> np.ndarray:
    return np.stack([[store.array(p, layer) for layer in store.layers] for p in store.poolings])


# ---- Layers and tokens -------------------------------------------------------------------------------------------


def by_hand(model: Any, ids: list[int]) -> dict[str, torch.Tensor]:
    """States of one text, unpadded, from hooks on every block and a step through the decoder's parts."""
    decoder, seen = model.model, {}
    hooks = [
        block.register_forward_hook(
            lambda m, a, out, i=i: seen.update({str(i + 1): out if torch.is_tensor(out) else out[0]})
        )
        for i, block in enumerate(decoder.layers)
    ]
    with torch.no_grad():
        decoder(input_ids=torch.tensor([ids]))
        embedded = decoder.embed_tokens(torch.tensor([ids]))
        seen["norm"] = decoder.norm(seen[str(len(decoder.layers))])
    for hook in hooks:
        hook.remove()
    seen["0"] = embedded
    return {name: states[0].float() for name, states in seen.items()}


@pytest.mark.parametrize("template", ["chat", "raw"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_pooling_are_those_of_a_pass_by_hand(tmp_path: Path, family: str, template: str) -> None:
    folder = save_tiny(family, tmp_path / "model", layers=3)
    texts = texts_of(7)
    store = Embedder(
        ModelSource(str(folder)), dataclasses.replace(EVERYTHING, template=template), ranks=alone()
    ).embed(texts, tmp_path / "store")
    assert store.layers == ["0", "1", "2", "3", "norm"]
    model, tokenizer = build_model(family, layers=3), build_tokenizer(family)
    for row, text in enumerate(texts.texts):
        ids = tokenizer(text)["input_ids"]
        if template == "chat":
            messages = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        states = by_hand(model, ids)
        for layer in store.layers:
            assert store.array("last", layer)[row] == pytest.approx(states[layer][-1].numpy(), abs=1e-5), (
                layer
            )
            assert store.array("mean", layer)[row] == pytest.approx(
                states[layer].mean(dim=0).numpy(), abs=1e-5
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_hidden_states_agree_but_for_the_last_block(family: str) -> None:
    model, ids = build_model(family, layers=3), [5, 60, 300, 7]
    input_ids, mask = padded([ids], torch.device("cpu"))
    with torch.no_grad():
        listed = model(input_ids=input_ids, output_hidden_states=True).hidden_states
        ours = pooled_states(decoder_of(model), input_ids, mask, ["0", "1", "2", "3", "norm"], ["last"])[
            :, 0, 0
        ]
    for place, number in ((0, 0), (1, 1), (2, 2), (4, 3)):
        assert ours[place] == pytest.approx(listed[number][0, -1].numpy(), abs=1e-5)
    assert np.abs(ours[3] - listed[3][0, -1].numpy()).max() > 0.1  # theirs has been through the norm


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "gemma3", "mixtral"])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_neither_padding_nor_company_changes_an_embedding(family: str, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    tokens = [rng.integers(10, 500, size).tolist() for size in lengths]
    decoder = decoder_of(_model(family))
    layers, poolings = ["0", "1", "2", "norm"], ["last", "mean"]

    def embedded(some: list[list[int]], side: str) -> np.ndarray:
        with torch.no_grad():
            return pooled_states(decoder, *padded(some, torch.device("cpu"), side=side), layers, poolings)

    single = np.concatenate([embedded([ids], "right") for ids in tokens], axis=2)
    for side in ("right", "left"):
        assert embedded(tokens, side) == pytest.approx(single, abs=1e-5), side


_MODELS: dict[str, Any] = {}


def _model(family: str) -> Any:
    return _MODELS.setdefault(family, build_model(family))


def test_pooling_is_in_float32_and_ignores_what_padding_holds() -> None:
    states = torch.full((1, 400, 2), 1.01, dtype=torch.bfloat16)
    states[0, 300:] = float("nan")
    mask = torch.arange(400)[None] < 300
    last, mean = pool(states, mask, ["last", "mean"])
    exact = float(torch.tensor(1.01, dtype=torch.bfloat16))
    assert mean.dtype == torch.float32 and mean[0, 0].item() == pytest.approx(exact, rel=1e-6)
    assert last[0, 0].item() == exact


def test_layers_are_named_from_both_ends() -> None:
    assert resolve_layers(["all"], 2) == ["0", "1", "2", "norm"]
    assert resolve_layers(["norm", "-1", "2", "0"], 2) == ["0", "2", "norm"]
    for wrong in (["3"], ["-3"], ["last"], []):
        with pytest.raises(ConfigError, match="layers"):
            resolve_layers(wrong, 2)


# ---- Texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chat", "raw"])
def test_long_texts_are_cut_at_their_end_and_the_template_kept(template: str) -> None:
    tokenizer = build_tokenizer("llama")
    long = "river " * 200
    tokens, cut = tokenize(["river", long], tokenizer, template, 60)
    assert cut == 1 and 55 <= len(tokens[1]) <= 60
    decoded = tokenizer.decode(tokens[1])
    assert "river river river" in decoded
    if template == "chat":
        assert decoded.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert tokens[0][: 3 if template == "raw" else 8] == tokens[1][: 3 if template == "raw" else 8]


@pytest.mark.parametrize("template", ["chat", "raw"])
def test_a_cut_text_is_the_longest_beginning_that_fits(template: str) -> None:
    tokenizer = build_tokenizer("qwen")
    tokenizer.clean_up_tokenization_spaces = True  # as many have it: decoding would take spaces away
    text = "river , \U00010348 \u0928\u0926\u0940 ! " * 30  # characters of several tokens each
    render = {"chat": module._render_chat, "raw": module._render_raw}[template]
    beginnings = {tuple(render(tokenizer, text[:n])): n for n in range(1, len(text) + 1)}
    for room in range(60, 76):
        (ids,), cut = tokenize([text], tokenizer, template, room)
        assert cut == 1 and len(ids) <= room
        length = beginnings[tuple(ids)]
        assert len(render(tokenizer, text[: length + 1])) > room


def test_a_template_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(DataError, match="Raise `max_length`"):
        tokenize(["river window"], build_tokenizer("qwen"), "chat", 8)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 200))
def test_batches_hold_every_text_once_and_keep_to_their_budget(lengths: list[int], budget: int) -> None:
    batches = batches_by_length(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget


# ---- Adapters ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and a LoRA adapter that changes it."""
    folder = tmp_path_factory.mktemp("adapted")
    model = save_tiny("llama", folder / "model")
    torch.manual_seed(0)
    peft = get_peft_model(build_model("llama"), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peft.save_pretrained(folder / "adapter")
    return model, folder / "adapter"


def test_before_and_after_come_from_one_loaded_model(
    adapted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = opening.load_model
    monkeypatch.setattr(opening, "load_model", lambda *a, **k: loads.append(1) or load(*a, **k))
    model, adapter = adapted
    embedder = Embedder(ModelSource(str(model)), EVERYTHING, adapter=str(adapter), ranks=alone())
    texts = texts_of(6)
    after = embedder.embed(texts, tmp_path / "after", with_adapter=True)
    before = embedder.embed(texts, tmp_path / "before")
    assert len(loads) == 1
    plain = Embedder(ModelSource(str(model)), EVERYTHING, ranks=alone()).embed(texts, tmp_path / "plain")
    assert everything(before) == pytest.approx(everything(plain), abs=1e-6)
    assert np.abs(everything(after) - everything(before))[:, 1:].max(axis=(2, 3)).min() > 0.01
    assert np.abs(everything(after) - everything(before))[:, 0].max() == 0  # embeddings have no adapter
    assert before.identity["adapter"] is None and after.identity["adapter"].startswith("files:")
    # What is on disk needs no weights.
    again = Embedder(ModelSource(str(model)), EVERYTHING, adapter=str(adapter), ranks=alone())
    again.embed(texts, tmp_path / "after", with_adapter=True)
    assert len(loads) == 2


def test_texts_are_read_as_the_adapter_was_trained_to_read_them(
    adapted: tuple[Path, Path], tmp_path: Path
) -> None:
    model, adapter = adapted[0], Path(shutil.copytree(adapted[1], tmp_path / "adapter"))
    tokenizer = build_tokenizer("llama")
    tokenizer.chat_template = (
        "{% if quiet %}quiet {% endif %}{{ messages[0].content }}{% if add_generation_prompt %} >{% endif %}"
    )
    # Without the first token, which the template leaves out, too.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(adapter)
    (adapter / "recipe.yaml").write_text("chat_template_kwargs: {quiet: true}")
    source, texts = ModelSource(str(model)), texts_of(3)
    raw = dataclasses.replace(EVERYTHING, template="raw")

    def embedded(settings: EmbeddingSettings, texts: TextSet, name: str) -> np.ndarray:
        embedder = Embedder(source, settings, adapter=str(adapter), ranks=alone())
        return everything(embedder.embed(texts, tmp_path / name, with_adapter=True))

    def written_out(prefix: str) -> TextSet:
        return dataclasses.replace(texts, texts=tuple(f"{prefix}{text} >" for text in texts.texts))

    own = embedded(EVERYTHING, texts, "own")
    assert own == pytest.approx(embedded(raw, written_out("quiet "), "raw"), abs=1e-5)
    loud = embedded(dataclasses.replace(EVERYTHING, chat_template_kwargs={}), texts, "loud")
    assert loud == pytest.approx(embedded(raw, written_out(""), "raw loud"), abs=1e-5)
    assert np.abs(own - loud).max() > 0.01


# ---- Stores ------------------------------------------------------------------------------------------------------


def test_a_store_says_what_it_is_and_holds_no_text(adapted: tuple[Path, Path], tmp_path: Path) -> None:
    texts = texts_of(4)
    store = Embedder(ModelSource(str(adapted[0])), EVERYTHING, ranks=alone()).embed(texts, tmp_path / "store")
    index = (tmp_path / "store" / "index.json").read_text(encoding="utf-8")
    assert store.identity["weights"].startswith("files:")
    assert store.provenance["data_fingerprint"] == "of these texts"
    assert store.provenance["settings"]["template"] == "chat"
    assert not any(text in index for text in texts.texts if len(text) > 5)
    assert store.texts["harmful"] == texts.harmful.tolist()
    assert isinstance(store.array("last", "norm").base, np.memmap)
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(StorageError, match="no mean pooling of layer 9"):
        store.array("mean", "9")


def test_other_texts_settings_or_weights_are_never_mistaken_for_these(
    adapted: tuple[Path, Path], tmp_path: Path
) -> None:
    model, adapter = adapted
    source, texts = ModelSource(str(model)), texts_of(4)
    Embedder(source, EVERYTHING, ranks=alone()).embed(texts, tmp_path / "store")
    others: list[tuple[Any, TextSet, str]] = [
        (Embedder(source, EVERYTHING, ranks=alone()), texts_of(4, seed=1), "token_ids"),
        (
            Embedder(source, dataclasses.replace(EVERYTHING, template="raw"), ranks=alone()),
            texts,
            "token_ids",
        ),
        (Embedder(source, dataclasses.replace(EVERYTHING, layers=("norm",)), ranks=alone()), texts, "layers"),
        (Embedder(source, dataclasses.replace(EVERYTHING, dtype="bfloat16"), ranks=alone()), texts, "dtype"),
    ]
    for embedder, some, name in others:
        with pytest.raises(StorageError, match=name):
            embedder.embed(some, tmp_path / "store")
    other = Embedder(source, EVERYTHING, adapter=str(adapter), ranks=alone())
    with pytest.raises(StorageError, match="adapter differ"):
        other.embed(texts, tmp_path / "store", with_adapter=True)
    relabelled = dataclasses.replace(texts, unit=texts.unit + 1, fingerprint="of other units")
    with pytest.raises(StorageError, match="other embeddings: rows differ"):
        Embedder(source, EVERYTHING, ranks=alone()).embed(relabelled, tmp_path / "store")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(StorageError, match="in the way"):
        other.embed(texts, tmp_path / "mine")


@pytest.mark.parametrize(
    ("part", "file", "changed"),
    [
        ("adapter", "adapter_config.json", {"lora_alpha": 1}),
        ("weights", "config.json", {"rms_norm_eps": 0.1}),
    ],
)
def test_the_same_tensors_with_other_settings_are_another_model(
    adapted: tuple[Path, Path], tmp_path: Path, part: str, file: str, changed: dict[str, Any]
) -> None:
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in adapted]
    path = next(folder / file for folder in folders if (folder / file).is_file())

    def embed() -> EmbeddingStore:
        embedder = Embedder(ModelSource(str(folders[0])), EVERYTHING, adapter=str(folders[1]), ranks=alone())
        return embedder.embed(texts_of(3), tmp_path / "store", with_adapter=True)

    first = embed()
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(
        json.dumps({**values, "transformers_version": "1", "peft_version": "1"}), encoding="utf-8"
    )
    assert embed().identity == first.identity  # who wrote it changes nothing
    assert values[next(iter(changed))] != next(iter(changed.values()))
    path.write_text(json.dumps({**values, **changed}), encoding="utf-8")
    with pytest.raises(StorageError, match=f"other embeddings: {part} differ"):
        embed()


def test_a_damaged_store_is_refused(adapted: tuple[Path, Path], tmp_path: Path) -> None:
    embedder = Embedder(ModelSource(str(adapted[0])), EVERYTHING, ranks=alone())
    embedder.embed(texts_of(4), tmp_path / "store")
    os.truncate(tmp_path / "store" / "last.npy", 500)
    with pytest.raises(StorageError, match="embed again"):
        EmbeddingStore(tmp_path / "store")


@pytest.mark.parametrize("count", [2, 3])
def test_several_ranks_give_what_one_gives(
    adapted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    texts, small = texts_of(11), dataclasses.replace(EVERYTHING, tokens_per_batch=40)
    source = ModelSource(str(adapted[0]))
    expected = Embedder(source, EVERYTHING, ranks=alone()).embed(texts, tmp_path / "one")
    # transformers switches the tying of weights off for everyone while it loads: one at a time, or it stays off.
    load, one_at_a_time = opening.load_model, threading.Lock()

    def load_alone(*args: Any, **kwargs: Any) -> Any:
        with one_at_a_time:
            return load(*args, **kwargs)

    monkeypatch.setattr(opening, "load_model", load_alone)
    barrier, found = threading.Barrier(count, timeout=60), {}

    def work(index: int) -> None:
        embedder = Embedder(source, small, ranks=Rank(index, count, barrier))
        found[index] = embedder.embed(texts, tmp_path / "many")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == count
    assert everything(found[count - 1]) == pytest.approx(everything(expected), abs=1e-5)


def test_an_interrupted_pass_goes_on_where_it_was_with_any_number_of_ranks(
    adapted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, texts = ModelSource(str(adapted[0])), texts_of(12)
    small = dataclasses.replace(EVERYTHING, tokens_per_batch=40)
    whole = Embedder(source, small, ranks=alone()).embed(texts, tmp_path / "whole")
    monkeypatch.setattr(module, "_COMMIT_EVERY", 0.0)
    run, calls = module.pooled_states, []

    def failing(*args: Any) -> Any:
        calls.append(len(args[1]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(module, "pooled_states", failing)
    with pytest.raises(KeyboardInterrupt):
        Embedder(source, small, ranks=alone()).embed(texts, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    done, before = sum(calls[:3]), len(calls)
    journal = next((tmp_path / "store.partial").glob("done.0"))
    with open(journal, "ab") as file:
        file.write(b"\x01\x02\x03")  # a record cut off in the middle
    journal.rename(journal.with_name("done.3"))  # of a rank that is no more
    resumed = Embedder(source, small, ranks=alone()).embed(texts, tmp_path / "store")
    assert sum(calls[before:]) == 12 - done > 0
    assert everything(resumed) == pytest.approx(everything(whole), abs=1e-5)


def embed_slowly(model: Path, store: Path, begun: Path) -> None:
    run = module.pooled_states

    def slow(*args: Any) -> Any:
        time.sleep(0.05)
        with open(begun, "ab") as file:
            file.write(b".")
        return run(*args)

    module.pooled_states, module._COMMIT_EVERY = slow, 0.0
    settings_ = dataclasses.replace(EVERYTHING, tokens_per_batch=40)
    Embedder(ModelSource(str(model)), settings_, ranks=alone()).embed(texts_of(40), store)


def test_a_killed_process_leaves_what_the_next_one_finishes(
    adapted: tuple[Path, Path], tmp_path: Path
) -> None:
    begun, log = tmp_path / "begun", tmp_path / "log"
    process = processes.start(embed_slowly, adapted[0], tmp_path / "store", begun, output=log)
    while not begun.exists() or begun.stat().st_size < 4:
        assert process.is_alive(), log.read_text()
        time.sleep(0.005)
    process.kill()
    process.join()
    partial = tmp_path / "store.partial"
    assert partial.is_dir() and not (tmp_path / "store").exists()
    on_disk = sum(len(journal.read_bytes()) // 8 for journal in partial.glob("done.*"))
    assert 0 < on_disk < 40
    texts, source = texts_of(40), ModelSource(str(adapted[0]))
    settings_ = dataclasses.replace(EVERYTHING, tokens_per_batch=40)
    resumed = Embedder(source, settings_, ranks=alone()).embed(texts, tmp_path / "store")
    whole = Embedder(source, settings_, ranks=alone()).embed(texts, tmp_path / "whole")
    assert everything(resumed) == pytest.approx(everything(whole), abs=1e-5)


def test_two_processes_do_not_write_one_store(tmp_path: Path) -> None:
    identity = {"layers": ["norm"], "poolings": ["last"], "texts": 2, "hidden_size": 3}
    first, second = (EmbeddingWriter(tmp_path / "store", identity) for _ in range(2))
    first.prepare()
    first.open()
    for step in (second.prepare, second.open):
        with pytest.raises(StorageError, match="Another process"):
            step()
    first.close()
    second.prepare()
    second.open()
    second.close()


def test_a_store_that_is_being_prepared_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = {"layers": ["norm"], "poolings": ["last"], "texts": 2, "hidden_size": 3}
    make = np.lib.format.open_memmap

    def interrupted(*given: Any, **options: Any) -> Any:
        array = make(*given, **options)
        with pytest.raises(StorageError, match="Another process"):
            EmbeddingWriter(tmp_path / "store", identity).prepare()
        return array

    writer = EmbeddingWriter(tmp_path / "store", identity)
    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "open_memmap", interrupted)
        writer.prepare()
    writer.open()
    writer.write([0, 1], {"last": np.ones((1, 2, 3), np.float32)})
    writer.commit()
    writer.close()
    writer.finish({}, {})


def test_what_a_kill_left_before_the_files_were_whole_is_begun_anew(tmp_path: Path) -> None:
    partial = tmp_path / "store.partial"
    partial.mkdir()
    (partial / "done.3").write_bytes(bytes(8))
    (partial / "last.npy").write_bytes(b"half")
    (partial / "notes.txt").write_text("of somebody else")
    writer = opened(tmp_path / "store")
    assert writer.done() == set()
    writer.close()
    assert (partial / "notes.txt").read_text() == "of somebody else"


def test_a_numbered_device_is_refused_where_several_processes_embed(adapted: tuple[Path, Path]) -> None:
    source = ModelSource(str(adapted[0]))
    for device in ("cpu", "cpu:0"):
        settings_ = dataclasses.replace(EVERYTHING, device=device)
        Embedder(source, settings_, ranks=alone())
        two = alone()
        two.num_processes = 2
        if device == "cpu":
            Embedder(source, settings_, ranks=two)
            continue
        with pytest.raises(ConfigError, match="`device` is 'cpu:0', but 2 processes"):
            Embedder(source, settings_, ranks=two)


TWO_LAYERS = {"layers": ["0", "norm"], "poolings": ["last"], "texts": 6, "hidden_size": 3}


def opened(folder: Path) -> EmbeddingWriter:
    writer = EmbeddingWriter(folder, TWO_LAYERS)
    writer.prepare()
    writer.open()
    return writer


def rows_of(*rows: int) -> dict[str, np.ndarray]:
    return {"last": np.asarray(rows, dtype=np.float32)[None, :, None] + np.zeros((2, 1, 3), np.float32)}


def test_a_journal_that_was_cut_anywhere_claims_only_what_is_whole(tmp_path: Path) -> None:
    rows = [4, 0, 5]
    for length in range(8 * len(rows) + 1):
        writer = opened(tmp_path / str(length))
        writer.write(rows, rows_of(*rows))
        writer.commit()
        writer.close()
        os.truncate(writer.partial / "done.0", length)
        again = opened(tmp_path / str(length))
        assert again.done() == set(rows[: length // 8])
        again.write([2], rows_of(2))
        again.commit()
        assert again.done() == {*rows[: length // 8], 2}
        again.close()


def test_a_disk_that_takes_a_few_bytes_at_a_time_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, write = os.pwrite, os.write
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, bytes(data)[:5], at))
    monkeypatch.setattr(os, "write", lambda file, data: write(file, bytes(data)[:5]))
    writer = opened(tmp_path / "store")
    for rows in ([3, 1], [0, 5], [4, 2]):
        writer.write(rows, rows_of(*rows))
        writer.commit()
    assert writer.done() == set(range(6))
    writer.close()
    store = writer.finish({}, {})
    for layer in store.layers:
        assert store.array("last", layer)[:, 2].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_disk_that_is_full_ends_with_a_message_and_nothing_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = opened(tmp_path / "store")

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match="No space left"):
            writer.write([1], rows_of(1))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        writer.write([1], rows_of(1))
        with pytest.raises(StorageError, match="No space left"):
            writer.commit()
    writer.close()
    again = opened(tmp_path / "store")
    assert again.done() == set()
    again.close()


@pytest.mark.parametrize("step", ["write_json", "replace", "unlink"])
def test_a_kill_at_any_step_of_finishing_costs_no_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    writer = opened(tmp_path / "store")
    writer.write(list(range(6)), rows_of(*range(6)))
    writer.commit()
    writer.close()

    owner: Any = {"write_json": store_module, "replace": os, "unlink": Path}[step]
    original = getattr(owner, step)

    def killed(*given: Any, **more: Any) -> Any:
        if step == "replace" and given[0] != writer.partial:  # a file is renamed when it is written
            return original(*given, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(owner, step, killed)
        with pytest.raises(KeyboardInterrupt):
            writer.finish({}, {})
    if is_complete(tmp_path / "store", TWO_LAYERS):
        store = EmbeddingStore(tmp_path / "store")
    else:
        again = opened(tmp_path / "store")
        assert again.done() == set(range(6))
        again.close()
        store = again.finish({}, {})
    assert store.array("last", "norm")[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_rows_that_are_no_texts_fill_no_gap(tmp_path: Path) -> None:
    writer = opened(tmp_path / "store")
    writer.write([0, 1, 2, 3, 4], rows_of(0, 1, 2, 3, 4))
    writer.commit()
    with open(writer.partial / "done.7", "wb") as file:
        file.write(np.asarray([99], dtype="<i8").tobytes())
    writer.close()
    with pytest.raises(StorageError, match="1 of 6 texts"):
        writer.finish({}, {})


def test_values_that_are_not_finite_are_named_and_not_kept(tmp_path: Path) -> None:
    identity = {"layers": ["0", "norm"], "poolings": ["last"], "texts": 2, "hidden_size": 3}
    writer = EmbeddingWriter(tmp_path / "store", identity)
    writer.prepare()
    writer.open()
    values = np.zeros((2, 2, 3), dtype=np.float32)
    values[1, 0, 0] = np.inf
    with pytest.raises(StorageError, match="layer norm"):
        writer.write([0, 1], {"last": values})
    writer.write([0], {"last": values[:, 1:]})
    writer.commit()
    with pytest.raises(StorageError, match="1 of 2 texts"):
        writer.finish({}, {})
    writer.close()


def test_a_full_disk_is_foretold(tmp_path: Path) -> None:
    identity = {"layers": ["norm"], "poolings": ["last"], "texts": 10**12, "hidden_size": 4096}
    with pytest.raises(StorageError, match="GB are free"):
        EmbeddingWriter(tmp_path / "store", identity).prepare()


# ---- What cannot work --------------------------------------------------------------------------------------------


def test_raw_texts_need_no_chat_template(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    tokenizer = build_tokenizer("llama")
    tokenizer.chat_template = None
    for leftover in folder.glob("chat_template*"):
        leftover.unlink()
    settings_file = folder / "tokenizer_config.json"
    kept = json.loads(settings_file.read_text())
    kept.pop("chat_template", None)
    settings_file.write_text(json.dumps(kept))
    with pytest.raises(ModelError, match="no chat template"):
        Embedder(ModelSource(str(folder)), EVERYTHING, ranks=alone())
    raw = dataclasses.replace(EVERYTHING, template="raw")
    Embedder(ModelSource(str(folder)), raw, ranks=alone()).embed(texts_of(2), tmp_path / "store")


@pytest.mark.parametrize(
    "wrong",
    [
        {"poolings": ("first",)},
        {"poolings": ()},
        {"template": "plain"},
        {"max_length": 0},
        {"tokens_per_batch": 0},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EmbeddingSettings(**wrong)


def test_a_model_of_another_build_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be found"):
        decoder_of(torch.nn.Linear(2, 2))
