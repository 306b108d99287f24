"""The training job at tiny sizes: what it computes, what it leaves behind, and how it fails.

On ranks that are there already; with the mark `full` all of it once more in processes that torchrun starts.
"""

import functools
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from launch.endings import NOT_SAVED
from tests.jobs import TORCHRUN, Ended, Start, here, on_ranks, started, text_in
from tests.world import World

STEPS = 6
SIZES = "--layers 1 --width 16 --heads 2 --context 16 --tokens-per-step 192 --warmup 1"
RUN = f"{SIZES} --steps {STEPS} --eval-every 3 --checkpoint-every 3"

# Each optimizer's losses at 1 and at 2 processes agree within this, in float32.
TOLERANCE = {"adamw": 1e-5, "kl_shampoo": 1e-4}

Runner = Callable[..., Path]


def command(processes: int, arguments: str) -> str:
    """The job as one plain process, or under torchrun."""
    return f"{f'{TORCHRUN} {processes} ' if processes > 1 else ''}launch/train.py {arguments}"


@pytest.fixture(scope="module", params=["ranks", pytest.param("processes", marks=pytest.mark.full)])
def launch(request: pytest.FixtureRequest, worlds: dict[int, World]) -> Start:
    """Runs the job to its end."""
    if request.param == "ranks":
        return functools.partial(on_ranks, worlds, "launch.train")
    return lambda processes, arguments: started(command(processes, arguments))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_in(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def trained(launch: Start, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """The folder of a finished run of an optimizer on a number of processes; each is run once and left as it is."""

    @functools.cache
    def run(optimizer: str, processes: int, more: str = "") -> Path:
        folder = tmp_path_factory.mktemp(f"{optimizer}-{processes}")
        done = launch(processes, f"--optimizer {optimizer} {RUN} --data {text} --out {folder} {more}")
        assert done.status == 0, done.stderr
        (folder / "stdout").write_text(done.stdout)
        (folder / "stderr").write_text(done.stderr)
        return folder

    return run


@pytest.fixture(params=TOLERANCE)
def optimizer(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def interrupted(trained: Runner, optimizer: str, tmp_path: Path) -> Path:
    """The folder of a run on four processes that was killed after step 3, in the middle of a later save."""
    folder = tmp_path / "run"
    shutil.copytree(trained(optimizer, 4), folder)
    last = folder / "checkpoint" / f"step-{STEPS:06d}"
    last.rename(last.with_name(f"{last.name}.partial"))
    return folder


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [record[name] for record in records(folder) for name in ("loss", "val_loss") if name in record]


def saved_tensors(folder: Path, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, weights and optimizer state, by place."""
    tensors = {}

    def collect(place: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            tensors[place] = value
        elif isinstance(value, dict | list | tuple):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                collect(f"{place}/{key}", inner)

    whole = folder / "whole.pt"
    dcp_to_torch_save(folder / "checkpoint" / f"step-{steps:06d}", whole)
    collect("", torch.load(whole, weights_only=True))
    assert tensors
    return tensors


def test_one_and_two_processes_train_alike(trained: Runner, optimizer: str) -> None:
    alone, together = losses(trained(optimizer, 1)), losses(trained(optimizer, 2))
    assert together == pytest.approx(alone, rel=TOLERANCE[optimizer])
    assert alone[-1] < alone[0] - 0.05


@pytest.mark.parametrize(
    ("optimizer", "parallel", "processes"),
    [
        ("kl_shampoo", "fsdp", 2),
        ("kl_shampoo", "hsdp", 4),
        ("kl_shampoo", "tp", 2),
        ("kl_shampoo", "fsdp+tp", 4),
        ("adamw", "fsdp+tp", 4),
    ],
)
def test_a_sharded_job_trains_as_one_process_does_and_continues(
    launch: Start, trained: Runner, optimizer: str, parallel: str, processes: int, text: Path, tmp_path: Path
) -> None:
    """Continued from a checkpoint after step 3, with the whole gradient clipped."""
    clipped = "--grad-clip 0.5"
    flags = f"--optimizer {optimizer} {RUN} --data {text} {clipped} --parallel {parallel} --out {tmp_path}"
    done = launch(processes, flags)
    assert done.status == 0, done.stderr
    first = losses(tmp_path)
    assert len(first) == STEPS + 2
    assert first == pytest.approx(losses(trained(optimizer, 1, clipped)), rel=TOLERANCE[optimizer])
    shutil.rmtree(tmp_path / "checkpoint" / f"step-{STEPS:06d}")
    continued = launch(processes, f"{flags} --resume")
    assert continued.status == 0, continued.stderr
    assert losses(tmp_path) == pytest.approx(first, rel=1e-6)


def test_a_run_leaves_metrics_board_picture_and_checkpoint(trained: Runner) -> None:
    folder = trained("adamw", 2)
    assert [record["step"] for record in records(folder)] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records(folder) if "val_loss" in record] == [3, 6]
    times = {f"{what}{clock}seconds" for what in ("", "optimizer_") for clock in ("", "cpu_")}
    assert set(records(folder)[0]) == {"step", "loss", "lr", "tokens", *times}
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events.*"))
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["step-000003", "step-000006"]
    files = {path.name for path in (folder / "checkpoint" / "step-000006").iterdir()}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "run.json"}


def test_a_run_ends_with_plain_words_and_no_warnings(trained: Runner, optimizer: str) -> None:
    folder = trained(optimizer, 2)
    said = (folder / "stdout").read_text()
    files = (str(folder / "loss.png"), str(folder / "metrics.jsonl"))
    for part in (f"with {optimizer} on text.txt", "bits per byte", *files):
        assert part in said
    assert "warn" not in (folder / "stderr").read_text().lower()


def test_a_resumed_run_ends_bit_for_bit_as_one_that_never_stopped(
    launch: Start, trained: Runner, interrupted: Path, optimizer: str, text: Path
) -> None:
    done = launch(4, f"--optimizer {optimizer} {RUN} --data {text} --out {interrupted} --resume")
    assert done.status == 0, done.stderr
    assert losses(interrupted) == losses(trained(optimizer, 4))
    expected, found = saved_tensors(trained(optimizer, 4)), saved_tensors(interrupted)
    assert expected.keys() == found.keys()
    for place, tensor in expected.items():
        assert torch.equal(tensor, found[place]), place


def test_a_run_resumes_at_another_world_size_and_in_another_layout(
    launch: Start, trained: Runner, interrupted: Path, optimizer: str, text: Path
) -> None:
    flags = f"--optimizer {optimizer} {RUN} --data {text} --out {interrupted} --resume auto"
    alone = launch(1, flags)
    assert alone.status == 0, alone.stderr
    expected = losses(trained(optimizer, 4))
    assert losses(interrupted) == pytest.approx(expected, rel=TOLERANCE[optimizer])
    shutil.rmtree(interrupted / "checkpoint" / f"step-{STEPS:06d}")
    sharded = launch(2, f"{flags} --parallel fsdp")
    assert sharded.status == 0, sharded.stderr
    assert losses(interrupted) == pytest.approx(expected, rel=TOLERANCE[optimizer])


@pytest.mark.parametrize("optimizer", ["adamw"], indirect=True)
def test_a_finished_run_that_is_started_again_says_so_and_ends_well(
    launch: Start, trained: Runner, optimizer: str, text: Path, tmp_path: Path
) -> None:
    """It may have been killed after its last checkpoint: then torchrun starts it again."""
    shutil.copytree(trained(optimizer, 4), tmp_path / "run")
    (tmp_path / "run" / "loss.png").unlink()
    done = launch(4, f"--optimizer adamw {RUN} --data {text} --out {tmp_path / 'run'} --resume auto")
    assert done.status == 0, done.stderr
    assert "bits per byte" in done.stdout and (tmp_path / "run" / "loss.png").exists()
    assert len(records(tmp_path / "run")) == STEPS


@pytest.mark.parametrize("optimizer", ["adamw"], indirect=True)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    launch: Start, interrupted: Path, text: Path
) -> None:
    checkpoints = interrupted / "checkpoint"
    shutil.copytree(checkpoints / "step-000003", checkpoints / "step-000005")
    (checkpoints / "step-000005" / "__1_0.distcp").unlink()
    flags = f"--optimizer adamw {RUN} --data {text} --out {interrupted}"
    refused = launch(2, f"{flags} --resume {checkpoints / 'step-000005'}")
    assert refused.status != 0
    assert "step-000005: __1_0.distcp cannot be read" in refused.stderr
    done = launch(4, f"{flags} --resume auto")
    assert done.status == 0, done.stderr
    assert done.stderr.count("step-000005 is passed over: __1_0.distcp cannot be read") == 1
    assert (checkpoints / "abandoned-1" / "step-000005").exists()


def limited(group: dist.ProcessGroup | None, arguments: str) -> Ended:
    """The job where no file may grow beyond a megabyte, which the picture does not and the checkpoints do."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        return here(group, "launch.train", arguments.split())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_full_disk_is_reported_and_training_goes_on(
    processes: int, worlds: dict[int, World], text: Path, tmp_path: Path
) -> None:
    flags = f"{RUN} --width 128 --data {text} --out {tmp_path}"
    ranks = worlds[2].run(limited, 2, flags) if processes == 2 else [limited(None, flags)]
    assert [rank.status for rank in ranks] == [NOT_SAVED] * processes
    assert len(records(tmp_path)) == STEPS
    for step in (3, 6):
        assert f"The checkpoint of step {step} was not written:" in ranks[0].stderr
    assert not any("Traceback" in rank.stderr for rank in ranks)
    assert list((tmp_path / "checkpoint").iterdir()) == []


def test_muon_trains(launch: Start, text: Path, tmp_path: Path) -> None:
    done = launch(1, f"--optimizer muon {RUN} --data {text} --out {tmp_path}")
    assert done.status == 0, done.stderr
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.05
