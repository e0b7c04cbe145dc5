"""One of the processes that ``accelerate launch`` starts: runs what it is told and leaves what it found.

accelerate launch ... tests/distributed/worker.py OUT SHARED JOB...
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")

import torch

from mpo.jobs.train import is_lost_process, process_lost
from mpo.training.ranks import end_rank
from tests.distributed import fsdp_cases, scenarios
from tests.distributed.launching import end_after_limit

torch.set_num_threads(1)
gc.freeze()  # every training collects garbage, and need not look through all that the libraries hold
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    # Accelerate sets FSDP aside on a CPU, and trains with DDP. Told that these are GPUs, it goes all its way, on gloo.
    initialise = PartialState.__init__

    def as_if_on_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_if_on_gpus

end_after_limit()


def work(job: str, out: Path, shared: Path, ranks: int) -> Any:
    kind, _, name = job.partition(":")
    match kind:
        case "train":
            return scenarios.run(name, out / name, shared, ranks)
        case "resume":
            # Two steps, then a new trainer for the third, as after an interruption.
            folder = out / f"{name}-resumed"
            kept = {"save_strategy": "steps", "save_steps": 2}
            trainer = scenarios.build(name, folder, shared, ranks, **kept)
            trainer.add_callback(Stop(2))
            trainer.train()
            again = scenarios.build(name, folder, shared, ranks, **kept)
            again.train(resume_from_checkpoint=True)
            again.save_model(str(folder / "saved"))
            return {"steps": again.state.global_step}
        case "half":
            return scenarios.run(name, out / f"half-{name}", shared, ranks, bf16=True)
        case "reference":
            return scenarios.run_with_reference(out / "reference", shared, ranks)
        case "continued":
            return scenarios.run_continued(out / f"continued-{name}", shared, ranks, bf16=name == "half")
        case "objectives":
            return scenarios.run_objectives(name, out / f"objectives-{name}", shared, ranks)
        case "kinds":
            return scenarios.run_kinds(out / "kinds", shared, ranks)
        case "probe":
            return scenarios.run_probed(name, out, shared, ranks)
        case "stopped":
            return scenarios.run_stopped(name, out / "stopped", shared, ranks)
        case "heads":
            return fsdp_cases.run_heads(torch.distributed.get_rank())
        case "poison":
            return scenarios.run_poisoned(name, out / f"poison-{name}", shared, ranks)
        case "signal":
            return scenarios.run_signalled(name, out, shared, ranks)
        case "killed":
            trainer = scenarios.build(
                name, out / "killed", shared, ranks, save_strategy="steps", save_steps=1
            )
            trainer.add_callback(Kill(2))
            try:
                trainer.train()
            except Exception as error:
                assert is_lost_process(error), error
                print(process_lost(error, str(out / "killed")), flush=True)
                raise
    raise ValueError(job)


class Stop(scenarios.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


class Kill(scenarios.TrainerCallback):
    """Kills rank 1 between the two micro-batches of a step, while rank 0 goes on to wait for it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    out, shared = Path(sys.argv[1]), Path(sys.argv[2])
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    for job in sys.argv[3:]:
        found = work(job, out, shared, ranks)
        torch.save(found, out / f"{job.replace(':', '-')}.{rank}.pt")
        torch.distributed.barrier()
    end_rank()


if __name__ == "__main__":
    main()
