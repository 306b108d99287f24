"""The training job in real processes, at tiny sizes: what it computes, what it leaves behind, and how it fails."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6
SIZES = "--layers 1 --width 16 --heads 2 --context 16 --tokens-per-step 96 --warmup 1"
RUN = f"{SIZES} --steps {STEPS} --eval-every 3 --checkpoint-every 3"

# Each optimizer's losses at 1 and at 2 processes agree within this, in float32.
TOLERANCE = {"adamw": 1e-5, "kl_shampoo": 1e-4}

Runner = Callable[[str, int], Path]


def workers_of(pid: int) -> list[int]:
    """The live processes that a process has started: torchrun's workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


def launch(
    processes: int, arguments: str, meanwhile: Callable[[subprocess.Popen[str]], None] = lambda _: None
) -> subprocess.CompletedProcess[str]:
    """Run the job to its end, as one plain process or under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), "launch/train.py", *arguments.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            meanwhile(process)
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
    trained: Runner, interrupted: Path, optimizer: str, text: Path
) -> None:
    done = launch(3, f"--optimizer {optimizer} {RUN} --data {text} --out {interrupted} --resume")
    assert done.returncode == 0, done.stderr
    assert losses(interrupted) == losses(trained(optimizer, 3))
    expected, found = saved_tensors(trained(optimizer, 3)), saved_tensors(interrupted)
    assert expected.keys() == found.keys()
    for place, tensor in expected.items():
        assert torch.equal(tensor, found[place]), place


def test_a_run_resumes_at_another_world_size_and_in_another_layout(
    trained: Runner, interrupted: Path, optimizer: str, text: Path
) -> None:
    flags = f"--optimizer {optimizer} {RUN} --data {text} --out {interrupted} --resume auto"
    alone = launch(1, flags)
    assert alone.returncode == 0, alone.stderr
    expected = losses(trained(optimizer, 3))
    assert losses(interrupted) == pytest.approx(expected, rel=TOLERANCE[optimizer])
    shutil.rmtree(interrupted / "checkpoint" / f"step-{STEPS:06d}")
    sharded = launch(2, f"{flags} --parallel fsdp")
    assert sharded.returncode == 0, sharded.stderr
    assert losses(interrupted) == pytest.approx(expected, rel=TOLERANCE[optimizer])


@pytest.mark.parametrize("optimizer", ["adamw"], indirect=True)
def test_a_finished_run_that_is_started_again_says_so_and_ends_well(
    trained: Runner, optimizer: str, text: Path, tmp_path: Path
) -> None:
    """It may have been killed after its last checkpoint: then torchrun starts it again."""
    shutil.copytree(trained(optimizer, 3), tmp_path / "run")
    (tmp_path / "run" / "loss.png").unlink()
    done = launch(3, f"--optimizer adamw {RUN} --data {text} --out {tmp_path / 'run'} --resume auto")
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and (tmp_path / "run" / "loss.png").exists()
    assert len(records(tmp_path / "run")) == STEPS


@pytest.mark.parametrize("optimizer", ["adamw"], indirect=True)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(interrupted: Path, text: Path) -> None:
    checkpoints = interrupted / "checkpoint"
    shutil.copytree(checkpoints / "step-000003", checkpoints / "step-000005")
    (checkpoints / "step-000005" / "__1_0.distcp").unlink()
    flags = f"--optimizer adamw {RUN} --data {text} --out {interrupted}"
    refused = launch(2, f"{flags} --resume {checkpoints / 'step-000005'}")
    assert refused.returncode != 0
    assert "step-000005: __1_0.distcp cannot be read" in refused.stderr
    done = launch(3, f"{flags} --resume auto")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step-000005 is passed over: __1_0.distcp cannot be read") == 1
    assert (checkpoints / "abandoned-1" / "step-000005").exists()


@pytest.mark.parametrize(("processes", "sent"), [(1, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_a_signal_saves_and_stops_between_two_steps(processes: int, sent: signal.Signals, text: Path, tmp_path: Path):
    """Sent to one process only; all stop after the same step, and the run goes on from there."""
    flags = f"{SIZES} --eval-every 1000 --data {text} --out {tmp_path}"

    def interrupt(process: subprocess.Popen[str]) -> None:
        metrics = tmp_path / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") > 2):
            time.sleep(0.02)
        os.kill(process.pid if processes == 1 else workers_of(process.pid)[-1], sent)

    stopped = launch(processes, f"{flags} --steps 100000", interrupt)
    assert stopped.returncode == 0, stopped.stderr
    done = len(records(tmp_path))
    assert f"Stopped after step {done}, as a signal asked" in stopped.stdout
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == [f"step-{done:06d}"]
    resumed = launch(processes, f"{flags} --steps {done + 2} --resume")
    assert resumed.returncode == 0, resumed.stderr
    assert len(records(tmp_path)) == done + 2


def test_a_full_disk_is_reported_and_training_goes_on(text: Path, tmp_path: Path) -> None:
    """No file may grow beyond a megabyte here, which the picture does not and the checkpoints do."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({1 << 20},) * 2); import sys, runpy; "
    start = f"{limit}sys.argv[0] = 'launch/train.py'; runpy.run_path('launch/train.py', run_name='__main__')"
    flags = f"{RUN} --width 128 --data {text} --out {tmp_path}"
    done = subprocess.run([sys.executable, "-c", start, *flags.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(records(tmp_path)) == STEPS
    for step in (3, 6):
        assert f"The checkpoint of step {step} was not written:" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "checkpoint").iterdir()) == []


def test_muon_trains(text: Path, tmp_path: Path) -> None:
    done = launch(1, f"--optimizer muon {RUN} --data {text} --out {tmp_path}")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.05
