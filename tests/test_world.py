"""The pool of ranks: it brings back results and errors, and neither a hang nor a death outlives its test."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.world import RemoteTraceback, World, WorldFailure, patience


def total(group, start: float, step: float = 1.0) -> torch.Tensor:
    x = torch.tensor(start + step * group.rank())
    dist.all_reduce(x, group=group)
    return x


def fail_on(group, ranks: tuple[int, ...]) -> int:
    if group.rank() in ranks:
        raise ValueError(f"rank {group.rank()} was told to fail")
    return group.rank()


def fail_before_the_collective(group, rank: int) -> None:
    if group.rank() == rank:
        raise ValueError("too early")
    dist.all_reduce(torch.zeros(1), group=group)


def hang_on(group, rank: int) -> None:
    if group.rank() == rank:
        time.sleep(3600)


def slow(group, seconds: float) -> int:
    time.sleep(seconds)
    return group.rank()


def die_on(group, rank: int) -> None:
    if group.rank() == rank:
        os._exit(7)


def send_to_nobody(group) -> None:
    if group.rank() == 0:
        dist.all_reduce(torch.zeros(1), group=group, async_op=True)


def random_number(group) -> float:
    return torch.rand(()).item()


def process_id(group) -> int:
    return os.getpid()


class Unpicklable(Exception):
    def __init__(self, one: int, two: int):
        super().__init__(f"{one} and {two}")


def raise_unpicklable(group) -> None:
    raise Unpicklable(1, 2)


def test_patience_grows_with_the_load_and_by_an_environment_variable(monkeypatch):
    monkeypatch.delenv("TEST_PATIENCE", raising=False)
    for load, said, expected in ((0.1, None, 1.0), (3.0, None, 3.0), (3.0, "2", 6.0), (0.0, "5", 5.0)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load * os.cpu_count(), 0.0, 0.0))
        if said is not None:
            monkeypatch.setenv("TEST_PATIENCE", said)
        assert patience() == expected


def test_who_is_slow_on_a_busy_machine_is_waited_for(world, monkeypatch):
    monkeypatch.setenv("TEST_PATIENCE", "100")
    assert world.run(slow, 2, 1.0, timeout=0.1) == [0, 1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_of_every_world_size_talk_to_each_other(world, world_size):
    sums = world.run(total, world_size, 10.0, step=2.0)
    assert [x.item() for x in sums] == [10.0 * world_size + world_size * (world_size - 1)] * world_size


def test_processes_and_seed_are_the_same_in_every_call(world):
    assert world.run(process_id, 4) == world.run(process_id, 4)
    assert len(set(world.run(random_number, 2) + world.run(random_number, 3))) == 1


def test_an_error_is_raised_here_with_the_traceback_from_there(world):
    with pytest.raises(ValueError, match="rank 1 was told to fail") as caught:
        world.run(fail_on, 3, (1,))
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "in fail_on" in str(caught.value.__cause__)


def test_errors_come_back_rank_by_rank(world):
    errors = world.run_expecting_errors(fail_on, 4, (0, 2))
    assert [type(error) for error in errors] == [ValueError, type(None), ValueError, type(None)]
    assert str(errors[2]) == "rank 2 was told to fail"


def test_an_error_that_does_not_pickle_is_quoted(world):
    with pytest.raises(RuntimeError, match="Unpicklable: 1 and 2"):
        world.run(raise_unpicklable, 1)


def test_only_functions_with_an_importable_name_are_sent(world):
    with pytest.raises(TypeError, match="top level of a module"):
        world.run(lambda group: None, 1)


@pytest.fixture(scope="module")
def doomed():
    """A pool of its own, so that killing it does not cost the session's."""
    ranks = World(2)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize(
    ("fn", "args", "complaint"),
    [
        (hang_on, (1,), r"no answer in \d+ s from rank 1;"),
        (die_on, (1,), r"died \(exit code 7\), so no answer from rank 1;"),
        (fail_before_the_collective, (0,), r"(?s)no answer in \d+ s from rank 1;.*in fail_before_the_collective"),
        (send_to_nobody, (), r"did not issue the same collectives"),
    ],
    ids=["hang", "death", "error while others wait", "collectives differ"],
)
def test_what_hangs_or_dies_is_named_and_the_next_call_works(doomed, monkeypatch, fn, args, complaint):
    monkeypatch.setattr("tests.world.ALIGNMENT_SECONDS", 1.0)
    with pytest.raises(WorldFailure, match=complaint):
        doomed.run(fn, 2, *args, timeout=1.0)
    assert doomed.run(fail_on, 2, ()) == [0, 1]
