"""The prompts of an evaluation as texts to look for in training data, whatever holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mpo.data.contract import RowError
from mpo.data.forms.recognition import Form, as_columns, form_of, header_of, is_group
from mpo.data.languages import UNDETERMINED, language_of_file, normalize_language
from mpo.data.leaks import EvaluationText
from mpo.data.loading import _named_sources
from mpo.data.prompt_texts import labelled_prompts
from mpo.errors import DataError
from mpo.evaluation.probe import PROBE, load_probe
from mpo.evaluation.prompts import PromptSet, load_prompts


def evaluation_texts(name: str) -> list[EvaluationText]:
    """The prompts of an evaluation set.

    Raises:
        DataError: It cannot be read, or holds no prompts.
    """
    if name == PROBE:
        return prompt_set_texts(load_probe())
    path = Path(name).expanduser()
    if path.is_file():
        ((label, rows),) = _named_sources([name], "train", prompts=True)
        first = list(islice(rows, 200))
        header = header_of(as_columns(row) for _, row in first if not isinstance(row, RowError))
        form = form_of(header)
        if is_group(header) or (form is not None and (form.pairs or _is_unlabelled(path, header, form))):
            return list(_pair_texts(chain(first, rows), label))
    return prompt_set_texts(load_prompts(name, bad_rows="drop"))


def _is_unlabelled(path: Path, header: Mapping[Any, Any], form: Form) -> bool:
    """Whether nothing names the language of prompts, which can be looked for all the same."""
    if path.suffix.lower() == ".txt":
        return True
    named = {"language", "lang", "instruction_translated"} & header.keys()
    return form.name != "wide-prompts" and not named and language_of_file(path) is None


def prompt_set_texts(prompts: PromptSet, name: str | None = None) -> list[EvaluationText]:
    """The prompts of a set, under another name where one is given."""
    return [EvaluationText(name or prompts.name, p.prompt_id, p.language, p.text) for p in prompts.prompts]


def _pair_texts(rows: Any, label: str) -> Iterator[EvaluationText]:
    for index, prompts in labelled_prompts(rows, label, [], last_turn=True):
        for code, text in prompts:
            try:
                language = normalize_language(code) if code else UNDETERMINED
            except DataError:  # a label that nobody knows does not keep a prompt from being found
                language = UNDETERMINED
            yield EvaluationText(label, str(index), language, text)
