"""How a job ends: its status, one line of words, and what is on the disk then."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from launch import train
from launch.endings import DIVERGED, DONE, NOT_SAVED, USAGE
from launch.metrics import Log
from tests.jobs import ROOT, Ended, here, on_ranks, text_in
from tests.test_launch_job import SIZES, records
from tests.world import World, patience


@pytest.fixture
def flags(tmp_path: Path) -> str:
    return f"{SIZES} --eval-every 1000 --data {text_in(tmp_path)}"


# -- a loss that is not finite ----------------------------------------------------------------------------------------


def bad_from(group: dist.ProcessGroup, arguments: str, first: int, steps: int) -> Ended:
    """The job, whose loss is NaN from a step on, for some steps."""
    real = train.Job.train_step

    def train_step(job: train.Job, step: int) -> dict[str, Any]:
        return real(job, step) | ({"loss": float("nan")} if first <= step < first + steps else {})

    with mock.patch.object(train.Job, "train_step", train_step):
        return here(group, "launch.train", arguments.split())


def test_ten_steps_without_a_finite_loss_end_the_run_and_the_last_good_checkpoint_is_named(
    worlds: dict[int, World], flags: str, tmp_path: Path
) -> None:
    """Step 7's loss is the first that is bad, so the weights after step 6 are: good are those after step 5."""
    ranks = worlds[2].run(bad_from, 2, f"{flags} --steps 40 --checkpoint-every 1 --out {tmp_path}", 7, 40)
    assert [rank.status for rank in ranks] == [DIVERGED] * 2
    assert "The loss is nan after step 16" in ranks[0].stderr
    assert ranks[0].stderr.strip().endswith(f"The last good checkpoint is {tmp_path / 'checkpoint/step-000005'}")
    assert max(path.name for path in (tmp_path / "checkpoint").iterdir()) == "step-000006"
    assert len(records(tmp_path)) == 16


def test_nine_of_them_do_not(worlds: dict[int, World], flags: str, tmp_path: Path) -> None:
    ranks = worlds[2].run(bad_from, 2, f"{flags} --steps 17 --out {tmp_path}", 7, 9)
    assert [rank.status for rank in ranks] == [DONE] * 2


def test_a_rate_without_measure_ends_with_the_status_of_divergence(
    worlds: dict[int, World], flags: str, tmp_path: Path
) -> None:
    done = on_ranks(worlds, "launch.train", 2, f"{flags} --optimizer adamw --lr 1e30 --steps 30 --out {tmp_path}")
    assert done.status == DIVERGED, done.stderr
    assert "and there is no earlier checkpoint" in done.stderr and "Traceback" not in done.stderr


# -- disks ------------------------------------------------------------------------------------------------------------


OUTS: dict[str, Callable[[Path], object]] = {
    "a file": lambda out: out.write_text("something"),
    "a dangling link": lambda out: out.symlink_to("nowhere/at/all"),
    "in a file": lambda out: out.parent.write_text("something"),
}


@pytest.mark.parametrize("name", OUTS)
def test_a_folder_that_cannot_be_made_is_refused_by_all_in_one_line(
    name: str, worlds: dict[int, World], flags: str, tmp_path: Path
) -> None:
    out = tmp_path / "parent/out" if name == "in a file" else tmp_path / "out"
    OUTS[name](out)
    ranks = worlds[2].run(here, 2, "launch.train", f"{flags} --steps 3 --out {out}".split())
    assert [rank.status for rank in ranks] == [USAGE] * 2
    assert ranks[0].stderr.count("\n") == 1 and f"error: --out {out} cannot be written" in ranks[0].stderr


def losing_its_folder(group: dist.ProcessGroup, arguments: str, out: str) -> Ended:
    """The job, whose folder is deleted within its third step."""
    real = train.Job.train_step

    def train_step(job: train.Job, step: int) -> dict[str, Any]:
        if step == 3 and job.ranks.first:
            shutil.rmtree(out)
        return real(job, step)

    with mock.patch.object(train.Job, "train_step", train_step):
        return here(group, "launch.train", arguments.split())


def test_a_folder_that_is_deleted_meanwhile_is_made_anew_with_all_records(
    worlds: dict[int, World], flags: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ranks = worlds[2].run(losing_its_folder, 2, f"{flags} --steps 5 --out {out}", str(out))
    assert [rank.status for rank in ranks] == [DONE] * 2, ranks[0].stderr
    assert [record["step"] for record in records(out)] == [1, 2, 3, 4, 5]
    assert (out / "checkpoint/step-000005").exists() and (out / "loss.png").exists()


def record_of(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, "lr": 1.0, "tokens": step, "seconds": 1.0, "optimizer_seconds": 1.0}


def test_lines_that_find_no_room_are_written_when_there_is_some(tmp_path: Path, capfd: Any) -> None:
    """By a limit on the size of files, within a line."""
    whole = sum(len(json.dumps(record_of(step))) + 1 for step in range(1, 6))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Log(tmp_path, 9, 0) as log:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (whole - 20, before[1]))
            for step in range(1, 8):
                log.record(record_of(step))
            assert (tmp_path / "metrics.jsonl").stat().st_size == whole - 20
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        log.record(record_of(8))
        assert [record["step"] for record in records(tmp_path)] == list(range(1, 9))
    assert capfd.readouterr().err.count("metrics.jsonl could not be written: File too large") == 1


def test_a_run_goes_on_from_a_record_whose_last_line_was_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record_of(1)) + '\n{"step": 2, "lo')
    with Log(tmp_path, 9, 2) as log:
        assert [record["step"] for record in log.records] == [1]


@pytest.mark.full
@pytest.mark.skipif(shutil.which("unshare") is None or os.getuid() != 0, reason="mounting takes root")
def test_a_disk_that_is_full_is_told_of_and_the_run_ends_with_its_own_status(flags: str, tmp_path: Path) -> None:
    """A real one, of 64 KB: room for the beginning of TensorBoard's file and of the metrics, not for a checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    job = f"{sys.executable} launch/train.py {flags} --steps 400 --checkpoint-every 100 --out {disk}/out"
    mounted = f"mount -t tmpfs -o size=64k none {disk} && {job}; echo status $?; cat {disk}/out/metrics.jsonl | wc -l"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mounted],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120 * patience(),
    )
    assert f"status {NOT_SAVED}" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    assert "The checkpoint of step 100 was not written" in done.stderr and "No space left on device" in done.stderr
    assert "Step 400 was reached, and its checkpoint was not written" in done.stderr.strip().splitlines()[-1]


# -- signals ----------------------------------------------------------------------------------------------------------


def asked_at_the_start(group: dist.ProcessGroup, arguments: str) -> Ended:
    """The job, of which the last rank gets SIGTERM while it makes its model."""
    real = train.Job.build

    def build(options: Any) -> Any:
        if group.rank() == group.size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(options)

    with mock.patch.object(train.Job, "build", staticmethod(build)):
        return here(group, "launch.train", arguments.split())


def test_a_signal_while_the_ranks_start_ends_all_before_the_first_step(
    worlds: dict[int, World], flags: str, tmp_path: Path
) -> None:
    ranks = worlds[2].run(asked_at_the_start, 2, f"{flags} --steps 1000 --out {tmp_path / 'out'}")
    assert [rank.status for rank in ranks] == [DONE] * 2
    assert "Stopped before step 1, as a signal asked" in ranks[0].stdout
    assert not (tmp_path / "out/metrics.jsonl").exists()
