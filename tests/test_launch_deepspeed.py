"""`launch/train_deepspeed.py` trains at every ZeRO stage alike, and goes on from where it stopped."""

import functools
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.jobs import ROOT, TORCHRUN, Start, begun, ended, free_port, on_ranks, started, text_in, workers_of
from tests.test_launch_kills import wait_for
from tests.world import World, patience

SCRIPT = "launch/train_deepspeed.py"
SIZES = "--layers 1 --width 32 --heads 2 --context 32"


@pytest.fixture(scope="module", params=["ranks", pytest.param("processes", marks=pytest.mark.full)])
def launch(request: pytest.FixtureRequest, worlds: dict[int, World]) -> Start:
    """Runs the job to its end, on ranks that are there already or in processes that torchrun starts."""
    if request.param == "ranks":
        return functools.partial(on_ranks, worlds, "launch.train_deepspeed")
    return lambda processes, arguments: started(f"{TORCHRUN} {processes} {SCRIPT} {arguments}")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_in(tmp_path_factory.mktemp("text"))


def flags(folder: Path, text: Path, config: int | Path, more: str = "") -> str:
    file = config if isinstance(config, Path) else f"launch/configs/zero{config}.json"
    return f"--deepspeed_config {file} --out {folder} --data {text} {SIZES} {more}"


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record.get("loss", record.get("val_loss")) for record in map(json.loads, lines)]


def test_stages_train_alike_and_one_goes_on_from_its_checkpoint(launch: Start, tmp_path: Path, text: Path) -> None:
    for stage in (1, 3):
        done = launch(2, flags(tmp_path / f"whole{stage}", text, stage, "--steps 8"))
        assert done.status == 0, done.stderr
        assert f"ZeRO {stage}, 2 processes" in done.stdout
    expected = losses(tmp_path / "whole1")
    assert len(expected) == 9 and losses(tmp_path / "whole3") == pytest.approx(expected, rel=1e-4)
    for more in ("--steps 4", "--steps 8 --resume true"):
        done = launch(2, flags(tmp_path / "halves", text, 3, more))
        assert done.status == 0, done.stderr
    found = losses(tmp_path / "halves")
    assert found[:4] + found[5:] == losses(tmp_path / "whole3")


def test_the_deepspeed_launcher_starts_the_same_training(worlds: dict[int, World], tmp_path: Path, text: Path) -> None:
    launcher = f"-m deepspeed.launcher.runner --num_gpus 2 --master_port {free_port()}"
    done = started(f"{launcher} {SCRIPT} {flags(tmp_path / 'started', text, 2, '--steps 4')}")
    assert done.status == 0, done.stderr
    assert "ZeRO 2, 2 processes, 4 steps" in done.stdout
    here = on_ranks(worlds, "launch.train_deepspeed", 2, flags(tmp_path / "here", text, 2, "--steps 4"))
    assert here.status == 0, here.stderr
    assert len(losses(tmp_path / "here")) == 5 and losses(tmp_path / "started") == losses(tmp_path / "here")


@pytest.mark.full
def test_a_rank_that_is_stopped_is_named_and_ends_the_job(tmp_path: Path, text: Path) -> None:
    job = f"{SCRIPT} {flags(tmp_path, text, 2, '--steps 100000')} --patience {3 * patience()}"
    with begun(f"{TORCHRUN} 2 {job}") as process:
        assert wait_for(lambda: (tmp_path / "metrics.jsonl").exists(), process.process)
        time.sleep(patience())
        os.kill(workers_of(process.process.pid)[1], signal.SIGSTOP)
        done = ended(process)
    assert done.status != 0
    assert re.search(r"rank 1 \(.*, pid \d+, step \d+\) has not been heard of since", done.stderr), done.stderr


def test_a_loss_that_is_not_finite_ends_the_job_with_its_own_status(
    worlds: dict[int, World], tmp_path: Path, text: Path
) -> None:
    config = json.loads((ROOT / "launch/configs/zero1.json").read_text())
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e30, "torch_adam": True}}
    (tmp_path / "wild.json").write_text(json.dumps(config))
    done = on_ranks(worlds, "launch.train_deepspeed", 2, flags(tmp_path, text, tmp_path / "wild.json", "--steps 40"))
    assert done.status == 3 and "The loss is nan at step" in done.stderr, done.stderr


def test_a_batch_that_does_not_divide_is_refused(launch: Start, tmp_path: Path, text: Path) -> None:
    config = json.loads((ROOT / "launch/configs/zero1.json").read_text()) | {"train_batch_size": 15}
    (tmp_path / "odd.json").write_text(json.dumps(config))
    done = launch(2, flags(tmp_path, text, tmp_path / "odd.json"))
    assert done.status != 0 and "error: train_batch_size 15" in done.stderr
    assert "must divide over 2 ranks" in done.stderr
