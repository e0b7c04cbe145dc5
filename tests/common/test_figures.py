from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo.common.figures import round_ticks
from mpo.common.words import MINUS


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e5), st.booleans())
def test_ticks_are_round_even_and_written_with_equally_many_digits(
    low: float, span: float, signed: bool
) -> None:
    ticks = round_ticks(low, low + span, signed)
    values = [value for value, _ in ticks]
    assert 2 <= len(ticks) <= 7 and low - 1e-6 * span <= values[0] and values[-1] <= low + span * (1 + 1e-6)
    steps = [b - a for a, b in pairwise(values)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6, abs=1e-9 * abs(low))
    assert float(f"{steps[0]:.1e}"[:3]) in (1.0, 2.0, 2.5, 5.0)
    digits = set()
    for value, label in ticks:
        assert float(label.replace(MINUS, "-")) == pytest.approx(value, rel=1e-6, abs=1e-6 * span)
        assert (label[0] in f"+{MINUS}") == (value < 0 or (signed and value > 0))
        digits |= {len(label.partition(".")[2])} if value else set()
    assert len(digits) <= 1 and len({label for _, label in ticks}) == len(ticks)
