"""A rank that has done its work ends with status 0, whatever its process group is still doing."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.launching import environment, run

# A group that something refers to, and sums under way as the interpreter ends: more often than not, that aborts it.
SCRIPT = """
import torch
from torch import distributed
from mpo.training.ranks import end_rank

distributed.init_process_group("gloo")
kept = distributed.group.WORLD
own = [torch.ones(1000) for _ in range(3000)]
for tensor in own:
    tensor.tag = "known to Python"
sums = [distributed.all_reduce(tensor, async_op=True) for tensor in own]
del own, sums
print("done", flush=True)
end_rank()
"""


def test_a_rank_ends_with_success_while_gloo_is_at_work(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    status, written = run(command, environment(), limit=300)
    assert status == 0, written[-4000:]
    assert written.count("done") == 2
