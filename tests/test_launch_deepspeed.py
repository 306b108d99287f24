"""`launch/train_deepspeed.py` trains at every ZeRO stage alike, and goes on from where it stopped."""

import functools
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from kl_dist.cli import report
from tests.jobs import ROOT, TORCHRUN, Start, begun, board_of, ended, free_port, on_ranks, started, text_in, workers_of
from tests.test_launch_job import losses, records
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
    assert [record["step"] for record in records(tmp_path / "halves")] == list(range(1, 9))
    page = report.write(tmp_path / "halves").read_text()
    assert "Loss over seconds" in page and "Spectra" in page and "blocks.0.attention.qkv.weight" in page
    done = launch(2, flags(tmp_path / "halves", text, 3, "--steps 8 --resume true"))
    assert done.status == 2 and "at step 8 of --steps 8 already; there is nothing left to do" in done.stderr


def test_it_records_and_shows_what_the_job_without_deepspeed_does(
    worlds: dict[int, World], tmp_path: Path, text: Path
) -> None:
    done = on_ranks(worlds, "launch.train_deepspeed", 2, flags(tmp_path / "2", text, 2, "--steps 6 --eval_every 3"))
    assert done.status == 0, done.stderr
    given = f"--data {text} {SIZES} --tokens-per-step 512 --steps 6 --eval-every 3"
    done = on_ranks(worlds, "launch.train", 2, f"{given} --out {tmp_path / 'plain'}")
    assert done.status == 0, done.stderr
    found, plain = records(tmp_path / "2"), records(tmp_path / "plain")
    for one, other in zip(found, plain, strict=True):
        assert one.keys() == {key for key in other if "cpu" not in key}
        assert one["tokens"] == other["tokens"] and 0 < one["optimizer_seconds"] < one["seconds"]
    said, wanted = (of[-1]["optimizer"] for of in (found, plain))
    assert said.keys() == wanted.keys() and said["matrices"].keys() == wanted["matrices"].keys()
    for name, numbers in said["matrices"].items():
        assert numbers.keys() == wanted["matrices"][name].keys()
    boards = [board_of(tmp_path / name) for name in ("2", "plain")]
    assert boards[0].keys() == boards[1].keys()
    tag = f"kl_shampoo/matrices/{next(iter(said['matrices']))}/eigenvalues.1/q50"
    assert list(boards[0][tag]) == list(boards[1]["val_loss"]) == [3, 6] and list(boards[0]["loss"]) == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_a_run_in_the_folder_of_another_moves_its_record_aside(
    worlds: dict[int, World], tmp_path: Path, text: Path
) -> None:
    for number in range(2):
        done = on_ranks(worlds, "launch.train_deepspeed", 2, flags(tmp_path / "run", text, 1, "--steps 2"))
        assert done.status == 0, done.stderr
        assert ("are now in" in done.stdout) == (number == 1)
    assert len(records(tmp_path / "run")) == len(records(tmp_path / "run/earlier-1")) == 2


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
        assert wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and records(tmp_path), process.process)
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
