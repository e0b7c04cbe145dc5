"""What a build has before it and what it needs: counts of the prompts, checks before any work, and the plan that a person reads."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field

from mpo.building.filters import FILTERS, require_packages, threshold
from mpo.building.prompts import PromptRow
from mpo.building.recipe import BuildRecipe
from mpo.building.refusals import Refusals
from mpo.building.translation import TranslationChoice, make_translator
from mpo.common.redaction import portable_path
from mpo.common.words import listed
from mpo.data.contract import HARMFUL, HARMLESS, KINDS
from mpo.errors import ConfigError, DataError
from mpo.evaluation.engines import ModelChoice
from mpo.evaluation.judges import JudgeChoice, check_judge
from mpo.evaluation.tasks import ATTACK, OVER_REFUSAL

TASKS = {HARMFUL: ATTACK, HARMLESS: OVER_REFUSAL}
"""What the answers to a kind of prompts are judged by."""


@dataclass
class Facts:
    """What the prompts hold.

    Attributes:
        kinds: Prompts by kind.
        dropped: Rows that were left out.
        given: Texts that are given, by the prompt's kind, and by the language of a prompt or the part that an answer is.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    given: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Number of prompts."""
        return self.kinds.total()

    def add(self, row: PromptRow) -> None:
        """Counts a prompt."""
        self.kinds[row.kind] += 1
        self.given.update((row.kind, code) for code in row.texts)
        self.given.update(
            (row.kind, part) for part in ("chosen", "rejected") if getattr(row, part) is not None
        )

    def prompts_to_translate(self, code: str) -> int:
        """Prompts that are not given in a language."""
        return sum(count - self.given[kind, code] for kind, count in self.kinds.items())


def judge_choices(recipe: BuildRecipe, facts: Facts) -> dict[str, JudgeChoice]:
    """Which judge judges the answers to the kinds of prompts that there are."""
    choices = {HARMFUL: recipe.judge, HARMLESS: recipe.harmless_judge or recipe.judge}
    return {kind: choice for kind, choice in choices.items() if facts.kinds[kind]}


def needs_refusals(recipe: BuildRecipe, facts: Facts) -> bool:
    """Whether a list of refusals may be asked for one."""
    answers = recipe.answers
    asked = answers.chosen == "refusal" or (answers.chosen == "model" and answers.never_safe == "refusal")
    return (asked and facts.kinds[HARMFUL] > 0) or facts.kinds[HARMLESS] > 0


def check_build(recipe: BuildRecipe, facts: Facts, refusals: Refusals, openings: Refusals) -> None:
    """Finds out what would otherwise show only after hours. No weights are read, and nothing is asked.

    Raises:
        MPOError: A model, a judge, a translator, a list or a package cannot be used, or the prompts lack what the recipe takes
            from them.
    """
    if not facts.total:
        raise DataError(
            f"no prompt is left: all {facts.dropped:,} stand in what `leaks.against` names, or are bad rows."
        )
    require_packages(recipe.filters)
    for model in (recipe.model, recipe.answers.rejecting_model):
        if model is not None and model.engine != "server":
            model.open()
    for kind, choice in judge_choices(recipe, facts).items():
        check_judge(choice, TASKS[kind])
    if recipe.answers.chosen == "column" and not any(facts.given[kind, "chosen"] for kind in KINDS):
        raise ConfigError("`answers.chosen: column`: no row of the prompts has a text in `chosen`.")
    only_column = {*recipe.answers.rejected} == {"column"} and facts.kinds[HARMFUL]
    if only_column and not facts.given[HARMFUL, "rejected"]:
        raise ConfigError(
            "`answers.rejected: [column]`: no harmful prompt has a text in `rejected`. Add `own` (an unsafe answer of the model's "
            "own), `opening` (the first words of an answer that complies) or `model` (with `rejecting_model`)."
        )
    if needs_refusals(recipe, facts):
        refusals.of(recipe.source_language)
    answers = recipe.answers
    if answers.samples_harmless and facts.kinds[HARMLESS] and recipe.model is None:
        raise ConfigError(
            f"model: {facts.kinds[HARMLESS]:,} harmless prompts need the model that will be trained to answer them, such as "
            "`model: {model: org/name}`; none is given."
        )
    if recipe.translation.engine == "none" and facts.kinds[HARMFUL]:
        stock = {
            "refusals": (answers.chosen == "refusal", refusals),
            "openings": (answers.rejected == ["opening"], openings),
        }
        for name, (used, texts) in stock.items():
            lacking = [code for code in recipe.languages if used and not texts.of(code)]
            if lacking:
                raise ConfigError(
                    f"answers: there are no {name} in {listed(lacking)}, and nothing translates. Give a file with some "
                    f"(`answers.{name}`), or set `translation`."
                )
    missing = {code: facts.prompts_to_translate(code) for code in recipe.languages}
    translates = not recipe.prompts.skips_missing and any(missing.values())
    if recipe.translation.engine != "none" or translates:
        make_translator(recipe.translation, missing).check(recipe.source_language, recipe.languages)


def plan_text(recipe: BuildRecipe, facts: Facts) -> str:
    """What will be asked how often, one line each."""
    answers = recipe.answers
    kinds = listed(f"{count:,} {kind}" for kind, count in sorted(facts.kinds.items()))
    left_out = f"; {facts.dropped:,} left out" if facts.dropped else ""
    data = listed(map(shown_name, recipe.prompts.data))
    rows = [("Prompts", f"{facts.total:,}: {kinds}, from {data}{left_out}")]
    if recipe.prompts.skips_missing:
        given = listed(
            f"{facts.total - facts.prompts_to_translate(code):,} in {code}" for code in recipe.languages
        )
        rows.append(("Given", f"{given}; a language that a prompt is not given in is skipped"))
    if recipe.samples_model and recipe.model is not None:
        own = facts.kinds[HARMLESS] * answers.samples if answers.samples_harmless else 0
        each = "each of " if len(recipe.languages) > 1 else ""
        at_most = "up to " if recipe.prompts.skips_missing else ""
        more = f", and {at_most}{own:,} in {each}{listed(recipe.languages)}" if own else ""
        asked = facts.total if answers.samples_harmful else facts.kinds[HARMLESS]
        if asked:
            rows.append(("Answers", f"{asked * answers.samples:,} from {model_name(recipe.model)}{more}"))
    if answers.rejecting_model is not None:
        rows.append(
            ("Rejected", f"up to {facts.kinds[HARMFUL]:,} from {model_name(answers.rejecting_model)}")
        )
    judges = {choice.model or choice.name for choice in judge_choices(recipe, facts).values()}
    rows.append(("Judge", listed(sorted(judges))))
    if recipe.translation.engine != "none":
        most = listed(
            f"{facts.prompts_to_translate(code) + 2 * facts.total:,} into {code}" for code in recipe.languages
        )
        rows.append(("Translation", f"at most {most}, by {translator_name(recipe.translation)}"))
    if recipe.filters.back_translation is not None:
        rows.append(
            ("And back", f"as many, by {translator_name(recipe.back_translation or recipe.translation)}")
        )
    on = [
        f"{name} {shown}".strip()
        for name in FILTERS
        if (shown := threshold(name, recipe.filters)) is not None
    ]
    rows.append(("Filters", "; ".join(on).replace(" the judge's verdict", "") or "none"))
    rows.append(("Out", recipe.out))
    return "\n".join(f"{name:<12} {text}" for name, text in rows)


def shown_name(name: str) -> str:
    """A file without the folders of its user, anything else as it is."""
    return portable_path(name) if os.path.exists(name) else name


def model_name(choice: ModelChoice) -> str:
    """What a person calls a model."""
    return shown_name(choice.adapter or choice.model)


def translator_name(choice: TranslationChoice) -> str:
    """What a person calls a translator."""
    return " ".join(map(shown_name, choice.command)) if choice.model is None else model_name(choice.model)
