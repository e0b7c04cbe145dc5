"""Mistakes of a beginner, each with the sentence that mends it: no traceback, no crash, exit code 2."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from mpo.cli import main
from tests.cli.beginners import make_folder

MISTAKES = [
    # A command that there is not
    ("trian", "did you mean `mpo train`?"),
    ("evaluate sute", "did you mean `mpo evaluate suite`?"),
    ("data chek", "did you mean `mpo data check`?"),
    ("recipes cop llama", "did you mean `mpo recipes copy`?"),
    ("finetune recipe.yaml", "there is no command `mpo finetune`; did you mean `mpo train`?"),
    ("generate model", "did you mean `mpo chat`?"),
    ("doctor", "did you mean `mpo env`?"),
    ("xyzzy", "there are init, recipes, keys, train"),
    ("env --jsn", "did you mean --json?"),
    # No recipe, or another file in its place
    ("train", "the recipe comes first"),
    ("train --beta 2 recipe.yaml", "the recipe comes first"),
    ("train lama", "Did you mean `llama`, which comes with the package?"),
    ("train llama.yaml", "One called `llama` comes with the package: name it so, without a suffix."),
    ("train recipe.yml", "Did you mean recipe.yaml?"),
    ("train pairs.jsonl", "train on it with `mpo train RECIPE --dataset pairs.jsonl`"),
    ("train model", "model is a folder; expected a recipe, which is a YAML file. It holds a model; talk to it with `mpo chat`"),
    ("train adapter/adapter_model.safetensors", "is a file of weights; expected a recipe"),
    ("train notes.txt", "the recipe must be a mapping, lines of the form `key: value`; this is a single value."),
    ("train list.yaml", "this is a list."),
    ("train tabs.yaml", "Indent with spaces, not tabs."),
    ("train nothing.yaml", "is empty; expected lines of the form `key: value`."),
    ("train latin.yaml", "latin.yaml, line 1: the recipe is not UTF-8 text. Save it as UTF-8."),
    # A recipe of another kind
    ("train suite.yaml", "this is a suite, by its keys `attack`; expected a training recipe. Use it with: mpo evaluate suite suite.yaml"),
    ("plan suite.yaml", "Use it with: mpo evaluate suite suite.yaml"),
    ("train hidden_space/smollm2", "Use it with: mpo analyze hidden-space hidden_space/smollm2"),
    ("train accelerate.yaml", "Use it with: accelerate launch --config_file accelerate.yaml"),
    ("train deepspeed.json", "this is a configuration of DeepSpeed"),
    ("train model/config.json", "this is a model's configuration"),
    ("evaluate suite recipe.yaml", "expected a suite. Use it with: mpo train recipe.yaml"),
    ("analyze hidden-space recipe.yaml", "expected an analysis. Use it with: mpo train recipe.yaml"),
    # Keys of other trainers
    ("train factory.yaml", "`cutoff_len` is not a key of a recipe; use `max_length` (LLaMA-Factory's `cutoff_len`)."),
    ("train axolotl.yaml", "`micro_batch_size` is not a key of a recipe; use `per_device_train_batch_size`"),
    ("train recipe.yaml --lora_rank 8", "use `lora_r` (LLaMA-Factory's `lora_rank`)."),
    ("train recipe.yaml --dataset_name pairs.jsonl", "use `dataset` (TRL's `dataset_name`)."),
    # Keys and values
    ("train recipe.yaml --betta 2", "`betta` is not a key of a recipe; the nearest is `beta`."),
    ("train recipe.yaml --beta two", "`beta` is 'two'; expected a number or null."),
    ("train recipe.yaml --learning_rate 1e-4x", "`learning_rate` is '1e-4x'; expected a number."),
    ("train recipe.yaml --languages bn,sw", "write `languages: [bn, sw]` in a recipe and `--languages bn sw`"),
    ("train recipe.yaml --languages en", "it names target languages only"),
    ("train recipe.yaml --languages fr", "no pair is in fr. Languages found: zh, ja, ko, ar, bn, sw."),
    ("train recipe.yaml --hub_token hf_abcdefghijklmnopqrst", "set the environment variable instead: HF_TOKEN"),
    ("train recipe.yaml beta=2", "'beta=2' stands alone; expected `--key value`."),
    ("train recipe.yaml --dry-rn", "there is no option `--dry-rn`; did you mean `--dry_run`?"),
    ("train recipe.yaml --held_out 2.5", "expected a fraction of the sources from 0 to below 1"),
    ("train recipe.yaml --loss_type dpo", "`loss_type` names 'dpo'; expected objectives among"),
    ("train recipe.yaml --max_length 0", "expected a whole number of at least 2"),
    ("train recipe.yaml --dataset null", "no data; set `dataset` to a file of pairs"),
    ("train recipe.yaml --source_language klingon", "Give an ISO 639-1 code such as 'bn', or an English name."),
    ("evaluate suite suite.yaml --judge.name gpt", "expected refusal-phrases, llm, guard, got 'gpt'."),
    ("evaluate suite suite.yaml --models.a.adaptor adapter", "the nearest is `models.a.adapter`."),
    ("plan recipe.yaml --gpu 4", "did you mean `--gpus`?"),
    ("plan recipe.yaml --machines 8*80", "such as 8x80."),
    ("keys betaa", "Did you mean `beta`?"),
    # Models
    ("train recipe.yaml --model_name_or_path ./modle", "There is no model folder ./modle (looked in"),
    ("train recipe.yaml --model_name_or_path ./modle", "Did you mean model?"),
    ("train recipe.yaml --model_name_or_path org/nowhere", "Check the spelling; download it where there is a network"),
    ("train recipe.yaml --model_name_or_path adapter", "adapter holds an adapter, not a model. Pass it as the adapter"),
    ("train recipe.yaml --model_name_or_path pairs.jsonl", "is a file; expected a model folder or a name on the Hub"),
    ("train recipe.yaml --model_name_or_path empty", "empty is no model folder: it has no config.json (it holds nothing)."),
    ("train recipe.yaml --model_name_or_path pickled", "a pickle can run code when it is read, so it is not opened"),
    ("train recipe.yaml --lora_target_modules q_prj", "the model's linear layers are down_proj, gate_proj"),
    ("evaluate attack --model adapter --prompts prompts.csv --out new", "Pass it as the adapter"),
    ("evaluate reward-gap --model model --adapter model --data pairs.jsonl", "It holds a whole model: pass it as the model."),
    ("evaluate reward-gap --model model --data pairs.jsonl --device cuda:9", "this machine has 0 GPUs for torch"),
    ("chat modle", "There is no folder modle here either. Did you mean model?"),
    ("chat adapter/adapter_model.safetensors", "is a file; expected a model folder"),
    ("chat model --adapter model", "It holds a whole model: pass it as the model."),
    ("chat model --compare", "Give the adapter with `--adapter`, or its folder as the model."),
    ("chat model --languages zh", "give a file with a column per language as `--questions`"),
    ("chat model --temperature -1", "expected 0 (greedy) or more, got -1.0."),
    ("chat model", "Nothing is asked: standard input is empty. Pipe a question in"),
    # Data
    ("train recipe.yaml --dataset pair.jsonl", "Did you mean pairs.jsonl? Set `dataset`."),
    ("train recipe.yaml --dataset model", "model: is a folder; expected a file."),
    ("train recipe.yaml --dataset prompts.csv", "holds prompts alone, with a column per language"),
    ("train recipe.yaml --dataset recipe.yaml", "unsupported suffix '.yaml'. Supported: .json, .jsonl, .csv, .parquet."),
    ("data check pears.jsonl", "Did you mean 'pairs.jsonl'?"),
    ("evaluate attack --model model --prompts promts.csv --out new", "Did you mean 'prompts.csv'?"),
    ("evaluate attack --model model --prompts pairs.jsonl --out new", "Expected one column per language (`en`, `bn`, ...)"),
    ("evaluate attack --model model", "the following arguments are required: --prompts, --out. All options: mpo evaluate attack --help"),
    ("chat model --questions promts.csv", "Did you mean 'prompts.csv'?"),
    # What is not installed, not there, or not to be written
    ("train recipe.yaml --use_liger_kernel true", "pip install 'mpo-align[liger]'"),
    ("train recipe.yaml --report_to tensorbord", "`report_to` names 'tensorbord'; expected none, all, or some of"),
    ("train recipe.yaml --bf16 true", "this machine has no accelerator with bf16"),
    ("train recipe.yaml --push_to_hub true", "the Hub is switched off (HF_HUB_OFFLINE is set)"),
    ("train recipe.yaml --output_dir notes.txt/out", "cannot be written: Not a directory. Choose another with `output_dir`"),
    ("train recipe.yaml --resume_from_checkpoint nowhere", "expected `auto` or a checkpoint folder."),
    ("merge model --out merged", "It holds a whole model: pass it as the model."),
    ("merge adapter", "the following arguments are required: --out"),
    ("merge adapter --out model", "model is not empty. Choose a folder that does not exist yet."),
    ("report results", "holds no measurement of a model. Expected results/MODEL/reward_gap.json"),
    ("report nowhere", "Pass the folder that `mpo evaluate ... --out` or `mpo train` wrote to."),
    ("cache nowhere", "expected one with results of `mpo evaluate`."),
    ("recipes copy llama recipe.yaml", "recipe.yaml is there already, and is kept."),
    ("init", "Nobody can be asked here: give --model and --data."),
    ("init --model model --data pears.jsonl", "Did you mean 'pairs.jsonl'?"),
    ("init --model adapter --data demo", "holds an adapter; name its base model"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beginner")
    make_folder(folder)
    return folder


@pytest.fixture
def beginner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    return folder


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_answered_with_what_mends_it(
    words: str, said: str, beginner: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in beginner.iterdir())
    try:
        code = main(words.split())
    except SystemExit as stop:
        code = int(stop.code or 0)
    told = capsys.readouterr().err
    assert code == 2
    assert said in told
    assert "Traceback" not in told and len(told.splitlines()) <= 8
    assert sorted(path.name for path in beginner.iterdir()) == before  # and nothing is left behind


def test_there_are_enough_of_them() -> None:
    assert len({words for words, _ in MISTAKES}) >= 60


@pytest.mark.parametrize("words", ["trian", "train lama", "train suite.yaml"])
def test_the_command_itself_answers_alike(words: str, folder: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from mpo.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and dict(MISTAKES)[words] in done.stderr and done.stdout == ""
