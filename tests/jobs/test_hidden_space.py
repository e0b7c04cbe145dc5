"""From a recipe to a folder of results: with tiny models, through the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from mpo.cli.analyze import _fields
from mpo.cli.app import _parser, main
from mpo.common.typed_json import as_dict
from mpo.errors import ConfigError, StorageError
from mpo.hidden_space import pictures
from mpo.hidden_space.compare import LanguageTexts, Settings
from mpo.hidden_space.pictures import draw_all
from mpo.hidden_space.recipe import AnalysisRecipe, load_analysis_recipe
from mpo.hidden_space.results import HiddenSpace
from mpo.hidden_space.settings import EmbeddingSettings, ReadingSettings
from mpo.hidden_space.store import EmbeddingStore
from mpo.hidden_space.texts import TextSource
from mpo.jobs import hidden_space as module
from mpo.report.hidden_space import hidden_space_section
from tests.hidden_space.clouds import labels
from tests.tiny import build_model, random_text, save_tiny

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "hidden_space").glob("*.yaml"))


def make_place(folder: Path) -> Path:
    """A folder with a tiny model, an adapter, texts in two languages and a recipe."""
    save_tiny("llama", folder / "model")
    torch.manual_seed(0)
    peft = get_peft_model(build_model("llama"), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peft.save_pretrained(folder / "adapter")
    rng = random.Random(0)
    for code in ("en", "ar"):
        rows = [{"text": random_text(rng, code, rng.randint(2, 9)), "toxic": i % 2} for i in range(60)]
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / f"texts_{code}.jsonl").write_text(lines, encoding="utf-8")
    recipe = {
        "models": [
            {"name": "tiny", "reference": str(folder / "model"), "adapter": str(folder / "adapter")},
            {"name": "alone", "aligned": str(folder / "model")},
        ],
        "data": {"dataset": "texts_{language}.jsonl", "folder": str(folder), "label": "toxic"},
        "languages": ["en", "ar"],
        "layers": "all",
        "resamples": 100,
        "permutations": 50,
        "device": "cpu",
        "out": str(folder / "out"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("analysis"))


@pytest.fixture(scope="module")
def analysed(place: Path) -> Path:
    assert main(["analyze", "hidden-space", str(place / "recipe.yaml")]) == 0
    return place / "out" / "hidden_space"


def test_a_recipe_leaves_numbers_tables_and_pictures(analysed: Path) -> None:
    names = {path.name for path in analysed.iterdir()}
    pictures = {
        f"{name}.{kind}.png"
        for name in ("tiny", "alone")
        for kind in ("clusters", "measures", "directions", "layers", "silhouettes")
    }
    assert names == {"hidden_space.json", "tiny.txt", "alone.txt", "embeddings", *pictures}
    result = HiddenSpace.read(analysed)
    assert list(result.models["tiny"].layers) == ["0", "1", "2", "norm"]
    assert result.provenance["texts"] == 120 and "scikit-learn" in result.provenance["libraries"]
    assert result.settings["resamples"] == 100
    one = result.models["tiny"].shown.languages["ar"]
    assert one.count == {"harmful": 30, "harmless": 30}
    assert one.between["harmless_drift"].value > 0.01
    # The last token of the template has the same embedding in every text: nothing there has a spread or a distance.
    embeddings = result.models["tiny"].layers["0"].languages["ar"]
    assert math.isnan(embeddings.after["between_class_ratio_2"].value)
    assert embeddings.after["probe_auroc"].value == 0.5
    assert not result.models["alone"].shown.languages["ar"].change
    text = (analysed / "tiny.txt").read_text(encoding="utf-8")
    scores = result.models["tiny"].silhouettes["norm"]
    assert list(scores) == ["before", "after"] and "Silhouette scores of tiny by layer" in text
    assert all(-1 <= value <= 1 for one in scores.values() for value in (one.semantic, one.language))
    assert "Arabic" in text and max(map(len, text.splitlines())) <= 120


def test_a_second_run_embeds_nothing_and_finds_the_same(
    analysed: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpo.modeling.opening.load_model", lambda *a, **k: pytest.fail("weights were loaded"))
    before = json.loads((analysed / "hidden_space.json").read_text(encoding="utf-8"))["models"]
    pictures = {path.name: path.read_bytes() for path in analysed.glob("*.png")}
    assert main(["analyze", "hidden-space", str(place / "recipe.yaml")]) == 0
    assert json.loads((analysed / "hidden_space.json").read_text(encoding="utf-8"))["models"] == before
    assert {path.name: path.read_bytes() for path in analysed.glob("*.png")} == pictures


def test_other_numbers_of_components_give_the_same_tables_and_pictures(
    analysed: Path, place: Path, tmp_path: Path
) -> None:
    words = ["--components", "3", "--out", str(tmp_path), "--embeddings", str(analysed / "embeddings")]
    assert main(["analyze", "hidden-space", str(place / "recipe.yaml"), *words, "--layers", "all"]) == 0
    result = HiddenSpace.read(tmp_path / "hidden_space")
    one = result.models["tiny"].shown.languages["en"]
    assert "between_class_ratio_3" in one.after and "between_class_ratio_2" not in one.after
    text = (tmp_path / "hidden_space" / "tiny.txt").read_text(encoding="utf-8")
    assert "Ratio on 3 PCs" in text and "first 3 principal components" in text
    assert f"{one.before['between_class_ratio_3'].value:.3f} -> " in text
    assert len(list((tmp_path / "hidden_space").glob("*.png"))) == 10
    section = hidden_space_section(tmp_path)
    assert section is not None and "on the 3 components that both models share" in section.html


def test_everything_is_checked_then_embedded_before_anything_is_measured(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else ranks would wait for the one that measures, and a wrong name would be found after hours."""
    seen: list[str] = []
    embed, measure = module._embed, module._measure
    monkeypatch.setattr(module, "_embed", lambda entry, *a: seen.append("embed") or embed(entry, *a))
    monkeypatch.setattr(module, "_measure", lambda entry, *a: seen.append("measure") or measure(entry, *a))
    recipe = str(place / "recipe.yaml")
    for words in (["--models.1.aligned", "nowhere/at/all/x"], ["--shown_layer", "9"]):
        assert main(["analyze", "hidden-space", recipe, "--out", str(tmp_path), *words]) == 2
        assert not seen
    words = ["--layers", "norm", "--permutations", "0", "--out", str(tmp_path)]
    assert main(["analyze", "hidden-space", recipe, *words]) == 0
    assert seen == ["embed", "embed", "measure", "measure"]
    capsys.readouterr()


def test_results_survive_json(analysed: Path, tmp_path: Path) -> None:
    result = HiddenSpace.read(analysed)
    (tmp_path / "hidden_space.json").write_text(json.dumps(as_dict(result)), encoding="utf-8")
    assert as_dict(HiddenSpace.read(tmp_path)) == as_dict(result)
    (tmp_path / "hidden_space.json").write_text("{}", encoding="utf-8")
    with pytest.raises(StorageError, match="no analysis"):
        HiddenSpace.read(tmp_path)


def test_the_report_has_a_section_with_pictures_and_escaped_names(analysed: Path, tmp_path: Path) -> None:
    section = hidden_space_section(analysed.parent)
    assert section is not None and section.anchor == "hidden-space"
    assert section.html.count("data:image/png;base64,") == 10
    assert "Arabic" in section.html and "| Arabic |" in section.markdown
    assert hidden_space_section(tmp_path) is None
    values = json.loads((analysed / "hidden_space.json").read_text(encoding="utf-8"))
    values["models"] = {"<b>x</b>": values["models"]["tiny"]}
    (tmp_path / "hidden_space").mkdir()
    (tmp_path / "hidden_space" / "hidden_space.json").write_text(json.dumps(values), encoding="utf-8")
    section = hidden_space_section(tmp_path)
    assert section is not None
    assert "<b>x" not in section.html + section.markdown and "&lt;b&gt;x" in section.html


def test_the_embed_command_writes_a_store(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--model",
        str(place / "model"),
        "--adapter",
        str(place / "adapter"),
        "--out",
        str(place / "store"),
    ]
    words += [
        "--dataset",
        "texts_{language}.jsonl",
        "--folder",
        str(place),
        "--label",
        "toxic",
        "--device",
        "cpu",
    ]
    words += ["--languages", "en", "--layers", "1", "norm", "--poolings", "mean", "--limit", "5"]
    assert main(["analyze", "embed", *words]) == 0
    assert "10 texts, mean of layers 1, norm, 32 dimensions" in capsys.readouterr().out
    store = EmbeddingStore(place / "store")
    assert store.array("mean", "1").shape == (10, 32)
    assert store.identity["adapter"] is not None


def test_wrong_words_end_with_a_message(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(place / "recipe.yaml")
    for words, message in (
        (["--resample", "5"], "the nearest is `resamples`"),
        (["--languages", "de"], "no such file"),
        (["--source_language", "fr"], "source language 'fr'"),
        (["--shown_layer", "9"], "shown_layer"),
        (["--layers", "9"], "`layers` holds '9'"),
        (["--models.0.adapter", "nowhere/at/all"], "no model folder"),
        (["--folds", "one"], "expected a whole number"),
        (["oops"], "'oops' stands alone"),
        (["--out"], "`--out` needs a value"),
        (["--folds", "one", "--resample", "5"], "2 settings are wrong"),
    ):
        assert main(["analyze", "hidden-space", recipe, *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["analyze", "hidden-space", str(place / "missing.yaml")]) == 2
    assert "There is no recipe" in capsys.readouterr().err


# ---- Recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_come_with_the_package_load(path: Path) -> None:
    recipe = load_analysis_recipe(path)
    assert recipe.source_language in recipe.languages
    assert len({entry.name for entry in recipe.models}) == (7 if "paper" in path.stem else 1)


def test_there_is_a_recipe_for_each_purpose() -> None:
    assert [path.stem for path in RECIPES] == ["mpo_run", "paper_paradetox", "paper_toxicity", "smollm2"]


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


MINIMAL = """
models: [{name: a, aligned: some/model}]
data: {dataset: texts.jsonl, label: toxic}
languages: [no, en]
out: runs/a
"""


def test_values_take_the_type_of_their_key(tmp_path: Path) -> None:
    recipe = load_analysis_recipe(
        written(tmp_path, MINIMAL), ["--layers", "1", "norm", "--confidence=9e-1", "--data.limit", "5"]
    )
    assert recipe.languages == ("no", "en")  # Norwegian, not false
    assert recipe.layers == ("1", "norm") and recipe.confidence == 0.9 and recipe.data.limit == 5


def test_arguments_of_the_chat_template_keep_their_types(tmp_path: Path) -> None:
    text = MINIMAL + "chat_template_kwargs: {enable_thinking: false, tone: plain}\n"
    recipe = load_analysis_recipe(written(tmp_path, text), ["--chat_template_kwargs.budget", "3"])
    expected = {"enable_thinking": False, "tone": "plain", "budget": 3}
    assert recipe.chat_template_kwargs == recipe.embedding.chat_template_kwargs == expected
    with pytest.raises(ConfigError, match="chat_template_kwargs"):
        load_analysis_recipe(written(tmp_path, MINIMAL + "chat_template_kwargs: off\n"))


def test_settings_and_their_defaults_have_one_source(tmp_path: Path) -> None:
    recipe = load_analysis_recipe(written(tmp_path, MINIMAL))
    assert recipe.embedding == EmbeddingSettings()
    assert all(getattr(recipe, f.name) == f.default for f in dataclasses.fields(Settings))
    own = vars(AnalysisRecipe)["__annotations__"]
    assert not set(own) & {f.name for kind in (Settings, ReadingSettings) for f in dataclasses.fields(kind)}
    words = ["--model", "m", "--out", "o", "--languages", "en", "--dataset", "d", "--label", "l"]
    options = _parser().parse_args(["analyze", "embed", *words])
    assert _fields(EmbeddingSettings, options) == EmbeddingSettings()
    assert _fields(TextSource, options) == TextSource(dataset="d", label="l")
    assert load_analysis_recipe(written(tmp_path, MINIMAL), ["--source_language", "English"]) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed: -1", "`seed` is -1"),
        ("pooling: first", "`pooling` is"),
        ("template: plain", "`template` is"),
        ("out: runs/b", "set twice"),
        ("colour: red", "line 6: `colour` is not a key of an analysis"),
        ("folds: [1, 2]", "expected one value"),
        ("trust_remote_code: perhaps", "true or false"),
        ("models: [", "line 6, column 10: this is not valid YAML"),
        ("confidence: 2", "confidence"),
    ],
)
def test_a_faulty_recipe_is_refused_with_the_reason(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_analysis_recipe(written(tmp_path, MINIMAL + change))


TOKEN = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (f"dtype: {TOKEN}", []),
        ("hub_token: 0123456789", []),
        (f"embeddings: https://user:{TOKEN}@example.org/x", []),
        ("", ["--out", TOKEN]),
        ("", ["--models.0.aligned_revision", TOKEN]),
        ("", ["--data.api_key", "0123456789"]),
        ("", ["--data.text", "a", TOKEN]),
    ],
)
def test_a_secret_in_an_analysis_is_refused_as_everywhere(
    tmp_path: Path, change: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError, match="environment variable") as caught:
        load_analysis_recipe(written(tmp_path, MINIMAL + change), words)
    assert TOKEN not in str(caught.value) and "0123456789" not in str(caught.value)


def test_all_mistakes_of_an_analysis_are_reported_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "folds: one\ncolor: red\n")
    with pytest.raises(ConfigError) as caught:
        load_analysis_recipe(path, ["--models.0.algined", "x", "--data.limit", "0"])
    said = str(caught.value).splitlines()
    assert said[0] == "4 settings are wrong:" and f"{path}, line 6: `folds` is 'one'" in str(caught.value)


def test_models_and_folders_may_lie_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there" / "some" / "model").mkdir(parents=True)
    recipe = load_analysis_recipe(written(tmp_path / "there", MINIMAL))
    assert recipe.models[0].aligned == str(tmp_path / "there" / "some" / "model")
    assert recipe.out == "runs/a"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{name: a}", "one of `aligned` and `adapter`"),
        ("{name: a, aligned: b, adapter: c}", "one of `aligned` and `adapter`"),
        ("{name: a, adapter: c}", "needs its base model"),
        ("{name: ../a, aligned: b}", "file names"),
        ("{name: a, aligned: b}, {name: a, aligned: c}", "each once"),
        ("{aligned: b}", "`models.0` needs `name`"),
    ],
)
def test_models_must_make_sense(tmp_path: Path, model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_analysis_recipe(written(tmp_path, MINIMAL.replace("{name: a, aligned: some/model}", model)))


# ---- Pictures ----------------------------------------------------------------------------------------------------


def test_many_languages_and_points_that_do_not_vary_can_be_drawn(analysed: Path, tmp_path: Path) -> None:
    result = HiddenSpace.read(analysed)
    model = result.models["tiny"]
    codes = ["en", "ar", "zh", "hi", "ko", "th", "xx-unknown"]
    for layer in model.layers.values():
        layer.languages = dict.fromkeys(codes, layer.languages["ar"])
        layer.cosines = {
            state: {
                a: dict.fromkeys(codes[i + 1 :], layer.cosines[state]["en"]["ar"])
                for i, a in enumerate(codes[:-1])
            }
            for state in layer.cosines
        }
    texts: dict[str, Any] = {code: LanguageTexts(labels(5, 5), np.arange(10)) for code in codes}
    found = draw_all(result, "tiny", texts, lambda *_: np.ones((10, 4), dtype=np.float32), tmp_path)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in found)


def test_numbers_of_any_length_stay_in_their_cells(
    analysed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = HiddenSpace.read(analysed)
    model = result.models["tiny"]
    for one in model.shown.languages.values():
        for state in (one.before, one.after):
            for name, estimate in state.items():
                state[name] = dataclasses.replace(estimate, value=-0.123)
    drawn: list[Any] = []
    save = pictures.style.save
    monkeypatch.setattr(pictures.style, "save", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k))[1])
    pictures.measures(model, 0.95, tmp_path / "measures.png")
    (figure,) = drawn
    (axes,) = figure.axes
    figure.canvas.draw()
    cell = axes.transData.transform((1, 0))[0] - axes.transData.transform((0, 0))[0]
    cells = [text for text in axes.texts if "\n" in text.get_text()]
    assert len(cells) > 10
    assert all(text.get_window_extent().width < cell for text in cells)
