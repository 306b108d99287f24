"""How process groups end: with torch.distributed.destroy_process_group, whatever of ours is still there."""

import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kl_dist import KLShampoo
from kl_dist.ranks import Ranks
from tests.jobs import ROOT, TORCHRUN, started

DESTROYED = "the process group of this KLShampoo was destroyed"


def optimizer_outlives_its_group(group) -> tuple[bool, str]:
    """Whether anything is left of a destroyed group beside the optimizer that used it, and what another step says."""
    mine = dist.new_group()
    parameters = [torch.nn.Parameter(torch.ones(8, 6)) for _ in range(group.size())]
    optimizer = KLShampoo(parameters, process_group=mine)
    for parameter in parameters:
        parameter.grad = torch.arange(48.0).sin().view(8, 6)
    optimizer.step()
    optimizer.state_dict()
    found = weakref.ref(mine)
    dist.destroy_process_group(mine)
    del mine
    before = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(RuntimeError) as refused:
        optimizer.step()
    assert all(map(torch.equal, before, parameters))
    return found() is not None, str(refused.value)


def test_an_optimizer_holds_no_group_that_was_destroyed_and_says_so_in_its_next_step(worlds):
    for left, said in worlds[2].run(optimizer_outlives_its_group, 2):
        assert not left and said.startswith(DESTROYED)


def team_outlives_its_group(group) -> tuple[bool, str]:
    """The same of a group that the ranks made among some of them."""
    ranks, pairs = Ranks(group), [(0, 1), (2, 3)]
    ranks.make_groups(pairs)
    team = ranks.team(next(pair for pair in pairs if ranks.rank in pair))
    chunk, room = torch.ones(1), torch.empty(64, dtype=torch.uint8)
    team.gather(chunk, room).wait()
    assert team.group is not None and team.group is not group
    found = weakref.ref(team.group)
    dist.destroy_process_group(team.group)
    with pytest.raises(RuntimeError) as refused:
        team.gather(chunk, room)
    return found() is not None, str(refused.value)


def test_groups_of_some_ranks_end_as_well(world):
    for left, said in world.run(team_outlives_its_group, 4):
        assert not left and said.startswith(DESTROYED)


ENDS = """
import time
from contextlib import suppress
from pathlib import Path
import torch, torch.distributed as dist

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
torch.optim.AdamW(model.parameters())  # has torch import what takes the group for a default argument
from kl_dist import KLShampoo  # later than it should be

optimizer = KLShampoo(model)
for _ in range(3):
    model(torch.ones(4, 8)).square().sum().backward()
    optimizer.step()
optimizer.state_dict()
dist.barrier()
held = dist.group.WORLD  # as a model in DistributedDataParallel does
dist.destroy_process_group()
try:
    optimizer.step()
except RuntimeError as error:
    print(error)
del held


def threads():
    found = 0
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # of one that ends just then
            found += "gloo" in path.read_text()
    return found


until = time.monotonic() + 10  # one that was joined is listed for a moment more
while threads() and time.monotonic() < until:
    time.sleep(0.01)
print("threads of gloo:", threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_no_thread_of_gloo_is_left_where_the_interpreter_ends_beside_an_optimizer(tmp_path: Path) -> None:
    """One that has a tensor to free by then aborts the process, now and then, on a busy machine."""
    (tmp_path / "ends.py").write_text(ENDS)
    done = started(f"{TORCHRUN} 2 {tmp_path / 'ends.py'}", PYTHONPATH=str(ROOT))
    assert done.status == 0, done.stderr
    assert done.stdout.count("threads of gloo: 0") == done.stdout.count(DESTROYED) == 2, done.stdout
