"""`mpo init`: from a model, data and a machine to a recipe that has been checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mpo.cli import app
from mpo.common.machine import Accelerator
from mpo.errors import ConfigError, DataError, ModelError, StorageError
from mpo.jobs import begin as job
from mpo.jobs.begin import Beginning, begin, filled
from mpo.jobs.fit import Assumptions, Machine
from mpo.training.recipe import Recipe, load_recipe
from tests.data.rows import TEXTS, flat, group, messages, pair
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
PAIRS = ROOT / "recipes" / "demo" / "pairs.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2", tmp_path_factory.mktemp("models") / "Tiny Qwen")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mpo.common.machine.accelerators", lambda: ())
    monkeypatch.setattr("mpo.jobs.fit.accelerators", lambda: ())
    return tmp_path


def answers(*words: str) -> Callable[[str], str]:
    waiting = iter(words)
    return lambda question: next(waiting)


def test_a_recipe_is_written_checked_and_named(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("mpo.modeling.opening.load_model", no_weights)
    assert app.main(["init", "--model", str(model), "--data", str(PAIRS), "--yes"]) == 0
    out = capsys.readouterr().out
    assert "Written: tiny-qwen.yaml, from the recipe qwen_mpo." in out
    assert "This was a dry run" in out and out.endswith("Next:\n  mpo train tiny-qwen.yaml\n")
    recipe = load_recipe("tiny-qwen.yaml")
    assert recipe.model.model_name_or_path == str(model) and recipe.data.dataset == str(PAIRS)
    assert recipe.training.bf16 is False and recipe.training.output_dir == "runs/tiny-qwen"
    width = json.loads((model / "config.json").read_text())["hidden_size"]
    assert recipe.training.learning_rate == pytest.approx(2e-5 * 4096 / width, rel=0.05)
    # The recipe that it is made from has Chinese sources and says so; these are English.
    text = (folder / "tiny-qwen.yaml").read_text(encoding="utf-8")
    assert recipe.training.source_language == "en" and "Chinese" not in text
    assert (
        text.startswith("# Made by `mpo init` from the recipe qwen_mpo, for a CPU.\n")
        and "# rank 16 is" not in text
    )
    assert (
        "bitsandbytes" in text and "Hardware:" not in text
    )  # comments of keys stay, those of the machine go


def test_the_family_is_that_of_the_models_files_before_that_of_its_name(folder: Path) -> None:
    named = folder / "llama" / "mine"
    named.mkdir(parents=True)
    assert job._template(None, str(named), None).name == "llama_mpo"
    (named / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    assert job._template(None, str(named), None).name == "gemma_mpo"
    assert job._template(None, "org/other", None).name == "llama_mpo"


def test_the_rate_grows_for_models_narrower_than_half_of_those_of_the_recipes(folder: Path) -> None:
    for width, wanted in ((4096, {}), (2048, {}), (2047, {"learning_rate": "4.0e-5"})):
        (folder / "config.json").write_text(json.dumps({"hidden_size": width}))
        assert job._learning_rate(str(folder)) == wanted


def test_the_language_of_the_sources_is_found_in_their_texts(folder: Path) -> None:
    parts = ("source_prompt", "source_chosen", "source_rejected")
    row = flat("sw", **dict(zip(parts, TEXTS["zh"], strict=True)))
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    found = [job._source_language(job._groups(data)) for data in ("pairs.jsonl", str(PAIRS), "gone.jsonl")]
    assert found == ["zh", "en", "en"]


def test_groups_of_both_kinds_get_the_recipe_that_holds_harmless_ones(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harmless = {"source": pair("en", prompt=messages("How do I boil rice?", "user")), "kind": "harmless"}
    other = {"source": pair("en", prompt=messages("How do I break a window?", "user"))}
    more = {"source": pair("en", prompt=messages("How do I bake bread?", "user")), "kind": "harmless"}
    rows = [group("bn"), group("bn", **other), group("bn", **harmless), group("bn", **more)]
    for name, kept, template in (
        ("both", rows, "qwen"),
        ("harmful", rows[:2], "qwen_mpo"),
        ("harmless", rows[2:], "qwen_mpo"),
    ):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        recipe = load_recipe(begin(Beginning(str(model), f"{name}.jsonl", out=f"{name}.yaml", yes=True)))
        said = capsys.readouterr().out
        assert f"from the recipe {template}." in said
        assert ("No prompt of these pairs is known as harmless" in said) == (name == "harmful")
        assert ("All prompts of these pairs are harmless" in said) == (name == "harmless")
        assert recipe.training.loss_type == (["sft"] if name == "both" else ["mpo"])
        # The rate of this one was measured on a narrow model.
        assert (recipe.training.learning_rate == 6e-4) == (name == "both")
        text = Path(f"{name}.yaml").read_text(encoding="utf-8")
        assert ("groups of both kinds: harmful" in text, "whose gap the others" in text) == (
            name == "both",
            name != "both",
        )
    begin(Beginning(str(model), "both.jsonl", out="own.yaml", template="qwen_mpo", yes=True))
    assert "No prompt of these" not in capsys.readouterr().out


def test_what_is_missing_is_asked_until_it_can_be_used(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = answers("", str(PAIRS), str(model), "gone.jsonl", str(PAIRS.parent), "demo")
    out = begin(Beginning(out="mine"), ask=ask)
    assert out == Path("mine.yaml") and Path(load_recipe(out).data.dataset).samefile(PAIRS)  # type: ignore[arg-type]
    said = capsys.readouterr().out
    for each in (
        "A model is needed",
        "is a file; expected a model's folder",
        "no such file",
        "is a folder; name the file",
    ):
        assert each in said


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Beginning(), "Nobody can be asked here: give --model and --data"),
        (Beginning(model="m", yes=True), "Nobody can be asked here: give --data"),
        (Beginning(model="m", data="demo", template="lama"), "no training recipe lama in the package"),
        (Beginning(model="m", data="demo", template="evaluation/demo"), "no training recipe evaluation/demo"),
    ],
)
def test_where_nobody_can_be_asked_the_flags_are_named(wanted: Beginning, said: str, folder: Path) -> None:
    ask = None if not wanted.yes else answers("never asked")
    with pytest.raises(ConfigError) as caught:
        begin(wanted, ask=ask)
    assert said in str(caught.value) and not list(folder.iterdir())


def test_an_adapter_is_no_model_to_begin_with(folder: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an adapter; name its base model"):
        begin(Beginning(model="adapter", data="demo"))


def test_a_recipe_that_is_there_is_kept(model: Path, folder: Path) -> None:
    (folder / "x.yaml").write_text("mine: 1\n")
    with pytest.raises(StorageError, match=r"x\.yaml is there already"):
        begin(Beginning(model=str(model), data="demo", out="x.yaml"))
    assert (folder / "x.yaml").read_text() == "mine: 1\n"
    begin(Beginning(model=str(model), data="demo", out="x.yaml", force=True))
    assert "lora_r" in (folder / "x.yaml").read_text(encoding="utf-8")


def test_a_recipe_whose_check_fails_is_kept_with_the_command_that_repeats_it(folder: Path) -> None:
    with pytest.raises(ModelError) as caught:
        begin(Beginning(model="org/not-there", data="demo"))
    assert (folder / "not-there.yaml").is_file()
    assert str(caught.value).endswith("mpo train not-there.yaml --dry_run")


@pytest.mark.parametrize(
    ("waiting", "quantised"),
    [
        ({False: 0, True: 0}, False),  # fits whole
        ({False: 9, True: 0}, True),  # would wait in main memory
        ({False: None, True: 0}, True),  # does not fit
        ({False: None, True: None}, False),  # nothing helps
    ],
)
def test_the_base_model_is_quantised_where_only_that_keeps_it_on_the_gpu(
    waiting: dict[bool, int | None],
    quantised: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``waiting``: GB in main memory without and with quantisation, None where nothing fits."""

    def planned(recipe: Recipe, machine: Machine, assumed: Assumptions) -> SimpleNamespace:
        held = waiting[bool(recipe.model.load_in_4bit)]
        choice = None if held is None else SimpleNamespace(memory=SimpleNamespace(main_memory=held))
        return SimpleNamespace(text=f"the plan for {machine}", choice=choice, launch="accelerate launch it")

    cards = (Accelerator("card", 24 * 10**9, True),) * 2
    for place in ("mpo.common.machine.accelerators", "mpo.jobs.fit.accelerators"):
        monkeypatch.setattr(place, lambda: cards)
    monkeypatch.setattr("mpo.jobs.fit.planned", planned)
    monkeypatch.setattr(job, "_dry_run", lambda recipe: None)
    out = begin(Beginning(model="org/Llama", data="demo"))
    settings = yaml.safe_load(out.read_text(encoding="utf-8"))
    assert settings.get("load_in_4bit", False) is quantised and settings["bf16"] is True
    said = capsys.readouterr().out
    assert said.count("the plan for 2 x 24 GB") == 1 and said.endswith("Next:\n  accelerate launch it\n")
    assert ("`load_in_4bit: true` is set" in said) is quantised


def test_values_are_put_where_they_belong_and_comments_stay() -> None:
    recipe = "# top\n# more\n\na: 1   # says\n       # more of it\n# b: 2      # b's\nc: 3\n"
    done = filled(recipe, {"a": "x/y", "b": "9", "c": "it's", "d": "new"}, opening="# other\n")
    assert done == ("# other\n\na: x/y  # says\n       # more of it\nb: 9        # b's\nc: 'it''s'\nd: new\n")
    assert yaml.safe_load(done) == {"a": "x/y", "b": 9, "c": "it's", "d": "new"}
    assert filled("a: 1  # old\n      # old too\nb: 2\n", {"a": "2"}, {"a": "new"}) == "a: 2  # new\nb: 2\n"


@pytest.mark.parametrize("value", ["it's", "a: b # c", "two\nlines", "\x1b[31mred", "a\u2028b"])
def test_a_name_is_read_back_as_it_is(value: str) -> None:
    text = filled("# top\nmodel: x  # said\nother: 1\n", {"model": value})
    assert yaml.safe_load(text) == {"model": value, "other": 1}


def test_a_line_break_in_the_name_of_the_recipe_is_refused(model: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="line break"):
        begin(Beginning(str(model), "demo", out="a\nlearning_rate: 1.yaml", yes=True))
    assert list(folder.glob("*.yaml")) == []


def test_an_error_while_asking_acts_on_no_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = iter(["model", "\x1b[31mnone.jsonl"])

    def ask(question: str) -> str:
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    with pytest.raises(ConfigError):
        begin(Beginning(), ask=ask)
    said = capsys.readouterr().out
    assert "no such file" in said and "\x1b" not in said


def test_the_demos_model_is_unpacked_by_its_name_unless_a_folder_has_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unpacked: list[Path] = []

    def prepare(place: Path) -> Path:
        unpacked.append(place)
        return place

    monkeypatch.setattr(job, "prepare_demo_model", prepare)
    assert job._model("demo") == "runs/demo/model" and unpacked == [Path("runs/demo/model")]
    assert "runs/demo/model" in capsys.readouterr().out
    (folder / "demo").mkdir()
    assert job._model("demo") == "demo" and len(unpacked) == 1


def test_the_demos_model_and_pairs_get_the_demos_settings(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder / "runs" / "demo" / "model"
    place.parent.mkdir(parents=True)
    place.symlink_to(model)
    monkeypatch.setattr(job, "prepare_demo_model", lambda folder: folder)
    recipe = load_recipe(begin(Beginning(model="demo", data="demo", out="first", yes=True)))
    assert recipe.model.model_name_or_path == "runs/demo/model" and Path(str(recipe.data.dataset)).samefile(
        PAIRS
    )
    assert recipe.training.max_response_length == 64 and recipe.training.learning_rate == 3e-4
    assert recipe.training.output_dir == "runs/model"
    # With other pairs, what its comments say of the demo's would be untrue.
    other = folder / "other.jsonl"
    other.write_bytes(PAIRS.read_bytes())
    kept = load_recipe(begin(Beginning(model="demo", data=str(other), out="second", yes=True)))
    assert kept.training.max_response_length is None


def test_a_faulty_row_is_said_with_what_to_do_next(model: Path) -> None:
    rows = [group("bn"), group("bn", kind="harmless")]  # one source of two kinds
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"row 1, field `kind`(.|\n)*mine.yaml is kept(.|\n)*mine.yaml --dry_run$"
    ):
        begin(Beginning(str(model), "pairs.jsonl", out="mine.yaml", yes=True))
