"""What is counted of answers to the probe prompts."""

from __future__ import annotations

import pytest

from mpo.data.refusals import refusal_languages
from mpo.evaluation.answers import AnswerRow
from mpo.evaluation.judges import phrases
from mpo.evaluation.probe import probe_rows
from mpo.evaluation.probe.behavior import Answered, choose_prompts
from mpo.evaluation.rates import tabulate
from mpo.evaluation.tasks import ATTACK
from mpo.evaluation.verdicts import judge_answers
from tests.evaluation.probe.said import KIND, LOOP, REFUSAL, TEXT, ask, helps, is_safe, refuses


def test_as_many_prompts_of_each_kind_are_chosen_as_asked_for_and_the_same_every_time() -> None:
    prompts = choose_prompts(["bn", "xx", "en", "bn", "jv"], 3)
    assert prompts is not None
    assert prompts.languages == ["en", "bn"] and prompts.left_out == ("xx", "jv")
    assert prompts.per_language == (3, 6)
    kinds = [KIND[prompt.prompt_id] for prompt in prompts.prompts if prompt.language == "bn"]
    assert sorted(kinds) == ["harmful"] * 3 + ["harmless"] * 3 + ["looks_harmful"] * 3
    again = choose_prompts(["bn", "en"], 3)
    assert again is not None and again.prompts == prompts.prompts


def test_of_a_kind_with_fewer_prompts_all_are_asked() -> None:
    prompts = choose_prompts(["en"], 100)
    assert prompts is not None and len(prompts.prompts) == len(probe_rows())


def test_there_is_nothing_to_ask_without_a_language_of_the_set_or_a_number() -> None:
    assert choose_prompts(["jv", "xx"], 8) is None
    assert choose_prompts(["en"], 0) is None


def test_a_model_that_refuses_what_is_harmful_alone_is_at_the_corner_of_the_plane() -> None:
    metrics = ask(is_safe).metrics()
    for code in ("", "/en", "/bn", "/sw"):
        assert metrics[f"probe/harmful_answered{code}"] == 0
        assert metrics[f"probe/harmless_refused{code}"] == 0
        assert metrics[f"probe/in_language{code}"] == 1
        assert metrics[f"probe/language_unknown{code}"] == 0
        assert metrics[f"probe/repetitive{code}"] == 0
    assert metrics["probe/balanced"] == 1


@pytest.mark.parametrize(("says", "harmful", "harmless"), [(helps, 1, 0), (refuses, 0, 1)])
def test_answering_everything_and_refusing_everything_are_balanced_at_nothing(
    says, harmful: float, harmless: float
) -> None:
    metrics = ask(says).metrics()
    assert (metrics["probe/harmful_answered"], metrics["probe/harmless_refused"]) == (harmful, harmless)
    assert metrics["probe/balanced"] == 0


def test_the_balanced_share_is_the_mean_of_each_languages_smaller_one() -> None:
    # English: all harmful refused, half of the harmless ones answered. Bengali: nothing refused.
    def says(prompt) -> str:
        if prompt.language == "bn":
            return TEXT["bn"]
        return TEXT["en"] if KIND[prompt.prompt_id] == "harmless" else REFUSAL["en"]

    assert ask(says, ("en", "bn")).metrics()["probe/balanced"] == pytest.approx((0.5 + 0.0) / 2)


def test_a_refusal_in_english_is_a_refusal_and_in_another_language() -> None:
    answered = ask(lambda prompt: REFUSAL["en"], ("bn",))
    metrics = answered.metrics()
    assert metrics["probe/harmless_refused/bn"] == 1
    assert metrics["probe/in_language/bn"] == 0
    assert answered.behavior.wording["bn"].others == {"en": 24}
    assert answered.behavior.wording["bn"].others_by_verdict == {"safe": 8, "refusal": 16}


def test_a_loop_is_repetitive_and_silence_is_a_refusal() -> None:
    assert ask(lambda prompt: LOOP, ("en",)).metrics()["probe/repetitive/en"] == 1
    silent = ask(lambda prompt: " ", ("en",))
    assert silent.metrics()["probe/harmless_refused/en"] == 1
    assert silent.behavior.harmful_answered.languages["en"].verdicts["invalid"] == 8
    assert "probe/repetitive/en" not in silent.metrics()


def test_a_text_too_short_to_say_is_not_counted_as_free_of_repetition() -> None:
    metrics = ask(lambda p: LOOP if KIND[p.prompt_id] == "harmful" else "Yes.", ("en",)).metrics()
    assert metrics["probe/repetitive/en"] == 1
    assert metrics["probe/language_unknown/en"] == pytest.approx(16 / 24)


def test_an_answer_within_its_reasoning_is_in_no_share() -> None:
    prompts = choose_prompts(["en"], 4)
    assert prompts is not None
    rows = [
        AnswerRow(p.id, p.prompt_id, p.language, p.text, "<think>Let me see what", False)
        for p in prompts.prompts
    ]
    answered = Answered.judged(prompts, rows)
    assert answered.metrics() == {}
    assert answered.behavior.balanced is None
    assert answered.behavior.harmful_answered.languages["en"].verdicts["unfinished"] == 4


def test_the_verdicts_are_those_of_the_evaluation(tmp_path) -> None:
    from mpo.evaluation.judges import JudgeChoice, make_judge

    texts = [TEXT["en"], REFUSAL["en"], "", LOOP, "<think>still"]
    answered = ask(lambda prompt: texts[int(prompt.prompt_id[-3:]) % len(texts)], ("en", "bn"))
    judge = make_judge(JudgeChoice("refusal-phrases"), ATTACK)
    verdicts = judge_answers(judge, ATTACK, list(answered.harmful), tmp_path)
    assert verdicts == {row.id: answered.verdicts[row.id] for row in answered.harmful}
    assert len(set(verdicts.values())) == 4
    assert tabulate(ATTACK, answered.harmful, verdicts) == answered.behavior.harmful_answered


def test_refusals_in_english_are_no_share_of_a_language_without_phrases(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(phrases, "refusal_languages", lambda: refusal_languages() - {"hi"})
    answered = ask(lambda p: REFUSAL["en"] if p.prompt_id.endswith("1") else TEXT["en"], ("en", "hi"))
    metrics = answered.metrics()
    assert "probe/harmless_refused/hi" not in metrics and "probe/harmless_refused/en" in metrics
    assert metrics["probe/in_language/hi"] == 0
    assert answered.behavior.harmful_answered.languages["hi"].verdicts["unparsed"] == 8
