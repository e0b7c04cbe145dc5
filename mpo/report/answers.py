"""The page of prompts and answers: models side by side, chosen by language, prompt set and verdict without any script.

All harmful text of a report is here and nowhere else: escaped, in its own direction of writing, and folded away. What is chosen
is shown by style rules alone (``:has`` with the checked field), which a browser without them answers by showing everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mpo.evaluation.answers import AnswerRow
from mpo.report.build import in_order
from mpo.report.folder import Results, SafetyRun
from mpo.report.measurement import MIXED, shown_language
from mpo.report.rendering import html
from mpo.report.run import PROBE_ANSWERS, ProbeRow

PAGE = "answers.html"

NOT_JUDGED = "not judged"

_MOST_CHARACTERS, _FOLDED_FROM = 2_000, 420


class Given(NamedTuple):
    """What a model answered, and what the judge said of it."""

    model: str
    verdict: str
    answer: str


class Exchange(NamedTuple):
    """A prompt with the answers of all models.

    ``numbers`` are those of its set, its language and its verdicts in the lists that are chosen from.
    """

    prompt_set: str
    language: str
    code: str
    prompt_id: str
    prompt: str
    given: list[Given]
    is_changed: bool
    numbers: tuple[int, int, tuple[int, ...]]

    @property
    def classes(self) -> str:
        """Names by which the style sheet finds it."""
        prompt_set, language, verdicts = self.numbers
        names = [f"set-{prompt_set}", f"language-{language}", *(f"verdict-{n}" for n in verdicts)]
        return " ".join([*names, *(["changed"] if self.is_changed else [])])


@dataclass(frozen=True)
class Answers:
    """What the page shows.

    Attributes:
        sets: Names of the prompt sets.
        languages: Names of the languages.
        verdicts: Names of the verdicts.
        exchanges: The prompts with their answers.
    """

    sets: list[str]
    languages: list[str]
    verdicts: list[str]
    exchanges: list[Exchange]

    def choices(self) -> list[tuple[str, str, list[tuple[str, int]]]]:
        """``(class, legend, [(option, number of prompts)])`` of each choice between more than one."""
        found = [
            ("set", "Prompts", self._options(self.sets, lambda e: (e.numbers[0],))),
            ("language", "Language", self._options(self.languages, lambda e: (e.numbers[1],))),
            ("verdict", "Verdict of any model", self._options(self.verdicts, lambda e: e.numbers[2])),
        ]
        return [choice for choice in found if len(choice[2]) > 1]

    def _options(
        self, names: Sequence[str], numbers: Callable[[Exchange], Iterable[int]]
    ) -> list[tuple[str, int]]:
        return [(name, sum(n in numbers(e) for e in self.exchanges)) for n, name in enumerate(names)]

    def rules(self) -> str:
        """Style rules that hide what was not chosen."""
        rules = [
            f'body:has(input[name="{kind}"][value="{n}"]:checked) .exchange:not(.{kind}-{n}) {{ display: none; }}'
            for kind, _, options in self.choices()
            for n in range(len(options))
        ]
        changed = 'body:has(input[name="changed"]:checked) .exchange:not(.changed) { display: none; }'
        return "\n".join([*rules, changed])


def answers_html(answers: Answers) -> str:
    """The body of the page."""
    return html(
        "answers.html",
        answers=answers,
        most=_MOST_CHARACTERS,
        folded_from=_FOLDED_FROM,
        several=any(len(exchange.given) > 1 for exchange in answers.exchanges),
        no_code=MIXED,
    )


def collect(results: Results, per_language: int) -> Answers | None:
    """The first prompts of each language and set, those on which the models differ before all others.

    Args:
        results: The result folder.
        per_language: Prompts per language and prompt set; with 0 there is no page.

    Returns:
        None where there is no answer.
    """
    found = Answers([], [], [], [])
    for kind in ("attack", "over_refusal"):
        for name in results.prompt_sets(kind) if per_language > 0 else ():
            _add_set(found, results, kind, name, per_language)
    if not found.exchanges and results.run is not None and per_language > 0:
        _add_probe(found, results, per_language)
    return found if found.exchanges else None


def _add_probe(found: Answers, results: Results, per_language: int) -> None:
    """The probe of a training run, before and after."""
    before, after = "before training", "after training"
    rows = results.left_out.rows(results.folder / PROBE_ANSWERS, ProbeRow)
    rows.sort(key=lambda row: row.before.verdict == row.after.verdict)  # stable
    for title, is_harmful in (("Harmful: probe", True), ("Harmless: probe", False)):
        for code in in_order({row.language for row in rows}, results.dominant):
            of_it = [row for row in rows if row.language == code and row.is_harmful == is_harmful]
            for row in of_it[:per_language]:
                given = [
                    Given(before, row.before.verdict, row.before.answer),
                    Given(after, row.after.verdict, row.after.answer),
                ]
                _add(found, title, code, row.id.rpartition("/")[0], row.prompt, given)


def _add(found: Answers, title: str, code: str, prompt_id: str, prompt: str, given: list[Given]) -> None:
    language = shown_language(code)
    verdicts = tuple(dict.fromkeys(_number(found.verdicts, each.verdict) for each in given))
    numbers = (_number(found.sets, title), _number(found.languages, language), verdicts)
    is_changed = _differ(each.verdict for each in given)
    found.exchanges.append(Exchange(title, language, code, prompt_id, prompt, given, is_changed, numbers))


def _add_set(found: Answers, results: Results, kind: str, name: str, per_language: int) -> None:
    runs = {m.name: run for m in results.models if (run := m.safety.get((kind, name))) is not None}
    answers = {model: run.answers() for model, run in runs.items()}
    title = f"{'Harmful' if kind == 'attack' else 'Harmless'}: {name}"
    for code in in_order({code for run in runs.values() for code in run.verdicts}, results.dominant):
        verdicts = [run.verdicts.get(code, {}) for run in runs.values()]
        ids = list(dict.fromkeys(p for rows in verdicts for p in rows))
        ids.sort(key=lambda p: not _differ(rows.get(p) for rows in verdicts))  # stable
        shown = [p for p in ids if any((code, p) in rows for rows in answers.values())][:per_language]
        for prompt_id in shown:
            prompt = next(
                rows[code, prompt_id].prompt for rows in answers.values() if (code, prompt_id) in rows
            )
            _add(found, title, code, prompt_id, prompt, _given(code, prompt_id, runs, answers))


def _given(
    code: str,
    prompt_id: str,
    runs: Mapping[str, SafetyRun],
    answers: Mapping[str, Mapping[tuple[str, str], AnswerRow]],
) -> list[Given]:
    return [
        Given(
            model,
            runs[model].verdicts.get(code, {}).get(prompt_id, NOT_JUDGED),
            row.parts.answer or row.answer,
        )
        for model, rows in answers.items()
        if (row := rows.get((code, prompt_id))) is not None
    ]


def _differ(verdicts: Iterable[str | None]) -> bool:
    return len(set(verdicts)) > 1


def _number(names: list[str], name: str) -> int:
    """Where a name stands in a list, to which it is added where it is new."""
    if name not in names:
        names.append(name)
    return names.index(name)
