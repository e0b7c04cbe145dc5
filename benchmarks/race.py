"""Two trainers in turns: this package's with an objective, and TRL's own with the same loss on the same pairs.

Both are real training loops, in processes of their own; see :mod:`benchmarks.objectives`.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, Features
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from benchmarks.formulations import plain_attention
from mpo import MPOConfig, MPOTrainer
from mpo.data.contract import PARTS
from mpo.data.tokenization import TOKENIZED_FEATURES
from mpo.modeling.loading import ModelSource, load_config
from mpo.modeling.tree_attention import IMPLEMENTATION as TREE
from mpo.training.allocator import keep_freed_memory
from mpo.training.objectives import find_objective

Ids = tuple[list[int], list[int], list[int]]

_DPO = (
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
)
BASELINES = {
    **{name: f"DPO {name}" for name in _DPO},
    "simpo": "CPO simpo",
    "cpo": "CPO",
    "orpo": "ORPO",
    "kto": "KTO",
}
"""Objectives that TRL has, each with the trainer and the loss."""
NAMES = (*BASELINES, "mpo", "rdpo", "mlc", "first_token")
STAND_IN = "DPO sigmoid, another objective"
SIDES = ("here", "TRL")


def baseline(loss_type: str) -> str:
    """What an objective is compared with."""
    return BASELINES.get(loss_type, STAND_IN)


@dataclass(frozen=True)
class Case:
    """
    What both trainers run.

    Attributes:
        loss_type: objective.
        train_on: ``"targets"`` or ``"both"``.
        lora: rank of the adapter; 0 for full fine-tuning.
        model: folder, or a configuration for random weights.
        groups: tokenized.
        order: the group of each step, warm-up included.
        device, half: where, and whether in bfloat16 under autocast (an adapter's base in bfloat16), else float32.
        threads: of a CPU; None for torch's own.
        checkpointing: recompute activations.
        max_length: prompt plus response.
        keep_memory: TRL's process, too, keeps freed memory on a CPU.
        settings: further ones of the trainer here.
        four_bit: the frozen base quantised, here; the model is then a folder.
    """

    loss_type: str
    train_on: str
    lora: int
    model: Any
    groups: Sequence[dict[str, Any]] = field(repr=False)
    order: Sequence[int] = ()
    device: str = "cpu"
    half: bool = False
    threads: int | None = None
    checkpointing: bool = False
    max_length: int = 1024
    keep_memory: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    four_bit: bool = False

    def pairs(self, group: int) -> list[Ids]:
        """Token ids of the pairs of a group that are trained on."""
        columns = self.groups[group]
        pairs = list(zip(*(columns[f"target_{part}"] for part in PARTS), strict=True))
        if self.train_on == "both":
            pairs.append(tuple(columns[f"source_{part}"] for part in PARTS))
        return pairs

    def arguments(self, folder: str) -> dict[str, Any]:
        """Settings that all trainers share."""
        return {
            "output_dir": folder,
            "max_steps": len(self.order),
            "learning_rate": 1e-8,  # all of a step's work, and weights that stay
            "lr_scheduler_type": "constant",
            "bf16": self.half,
            "gradient_checkpointing": self.checkpointing,
            "max_length": self.max_length,
            "use_cpu": self.device == "cpu",
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }

    def peft_config(self) -> LoraConfig | None:
        if not self.lora:
            return None
        return LoraConfig(
            r=self.lora, lora_alpha=2 * self.lora, target_modules="all-linear", task_type="CAUSAL_LM"
        )

    def load(self, attention: str | None) -> Any:
        """The model that is trained; what an adapter does not train is in half precision."""
        dtype = torch.bfloat16 if self.half and self.lora else torch.float32
        options = {"dtype": dtype, "attn_implementation": attention}
        if isinstance(self.model, str):
            return AutoModelForCausalLM.from_pretrained(self.model, **options)
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(copy.deepcopy(self.model), **options)


def _tokenizer() -> PreTrainedTokenizerFast:
    """All texts are tokenized already; a trainer asks its tokenizer for the padding token only."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<end>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


def _loader(items: Sequence[Any], collate: Callable[[Any], Any]) -> Any:
    """One batch for each item."""
    return DataLoader(items, batch_size=None, collate_fn=collate)  # type: ignore[arg-type]


# ---- The two sides -------------------------------------------------------------------------------------------------


def here(case: Case, folder: str) -> Any:
    """This package's trainer, whose steps are the groups of the case."""

    class Prepared(MPOTrainer):
        def _prepare_dataset(self, *arguments: Any) -> Dataset:
            features = Features({k: v for k, v in TOKENIZED_FEATURES.items() if k != "errors"})
            return Dataset.from_list(
                [{name: group[name] for name in features} for group in case.groups], features
            )

        def get_train_dataloader(self) -> Any:
            loader = super().get_train_dataloader()
            data: Any = loader.dataset
            return _loader(case.order, lambda place: loader.collate_fn(data.__getitems__([place])))

    # A row in the place of those that are tokenized already.
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    row = {"source": {"language": "en", **pair}, "targets": [{"language": "xx", **pair}]}
    folder_given = isinstance(case.model, str)
    half = case.half and case.lora
    init: dict[str, Any] = {"dtype": "bfloat16" if half else "float32"}
    options = {}
    if case.four_bit:
        init["device_map"] = {"": "cuda:0"}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return Prepared(
        model=case.model if folder_given else case.load(TREE),
        args=MPOConfig(
            **case.arguments(folder),
            **case.settings,
            loss_type=case.loss_type,
            train_on=case.train_on,
            reference_cache_dir=os.path.join(folder, "reference"),
            model_init_kwargs=init if folder_given else None,
        ),
        train_dataset=[row],
        processing_class=_tokenizer(),
        peft_config=case.peft_config(),
        **options,
    )


def trl(case: Case, folder: str) -> Any:
    """TRL's trainer with the same loss, each step one batch of the same pairs."""
    config = case.model
    if isinstance(config, str):
        config = load_config(ModelSource(config))
    model = case.load(plain_attention(config))
    published = (
        dict(find_objective(case.loss_type).published) if case.loss_type in BASELINES else {"beta": 0.1}
    )
    steps = [case.pairs(group) for group in case.order]
    common: dict[str, Any] = {
        "model": model,
        "processing_class": _tokenizer(),
        "peft_config": case.peft_config(),
    }
    settings = {**case.arguments(folder), "beta": published.get("beta", 0.1)}
    smoothing = {"label_smoothing": published["label_smoothing"]} if "label_smoothing" in published else {}
    if case.loss_type in ("simpo", "cpo", "orpo"):
        return _reference_free(case.loss_type, common, settings, smoothing, steps)
    if not case.lora:
        reference = copy.deepcopy(model)
        common["ref_model"] = reference.to(torch.bfloat16) if case.half else reference
    if case.loss_type == "kto":
        return _kto(common, settings, steps)
    loss = case.loss_type if case.loss_type in _DPO else "sigmoid"
    collate = DataCollatorForPreference(pad_token_id=0)

    class Dpo(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
            return dataset

        def get_train_dataloader(self) -> Any:
            return _loader(
                steps,
                lambda pairs: collate(
                    [{f"{part}_ids": ids for part, ids in zip(PARTS, pair, strict=True)} for pair in pairs]
                ),
            )

    empty = Dataset.from_dict({"prompt_ids": [[1]], "chosen_ids": [[1]], "rejected_ids": [[0]]})
    return Dpo(args=DPOConfig(**settings, **smoothing, loss_type=[loss]), train_dataset=empty, **common)


def _kto(common: dict[str, Any], settings: dict[str, Any], steps: Sequence[list[Ids]]) -> Any:
    collate = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=settings["max_length"])

    def examples(pairs: list[Ids]) -> list[dict[str, Any]]:
        """The chosen responses and then the rejected ones, each with the response of the one before it as TRL turns them."""
        found = [
            {"prompt_ids": pair[0], "completion_ids": pair[side], "label": side == 1}
            for side in (1, 2)
            for pair in pairs
        ]
        turned = [found[-1], *found[:-1]]
        return [
            {**own, "KL_completion_ids": other["completion_ids"]}
            for own, other in zip(found, turned, strict=True)
        ]

    class Kto(KTOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
            return dataset

        def get_train_dataloader(self) -> Any:
            return _loader(steps, lambda pairs: collate(examples(pairs)))

    empty = Dataset.from_list(examples([([1], [1], [0])]))
    args = KTOConfig(**settings, train_sampling_strategy="sequential", per_device_train_batch_size=2)
    return Kto(args=args, train_dataset=empty, **common)


def _reference_free(
    loss: str,
    common: dict[str, Any],
    settings: dict[str, Any],
    smoothing: dict[str, Any],
    steps: Sequence[list[Ids]],
) -> Any:
    class Prepared:
        data_collator: Any

        def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
            return {}

        def get_train_dataloader(self) -> Any:
            return _loader(steps, lambda pairs: self.data_collator([_with_labels(pair) for pair in pairs]))

    class Cpo(Prepared, CPOTrainer):  # type: ignore[misc]
        pass

    class Orpo(Prepared, ORPOTrainer):  # type: ignore[misc]
        pass

    empty = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    if loss == "orpo":
        return Orpo(args=ORPOConfig(**settings), train_dataset=empty, **common)
    own = {"loss_type": "simpo", "cpo_alpha": 0.0} if loss == "simpo" else {"loss_type": "sigmoid"}
    return Cpo(args=CPOConfig(**settings, **smoothing, **own), train_dataset=empty, **common)


def _with_labels(pair: Ids) -> dict[str, list[int]]:
    """A pair as the older trainers of TRL tokenize it."""
    prompt, *responses = pair
    found = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for name, response in zip(PARTS[1:], responses, strict=True):
        found |= {
            f"{name}_input_ids": prompt + response,
            f"{name}_attention_mask": [1] * len(prompt + response),
            f"{name}_labels": [-100] * len(prompt) + response,
        }
    return found


# ---- Turns ---------------------------------------------------------------------------------------------------------


class Turns(TrainerCallback):
    """Has a trainer wait for its turn before each step, and reports what the step took.

    A step is all that lies between two ends of a step: the batch, the model calls, the optimizer.

    Args:
        wait: returns when the next step may begin; first called when the trainer is about to take its first one.
        start, stop: called around a step; ``stop`` returns what is reported.
        report: takes what was measured of a step.
    """

    def __init__(
        self,
        wait: Callable[[], Any],
        start: Callable[[], None],
        stop: Callable[[], dict[str, Any]],
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        self._wait, self._start, self._stop, self._report = wait, start, stop, report

    def _next(self) -> None:
        self._wait()
        self._start()

    def on_train_begin(self, *arguments: Any, **named: Any) -> None:
        self._next()

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self._report(self._stop())
        if state.global_step < state.max_steps:
            self._next()


def run(
    side: str,
    case: Case,
    *,
    wait: Callable[[], Any],
    start: Callable[[], None],
    stop: Callable[[], dict[str, Any]],
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Train one side of a case in this process; see :class:`Turns`. What is reported has the step's loss, too."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = (here if side == "here" else trl)(case, folder)
        losses: list[torch.Tensor] = []
        training_step = trainer.training_step

        def kept(*arguments: Any, **named: Any) -> torch.Tensor:
            loss: torch.Tensor = training_step(*arguments, **named)
            losses.append(loss.detach())
            return loss

        trainer.training_step = kept
        trainer.add_callback(Turns(wait, start, lambda: {**stop(), "loss": float(losses[-1])}, report))
        trainer.train()


def _compete(pipe: Any, side: str, case: Case) -> None:
    """One side in its own process: says when it is ready, and then answers each message with a step."""
    from benchmarks.step import peak, reset_peak

    device = torch.device(case.device)
    if case.threads:
        torch.set_num_threads(case.threads)
    if device.type == "cpu" and (side == "here" or case.keep_memory):
        keep_freed_memory()
    times: list[float] = []
    prepared = time.perf_counter()

    def clock() -> tuple[float, float]:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def wait() -> None:
        if not times:
            reset_peak(device)
            pipe.send({"ready": time.perf_counter() - prepared})
        pipe.recv()

    def start() -> None:
        times[:] = clock()

    def stop() -> dict[str, Any]:
        seconds, processor = clock()
        return {
            "seconds": seconds - times[0],
            "cpu_seconds": processor - times[1],
            "peak_bytes": peak(device),
        }

    try:
        run(side, case, wait=wait, start=start, stop=stop, report=pipe.send)
    except EOFError:  # the race is over
        pass
    except Exception as error:  # reported, and the other side goes on
        with contextlib.suppress(OSError):
            pipe.send({"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"})


def race(case: Case, sides: Sequence[str] = SIDES) -> dict[str, dict[str, Any]]:
    """
    Run the sides of a case in turns, each in a process of its own.

    Returns:
        By side: ``steps``, a reading for each with ``seconds``, ``cpu_seconds``, ``peak_bytes`` (so far) and ``loss``;
        ``preparation``, the seconds before the first step; ``error``, or None.
    """
    context = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, Any]] = {s: {"steps": [], "preparation": None, "error": None} for s in sides}
    pipes, processes = {}, {}

    def hear(side: str) -> Any:
        if found[side]["error"]:
            return None
        try:
            message = pipes[side].recv()
        except (EOFError, OSError):
            processes[side].join()
            message = {
                "error": f"its process ended with code {processes[side].exitcode}; was its memory enough?"
            }
        if "error" in message:
            found[side]["error"] = message["error"]
            return None
        return message

    try:
        for side in sides:
            pipes[side], theirs = context.Pipe()
            processes[side] = context.Process(target=_compete, args=(theirs, side, case), daemon=True)
            processes[side].start()
            theirs.close()
            ready = hear(side)
            found[side]["preparation"] = ready and ready["ready"]
        for _ in case.order:
            for side in sides:
                with contextlib.suppress(OSError):
                    pipes[side].send("go")
                if (reading := hear(side)) is not None:
                    found[side]["steps"].append(reading)
    finally:
        for side, pipe in pipes.items():
            pipe.close()
            processes[side].join(timeout=30)
            if processes[side].is_alive():
                processes[side].terminate()
    return found
