"""Jobs on several hosts, each with its own network: they find each other, train as one process does, and end in words
when one of them is lost.
"""

import contextlib
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launch.endings import LOST
from launch.model import GPT
from tests.hosts import Hosts, address, descendants, why_not
from tests.jobs import ROOT, TORCHRUN, Begun, Ended, ended, on_ranks, started, text_in
from tests.models import Weights, deviation, same_bits
from tests.test_launch_job import losses, records, saved_tensors
from tests.test_launch_kills import newest_step, wait_for
from tests.world import World, patience

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
slow = pytest.mark.slow

STEPS = 6
SIZES = "--layers 1 --width 16 --heads 2 --context 16"
PLAIN = f"launch/train.py {SIZES} --tokens-per-step 192 --warmup 1 --eval-every 3"
SIX = f"{PLAIN} --steps {STEPS}"
LONG = f"{PLAIN} --steps 100000 --checkpoint-every 10 --keep 3"
SOON = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
TOLERANCE = 1e-4  # of one process against several, in float32: as in test_launch_job.py


def words(host: int, job: str, hosts: int | str = 2, head: str = "host0", **options: object) -> list[str]:
    """What is said on a host."""
    given = {
        "nodes": hosts,
        "node-rank": host,
        "head": head,
        "nproc-per-node": 1,
        "timeout": math.ceil(60 * patience()),
    }
    given |= {name.replace("_", "-"): value for name, value in options.items()}
    said = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return [f"{ROOT}/launch/multinode.sh", *said, "--", *job.split()]


@contextlib.contextmanager
def on_all(hosts: Hosts, job: str, **options: object) -> Iterator[list[Begun]]:
    with contextlib.ExitStack() as stack:
        said = [words(host, job, hosts.count, **options) for host in range(hosts.count)]
        yield [stack.enter_context(hosts.begun(host, line, **SOON)) for host, line in enumerate(said)]


def ran(hosts: Hosts, job: str, **options: object) -> list[Ended]:
    """A job on all hosts, to its end."""
    with on_all(hosts, job, **options) as jobs:
        return [ended(one) for one in jobs]


def weights_in(saved: Weights) -> Weights:
    found = {place: tensor for place, tensor in saved.items() if place.startswith("/model/")}
    assert found
    return found


def last_line(done: Ended) -> str:
    return done.stderr.strip().splitlines()[-1]


def test_the_interface_is_found_where_a_name_is_a_loopback_address_to_its_own_host() -> None:
    with Hosts(2) as hosts, contextlib.ExitStack() as stack:
        said = [[f"{ROOT}/launch/multinode.sh", "--dry-run", *words(host, "x.py")[1:]] for host in range(2)]
        done = [ended(stack.enter_context(hosts.begun(host, line))) for host, line in enumerate(said)]
    for host, one in enumerate(done):
        assert one.status == 0, one.stderr
        assert f"address {address(host)}, interface eth7 (GLOO eth7, NCCL eth7)" in one.stdout
        assert f"--rdzv-endpoint {address(0)}:29400" in one.stdout and f"is_host={1 - host}" in one.stdout


def test_a_wrong_address_and_a_name_that_nobody_knows_are_one_line_on_each_host() -> None:
    cases = {(0, address(8)): "is no address of this host", (1, address(8)): "is the address right, the host up"}
    cases |= {(host, "nobody"): "is not known here" for host in range(2)}
    with Hosts(2) as hosts, contextlib.ExitStack() as stack:
        said = [(host, words(host, "x.py", head=head, timeout=2)) for host, head in cases]
        begun = [stack.enter_context(hosts.begun(*one)) for one in said]
        done = [ended(job) for job in begun]
    for one, expected in zip(done, cases.values(), strict=True):
        assert one.status == 2 and one.stderr.count("\n") == 1 and expected in one.stderr, one.stderr


def test_a_host_that_does_not_come_is_named_within_the_timeout() -> None:
    with Hosts(2) as hosts, hosts.begun(0, words(0, SIX, timeout=4)) as job:
        done = ended(job)
    assert done.status == 1 and last_line(done) == "host 1 of 2 did not come within 4 s"


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=slow)])
def test_hosts_train_as_processes_of_one_do_and_as_a_single_one(
    count: int, worlds: dict[int, World], tmp_path: Path
) -> None:
    job = f"{SIX} --data {text_in(tmp_path)} --out {tmp_path}"
    for processes in (1, count):
        done = on_ranks(worlds, "launch.train", processes, f"{job}/{processes}".removeprefix("launch/train.py "))
        assert done.status == 0, done.stderr
    with Hosts(count) as hosts:
        ends = ran(hosts, f"{job}/hosts", logs=tmp_path / "logs")
    assert [end.status for end in ends] == [0] * count, ends
    assert f"{count} processes" in "".join(end.stdout for end in ends)
    assert losses(tmp_path / "hosts") == pytest.approx(losses(tmp_path / "1"), rel=TOLERANCE)
    alone, found, together = (saved_tensors(tmp_path / name, STEPS) for name in ("1", "hosts", str(count)))
    assert same_bits(found, together)
    assert deviation(weights_in(found), weights_in(alone)) < 1e-3
    logs = sorted(path.relative_to(tmp_path / "logs").parts[0] for path in (tmp_path / "logs").rglob("stdout.log"))
    assert logs == [f"host{host}" for host in range(count)]


@slow
def test_a_link_with_delay_and_loss_changes_no_bit(worlds: dict[int, World], tmp_path: Path) -> None:
    """30 ms each way, one frame of a hundred lost."""
    job = f"{SIX} --data {text_in(tmp_path)} --out {tmp_path}"
    done = on_ranks(worlds, "launch.train", 2, f"{job}/2".removeprefix("launch/train.py "))
    assert done.status == 0, done.stderr
    with Hosts(2, delay=0.03, loss=0.01) as hosts:
        assert [end.status for end in ran(hosts, f"{job}/hosts")] == [0, 0]
    assert same_bits(saved_tensors(tmp_path / "hosts", STEPS), saved_tensors(tmp_path / "2", STEPS))


@slow
@pytest.mark.parametrize("library", ["lightning", "deepspeed"])
def test_two_hosts_train_as_one_process_by_a_library(library: str, worlds: dict[int, World], tmp_path: Path) -> None:
    """To the last bit as two processes of one host do. As one process, in float64 under Lightning, to 1e-9.

    DeepSpeed has no float64: there gradients that are summed in another order, by rounding of 6e-8, come to 1e-5 of the
    way that a weight has gone in these four steps; the limit is ten times that.
    """
    text = text_in(tmp_path)

    def job(name: str, hosts: int, devices: int = 1) -> str:
        out = tmp_path / name
        if library == "deepspeed":
            return f"{SIZES} --deepspeed_config launch/configs/zero2.json --steps 4 --data {text} --out {out}"
        sizes = SIZES.replace("--", "--model.").replace("model.context", "data.context")
        trainer = f"accelerator cpu devices {devices} num_nodes {hosts} strategy kl_shampoo max_steps 4"
        trainer += f" precision 64-true log_every_n_steps 1 default_root_dir {out}"
        trainer += f" logger CSVLogger logger.save_dir {out}"
        pairs = zip(trainer.split()[::2], trainer.split()[1::2], strict=True)
        given = " ".join(f"--trainer.{name} {value}" for name, value in pairs)
        return f"fit {sizes} {given} --data.steps 4 --data.file {text}"

    launcher = f"{TORCHRUN} 1 " if library == "deepspeed" else ""
    alone = started(f"{launcher}launch/train_{library}.py {job('alone', 1)}")
    assert alone.status == 0, alone.stderr
    together = on_ranks(worlds, f"launch.train_{library}", 2, job("together", 1, devices=2))
    assert together.status == 0, together.stderr
    with Hosts(2) as hosts:
        ends = ran(hosts, f"launch/train_{library}.py {job('hosts', 2)}")
    assert [end.status for end in ends] == [0, 0], ends
    found, expected = (measured(tmp_path / name, library) for name in ("hosts", "alone"))
    assert len(found) == 5 and found == pytest.approx(expected, rel=TOLERANCE)
    weights, of_one_host, of_one_process = (
        weights_of_library(tmp_path / name, library) for name in ("hosts", "together", "alone")
    )
    assert same_bits(weights, of_one_host)
    if library == "lightning":
        assert deviation(weights, of_one_process) < 1e-9
    else:
        way, off = moves(of_one_process, start_of_deepspeed()), moves(weights, of_one_process)
        assert all(off[name] < 1e-4 * way[name] for name in way)


def weights_of_library(folder: Path, library: str) -> Weights:
    if library == "deepspeed":
        return torch.load(folder / "global_step4/mp_rank_00_model_states.pt", weights_only=False)["module"]
    (checkpoint,) = folder.rglob("*.ckpt")
    found = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert {tensor.dtype for tensor in found.values()} == {torch.float64}
    return found


def start_of_deepspeed() -> Weights:
    """The weights that the job on DeepSpeed begins with."""
    torch.manual_seed(0)
    return GPT(1, 16, 2, 16).state_dict()


def moves(weights: Weights, others: Weights) -> dict[str, float]:
    """How far each is from the other."""
    return {name: float((tensor - others[name]).double().norm()) for name, tensor in weights.items()}


def measured(folder: Path, library: str) -> list[float]:
    """Losses of the steps, and the validation loss."""
    if library == "deepspeed":
        return losses(folder)
    (file,) = folder.rglob("metrics.csv")
    names, *rows = [line.split(",") for line in file.read_text().splitlines()]
    return [
        float(row[names.index(name)]) for name in ("train_loss", "val_loss") for row in rows if row[names.index(name)]
    ]


@slow
def test_a_host_that_is_cut_off_is_named_and_all_end(tmp_path: Path) -> None:
    """Nobody closes a connection: without a watch they would wait for half an hour."""
    with (
        Hosts(2) as hosts,
        on_all(hosts, f"{LONG} --data {text_in(tmp_path)} --out {tmp_path} --patience 3", timeout=10) as jobs,
    ):
        assert wait_for(lambda: newest_step(tmp_path), jobs[0].process)
        hosts.cut(1)
        done = [ended(job) for job in jobs]
    assert [end.status for end in done] == [LOST, LOST]
    assert "rank 1 (host1, pid " in last_line(done[0]) and "has not been heard of since" in last_line(done[0])
    assert "does not answer any more" in last_line(done[1])


@slow
@pytest.mark.parametrize("stopped", [0, 1, 2])
def test_a_process_that_is_stopped_is_named_and_all_end(stopped: int, tmp_path: Path) -> None:
    """Of three hosts one's process gets SIGSTOP: the first, which keeps the log, too."""
    with Hosts(3) as hosts, on_all(hosts, f"{LONG} --data {text_in(tmp_path)} --out {tmp_path} --patience 3") as jobs:
        assert wait_for(lambda: newest_step(tmp_path), jobs[0].process)
        (worker,) = workers_on(jobs[stopped])
        os.kill(worker, signal.SIGSTOP)
        done = [ended(job) for job in jobs]
    assert [end.status for end in done] == [LOST] * 3, done
    for end in done:
        assert f"rank {stopped} (host{stopped}, pid {worker}, " in last_line(end)


def workers_on(job: Begun) -> list[int]:
    """The processes that train: torchrun's children."""
    found = [pid for pid in descendants(job.process.pid) if b"launch/train.py" in argv(pid)]
    return [pid for pid in found if b"agent.py" not in b" ".join(argv(pid))]


def argv(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []


@slow
def test_a_signal_to_one_host_saves_and_stops_all(tmp_path: Path) -> None:
    """To the script, as Slurm and Kubernetes send it; torchrun would end its processes, and itself in a traceback."""
    with Hosts(2) as hosts, on_all(hosts, f"{LONG} --data {text_in(tmp_path)} --out {tmp_path}") as jobs:
        assert wait_for(lambda: newest_step(tmp_path), jobs[0].process)
        jobs[1].process.terminate()
        done = [ended(job) for job in jobs]
    assert [end.status for end in done] == [0, 0], done
    assert "Traceback" not in done[0].stderr + done[1].stderr
    stopped = len(records(tmp_path))
    assert f"Stopped after step {stopped}, as a signal asked" in done[0].stdout and newest_step(tmp_path) == stopped


@slow
def test_a_host_that_is_killed_and_comes_again_goes_on_from_the_newest_checkpoint(
    worlds: dict[int, World], tmp_path: Path
) -> None:
    """Of 1:2 hosts: the other goes on alone meanwhile. No step is done twice in what is kept, or left out."""
    steps = 1500
    job = f"{PLAIN} --steps {steps} --eval-every {steps} --data {text_in(tmp_path)}"
    calm = on_ranks(worlds, "launch.train", 1, f"{job} --out {tmp_path / 'calm'}".removeprefix("launch/train.py "))
    assert calm.status == 0, calm.stderr
    out = tmp_path / "killed"
    job = f"{job} --out {out} --checkpoint-every 10 --keep 3 --resume auto"
    said = [words(host, job, "1:2", max_restarts=3, last_call=5) for host in range(2)]
    with Hosts(2) as hosts, contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(hosts.begun(host, line, **SOON)) for host, line in enumerate(said))
        assert wait_for(lambda: newest_step(out) >= 20, first.process)
        hosts.kill(second.process)
        reached = newest_step(out)
        assert wait_for(lambda: newest_step(out) > reached + 20, first.process), "it goes on alone"
        again = stack.enter_context(hosts.begun(1, said[1], **SOON))
        assert wait_for(lambda: workers_on(again), first.process), "it is taken back before the end"
        done = [ended(one) for one in (first, again)]
    assert [end.status for end in done] == [0, 0], done
    assert "2 processes" in done[0].stdout + done[1].stdout
    assert [record["step"] for record in records(out)] == list(range(1, steps + 1))
    assert losses(out)[:20] == pytest.approx(losses(tmp_path / "calm")[:20], rel=TOLERANCE)
    assert records(out)[-1]["val_loss"] == pytest.approx(records(tmp_path / "calm")[-1]["val_loss"], rel=0.05)
