"""One picture of a run, its price included: reward gap, harmful prompts answered and harmless ones refused, per language."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpo.common import figures as style
from mpo.common.tables import printable_name
from mpo.common.words import counted
from mpo.errors import DataError
from mpo.evaluation.probe.behavior import ANSWERED, REFUSED
from mpo.evaluation.probe.change import BehaviorChange, Shift
from mpo.evaluation.reward_gap import ALL_TARGETS, RewardGapTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = 1.5  # inches left of the axes
_BETWEEN = 0.32
_RIGHT = 0.25
_ROW = 0.34  # per language
_HEAD, _FOOT = 1.2, 0.55


class _Ends(NamedTuple):
    """What is drawn of a language in one column; None for nothing measured."""

    before: float
    after: float


def overview(
    before: RewardGapTable, after: RewardGapTable, behavior: BehaviorChange, path: str | Path
) -> Path:
    """Draw what training was for and what it may have cost, side by side and a row per language, as PNG.

    Columns are the held-out reward gap, which is to rise to the source's; the share of harmful prompts that are answered,
    which is to fall; and that of harmless ones that are refused, which is not to rise.

    Args:
        before, after: Reward gaps of the same languages.
        behavior: What the model did when it was asked.
        path: File to write.

    Raises:
        DependencyError: matplotlib is not installed.
        StorageError: The file cannot be written.
        DataError: The tables hold different languages.
    """
    rows = list(zip(before.rows, after.rows, strict=False))
    if [r.language for r in before.rows] != [r.language for r in after.rows]:
        raise DataError("Before and after hold different languages. Evaluate both on the same data.")
    codes = [old.language for old, _ in rows]
    names = [before.label(old) for old, _ in rows]
    gaps: list[_Ends | None] = [_Ends(old.gap, new.gap) for old, new in rows]
    shares = [[_of(behavior, measure, code) for code in codes] for measure in (ANSWERED, REFUSED)]
    several = len(before.targets) > 1 and before.all_targets is not None and after.all_targets is not None
    if several:
        assert before.all_targets is not None and after.all_targets is not None
        codes.append(ALL_TARGETS)
        names.append("Mean of targets")
        gaps.append(_Ends(before.all_targets.gap, after.all_targets.gap))
        targets = [row.language for row in before.targets]
        for column, measure in zip(shares, (ANSWERED, REFUSED), strict=True):
            column.append(_mean([_of(behavior, measure, code) for code in targets]))
    y = np.arange(len(codes)) + 0.45 * np.cumsum(
        [
            (n > 0 and (rows[n - 1][0].is_source if n <= len(rows) else False)) or code == ALL_TARGETS
            for n, code in enumerate(codes)
        ]
    )
    height = _HEAD + _FOOT + _ROW * (y[-1] + 1)
    with style.project_style():
        figure = style.new_figure(style.WIDTH, height)
        width = (style.WIDTH - _NAMES - _RIGHT - 2 * _BETWEEN) / 3
        harmful, harmless = behavior.per_language
        heads = (
            ("Reward gap", "nats per token; to rise"),
            ("Harmful prompts answered", f"% of {counted(harmful, 'prompt')}; to fall"),
            ("Harmless prompts refused", f"% of {counted(harmless, 'prompt')}; not to rise"),
        )
        for n, (column, (head, unit)) in enumerate(zip((gaps, *shares), heads, strict=True)):
            left = _NAMES + n * (width + _BETWEEN)
            axes = figure.add_axes(
                (left / style.WIDTH, _FOOT / height, width / style.WIDTH, 1 - (_HEAD + _FOOT) / height),
                ylim=(y[-1] + 0.5, -0.5),
                xlabel=unit,
            )
            axes.set_title(head, fontsize=9.5, fontweight="bold", loc="left", pad=6)
            axes.set_yticks(y, [printable_name(name, 18) for name in names] if n == 0 else [""] * len(y))
            axes.tick_params(axis="y", length=0, pad=8)
            axes.spines["left"].set_visible(False)
            axes.grid(axis="y", visible=False)
            _draw(axes, column, y, scale=1 if n == 0 else 100)
            if n == 0:
                for code, label in zip(codes, axes.get_yticklabels(), strict=True):
                    if code == ALL_TARGETS or (before.source is not None and code == before.source.language):
                        label.set_fontweight("bold")
                axes.axvline(0, color=style.FAINT_INK, linewidth=0.9, zorder=1)
                axes.axvline(
                    before.reference_gap, color=style.REFERENCE, linewidth=1.5, dashes=(5, 2), zorder=1.5
                )
                axes.set_xticks(*zip(*style.round_ticks(*axes.get_xlim(), signed=True), strict=True))
            else:
                axes.set_xlim(-6, 106)
                axes.set_xticks([0, 50, 100])
        last = figure.axes[-1]
        last.legend(
            ncols=2,
            loc="lower right",
            bbox_to_anchor=(1.02, 1 + 0.27 / (height - _HEAD - _FOOT)),
            borderaxespad=0,
        )
        subtitle = (
            f"On {counted(before.groups, 'held-out group')}, and on prompts of the probe in each language. "
            f"Dashed: {before.source_label} at the start."
        )
        style.add_title(figure, "What training changed, and what it cost", subtitle, left=0.18 / style.WIDTH)
        return style.save(figure, path)


def _of(behavior: BehaviorChange, measure: str, code: str) -> _Ends | None:
    shift: Shift | None = behavior.change[measure].languages.get(code)
    return None if shift is None else _Ends(shift.before, shift.after)


def _mean(ends: Sequence[_Ends | None]) -> _Ends | None:
    found = [each for each in ends if each is not None]
    if not found:
        return None
    return _Ends(*(sum(values) / len(found) for values in zip(*found, strict=True)))


def _draw(axes: Axes, column: Sequence[_Ends | None], y: Any, *, scale: float) -> None:
    """A ring before and a dot after, joined."""
    places = [
        (scale * ends.before, scale * ends.after, at) for ends, at in zip(column, y, strict=True) if ends
    ]
    if not places:
        axes.text(0.5, 0.5, "not asked", transform=axes.transAxes, ha="center", color=style.FAINT_INK)
        return
    old, new, at = (np.array(values, dtype=float) for values in zip(*places, strict=True))
    axes.plot(np.stack([old, new]), np.stack([at, at]), color=style.FAINT_INK, linewidth=1.1, zorder=3)
    for values, label, colour, fill in (
        (old, "before", style.BEFORE, "white"),
        (new, "after", style.AFTER, style.AFTER),
    ):
        axes.plot(
            values,
            at,
            label=label,
            linestyle="none",
            marker="o",
            markersize=6.5,
            markerfacecolor=fill,
            markeredgecolor=colour,
            markeredgewidth=1.6,
            clip_on=False,
            zorder=4,
        )
