"""The command for a GPU: every part runs here in tiny shapes, and no part costs another its result."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, lengths, plan_memory, step
from benchmarks.gpu import Part, Run, TextTable, carry_out
from mpo.errors import ConfigError
from tests.gpu import conftest


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("gpu")
    gpu.write_lengths(out / "lengths.csv", divisor=20)
    return Run(out, "cpu", True, str(out / "lengths.csv"))


IN_PROCESS = [part.name for part in gpu.parts() if part.name not in ("memory", "options liger")]


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_part_runs_and_its_result_becomes_tables(
    name: str, tiny: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (part,) = [part for part in gpu.parts() if part.name == name]
    out = tiny.out / "result.json"
    _, module, *arguments = part.arguments(tiny, out, 600)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    (step.main if module == "benchmarks.step" else gpu.main)()
    result = json.loads(out.read_text(encoding="utf-8"))
    (table,) = part.tables(result)
    assert table.rows
    if name == "numerics":
        assert result["finished"] and result["exit_code"] == 0
        assert len(result["outcomes"]["passed"]) >= 3 and set(result["outcomes"]) == {"passed"}
    elif module == "benchmarks.step":
        assert all(entry["error"] is None for entry in result["formulations"])
        losses = [e["losses"] for e in result["formulations"] if e["formulation"] != "TRL DPO"]
        assert all(found == pytest.approx(losses[0], rel=1e-3) for found in losses)
    else:
        assert result["pairs_per_second"] > 0 and len(result["losses"]) == 2


def test_a_part_runs_in_a_process_of_its_own_and_one_that_cannot_run_here_says_so(tiny: Run) -> None:
    results = gpu.measure(tiny, 600, ["memory", "options liger"])["parts"]
    assert results["memory"]["error"] is None
    (case,) = results["memory"]["result"]["cases"]
    assert case["counted_bytes"] == pytest.approx(case["measured_bytes"], rel=0.3)
    assert results["options liger"]["error"] and results["options liger"]["result"] is None
    page = (tiny.out / "performance.md").read_text(encoding="utf-8")
    assert "| llama-3.2-1b | an adapter | recomputed | 64 |" in page and "- options liger: " in page


def test_a_case_of_memory_that_fails_costs_the_others_nothing_and_leaves_no_model_behind(
    tiny: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, backward = plan_memory.build, plan_memory.backward
    models: list[Any] = []
    alive: list[int] = []

    def built(config: Any, case: Any, device: str = "cpu") -> Any:
        alive.append(sum(model() is not None for model in models))
        model = build(config, case, device)
        models.append(weakref.ref(model))
        return model

    def no_room(*arguments: Any) -> None:
        if len(models) == 2:
            raise torch.OutOfMemoryError("no room\nfor it")
        backward(*arguments)

    case = gpu.memory_cases(True)[0]
    monkeypatch.setattr(gpu, "memory_cases", lambda tiny: [case] * 3)
    monkeypatch.setattr(plan_memory, "counted", lambda *_, **__: Namespace(tensors=1))
    monkeypatch.setattr(plan_memory, "build", built)
    monkeypatch.setattr(plan_memory, "backward", no_room)
    gc.disable()
    try:
        found = [dict(result) for result in gpu.memory(tiny)]
    finally:
        gc.enable()
    assert len(found) == 3 and alive == [0, 0, 0]
    first, second, third = found[-1]["cases"]
    assert second["error"] == "OutOfMemoryError: no room" and "measured_bytes" not in second
    assert first["measured_bytes"] == third["measured_bytes"] > 0


def test_an_option_that_is_late_has_the_steps_of_its_time(tiny: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(side: str, case: Any, *, wait: Any, start: Any, stop: Any, report: Any) -> None:
        for _ in case.order:
            wait()
            start()
            report({**stop(), "loss": 1.0})

    monkeypatch.setattr("benchmarks.race.run", slow)
    whole = gpu.option("plain", replace(tiny, tiny=False), 600)
    late = gpu.option("plain", replace(tiny, tiny=False), 0)
    assert len(whole["losses"]) == 3 + 9 and len(late["losses"]) == 3 + 1 and late["pairs_per_second"] > 0


def test_a_run_of_the_tests_that_is_cut_says_what_passed_and_what_was_running() -> None:
    log = (
        "collected 4 items\n\ntests/gpu/test_a.py::test_one[bf16 base] PASSED   [ 25%]\n"
        "tests/gpu/test_a.py::test_two FAILED [ 50%]\ntests/gpu/test_a.py::test_three SKIPPED (no kernel) [ 75%]\n"
        "tests/gpu/test_a.py::test_four[a-b] "
    )
    found = gpu.outcomes(log)
    assert found == {
        "passed": ["tests/gpu/test_a.py::test_one[bf16 base]"],
        "failed": ["tests/gpu/test_a.py::test_two"],
        "skipped": ["tests/gpu/test_a.py::test_three"],
        "unfinished": ["tests/gpu/test_a.py::test_four[a-b]"],
    }
    ended = "PASSED\n\n=== warnings summary ===\ntests/gpu/test_a.py::test_four[a-b]\n  a warning\n"
    assert "unfinished" not in gpu.outcomes(log + ended)
    (table,) = gpu._numerics_tables({"outcomes": found, "finished": False})
    assert "running then: tests/gpu/test_a.py::test_four[a-b]" in table.notes[-1]


def test_what_needs_a_compiler_is_tested_last() -> None:
    names = ["test_a[flex_attention]", "test_compiled", "test_b", "test_liger", "test_c"]
    own = [Namespace(name=name, path=Path(conftest.__file__).parent / "test.py") for name in names]
    other = [Namespace(name=name, path=Path("tests/flex.py")) for name in ("test_flex_attention", "test_d")]
    items = [other[0], *own, other[1]]
    conftest.pytest_collection_modifyitems(items)
    assert [item.name for item in items] == [
        "test_flex_attention",
        *("test_b", "test_c", "test_a[flex_attention]", "test_compiled", "test_liger"),
        "test_d",
    ]


def table_of(result: dict[str, Any]) -> list[TextTable]:
    return [TextTable("Numbers", ("Name", "Value"), (("one", str(result["value"])),))]


def script(text: str) -> Any:
    return lambda run, result, seconds: ["-c", text.format(path=str(result))]


WRITES = "open({path!r}, 'w').write('{{\"value\": 7}}')"


def test_a_part_that_fails_hangs_or_lacks_its_package_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubs = [
        Part("fails", 60, script("raise ValueError('no such kernel')"), table_of),
        Part("hangs", 1, script("import time; time.sleep(600)"), table_of),
        Part("done, then hangs", 3, script(WRITES + "; import time; time.sleep(600)"), table_of),
        Part("silent", 60, script("pass"), table_of),
        Part("lacks", 60, script(WRITES), table_of, package="no_such_package"),
        Part("works", 60, script(WRITES), table_of),
    ]
    monkeypatch.setattr(gpu, "parts", lambda: stubs)
    results = gpu.measure(Run(tmp_path, "cpu", False, ""), seconds=300)
    found = {name: part["error"] for name, part in results["parts"].items()}
    assert found == {
        "fails": "exit code 1: ValueError: no such kernel",
        "hangs": "stopped after 1 s",
        "done, then hangs": "stopped after 3 s",
        "silent": "it wrote no result",
        "lacks": "no_such_package is not installed",
        "works": None,
    }
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert written["parts"]["works"]["result"] == {"value": 7}
    page = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert page.count("| one | 7 |") == 2 and page.count("**Numbers**") == 1
    assert "- lacks: no_such_package is not installed" in page
    assert "- done, then hangs: stopped after 3 s" in page
    late = gpu.measure(Run(tmp_path, "cpu", False, ""), seconds=0)
    assert {part["error"] for part in late["parts"].values()} == {"no time was left"}


def test_limits_of_all_parts_fit_the_time_of_all() -> None:
    assert sum(part.seconds for part in gpu.parts()) <= 525


def test_tables_go_between_the_markers_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = gpu.MARKERS
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for text in ("first\n", "second\n"):
        gpu.insert(text, page)
    assert page.read_text() == f"before\n{begin}\nsecond\n{end}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ConfigError, match="has no lines"):
        gpu.insert("text", page)
    assert all(gpu.PAGE.read_text(encoding="utf-8").count(marker) == 1 for marker in gpu.MARKERS)


def test_made_up_lengths_have_the_deciles_they_are_made_of(tmp_path: Path) -> None:
    gpu.write_lengths(tmp_path / "lengths.csv")
    for name, (source, target) in gpu.DECILES.items():
        groups = lengths.read_csv(tmp_path / "lengths.csv", name, 0, 1024)
        assert [len(group.targets) for group in groups] == [6] * 9
        assert [group.source for group in groups] == [tuple(sizes) for sizes in zip(*source, strict=True)]
        for part, deciles in enumerate(target):
            assert {pair[part] for group in groups for pair in group.targets} == set(deciles)


def test_a_tiny_part_can_be_run_without_its_package_where_it_says_so(tmp_path: Path) -> None:
    part = Part("one", 60, script(WRITES), table_of, package="no_such_package", runs_tiny_without=True)
    assert carry_out(part, Run(tmp_path, "cpu", True, ""), 60)["result"] == {"value": 7}
    assert carry_out(part, Run(tmp_path, "cpu", False, ""), 60)["error"] == "no_such_package is not installed"
