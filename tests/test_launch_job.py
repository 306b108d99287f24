"""The training job in real processes, at tiny sizes: what it computes, what it leaves behind, and how it fails."""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6
SIZES = "--layers 1 --width 16 --heads 2 --context 16 --tokens-per-step 96 --warmup 1"
RUN = f"{SIZES} --steps {STEPS} --eval-every 3 --checkpoint-every 3"

# Each optimizer's losses at 1 and at 2 processes agree within this, in float32.
TOLERANCE = {"adamw": 1e-5, "kl_shampoo": 1e-4}

Runner = Callable[[str, int], Path]


def launch(processes: int, arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the job to its end, as one plain process or under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), "launch/train.py", *arguments.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            stdout, stderr = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            # Asked to end, torchrun ends its workers too; killed, it would leave them behind.
            process.terminate()
            pytest.fail(f"the job hangs:\n{process.communicate()[1]}")
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text with something to learn in it."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{number} times {number} is {number * number}.\n" for number in range(500)))
    return path


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """The folder of a finished run of an optimizer on a number of processes; each is run once and left as it is."""

    @functools.cache
    def run(optimizer: str, processes: int) -> Path:
        folder = tmp_path_factory.mktemp(f"{optimizer}-{processes}")
        done = launch(processes, f"--optimizer {optimizer} {RUN} --data {text} --out {folder}")
        assert done.returncode == 0, done.stderr
        (folder / "stdout").write_text(done.stdout)
        (folder / "stderr").write_text(done.stderr)
        return folder

    yield run


@pytest.fixture(params=TOLERANCE)
def optimizer(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def interrupted(trained: Runner, optimizer: str, tmp_path: Path) -> Path:
    """The folder of a run on three processes that was killed after step 3, in the middle of a later save."""
    folder = tmp_path / "run"
    shutil.copytree(trained(optimizer, 3), folder)
    last = folder / "checkpoint" / f"step-{STEPS:06d}"
    last.rename(last.with_name(f"{last.name}.partial"))
    return folder


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [record[name] for record in records(folder) for name in ("loss", "val_loss") if name in record]


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, weights and all ranks' optimizer state, by file and place."""
    tensors = {}

    def collect(place: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            tensors[place] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{place}/{key}", inner)
        elif isinstance(value, list | tuple):
            for key, inner in enumerate(value):
                collect(f"{place}/{key}", inner)

    for path in sorted((folder / "checkpoint" / f"step-{STEPS:06d}").iterdir()):
        collect(path.name, torch.load(path, weights_only=True))
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
    optimizer: str, parallel: str, processes: int, text: Path, tmp_path: Path
) -> None:
    """Continued from a checkpoint after step 3, with the whole gradient clipped."""
    flags = f"--optimizer {optimizer} {RUN} --tokens-per-step 64 --data {text} --grad-clip 0.5"
    alone = launch(1, f"{flags} --out {tmp_path / 'alone'}")
    flags += f" --parallel {parallel} --out {tmp_path / 'sharded'}"
    started = launch(processes, flags)
    assert alone.returncode == started.returncode == 0, alone.stderr + started.stderr
    first = losses(tmp_path / "sharded")
    assert first == pytest.approx(losses(tmp_path / "alone"), rel=TOLERANCE[optimizer])
    shutil.rmtree(tmp_path / "sharded" / "checkpoint" / f"step-{STEPS:06d}")
    continued = launch(processes, f"{flags} --resume")
    assert continued.returncode == 0, continued.stderr
    assert losses(tmp_path / "sharded") == pytest.approx(first, rel=1e-6)


def test_a_run_leaves_metrics_board_picture_and_checkpoint(trained: Runner) -> None:
    folder = trained("adamw", 2)
    assert [record["step"] for record in records(folder)] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records(folder) if "val_loss" in record] == [3, 6]
    times = {f"{what}{clock}seconds" for what in ("", "optimizer_") for clock in ("", "cpu_")}
    assert set(records(folder)[0]) == {"step", "loss", "lr", "tokens", *times}
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events.*"))
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["step-000003", "step-000006"]
    assert sorted(path.name for path in (folder / "checkpoint" / "step-000006").iterdir()) == [
        "model.pt",
        "optimizer-rank0-of-2.pt",
        "optimizer-rank1-of-2.pt",
    ]


def test_a_run_ends_with_plain_words_and_no_warnings(trained: Runner, optimizer: str) -> None:
    folder = trained(optimizer, 2)
    said = (folder / "stdout").read_text()
    files = (str(folder / "loss.png"), str(folder / "metrics.jsonl"))
    for part in (f"with {optimizer} on text.txt", "bits per byte", *files):
        assert part in said
    assert "warn" not in (folder / "stderr").read_text().lower()


def test_a_resumed_run_ends_bit_for_bit_as_one_that_never_stopped(
    trained: Runner, interrupted: Path, optimizer: str, text: Path
) -> None:
    done = launch(3, f"--optimizer {optimizer} {RUN} --data {text} --out {interrupted} --resume")
    assert done.returncode == 0, done.stderr
    assert losses(interrupted) == losses(trained(optimizer, 3))
    expected, found = saved_tensors(trained(optimizer, 3)), saved_tensors(interrupted)
    assert expected.keys() == found.keys()
    for place, tensor in expected.items():
        assert torch.equal(tensor, found[place]), place


@pytest.mark.parametrize("optimizer", ["adamw"], indirect=True)
def test_a_resume_at_another_world_size_is_refused_by_both_sizes(interrupted: Path, text: Path) -> None:
    done = launch(1, f"--optimizer adamw {RUN} --data {text} --out {interrupted} --resume")
    assert done.returncode == 2
    assert "saved by 3 processes and this job has 1" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("optimizer", ["adamw"], indirect=True)
def test_a_rank_that_fails_ends_the_job(interrupted: Path, text: Path) -> None:
    (interrupted / "checkpoint" / "step-000003" / "optimizer-rank1-of-3.pt").unlink()
    done = launch(3, f"--optimizer adamw {RUN} --data {text} --out {interrupted} --resume")
    assert done.returncode != 0
    assert "optimizer-rank1-of-3.pt" in done.stderr


def test_muon_trains(text: Path, tmp_path: Path) -> None:
    done = launch(1, f"--optimizer muon {RUN} --data {text} --out {tmp_path}")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.05
