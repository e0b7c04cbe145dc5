"""From prompts to preference groups in every language: the stages of a build, one after another, each going on where it was."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from mpo.building.answers import MODEL, OPENINGS, REFUSALS, Gaps, PairMaker, judge_samples, sample
from mpo.building.leaks import without_leaks
from mpo.building.meaning import compare_meanings, judge_pairs
from mpo.building.plan import (
    TASKS,
    Facts,
    check_build,
    judge_choices,
    model_name,
    needs_refusals,
    plan_text,
    translator_name,
)
from mpo.building.prompts import Dropped, PromptRow, read_prompts
from mpo.building.recipe import BuildRecipe
from mpo.building.refusals import Refusals
from mpo.building.screening import Counts, Screen, Side
from mpo.building.stages import Kept, Row, Stage, dumped, note_start, read_rows
from mpo.building.starter import starter_openings
from mpo.building.targets import Target
from mpo.building.translation import TranslationChoice, Translator, make_translator
from mpo.building.writing import COUNTS, PROVENANCE, Output, source_of, write_card, write_page
from mpo.common.files import PART, check_writable, write_json
from mpo.common.locks import locked_folder
from mpo.common.provenance import collect
from mpo.common.tables import TextTable
from mpo.common.typed_json import read_typed
from mpo.common.words import counted
from mpo.data.contract import HARMFUL, HARMLESS, KINDS
from mpo.data.languages import language_name
from mpo.errors import ConfigError, StorageError
from mpo.evaluation.engines import Engine, ModelChoice, make_engine
from mpo.evaluation.judges import Judge, make_judge

STAGES = "stages"

_WITHOUT = {
    HARMFUL: "Nothing in these groups teaches a model to refuse.",
    HARMLESS: "A model that is trained on harmful ones alone comes to refuse harmless ones, too.",
}


def build_data(recipe: BuildRecipe, *, dry_run: bool = False) -> Path | None:
    """Makes preference groups as a recipe says, or what a killed run left of them.

    Everything is in ``recipe.out``: ``groups.parquet`` and ``groups.jsonl``, ``dropped.jsonl``, ``provenance.json``,
    ``build.json``, ``README.md``, ``report.html``, and in ``stages/`` what each stage made. Thresholds of filters can be changed
    and the command run again: nothing is asked anew for that.

    Args:
        recipe: What to make.
        dry_run: Check the recipe and its files, print what would be asked how often, stop.

    Returns:
        The Parquet file; None for a dry run.

    Raises:
        MPOError: A file, a model, a judge or a translator cannot be used. What was made before is kept.
    """
    build = _Build(recipe)
    if dry_run:
        build.count()
        build.check()
        return None
    out = Path(recipe.out)
    check_writable(out, setting="out")
    with locked_folder(
        out, f"Another process is building in {out}. Let it finish, or choose another folder."
    ):
        build.read_prompts()
        build.check()
        build.run()
        return build.finish()


class _Build:
    def __init__(self, recipe: BuildRecipe) -> None:
        self.recipe, self.out = recipe, Path(recipe.out)
        self.folder = self.out / STAGES
        self.facts = Facts()
        self.refusals = Refusals(recipe.answers.refusals)
        self.openings = Refusals(recipe.answers.openings, starter_openings)
        self.codes = [recipe.source_language, *recipe.languages]

    # ----------------------------------------------------------------------------------------------------------- prompts

    def count(self) -> None:
        """Reads the prompts and keeps only how many there are."""
        digest = _Digest()
        for found in self._read():
            if isinstance(found, PromptRow):
                digest.add(found)
                self.facts.add(found)
            else:
                self.facts.dropped += 1
        self._check_same_prompts(digest.text)

    def read_prompts(self) -> None:
        """Writes the prompts, and those left out, into files of their own; every stage reads them from there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        digest = _Digest()
        paths = {name: self.folder / f".{name}{PART}" for name in ("prompts.jsonl", "left_out.jsonl")}
        kept, left_out = paths.values()
        try:
            with open(kept, "w", encoding="utf-8") as rows, open(left_out, "w", encoding="utf-8") as others:
                for found in self._read():
                    if isinstance(found, PromptRow):
                        rows.write(digest.add(found))
                        self.facts.add(found)
                    else:
                        others.write(dumped(asdict(found)))
                        self.facts.dropped += 1
            self._check_same_prompts(digest.text)
            for name, path in paths.items():
                os.replace(path, self.folder / name)
        except OSError as error:
            raise StorageError(f"Cannot write {self.folder}: {error.strerror or error}.") from error
        finally:
            for path in paths.values():
                path.unlink(missing_ok=True)
        self.base = {
            "prompts": digest.text,
            "source_language": self.recipe.source_language,
            "block": self.recipe.block,
        }

    def _check_same_prompts(self, digest: str) -> None:
        """Makes sure that what earlier runs made in the folder was made of these prompts.

        Raises:
            ConfigError: It was made of others.
        """
        for file in self.folder.glob("*.settings.json"):
            stem = file.name.removesuffix(".settings.json")
            rows = self.folder / f"{stem}.jsonl"
            begun = (rows.exists() and rows.stat().st_size) or (self.folder / f"{stem}.0.part.jsonl").exists()
            if not begun:
                continue
            with suppress(StorageError):  # the stage itself says what is wrong with it
                if read_typed(file, dict[str, Any]).get("prompts") != digest:
                    raise ConfigError(
                        f"{self.out} holds a build of other prompts, of these in another order, or for other languages (`prompts`, "
                        "`source_language`, `languages`). Choose another `out`, or delete that folder to make everything anew."
                    )

    def _read(self) -> Iterator[PromptRow | Dropped]:
        recipe = self.recipe

        def read() -> Iterator[PromptRow | Dropped]:
            return read_prompts(recipe.prompts, recipe.source_language, recipe.languages)

        return (
            read()
            if recipe.leaks is None
            else without_leaks(read, recipe.leaks.against, recipe.source_language)
        )

    def prompts(self) -> Iterator[PromptRow]:
        return (PromptRow(**row) for row in read_rows(self.folder / "prompts.jsonl"))

    def check(self) -> None:
        """Finds out what would otherwise show only after hours, and says what will be asked how often."""
        check_build(self.recipe, self.facts, self.refusals, self.openings)
        print(plan_text(self.recipe, self.facts), flush=True)

    # ------------------------------------------------------------------------------------------------------------ stages

    def stage(self, name: str, after: Sequence[Stage], settings: Mapping[str, Any]) -> Stage:
        """A stage that depends on earlier ones and on settings of its own."""
        merged: dict[str, Any] = dict(self.base)
        for each in after:
            merged |= each.settings
        return Stage(
            self.folder / f"{name}.jsonl", {**merged, **{f"{name}.{key}": v for key, v in settings.items()}}
        )

    def run(self) -> None:
        """Makes the rows of every stage."""
        recipe = self.recipe
        given = {}
        with self._translator(recipe.translation, "translator") as translator:
            for code in recipe.languages:
                given[code] = self._given_prompts(code, translator)
        self._sample(given)
        self._rejecting()
        with self._judges() as judges:
            self._verdicts(judges)
        self._pairs()
        self.texts: dict[str, Stage] = {}
        with self._translator(recipe.translation, "translator") as translator:
            for code in recipe.languages:
                self.texts[code] = self._texts(code, given[code], translator)
        self.back: dict[str, Stage] = {}
        if recipe.filters.back_translation is not None:
            choice = recipe.back_translation or recipe.translation
            with self._translator(choice, "back_translator") as translator:
                for code in recipe.languages:
                    self.back[code] = self._back(code, choice, translator)
        self.meaning: dict[str, Stage] = {}
        if recipe.filters.asks_judge:
            with self._judges() as judges:
                for code in self.codes:
                    self.meaning[code] = self._meaning(code, judges)
        self.similar: dict[str, Stage] = {}
        if recipe.filters.embedding is not None:
            for code in recipe.languages:
                self.similar[code] = self._similar(code)

    def _run(
        self, stage: Stage, inputs: Any, make: Callable[[Any, Kept], Sequence[Any]], title: str | None
    ) -> Stage:
        stage.run(inputs, self.facts.total, make, block=self.recipe.block, title=title)
        return stage

    def _harmless(self, title: str | None) -> str | None:
        """A title that is shown where there are harmless prompts."""
        return title if self.facts.kinds[HARMLESS] else None

    def _target(self, code: str, translator: Translator | None, choice: TranslationChoice) -> Target:
        recipe = self.recipe
        return Target(
            code,
            recipe.source_language,
            translator,
            choice,
            {REFUSALS: self.refusals, OPENINGS: self.openings},
            recipe.answers,
            recipe.prompts.skips_missing,
        )

    def _given_prompts(self, code: str, translator: Translator | None) -> Stage:
        settings: dict[str, Any] = {} if translator is None else {"translator": translator.settings()}
        target = self._target(code, translator, self.recipe.translation)
        if target.skips:
            settings["missing"] = "skip"
        stage = self.stage(f"prompts.{code}", (), settings)
        return self._run(
            stage,
            self.prompts(),
            target.prompts,
            self._harmless(f"{_taking(translator)} harmless prompts ({code})"),
        )

    def _sample(self, given: Mapping[str, Stage]) -> None:
        """The model's answers, in the dominant language and, to harmless prompts, in the others."""
        answers = self.recipe.answers
        recipe, count = self.recipe, self.recipe.answers.samples
        engine = None
        if recipe.samples_model and recipe.model is not None:
            engine = self._engine(recipe.model, MODEL)
        settings = {} if engine is None else {"count": count, "engine": engine.settings()}
        self.own: dict[str, Stage] = {}
        try:
            self.samples = self.stage("samples", (), settings)
            self._run(
                self.samples,
                self.prompts(),
                lambda rows, kept: _answers(
                    rows,
                    engine,
                    [
                        (
                            None
                            if row.kind == HARMFUL and not answers.samples_harmful
                            else row.texts[recipe.source_language],
                            count,
                        )
                        for row in rows
                    ],
                    kept,
                ),
                f"Answering ({recipe.source_language})" if engine else None,
            )
            for code, prompts in given.items():
                self.own[code] = self.stage(f"own.{code}", (prompts,), settings)
                self._run(
                    self.own[code],
                    zip(self.prompts(), prompts.rows(), strict=True),
                    lambda rows, kept: _answers(
                        [prompt for prompt, _ in rows],
                        engine if answers.samples_harmless else None,
                        [(None if row["fault"] else row["text"], count) for _, row in rows],
                        kept,
                    ),
                    self._harmless(f"Answering harmless prompts ({code})" if engine else None),
                )
        finally:
            if engine is not None:
                engine.close()

    def _rejecting(self) -> None:
        """Answers of the model that rejected ones are taken from."""
        recipe = self.recipe
        choice = recipe.answers.rejecting_model
        engine = None if choice is None else self._engine(choice, "rejecting_model")
        given_first = "column" in recipe.answers.rejected

        def make(rows: Sequence[PromptRow], kept: Kept) -> list[Row]:
            asked = [
                (
                    None
                    if row.kind != HARMFUL or (given_first and row.rejected)
                    else row.texts[recipe.source_language],
                    1,
                )
                for row in rows
            ]
            return _answers(rows, engine, asked, kept)

        self.rejecting = self.stage("rejecting", (), {} if engine is None else {"engine": engine.settings()})
        try:
            self._run(self.rejecting, self.prompts(), make, "Answering, to be rejected" if engine else None)
        finally:
            if engine is not None:
                engine.close()

    def _verdicts(self, judges: Mapping[str, Judge]) -> None:
        recipe = self.recipe
        unfinished, source = recipe.answers.unfinished, recipe.source_language
        settings = {"unfinished": unfinished, **_judge_settings(judges)}
        self.verdicts = self.stage("verdicts", (self.samples,), settings)
        self._run(
            self.verdicts,
            zip(self.prompts(), self.samples.rows(), strict=True),
            lambda rows, kept: judge_samples(judges, rows, source, unfinished, kept),
            "Judging answers" if recipe.samples_model else None,
        )

    def _pairs(self) -> None:
        recipe, answers = self.recipe, self.recipe.answers
        by_gap = answers.select == "gap" and answers.chosen == "model" and recipe.model is not None
        gaps = Gaps(recipe.model) if by_gap and recipe.model is not None else None
        maker = PairMaker(answers, recipe.source_language, self.refusals, self.openings, gaps)
        settings = {
            name: getattr(answers, name)
            for name in ("chosen", "rejected", "select", "never_safe", "harmless", "unfinished")
        }
        if needs_refusals(self.recipe, self.facts):
            settings["refusals"] = self.refusals.digest([recipe.source_language])
        if "opening" in answers.rejected:
            settings["openings"] = self.openings.digest([recipe.source_language])
        self.pairs = self.stage("pairs", (self.samples, self.verdicts, self.rejecting), settings)
        rows = zip(
            self.prompts(), self.samples.rows(), self.verdicts.rows(), self.rejecting.rows(), strict=True
        )
        self._run(self.pairs, rows, maker.make, "Making pairs")
        if gaps is not None:
            gaps.close()

    def _texts(self, code: str, given: Stage, translator: Translator | None) -> Stage:
        target = self._target(code, translator, self.recipe.translation)
        settings: dict[str, Any] = {} if translator is None else {"translator": translator.settings()}
        if needs_refusals(self.recipe, self.facts):
            settings["refusals"] = self.refusals.digest([code])
        if "opening" in self.recipe.answers.rejected:
            settings["openings"] = self.openings.digest([code])
        stage = self.stage(f"texts.{code}", (self.pairs, given, self.own[code]), settings)
        rows = zip(self.prompts(), self.pairs.rows(), given.rows(), self.own[code].rows(), strict=True)
        return self._run(stage, rows, target.texts, f"{_taking(translator)} texts ({code})")

    def _back(self, code: str, choice: TranslationChoice, translator: Translator | None) -> Stage:
        target = self._target(code, translator, choice)
        settings = {} if translator is None else {"translator": translator.settings()}
        stage = self.stage(f"back.{code}", (self.texts[code],), settings)
        rows = zip(self.prompts(), self.texts[code].rows(), strict=True)
        return self._run(stage, rows, target.back, f"Translating back ({code})")

    def _meaning(self, code: str, judges: Mapping[str, Judge]) -> Stage:
        """Verdicts on both answers in a language; those that are known already are not asked for."""
        before = self.pairs if code == self.recipe.source_language else self.texts[code]
        stage = self.stage(f"meaning.{code}", (before,), _judge_settings(judges))

        def make(rows: Sequence[tuple[PromptRow, Row, Row]], kept: Kept) -> list[Row]:
            return judge_pairs(judges, rows, code, kept, is_source=code == self.recipe.source_language)

        rows = zip(self.prompts(), self.pairs.rows(), self._sides(code), strict=True)
        return self._run(stage, rows, make, f"Judging ({code})")

    def _similar(self, code: str) -> Stage:
        model = self.recipe.filters.embedding_model
        stage = self.stage(f"similar.{code}", (self.texts[code],), {"model": model})

        rows = zip(self._sides(self.recipe.source_language), self.texts[code].rows(), strict=True)
        return self._run(
            stage, rows, lambda block, _: compare_meanings(block, model), f"Comparing meanings ({code})"
        )

    def _sides(self, code: str) -> Iterator[Row]:
        """The texts of a language, the dominant one's in the same form."""
        if code != self.recipe.source_language:
            yield from self.texts[code].rows()
            return
        for prompt, pair in zip(self.prompts(), self.pairs.rows(), strict=True):
            yield {
                "id": prompt.id,
                "prompt": prompt.texts[code],
                "chosen": pair["chosen"],
                "rejected": pair["rejected"],
                "from": {"prompt": "data", **pair["from"]},
                "faults": {},
            }

    # ----------------------------------------------------------------------------------------------------------- engines

    def _engine(self, choice: ModelChoice, name: str) -> Engine:
        engine = make_engine(choice, self.recipe.answers.generation)
        self._note(
            name, {"settings": engine.settings(), "engine": engine.describe(), "name": model_name(choice)}
        )
        return engine

    @contextmanager
    def _translator(self, choice: TranslationChoice, name: str) -> Iterator[Translator | None]:
        if choice.engine == "none":
            yield None
            return
        translator = make_translator(choice)
        self._note(name, {"settings": translator.settings(), "name": translator_name(choice)})
        try:
            yield translator
        finally:
            translator.close()

    @contextmanager
    def _judges(self) -> Iterator[dict[str, Judge]]:
        judges: dict[str, Judge] = {}
        try:
            for kind, choice in judge_choices(self.recipe, self.facts).items():
                judges[kind] = make_judge(choice, TASKS[kind])
                self._note(f"judge of {kind} prompts", {"settings": judges[kind].settings()})
            yield judges
        finally:
            for judge in judges.values():
                judge.close()

    def _note(self, name: str, about: Mapping[str, Any]) -> None:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        note_start(self.out / PROVENANCE, name, {"started": started, **about})

    # ------------------------------------------------------------------------------------------------------------ the end

    def finish(self) -> Path:
        """Decides what is let through, and writes groups, card and page."""
        recipe = self.recipe
        screen = Screen(
            recipe.filters,
            recipe.source_language,
            recipe.languages,
            any_answer=recipe.answers.takes_any_harmless,
        )
        lost: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        with Output(self.out, recipe.page.examples) as output:
            for row in read_rows(self.folder / "left_out.jsonl"):
                each = Dropped(**row)
                screen.counts.drop(each)
                output.drop(each)
            rows = zip(self.prompts(), self.pairs.rows(), self._all_sides(), strict=True)
            while block := list(islice(rows, recipe.block)):
                self._check_rows(block)
                for (prompt, _, sides), (group, dropped) in zip(block, screen.block(block), strict=True):
                    for each in dropped:
                        output.drop(each, source_of(each, sides, recipe.source_language))
                    if group is not None:
                        output.add(group)
                    else:
                        lost[prompt.kind][_main_reason(dropped, recipe.source_language)] += 1
        counts = screen.counts
        write_json(
            self.out / COUNTS,
            {
                "version": 1,
                **counts.to_dict(),
                "provenance": collect(data_fingerprint=str(self.base["prompts"])),
            },
        )
        write_card(self.out, recipe, counts)
        written = write_page(self.out, recipe, counts, output)
        table = TextTable(
            f"{counts.groups.total():,} groups of {counts.prompts.total():,} prompts",
            ("Language", "Pairs made", "Left"),
            tuple(
                (language_name(code), f"{made:,}", f"{counts.kept[code]:,}")
                for code, made in counts.made.items()
            ),
            notes=(
                *_by_kind(counts, lost),
                *(
                    f"Left out by {name}: {found.total():,}."
                    for name, found in counts.by_filter().items()
                    if found
                ),
            ),
        )
        print()
        table.show()
        print(f"\nWritten: {self.out / 'groups.parquet'}, {self.out / 'README.md'}, {written}")
        groups = self.out / "groups.parquet"
        if not counts.groups.total():
            print("No group is left: see report.html for the reasons.")
            return groups
        for kind, without in _WITHOUT.items():
            if counts.prompts[kind] and not counts.groups[kind]:
                print(
                    f"\nWarning: of {counted(counts.prompts[kind], f'{kind} prompt')} none is left. {without} {self.out / 'report.html'} shows "
                    "why they were left out."
                )
        print(_next_commands(groups, recipe.source_language))
        return groups

    def _check_rows(self, block: Sequence[tuple[PromptRow, Row, Mapping[str, Side]]]) -> None:
        """Rows of stages belong to their prompts, whatever else has written into the files."""
        for prompt, pair, sides in block:
            for name, row in {"pairs": pair, **{f"texts.{c}": s.texts for c, s in sides.items()}}.items():
                if row.get("id") != prompt.id:
                    raise StorageError(
                        f"{self.folder / name}.jsonl has a row that does not belong to the prompt {prompt.id!r}: something else has "
                        "written into it. Delete the file, and run the same command again; its rows are then made anew."
                    )

    def _all_sides(self) -> Iterator[dict[str, Side]]:
        streams = {
            code: zip(
                self._sides(code),
                self._optional(self.meaning.get(code)),
                self._optional(self.back.get(code)),
                self._optional(self.similar.get(code)),
                strict=True,
            )
            for code in self.codes
        }
        for _ in range(self.facts.total):
            yield {code: Side(*next(stream)) for code, stream in streams.items()}

    def _optional(self, stage: Stage | None) -> Iterator[Row]:
        if stage is not None:
            yield from stage.rows()
            return
        for _ in range(self.facts.total):
            yield {}


class _Digest:
    """What tells the prompts of a build from others."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256(b"mpo build 1")

    def add(self, row: PromptRow) -> str:
        """Takes a prompt in; returns its line."""
        line = dumped(asdict(row))
        self._digest.update(line.encode("utf-8"))
        return line

    @property
    def text(self) -> str:
        """Of all prompts so far."""
        return self._digest.hexdigest()


def _answers(
    rows: Sequence[PromptRow], engine: Engine | None, asked: Sequence[tuple[str | None, int]], kept: Kept
) -> list[Row]:
    found = [[] for _ in rows] if engine is None else sample(engine, asked, kept)
    return [{"id": row.id, "answers": answers} for row, answers in zip(rows, found, strict=True)]


def _taking(translator: Translator | None) -> str:
    """What is done about the texts of a language, for the progress."""
    return "Taking" if translator is None else "Translating"


def _main_reason(dropped: Sequence[Dropped], source_language: str) -> str:
    """Why a prompt became no group: what its source lacks, else what most of its target languages do."""
    named = [each for each in dropped if each.language is not None]
    reasons = [each.reason for each in named if each.language == source_language]
    reasons = reasons or [each.reason for each in named or dropped]
    return Counter(reasons).most_common(1)[0][0] if reasons else "no reason is known"


def _by_kind(counts: Counts, lost: Mapping[str, Counter[str]]) -> list[str]:
    """A sentence for each kind of prompts, where there are both: its groups, and why most of the others are none."""
    kinds = [kind for kind in KINDS if counts.prompts[kind]]
    if len(kinds) < 2:
        return []
    said = []
    for kind in kinds:
        text = f"{kind.capitalize()}: {counted(counts.groups[kind], 'group')} of {counted(counts.prompts[kind], 'prompt')}"
        if lost[kind]:
            ((reason, count),) = lost[kind].most_common(1)
            text += f"; {lost[kind].total():,} left out, {count:,} of them for: {reason}"
        said.append(f"{text}.")
    return said


def _next_commands(groups: Path, source_language: str) -> str:
    """What is done with the groups of a build."""
    file = shlex.quote(str(groups))
    language = "" if source_language == "en" else f" --source_language {source_language}"
    return f"\nNext:\n  mpo data check {file}{language}\n  mpo train RECIPE --dataset {file}{language}"


def _judge_settings(judges: Mapping[str, Judge]) -> dict[str, Any]:
    return {f"judge of {kind} prompts": judge.settings() for kind, judge in judges.items()}
