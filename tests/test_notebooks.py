"""The notebooks run: their code, cell by cell in one namespace, on a tiny model; their links lead somewhere."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import save_tiny

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "first_steps.ipynb"


def cells(kind: str) -> list[tuple[str, str]]:
    """Identity and source of the cells of one kind."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [(cell["id"], "".join(cell["source"])) for cell in notebook["cells"] if cell["cell_type"] == kind]


def run(name: str, source: str, namespace: dict[str, Any]) -> Any:
    """Runs a cell as Jupyter does; returns the value of an expression at its end."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    return None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), namespace)


def test_the_notebook_trains_compares_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny("llama", tmp_path / "model")
    (tmp_path / "recipes").mkdir()
    shutil.copytree(ROOT / "recipes" / "demo", tmp_path / "recipes" / "demo")
    (tmp_path / "docs" / "notebooks").mkdir(parents=True)
    monkeypatch.setattr("mpo.jobs.demo.prepare_demo_model", lambda folder: model)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path / "docs" / "notebooks")
    namespace: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        values = {name: run(name, source, namespace) for name, source in cells("code")}
    assert "9 groups to train on, 3 held out" in printed.getvalue()
    assert "before -> after" in printed.getvalue()
    assert namespace["behavior"].finding.text in printed.getvalue()
    losses, names = [value for value in values.values() if isinstance(value, list)]
    assert len(losses) == 9
    assert "adapter_model.safetensors" in names
    assert (tmp_path / "runs" / "notebook" / "adapter_model.safetensors").is_file()


def test_the_notebook_is_stored_without_outputs() -> None:
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell["id"]


def test_the_links_of_the_notebook_lead_to_pages_with_these_headings() -> None:
    from tests.test_docs import anchors

    targets = [target for _, text in cells("markdown") for target in re.findall(r"\]\(([^)]+)\)", text)]
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        page = (NOTEBOOK.parent / path).resolve()
        assert page.is_file(), target
        assert not anchor or anchor in anchors(page), target
