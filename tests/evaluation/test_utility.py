from __future__ import annotations

import builtins
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo.cli import main
from mpo.errors import DependencyError
from mpo.evaluation.engines import ModelChoice
from mpo.evaluation.utility import _items, measure_utility, task_manager
from mpo.jobs.suite_recipe import PAPER_TASKS
from mpo.report.page import write_report
from tests.evaluation.adapters import save_model_and_adapter
from tests.tiny import random_text

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'mpo-align[eval]'")
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM

_TASK = """\
task: tiny_{language}
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""
_GROUP = """\
group: tiny
task: [tiny_en, tiny_sw]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
metadata:
  version: 1
"""
_ITEMS = {"en": 14, "sw": 9}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter, and two tasks in one group."""
    root = tmp_path_factory.mktemp("utility")
    save_model_and_adapter(root)
    draw = random.Random(2)
    for language, count in _ITEMS.items():
        rows = [
            {
                "question": random_text(draw, language, 5),
                "choices": [random_text(draw, language, draw.randint(1, 3)) for _ in range(3)],
                "answer": draw.randrange(3),
            }
            for _ in range(count)
        ]
        file = root / f"{language}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (root / f"tiny_{language}.yaml").write_text(
            _TASK.format(language=language, file=file), encoding="utf-8"
        )
    lost = _TASK.format(language="lost", file=root / "nowhere.jsonl")
    (root / "tiny_lost.yaml").write_text(lost, encoding="utf-8")
    (root / "tiny.yaml").write_text(_GROUP, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def results(place: Path) -> dict[str, Any]:
    """The group, on the model without and with its adapter, from the command line."""
    found = {}
    for name, more in (("base", []), ("tuned", ["--adapter", str(place / "adapter")])):
        words = ["evaluate", "utility", "--model", str(place / "model"), *more, "--tasks", "tiny"]
        words += ["--task_folder", str(place), "--out", str(place / "out"), "--name", name, "--device", "cpu"]
        assert main(words) == 0
        found[name] = json.loads((place / "out" / name / "utility.json").read_text(encoding="utf-8"))
    return found


def _right(place: Path, language: str, adapter: bool) -> list[float]:
    """Which items a model gets right: the choice with the greatest log-likelihood, one plain forward pass each."""
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, str(place / "adapter"))
    out = []
    for line in (place / f"{language}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        scores = []
        for choice in row["choices"]:
            context = tokenizer(row["question"])["input_ids"]
            whole = tokenizer(f"{row['question']} {choice}")["input_ids"]
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logps[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        out.append(float(max(range(3), key=scores.__getitem__) == row["answer"]))
    return out


@pytest.mark.parametrize(("name", "adapter"), [("base", False), ("tuned", True)])
def test_a_groups_items_are_those_of_a_plain_computation_with_and_without_the_adapter(
    place: Path, results: dict[str, Any], name: str, adapter: bool
) -> None:
    task = results[name]["tasks"]["tiny"]
    wanted = _right(place, "en", adapter) + _right(place, "sw", adapter)
    assert task["items"]["acc,none"] == wanted
    assert task["metrics"]["acc,none"]["value"] == pytest.approx(sum(wanted) / 23)
    assert task["count"] == 23


def test_questions_are_put_into_the_template_that_the_adapter_was_trained_with(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Path(shutil.copytree(place / "adapter", tmp_path / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokenizer.chat_template = "{% if quiet %}quiet {% endif %}{{ messages[-1].content }}"
    tokenizer.save_pretrained(adapter)
    (adapter / "recipe.yaml").write_text("chat_template_kwargs: {quiet: true}")
    rendered: list[str] = []
    plain = HFLM.apply_chat_template
    monkeypatch.setattr(
        HFLM, "apply_chat_template", lambda *a, **k: (rendered.append(plain(*a, **k)), rendered[-1])[1]
    )
    measure_utility(
        ["tiny_en"],
        model=ModelChoice(str(place / "model"), str(adapter), device="cpu"),
        out=tmp_path / "out",
        task_folder=str(place),
        limit=2,
        apply_chat_template=True,
    )
    questions = [json.loads(line)["question"] for line in (place / "en.jsonl").read_text().splitlines()[:2]]
    assert set(questions) <= {text.removeprefix("quiet ") for text in rendered}
    assert all(text.startswith("quiet ") for text in rendered)


def test_the_adapter_makes_a_difference_and_subtasks_are_not_reported_twice(results: dict[str, Any]) -> None:
    first, second = (results[name]["tasks"] for name in ("base", "tuned"))
    assert first["tiny"]["items"] != second["tiny"]["items"]
    assert list(first) == ["tiny"]
    assert results["tuned"]["model"]["adapter"] is not None and results["base"]["model"]["adapter"] is None


def test_the_harnesss_own_report_is_kept_with_every_subtask(place: Path, results: dict[str, Any]) -> None:
    kept = json.loads((place / "out" / "base" / "lm_eval.json").read_text(encoding="utf-8"))
    assert {"tiny_en", "tiny_sw"} <= set(kept["results"])
    assert kept["n-samples"]["tiny_en"]["effective"] == _ITEMS["en"]


def test_the_items_of_a_metric_are_those_of_its_filter() -> None:
    rows = [{"filter": name, "acc": value} for name, value in (("strict", 1.0), ("loose", 0.0)) * 2]
    assert _items(rows, "acc,strict") == [1.0, 1.0] and _items(rows, "acc,loose") == [0.0, 0.0]


def test_the_report_pairs_the_items(place: Path, results: dict[str, Any]) -> None:
    table = write_report(place / "out")[1].read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if "tiny" in line)
    assert row.startswith("| Utility (%) | tiny | 23 |") and "\N{EN DASH}" not in row


def test_an_unknown_task_is_an_error_that_knows_the_right_one(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "evaluate",
        "utility",
        "--model",
        str(place / "model"),
        "--out",
        str(tmp_path),
        "--tasks",
        "mgsm_direct_swa",
    ]
    assert main([*words, "--task_folder", str(place)]) == 2
    assert "no task 'mgsm_direct_swa'. Did you mean mgsm_direct_sw" in capsys.readouterr().err
    assert main([*words, "--task_folder", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_data_that_cannot_be_loaded_is_an_error_that_names_the_task(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "evaluate",
        "utility",
        "--model",
        str(place / "model"),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert main([*words, "--tasks", "tiny_lost", "--task_folder", str(place)]) == 2
    assert "data of tiny_lost cannot be loaded" in capsys.readouterr().err


def test_every_task_of_the_paper_is_one_of_the_harness(place: Path) -> None:
    assert set(PAPER_TASKS) <= set(task_manager(str(place)).all_tasks)


def test_without_the_harness_the_extra_is_named(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def no_harness(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_harness)
    with pytest.raises(DependencyError, match=r"mpo-align\[eval\]"):
        measure_utility(["tiny"], model=ModelChoice(str(place / "model")), out=tmp_path)
