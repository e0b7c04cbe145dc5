"""What the dry run finds in the data and the model before weights are loaded."""

from __future__ import annotations

import unicodedata

from mpo.data import load_groups
from mpo.jobs.preflight.data import shared_sources
from tests.data.rows import flat


def test_a_prompt_in_another_unicode_form_counts_as_shared() -> None:
    prompts = [f"Où est le café numéro {number}?" for number in range(4)]
    train = load_groups([flat("bn", source_prompt=prompt) for prompt in prompts]).groups
    other = [unicodedata.normalize("NFD", prompt) for prompt in prompts[:3]] + ["Où est le thé?"]
    assert (
        shared_sources(train, load_groups([flat("ko", source_prompt=prompt) for prompt in other]).groups) == 3
    )
