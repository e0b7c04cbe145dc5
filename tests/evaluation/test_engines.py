from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mpo.errors import ConfigError, DataError, DependencyError, ModelError, ServerError
from mpo.evaluation.answers import make_answers
from mpo.evaluation.engines import Answer, Generation, ModelChoice, make_engine
from mpo.evaluation.engines.local import LocalEngine
from mpo.evaluation.engines.vllm import _local_folder, _rank_for
from mpo.evaluation.prompts import Prompt, PromptSet
from tests.evaluation.chat_server import ChatServer, serve
from tests.evaluation.scripts import TEXTS
from tests.tiny import build_tokenizer, random_text, save_tiny

NEW = 12
LANGUAGES = ("en", "zh", "ja", "ko", "ar", "bn", "sw")


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen2"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp("engines") / request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("engines") / "llama")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(model)
    tuned = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    tuned.save_pretrained(folder)
    return folder


def conversations(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    rng = random.Random(seed)
    return [
        [{"role": "user", "content": random_text(rng, rng.choice(LANGUAGES), rng.randint(1, 20))}]
        for _ in range(count)
    ]


def engine(model: Path, adapter: Path | None = None, **options: Any) -> LocalEngine:
    generation = options.pop("generation", Generation(NEW))
    choice = ModelChoice(str(model), None if adapter is None else str(adapter), device="cpu", **options)
    made = make_engine(choice, generation)
    assert isinstance(made, LocalEngine)
    return made


def all_answers(made: LocalEngine, asked: list[Any], done: Any = ()) -> dict[int, Answer]:
    found = list(made.generate(asked, done))
    assert len({index for index, _ in found}) == len(found)
    return dict(found)


def tokens_one_by_one(
    model: Path, adapter: Path | None, asked: list[Any]
) -> tuple[list[list[int]], set[int]]:
    """Greedy tokens from whole forward passes (no padding, no batch, no cache, no ``generate``), and what ends them."""
    plain: Any = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    stops = set(GenerationConfig.from_pretrained(model).eos_token_id)
    if adapter is not None:
        plain = PeftModel.from_pretrained(plain, str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for conversation in asked:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        written: list[int] = []
        with torch.no_grad():
            while len(written) < NEW and not stops.intersection(written):
                written.append(int(plain(torch.tensor([ids + written])).logits[0, -1].argmax()))
        found.append(written)
    return found, stops


def one_by_one(model: Path, adapter: Path | None, asked: list[Any]) -> dict[int, Answer]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    found, stops = tokens_one_by_one(model, adapter, asked)
    return {
        index: Answer(
            tokenizer.decode([token for token in written if token not in stops], skip_special_tokens=True),
            bool(stops.intersection(written)),
        )
        for index, written in enumerate(found)
    }


def test_greedy_answers_are_those_of_plain_forward_passes(family: Path) -> None:
    asked = conversations(13)
    for size in (1, 4, 16):
        assert all_answers(engine(family, batch_size=size), asked) == one_by_one(family, None, asked)


def test_an_adapter_takes_part(model: Path, adapter: Path) -> None:
    asked = conversations(6)
    found = all_answers(engine(model, adapter), asked)
    assert found == one_by_one(model, adapter, asked)
    assert found != one_by_one(model, None, asked)


def test_an_answer_that_ends_by_itself_is_finished_and_without_its_stop_token(
    model: Path, tmp_path: Path
) -> None:
    asked = conversations(8)
    (written, *_), _ = tokens_one_by_one(model, None, asked)
    tokenizer = AutoTokenizer.from_pretrained(model)
    # What the model happens to write becomes a stop token, named in generation_config.json only.
    stop = next(token for place, token in enumerate(written) if place > 1 and token not in written[:place])
    changed: Any = AutoModelForCausalLM.from_pretrained(model)
    changed.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    changed.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = all_answers(engine(tmp_path), asked)
    assert found == one_by_one(tmp_path, None, asked)
    assert found[0] == Answer(tokenizer.decode(written[: written.index(stop)]), True)


def test_decoding_is_what_was_asked_for_whatever_the_model_brings(model: Path, tmp_path: Path) -> None:
    changed: Any = AutoModelForCausalLM.from_pretrained(model)
    changed.generation_config.update(
        repetition_penalty=5.0, do_sample=True, temperature=9.0, min_new_tokens=5
    )
    changed.generation_config.save_pretrained(tmp_path)
    plain = all_answers(engine(model), conversations(4))
    changed.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    assert all_answers(engine(tmp_path), conversations(4)) == plain


@pytest.mark.parametrize("generation", [Generation(NEW), Generation(NEW, temperature=1.5, top_p=0.9, seed=3)])
def test_answers_do_not_depend_on_what_is_there_already(model: Path, generation: Generation) -> None:
    asked = conversations(23)
    whole = all_answers(engine(model, batch_size=5, generation=generation), asked)
    assert sorted(whole) == list(range(23))
    rng = random.Random(1)
    for _ in range(4):
        done = set(rng.sample(range(23), rng.randint(1, 23)))
        rest = all_answers(engine(model, batch_size=5, generation=generation), asked, done)
        assert rest == {index: answer for index, answer in whole.items() if index not in done}


def test_sampling_has_a_seed_and_leaves_that_of_others_alone(model: Path) -> None:
    asked = conversations(6)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    drawn = [
        all_answers(engine(model, generation=Generation(NEW, temperature=1.0, seed=seed)), asked)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.rand(3), expected)
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != all_answers(engine(model), asked)


def test_the_same_prompt_in_two_batches_is_answered_by_two_draws_from_all_tokens(model: Path) -> None:
    made = engine(model, batch_size=1, generation=Generation(NEW, temperature=1.0))
    found = all_answers(made, conversations(1) * 3)
    assert found[0] != found[1] != found[2]
    assert made._load().generation_config.top_k == 0  # transformers' own is 50


def test_low_temperatures_and_small_shares_of_the_mass_approach_greedy(model: Path) -> None:
    asked = conversations(6)
    greedy = all_answers(engine(model), asked)
    assert all_answers(engine(model, generation=Generation(NEW, temperature=1e-4)), asked) == greedy
    assert (
        all_answers(engine(model, generation=Generation(NEW, temperature=1.0, top_p=1e-6)), asked) == greedy
    )


def test_texts_in_many_scripts_reach_the_model_as_they_are(model: Path) -> None:
    made = engine(model)
    batches = made._plan([[{"role": "user", "content": text}] for text in TEXTS.values()])
    read = {index: ids for batch in batches for index, ids in zip(batch.indices, batch.prompts, strict=True)}
    for index, text in enumerate(TEXTS.values()):
        assert text.strip() in made.tokenizer.decode(read[index])


def test_nothing_is_loaded_where_nothing_is_left(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(model)
    monkeypatch.setattr(made, "_load", lambda: pytest.fail("loads the weights"))
    assert all_answers(made, conversations(3), range(3)) == {}


def test_settings_tell_models_adapters_and_decoding_apart(model: Path, adapter: Path, tmp_path: Path) -> None:
    same = engine(model).settings()
    assert engine(model).settings() == same
    assert engine(model, generation=Generation(NEW, seed=5)).settings() == same  # greedy has no use for it
    other = save_tiny("llama", tmp_path / "other", seed=1)
    made = [
        engine(other),
        engine(model, adapter),
        engine(model, batch_size=3),
        engine(model, dtype="bfloat16"),
        engine(model, generation=Generation(NEW + 1)),
        engine(model, generation=Generation(NEW, temperature=1.0)),
        engine(model, generation=Generation(NEW, temperature=1.0, seed=5)),
        engine(model, chat_template="{{ messages[0]['content'] }}"),
    ]
    seen = [str(each.settings()) for each in made]
    assert str(same) not in seen and len(set(seen)) == len(seen)


def test_the_same_tensors_with_another_scale_are_other_answers(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 64}))
    asked = conversations(4)
    assert all_answers(engine(model, adapter), asked) != all_answers(engine(model, other), asked)
    made = make_engine(ModelChoice(str(model), str(adapter), device="cpu"), Generation(NEW))
    prompts = PromptSet("p", (Prompt("1", "en", "A text."),), "p.csv")
    make_answers(made, prompts, tmp_path)
    with pytest.raises(ConfigError, match=r"made with other settings \(adapter: "):
        make_answers(engine(model, other), prompts, tmp_path)


OWN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if quiet %}<quiet>{% endif %}{% if add_generation_prompt %}<me>{% endif %}"
)


def test_an_adapter_answers_what_it_was_trained_to_read(model: Path, adapter: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(adapter, tmp_path / "own"))
    tokenizer = build_tokenizer("llama")
    tokenizer.chat_template = OWN
    tokenizer.save_pretrained(own)
    (own / "recipe.yaml").write_text("chat_template_kwargs: {quiet: true}")
    asked = [[{"role": "user", "content": "A text."}]]

    def read(made: LocalEngine) -> str:
        return made.tokenizer.decode(made._plan(asked)[0].prompts[0])

    plain = build_tokenizer("llama").apply_chat_template(asked[0], tokenize=False, add_generation_prompt=True)
    assert read(engine(model)) == read(engine(model, adapter)) == plain
    assert read(engine(model, own)) == "<user>A text.<quiet><me>"
    assert read(engine(model, own, chat_template_kwargs={})) == "<user>A text.<me>"
    assert read(engine(model, own, chat_template="{{ messages[0].content }}")) == "A text."
    made = [engine(model, own), engine(model, own, chat_template_kwargs={}), engine(model, adapter)]
    assert len({str(each.settings()) for each in made}) == 3


def test_a_server_is_given_the_arguments_of_its_chat_template() -> None:
    with serve(ChatServer(reply=lambda _: "x")) as server:
        for kwargs in (None, {"enable_thinking": False}):
            choice = ModelChoice("m", engine="server", url=server.url, chat_template_kwargs=kwargs)
            made = make_engine(choice, Generation())
            list(made.generate(conversations(1), ()))
            assert server.requests[-1].get("chat_template_kwargs") == kwargs
            assert made.settings().get("chat_template_kwargs") == kwargs


def test_a_prompt_that_leaves_no_room_is_named_before_anything_is_loaded(model: Path) -> None:
    asked = [*conversations(2), [{"role": "user", "content": "open the window " * 3000}]]
    with pytest.raises(DataError, match=r"prompt 2 has \d+ tokens.*4096 positions"):
        all_answers(engine(model), asked)


def test_a_template_that_refuses_a_system_turn_is_a_clear_error(tmp_path: Path) -> None:
    model = save_tiny("gemma2", tmp_path / "gemma2")
    asked = [[{"role": "system", "content": "x"}, *conversations(1)[0]]]
    with pytest.raises(DataError, match="no `system_prompt`"):
        all_answers(engine(model), asked)


def test_memory_that_does_not_suffice_is_a_clear_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(model, batch_size=2)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(made._load(), "generate", full)
    with pytest.raises(ModelError, match=r"Lower `batch_size` \(2\)"):
        all_answers(made, conversations(3))


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}]
)
def test_impossible_decoding_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Generation(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "gpu"}, "expected transformers, vllm, server"),
        ({"engine": "server"}, "needs the server's base URL"),
        ({"url": "http://h"}, "no other engine takes one"),
        ({"engine": "server", "url": "http://h", "adapter": "a"}, "--lora-modules"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelChoice("m", **options)


# ---- Server ----------------------------------------------------------------------------------------------------------


def test_a_server_gets_the_decoding_and_one_seed_per_prompt() -> None:
    asked = conversations(4)
    with serve(ChatServer(reply=lambda body: body["messages"][0]["content"][::-1])) as server:
        choice = ModelChoice("tiny", engine="server", url=server.url, concurrency=2)
        greedy = dict(make_engine(choice, Generation(9)).generate(asked, {1}))
        assert greedy == {n: Answer(asked[n][0]["content"][::-1], True) for n in (0, 2, 3)}
        assert all(
            {name: body[name] for name in body if name != "messages"}
            == {"model": "tiny", "max_tokens": 9, "temperature": 0.0}
            for body in server.requests
        )
        server.requests.clear()
        list(make_engine(choice, Generation(9, temperature=0.7, top_p=0.5, seed=40)).generate(asked, {1}))
    assert sorted(body["seed"] for body in server.requests) == [40, 42, 43]
    assert {(body["temperature"], body["top_p"]) for body in server.requests} == {(0.7, 0.5)}
    other = replace(choice, model="other")
    assert make_engine(choice, Generation(9)).settings() != make_engine(other, Generation(9)).settings()


# ---- vLLM ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands where vLLM would, with the part of its interface that is used, and writes down what it is told."""
    told = SimpleNamespace(options=None, calls=[])

    class LLM:
        def __init__(self, **options: Any) -> None:
            told.options = options

        def generate(self, prompts: Any, sampling: Any, *, lora_request: Any, use_tqdm: bool) -> Any:
            told.calls.append((prompts, sampling, lora_request))
            reason = ["stop", "length"]
            return [
                SimpleNamespace(outputs=[SimpleNamespace(text=f"answer {n}", finish_reason=reason[n % 2])])
                for n, _ in enumerate(prompts)
            ]

    top: Any = ModuleType("vllm")
    top.LLM, top.__version__ = LLM, "0.0"
    top.SamplingParams = lambda **options: options
    request: Any = ModuleType("vllm.lora.request")
    request.LoRARequest = lambda *words: words
    for name, module in (
        ("vllm", top),
        ("vllm.lora", ModuleType("vllm.lora")),
        ("vllm.lora.request", request),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return told


def test_vllm_gets_the_prompts_tokens_the_decoding_and_the_adapter(
    vllm: SimpleNamespace, model: Path, adapter: Path
) -> None:
    asked = conversations(4)
    choice = ModelChoice(str(model), str(adapter), engine="vllm", revision="abc", dtype="float16")
    made = make_engine(choice, Generation(9, temperature=0.7, top_p=0.5, seed=40))
    found = dict(made.generate(asked, {1}))
    assert found == {0: Answer("answer 0", True), 2: Answer("answer 1", False), 3: Answer("answer 2", True)}
    ((prompts, sampling, lora),) = vllm.calls
    local = engine(model)
    read = {
        i: ids for batch in local._plan(asked) for i, ids in zip(batch.indices, batch.prompts, strict=True)
    }
    assert [prompt["prompt_token_ids"] for prompt in prompts] == [read[0], read[2], read[3]]
    assert [each["seed"] for each in sampling] == [40, 42, 43]
    assert sampling[0] == {"max_tokens": 9, "temperature": 0.7, "top_p": 0.5, "seed": 40}
    assert lora == ("adapter", 1, str(adapter))
    assert vllm.options["enable_lora"] and vllm.options["max_lora_rank"] == 16
    loaded = {name: vllm.options[name] for name in ("model", "revision", "dtype", "trust_remote_code")}
    assert loaded == {"model": str(model), "revision": "abc", "dtype": "float16", "trust_remote_code": False}
    assert [_rank_for(rank) for rank in (1, 16, 17, 24, 64, 65)] == [16, 16, 32, 32, 64, 128]
    assert made.settings() != make_engine(replace(choice, adapter=None), made.generation).settings()  # type: ignore[attr-defined]


def test_vllm_makes_room_for_the_largest_rank_and_refuses_what_it_cannot_do_before_loading(
    vllm: SimpleNamespace, model: Path, adapter: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    settings = json.loads((other / "adapter_config.json").read_text())

    def made(**changes: Any) -> Any:
        (other / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
        return make_engine(ModelChoice(str(model), str(other), engine="vllm"), Generation())

    list(made(rank_pattern={"q_proj": 40}).generate(conversations(1), ()))
    assert vllm.options["max_lora_rank"] == 64
    for changes in ({"use_dora": True}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(ConfigError, match=f"no adapter with `{next(iter(changes))}`"):
            made(**changes)


def test_vllm_gets_an_adapter_of_the_hub_in_the_revision_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, revision: f"{name}@{revision}")
    assert _local_folder("org/adapter", "abc") == "org/adapter@abc"


def test_without_vllm_the_error_names_the_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(DependencyError, match=r'pip install "mpo-align\[vllm\]"'):
        make_engine(ModelChoice(str(model), engine="vllm"), Generation())


def test_prompts_that_a_server_rejects_or_filters_are_blocked_and_the_others_answered() -> None:
    asked = conversations(6)

    def fault(_: int, body: dict[str, Any]) -> str | None:
        return "400" if body["messages"] == asked[1] else None

    def finish_reason(body: dict[str, Any]) -> str:
        return "content_filter" if body["messages"] == asked[3] else "length"

    server = ChatServer(reply=lambda body: "x", fault=fault, finish_reason=finish_reason)
    with serve(server):
        made = make_engine(ModelChoice("m", engine="server", url=server.url, concurrency=2), Generation())
        found = dict(made.generate(asked, {4}))
    assert {index for index, answer in found.items() if answer.blocked is None} == {0, 2, 5}
    assert found[0] == Answer("x", False)
    assert found[1].text == "" and "HTTP 400" in str(found[1].blocked)
    assert found[3].text == "x" and "content filter" in str(found[3].blocked)


def test_a_server_that_rejects_every_prompt_is_an_error_and_blocks_none() -> None:
    with serve(ChatServer(fault=lambda *_: "400")) as server:
        made = make_engine(ModelChoice("m", engine="server", url=server.url, concurrency=2), Generation())
        with pytest.raises(ServerError, match="HTTP 400"):
            list(made.generate(conversations(5), ()))
