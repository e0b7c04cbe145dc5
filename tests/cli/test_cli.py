from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import mpo
from mpo.cli import app as cli
from mpo.errors import ProcessLostError, TrainingError
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
PAIRS = ROOT / "recipes" / "demo" / "pairs.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(
        f"model_name_or_path: {model}\ndataset: {PAIRS}\nlimit: 4\nheld_out: 1\nbf16: false\n"
        f"output_dir: {tmp_path / 'out'}\n"
    )
    return path


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"mpo {mpo.__version__}\n"


@pytest.mark.parametrize(
    "words", [[], ["data"], ["evaluate"], ["train", "r.yaml", "--help"], ["train", "--help"]]
)
def test_help_is_shown_where_a_command_is_unfinished(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 0
    assert "usage: mpo" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, mpo.cli.app\n"
        "try:\n    mpo.cli.app.main(['--help'])\nexcept SystemExit: pass\n"
        "bad = {'torch', 'transformers', 'trl', 'datasets', 'peft', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["train"], ["train", "--beta", "2", "r.yaml"]])
def test_train_without_a_recipe_in_front_says_where_it_goes(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "the recipe comes first" in capsys.readouterr().err


def test_an_error_is_one_message_on_stderr_with_exit_code_2(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", str(recipe), "--betta", "2"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("Error: command line: `betta` is not a key")
    assert "Traceback" not in captured.err


def test_what_a_chat_template_says_of_messages_cannot_act_on_the_terminal(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "hostile.jinja"
    template.write_text("{{ raise_exception('no\x1b[2J\u202e system turn') }}", encoding="utf-8")
    assert cli.main(["train", str(recipe), "--dry_run", "--chat_template", str(template)]) == 2
    said = capsys.readouterr().err
    assert "the chat template rejects the messages (no\\x1b[2J\\u202e system turn)" in said
    assert "\x1b" not in said and "\u202e" not in said


def test_a_debugging_user_sees_the_traceback(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPO_DEBUG", "1")
    assert cli.main(["train", str(recipe), "--betta", "2"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["--dry_run"], ["--dry-run"], ["--beta", "2", "--dry_run"], ["--dry_run", "true", "--beta", "2"]],
)
def test_a_dry_run_prints_the_plan_and_leaves_nothing(
    words: list[str],
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_weights(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("mpo.modeling.opening.load_model", no_weights)
    monkeypatch.setattr("mpo.modeling.loading.load_model", no_weights)
    assert cli.main(["train", str(recipe), *words]) == 0
    out = capsys.readouterr().out
    for fact in (
        "Trainable",
        "trainable parameters",
        "Pairs per language",
        "Steps",
        "Tokens per epoch",
        "dry run",
    ):
        assert fact.lower() in out.lower()
    assert ("beta 2" in out) == ("--beta" in words)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_may_also_stand_before_the_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--dry_run", str(recipe)]) == 0
    assert "dry run" in capsys.readouterr().out


def test_interrupting_says_how_to_go_on(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpo.training.checkpoints import mark_complete

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mpo.jobs.train.train", interrupted)
    assert cli.main(["train", str(recipe), "--beta", "2"]) == 130
    assert "No checkpoint was complete yet" in capsys.readouterr().err

    half = tmp_path / "out" / "checkpoint-9"
    whole = tmp_path / "out" / "checkpoint-5"
    for folder in (half, whole):
        folder.mkdir(parents=True)
        (folder / "rng_state.pth").write_text("x")
    mark_complete(whole, {})
    assert cli.main(["train", str(recipe), "--beta", "2"]) == 130
    message = capsys.readouterr().err
    assert "checkpoint-5" in message and "checkpoint-9" not in message
    assert f"mpo train {recipe} --beta 2 --resume_from_checkpoint auto" in message


def test_other_ranks_leave_the_message_to_the_first(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "1")
    assert cli._report(TrainingError("x")) == 2
    assert slept and slept[0] > 0
    assert capsys.readouterr().err == "[rank 1] Error: x\n"
    # A rank that has lost another one has no time: the launcher ends it, too.
    slept.clear()
    assert cli._report(ProcessLostError("gone")) == 2
    assert not slept and capsys.readouterr().err == "[rank 1] Error: gone\n"


def test_one_process_keeps_to_one_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from mpo.training.compute import keep_to_one_gpu

    for name in ("WORLD_SIZE", "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    keep_to_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    assert "accelerate launch" in capsys.readouterr().out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    keep_to_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_data_check_prints_a_summary_and_writes_json(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    words = ["data", "check", str(PAIRS), "--model", str(model), "--limit", "3", "--json", str(out)]
    assert cli.main(words) == 0
    assert "18 target pairs" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert (report["groups"], report["pairs"]) == (3, 18)
    assert "tokens" in report["length_unit"]


def test_data_check_of_a_missing_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_evaluate_writes_text_json_and_a_plot(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "gap"
    words = [
        "--data",
        str(PAIRS),
        "--limit",
        "2",
        "--languages",
        "bn",
        "sw",
        "--out",
        str(out),
        "--beta",
        "1.5",
    ]
    assert cli.main(["evaluate", "reward-gap", "--model", str(model), *words]) == 0
    printed = capsys.readouterr().out
    assert "Bengali" in printed and "Swahili" in printed and "Korean" not in printed
    written = json.loads((out / "reward_gap.json").read_text())
    assert written["beta"] == 1.5 and set(written["targets"]) == {"bn", "sw"}
    assert (out / "reward_gap.txt").read_text().strip() in printed
    assert (out / "reward_gap.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_gives_the_numbers_of_two_separate_forward_passes(model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mpo.evaluation.engines import ModelChoice
    from mpo.jobs.measure import measure_reward_gap

    table = measure_reward_gap(str(PAIRS), ModelChoice(str(model)), limit=2, languages=["ko"])
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()[:2]]

    def reward(pair: dict, side: str) -> float:
        prompt = tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*pair["prompt"], *pair[side]], tokenize=False)
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logps = plain(ids).logits[0, :-1].log_softmax(-1)
        return float(logps.gather(1, ids[0, 1:, None])[start - 1 :].mean())

    pairs = [target for row in rows for target in row["targets"] if target["language"] == "ko"]
    expected = sum(reward(pair, "chosen") - reward(pair, "rejected") for pair in pairs) / len(pairs)
    assert table.targets[0].gap == pytest.approx(expected, abs=1e-5)


def test_evaluate_refuses_a_device_that_is_not_there(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "reward-gap", "--model", str(model), "--data", str(PAIRS), "--device"]
    assert cli.main([*words, "cuda:99"]) == 2
    assert "'cuda:99'" in capsys.readouterr().err
    assert cli.main([*words, "abacus"]) == 2
    assert "expected cpu, cuda" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "reward-gap", "--data", str(PAIRS)],
        ["evaluate", "perplexity", "--texts", "en=x.txt", "--out", "o"],
        ["evaluate", "utility", "--out", "o"],
        ["evaluate", "attack", "--prompts", "multijail", "--out", "o"],
        ["evaluate", "over-refusal", "--prompts", "multijail", "--out", "o"],
        ["analyze", "embed", "--languages", "en", "--out", "o"],
    ],
    ids=lambda words: words[1],
)
def test_every_command_that_renders_a_chat_takes_the_arguments_of_its_template(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpo.evaluation.prompts.load_prompts", lambda *_, **__: SimpleNamespace(dropped=0))
    for wrong in ("[1]", "{enable_thinking: false}"):
        assert cli.main([*command, "--model", "m", "--chat_template_kwargs", wrong]) == 2
        assert "--chat_template_kwargs: expected a JSON object" in capsys.readouterr().err


def test_the_script_runs_from_anywhere_without_an_installation(tmp_path: Path, recipe: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), str(recipe), "--dry_run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "dry run" in done.stdout
    assert done.stderr == ""
    assert len((ROOT / "scripts" / "train.py").read_text().splitlines()) <= 30


def test_merge_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = SimpleNamespace(args=(), kwargs={})

    def merge(*args: object, **kwargs: object) -> Path:
        seen.args, seen.kwargs = args, kwargs
        return tmp_path

    monkeypatch.setattr("mpo.jobs.merge.merge_adapter", merge)
    assert cli.main(["merge", "a", "--out", "o", "--base", "b", "--dtype", "float16", "--revision", "r"]) == 0
    assert seen.args == ("a", "o")
    assert seen.kwargs == {"base": "b", "dtype": "float16", "revision": "r", "trust_remote_code": False}
