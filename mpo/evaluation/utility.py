"""What a model can still do: tasks of lm-evaluation-harness, with its adapter, and the items for a paired comparison."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from mpo.common.checks import check_limit
from mpo.common.files import write_json
from mpo.common.provenance import collect
from mpo.common.tables import TextTable, printable_name
from mpo.common.typed_json import write_typed
from mpo.errors import ConfigError, DataError, DependencyError
from mpo.evaluation.engines import ModelChoice
from mpo.evaluation.policy import Policy, load_policy
from mpo.evaluation.results import UTILITY, Score, TaskScores, UtilityResult
from mpo.evaluation.safety import about_model, model_folder

HARNESS = "lm_eval.json"


def measure_utility(
    tasks: Sequence[str],
    *,
    model: ModelChoice,
    out: Path,
    name: str | None = None,
    task_folder: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    seed: int = 1234,
) -> UtilityResult:
    """Runs tasks of lm-evaluation-harness, prints their scores and writes ``out/NAME/utility.json``.

    ``out/NAME/lm_eval.json`` keeps what the harness itself reports: versions, settings and scores of every sub-task.

    Args:
        tasks: Names of tasks, groups or tags, as ``lm_eval ls tasks`` lists them.
        model: Which model, and how it is loaded.
        out: Folder of results, shared by all models.
        name: Name of the model's folder; by default the last part of the adapter's or the model's name.
        task_folder: Folder with task files (YAML) of your own.
        num_fewshot: Examples before each question; by default what each task says.
        limit: Take the first so many items of each task: for a first look, not for a result.
        apply_chat_template: Put each question into the model's chat template.
        seed: Seed of the harness.

    Returns:
        What was written.

    Raises:
        DependencyError: lm-evaluation-harness is not installed.
        ConfigError: A task is unknown, or a setting has an impossible value.
        DataError: The data of a task cannot be loaded.
        MPOError: Model or adapter cannot be used.
    """
    simple_evaluate, wrapper = require_harness()
    check_limit(limit)
    if task_folder is not None and not os.path.isdir(task_folder):
        raise ConfigError(f"task_folder: {task_folder} is no folder. Expected one with task files (YAML).")
    manager = task_manager(task_folder)
    _require_known(tasks, manager.all_tasks)
    folder = out / model_folder(model, name)
    policy = load_policy(model)
    print(f"Running {', '.join(tasks)}", flush=True)
    found = _evaluate(
        simple_evaluate,
        manager,
        wrapper,
        policy,
        model.batch_size,
        tasks,
        {
            "num_fewshot": num_fewshot,
            "limit": limit,
            "apply_chat_template": apply_chat_template,
            "fewshot_as_multiturn": apply_chat_template,
            "random_seed": seed,
            "numpy_random_seed": seed,
            "torch_random_seed": seed,
            "fewshot_random_seed": seed,
        },
    )
    samples = found.pop("samples", {})
    scores = _tasks(found, samples)
    result = UtilityResult(
        model=about_model(model, folder.name),
        settings={
            "tasks": list(tasks),
            "num_fewshot": num_fewshot,
            "limit": limit,
            "apply_chat_template": apply_chat_template,
            "seed": seed,
        },
        tasks=scores,
        provenance=collect(base_model=model.model, precision=policy.dtype, identity=policy.identity),
    )
    written = [write_typed(folder / UTILITY, result), write_json(folder / HARNESS, _plain(found))]
    print()
    _table(scores, folder.name).show()
    print(f"\nWritten: {', '.join(map(str, written))}")
    return result


def require_harness() -> tuple[Any, Any]:
    """Entry point and model wrapper of lm-evaluation-harness, told to be as quiet as this package.

    Raises:
        DependencyError: It is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise DependencyError(
            "Utility is measured with lm-evaluation-harness, which is not installed. Install it with: "
            'pip install "mpo-align[eval]"'
        ) from error
    if not os.environ.get("MPO_DEBUG"):
        for logger in ("lm_eval", "lm-eval", "evaluate"):
            logging.getLogger(logger).setLevel(logging.ERROR)
    return simple_evaluate, HFLM


@lru_cache(maxsize=4)
def task_manager(task_folder: str | None = None) -> Any:
    """The harness's index of its tasks and of those in a folder. It reads thousands of files, so it is kept."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task_folder)


def _require_known(tasks: Sequence[str], known: Sequence[str]) -> None:
    if not tasks:
        raise ConfigError("tasks: expected the name of at least one task; `lm_eval ls tasks` lists them.")
    for task in tasks:
        if task not in known:
            close = get_close_matches(task, known, n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise ConfigError(
                f"tasks: lm-evaluation-harness has no task {task!r}.{hint} `lm_eval ls tasks` lists all."
            )


def _evaluate(
    simple_evaluate: Any,
    manager: Any,
    wrapper: Any,
    policy: Policy,
    batch_size: int,
    tasks: Sequence[str],
    settings: dict[str, Any],
) -> dict[str, Any]:
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        model = wrapper(
            pretrained=policy.model,
            tokenizer=policy.tokenizer,
            batch_size=batch_size,
            chat_template_args=policy.chat_template_kwargs,
        )
        found = simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, log_samples=True, **settings
        )
    except (ConnectionError, DatasetsError, HfHubHTTPError, OfflineModeIsEnabled, FileNotFoundError) as error:
        raise DataError(
            f"The data of {', '.join(tasks)} cannot be loaded: {str(error).splitlines()[0]} Connect once, so that they are "
            "in the cache of `datasets`."
        ) from error
    except ValueError as error:
        raise ConfigError(f"lm-evaluation-harness cannot run {', '.join(tasks)}: {error}") from error
    assert found is not None  # None only on the other ranks of a distributed run
    return dict(found)


def _tasks(
    found: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, TaskScores]:
    """Scores of tasks and groups that are part of no other group with a score of its own."""
    scores: Mapping[str, Mapping[str, Any]] = {**found["results"], **found.get("groups", {})}
    below = found.get("group_subtasks", {})
    scored = {name for name in scores if _metrics(scores[name])}
    inner = {child for group, children in below.items() if group in scored for child in children}
    out = {}
    for task in sorted(scored - inner, key=list(scores).index):
        leaves = _leaves(task, below)
        rows = [row for leaf in leaves for row in sorted(samples.get(leaf, ()), key=lambda r: r["doc_id"])]
        metrics = _metrics(scores[task])
        items = {metric: _items(rows, metric) for metric in metrics}
        means = {
            m: v for m, v in items.items() if v and abs(sum(v) / len(v) - (metrics[m].value or 0)) < 1e-6
        }
        filters = {metric.partition(",")[2] for metric in metrics}
        out[task] = TaskScores(metrics, len(rows) // max(len(filters), 1), means)
    return out


def _metrics(row: Mapping[str, Any]) -> dict[str, Score]:
    """Scores by ``acc,none`` from the harness's flat row."""
    out = {}
    for key, value in row.items():
        metric, _, kept = key.partition(",")
        if kept and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = row.get(f"{metric}_stderr,{kept}")
            out[key] = Score(float(value), float(error) if isinstance(error, (int, float)) else None)
    return out


def _leaves(task: str, below: Mapping[str, Sequence[str]]) -> list[str]:
    children = below.get(task) or []
    return [leaf for child in children for leaf in _leaves(child, below)] if children else [task]


def _items(rows: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """Each item's value; empty where an item has none, or one that is no number (a perplexity's parts)."""
    name, _, kept = metric.partition(",")
    values = [row.get(name) for row in rows if row.get("filter", "none") == kept]
    numbers = [float(value) for value in values if isinstance(value, (int, float))]
    return numbers if len(numbers) == len(values) else []


def _plain(found: Mapping[str, Any]) -> dict[str, Any]:
    """The harness's report without what is no data, such as functions of a task's file."""
    return {key: value for key, value in found.items() if key not in ("config", "pretty_env_info")} | {
        "config": {k: v for k, v in found.get("config", {}).items() if k not in ("model", "model_args")}
    }


def _table(tasks: Mapping[str, TaskScores], name: str) -> TextTable:
    rows = tuple(
        (
            printable_name(task, 40),
            str(entry.count),
            metric.removesuffix(",none"),
            "-" if score.value is None else f"{score.value:.4f}",
            "-" if score.stderr is None else f"{score.stderr:.4f}",
        )
        for task, entry in tasks.items()
        for metric, score in entry.metrics.items()
    )
    header = ("Task", "Items", "Metric", "Score", "Std. error")
    return TextTable(f"Utility: {name}, by lm-evaluation-harness", header, rows, emphasis=frozenset({3}))
