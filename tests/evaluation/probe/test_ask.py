"""Answers of a model in training: those that the evaluation would get, without a trace in the model or the random state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpo.errors import ModelError
from mpo.evaluation.engines import Generation, ModelChoice, make_engine
from mpo.evaluation.probe.ask import BATCH, Questions
from mpo.evaluation.probe.behavior import choose_prompts
from mpo.evaluation.prompts import Prompt
from tests.runs import lora, trainer
from tests.tiny import save_tiny

LENGTH = 8


def some_prompts() -> tuple[Prompt, ...]:
    prompts = choose_prompts(["en", "bn", "ko"], 3)
    assert prompts is not None and len(prompts.prompts) > BATCH
    return prompts.prompts


def questions(made: Any) -> Questions:
    return Questions(made.policy, made.processing_class, LENGTH)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "mixtral"])
def test_the_answers_are_those_of_the_evaluation(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / family)
    prompts = some_prompts()
    engine = make_engine(ModelChoice(str(model), device="cpu", batch_size=BATCH), Generation(LENGTH))
    conversations = [[{"role": "user", "content": prompt.text}] for prompt in prompts]
    expected = dict(engine.generate(conversations, ()))

    made = trainer(model, tmp_path, peft_config=lora())
    rows = questions(made).ask(prompts)

    assert [row.id for row in rows] == [prompt.id for prompt in prompts]
    answers = [(row.answer, row.finished) for row in rows]
    assert answers == [(expected[index].text, expected[index].finished) for index in range(len(prompts))]
    assert len(set(answers)) > 3


def test_the_head_is_given_all_prompts_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny("qwen2", tmp_path / "qwen2")
    made = trainer(model, tmp_path)
    rows = made.model.get_output_embeddings().weight.shape[0]
    given: list[bool] = []
    forward = torch.nn.Linear.forward

    def watched(self: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
        if self.weight.shape[0] == rows:
            given.append(states.is_contiguous() and states.shape[1] == 1)
        return forward(self, states)

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    prompts = some_prompts()
    questions(made).ask(prompts)
    asked = len(given)
    engine = make_engine(ModelChoice(str(model), device="cpu", batch_size=BATCH), Generation(LENGTH))
    dict(engine.generate([[{"role": "user", "content": prompt.text}] for prompt in prompts], ()))
    assert 0 < asked < len(given) and all(given)


def test_an_answer_ends_where_the_model_ends_it(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "llama")
    made = trainer(model, tmp_path)
    prompt = some_prompts()[:1]
    whole = questions(made).ask(prompt)[0]
    assert not whole.finished
    # Let the first token that it writes be one that ends a turn.
    tokens = made.processing_class(whole.answer, add_special_tokens=False)["input_ids"]
    made.model.generation_config.eos_token_id = [made.processing_class.eos_token_id, tokens[0]]
    ended = questions(made).ask(prompt)[0]
    assert ended.finished and ended.answer == ""


def test_the_model_its_mode_and_random_numbers_are_as_they_were(tmp_path: Path) -> None:
    made = trainer(
        save_tiny("llama", tmp_path / "llama"),
        tmp_path,
        peft_config=lora(lora_dropout=0.5),
        disable_dropout=False,
    )
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    config = made.model.generation_config.to_dict()
    for training in (True, False):
        made.model.train(training)
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        first = questions(made).ask(some_prompts())
        assert torch.equal(torch.rand(3), expected)
        assert made.model.training is training
        assert first == questions(made).ask(some_prompts())  # dropout would change them
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())
    assert made.model.generation_config.to_dict() == config
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_what_goes_wrong_in_the_model_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(save_tiny("llama", tmp_path / "llama"), tmp_path)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no room\nand more of it")

    monkeypatch.setattr(made.model, "forward", broken)
    made.model.train()
    with pytest.raises(ModelError, match=r"^RuntimeError: no room$"):
        questions(made).ask(some_prompts())
    assert made.model.training
