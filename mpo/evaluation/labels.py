"""Answers to be labelled by people: a sample that does not show what the judge said, and the labels read back."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mpo.common.files import write_bytes, write_text
from mpo.common.journal import read_rows
from mpo.common.typed_json import read_typed
from mpo.common.words import counted, listed, nearest, show_name
from mpo.data.contract import RowError
from mpo.data.reading import read_file
from mpo.errors import ConfigError, DataError
from mpo.evaluation.answers import FILE, AnswerRow
from mpo.evaluation.results import SAFETY, SafetyResult
from mpo.evaluation.tasks import NO_VERDICT, TASKS, Task
from mpo.evaluation.verdicts import VerdictRow, verdicts_file

SUFFIXES = (".csv", ".jsonl")
COLUMNS = ("id", "measurement", "language", "prompt", "answer", "choices", "label")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class JudgedRun:
    """Answers of one model to one prompt set, with every judge's verdicts.

    Attributes:
        model: Name of the model's folder.
        prompt_set: Name of the prompt set.
        task: What was judged.
        answers: By their id.
        verdicts: ``{judge: {answer id: verdict}}``, the first judge first; a judge whose file is gone is left out.
    """

    model: str
    prompt_set: str
    task: Task
    answers: Mapping[str, AnswerRow]
    verdicts: Mapping[str, Mapping[str, str]]

    @property
    def name(self) -> str:
        """``MODEL/PROMPTS``."""
        return f"{self.model}/{self.prompt_set}"

    @property
    def first(self) -> Mapping[str, str]:
        """The first judge's verdicts."""
        return next(iter(self.verdicts.values()))

    @cached_property
    def label_ids(self) -> dict[str, str]:
        """``{name of the answer in a file of labels: its id}``.

        A name is a hash: it tells neither the model nor the verdict, and an answer that was made anew has another.
        """
        return {_label_id(self, row): name for name, row in self.answers.items()}

    @property
    def fingerprint(self) -> str:
        """A hash of its answers with their verdicts, of all judges."""
        judged = sorted(
            [label_id, [[judge, given.get(name)] for judge, given in self.verdicts.items()]]
            for label_id, name in self.label_ids.items()
        )
        return hashlib.sha256(json.dumps(judged).encode("ascii")).hexdigest()


def fingerprints(runs: Sequence[JudgedRun], tasks: Sequence[str]) -> dict[str, str]:
    """That of each run of the tasks, by ``TASK/MODEL/PROMPTS``."""
    return {f"{run.task.name}/{run.name}": run.fingerprint for run in runs if run.task.name in tasks}


def _label_id(run: JudgedRun, row: AnswerRow) -> str:
    text = json.dumps([run.model, run.task.name, run.prompt_set, row.id, row.parts.answer])
    # A letter first: a spreadsheet would take 12e45... for a number.
    return "a" + hashlib.sha256(text.encode("ascii")).hexdigest()[:15]


def read_judged(folder: str | Path) -> list[JudgedRun]:
    """Everything that was judged in a folder of results, of one model, or of one of its prompt sets.

    Raises:
        DataError: There is nothing, or the answers or verdicts beside a result are gone.
        StorageError: A file is damaged.
    """
    root = Path(folder)
    found = [path for depth in ("", "*/", "*/*/", "*/*/*/") for path in sorted(root.glob(f"{depth}{SAFETY}"))]
    runs = [_read_run(path) for path in found if path.parent.parent.name in TASKS]
    if not runs:
        raise DataError(
            f"{root} holds no judged answers. Expected a folder that `mpo evaluate attack --out`, `over-refusal` or `suite` "
            f"wrote to, with MODEL/attack/PROMPTS/{SAFETY} in it."
        )
    return runs


def _read_run(path: Path) -> JudgedRun:
    result, folder = read_typed(path, SafetyResult), path.parent
    judges = [result.judge, *([result.second_judge] if result.second_judge else [])]
    names = [str(judge["name"]) for judge in judges]
    if not (folder / FILE).is_file() or not verdicts_file(folder, names[0]).is_file():
        raise DataError(
            f"{folder} has a {SAFETY}, but lacks {FILE} or {verdicts_file(folder, names[0]).name}, which are needed to label "
            "answers. Evaluate again, or choose another folder."
        )
    verdicts = {
        name: {row.id: row.verdict for row in read_rows(verdicts_file(folder, name), VerdictRow)}
        for name in names
        if verdicts_file(folder, name).is_file()
    }
    answers = {row.id: row for row in read_rows(folder / FILE, AnswerRow)}
    model = folder.resolve().parts[-3]
    return JudgedRun(model, folder.resolve().name, TASKS[result.measurement], answers, verdicts)


# ------------------------------------------------------------------------------------------------------------ the sample


def write_sample(
    folder: str | Path,
    out: str | Path,
    *,
    sample: int,
    seed: int = 0,
    task: str | None = None,
    languages: Sequence[str] | None = None,
) -> int:
    """Writes answers to label, drawn at random: as many of each task and language, and in it of each verdict, as there are.

    What the judge said, which model answered and how many answers a row stands for is not in the file; the last follows from
    the folder when the labels are read back. The order is random.

    Args:
        folder: Judged answers; see :func:`read_judged`.
        out: File to write, ``.csv`` or ``.jsonl``.
        sample: Number of answers.
        seed: Seed of the sample and its order.
        task: ``attack`` or ``over_refusal``; by default both, where there are both.
        languages: Keep only these codes.

    Returns:
        Number of rows: all answers where there are fewer than `sample`.

    Raises:
        ConfigError: A setting is impossible, or the file is there already: it may hold labels.
        DataError: There is nothing to label.
        StorageError: A file cannot be read or written.
    """
    target = Path(out)
    if target.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"out: expected a file that ends in {' or '.join(SUFFIXES)}, got {show_name(out)!r}."
        )
    if target.exists():
        raise ConfigError(f"out: {target} is there already and may hold labels. Choose another name.")
    if sample < 1:
        raise ConfigError(f"sample: expected a whole number of at least 1, got {sample!r}.")
    draw = random.Random(seed)
    strata = _strata(read_judged(folder), task, languages)
    chosen = []
    for key, size in _shared_out({key: len(rows) for key, rows in strata.items()}, sample).items():
        chosen += draw.sample(strata[key], size)
    draw.shuffle(chosen)
    if target.suffix.lower() == ".jsonl":
        write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen))
    else:
        write_bytes(target, _csv(chosen))
    return len(chosen)


_Stratum = tuple[str, str, str]  # task, language, verdict


def _strata(
    runs: Sequence[JudgedRun], task: str | None, languages: Sequence[str] | None
) -> dict[_Stratum, list[dict[str, str]]]:
    if task is not None and task not in TASKS:
        raise ConfigError(f"task: expected {' or '.join(TASKS)}, got {task!r}.")
    strata: dict[_Stratum, list[dict[str, str]]] = {}
    present = {row.language for run in runs for row in run.answers.values()}
    if unknown := [code for code in languages or () if code not in present]:
        raise DataError(
            f"no answer is in {listed(unknown)}. Languages found: {', '.join(sorted(present))}.",
            file="languages",
        )
    for run in runs:
        for label_id, name in run.label_ids.items():
            row, verdict = run.answers[name], run.first.get(name)
            if verdict is None or verdict in NO_VERDICT or task not in (None, run.task.name):
                continue
            if languages is None or row.language in languages:
                strata.setdefault((run.task.name, row.language, verdict), []).append(
                    {
                        "id": label_id,
                        "measurement": run.task.name,
                        "language": row.language,
                        "prompt": row.prompt,
                        "answer": row.parts.answer,
                        "choices": " / ".join(run.task.verdicts),
                        "label": "",
                    }
                )
    if not strata:
        raise DataError("there is no answer with a readable verdict to label.", file=str(task or "folder"))
    return strata


def _shared_out(sizes: Mapping[_Stratum, int], sample: int) -> dict[_Stratum, int]:
    """How many to draw of each stratum: as equal as can be over tasks and languages, and within them over verdicts."""
    taken = dict.fromkeys(sorted(sizes), 0)
    for _ in range(min(sample, sum(sizes.values()))):
        by_language: dict[tuple[str, str], int] = {}
        for key, count in taken.items():
            by_language[key[:2]] = by_language.get(key[:2], 0) + count
        free = [key for key in taken if taken[key] < sizes[key]]
        taken[min(free, key=lambda key: (by_language[key[:2]], taken[key]))] += 1
    return taken


def _csv(rows: Sequence[Mapping[str, str]]) -> bytes:
    """With a byte order mark, by which spreadsheets know UTF-8, and with nothing that one would run as a formula."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"'{v}" if v.startswith(_FORMULA) else v for k, v in row.items()})
    return file.getvalue().encode("utf-8-sig", "replace")


# ------------------------------------------------------------------------------------------------------------ the labels


def read_labels(path: str | Path, runs: Sequence[JudgedRun]) -> dict[str, str]:
    """Labels by the ids of :attr:`JudgedRun.label_ids`; rows whose ``label`` is empty are left out.

    Args:
        path: A file that :func:`write_sample` wrote, filled in; CSV, JSON, JSON Lines or Parquet. Only ``id`` and ``label`` are
            read.
        runs: The answers that it may be about.

    Raises:
        DataError: There is no label at all; a row has no id, the id of no answer or of another row, or a label that is none of
            the answer's task. The message names the row.
    """
    tasks = {label_id: run.task for run in runs for label_id in run.label_ids}
    labels: dict[str, str] = {}
    seen: dict[str, int] = {}
    file = str(path)
    for number, row in _rows(Path(path).expanduser(), file):
        name = str(row.get("id") or "").strip()
        if not name:
            raise RowError(
                "expected the `id` that the sample came with, got nothing.", file=file, row=number, field="id"
            )
        if name in seen:
            raise RowError(
                f"{show_name(name)!r} is in row {seen[name]} already. Keep one of the two.",
                file=file,
                row=number,
                field="id",
            )
        seen[name] = number
        if name not in tasks:
            raise RowError(
                f"there is no answer {show_name(name)!r} in the folder. Pass the folder that the sample was drawn from; answers "
                "that were made anew need a new sample.",
                file=file,
                row=number,
                field="id",
            )
        given = row.get("label")
        label = "" if given is None or given != given else str(given).strip().lower()
        choices = tasks[name].verdicts
        if label and label not in choices:
            near = nearest(label, choices)
            hint = f" Did you mean {near}?" if near else ""
            raise RowError(
                f"expected {', '.join(choices)} or nothing, got {show_name(given)!r}.{hint}",
                file=file,
                row=number,
                field="label",
            )
        if label:
            labels[name] = label
    if not labels:
        raise DataError(
            f"none of its {counted(len(seen), 'row')} has a label. Write one of the `choices` into the column `label`.",
            file=file,
        )
    return labels


def _rows(path: Path, file: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, row in read_file(path, file):
        if isinstance(row, RowError):
            raise row
        if not isinstance(row, Mapping):
            raise RowError("expected an object with `id` and `label`.", file=file, row=number)
        missing = [name for name in ("id", "label") if name not in row]
        if missing:
            columns = ", ".join(show_name(name) for name in row)
            raise RowError(
                f"there is no column `{missing[0]}`. Its columns are {columns}. Save the file as CSV with commas.",
                file=file,
                row=number,
            )
        yield number, row
