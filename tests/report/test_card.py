from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load

from mpo.common.provenance import collect
from mpo.errors import ConfigError, DataError
from mpo.evaluation import RewardGapTable, compare, summarize
from mpo.report.card import write_card, write_merged_card
from tests.evaluation.simulated import score, simulated_scores
from tests.tiny import save_tiny

RECIPE = """\
model_name_or_path: org/base-model
beta: 1.5
retain_weight: 1.0
learning_rate: 3.0e-4
lora_r: 16
lora_target_modules: [all-linear]
load_in_4bit: false
"""


def _tables(beta: float = 1.5, groups: int = 8) -> tuple[RewardGapTable, RewardGapTable]:
    before, after = simulated_scores(groups=groups)
    return summarize(before, beta=beta, resamples=200), summarize(after, beta=beta, resamples=200)


def _write(folder: Path, **more: Any) -> str:
    arguments: dict[str, Any] = {
        "base_model": "org/base-model",
        "peft": True,
        "languages": ["sw", "zh"],
        "source_language": "en",
    }
    return write_card(folder, **arguments | more).read_text(encoding="utf-8")


def test_the_metadata_of_an_adapter_is_what_the_hub_expects(tmp_path: Path) -> None:
    _write(tmp_path, dataset_name="org/data")
    data = metadata_load(tmp_path / "README.md")
    assert data is not None
    assert data["base_model"] == "org/base-model" and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "text-generation"
    assert data["language"] == ["en", "zh", "sw"]
    assert {"mpo", "trl", "safety", "multilingual", "alignment", "base_model:adapter:org/base-model"} <= set(
        data["tags"]
    )
    assert data["datasets"] == ["org/data"] and "license" not in data


def test_the_metadata_of_a_whole_model_says_so(tmp_path: Path) -> None:
    text = _write(tmp_path, peft=False)
    data = metadata_load(tmp_path / "README.md")
    assert data is not None
    assert data["library_name"] == "transformers" and data["base_model_relation"] == "finetune"
    assert not any("adapter" in tag or tag == "lora" for tag in data["tags"])
    assert "license" not in data and "datasets" not in data
    assert "AutoModelForCausalLM" in text and "AutoPeft" not in text


def test_the_card_round_trips_through_the_hub_library(tmp_path: Path) -> None:
    before, after = _tables()
    text = _write(tmp_path, before=before, after=after, recipe_yaml=RECIPE)
    card = ModelCard.load(tmp_path / "README.md")
    assert str(card) == text and card.data.to_dict() == metadata_load(tmp_path / "README.md")


@pytest.mark.parametrize("kind", ["absolute", "relative", "one word", "file"])
def test_a_local_base_model_is_not_passed_off_as_a_hub_id(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    base = {
        "absolute": str(tmp_path / "models" / "llama"),
        "relative": "models/llama",
        "one word": "llama",
        "file": "data/model.jsonl",
    }[kind]
    text = _write(tmp_path / "out", base_model=base, dataset_name="data/pairs.jsonl")
    data = metadata_load(tmp_path / "out" / "README.md")
    assert data is not None
    assert not {"base_model", "base_model_relation", "datasets"} & data.keys()
    assert not any(tag.startswith("base_model") for tag in data["tags"])
    assert "huggingface.co/" not in text and str(tmp_path) not in text


def test_the_tables_numbers_and_both_pictures_are_in_it(tmp_path: Path) -> None:
    for name in ("reward_gap.png", "training_curve.png", "metrics.json"):
        (tmp_path / name).write_bytes(b"")
    before, after = _tables()
    text = _write(tmp_path, before=before, after=after, recipe_yaml=RECIPE, retention=(0.0, 0.0123))
    assert compare(before, after).to_markdown() in text
    assert "](reward_gap.png)" in text and "](training_curve.png)" in text and "`metrics.json`" in text
    assert "pairs: 0 before, 0.0123 after." in text and "`recipe.yaml`" not in text
    assert before.all_targets is not None and f"**{before.all_targets.gap:+.3f}**" in text
    assert after.all_targets is not None and after.all_targets.positive > before.all_targets.positive
    assert f"from {before.all_targets.positive:.0%} to {after.all_targets.positive:.0%}." in text


def test_pictures_that_are_not_there_are_not_shown(tmp_path: Path) -> None:
    before, after = _tables()
    assert "![" not in _write(tmp_path, before=before, after=after)


def test_a_run_that_held_nothing_out_says_that_it_was_not_measured(tmp_path: Path) -> None:
    text = _write(tmp_path)
    assert "was not measured" in text and "| Language |" not in text


def test_tables_without_records_give_a_card_without_intervals(tmp_path: Path) -> None:
    stored = [RewardGapTable.from_dict(table.to_dict()) for table in _tables()]
    text = _write(tmp_path, before=stored[0], after=stored[1])
    assert "Swahili" in text and "Change:" not in text and "interval over groups" not in text


def test_how_it_was_trained_is_read_from_the_recipe(tmp_path: Path) -> None:
    text = _write(
        tmp_path, recipe_yaml=RECIPE, provenance=collect(precision="bf16", data_fingerprint="abc123")
    )
    for line in (
        "scale of the target gap | 1.5 |",
        "| Learning rate | 0.0003 |",
        "| LoRA rank | 16 |",
        "`abc123`",
        "`bf16`",
    ):
        assert line in text
    assert "4 bit" not in text and f"```yaml\n{RECIPE}```" in text
    assert re.search(r"\| Versions \| mpo .*torch .*trl ", text)


def test_a_card_names_the_objective_and_what_was_held_and_no_setting_that_nothing_reads(
    tmp_path: Path,
) -> None:
    settings = {
        "loss_type": ["sft"],
        "train_on": "both",
        "beta": 1.0,
        "retain_weight": 1.0,
        "retain_pooling": "mean",
        "harmless_loss_type": ["none"],
        "harmless_loss_weight": 1.0,
        "harmless_retention": "reverse_kl",
        "harmless_retain_weight": 1.5,
    }
    kinds = {"groups_by_kind": {"harmful": 3, "harmless": 4}}
    text = _write(tmp_path, settings=settings, provenance=kinds)
    assert (
        "trained with `sft`. The aim: safe responses" in text
        and "on harmless ones the model as it was." in text
    )
    assert "| Harmless prompts held by | reverse\\_kl |" in text and "| Weight of that | 1.5 |" in text
    for absent in (
        "moves each",
        "MPO copies",
        "The **reward gap**",
        "scale of the target gap",
        "retention term",
        "Its weight",
        "-MPO",
    ):
        assert absent not in text, absent
    # On harmful groups alone nothing of harmless ones is in effect.
    text = _write(tmp_path, settings=settings, provenance={"groups_by_kind": {"harmful": 3}})
    assert "harmless ones" not in text.partition("## Results")[0] and "| Harmless prompts held by" not in text
    text = _write(
        tmp_path, settings={**settings, "loss_type": ["sigmoid", "mpo"], "harmless_retention": "none"}
    )
    assert (
        "trained with `sigmoid` and *Multilingual reward gaP" in text
        and "scale of the target gap | 1 |" in text
    )
    text = _write(tmp_path, settings={**settings, "loss_type": ["sigmoid"]})
    assert "| β | 1 |" in text and "retention term" not in text


def test_a_full_fine_tune_lists_no_lora_settings(tmp_path: Path) -> None:
    text = _write(tmp_path, peft=False, settings={"beta": 1.0, "lora_r": 16, "lora_alpha": 32})
    assert "LoRA rank" not in text and "LoRA alpha" not in text


def test_a_merged_model_is_loaded_whole_and_still_says_how_its_adapter_was_trained(tmp_path: Path) -> None:
    text = _write(tmp_path, peft=False, merged_from="runs/it", settings={"lora_r": 16})
    assert "A LoRA adapter folded into [" in text and "| LoRA rank | 16 |" in text
    assert "AutoPeft" not in text and "mpo merge" not in text


def test_the_loading_example_compiles_and_names_the_model(tmp_path: Path) -> None:
    for peft in (True, False):
        text = _write(tmp_path / "my-run", peft=peft, repository="me/my-model")
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        compile(code, "example", "exec")
        assert '"me/my-model"' in code
    assert '"my-run"' in _write(tmp_path / "my-run")
    odd = _write(tmp_path / 'a"); import os #')
    assert '"path/to/this/folder"' in odd


def test_both_papers_are_cited(tmp_path: Path) -> None:
    text = _write(tmp_path)
    for part in (
        "2505.16869",
        "Zhao, Weixiang",
        "Liu, Ting",
        "2504.02708",
        "Verma, Nikhil and Bharadwaj, Manasa",
    ):
        assert part in text
    (bibtex,) = re.findall(r"```bibtex\n(.*?)```", text, re.DOTALL)
    assert bibtex.count("{") == bibtex.count("}")


def test_what_a_reader_must_not_overlook_is_said(tmp_path: Path) -> None:
    def table(english: float, bengali: float, swahili: float, chosen: float) -> RewardGapTable:
        records = []
        for g in range(8):
            noise = 0.01 * (g % 3)
            records.append(score(g, "en", english + noise, 0.0, 0.6, is_source=True))
            records.append(score(g, "bn", chosen, chosen - bengali - noise, 0.6))
            records.append(
                score(g, "sw", -1.0, -1.0 - swahili - (0.5 if g % 2 else -0.5) * (swahili != 0), 0.6)
            )
        return summarize(records, beta=1.0, resamples=200)

    text = _write(tmp_path, before=table(0.6, 0.0, 0.0, -1.0), after=table(0.4, 0.3, 0.01, -2.0))
    assert "**The gap in English fell by 0.200.**" in text
    assert "In Swahili the interval of the change includes zero." in text
    assert "In Bengali the safe responses themselves became less likely" in text
    worse = _write(tmp_path, before=table(0.6, 0.3, 0.0, -1.0), after=table(0.6, 0.0, 0.0, -1.0))
    assert "**In Bengali the gap fell.**" in worse and "The gap in English" not in worse


def test_tables_of_different_languages_are_refused(tmp_path: Path) -> None:
    one = summarize([score(0, "bn", -1, -2, 1)], beta=1.0)
    two = summarize([score(0, "sw", -1, -2, 1)], beta=1.0)
    with pytest.raises(DataError):
        _write(tmp_path, before=one, after=two)


def test_hostile_texts_stay_inert(tmp_path: Path) -> None:
    hostile = "x</details><script>alert(1)</script>\n---\nlicense: evil\n---\n# H | [a](javascript:b)"
    listed = yaml.safe_dump({"lora_target_modules": [hostile]})
    recipe = f"beta: 1.0\nnote: |\n  ```\n  <script>alert(2)</script>\n  ```\n{listed}"
    text = _write(
        tmp_path,
        base_model=hostile,
        dataset_name=f"`{hostile}`",
        languages=["sw", hostile],
        recipe_yaml=recipe,
        provenance={
            "precision": hostile,
            "libraries": {"torch": hostile},
            "devices": {"accelerators": {hostile: 1}},
        },
    )
    data = metadata_load(tmp_path / "README.md")
    assert data is not None and "license" not in data and data["language"] == ["en", "sw"]
    body = text.split("\n---\n", 1)[1]
    fence = re.search(r"^(`{3,})yaml\n(.*?)\n {0,3}\1 *$", body, re.DOTALL | re.MULTILINE)
    assert fence is not None and yaml.safe_load(fence[2]) == yaml.safe_load(recipe)
    outside = body.replace(fence[0], "")
    prose = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", outside)  # inline code shows HTML as it is
    assert "<script" not in prose and "[a](" not in prose
    assert prose.count("</details>") == prose.count("<details>") == 1
    tables = [line for line in prose.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in tables)


def test_secrets_and_home_folders_do_not_reach_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_" + "Ab3dEf6hIj9lMn2pQr5tUv8xYz1bCd4fGh7"
    monkeypatch.setenv("HOME", "/home/somebody")
    text = _write(
        tmp_path,
        base_model="/home/somebody/models/llama",
        recipe_yaml=f"beta: 1.0\nhub_token: {token}\noutput_dir: /home/somebody/runs\nwandb_api_key: plainwords\n",
        dataset_name="/home/somebody/pairs.jsonl",
        provenance={"precision": token},
    )
    for hidden in (token, "somebody", "plainwords"):
        assert hidden not in text


def test_a_recipe_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mapping"):
        _write(tmp_path, recipe_yaml="- a\n- b\n")
    with pytest.raises(ConfigError, match="no YAML"):
        _write(tmp_path, recipe_yaml="a: [")
    assert not (tmp_path / "README.md").exists()


def test_the_card_is_written_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before, after = _tables()
    assert _write(tmp_path, before=before, after=after, recipe_yaml=RECIPE)


# -------------------------------------------------------------------------------------------- the card of a merged model


def _run(folder: Path) -> Path:
    """The files that a run leaves beside its adapter."""
    before, after = simulated_scores(("sw",), groups=2)
    tables = [summarize(scores, beta=1.5, resamples=100) for scores in (before, after)]
    metrics = compare(*tables).to_dict(records=True) | {"retention_loss": {"before": 0.0, "after": 0.1}}
    folder.mkdir()
    for name, values in (("metrics.json", metrics), ("provenance.json", collect(precision="bf16"))):
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


def _merged(adapter: Path, out: Path, **settings: Any) -> str:
    out.mkdir(exist_ok=True)
    found = write_merged_card(
        out, adapter=adapter, base_model="org/base", adapter_settings=settings, name="mine"
    )
    return "" if found is None else found.read_text(encoding="utf-8")


def _mutated(values: Any, path: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Copies of `values`, each with one part of it replaced."""

    def places(part: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        items = (
            part.items() if isinstance(part, dict) else enumerate(part[:2]) if isinstance(part, list) else ()
        )
        for key, item in items:
            yield (*path, key)
            yield from places(item, (*path, key))

    for *way, last in places(values, ()):
        for other in (None, "<b>x</b>", 0, -1.5, True, [], [[1]], {}, {"a": None}, 1e400):
            copied = part = copy.deepcopy(values)
            for key in way:
                part = part[key]
            part[last] = other
            yield copied


def test_the_settings_of_a_merged_models_card_are_those_of_its_adapter(tmp_path: Path) -> None:
    own = {"r": 8, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}
    text = _merged(_run(tmp_path / "run"), tmp_path / "out", **own)
    for line in (
        "rank | 8 |",
        "alpha | 64 |",
        "modules | q\\_proj, v\\_proj |",
        "rsLoRA | yes |",
        "rate | 0.0003 |",
    ):
        assert line in text
    assert "cannot be read" not in text and 'from_pretrained("mine"' in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, content) for name in ("metrics.json", "provenance.json") for content in (b"{", b"[]", b"3", b"null")),
        *((name, b"\xff\xfe") for name in ("metrics.json", "provenance.json", "recipe.yaml")),
        *((name, b"[" * 100_000) for name in ("metrics.json", "provenance.json", "recipe.yaml")),
        *(("recipe.yaml", content) for content in (b"a: [", b"- a\n", b"3", b"day: 2026-13-45")),
        ("metrics.json", b'{"before": {"beta": 1}, "after": {"beta": 1}}'),
        ("metrics.json", b'{"before": 3, "after": 4}'),
    ],
)  # fmt: skip
def test_a_damaged_file_is_left_out_of_a_merged_models_card_and_named(
    tmp_path: Path, name: str, content: bytes
) -> None:
    run = _run(tmp_path / "run")
    (run / name).write_bytes(content)
    text = _merged(run, tmp_path / "out", r=8)
    assert f"`{name}` cannot be read" in text and "| LoRA rank | 8 |" in text
    assert not (tmp_path / "out" / name).exists()
    assert ("| Language |" in text, "bf16" in text, "<summary>" in text) == tuple(
        name != other for other in ("metrics.json", "provenance.json", "recipe.yaml")
    )


@pytest.mark.parametrize("name", ["metrics.json", "provenance.json", "recipe.yaml"])
def test_no_value_in_a_file_of_the_run_keeps_a_merged_model_from_its_card(tmp_path: Path, name: str) -> None:
    run = _run(tmp_path / "run")
    values = yaml.safe_load((run / name).read_text(encoding="utf-8"))
    mutated = list(_mutated(values))
    for changed in random.Random(0).sample(mutated, 40):
        (run / name).write_text(json.dumps(changed), encoding="utf-8")
        text = _merged(run, tmp_path / "out", r=8)
        assert "| LoRA rank | 8 |" in text and "<b>" not in re.sub(
            r"```.*?```|`.*?`", "", text, flags=re.DOTALL
        )


def test_the_code_of_the_card_asks_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny("llama", tmp_path / "aligned")
    text = _write(folder, peft=False, repository=None, base_model="org/base")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("max_new_tokens=256", "max_new_tokens=4"), "card", "exec"), {})
    assert capsys.readouterr().out.strip()
    assert "In a terminal: `mpo chat aligned`." in text


def test_the_card_of_an_adapter_compares_it_with_its_base(tmp_path: Path) -> None:
    assert "`mpo chat org/name --compare`, which answers without the adapter, too." in _write(
        tmp_path, peft=True, repository="org/name"
    )
