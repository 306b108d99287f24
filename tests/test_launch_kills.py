"""A run whose processes are killed with -9, in steps and in saves, restarts and ends as if nothing had been."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.test_launch_job import ROOT, SIZES, launch, saved_tensors, workers_of

STEPS = 40
KILLS = 10
RUN = f"{SIZES} --steps {STEPS} --eval-every 20 --checkpoint-every 2 --keep 3 --resume auto"


def newest_step(folder: Path) -> int:
    steps = [int(path.name[5:11]) for path in (folder / "checkpoint").glob("step-??????")]
    return max(steps, default=0)


def wait_for(what, process: subprocess.Popen) -> bool:
    """Whether it came to be before the job ended."""
    while process.poll() is None:
        if what():
            return True
        time.sleep(0.002)
    return False


def test_ten_kills_leave_the_weights_of_an_undisturbed_run(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} times {number} is {number * number}.\n" for number in range(500)))
    calm = launch(2, f"{RUN} --data {text} --out {tmp_path / 'calm'}")
    assert calm.returncode == 0, calm.stderr
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(2 * KILLS), "--monitor-interval", "0.1", "launch/train.py", *RUN.split()]
    chance = random.Random(0)
    kills = []
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            [*command, "--data", str(text), "--out", str(folder)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            for number in range(KILLS):
                reached = newest_step(folder)
                if number % 2:  # in the middle of a save
                    came = wait_for(lambda: list((folder / "checkpoint").glob("*.partial")), process)
                else:  # in the middle of a step, after one more checkpoint at most
                    came = wait_for(lambda reached=reached: newest_step(folder) > reached, process)
                time.sleep(chance.random() * 0.05)
                assert came
                wait_for(lambda: len(workers_of(process.pid)) == 2, process)
                workers = workers_of(process.pid)
                os.kill(chance.choice(workers), signal.SIGKILL)
                kills.append(newest_step(folder))
                wait_for(lambda workers=workers: not set(workers) & set(workers_of(process.pid)), process)
            process.wait(timeout=300)
        finally:
            process.terminate()
    said = (tmp_path / "log").read_text()
    assert process.returncode == 0, said
    assert len(kills) == KILLS, (kills, said)
    assert kills[-1] > 2  # and so each restart went on from a checkpoint
    assert not list(folder.glob("earlier-2"))
    expected, found = saved_tensors(tmp_path / "calm", STEPS), saved_tensors(folder, STEPS)
    assert expected.keys() == found.keys()
    for place, tensor in expected.items():
        assert torch.equal(tensor, found[place]), place
