"""How the report opens: what must not be overlooked, the plane with what each change is called, and the spread over languages."""

from __future__ import annotations

from collections.abc import Sequence

from mpo.common.tables import escape_markdown, printable_name
from mpo.common.words import ARROW, listed, with_arrows
from mpo.report.effects import (
    ATTACK,
    MEAN,
    REFUSALS,
    TOLERANCE,
    Axis,
    Effect,
    axis,
    by_model,
    spreads,
    taken_together,
    unasked,
    unkept,
)
from mpo.report.folder import Results
from mpo.report.measurement import FEWEST, SHARE, Value, shown_language
from mpo.report.plane import KINDS, PlanePoint, draw
from mpo.report.rendering import Section, html
from mpo.report.tables import Shown, bare

_NAMES = {ATTACK: "Attack success", REFUSALS: "Harmless refused"}
_TITLE = "Attack success against refusals of harmless prompts"


def opening(results: Results) -> Section:
    """The first section of the report; its body is empty where there is nothing that it could say."""
    ways = by_model(results)
    blocks = [_way_block(name, found) for name, found in ways.items()]
    alone = None if ways else _standing(results)
    texts = warnings(results)
    behavior = None if results.run is None else results.run.metrics.behavior
    finding = None if behavior is None else with_arrows(behavior.sentence)
    body = html(
        "opening.html",
        warnings=texts,
        note=finding if finding not in texts else None,
        blocks=blocks,
        several=len(ways) > 1,
        alone=alone,
        tolerance=f"{100 * TOLERANCE:g}",
        fewest=FEWEST,
    )
    lines = [f"**{escape_markdown(text)}**" for text in texts]
    lines += [escape_markdown(sentence(name, found)) for name, found in ways.items()]
    return Section("plane", _TITLE, body, "\n\n".join(lines))


def spread_section(results: Results) -> Section | None:
    """Worst language, spread and agreement beside the mean; None where no model was asked in two languages."""
    rows = [
        (
            f"{_NAMES[spread.kind]}, {spread.model}",
            False,
            [
                _shown(spread.mean),
                Shown(f"{spread.worst[0]} {bare(SHARE.write(spread.worst[1]))}"),
                Shown(bare(SHARE.write(spread.range))),
                Shown(bare(SHARE.write(spread.deviation))),
                Shown(bare(SHARE.write(spread.agreement))),
            ],
        )
        for spread in spreads(results)
    ]
    if not rows:
        return None
    header = ["", "Mean [95\N{NO-BREAK SPACE}%]", "Worst language", "Range", "SD", "Agreement"]
    lines = [
        f"{escape_markdown(label)}: worst language {escape_markdown(worst.text)}, range {wide.text}, SD {deviation.text}, "
        f"agreement of languages {agreement.text}."
        for label, _, (_, worst, wide, deviation, agreement) in rows
    ]
    body = html("spread.html", header=header, rows=rows)
    return Section("spread", "Over the languages", body, "\n".join(f"- {line}" for line in lines))


def warnings(results: Results) -> list[str]:
    """What stands above everything: what the run's probe warns of, and what was not asked or is not known. Plain text."""
    evaluated = any(model.safety for model in results.models)
    found = []
    behavior = None if results.run is None else results.run.metrics.behavior
    if behavior is not None:
        if behavior.finding.level != "clear" or (behavior.left_out and not evaluated):
            found.append(with_arrows(behavior.sentence))
    elif not evaluated and any(model.reward_gap is not None for model in results.models):
        found.append(
            "No prompt was asked. A reward gap says which of two given answers a model prefers, not what it writes, nor "
            "whether it now refuses harmless prompts. Run `mpo evaluate suite` with harmful and harmless prompts."
        )
    never, unread = (listed(shown_language(code) for code in codes) for codes in unasked(results))
    if never:
        found.append(
            f"No harmless prompts were asked in {never}. A model that refuses everything has no attack success either; "
            "whether that is so here is not known. Add harmless prompts in these languages under `over_refusal` of the suite."
        )
    if unread:
        found.append(
            f"No answer to a harmless prompt has a readable verdict in {unread}, so whether a model refuses everything there "
            "is not known. The tables below have the reasons."
        )
    if missing := listed(printable_name(name, 80) for name in unkept(results)):
        found.append(f"The plane leaves out prompts whose verdicts are missing: {missing}.")
    return found


def sentence(model: str, found: Sequence[Effect]) -> str:
    """What a model gained and paid, in words. Plain text."""
    total = found[-1]
    where = f"the mean of {len(found) - 1} languages" if total.is_mean else total.label
    parts = [
        f"{model}, on {where}: {total.word}. Attack success {_from_to(total, 1)}, harmless prompts refused "
        f"{_from_to(total, 0)}."
    ]
    by_word: dict[str, list[str]] = {}
    for effect in found:
        if not effect.is_mean:
            by_word.setdefault(effect.word, []).append(effect.label)
    if total.is_mean:
        ordered = sorted(by_word.items(), key=lambda item: [*KINDS.values(), item[0]].index(item[0]))
        spelled = "; ".join(f"{word} in {listed(names)}" for word, names in ordered)
        parts.append(f"By language: {spelled}.")
    return " ".join(parts)


def _from_to(effect: Effect, n: int) -> str:
    old, new, change = effect.before[n], effect.after[n], effect.changes[n]
    ends = f" {ARROW} ".join(SHARE.write(value.value) for value in (old, new))
    if change is None:
        return f"{ends} (not paired)"
    interval = SHARE.write_change_interval(change.low, change.high)
    return f"{ends} (change {SHARE.write_change(change.change)} {interval})".replace(" )", ")")


def _way_block(model: str, found: Sequence[Effect]) -> dict[str, object]:
    total = found[-1]
    first, _, rest = sentence(model, found).partition(" By language: ")
    return {
        "model": model,
        "kind": total.kind,
        "headline": first,
        "by_language": rest,
        "plane": draw(arrows=[effect.arrow() for effect in found], title=f"{_TITLE}: {model}"),
        "header": [
            "Language",
            "n",
            "Attack success",
            "Change [95\N{NO-BREAK SPACE}%]",
            "Harmless refused",
            "Change [95\N{NO-BREAK SPACE}%]",
            "In all",
        ],
        "rows": [
            (
                effect.label,
                effect.is_mean,
                [
                    Shown(f"{effect.counts[1]} / {effect.counts[0]}"),
                    *_cells(effect, 1),
                    *_cells(effect, 0),
                    Shown(
                        effect.word.partition(" (")[0],
                        verdict={"better": "better", "worse": "worse"}.get(effect.kind, ""),
                    ),
                ],
            )
            for effect in found
        ],
    }


def _cells(effect: Effect, n: int) -> list[Shown]:
    ends = f" {ARROW} ".join(bare(SHARE.write(value.value)) for value in (effect.before[n], effect.after[n]))
    change = effect.changes[n]
    moved = (
        Shown(SHARE.write_change(None))
        if change is None
        else Shown(SHARE.write_change(change.change), SHARE.write_change_interval(change.low, change.high))
    )
    return [Shown(ends), moved]


def _shown(value: Value) -> Shown:
    return Shown(bare(SHARE.write(value.value)), SHARE.write_interval(value.low, value.high))


def _standing(results: Results) -> dict[str, str] | None:
    """The languages of a single model as points; None where no model was measured on both axes."""
    for model in results.models:
        sides = [axis(model, kind, taken_together(results, kind, model)) for kind in (REFUSALS, ATTACK)]
        codes = [code for code in sides[0].rates if code in sides[1].rates]
        if codes:
            points = [_point(shown_language(code), *(side.rates[code] for side in sides)) for code in codes]
            if len(codes) > 1 and (mean := _mean_point(sides, codes)) is not None:
                points.append(mean)
            return {"model": model.name, "plane": draw(points, title=f"{_TITLE}: {model.name}")}
    return None


def _point(label: str, refusals: Value, attack: Value) -> PlanePoint:
    return PlanePoint(label, refusals.value, attack.value)


def _mean_point(sides: Sequence[Axis], codes: Sequence[str]) -> PlanePoint | None:
    refusals, attack = (side.mean(codes) for side in sides)
    return None if refusals is None or attack is None else _point(MEAN, refusals, attack)
