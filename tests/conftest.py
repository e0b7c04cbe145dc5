"""What all tests share: one thread, no network, and the folder of the data that is read in place."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Generator
from pathlib import Path

# Set before transformers, datasets or trl are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def accelerator_of_its_own() -> None:
    """Mixed precision and compilation are settings of the process; each test with this starts as a process would."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", default=None):
        return  # the tests run in other processes, which come here themselves
    import torch

    torch.set_num_threads(1)
    # A shell that starts the tests in the background has interrupts ignored, which some tests are about.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    # Every training asks for a collection of garbage, which looks through all that the libraries hold, for longer than
    # a tiny model is trained; what is there by now stays.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A report is sent from another process, which cannot take half a character of a text that a test is about."""
    report = yield
    report.sections = [(name, _whole(text)) for name, text in report.sections]
    if report.failed and report.longrepr is not None and _whole(str(report.longrepr)) != str(report.longrepr):
        report.longrepr = _whole(str(report.longrepr))
    return report


def _whole(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    # With MPO_GPU_SUITE_DEVICE=cpu, what can run of those tests runs on the CPU, to see that they run at all.
    if not torch.cuda.is_available() and os.environ.get("MPO_GPU_SUITE_DEVICE") != "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of the published data files, which are read in place and never copied."""
    folder = os.environ.get("MPO_TEST_DATA")
    if not folder:
        pytest.skip("MPO_TEST_DATA is unset: it names the folder of the published data files")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"MPO_TEST_DATA is '{folder}', which is not a folder")
    return path


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Folder of SmolLM2-135M-Instruct, the demo's: unpacked once for all runs, workers and the demo itself."""
    from mpo.errors import DependencyError
    from mpo.jobs.demo import DEFAULT_FOLDER, prepare_demo_model

    try:
        return prepare_demo_model(Path(__file__).parents[1] / DEFAULT_FOLDER)
    except DependencyError as error:
        pytest.skip(str(error))
