from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo.cli import main
from mpo.common.bootstrap import ratio_interval
from mpo.evaluation.perplexity import _summary
from tests.evaluation.adapters import save_model_and_adapter

TEXTS = {
    "en": [
        "The river runs past the old mill.",
        "",
        "Bread is baked before dawn.  ",
        "One more line of text.",
    ],
    "sw": ["Mto unapita karibu na kinu cha zamani.", "Mkate huokwa kabla ya alfajiri."],
    "ar": ["يمر النهر بجانب الطاحونة القديمة."],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("perplexity")
    save_model_and_adapter(root)
    for code, lines in TEXTS.items():
        (root / f"{code}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def _measure(place: Path, out: Path, *more: str) -> dict[str, Any]:
    texts = [f"{code}={place / code}.txt" for code in TEXTS]
    words = ["evaluate", "perplexity", "--model", str(place / "model"), "--texts", *texts, "--device", "cpu"]
    assert main([*words, "--out", str(out), "--name", "m", *more]) == 0
    found: dict[str, Any] = json.loads((out / "m" / "perplexity.json").read_text(encoding="utf-8"))
    return found


def _plain(place: Path, code: str, adapter: bool) -> list[tuple[float, int]]:
    """Nats and tokens of each text from one plain forward pass each, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, str(place / "adapter"))
    out = []
    for line in filter(None, (text.strip() for text in TEXTS[code])):
        ids = torch.tensor([tokenizer(line)["input_ids"]])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        out.append((-float(logps.gather(1, ids[0, 1:, None]).sum()), ids.shape[1] - 1))
    return out


@pytest.mark.parametrize("adapter", [False, True])
def test_it_equals_a_plain_computation_per_language(place: Path, tmp_path: Path, adapter: bool) -> None:
    more = ["--adapter", str(place / "adapter")] if adapter else []
    found = _measure(place, tmp_path, "--batch_size", "2", *more)["languages"]
    assert list(found) == list(TEXTS)
    for code, row in found.items():
        wanted = _plain(place, code, adapter)
        nats, tokens = sum(n for n, _ in wanted), sum(t for _, t in wanted)
        assert row["nats_per_text"] == pytest.approx([n for n, _ in wanted], rel=1e-5)
        assert (row["tokens"], row["tokens_per_text"]) == (tokens, [t for _, t in wanted])
        assert row["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
        size = sum(len(text.strip().encode()) for text in TEXTS[code])
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["ar"]["interval"] is None
    low, high = found["en"]["interval"]
    assert low < found["en"]["perplexity"] < high


def test_its_interval_resamples_texts(place: Path, tmp_path: Path) -> None:
    row = _measure(place, tmp_path)["languages"]["en"]
    nats, tokens = np.array(row["nats_per_text"]), np.array(row["tokens_per_text"])
    draws = np.random.default_rng(0).integers(3, size=(10_000, 3))
    means = [nats[d].sum() / tokens[d].sum() for d in draws]
    # Three texts: the expanded percentiles reach the ends.
    assert row["interval"] == pytest.approx([math.exp(min(means)), math.exp(max(means))], rel=1e-3)


def test_long_texts_weigh_more_and_the_fingerprint_is_of_all() -> None:
    random = np.random.default_rng(0)
    lines = [f"text {n}" for n in range(30)]
    tokens = random.integers(2, 90, 30).tolist()
    nats = (random.random(30) * tokens).tolist()
    scored = [(-part, count) for part, count in zip(nats, tokens, strict=True)]
    row = _summary("en", lines, scored, 0, 0.9)
    ends = ratio_interval(nats, tokens, confidence=0.9)
    assert ends is not None and row.interval == tuple(math.exp(end) for end in ends)
    other = _summary("en", [*lines[:-1], "another"], scored, 0, 0.9)
    assert other.fingerprint != row.fingerprint


def test_a_ruined_model_has_the_largest_perplexity_and_not_none() -> None:
    row = _summary("en", ["a b", "c d"], [(-1e6, 1), (-4e9, 2)], 0, 0.95)
    assert row.interval is not None
    assert row.perplexity == row.interval[0] == row.interval[1] == pytest.approx(math.exp(690))


def test_texts_that_are_cut_are_counted_and_have_no_bits_per_byte(place: Path, tmp_path: Path) -> None:
    row = _measure(place, tmp_path, "--max_length", "4", "--limit", "2")["languages"]["en"]
    assert (row["cut"], row["tokens_per_text"], row["bits_per_byte"]) == (2, [3, 3], None)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["missing.txt"], "expected CODE=FILE"),
        (["en=missing.txt"], "missing.txt"),
        (["en=empty.txt"], "no text"),
        (["en=latin.txt"], "UTF-8"),
        (["en=en.txt", "en=sw.txt"], "twice"),
        (["english=en.txt", "en=sw.txt"], "one file per language"),
        (["klingonese=en.txt"], "klingonese"),
    ],
)
def test_bad_files_are_errors_that_say_what_to_do(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    texts: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(place)
    Path("empty.txt").write_text("\n \n", encoding="utf-8")
    Path("latin.txt").write_bytes("Fenêtre\n".encode("latin-1"))
    assert main(["evaluate", "perplexity", "--model", "model", "--texts", *texts, "--out", "out"]) == 2
    assert said in capsys.readouterr().err
