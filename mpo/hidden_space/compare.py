"""All measures of one layer, per language, before and after alignment, with intervals and tests."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from mpo.common.typed_json import Count
from mpo.errors import ConfigError, DataError
from mpo.hidden_space.pairs import pair_measures, pair_rows, pairing_test
from mpo.hidden_space.probe import Probe, fold_auroc, fold_ranks, folds_of, train_probe, with_training_error
from mpo.hidden_space.projection import centred, principal_plane, shared_plane, spread
from mpo.hidden_space.resampling import (
    Array,
    Estimate,
    Stored,
    bootstrap_weights,
    check_resampling,
    estimate,
    permutation_p,
    swap_masks,
)
from mpo.hidden_space.separation import (
    FullMoments,
    Moments,
    between_class_ratio,
    between_class_variance,
    bhattacharyya,
    class_moments,
    fisher_ratio,
    full_moments,
)
from mpo.hidden_space.silhouette import silhouette
from mpo.hidden_space.similarity import cosine, drift, linear_cka, mean_points, shift_along

BEFORE, AFTER = "before", "after"

_ON_MOMENTS: dict[str, Callable[[Moments], Array]] = {
    "between_class_ratio": between_class_ratio,
    "fisher_ratio": fisher_ratio,
    "bhattacharyya": bhattacharyya,
}


_LIMITS = {
    "explained_variance": (0.0, 1.0),
    "between_class_ratio": (0.0, 1.0),
    "between_class_variance": (0.0, math.inf),
    "fisher_ratio": (0.0, math.inf),
    "bhattacharyya": (0.0, math.inf),
    "silhouette": (-1.0, 1.0),
    "probe_auroc": (0.0, 1.0),
    "transfer_auroc": (0.0, 1.0),
    "pair_distance_ratio": (0.0, math.inf),
    "pair_nearest": (0.0, 1.0),
    "pair_consistency": (-1.0, 1.0),
    "cosine": (-1.0, 1.0),
    "source_cosine": (-1.0, 1.0),
    "direction_cosine": (-1.0, 1.0),
    "cka": (-math.inf, 1.0),
    "harmless_drift": (0.0, math.inf),
    "harmful_drift": (0.0, math.inf),
    "harmless_to_harmful": (-math.inf, math.inf),
    "harmful_to_harmful": (-math.inf, math.inf),
    "harmless_to_source": (-math.inf, math.inf),
    "harmful_to_source": (-math.inf, math.inf),
}


def limits(measure: str) -> tuple[float, float]:
    """Smallest and largest value of a measure, whatever its number of components."""
    return _LIMITS[measure_family(measure)]


def measure_family(measure: str) -> str:
    """Name of a measure without its components: ``between_class_ratio`` of ``between_class_ratio_10_shared``."""
    return re.sub(r"(_\d+)?(_shared)?$", "", measure)


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        source_language: Language whose probe and harm direction the others are compared with.
        components: Numbers of principal components, as in the paper.
        confidence: Coverage of the intervals.
        resamples: Number of bootstrap samples for the intervals.
        permutations: Of the tests for a change; 0 leaves them out.
        folds: Of the probes' cross-validation.
        seed: Of draws, permutations and folds.
    """

    source_language: str = "en"
    components: tuple[int, ...] = (2, 10)
    confidence: float = 0.95
    resamples: int = 1000
    permutations: int = 1000
    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_resampling(self.confidence, self.resamples, self.permutations)
        if not self.components or min(self.components) < 1:
            raise ConfigError(
                f"`components` is {list(self.components)}; expected numbers from 1, such as [2, 10]."
            )
        if self.folds < 2:
            raise ConfigError(f"`folds` is {self.folds}; expected at least 2.")
        if self.seed < 0:
            raise ConfigError(f"`seed` is {self.seed}; expected a whole number from 0.")


@dataclass(frozen=True)
class LanguageTexts:
    """What is known of the texts of one language.

    Attributes:
        harmful: ``[n]`` booleans.
        unit: ``[n]`` which texts belong together: the two of a pair, or, in languages that are translations of one
            another, the same text in each.
        kin: ``[n]`` which texts no fold of a probe may part: those of a unit, and those with the same words. Unset: the
            units.
    """

    harmful: Array
    unit: Array
    kin: Array | None = None

    def folds(self, settings: Settings) -> Array:
        """``[n]`` the fold that each text is held out in."""
        return folds_of(
            self.unit if self.kin is None else self.kin, self.harmful, settings.folds, settings.seed
        )


@dataclass
class LanguageResult:
    """Estimates of one language in one layer.

    Attributes:
        count: Number of harmful and of harmless texts.
        before, after: Estimates by measure; ``before`` is empty where there is no model to compare with.
        change: After minus before, for the measures that have both.
        between: Measures of the two models' embeddings of the same text.
    """

    count: dict[str, Count]
    before: dict[str, Stored] = field(default_factory=dict)
    after: dict[str, Stored] = field(default_factory=dict)
    change: dict[str, Stored] = field(default_factory=dict)
    between: dict[str, Stored] = field(default_factory=dict)

    def state(self, name: str) -> dict[str, Estimate]:
        """``before`` or ``after``."""
        return self.before if name == BEFORE else self.after


@dataclass
class LayerResult:
    """Estimates of one layer.

    Attributes:
        languages: By language code.
        cosines: ``{"before": {"de": {"fr": estimate}}}``: cosine between two languages' harm directions, each pair once.
    """

    languages: dict[str, LanguageResult] = field(default_factory=dict)
    cosines: dict[str, dict[str, dict[str, Stored]]] = field(default_factory=dict)

    def cosine_matrix(self, state: str) -> Array:
        """``[languages, languages]`` cosines of the harm directions before or after."""
        codes = list(self.languages)
        matrix = np.eye(len(codes))
        for i, first in enumerate(codes):
            for j, second in enumerate(codes[:i]):
                matrix[i, j] = matrix[j, i] = self.cosines[state][second][first].value
        return matrix


@dataclass
class _State:
    """Replicates of one language's embeddings by one model."""

    points: Array
    replicates: dict[str, Array] = field(default_factory=dict)
    scores: dict[str, Array] = field(default_factory=dict)
    pairing_p: float | None = None
    probe: Probe | None = None
    full: FullMoments | None = None


def measure_layer(
    texts: Mapping[str, LanguageTexts],
    load: Callable[[str, str], Array],
    settings: Settings,
    *,
    states: tuple[str, ...] = (BEFORE, AFTER),
) -> LayerResult:
    """Measure every language in one layer. At most two languages' embeddings are in memory at a time.

    Args:
        texts: By language code, in the order of the tables.
        load: Gives the ``[n, d]`` embeddings of ``(state, language)``, row by row those of ``texts[language]``.
        settings: How to measure.
        states: ``("before", "after")``, or ``("after",)`` for a model alone.

    Raises:
        DataError: The source language is not among the texts, or a language lacks a class.
    """
    check_texts(texts, settings)
    source = settings.source_language
    result = LayerResult()
    probes: dict[str, Probe] = {}
    directions: dict[str, dict[str, Array]] = {state: {} for state in states}
    source_mean: Array | None = None
    for language in (source, *(code for code in texts if code != source)):
        raw = {state: np.asarray(load(state, language), dtype=np.float32) for state in states}
        for state in states:
            _check_cloud(raw[state], texts[language], state, language)
        weights = bootstrap_weights(
            texts[language].unit, texts[language].harmful, settings.resamples, settings.seed
        )
        measured = {
            state: _measure_state(raw[state], texts[language], weights, settings, probes.get(state))
            for state in states
        }
        for state, found in measured.items():
            assert found.full is not None and found.probe is not None
            probes.setdefault(state, found.probe)  # the source language comes first
            directions[state][language] = found.full.difference
            if language != source:
                found.replicates["source_cosine"] = cosine(found.full.difference, directions[state][source])
        result.languages[language] = _summarize(
            measured, raw, texts[language], weights, settings, source_mean
        )
        if source_mean is None:
            source_mean = mean_points(raw[states[0]], weights)
    result.languages = {code: result.languages[code] for code in texts}
    result.cosines = {state: _cosines(directions[state], list(texts), settings) for state in states}
    return result


def check_texts(texts: Mapping[str, LanguageTexts], settings: Settings) -> None:
    """Refuse texts that cannot be measured, before anything is embedded.

    Raises:
        DataError: The source language is missing, or a language has too few texts of a class for the probe's folds.
    """
    if settings.source_language not in texts:
        raise DataError(
            f"There are no texts in the source language {settings.source_language!r}, only in {', '.join(texts)}. Add it "
            "to `languages`, or set `source_language` to one of them."
        )
    for language, some in texts.items():
        kin = some.unit if some.kin is None else some.kin
        for name, rows in (("harmful", some.harmful), ("harmless", ~some.harmful)):
            count = len(np.unique(kin[rows]))
            if count < 2 * settings.folds:
                raise DataError(
                    f"{language} has {count} {name} texts that differ; expected at least {2 * settings.folds}, two for each of the "
                    f"{settings.folds} folds of the probe. Check the labels and their columns."
                )


def _check_cloud(cloud: Array, texts: LanguageTexts, state: str, language: str) -> None:
    if cloud.ndim != 2 or len(cloud) != len(texts.harmful):
        raise DataError(
            f"The embeddings of {language} {state} have the shape {cloud.shape}; expected one row for each of the "
            f"{len(texts.harmful)} texts."
        )
    if not np.isfinite(cloud).all():
        raise DataError(
            f"The embeddings of {language} {state} hold values that are not finite. Embed again in float32 or bfloat16."
        )


def _measure_state(
    raw: Array, texts: LanguageTexts, weights: Array, settings: Settings, source_probe: Probe | None
) -> _State:
    harmful = texts.harmful
    state = _State(centred(raw))
    out = state.replicates
    plane = principal_plane(state.points, max(settings.components))
    coordinates = plane.project(state.points)
    state.full = full_moments(state.points, harmful, weights)
    for k in settings.components:
        moments = class_moments(coordinates[:, :k], harmful, weights)
        with np.errstate(invalid="ignore", divide="ignore"):  # all points the same
            out[f"explained_variance_{k}"] = moments.total / state.full.total
        out[f"between_class_variance_{k}"] = between_class_variance(moments)
        out.update(_on_components(moments, f"_{k}"))
        out[f"silhouette_{k}"] = silhouette(coordinates[:, :k], harmful, weights)
    out["between_class_ratio"] = state.full.ratio
    out["silhouette"] = silhouette(state.points, harmful, weights)
    fold = texts.folds(settings)
    state.probe = train_probe(state.points, harmful, fold)
    for name, probe in (("probe_auroc", state.probe), ("transfer_auroc", source_probe)):
        if probe is not None:
            state.scores[name] = probe.scores(state.points, fold)
            values = fold_auroc(state.scores[name], harmful, fold, weights)
            out[name] = with_training_error(values, settings.folds)
    bad, good = pair_rows(texts.unit, harmful)
    if len(bad) >= 2:
        pairs = state.points[bad], state.points[good]
        out.update(pair_measures(*pairs, weights[:, bad]))
        state.pairing_p = pairing_test(*pairs, settings.permutations, settings.seed)
    return state


def _on_components(moments: Moments, suffix: str) -> dict[str, Array]:
    return {f"{name}{suffix}": measure(moments) for name, measure in _ON_MOMENTS.items()}


def _summarize(
    measured: Mapping[str, _State],
    raw: Mapping[str, Array],
    texts: LanguageTexts,
    weights: Array,
    settings: Settings,
    source_mean: Array | None,
) -> LanguageResult:
    result = LanguageResult({"harmful": int(texts.harmful.sum()), "harmless": int((~texts.harmful).sum())})
    shared: dict[str, dict[str, Array]] = {state: {} for state in measured}
    tests: dict[str, float | None] = {}
    if len(measured) == 2:
        masks = swap_masks(texts.unit, settings.permutations, settings.seed)
        tests = _score_tests(measured, texts, masks, settings)
        if raw[BEFORE].shape == raw[AFTER].shape:
            shared, more = _in_shared_space(measured, texts, weights, masks, settings)
            tests.update(more)
        result.between = _between(measured, raw, texts, weights, settings, source_mean)
    for name, state in measured.items():
        for measure, values in {**state.replicates, **shared[name]}.items():
            p_value = state.pairing_p if measure == "pair_distance_ratio" else None
            result.state(name)[measure] = estimate(
                values, settings.confidence, p_value, limits=limits(measure)
            )
    if len(measured) == 2:
        both = {state: {**measured[state].replicates, **shared[state]} for state in measured}
        result.change = {
            measure: estimate(both[AFTER][measure] - values, settings.confidence, tests.get(measure))
            for measure, values in both[BEFORE].items()
            if measure in both[AFTER]
        }
    return result


def _score_tests(
    measured: Mapping[str, _State], texts: LanguageTexts, masks: Array, settings: Settings
) -> dict[str, float | None]:
    """Permutation tests of the probes: the ranks that the two models give a text are exchanged (Bandos, Rockette and
    Gur, 2005, *Statistics in Medicine* 24(18))."""
    fold = texts.folds(settings)
    out: dict[str, float | None] = {}
    for name in measured[BEFORE].scores:
        ranks = np.concatenate([fold_ranks(measured[state].scores[name], fold) for state in (BEFORE, AFTER)])
        twice = np.tile(texts.harmful, 2), np.tile(fold, 2)
        after, before = (fold_auroc(ranks, *twice, weights) for weights in _set_weights(masks))
        changes = after - before
        # Exchanging scores leaves the probes as they are; under the hypothesis the mean change is 0.
        changes[1:] = with_training_error(np.concatenate([[0.0], changes[1:]]), settings.folds)[1:]
        out[name] = permutation_p(changes)
    return out


def _set_weights(masks: Array) -> tuple[Array, Array]:
    """Weights ``[1 + P, 2n]`` on the embeddings before and after, one below the other, that pick the set "after" and the
    set "before" of every permutation."""
    swapped = masks.astype(np.float32)
    return np.concatenate([swapped, 1 - swapped], axis=1), np.concatenate([1 - swapped, swapped], axis=1)


def _in_shared_space(
    measured: Mapping[str, _State], texts: LanguageTexts, weights: Array, masks: Array, settings: Settings
) -> tuple[dict[str, dict[str, Array]], dict[str, float | None]]:
    """The measures in the principal components that both models share, and the permutation tests for a change.

    A text's two embeddings, each centred and brought to the same spread, are exchanged at random; what is tested is
    therefore whether it matters which model a text was embedded by, beyond a common shift and scale.
    """
    harmful = texts.harmful
    scaled = {state: m.points / np.float32(spread(m.points) or 1.0) for state, m in measured.items()}
    plane = shared_plane(measured[BEFORE].points, measured[AFTER].points, max(settings.components))
    coordinates = {state: plane.project(cloud) for state, cloud in scaled.items()}
    stacked = np.concatenate([coordinates[BEFORE], coordinates[AFTER]])
    sets, twice = _set_weights(masks), np.tile(harmful, 2)
    values: dict[str, dict[str, Array]] = {BEFORE: {}, AFTER: {}}
    tests: dict[str, float | None] = {}
    for k in settings.components:
        for state in (BEFORE, AFTER):
            moments = class_moments(coordinates[state][:, :k], harmful, weights)
            values[state].update(_on_components(moments, f"_{k}_shared"))
        after, before = (
            _on_components(class_moments(stacked[:, :k], twice, some), f"_{k}_shared") for some in sets
        )
        tests.update({name: permutation_p(after[name] - before[name]) for name in after})
    everything = np.concatenate([scaled[BEFORE], scaled[AFTER]])
    after_ratio, before_ratio = (full_moments(everything, twice, some).ratio for some in sets)
    tests["between_class_ratio"] = permutation_p(after_ratio - before_ratio)
    return values, tests


def _between(
    measured: Mapping[str, _State],
    raw: Mapping[str, Array],
    texts: LanguageTexts,
    weights: Array,
    settings: Settings,
    source_mean: Array | None,
) -> dict[str, Estimate]:
    """Measures of the two models' embeddings of the same texts.

    The ways on which a class's mean may go are two, both before: from the mean of the language's harmless to that of its harmful
    texts, and from the mean of all its texts to that of the source language's, which is None in the source language.
    """
    values = {"cka": linear_cka(measured[BEFORE].points, measured[AFTER].points, weights)}
    if raw[BEFORE].shape == raw[AFTER].shape:
        old, new = measured[BEFORE].full, measured[AFTER].full
        assert old is not None and new is not None
        values["direction_cosine"] = cosine(old.difference, new.difference)
        scale = np.sqrt(np.maximum(old.total, 0))
        ways = {"to_harmful": old.difference}
        if source_mean is not None and source_mean.shape[1] == raw[BEFORE].shape[1]:
            ways["to_source"] = source_mean - mean_points(raw[BEFORE], weights)
        for name, rows in (("harmless", ~texts.harmful), ("harmful", texts.harmful)):
            before, after, own = raw[BEFORE][rows], raw[AFTER][rows], weights[:, rows]
            values[f"{name}_drift"] = drift(before, after, scale, own)
            shift = mean_points(after - before, own)
            values.update({f"{name}_{where}": shift_along(shift, way) for where, way in ways.items()})
    return {name: estimate(some, settings.confidence, limits=limits(name)) for name, some in values.items()}


def _cosines(
    directions: Mapping[str, Array], languages: list[str], settings: Settings
) -> dict[str, dict[str, Estimate]]:
    return {
        first: {
            second: estimate(
                cosine(directions[first], directions[second]), settings.confidence, limits=limits("cosine")
            )
            for second in languages[place + 1 :]
        }
        for place, first in enumerate(languages[:-1])
    }
