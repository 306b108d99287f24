"""Jobs of launch/, in two ways: on ranks that are there already, and as the processes that a user starts.

    done = on_ranks(worlds, "launch.train", 2, "--optimizer adamw")     main() on a pool's ranks, or in this process
    done = started("-m torch.distributed.run --nproc-per-node 2 launch/train.py --optimizer adamw")

Starting costs seconds a process, in imports, so that one start of each launcher has to do.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from launch.agent import children
from tests.world import World, patience

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node"
SECONDS = 120.0  # for a job of a few steps and its imports, on an idle machine
SECONDS_TO_END = 10.0  # once asked to
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

if sys.platform == "linux":
    QUIET["GLOO_SOCKET_IFNAME"] = "lo"


class Ended(NamedTuple):
    """How a job ended, or one rank of it."""

    status: int
    stdout: str
    stderr: str


Start = Callable[[int, str], Ended]
"""A number of processes and a job's arguments."""


def text_in(folder: Path, lines: int = 500) -> Path:
    """A small text with something to learn in it."""
    path = folder / "text.txt"
    path.write_text("".join(f"{number} times {number} is {number * number}.\n" for number in range(lines)))
    return path


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# -- on ranks that are there already ----------------------------------------------------------------------------------


def on_ranks(worlds: dict[int, World], module: str, processes: int, arguments: str, **environment: str) -> Ended:
    """main() of a module on all ranks of a pool, a single one in this process; all they said, and the worst status."""
    if processes == 1:
        return here(None, module, arguments.split(), **environment)
    ranks = worlds[processes].run(here, processes, module, arguments.split(), timeout=SECONDS, **environment)
    status, stdout, stderr = zip(*ranks, strict=True)
    return Ended(max(status), "".join(stdout), "".join(stderr))


def here(group: dist.ProcessGroup | None, module: str, arguments: Sequence[str], **environment: str) -> Ended:
    """main() of a module in this process."""
    with as_started(group, module, **environment), _caught() as said:
        try:
            status = import_module(module).main(arguments)
        except SystemExit as left:  # of a parser
            status = left.code
    assert isinstance(status, int)
    return Ended(status, *said)


def without_operators(deepspeed: Any) -> None:
    """No look for operators to compile: on a CPU it is one, for inference, which costs each machine 90 CPU seconds."""
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)


@contextlib.contextmanager
def as_started(group: dist.ProcessGroup | None, module: str, **environment: str) -> Iterator[None]:
    """What a process that torchrun, or a shell, has just started finds; afterwards all is as it was before."""
    folder, handlers = Path.cwd(), {number: signal.getsignal(number) for number in signal.valid_signals()}
    if "deepspeed" in sys.modules:
        without_operators(sys.modules["deepspeed"])
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", [module]),
        mock.patch.object(torch.cuda, "is_available", lambda: False),  # asked before, it would not look at QUIET again
        warnings.catch_warnings(),
        _same_chance_afterwards(),
        _told_apart(0 if group is None else group.rank()),
    ):
        for name in OF_TORCHRUN:
            os.environ.pop(name, None)
        os.environ.update(QUIET | ({} if group is None else torchrun(group)) | environment)
        os.chdir(ROOT)
        try:
            yield
        finally:
            os.chdir(folder)
            for number, handler in handlers.items():
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)


def torchrun(group: dist.ProcessGroup) -> dict[str, str]:
    """What torchrun tells a process of its place."""
    assert group.size() == dist.get_world_size(), "a job takes the default process group"
    rank, size = str(group.rank()), str(group.size())
    given = (rank, rank, "0", size, size, "127.0.0.1", "0")
    return {**dict(zip(OF_TORCHRUN, given, strict=True)), "TORCHELASTIC_RUN_ID": "tests"}


@contextlib.contextmanager
def _same_chance_afterwards() -> Iterator[None]:
    """Every generator of random numbers goes on as if the block had drawn none."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def _told_apart(rank: int) -> Iterator[None]:
    """Lightning has asked once, when it was imported, which rank may speak; accelerate asks once in a process."""
    with contextlib.ExitStack() as stack:
        if lightning := sys.modules.get("lightning_utilities.core.rank_zero"):
            stack.enter_context(mock.patch.object(lightning.rank_zero_only, "rank", rank, create=True))
        try:
            yield
        finally:
            if transformers := sys.modules.get("transformers.integrations.deepspeed"):
                transformers.unset_hf_deepspeed_config()
                state = import_module("accelerate.state")
                state.AcceleratorState._reset_state(reset_partial_state=True)
                state.GradientState._reset_state()


@contextlib.contextmanager
def _caught() -> Iterator[list[str]]:
    """What this process writes to stdout and stderr, from Python and from below it; filled in at the end."""
    said: list[str] = []
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        streams, kept = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
        for stream, file, number in zip(streams, (out, err), (1, 2), strict=True):
            stream.flush()  # what was said before
            os.dup2(file.fileno(), number)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                yield said
        finally:
            for stream in (*streams, out, err):  # loggers hold on to the former
                stream.flush()
            for old, number in zip(kept, (1, 2), strict=True):
                os.dup2(old, number)
                os.close(old)
            for file in (out, err):
                file.seek(0)
                said.append(file.read())


# -- as a user starts them --------------------------------------------------------------------------------------------


class Begun(NamedTuple):
    """A process, and the files that take what it says: a pipe that nobody reads meanwhile would hold it up."""

    process: subprocess.Popen[bytes]
    stdout: IO[str]
    stderr: IO[str]


def started(command: str | Sequence[Any], folder: Path = ROOT, **environment: str) -> Ended:
    """`python COMMAND` to its end, in a folder."""
    with begun(command, folder, **environment) as job:
        return ended(job)


@contextlib.contextmanager
def begun(command: str | Sequence[Any], folder: Path = ROOT, **environment: str) -> Iterator[Begun]:
    """`python COMMAND` in a session of its own; ended with the block where it has not by itself."""
    words = command.split() if isinstance(command, str) else map(str, command)
    given = {**os.environ, **QUIET, **environment}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=folder, env=given, stdout=out, stderr=err, start_new_session=True
        )
        try:
            yield Begun(process, out, err)
        finally:
            if process.poll() is None:
                _end(process)


def ended(job: Begun, seconds: float = SECONDS) -> Ended:
    """What it comes to; fails when it hangs."""
    try:
        status: int | None = job.process.wait(seconds * patience())
    except subprocess.TimeoutExpired:
        status = None
        _end(job.process)
    for file in (job.stdout, job.stderr):
        file.seek(0)
    found = Ended(status or 0, job.stdout.read(), job.stderr.read())
    assert status is not None, f"the job hangs:\n{found.stderr}"
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asked to end, torchrun ends its workers too, which are in sessions of their own; killed, it would leave them."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_TO_END * patience())
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def workers_of(pid: int) -> list[int]:
    """The live processes that a process has started: torchrun's workers."""
    return sorted(children(pid))


def board_of(folder: Path) -> dict[str, dict[int, float]]:
    """By name, what TensorBoard's files have: value by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for events in {path.parent for path in folder.rglob("events.out.tfevents*")}:
        board = EventAccumulator(str(events)).Reload()
        for tag in board.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in board.Scalars(tag)})
    return found
