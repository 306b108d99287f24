"""A run whose processes are killed with -9, in steps and in saves, restarts and ends as if nothing had been."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.jobs import TORCHRUN, begun, ended, on_ranks, text_in, workers_of
from tests.test_launch_job import SIZES, saved_tensors
from tests.world import World

RUN = f"{SIZES} --eval-every 20 --checkpoint-every 2 --keep 3 --resume auto"


def newest_step(folder: Path) -> int:
    steps = [int(path.name[5:11]) for path in (folder / "checkpoint").glob("step-??????")]
    return max(steps, default=0)


def wait_for(what: Callable[[], object], process: subprocess.Popen, pause: float = 0.002) -> bool:
    """Whether it came to be before the job ended."""
    while process.poll() is None:
        if what():
            return True
        time.sleep(pause)
    return False


def kill_one(process: subprocess.Popen, folder: Path, in_a_save: bool, chance: random.Random) -> int:
    """Kill one of the two workers after one more checkpoint at most, and wait for the end of both; the newest one."""
    reached = newest_step(folder)
    if not in_a_save or not reached:
        assert wait_for(lambda: newest_step(folder) > reached, process)
    if in_a_save:
        assert wait_for(lambda: list((folder / "checkpoint").glob("*.partial")), process)
    time.sleep(chance.random() * 0.05)
    wait_for(lambda: len(workers_of(process.pid)) == 2, process, pause=0.1)
    workers = workers_of(process.pid)
    os.kill(chance.choice(workers), signal.SIGKILL)
    newest = newest_step(folder)
    wait_for(lambda: not set(workers) & set(workers_of(process.pid)), process, pause=0.1)
    return newest


@pytest.mark.parametrize(("kills", "steps"), [(1, 40), pytest.param(30, 90, marks=pytest.mark.full)])
def test_kills_leave_the_weights_of_an_undisturbed_run(
    kills: int, steps: int, worlds: dict[int, World], tmp_path: Path
) -> None:
    """By turns in the middle of a save and of a step, under torchrun, which starts both processes again."""
    text, folder, chance = text_in(tmp_path), tmp_path / "killed", random.Random(0)
    run = f"{RUN} --steps {steps}"
    calm = on_ranks(worlds, "launch.train", 2, f"{run} --data {text} --out {tmp_path / 'calm'}")
    assert calm.status == 0, calm.stderr
    again = f"--max-restarts {2 * kills} --monitor-interval 0.1"
    with begun(f"{TORCHRUN} 2 {again} launch/train.py {run} --data {text} --out {folder}") as job:
        reached = [kill_one(job.process, folder, number % 2 == 0, chance) for number in range(kills)]
        done = ended(job)
    assert done.status == 0, done.stderr
    assert all(reached), "each restart went on from a checkpoint"
    assert not list(folder.glob("earlier-*"))
    expected, found = saved_tensors(tmp_path / "calm", steps), saved_tensors(folder, steps)
    assert expected.keys() == found.keys()
    for place, tensor in expected.items():
        assert torch.equal(tensor, found[place]), place
