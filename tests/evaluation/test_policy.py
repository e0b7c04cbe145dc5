"""What a measurement in this process works on, and that its result says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpo.cli import main
from mpo.errors import ConfigError
from mpo.evaluation.engines import ModelChoice
from mpo.evaluation.policy import load_policy
from tests.evaluation.adapters import save_model_and_adapter
from tests.tiny import random_groups


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("policy")
    save_model_and_adapter(root)
    (root / "adapter" / "recipe.yaml").write_text("chat_template_kwargs: {enable_thinking: false}")
    (root / "en.txt").write_text("The river runs past the mill.\n", encoding="utf-8")
    rows = random_groups(1, 3, (1, 1), ("sw",))
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def test_a_policy_is_what_its_choice_says(place: Path) -> None:
    choice = ModelChoice(str(place / "model"), str(place / "adapter"), device="cpu", dtype="bfloat16")
    policy = load_policy(choice)
    assert policy.model.dtype.itemsize == 2 and policy.dtype == "bfloat16" and not policy.model.training
    assert policy.chat_template_kwargs == {"enable_thinking": False}
    assert policy.identity == choice.open().identity().to_dict()
    with pytest.raises(ConfigError, match="`transformers`"):
        load_policy(ModelChoice("m", engine="vllm"))


@pytest.mark.parametrize("measurement", ["perplexity", "reward-gap"])
def test_a_result_says_who_was_measured(place: Path, tmp_path: Path, measurement: str) -> None:
    texts = ["--texts", f"en={place / 'en.txt'}", "--name", "m"]
    words = {"perplexity": texts, "reward-gap": ["--data", str(place / "pairs.jsonl")]}[measurement]
    file = {"perplexity": "m/perplexity.json", "reward-gap": "reward_gap.json"}[measurement]

    def identity(*more: str) -> dict[str, Any]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        common = ["--model", str(place / "model"), "--device", "cpu", "--out", str(out)]
        assert main(["evaluate", measurement, *words, *common, *more]) == 0
        found: dict[str, Any] = json.loads((out / file).read_text(encoding="utf-8"))["provenance"]["identity"]
        return found

    plain, tuned = identity(), identity("--adapter", str(place / "adapter"))
    assert plain["adapter"] is None and tuned["adapter"].startswith("files:")
    assert plain["model"] == tuned["model"]
    assert tuned["chat_template_kwargs"] == {"enable_thinking": False}
    given = identity("--adapter", str(place / "adapter"), "--chat_template_kwargs", '{"a": [1]}')
    assert given == {**tuned, "chat_template_kwargs": {"a": [1]}}
