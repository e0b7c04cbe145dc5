"""What the trainer relies on in TRL, transformers and accelerate without being promised it.

The trainer overrides and replaces private names. When one of them is gone, renamed, called with other arguments or not
called any more, training would go on and be wrong. These tests fail then, each with the name.
"""

from __future__ import annotations

import dis
import inspect
import logging
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from mpo.training.trainer import MPOTrainer
from mpo.training.trl_contract import without_reference_model, without_second_sharding
from tests import runs
from tests.tiny import build_model, build_tokenizer, random_groups, save_tiny


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def codes(function: Callable[..., Any]) -> Iterator[types.CodeType]:
    """The code of a function and of the functions inside it."""
    waiting = [inspect.unwrap(function).__code__]
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def names_used(function: Callable[..., Any]) -> list[str]:
    """Globals, attributes and methods that a function reads, in the order of its code."""
    reads = ("LOAD_GLOBAL", "LOAD_METHOD", "LOAD_ATTR", "LOAD_DEREF", "LOAD_NAME", "LOAD_SUPER_ATTR")
    return [
        str(instruction.argval)
        for code in codes(function)
        for instruction in dis.get_instructions(code)
        if instruction.opname.startswith(reads)
    ]


# Each method the trainer overrides for what its base class does with it: where it is defined, its parameters, and a
# method of the library that calls it.
# What has no meaning here and only raises an error.
REFUSED = ("predict", "get_eval_dataloader")

OVERRIDDEN: dict[str, tuple[type, list[str], tuple[type, str]]] = {
    "_prepare_dataset": (
        DPOTrainer,
        ["dataset", "processing_class", "args", "dataset_name"],
        (DPOTrainer, "__init__"),
    ),
    "_set_signature_columns_if_needed": (DPOTrainer, [], (Trainer, "_remove_unused_columns")),
    "_get_num_items_in_batch": (Trainer, ["batch_samples", "device"], (Trainer, "get_batch_samples")),
    "_get_grad_norm": (Trainer, ["model", "grad_norm"], (Trainer, "_run_epoch")),
    "_save_checkpoint": (DPOTrainer, ["model", "trial"], (Trainer, "_maybe_log_save_evaluate")),
    "_save": (Trainer, ["output_dir", "state_dict"], (Trainer, "save_model")),
    "_send_telemetry": (DPOTrainer.__mro__[1], [], (DPOTrainer.__mro__[1], "__init__")),
    "compute_loss": (
        DPOTrainer,
        ["model", "inputs", "return_outputs", "num_items_in_batch"],
        (Trainer, "training_step"),
    ),
    "_prepare_for_training": (
        Trainer,
        ["max_steps", "train_dataloader", "resume_from_checkpoint"],
        (Trainer, "_inner_training_loop"),
    ),
    "save_model": (Trainer, ["output_dir", "_internal_call"], (Trainer, "_save_checkpoint")),
    "_prepare_input": (Trainer, ["data"], (Trainer, "_prepare_inputs")),
    "get_train_dataloader": (Trainer, [], (Trainer, "_inner_training_loop")),
    "log": (DPOTrainer, ["logs", "start_time"], (Trainer, "_maybe_log_save_evaluate")),
    "evaluate": (
        DPOTrainer,
        ["eval_dataset", "ignore_keys", "metric_key_prefix"],
        (Trainer, "_evaluate"),
    ),
    "train": (Trainer, ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"], (Trainer, "train")),
    "create_optimizer": (Trainer, ["model"], (Trainer, "create_optimizer_and_scheduler")),
    "_load_optimizer_and_scheduler": (Trainer, ["checkpoint"], (Trainer, "_prepare_for_training")),
    "_init_training_state": (
        Trainer,
        [
            "max_steps",
            "num_update_steps_per_epoch",
            "num_train_epochs",
            "resume_from_checkpoint",
            "trial",
        ],
        (Trainer, "_inner_training_loop"),
    ),
    "_maybe_log_save_evaluate": (
        Trainer,
        [
            "tr_loss",
            "grad_norm",
            "model",
            "trial",
            "epoch",
            "ignore_keys_for_eval",
            "start_time",
            "learning_rate",
        ],
        (Trainer, "_run_epoch"),
    ),
    "_finalize_training": (
        Trainer,
        ["trial", "num_train_samples", "start_time"],
        (Trainer, "_inner_training_loop"),
    ),
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_is_where_it_was(name: str) -> None:
    owner, expected, _ = OVERRIDDEN[name]
    assert name in vars(owner), f"{owner.__name__}.{name} is gone"
    assert name in vars(MPOTrainer), f"MPOTrainer does not override {name} any more; shorten this list"
    assert parameters(vars(owner)[name]) == expected, f"{owner.__name__}.{name} has other parameters"


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_takes_what_the_library_gives_it(name: str) -> None:
    owner = OVERRIDDEN[name][0]
    theirs = [p for p in inspect.signature(vars(owner)[name]).parameters.values() if p.name != "self"]
    ours = [p for p in inspect.signature(vars(MPOTrainer)[name]).parameters.values() if p.name != "self"]
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    for own, base in zip(ours, theirs, strict=False):
        assert base.default is inspect.Parameter.empty or own.default is not inspect.Parameter.empty, own.name


@pytest.mark.parametrize("name", [name for name in OVERRIDDEN if name != "train"])
def test_the_library_still_calls_an_overridden_method(name: str) -> None:
    _, _, (owner, caller) = OVERRIDDEN[name]
    assert name in names_used(vars(owner)[caller]), f"{owner.__name__}.{caller} does not use {name} any more"


def test_every_method_of_the_libraries_that_is_overridden_is_listed() -> None:
    overridden = {
        name
        for name, value in vars(MPOTrainer).items()
        if isinstance(value, types.FunctionType)
        and any(name in vars(base) for base in MPOTrainer.__mro__[1:])
    }
    overridden -= {"__init__"}
    # `training_step` is public and is called once per micro-batch, as its documentation says.
    assert overridden - {"training_step", *REFUSED} == set(OVERRIDDEN)


def test_no_new_method_hides_one_of_the_libraries_by_accident() -> None:
    own = {
        name for name, value in vars(MPOTrainer).items() if isinstance(value, (types.FunctionType, property))
    }
    listed = {*OVERRIDDEN, *REFUSED, "__init__", "training_step"}
    hidden = {name for name in own - listed if any(name in vars(base) for base in MPOTrainer.__mro__[1:])}
    assert hidden == set()


def test_the_check_for_finite_values_comes_after_clipping_and_before_the_optimizer() -> None:
    used = names_used(Trainer._run_epoch)
    order = [used.index(name) for name in ("_clip_grad_norm", "_get_grad_norm", "on_pre_optimizer_step")]
    assert order == sorted(order)
    after = used[order[-1] :]
    assert "optimizer" in after and "step" in after
    assert "optimizer" not in used[: order[1]] or "step" not in used[used.index("optimizer") : order[1]]


def test_the_number_of_items_reaches_the_loss() -> None:
    assert "num_items_in_batch" in inspect.signature(Trainer.training_step).parameters
    assert {"get_batch_samples", "training_step"} <= set(names_used(Trainer._run_epoch))


def test_the_loss_can_say_that_it_is_scaled_already() -> None:
    assert MPOTrainer.loss_is_scaled_for_ga is True
    readers = [names_used(Trainer.training_step), names_used(DPOTrainer.__mro__[1].__init__)]
    assert any("loss_is_scaled_for_ga" in used for used in readers), (
        "nothing reads it, so losses are divided twice"
    )


def test_the_reference_is_the_only_model_that_the_constructor_of_trl_loads() -> None:
    used = names_used(DPOTrainer.__init__)
    assert used.count("create_model_from_path") == 2, (
        "once for a policy given by name, once for the reference"
    )
    source = inspect.getsource(DPOTrainer.__init__)
    assert "self.ref_model = create_model_from_path(" in source
    assert "from_pretrained" not in source.replace("AutoProcessor.from_pretrained(", "")
    assert "ref_model_init_kwargs = dict(args.model_init_kwargs or {})" in source
    assert "create_model_from_path(ref_model_path, **ref_model_init_kwargs)" in source


def test_the_architecture_of_no_model_is_loaded_as_none(tmp_path: Path) -> None:
    from trl.trainer.utils import create_model_from_path

    config = runs.config(tmp_path, model_init_kwargs={"dtype": "float32"})
    with without_reference_model(config):
        given = dict(config.model_init_kwargs)  # type: ignore[arg-type]
    assert create_model_from_path("", dtype=torch.float32, trust_remote_code=False, **given) is None


@pytest.mark.parametrize("error", [None, ValueError("a mistake")])
def test_settings_and_logger_are_as_they_were_after_the_constructor(
    tmp_path: Path, error: Exception | None
) -> None:
    logger = logging.getLogger("trl.trainer.dpo_trainer")
    config = runs.config(tmp_path, model_init_kwargs={"dtype": "float32"})
    given, level = config.model_init_kwargs, logger.level
    with pytest.raises(ValueError) if error else nullcontext(), without_reference_model(config):
        assert config.model_init_kwargs != given
        if error:
            raise error
    assert config.model_init_kwargs is given and logger.level == level


def test_training_prepares_model_and_optimizer_in_one_call() -> None:
    source = inspect.getsource(Trainer._prepare_for_training)
    assert "model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)" in source
    assert "self.accelerator.prepare(" in source and "prepare" in vars(Accelerator)
    assert parameters(Accelerator.prepare_optimizer)[0] == "optimizer"


def test_a_model_that_is_divided_already_is_prepared_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        """Of an accelerator, what is replaced and what is called instead."""

        def __init__(self) -> None:
            self._models: list[Any] = []

        def prepare(self, *_: Any) -> Any:
            raise AssertionError("the model would be divided again")

        def prepare_optimizer(self, optimizer: Any) -> Any:
            return ("prepared", optimizer)

    monkeypatch.setattr("mpo.training.trl_contract.is_fsdp_sharded", lambda model: model is divided)
    monkeypatch.setattr("mpo.training.trl_contract.fsdp_reshard", lambda model: seen.append(model))
    divided, whole, seen = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), []
    accelerator: Any = Fake()
    with pytest.raises(KeyError), without_second_sharding(divided, accelerator):
        assert seen == [divided]
        assert accelerator.prepare(divided, "optimizer") == (divided, ("prepared", "optimizer"))
        assert accelerator._models == [divided]
        raise KeyError
    with without_second_sharding(whole, accelerator), pytest.raises(AssertionError, match="again"):
        accelerator.prepare(whole, "optimizer")
    with pytest.raises(AssertionError, match="again"):
        accelerator.prepare(divided, "optimizer")
    assert seen == [divided]


def test_trl_attaches_its_own_head_before_ours_and_keeps_the_forward() -> None:
    assert "add_fused_lm_head" in names_used(DPOTrainer.__init__)
    from trl.trainer.utils import add_fused_lm_head

    model = build_model("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(input_ids=ids).logits
    add_fused_lm_head(model)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_the_frozen_copy_of_an_adapter_is_called_ref(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from peft import get_peft_model

    policy = get_peft_model(build_model("llama"), runs.lora())
    deleted: list[str] = []
    original = policy.delete_adapter
    monkeypatch.setattr(policy, "delete_adapter", lambda name: (deleted.append(name), original(name)))
    runs.trainer(policy, tmp_path, processing_class=build_tokenizer("llama"))
    assert deleted == ["ref"], "TRL has no such copy any more, or calls it otherwise"
    assert list(policy.peft_config) == ["default"]


def test_the_kernel_takes_its_arguments_in_the_order_we_give_them() -> None:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    assert [name for name in parameters(ChunkedLogProbFunction.forward) if name != "ctx"] == [
        "hidden",
        "weight",
        "bias",
        "targets",
        "temperature",
        "chunk_size",
        "final_logit_softcapping",
        "logit_scale",
        "outputs",
    ]
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(5, 8), torch.randn(40, 8), torch.randn(40)
    targets = torch.randint(0, 40, (5,))
    found = ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 16, 3.0, 0.5, ())
    logits = 3.0 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 3.0)
    expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    # Whether the bias is inside the scale is the kernel's affair; without one there is no doubt.
    plain = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 16, 3.0, 0.5, ())
    logits = 3.0 * torch.tanh(0.5 * (hidden @ weight.T) / 3.0)
    torch.testing.assert_close(plain[0], logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    torch.testing.assert_close(found[0], expected)
    assert found[1:] == (None,) * (len(found) - 1), "an output that was not asked for is computed"


def test_the_weight_of_the_head_is_gathered_by_a_context_over_parameters() -> None:
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    (parameter,) = inspect.signature(maybe_gather_lm_head_ctx).parameters.values()
    assert parameter.kind is inspect.Parameter.VAR_POSITIONAL
    weight = torch.nn.Parameter(torch.ones(2))
    with maybe_gather_lm_head_ctx(weight, None):
        assert weight.sum() == 2


def test_the_helpers_that_load_and_name_models_take_what_we_give_them(tmp_path: Path) -> None:
    from trl.trainer.utils import create_model_from_path, get_config_model_id

    folder = save_tiny("llama", tmp_path / "model")
    model = create_model_from_path(
        str(folder), trust_remote_code=False, use_safetensors=True, attn_implementation=None, device_map=None
    )
    assert model.dtype is torch.float32, "weights are loaded in float32 unless asked otherwise"
    assert get_config_model_id(model.config) == str(folder)


def test_the_router_loss_takes_its_arguments_in_the_order_we_give_them() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    assert parameters(load_balancing_loss_func)[:4] == [
        "gate_logits",
        "num_experts",
        "top_k",
        "attention_mask",
    ]


def test_the_pickled_arguments_have_the_name_that_is_removed() -> None:
    from transformers.trainer import TRAINING_ARGS_NAME

    assert TRAINING_ARGS_NAME == "training_args.bin"
    assert "TRAINING_ARGS_NAME" in names_used(Trainer._save)


def test_a_checkpoint_is_written_where_the_marker_is_put() -> None:
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    assert PREFIX_CHECKPOINT_DIR == "checkpoint"
    assert {"PREFIX_CHECKPOINT_DIR", "rotate_checkpoints", "save_total_limit"} <= set(
        names_used(Trainer._save_checkpoint)
    )


def test_settings_that_are_read_from_json_are_listed_where_we_add_ours() -> None:
    assert "model_init_kwargs" in DPOConfig._VALID_DICT_FIELDS


def test_skipping_batches_keeps_the_sampler_in_reach_of_the_epoch(tmp_path: Path) -> None:
    trainer = runs.trainer(save_tiny("llama", tmp_path / "model"), tmp_path)
    loader = trainer.get_train_dataloader()
    loader.set_epoch(1)
    expected = [batch["groups"] for batch in loader]
    skipped = skip_first_batches(loader, 2)
    # What the loop does when it resumes: the epoch reaches the sampler inside the one that skips.
    skipped.batch_sampler.batch_sampler.set_epoch(1)
    assert [batch["groups"] for batch in skipped] == expected[2:]
    assert {"skip_first_batches", "set_epoch"} <= set(names_used(Trainer._run_epoch))


READ = (
    "_tokenizer",
    "_train_batch_size",
    "_signature_columns",
    "aux_loss_enabled",
    "router_aux_loss_coef",
    "is_deepspeed_enabled",
    "is_fsdp_enabled",
    "maybe_activation_offload_context",
    "model_wrapped",
    "ref_model",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def test_attributes_that_the_trainer_reads_are_set_by_the_libraries(folder: Path, tmp_path: Path) -> None:
    trainer = runs.trainer(folder, tmp_path)
    assert [name for name in READ if not hasattr(trainer, name)] == []


def test_a_run_goes_through_every_overridden_method(folder: Path, tmp_path: Path) -> None:
    calls: dict[str, int] = {}

    def counted(name: str) -> Callable[..., Any]:
        original = vars(MPOTrainer)[name]

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return original(self, *args, **kwargs)

        return method

    counting = type(
        "Counting", (MPOTrainer,), {name: counted(name) for name in [*OVERRIDDEN, "training_step"]}
    )
    rows = random_groups(0, 4, (1, 2), words=(1, 4))
    trainer = runs.trainer(
        folder,
        tmp_path,
        rows,
        kind=counting,
        eval_dataset=rows,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    # Columns are only asked for by a loader of the library's own, a micro-batch may be several model calls, and its
    # tensors are placed one by one.
    assert calls.pop("_prepare_input") > 0
    for name in ("_set_signature_columns_if_needed", "compute_loss"):
        calls.pop(name, None)
    assert calls == {
        "_prepare_dataset": 2,
        "_get_num_items_in_batch": 2,
        "_get_grad_norm": 2,
        "_save_checkpoint": 2,
        "_save": 2,
        "save_model": 2,
        "_prepare_for_training": 1,
        "_send_telemetry": 1,
        "training_step": 4,
        "get_train_dataloader": 1,
        "log": 2 + 2 + 1,  # steps, evaluations and the summary
        "evaluate": 2,
        "train": 1,
        "create_optimizer": 1,
        "_init_training_state": 1,
        "_maybe_log_save_evaluate": 2 + 1,  # steps, and the end of the epoch
        "_finalize_training": 1,
    }


def test_the_loss_of_a_step_is_not_divided_again_by_the_library(folder: Path, tmp_path: Path) -> None:
    rows = random_groups(0, 4, (2, 2), words=(1, 4))
    losses = []
    for accumulation in (1, 4):
        trainer = runs.trainer(
            folder,
            tmp_path / str(accumulation),
            rows,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.0,
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert abs(losses[0] - losses[1]) < 1e-4 * abs(losses[0])


def test_the_kernel_of_experts_is_called_by_the_name_that_is_replaced() -> None:
    from transformers.integrations import moe

    assert list(inspect.signature(moe._grouped_mm).parameters)[:2] == ["input", "weight"]
    assert "_grouped_mm(input, weight" in inspect.getsource(moe._grouped_linear)
