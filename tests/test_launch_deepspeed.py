"""`launch/train_deepspeed.py` trains at every ZeRO stage alike, and goes on from where it stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SIZES = "--layers 1 --width 32 --heads 2 --context 32"


def launch(folder: Path, text: Path, stage: int, more: str) -> subprocess.CompletedProcess:
    config = f"launch/configs/zero{stage}.json"
    arguments = f"--deepspeed_config {config} --out {folder} --data {text} {SIZES} {more}"
    return subprocess.run(
        [*TORCHRUN, "launch/train_deepspeed.py", *arguments.split()],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record.get("loss", record.get("val_loss")) for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{number} times {number} is {number * number}.\n" for number in range(500)))
    return path


def test_stages_train_alike_and_one_goes_on_from_its_checkpoint(tmp_path, text):
    for stage in (1, 3):
        done = launch(tmp_path / f"whole{stage}", text, stage, "--steps 8")
        assert done.returncode == 0, done.stderr
        assert f"ZeRO {stage}, 2 processes" in done.stdout
    expected = losses(tmp_path / "whole1")
    assert len(expected) == 9 and losses(tmp_path / "whole3") == pytest.approx(expected, rel=1e-4)
    for more in ("--steps 4", "--steps 8 --resume true"):
        done = launch(tmp_path / "halves", text, 3, more)
        assert done.returncode == 0, done.stderr
    found = losses(tmp_path / "halves")
    assert found[:4] + found[5:] == losses(tmp_path / "whole3")


def test_a_batch_that_does_not_divide_is_refused(tmp_path, text):
    config = json.loads((ROOT / "launch/configs/zero1.json").read_text()) | {"train_batch_size": 15}
    (tmp_path / "odd.json").write_text(json.dumps(config))
    done = launch(tmp_path, text, 1, f"--deepspeed_config {tmp_path / 'odd.json'}")
    assert done.returncode != 0 and "15" in done.stderr and "must divide over 2 ranks" in done.stderr
