"""The script for a machine with a GPU runs, in miniature, where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import QUIET, ROOT, SECONDS
from tests.world import patience


@pytest.mark.full
def test_every_part_of_the_gpu_script_runs_in_miniature(tmp_path: Path) -> None:
    environment = {**os.environ, **QUIET, "OUT": str(tmp_path), "PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        ["launch/gpu.sh", "--small"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3 * SECONDS * patience(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ddp, 1 processes, 8 steps: validation loss") == 2, "the Trainer has not gone on"
    for name in ("step-gpu.jsonl", "refresh-gpu.jsonl", "text-gpu.jsonl"):
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert len(lines) >= 2 and all("error" not in line for line in lines)
