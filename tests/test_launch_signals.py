"""How the job stops when it is asked to, and what its process ends with."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from launch import train
from launch.endings import leave
from tests.jobs import ROOT, TORCHRUN, Ended, begun, ended, here, on_ranks, started, text_in, workers_of
from tests.test_launch_job import SIZES, command, records
from tests.world import World


@pytest.fixture
def flags(tmp_path: Path) -> str:
    return f"{SIZES} --eval-every 1000 --data {text_in(tmp_path)} --out {tmp_path}"


def signalled(group: dist.ProcessGroup, arguments: str) -> Ended:
    """The job on a rank, of which the last sends itself a signal within its third step."""
    real = train.Job.train_step

    def train_step(job: train.Job, step: int) -> dict[str, float]:
        if step == 3 and job.ranks.rank == job.ranks.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(job, step)

    with mock.patch.object(train.Job, "train_step", train_step):
        return here(group, "launch.train", arguments.split())


def test_a_signal_to_one_rank_stops_all_after_that_step(worlds: dict[int, World], flags: str, tmp_path: Path) -> None:
    ranks = worlds[2].run(signalled, 2, f"{flags} --steps 100000")
    assert [rank.status for rank in ranks] == [0, 0] and len(records(tmp_path)) == 3
    assert_goes_on(ranks[0], tmp_path, worlds, 2, flags)


@pytest.mark.parametrize(
    ("processes", "sent"), [(1, signal.SIGTERM), pytest.param(2, signal.SIGUSR1, marks=pytest.mark.full)]
)
def test_a_signal_to_one_process_saves_and_stops_between_two_steps(
    processes: int, sent: signal.Signals, worlds: dict[int, World], flags: str, tmp_path: Path
) -> None:
    with begun(command(processes, f"{flags} --steps 100000")) as job:
        wait_for_records(job.process, tmp_path / "metrics.jsonl")
        pid = job.process.pid
        os.kill(pid if processes == 1 else workers_of(pid)[-1], sent)
        stopped = ended(job)
    assert stopped.status == 0, stopped.stderr
    assert "warn" not in stopped.stderr.lower()
    assert_goes_on(stopped, tmp_path, worlds, processes, flags)


@pytest.mark.full
def test_a_signal_to_torchrun_saves_and_stops_too(worlds: dict[int, World], flags: str, tmp_path: Path) -> None:
    """torchrun passes it on, and ends in a traceback, which is its own."""
    with begun(command(2, f"{flags} --steps 100000")) as job:
        wait_for_records(job.process, tmp_path / "metrics.jsonl")
        job.process.terminate()
        stopped = ended(job)
    assert stopped.status != 0 and "[rank" not in stopped.stderr, stopped.stderr
    assert stopped.stderr.count("Traceback") == 1 and "SignalException" in stopped.stderr
    assert_goes_on(stopped, tmp_path, worlds, 2, flags)


def wait_for_records(process: subprocess.Popen, metrics: Path) -> None:
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.02)


def assert_goes_on(stopped: Ended, folder: Path, worlds: dict[int, World], processes: int, flags: str) -> None:
    done = len(records(folder))
    assert f"Stopped after step {done}, as a signal asked" in stopped.stdout
    assert [path.name for path in (folder / "checkpoint").iterdir()] == [f"step-{done:06d}"]
    resumed = on_ranks(worlds, "launch.train", processes, f"{flags} --steps {done + 2} --resume")
    assert resumed.status == 0, resumed.stderr
    assert len(records(folder)) == done + 2


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child calls nothing that needs other threads
@pytest.mark.parametrize("launcher", ["RANK", "SLURM_PROCID"])
def test_under_a_launcher_a_process_ends_with_the_status_of_the_job_and_nothing_it_said_is_lost(launcher: str) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.environ[launcher] = "0"
            sys.stdout = sys.stderr = os.fdopen(writing, "w")
            sys.stdout.write("the last words")
            leave(3)
        finally:
            os._exit(99)
    os.close(writing)
    with os.fdopen(reading) as said:
        assert said.read() == "the last words"
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 3


ENDS_BESIDE_GLOO = """
import torch, torch.distributed as dist
from launch.endings import leave
dist.init_process_group("gloo")
held = dist.group.WORLD
for _ in range(200):
    dist.all_gather([torch.empty(1000) for _ in range(2)], torch.ones(1000))
leave(0)
"""


def test_a_process_whose_group_something_still_holds_ends_well_right_after_a_collective(tmp_path: Path) -> None:
    """By sys.exit five of six such starts were aborted, by a thread of gloo's that had a tensor to free."""
    (tmp_path / "ends.py").write_text(ENDS_BESIDE_GLOO)
    done = started(f"{TORCHRUN} 2 {tmp_path / 'ends.py'}", PYTHONPATH=str(ROOT))
    assert done.status == 0, done.stderr
