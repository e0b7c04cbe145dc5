"""The whole analysis of a layer on planted cases: it finds what was changed, where it was changed, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from mpo.errors import ConfigError, DataError
from mpo.hidden_space.compare import LanguageTexts, LayerResult, Settings, measure_layer
from mpo.hidden_space.resampling import Estimate
from tests.hidden_space.clouds import labels, rotation

LANGUAGES = ("en", "de", "hi", "zh")
PER_CLASS, DIMENSIONS = 150, 24
HARM = np.eye(DIMENSIONS)[5]
FAST = Settings(confidence=0.99, resamples=300, permutations=300)


def planted(
    seed: int, moved: str | None = "hi", distance: float = 3.0, harm: dict[str, float] | None = None
) -> dict[tuple[str, str], np.ndarray]:
    """
    Embeddings of two models. Before, harm has the same direction in all languages. The second model differs by noise, a
    shift and another scale, and in one language it moves harmful texts along another direction.
    """
    rng = np.random.default_rng(seed)
    harmful = labels(PER_CLASS, PER_CLASS)
    clouds = {}
    for language in LANGUAGES:
        before = rng.standard_normal((2 * PER_CLASS, DIMENSIONS)) * np.linspace(1.5, 0.5, DIMENSIONS)
        before += 3 * rng.standard_normal(DIMENSIONS)
        before[harmful] += (harm or {}).get(language, 1.0) * HARM
        after = before + 0.2 * rng.standard_normal(before.shape)
        before += 0.2 * rng.standard_normal(
            before.shape
        )  # as much noise as after, so that nothing else differs
        if language == moved:
            after[harmful] += distance * np.eye(DIMENSIONS)[7]
        clouds["before", language] = before
        clouds["after", language] = 1.7 * after + 5
    return clouds


def measure(clouds: dict[tuple[str, str], np.ndarray], settings: Settings = FAST) -> LayerResult:
    texts = {
        code: LanguageTexts(labels(PER_CLASS, PER_CLASS), np.arange(2 * PER_CLASS)) for code in LANGUAGES
    }
    return measure_layer(texts, lambda state, language: clouds[state, language], settings)


@pytest.fixture(scope="module")
def planted_result() -> LayerResult:
    return measure(planted(0))


def rises(change: Estimate) -> bool:
    return change.low is not None and change.low > 0


SEPARATION = (
    "between_class_ratio",
    "between_class_ratio_2_shared",
    "between_class_ratio_10_shared",
    "between_class_ratio_10",
    "fisher_ratio_10_shared",
    "bhattacharyya_10_shared",
    "silhouette",
    "silhouette_10",
    "probe_auroc",
)


@pytest.mark.parametrize("name", SEPARATION)
def test_the_language_that_was_moved_is_found(planted_result: LayerResult, name: str) -> None:
    change = planted_result.languages["hi"].change[name]
    assert rises(change)
    assert change.p_value is None or change.p_value < 0.01
    assert change.value > 0.05


@pytest.mark.parametrize("name", SEPARATION)
def test_what_is_found_there_is_far_above_what_is_found_elsewhere(
    planted_result: LayerResult, name: str
) -> None:
    elsewhere = [abs(planted_result.languages[code].change[name].value) for code in ("en", "de", "zh")]
    assert planted_result.languages["hi"].change[name].value > 5 * max(elsewhere)


def test_nothing_is_found_in_the_others(planted_result: LayerResult) -> None:
    changes = [
        change
        for code in ("en", "de", "zh")
        for name, change in planted_result.languages[code].change.items()
        if not name.startswith("between_class_variance")  # grows with the scale, which is another
    ]
    outside = sum(not (c.low is not None and c.high is not None and c.low <= 0 <= c.high) for c in changes)
    surprising = sum(c.p_value is not None and c.p_value <= 0.01 for c in changes)
    assert len(changes) > 50
    # At 99 %, one in a hundred is expected; measures of one language are related, so they come in clusters.
    assert outside <= 3 and surprising <= 3


def test_the_new_direction_is_that_languages_own(planted_result: LayerResult) -> None:
    """What was added in Hindi is not English harm: its direction turns away, and English's probe gains little."""
    hindi = planted_result.languages["hi"]
    turn = hindi.change["source_cosine"]
    assert turn.value < -0.2 and not rises(turn)
    assert hindi.between["direction_cosine"].value < 0.6
    assert hindi.change["transfer_auroc"].value < hindi.change["probe_auroc"].value - 0.1
    for language in ("de", "zh"):
        assert planted_result.languages[language].between["direction_cosine"].value > 0.95
        kept = planted_result.languages[language].change["source_cosine"]
        assert kept.low is not None and kept.high is not None and kept.low <= 0 <= kept.high
    after = planted_result.cosine_matrix("after")
    others = [LANGUAGES.index(code) for code in ("en", "de", "zh")]
    assert after[np.ix_(others, others)].min() > 0.5 > after[others, LANGUAGES.index("hi")].max()


def test_only_the_moved_texts_count_as_moved_more(planted_result: LayerResult) -> None:
    hindi, german = (planted_result.languages[code].between for code in ("hi", "de"))
    assert hindi["harmful_drift"].value > hindi["harmless_drift"].value + 0.2
    assert german["harmful_drift"].value == pytest.approx(german["harmless_drift"].value, rel=0.2)
    assert hindi["cka"].value < german["cka"].value


def test_where_texts_go_is_told_from_how_far() -> None:
    """Harmless Hindi texts go half the way to the harmful ones, harmful German ones a quarter of it to English; all else is held."""
    clouds = planted(1, moved=None)
    harmful = labels(PER_CLASS, PER_CLASS)
    for code in LANGUAGES:
        clouds["after", code] = clouds["before", code].copy()
    means = {
        code: [clouds["before", code][rows].mean(axis=0) for rows in (~harmful, harmful, ...)]
        for code in LANGUAGES
    }
    harm, to_english = means["hi"][1] - means["hi"][0], means["en"][2] - means["de"][2]
    clouds["after", "hi"][~harmful] += 0.5 * harm
    clouds["after", "de"][harmful] += 0.25 * to_english
    found = measure(clouds)
    hindi, german, english = (found.languages[code].between for code in ("hi", "de", "en"))
    assert hindi["harmless_to_harmful"].value == pytest.approx(0.5, abs=1e-4)
    assert hindi["harmful_to_harmful"].value == pytest.approx(0, abs=1e-4)
    aside = means["en"][2] - means["hi"][2]
    assert hindi["harmless_to_source"].value == pytest.approx(0.5 * harm @ aside / (aside @ aside), abs=1e-4)
    assert german["harmful_to_source"].value == pytest.approx(0.25, abs=1e-4)
    assert german["harmless_to_source"].value == pytest.approx(0, abs=1e-4)
    assert english["harmless_to_harmful"].value == 0 and "harmless_to_source" not in english
    low, high = hindi["harmless_to_harmful"].low, hindi["harmless_to_harmful"].high
    assert low is not None and high is not None and 0.3 < low < 0.5 < high < 0.9


def test_intervals_hold_their_estimates(planted_result: LayerResult) -> None:
    for result in planted_result.languages.values():
        for group in (result.before, result.after, result.change, result.between):
            for name, one in group.items():
                assert one.low is not None and one.high is not None, name
                assert one.low <= one.value <= one.high, name


def test_the_interval_of_a_change_is_paired(planted_result: LayerResult) -> None:
    """The two models read the same texts: what a sample of them does to both cancels in the change."""

    def width(one: Estimate) -> float:
        assert one.low is not None and one.high is not None
        return one.high - one.low

    for code in ("en", "de", "zh"):
        result = planted_result.languages[code]
        for name in ("between_class_ratio", "between_class_ratio_10_shared", "silhouette"):
            unpaired = np.hypot(width(result.before[name]), width(result.after[name]))
            assert width(result.change[name]) < 0.6 * unpaired, (code, name)


def test_without_any_change_a_tenth_of_the_p_values_is_below_a_tenth() -> None:
    """Two models that differ by noise, a shift, a scale and nothing else: the tests must not cry wolf."""
    settings = Settings(resamples=100, permutations=99)
    names = (
        "between_class_ratio",
        "between_class_ratio_2_shared",
        "bhattacharyya_2_shared",
        "fisher_ratio_10_shared",
        "probe_auroc",
    )
    rng = np.random.default_rng(0)
    harmful = labels(60, 60)
    texts = {"en": LanguageTexts(harmful, np.arange(120))}
    p_values: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(40):
        base = rng.standard_normal((120, 12)) + harmful[:, None] * HARM[:12]
        clouds = {
            state: scale * (base + 0.5 * rng.standard_normal(base.shape)) + shift
            for state, scale, shift in (("before", 1.0, 0.0), ("after", 3.0, 7.0))
        }
        change = measure_layer(texts, lambda state, _: clouds[state], settings).languages["en"].change  # noqa: B023
        for name in names:
            p_value = change[name].p_value
            assert p_value is not None
            p_values[name].append(p_value)
    for name, values in p_values.items():
        assert np.mean(np.asarray(values) <= 0.1) <= 0.25, (
            name
        )  # 40 draws of a tenth: 0.25 is 3 standard errors up
        assert 0.35 < np.mean(values) < 0.65, name


def test_a_rotation_and_a_scale_of_both_models_change_no_separation() -> None:
    clouds = planted(3)
    turn = rotation(np.random.default_rng(0), DIMENSIONS)
    turned = {key: 12.5 * cloud @ turn for key, cloud in clouds.items()}
    first, second = (measure(some, Settings(resamples=100, permutations=0)) for some in (clouds, turned))
    for language in LANGUAGES:
        one, other = first.languages[language], second.languages[language]
        for name in one.after:
            if "auroc" not in name and "variance" not in name:
                assert other.after[name].value == pytest.approx(one.after[name].value, rel=2e-3, abs=2e-4), (
                    name
                )
        for name in one.between:
            assert other.between[name].value == pytest.approx(one.between[name].value, rel=1e-3), name


def test_a_model_alone_is_measured_without_changes() -> None:
    texts = {"en": LanguageTexts(labels(60, 60), np.arange(120))}
    cloud = planted(0)["after", "en"][90:210]
    result = measure_layer(texts, lambda *_: cloud, Settings(resamples=100), states=("after",)).languages[
        "en"
    ]
    assert not result.before and not result.change and not result.between
    assert "between_class_ratio_2" in result.after


def test_pairs_are_measured_where_there_are_pairs() -> None:
    rng = np.random.default_rng(0)
    harmless = rng.standard_normal((80, 10))
    clouds = {
        "before": np.concatenate([harmless, harmless + 0.1 * rng.standard_normal((80, 10))]),
        "after": np.concatenate([harmless, harmless + 2 * HARM[:10]]),
    }
    texts = {"en": LanguageTexts(~labels(80, 80), np.tile(np.arange(80), 2))}
    settings = Settings(resamples=100, permutations=99)
    found = measure_layer(texts, lambda state, _: clouds[state], settings).languages["en"]
    assert rises(found.change["pair_consistency"]) and rises(found.change["pair_distance_ratio"])
    assert found.after["pair_consistency"].value == pytest.approx(1)
    assert found.before["pair_distance_ratio"].p_value == 0.01


def test_no_probe_is_tested_on_a_duplicate_of_a_text_that_it_was_trained_on() -> None:
    """Labels without any meaning, on texts that all occur five times: only a probe that has seen them knows them."""
    rng = np.random.default_rng(0)
    harmful = np.tile(labels(30, 30), 5)
    points = np.tile(rng.standard_normal((60, 200)), (5, 1))
    kin, unit = np.tile(np.arange(60), 5), np.arange(300)
    settings = Settings(resamples=100, permutations=0)
    found = {
        name: measure_layer({"en": texts}, lambda *_: points, settings, states=("after",))
        .languages["en"]
        .after["probe_auroc"]
        .value
        for name, texts in (
            ("parted", LanguageTexts(harmful, unit)),
            ("together", LanguageTexts(harmful, unit, kin)),
        )
    }
    assert found["parted"] > 0.95
    assert 0.3 < found["together"] < 0.7
    with pytest.raises(DataError, match="5 harmful texts that differ"):
        alike = LanguageTexts(harmful, unit, np.where(harmful, kin % 5, kin))
        measure_layer({"en": alike}, lambda *_: points, settings, states=("after",))


def test_models_of_different_width_are_compared_where_that_means_something() -> None:
    clouds = planted(1)
    narrow = {key: cloud[:, :10] if key[0] == "before" else cloud for key, cloud in clouds.items()}
    found = measure(narrow, Settings(resamples=100, permutations=0)).languages["de"]
    assert set(found.between) == {"cka"}
    assert "between_class_ratio_2" in found.change and "between_class_ratio_2_shared" not in found.change


def test_unusable_texts_and_embeddings_are_refused() -> None:
    texts = {"de": LanguageTexts(labels(20, 20), np.arange(40))}
    with pytest.raises(DataError, match="source language 'en'"):
        measure_layer(texts, lambda *_: np.zeros((40, 3)), FAST)
    with pytest.raises(DataError, match="9 harmful texts"):
        measure_layer({"en": LanguageTexts(labels(9, 20), np.arange(29))}, lambda *_: np.zeros((29, 3)), FAST)
    english = {"en": texts["de"]}
    with pytest.raises(DataError, match="shape"):
        measure_layer(english, lambda *_: np.zeros((39, 3)), FAST)
    with pytest.raises(DataError, match="not finite"):
        measure_layer(english, lambda *_: np.full((40, 3), np.inf), FAST)
    for wrong in ({"components": ()}, {"components": (0,)}, {"folds": 1}, {"seed": -1}):
        with pytest.raises(ConfigError):
            Settings(**wrong)  # type: ignore[arg-type]
