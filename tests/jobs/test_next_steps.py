"""What a run prints last can be copied as it is."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from mpo.jobs.next_steps import next_steps
from mpo.jobs.suite_recipe import load_suite


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("folder", ["runs/llama", "runs/it's mine; rm -rf {x}"])
def test_every_command_is_one_that_works(adapter: bool, folder: str, gpu: bool) -> None:
    asked, measured, served = next_steps(Path(folder), base="org/base", adapter=adapter, gpu=gpu).splitlines()
    words = shlex.split(asked.removeprefix("Ask it:"))
    assert words == ["mpo", "chat", folder, *(["--compare"] if adapter else [])]
    words = shlex.split(measured.removeprefix("Measure it:"))
    assert words[:3] == ["mpo", "evaluate", "suite"]
    suite = load_suite(words[3], words[4:])
    assert suite.models["base"].model == "org/base" and suite.models["base"].adapter is None
    trained = suite.models["mpo"]
    assert (trained.model, trained.adapter) == (("org/base", folder) if adapter else (folder, None))
    assert suite.out == f"runs/evaluation/{Path(folder).name}"
    served = served.removeprefix("Serve it:")
    if adapter:
        merge, served = served.split(" && ")
        assert shlex.split(merge) == ["mpo", "merge", folder, "--out", f"{folder}-merged"]
    server = "vllm" if gpu else "transformers"
    assert shlex.split(served) == [server, "serve", f"{folder}-merged" if adapter else folder]
