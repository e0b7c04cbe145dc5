"""The documentation says what is so: its Python runs, its commands, keys, links and printed outputs are real.

``python -m tests.test_docs`` writes the outputs of the commands into the pages anew.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import re
import shlex
import unicodedata
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig, Qwen2Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from trl import DPOConfig, ModelConfig

from mpo.building.filters import FILTERS, FilterSettings
from mpo.building.recipe import AnswerSettings, BuildRecipe, LeakSettings, PromptSource, load_build
from mpo.cli import main as main_of_mpo
from mpo.cli.app import _parser
from mpo.common.typed_yaml import Key
from mpo.data import load_groups
from mpo.errors import DataError
from mpo.hidden_space.recipe import load_analysis_recipe
from mpo.jobs.compare.recipe import load_comparison
from mpo.jobs.suite_recipe import load_suite
from mpo.jobs.train import _DESCRIPTIONS
from mpo.modeling.masks import dense_mask
from mpo.modeling.pairs import PairTensors
from mpo.modeling.trees import Tree, build_batch
from mpo.planning.known_models import shape_config
from mpo.planning.memory import SHARDINGS, describe
from mpo.planning.throughput import sent_per_step
from mpo.training.config import _MEANINGLESS, MPOConfig
from mpo.training.harmless import RETENTIONS
from mpo.training.objectives import (
    MISMATCHED,
    REFERENCE,
    RETENTION,
    SOURCE_GAP,
    _known,
    find_objective,
)
from mpo.training.recipe import load_recipe, recipe_fields
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
KEYS = recipe_fields()
BUILD_KEYS = {
    option.name
    for section in (BuildRecipe, PromptSource, AnswerSettings, FilterSettings, LeakSettings)
    for option in fields(section)
}
FAMILIES = ("llama", "gemma", "qwen")
# Programs of others that the pages show, each with the commands of it that are meant; None where there are none.
OTHER_PROGRAMS: dict[str, set[str] | None] = {
    "git": {"clone"},
    "hf": {"auth", "upload"},
    "llama.cpp/.venv/bin/pip": {"install"},
    "llama.cpp/.venv/bin/python": {"llama.cpp/convert_hf_to_gguf.py"},
    "llama-quantize": None,
    "llama-server": None,
    "ollama": {"create", "run"},
    "transformers": {"serve"},
    "vllm": {"serve"},
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r"^<!-- output of: (.+?) -->\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(read(page)) if name == language]


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return BLOCK.sub("", read(page))


def inline_code(page: Path) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def tables(page: Path) -> list[list[list[str]]]:
    """All tables: rows of cells, the header first, without the line below it."""
    found: list[list[list[str]]] = []
    lines: list[str] = []
    for line in [*prose(page).splitlines(), ""]:
        if line.startswith("|"):
            lines.append(line)
        elif lines:
            found.append([[cell.strip() for cell in row.strip("|").split("|")] for row in lines])
            del found[-1][1]
            lines = []
    return found


def table_below(page: Path, *header: str) -> list[list[str]]:
    """Rows of all tables whose header begins with these cells."""
    rows = [row for table in tables(page) if table[0][: len(header)] == list(header) for row in table[1:]]
    assert rows, f"{page.name} has no table with the header {header}"
    return rows


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# ---- Python ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples name: a tiny model where the demo's would be, and a few of its pairs."""
    folder = tmp_path_factory.mktemp("checkout")
    save_tiny("llama", folder / "runs" / "demo" / "model")
    pairs = (ROOT / "recipes" / "demo" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "recipes" / "demo").mkdir(parents=True)
    (folder / "recipes" / "demo" / "pairs.jsonl").write_text("\n".join(pairs[:4]), encoding="utf-8")
    return folder


def run_python(page: Path, folder: Path, namespace: dict[str, Any]) -> str:
    """Run the page's Python blocks one after another in a folder; returns what they printed."""
    found = blocks(page, "python")
    assert found
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HOME", str(folder / "hub"))
        for number, source in enumerate(found, start=1):
            exec(compile(source, f"{page.name}, Python block {number}", "exec"), namespace)
    return printed.getvalue()


@pytest.fixture(scope="module")
def readme(checkout: Path) -> dict[str, Any]:
    """What the Python of the README leaves behind, and under ``printed`` what it printed."""
    namespace: dict[str, Any] = {}
    namespace["printed"] = run_python(README, checkout, namespace)
    return namespace


def pair_tensors(gaps: list[float]) -> PairTensors:
    """Target pairs with these gaps whose source has gap 1 and retention 3."""
    gap = torch.tensor(gaps, dtype=torch.float64)
    index = torch.zeros(len(gaps), dtype=torch.long)
    return PairTensors(
        chosen_logps=gap - 2,
        rejected_logps=torch.full_like(gap, -2),
        reference_gap=torch.ones_like(gap),
        retention=torch.full_like(gap, 3),
        language=index,
        group_of_pair=index,
    )


def test_the_readme_trains_saves_and_evaluates(readme: dict[str, Any], checkout: Path) -> None:
    assert (checkout / "runs" / "first" / "adapter_model.safetensors").is_file()
    assert readme["trainer"].state.global_step > 0
    for name in ("eval_loss", "eval_reward_gap/bn", "eval_positive/bn"):
        assert f"'{name}': " in readme["printed"]


def test_the_readmes_subclass_pulls_gaps_up_and_never_down(readme: dict[str, Any]) -> None:
    trainer = readme["OneSidedMPO"].__new__(readme["OneSidedMPO"])
    trainer.args = MPOConfig(output_dir="unused", beta=1.0, retain_weight=2.0, use_cpu=True)
    assert trainer.pair_loss(pair_tensors([0.5, 1.0, 4.0])).tolist() == [0.25 + 6, 6, 6]


def test_the_python_of_the_trainers_page_runs(readme: dict[str, Any], checkout: Path) -> None:
    namespace = dict(readme)
    trainer = namespace["trainer"] = readme["OneSidedMPO"](
        model=str(checkout / "runs" / "demo" / "model"),
        args=MPOConfig(
            output_dir=str(checkout / "runs" / "page"),
            reference_cache_dir=str(checkout / "reference"),
            max_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=readme["train"],
        eval_dataset=readme["held_out"],
    )
    printed = run_python(DOCS / "trainer.md", checkout, namespace)
    assert "before -> after" in printed
    assert trainer.state.global_step == 1
    own = namespace["AbsoluteMPO"].__new__(namespace["AbsoluteMPO"])
    own.args = MPOConfig(output_dir="unused", beta=2.0, retain_weight=1.0, use_cpu=True)
    assert own.pair_loss(pair_tensors([0.25, 1.0])).tolist() == [0.5 + 3, 1 + 3]


def test_the_python_of_the_data_page_runs(checkout: Path) -> None:
    namespace: dict[str, Any] = {}
    printed = run_python(DOCS / "data.md", checkout, namespace)
    assert printed.split() == ["4", namespace["loaded"].fingerprint, "[]"]
    assert {t["language"] for g in namespace["train"] for t in g["targets"]} == {"bn", "sw"}


def test_the_python_of_the_evaluation_page_runs(checkout: Path) -> None:
    (checkout / "prompts.csv").write_text(
        "language,prompt\nen,Open it\nsw,Fungua\nbn,খুলুন\n", encoding="utf-8"
    )
    printed = run_python(DOCS / "evaluation.md", checkout, {})
    assert [line.split()[:2] for line in printed.splitlines()[-2:]] == [["en", "1"], ["sw", "1"]]


def test_what_is_logged_is_what_the_trainers_page_lists(readme: dict[str, Any]) -> None:
    listed = {name for row in table_below(DOCS / "trainer.md", "name") for name in codes(row[0])}
    history = readme["trainer"].state.log_history
    languages = [*readme["trainer"].languages, readme["trainer"].args.source_language]

    def general(logs: list[dict[str, Any]]) -> set[str]:
        names = {name for log in logs for name in log}
        return {re.sub(rf"/({'|'.join(languages)})$", "/<lang>", name) for name in names} - {"step"}

    assert general([log for log in history if "loss" in log]) == listed
    evaluated = general([log for log in history if "eval_loss" in log])
    assert evaluated - {"epoch"} == {
        code for code in inline_code(DOCS / "trainer.md") if code in evaluated
    } - {"epoch"}


# ---- Data --------------------------------------------------------------------------------------------------------


def test_every_form_of_a_row_in_the_data_page_is_the_same_pair() -> None:
    rows = [json.loads(text) for text in blocks(DOCS / "data.md", "json")]
    assert len(rows) == 3
    groups = [load_groups([row]).groups.to_list() for row in rows]
    assert groups[0] == groups[1] == groups[2]
    assert len(load_groups(rows).groups) == 1


def test_the_readmes_row_loads() -> None:
    (text,) = blocks(README, "json")
    (group,) = load_groups([json.loads(text)]).groups
    assert group["targets"][0]["language"] == "sw"


def test_the_error_in_the_data_page_is_the_one_a_user_sees(tmp_path: Path) -> None:
    row = json.loads(blocks(DOCS / "data.md", "json")[1])
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([row, row, {**row, "target_chosen": ""}]), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_groups(path)
    assert f"{caught.value}\n" in blocks(DOCS / "data.md", "text")


def test_the_mask_in_the_method_page_is_that_of_such_a_tree() -> None:
    (drawn,) = [text.splitlines() for text in blocks(DOCS / "method.md", "text") if text.startswith("token ")]
    names, positions, rows = drawn[0].split()[1:], drawn[1].split()[1:], [line.split() for line in drawn[3:]]
    parts = [[i for i, name in enumerate(names) if name.startswith(letter)] for letter in "pab"]
    batch = build_batch(
        [Tree(*parts)], layout="tree", max_tokens_per_row=len(names), pad_token_id=0, pooling="mean"
    )
    mask = dense_mask(batch["tree_ids"], batch["branch_ids"], batch["position_ids"])[0, 0]
    assert [row[0] for row in rows] == names
    assert [[cell == "x" for cell in row[1:]] for row in rows] == mask.tolist()
    assert [int(position) for position in positions] == batch["position_ids"][0].tolist()


# ---- Printed outputs ---------------------------------------------------------------------------------------------


def output_of(command: str) -> str:
    """What a command of this package prints, called here: a process of its own would import its libraries for seconds."""
    words = shlex.split(command)
    assert words[0] == "mpo"
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = main_of_mpo(words[1:])
    assert code == 0, errors.getvalue()
    return printed.getvalue().strip() + "\n"


OUTPUTS = [(page, *found) for page in PAGES for found in OUTPUT.findall(read(page))]


@pytest.mark.parametrize(
    ("page", "command", "shown"), OUTPUTS, ids=[f"{page.stem}: {command}" for page, command, _ in OUTPUTS]
)
def test_a_shown_output_is_what_the_command_prints(
    page: Path, command: str, shown: str, request: pytest.FixtureRequest
) -> None:
    if "recipes/demo.yaml" in command or "recipes/data/demo.yaml" in command:
        request.getfixturevalue("demo_model")
    printed = output_of(command)

    def anywhere(text: str) -> list[str]:
        """The lines that do not depend on the machine."""
        return [line for line in text.splitlines() if not line.startswith("Devices ")]

    change = "\n".join(
        difflib.unified_diff(anywhere(shown), anywhere(printed), "shown", "printed", lineterm="")
    )
    assert not change, f"{change}\nTo write it anew: python -m tests.test_docs"


def test_the_pages_show_the_data_check_the_dry_run_and_the_plans() -> None:
    machines = "--machines 1x24 1x80 8x80 64x80"
    assert {command for _, command, _ in OUTPUTS} == {
        "mpo data check recipes/demo/pairs.jsonl",
        "mpo data build recipes/data/demo.yaml --dry_run",
        "mpo train recipes/demo.yaml --dry_run",
        "mpo keys retain_pooling",
        "mpo plan recipes/llama_full.yaml --gpus 8 --gpu_memory 80",
        *(
            f"mpo plan recipes/{name}{full}.yaml {machines}"
            for name in FAMILIES
            for full in ("_mpo", "_full")
        ),
    }


# ---- Commands ----------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page, in code blocks and in the text, as words."""
    lines = [line for text in blocks(page, "bash") for line in text.replace("\\\n", "").splitlines()]
    lines += [
        code for code in inline_code(page) if code.split()[0] in ("mpo", "make", "accelerate", "python")
    ]
    lines += [command for command, _ in OUTPUT.findall(read(page))]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


EVERY_COMMAND = [(page.name, words) for page in PAGES for words in commands(page)]


def subcommand(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser of an ``mpo`` command and the words behind its name."""
    parser, rest = _parser(), words[1:]
    while True:
        nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not nested or not rest:
            return parser, rest
        assert rest[0] in nested[0].choices, f"`mpo {' '.join(words[1:])}`: there is no command `{rest[0]}`"
        parser, rest = nested[0].choices[rest[0]], rest[1:]


def check_overrides(words: list[str]) -> None:
    """Words behind ``mpo train`` or ``scripts/train.py``: a recipe that exists and keys that recipes have."""
    for word in words:
        if word.endswith(".yaml") and word.startswith("recipes/"):
            assert (ROOT / word).is_file(), word
        if word.startswith("--") and word not in ("--dry_run", "--help"):
            assert word[2:].partition(".")[0] in KEYS, word


@pytest.mark.parametrize(
    ("page", "words"), EVERY_COMMAND, ids=[f"{p}: {' '.join(w)}" for p, w in EVERY_COMMAND]
)
def test_a_command_names_only_what_exists(page: str, words: list[str]) -> None:
    match words[0]:
        case "mpo":
            parser, rest = subcommand(words)
            if parser.prog.endswith(" train"):
                check_overrides(rest)
            elif parser.prog.endswith(" suite"):
                recipe = ROOT / rest[0] if (ROOT / rest[0]).is_file() else rest[0]
                load_suite(recipe, [word for word in rest[1:] if word != "--dry_run"])
            elif parser.prog.endswith(" build") and rest:
                load_build(ROOT / rest[0], [word for word in rest[1:] if word != "--dry_run"])
            elif parser.prog.endswith(" compare") and rest:
                load_comparison(ROOT / rest[0], [word for word in rest[1:] if word != "--dry_run"])
            elif parser.prog.endswith(" hidden-space"):
                load_analysis_recipe(ROOT / rest[0], rest[1:])
            else:
                known = {option for action in parser._actions for option in action.option_strings}
                assert {word for word in rest if word.startswith("--")} <= known
        case "accelerate":
            assert words[1] == "launch"
            if "scripts/train.py" in words:
                place = words.index("scripts/train.py")
                check_overrides(words[place + 1 :])
                for word in words[2:place]:
                    assert not word.endswith(".yaml") or (ROOT / word).is_file(), word
        case "make":
            makefile = read(ROOT / "Makefile")
            for word in words[1:]:
                name, is_variable, _ = word.partition("=")
                pattern = rf"\$[({{]{name}[)}}]|^export .*\b{name}\b" if is_variable else rf"^{name}:"
                assert re.search(pattern, makefile, re.MULTILINE), word
        case "python":
            own = words[1] == "-m" and words[2] != "venv"
            assert not own or (ROOT / (words[2].replace(".", "/") + ".py")).is_file()
        case "pip":
            assert words[1] == "install"
        case ".":
            assert words == [".", ".venv/bin/activate"]
        case other if other in OTHER_PROGRAMS:
            known = OTHER_PROGRAMS[other]
            assert known is None or words[1] in known, words
        case other:
            pytest.fail(f"{page} shows the command {other}, which nothing here checks")


def test_commands_of_every_kind_are_found() -> None:
    shown = {" ".join(words[:2]) for _, words in EVERY_COMMAND}
    assert {
        "mpo train",
        "mpo data",
        "mpo evaluate",
        "mpo merge",
        "make demo",
        "make test",
        "accelerate launch",
    } <= shown


def test_a_misspelt_command_or_key_would_be_found() -> None:
    with pytest.raises(AssertionError, match="there is no command `evaluat`"):
        subcommand(["mpo", "evaluat", "reward-gap"])
    with pytest.raises(AssertionError, match="lerning_rate"):
        check_overrides(["recipes/demo.yaml", "--lerning_rate", "1"])


@pytest.mark.parametrize(
    "words",
    [words for _, words in EVERY_COMMAND if words[:2] == ["mpo", "train"] and "recipes/" in "".join(words)],
    ids=" ".join,
)
def test_the_overrides_that_are_shown_are_accepted(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(words[2], [word for word in words[3:] if word != "--dry_run"])
    assert recipe.model.model_name_or_path


# ---- Names -------------------------------------------------------------------------------------------------------


def test_the_filters_of_a_build_are_listed_with_their_defaults() -> None:
    defaults = FilterSettings()
    listed = {codes(row[0])[0]: row[1] for row in table_below(DOCS / "data.md", "filter", "default")}
    words = {None: "null", True: "true"}
    assert listed == {
        name: str(value)
        if isinstance(value, float) or (isinstance(value, int) and value > 1)
        else words[value]
        for name in FILTERS
        for value in [getattr(defaults, name)]
    }


def names_of(owner: type) -> set[str]:
    return {option.name for option in fields(owner)}


def default_of(option: Any) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def test_every_key_that_mpo_adds_is_in_the_tables_of_keys_and_nothing_else_is() -> None:
    listed = [code for row in table_below(DOCS / "recipes.md", "Key") for code in codes(row[0])]
    assert len(listed) == len(set(listed))
    added = set(KEYS) - names_of(ModelConfig) - names_of(DPOConfig)
    assert added <= set(listed)
    assert set(listed) <= set(KEYS)


@pytest.mark.parametrize("row", table_below(DOCS / "recipes.md", "Key"), ids=lambda row: codes(row[0])[0])
def test_a_listed_default_is_the_real_one(row: list[str]) -> None:
    key: Key = KEYS[codes(row[0])[0]]
    cell = row[1]
    shown: Any
    if (
        not cell
        or cell in ("required", "all", "by need", "the model's", "the objective's", "PEFT's own")
        or "CPU" in cell
        or "HF_HOME" in cell
    ):
        shown = None
    elif cell in ("true", "false"):
        shown = cell == "true"
    elif codes(cell):
        shown = codes(cell)[0]
    else:
        shown = float(cell)
    assert key.default == ([shown] if isinstance(key.default, list) else shown)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_setting_that_is_named_with_its_value_is_a_key(page: Path) -> None:
    for code in inline_code(page):
        if setting := re.fullmatch(r"([a-z][a-z0-9_]+): \S.*", code):
            assert setting[1] in {*KEYS, *BUILD_KEYS}, code


def test_the_keys_that_troubleshooting_names_are_keys() -> None:
    page = DOCS / "troubleshooting.md"
    words = {code for code in inline_code(page) if re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", code)}
    words |= {line.partition(":")[0] for text in blocks(page, "yaml") for line in text.splitlines()}
    others = {"in_language", "over_refusal_judge"}  # a measure of the probe; a key of suites
    assert words - others <= set(KEYS)
    assert {"harmless_loss_weight", "save_steps"} <= words


def test_the_settings_named_beside_the_tables_are_keys() -> None:
    words = {code for code in inline_code(DOCS / "recipes.md") if re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", code)}
    others = {
        "ci_low",
        "ci_high",
        "gap_to_source",
        "squared_error",
        "all_targets",
        "retention_loss",
    }  # of metrics.json
    others |= {"held_out_groups", "train_runtime", "peak_memory", "flex_attention", *RETENTIONS}
    assert words - others <= set(KEYS)
    assert "gradient_checkpointing" in words


def test_defaults_that_differ_from_dpoconfig_are_all_listed() -> None:
    listed = {code for row in table_below(DOCS / "trainer.md", "field") for code in codes(row[0])}
    theirs = {option.name: default_of(option) for option in fields(DPOConfig)}
    ours = {option.name: default_of(option) for option in fields(MPOConfig)}
    # What bf16 means when it is unset is decided when the settings are made.
    assert listed == {name for name, value in theirs.items() if ours[name] != value} | {"bf16"}


def test_every_refused_option_is_listed() -> None:
    listed = [code for row in table_below(DOCS / "trainer.md", "option") for code in codes(row[0])]
    assert sorted(listed) == sorted(_MEANINGLESS)


def test_every_tensor_of_a_pair_is_listed() -> None:
    listed = [
        code for row in table_below(DOCS / "trainer.md", "attribute", "shape") for code in codes(row[0])
    ]
    assert listed == [option.name for option in fields(PairTensors)]


def test_every_objective_is_listed_with_its_defaults_and_what_it_compares_with() -> None:
    found = {}
    for name, paper, reference, beta, settings in table_below(DOCS / "trainer.md", "objective"):
        (key,) = codes(name)
        found[key] = paper
        objective = find_objective(key)
        assert objective.published.get("beta") == (float(beta) if beta else None)
        assert not objective.paper or objective.paper.removeprefix("arXiv ") in paper
        needs = {"own responses": {REFERENCE}, "own and mismatched responses": {REFERENCE, MISMATCHED}}
        wanted = needs.get(reference, {SOURCE_GAP, RETENTION} if reference != "none" else set())
        assert objective.needs & {REFERENCE, MISMATCHED, SOURCE_GAP, RETENTION} == wanted
        own = set(codes(settings)) - {"beta"}
        assert own == objective.reads & {*own, "simpo_gamma", "cpo_alpha", "rdpo_alpha", "mlc_temperature"}
    assert set(found) == {
        name for name, objective in _known.items() if (objective.loss.__module__ or "").startswith("mpo.")
    }


def test_every_file_that_a_run_names_is_listed() -> None:
    listed = {code for row in table_below(DOCS / "recipes.md", "File") for code in codes(row[0])}
    assert set(_DESCRIPTIONS) <= listed


# ---- Links -------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        text = unicodedata.normalize("NFC", heading.replace("`", "")).lower()
        found.add(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return found


LINKS = [
    (page, target)
    for page in PAGES
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page))
    if "://" not in target and not target.startswith("mailto:")
]


@pytest.mark.parametrize(("page", "target"), LINKS, ids=[f"{page.name}: {target}" for page, target in LINKS])
def test_a_link_leads_somewhere(page: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    assert file.exists(), f"{page.name} links to {target}, which is not there"
    if anchor:
        assert anchor in anchors(file), f"{page.name} links to {target}, and {file.name} has no such heading"


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = {
        (README.parent / target.partition("#")[0]).resolve() for page, target in LINKS if page == README
    }
    assert {page.resolve() for page in PAGES} - {README.resolve()} <= linked


# ---- Arithmetic --------------------------------------------------------------------------------------------------

# The published shapes of the recipes' models.
SHAPES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    ),
    "gemma": Gemma2Config(
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        vocab_size=256000,
    ),
    "qwen": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
}


def number(cell: str) -> float:
    return float(cell.split()[0])


def test_the_configurations_and_what_they_send_are_those_that_are_counted() -> None:
    listed = {
        name
        for row in table_below(DOCS / "scaling.md", "configuration", "divided over the GPUs")
        for name in codes(row[0])
    }
    assert listed == {sharding.config for sharding in SHARDINGS}
    training = describe(shape_config("llama-3.1-8b"))
    by_name = {sharding.name: sharding for sharding in SHARDINGS}
    rows = table_below(DOCS / "scaling.md", "configuration", "gradients", "weights", "together")
    assert len(rows) == 4
    for name, gradients, weights, together in rows:
        sent = sent_per_step(training, by_name[name.split()[0]], 8) / training.parameters * 8 / 7
        parts = [int(number) for number in re.findall(r"(\d+) P", f"{gradients} {weights}")]
        assert together == f"{sum(parts)} P" == f"{sent:g} P"


@pytest.mark.parametrize("family", SHAPES)
def test_the_hardware_tables_are_the_arithmetic_they_say(family: str) -> None:
    lora = next(row for row in table_below(DOCS / "recipes.md", "recipe", "parameters") if family in row[0])
    full = next(row for row in table_below(DOCS / "recipes.md", "recipe", "n") if family in row[0])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[family])
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            trained += 16 * (module.in_features + module.out_features)
    assert number(lora[1]) == round(count / 1e9, 2)
    assert number(lora[2]) == round(trained / 1e6, 1)
    assert [number(cell) for cell in lora[3:]] == [
        round(size / 1e9, 1) for size in (2 * count, 16 * trained, 2 * count + 16 * trained)
    ]
    gpus = number(full[1])
    assert [number(cell) for cell in full[2:]] == [
        round(size / 1e9, 1) for size in (2 * count, 16 * count / gpus, 2 * count + 16 * count / gpus)
    ]


# ---- Writing the outputs -----------------------------------------------------------------------------------------


def _rewritten(page: Path) -> Iterator[str]:
    def again(found: re.Match[str]) -> str:
        return f"<!-- output of: {found[1]} -->\n```text\n{output_of(found[1])}```"

    text = OUTPUT.sub(again, read(page))
    if text != read(page):
        page.write_text(text, encoding="utf-8")
        yield page.relative_to(ROOT).as_posix()


def main() -> None:
    """Write the outputs of the commands into the pages anew, and name the pages that have changed."""
    from mpo.jobs.demo import DEFAULT_FOLDER, prepare_demo_model

    prepare_demo_model(ROOT / DEFAULT_FOLDER)
    changed = [name for page in PAGES for name in _rewritten(page)]
    print("\n".join(changed) or "Nothing has changed.")


if __name__ == "__main__":
    main()
