"""The command for a GPU: every part runs here in tiny shapes, and no part costs another its result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, lengths, step
from benchmarks.gpu import Part, Run, TextTable, carry_out
from mpo.errors import ConfigError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("gpu")
    gpu.write_lengths(out / "lengths.csv", divisor=20)
    return Run(out, "cpu", True, str(out / "lengths.csv"))


@pytest.mark.parametrize("name", [part.name for part in gpu.parts() if part.name != "options liger"])
def test_a_part_runs_and_its_result_becomes_tables(
    name: str, tiny: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (part,) = [part for part in gpu.parts() if part.name == name]
    out = tiny.out / "result.json"
    _, module, *arguments = part.arguments(tiny, out)
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
    elif name == "memory":
        (case,) = result["cases"]
        assert case["counted_bytes"] == pytest.approx(case["measured_bytes"], rel=0.3)
    else:
        assert result["pairs_per_second"] > 0 and len(result["losses"]) == 2


def table_of(result: dict[str, Any]) -> list[TextTable]:
    return [TextTable("Numbers", ("Name", "Value"), (("one", str(result["value"])),))]


def script(text: str) -> Any:
    return lambda run, result: ["-c", text.format(path=str(result))]


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
        "done, then hangs": None,
        "silent": "it wrote no result",
        "lacks": "no_such_package is not installed",
        "works": None,
    }
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert written["parts"]["works"]["result"] == {"value": 7}
    page = (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert page.count("| one | 7 |") == 2 and page.count("**Numbers**") == 1
    assert "- lacks: no_such_package is not installed" in page
    late = gpu.measure(Run(tmp_path, "cpu", False, ""), seconds=0)
    assert {part["error"] for part in late["parts"].values()} == {"no time was left"}


def test_limits_of_the_parts_that_matter_most_fit_the_time_of_all() -> None:
    limits = [part.seconds for part in gpu.parts()]
    assert sum(limits[:6]) <= 525


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
