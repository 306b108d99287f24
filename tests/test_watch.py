"""kl_dist.watch: what follows from the signs of ranks, and processes that stop in every way but by dying."""

import multiprocessing
import os
import pdb
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from kl_dist.watch import LONG, Watch
from kl_dist.watch.signs import Heard, Sign, behind, verdict
from tests.world import World, patience

PATIENCE = 30.0
NOW = 1000.0


def heard(silent: float = 0.0, still: float = 0.0, **sign: object) -> Heard:
    """A rank that was heard of and has moved some seconds ago."""
    told = {"beat": 5, "mark": 7, "counts": {"0": 3}, "doing": "step 7", "unhurried": False, "who": "a host, pid 1"}
    return Heard(NOW - silent, NOW - still, Sign(**(told | {"where": "here.py:1 wait"} | sign)))  # type: ignore[arg-type]


WAITS = {"counts": {"0": 4}}
LATE = {"counts": {"0": 3}}

CASES = {
    # name: ranks, whether it ends the job, what is said
    "all well": ([heard(), heard()], None, ""),
    "silent": ([heard(), heard(silent=31)], True, "rank 1 (a host, pid 1, step 7) has not been heard of since"),
    "not silent yet": ([heard(), heard(silent=29)], None, ""),
    "two silent": ([heard(silent=40), heard(silent=31), heard()], True, "rank 1"),
    "silent in a save": ([heard(), heard(silent=31, unhurried=True)], True, "rank 1"),
    "late": ([heard(still=31, **WAITS), heard(still=31, **LATE)], True, "rank 1 (a host, pid 1, step 7) has not come"),
    "late, and silent already": (
        [heard(still=31, **WAITS), heard(silent=20, still=31, **LATE)],
        True,
        "rank 1 (a host, pid 1, step 7) has not been heard of since",
    ),
    "late where": ([heard(still=31, **WAITS), heard(still=31, **LATE)], True, "it is at here.py:1 wait"),
    "not late yet": ([heard(still=31, **WAITS), heard(still=29, **LATE)], None, ""),
    "others still move": ([heard(still=1, **WAITS), heard(still=31, **LATE)], None, ""),
    "all compute": ([heard(still=500), heard(still=500)], None, ""),
    "at an earlier mark": ([heard(still=31, mark=8, counts={"0": 0}), heard(still=31)], True, "rank 1"),
    "late in a save": ([heard(still=31, **WAITS), heard(still=31, unhurried=True, **LATE)], False, "rank 1"),
    "late in a save for long": (
        [heard(still=31 * LONG, **WAITS), heard(still=31 * LONG, unhurried=True, **LATE)],
        True,
        "rank 1",
    ),
    "in another group": (
        [heard(still=31, counts={"0": 3, "a": 2}), heard(still=31, counts={"0": 3, "a": 1}), heard(still=31)],
        True,
        "rank 1",
    ),
    "left": ([heard(), heard(silent=99, still=99, left=True, **LATE)], None, ""),
    "all left": ([heard(silent=99, still=99, left=True)], None, ""),
    "not come": ([heard(), Heard(NOW - 31, NOW - 31)], None, ""),
    "not come for long": ([heard(), Heard(NOW - 31 * LONG, NOW)], True, "rank 1 has not been heard of"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_follows_from_the_signs(name: str) -> None:
    ranks, final, words = CASES[name]
    found = verdict(dict(enumerate(ranks)), NOW, PATIENCE)
    assert (found and found.final) is final
    assert found is None or words in found.words
    assert found is None or "rank 0" not in found.words or ranks[0].since < NOW - PATIENCE


def test_ranks_that_wait_for_each_other_are_both_named() -> None:
    signs = [Sign(1, counts={"a": 2, "b": 1}), Sign(1, counts={"a": 1, "b": 2})]
    assert behind(dict(enumerate(signs))) == [0, 1]


def test_a_sign_with_the_same_counts_is_news_but_no_progress() -> None:
    one = Heard(0.0, 0.0)
    one.hear(Sign(1), 1.0)
    one.hear(Sign(2), 2.0)
    assert (one.since, one.moved) == (2.0, 1.0)
    one.hear(Sign(2), 3.0)
    assert (one.since, one.moved) == (2.0, 1.0)
    one.hear(Sign(3, mark=1), 4.0)
    assert (one.since, one.moved) == (4.0, 4.0)


def counted(group: dist.ProcessGroup) -> list[int]:
    """What a rank's sign says of a step's collectives, on a store of the pool's."""
    watch = Watch(dist.HashStore(), group.rank(), group.size(), PATIENCE)
    found = []
    for _ in range(2):
        watch.doing("step")
        for _ in range(3):
            dist.barrier(group)
        found.append(max(watch.sign().counts.values()))
    return found


def test_collectives_are_counted_from_what_a_rank_does_on(world: World) -> None:
    assert world.run(counted, 3) == [[3, 3]] * 3


SHORT = 1.0
ENDS = {"stop": "has not been heard of", "prompt": "has not come to what", "stuck": "has not come to what"}


def rank_of(how: str, seconds: float, port: int, rank: int, folder: str) -> None:
    """Six steps of one of two ranks, the second of which does something else in the fourth; says how far it came."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.pipe()[0], 0)  # of the debugger's prompt: nobody ever types anything
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    watch = Watch(dist.PrefixStore("watched", store), rank, 2, seconds)
    watch.start()
    dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=2)
    for step in range(6):
        watch.doing(f"step {step}", unhurried=step == 0)
        if step == 3 and rank == 1:
            if how == "prompt":
                pdb.Pdb(nosigint=True).set_trace()
            elif how == "stuck":
                time.sleep(600)
            elif how == "stop":
                time.sleep(seconds / 4)  # by then it has been heard of
                os.kill(os.getpid(), signal.SIGSTOP)
            elif how == "slow save":
                watch.doing("saving", unhurried=True)
                time.sleep(3 * seconds)
        if how == "long" and step == 3:
            time.sleep(3 * seconds)
        dist.all_reduce(torch.ones(1))
    watch.stop()
    print("done", flush=True)
    os._exit(0)


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def two_ranks(how: str, folder: Path) -> list[Ended]:
    """Both to their end; one that is stopped is woken after the other has ended."""
    seconds = SHORT * patience()
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = [(how, seconds, server.port, rank, str(folder)) for rank in range(2)]
    ranks = [multiprocessing.get_context("forkserver").Process(target=rank_of, args=one) for one in given]
    try:
        for one in ranks:
            one.start()
        ranks[0].join(60 * patience())
        if how == "stop":
            os.kill(ranks[1].pid or 0, signal.SIGCONT)
        ranks[1].join(60 * patience())
        texts = [[(folder / f"{name}{rank}").read_text() for name in ("out", "err")] for rank in range(2)]
        assert None not in [one.exitcode for one in ranks], f"they hang: {texts}"
        return [Ended(one.exitcode or 0, *text) for one, text in zip(ranks, texts, strict=True)]
    finally:
        for one in ranks:
            one.kill()
            one.join()


@pytest.mark.parametrize("how", ["stop", pytest.param("prompt", marks=pytest.mark.full), "stuck"])
def test_a_rank_that_stops_is_named_and_ends_the_job(how: str, tmp_path: Path) -> None:
    """By SIGSTOP, by a debugger's prompt, by a main thread that waits for something else."""
    first, second = two_ranks(how, tmp_path)
    assert first.status and second.status, (first, second)
    assert "rank 1 (" in first.err and ENDS[how] in first.err, first
    assert how != "stuck" or ENDS[how] in second.err, "told by the first, through the store"
    assert "done" not in first.out + second.out


@pytest.mark.parametrize("how", ["slow save", pytest.param("long", marks=pytest.mark.full)])
def test_a_slow_save_and_a_long_step_end_nothing(how: str, tmp_path: Path) -> None:
    first, second = two_ranks(how, tmp_path)
    assert first.status == second.status == 0, (first, second)
    assert ("waiting: rank 1 (" in first.err) == (how == "slow save")
