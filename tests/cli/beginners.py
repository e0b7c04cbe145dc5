"""A folder as beginners have it, for :mod:`tests.cli.test_beginners`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny import save_tiny

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def make_folder(folder: Path) -> None:
    """Fills a folder with a model, an adapter, data, recipes, and what is none of these."""
    model = save_tiny("llama", folder / "model")
    torch.manual_seed(0)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder / "adapter")
    for name in ("empty", "pickled", "results", "out"):  # a run makes its output folder, to see that it can
        (folder / name).mkdir()
    shutil.copy(model / "config.json", folder / "pickled")
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"x")

    shutil.copy(RECIPES / "demo" / "pairs.jsonl", folder)
    shutil.copy(RECIPES / "evaluation" / "demo" / "unsafe.csv", folder / "prompts.csv")
    texts = {
        "recipe.yaml": "model_name_or_path: model\ndataset: pairs.jsonl\nlimit: 4\nheld_out: 1\nbf16: false\nuse_peft: true\n"
        "output_dir: out\n",
        "suite.yaml": "models:\n  a: {model: model}\nattack:\n  unsafe: {prompts: [prompts.csv]}\nout: results\n",
        "factory.yaml": "model_name_or_path: model\nstage: dpo\nfinetuning_type: lora\nlora_rank: 8\ncutoff_len: 512\n",
        "axolotl.yaml": "base_model: model\ndatasets:\n  - path: pairs.jsonl\nmicro_batch_size: 1\nlearning_rate: 1e-4\n",
        "list.yaml": "- model\n- pairs\n",
        "tabs.yaml": "language_weights:\n\tbn: 1\n",
        "nothing.yaml": "\n",
        "notes.txt": "remember to train the model\n",
        "accelerate.yaml": "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.yaml").write_bytes("# ma\xdf\nbeta: 1\n".encode("latin-1"))
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
