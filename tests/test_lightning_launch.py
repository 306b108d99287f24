"""Our strategies under every way that Lightning's processes are started, and what becomes of them when one fails."""

import contextlib
import itertools
import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lightning_plugin import meeting
from tests.jobs import Begun, begun, ended, free_port, started
from tests.lightning_runs import alone, launched
from tests.models import deviation
from tests.world import patience

DOUBLE = 1e-9
STEPS = 8  # several refreshes
TORCHRUN = ["-m", "torch.distributed.run"]
SECONDS_TO_START = 60.0  # to import Lightning twice
SECONDS_TO_END = 40.0  # from the failure to the end of all processes; a time-out would take minutes
full = pytest.mark.full


def script(out: Path, strategy: str = "kl_shampoo", **given: Any) -> list[str]:
    trainer = {"strategy": strategy, **given.pop("trainer", {})}
    said = json.dumps({"out": str(out), "steps": STEPS, "trainer": trainer, **given})
    return ["-m", "tests.lightning_script", said]


def assert_trained(folder: Path) -> None:
    weights = torch.load(folder / "weights.pt", weights_only=True)
    assert deviation(weights, alone(steps=STEPS)) <= DOUBLE


@full
@pytest.mark.parametrize("strategy", ["kl_shampoo", "kl_shampoo_spawn", "kl_shampoo_fsdp2"])
def test_started_by_the_script_itself(tmp_path: Path, strategy: str) -> None:
    """As test_launch_lightning.py starts it once under kl_shampoo."""
    done = started(script(tmp_path, strategy))
    assert done.status == 0, done.stderr
    assert_trained(tmp_path)
    said = done.stdout + done.stderr
    assert said.count("net.mix.weight") == 1, "the table of routes is shown once, by one rank"


@full
def test_started_by_torchrun_on_two_nodes(tmp_path: Path) -> None:
    """As far as the strategies can tell, lightning_runs.py says the same to ranks that are there already."""
    found = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    job = script(tmp_path, trainer={"num_nodes": 2, "devices": 1})
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(begun([*TORCHRUN, *found, f"--node-rank={node}", *job])) for node in range(2)]
        done = [ended(node) for node in nodes]
    assert [node.status for node in done] == [0, 0], done
    assert_trained(tmp_path)


def slurm(task: int, port: str) -> dict[str, str]:
    """What srun sets for one of two tasks on one node."""
    return {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task),
        "MASTER_PORT": port,
    }


@pytest.mark.parametrize("strategy", ["kl_shampoo", pytest.param("kl_shampoo_fsdp2", marks=full)])
def test_started_by_slurm_whose_requeue_signal_on_one_rank_saves_on_all_between_batches(
    tmp_path: Path, strategy: str
) -> None:
    port, bin = free_port(), tmp_path / "bin"
    bin.mkdir()
    (bin / "scontrol").write_text(f"#!/bin/sh\necho requeued >> {tmp_path}/requeued\n")
    (bin / "scontrol").chmod(0o755)
    path = f"{bin}:{os.environ['PATH']}"
    job = script(tmp_path, strategy, how="signal", rank=1, step=3)
    with contextlib.ExitStack() as stack:
        tasks = [stack.enter_context(begun(job, PATH=path, **slurm(task, port))) for task in range(2)]
        done = [ended(task) for task in tasks]
    assert [task.status for task in done] == [0, 0], done
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists() and (tmp_path / "requeued").read_text() == "requeued\n"
    assert_trained(tmp_path)


FAILURES = [
    ("kl_shampoo", "raise", 0),
    ("kl_shampoo", "raise", 1),
    ("kl_shampoo", "kill", 0),
    ("kl_shampoo", "kill", 1),
    ("kl_shampoo_spawn", "raise", 1),
    ("kl_shampoo_fsdp2", "kill", 1),
]


@full
@pytest.mark.parametrize(("strategy", "how", "rank"), FAILURES)
def test_a_rank_that_fails_ends_the_job_on_all(tmp_path: Path, strategy: str, how: str, rank: int) -> None:
    """The other rank is busy and would notice minutes later; of one that is killed it learns by a closed connection."""
    asleep = 600 if how == "raise" else 0
    with begun(script(tmp_path, strategy, how=how, rank=rank, step=3, asleep=asleep)) as job:
        assert_fails(job, "ArithmeticError: the original error" if how == "raise" else "")


def assert_fails(job: Begun, saying: str) -> None:
    """Soon, and leaving no process behind."""
    done = ended(job, SECONDS_TO_START + SECONDS_TO_END)
    assert done.status != 0
    assert saying in done.stderr
    assert not running(job.process.pid), "no process is left behind"


def running(session: int) -> list[str]:
    """The command lines of the processes of a session, a moment later."""
    deadline = time.monotonic() + SECONDS_TO_END * patience()
    found: list[str] = []
    while time.monotonic() < deadline:
        said = subprocess.run(["ps", "-s", str(session), "-o", "stat=,args="], capture_output=True, text=True).stdout
        found = [line for line in said.splitlines() if not line.startswith("Z")]
        if not found:
            break
        time.sleep(0.1)
    return found


@full
def test_under_torchrun_a_rank_that_fails_ends_the_job(tmp_path: Path) -> None:
    job = script(tmp_path, how="raise", rank=1, step=3, asleep=600)
    with begun([*TORCHRUN, "--standalone", "--nproc-per-node=2", *job]) as process:
        assert_fails(process, "the original error")


@pytest.mark.parametrize("strategy", ["kl_shampoo", pytest.param("kl_shampoo_fsdp2", marks=full)])
def test_a_killed_rank_is_restarted_by_torchrun_and_the_second_start_trains_to_the_end(
    strategy: str, tmp_path: Path
) -> None:
    again = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    done = started([*TORCHRUN, *again, *script(tmp_path, strategy, how="kill", rank=1, step=3)])
    assert done.status == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    assert_trained(tmp_path)


@pytest.mark.parametrize("strategy", ["kl_shampoo", pytest.param("kl_shampoo_deepspeed", marks=full)])
def test_a_rank_that_is_stopped_is_named_by_the_callback_and_ends_the_job(strategy: str, tmp_path: Path) -> None:
    """torchrun then kills what is stopped."""
    waits = 2 * patience()
    job = script(tmp_path, strategy, how="stop", rank=1, step=3, patience=waits)
    with begun([*TORCHRUN, "--standalone", "--nproc-per-node=2", *job]) as process:
        done = ended(process)
    assert done.status != 0
    assert re.search(r"rank 1 \(.*, pid \d+, .*\) has not been heard of since", done.stderr), done.stderr


def met_in_three_starts(group: dist.ProcessGroup, port: int) -> list[bool]:
    """What a rank is told in each: all come to the first and the last, and to the second the first rank alone."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    told = []
    for start, coming in enumerate([group.size(), 1, group.size()]):
        with (
            launched(group),
            mock.patch.dict(os.environ, TORCHELASTIC_RESTART_COUNT=str(start)),
            mock.patch.object(meeting, "_numbers", itertools.count()),  # as new processes have it
            mock.patch.object(meeting, "_get_default_store", lambda: store),
        ):
            dist.barrier(group)
            told.append(group.rank() < coming and meeting.all_come("a test", 10.0 if coming > 1 else 0.3))
            dist.barrier(group)
    return told


def test_ranks_do_not_meet_those_of_an_earlier_start_on_the_same_store(worlds) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert worlds[2].run(met_in_three_starts, 2, store.port) == [[True, False, True]] * 2


def test_a_checkpoint_after_an_exception_on_one_rank_waits_for_nobody_and_the_job_ends_on_all(tmp_path: Path) -> None:
    with begun(script(tmp_path, how="raise", rank=0, step=3, asleep=600, saves=True)) as job:
        assert_fails(job, "ArithmeticError: the original error")
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["global_step"] == 3 and saved["optimizer_states"] == [{}]
