"""Our strategies under every way that Lightning's processes are started, and what becomes of them when one fails."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lightning_runs import STEPS, alone
from tests.models import deviation

DOUBLE = 1e-9
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SECONDS_TO_START = 60.0  # to import Lightning twice on a busy machine
SECONDS_TO_END = 40.0  # from the failure to the end of all processes; a time-out would take minutes


def command(out: Path, strategy: str = "kl_shampoo", steps: int = STEPS, **given: Any) -> list[str]:
    trainer = {"strategy": strategy, **given.pop("trainer", {})}
    said = json.dumps({"out": str(out), "steps": steps, "trainer": trainer, **given})
    return ["-m", "tests.lightning_script", said]


def start(arguments: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        arguments,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen, timeout: float = 180) -> str:
    output, _ = process.communicate(timeout=timeout)
    return output


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.parametrize("strategy", ["kl_shampoo", "kl_shampoo_spawn", "kl_shampoo_fsdp2"])
def test_started_by_the_script_itself(tmp_path, strategy):
    process = start([sys.executable, *command(tmp_path, strategy)])
    output = ended(process)
    assert process.returncode == 0, output
    assert deviation(weights_in(tmp_path), alone()) <= DOUBLE
    assert output.count("net.mix.weight") == 1, "the table of routes is shown once, by one rank"


def test_started_by_torchrun_on_two_nodes(tmp_path):
    found = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    nodes = [
        start([*TORCHRUN, *found, f"--node-rank={node}", *command(tmp_path, trainer={"num_nodes": 2, "devices": 1})])
        for node in range(2)
    ]
    outputs = [ended(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert deviation(weights_in(tmp_path), alone()) <= DOUBLE


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


@pytest.mark.parametrize("strategy", ["kl_shampoo", "kl_shampoo_fsdp2"])
def test_started_by_slurm_whose_requeue_signal_on_one_rank_saves_on_all_between_batches(tmp_path, strategy):
    port, bin = free_port(), tmp_path / "bin"
    bin.mkdir()
    (bin / "scontrol").write_text(f"#!/bin/sh\necho requeued >> {tmp_path}/requeued\n")
    (bin / "scontrol").chmod(0o755)
    path = f"{bin}:{os.environ['PATH']}"
    given = {"how": "signal", "rank": 1, "step": 3}
    tasks = [
        start([sys.executable, *command(tmp_path, strategy, **given)], PATH=path, **slurm(task, port))
        for task in range(2)
    ]
    outputs = [ended(task) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists() and (tmp_path / "requeued").read_text() == "requeued\n"
    assert deviation(weights_in(tmp_path), alone()) <= DOUBLE


FAILURES = [
    ("kl_shampoo", "raise", 0),
    ("kl_shampoo", "raise", 1),
    ("kl_shampoo", "kill", 0),
    ("kl_shampoo", "kill", 1),
    ("kl_shampoo_spawn", "raise", 1),
    ("kl_shampoo_fsdp2", "kill", 1),
]


@pytest.mark.parametrize(("strategy", "how", "rank"), FAILURES)
def test_a_rank_that_fails_ends_the_job_on_all(tmp_path, strategy, how, rank):
    """The other rank is busy and would notice minutes later; of one that is killed it learns by a closed connection."""
    asleep = 600 if how == "raise" else 0
    process = start([sys.executable, *command(tmp_path, strategy, how=how, rank=rank, step=3, asleep=asleep)])
    output = ended(process, timeout=SECONDS_TO_START + SECONDS_TO_END)
    assert process.returncode != 0
    if how == "raise":
        assert "ArithmeticError: the original error" in output
    assert not running(process.pid), "no process is left behind"


def running(session: int) -> list[str]:
    """The command lines of the processes of a session, a moment later."""
    deadline = time.monotonic() + SECONDS_TO_END
    found: list[str] = []
    while time.monotonic() < deadline:
        said = subprocess.run(["ps", "-s", str(session), "-o", "stat=,args="], capture_output=True, text=True).stdout
        found = [line for line in said.splitlines() if not line.startswith("Z")]
        if not found:
            break
        time.sleep(0.5)
    return found


def test_under_torchrun_a_rank_that_fails_ends_the_job(tmp_path):
    process = start(
        [*TORCHRUN, "--standalone", "--nproc-per-node=2", *command(tmp_path, how="raise", rank=1, step=3, asleep=600)]
    )
    output = ended(process)
    assert process.returncode != 0 and "the original error" in output
    assert not running(process.pid)


def test_a_checkpoint_after_an_exception_on_one_rank_waits_for_nobody(tmp_path):
    given = {"how": "raise", "rank": 0, "step": 3, "asleep": 600, "saves": True}
    process = start([sys.executable, *command(tmp_path, **given)])
    output = ended(process, timeout=SECONDS_TO_START + SECONDS_TO_END)
    assert process.returncode != 0 and "ArithmeticError: the original error" in output
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["global_step"] == 3 and saved["optimizer_states"] == [{}]
    assert not running(process.pid)
