"""Several ranks for a test: a pool of gloo processes, four as a rule, started once and lent to one call after another.

    def total(group, x):                                   # at the top level of a test module
        x = torch.tensor(x + group.rank())
        dist.all_reduce(x, group=group)
        return x.item()

    def test_total(world):
        assert world.run(total, 3, 10) == [33, 33, 33]

[Note: a pool that survives its tests] Processes that import torch cost seconds, so they are kept, and forked from one
that has imported what the tests at hand will (where there is no GPU: CUDA does not survive a fork). What makes that
safe: every call begins with the same random seed; after every call the group makes one small all-reduce, which hangs
when the ranks had not issued the same collectives; and whatever hangs or dies takes the pool with it, so that the next
call begins with another one and a failure stays in the test that caused it.
"""

import contextlib
import io
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

RANKS = 4
# On an idle machine, so they are multiplied by patience(). None of it is waited for unless something hangs.
START_SECONDS = 120.0  # importing torch four times
ALIGNMENT_SECONDS = 10.0  # for the all-reduce that follows every call
GRACE_SECONDS = 10.0  # for the other ranks once one of them has raised


def patience() -> float:
    """How many times longer than on an idle machine something may take that is waited for.

    TEST_PATIENCE of the environment, 1 where it is not set, times the load on each core, where that is above 1.
    """
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    return float(os.environ.get("TEST_PATIENCE", "1")) * max(1.0, load)


def import_once(modules: Iterable[str]) -> None:
    """Have the processes of pools forked from one that has imported these; to be said before the first pool starts."""
    # of torch what it imports by itself in a step, or in a test of sharding
    torchs = (
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
    )
    multiprocessing.get_context("forkserver").set_forkserver_preload([*torchs, *modules])


def forget() -> None:
    """End the process that pools are forked from, so that their CPU time counts as that of this one's children."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


class RemoteTraceback(Exception):
    """The cause of an error that came from a worker: its traceback there, as text."""


class WorldFailure(RuntimeError):
    """A call that not every rank answered: the pool is gone, and the message names the ranks."""


class Answer(NamedTuple):
    """What one rank made of a call."""

    value: Any
    error: Exception | None
    traceback: str


class World:
    """Runs functions on ranks 0 .. W-1, W <= `ranks`. The processes are started by the first call and end with stop().

    All `ranks` of them are torch.distributed's default process group.
    """

    def __init__(self, ranks: int = RANKS) -> None:
        self.ranks = ranks
        self._workers: list[_Worker] = []

    def run(self, fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, **kwargs: Any) -> list:
        """[fn(group, *args, **kwargs) on rank r for r in 0 .. world_size-1].

        `fn` is sent by its name, so it must be at the top level of a module. An error on a rank is raised here, that of
        the lowest such rank, with the traceback from there as its cause. WorldFailure: a rank died, or did not answer
        in `timeout` seconds times patience().
        """
        answers = self._ask(fn, world_size, args, kwargs, timeout)
        for answer in answers:
            if answer.error is not None:
                raise answer.error from RemoteTraceback(_tracebacks(answers))
        return [answer.value for answer in answers]

    def run_expecting_errors(
        self, fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, **kwargs: Any
    ) -> list[Exception | None]:
        """The error of each rank, None where it did not raise, so that a test can say that all of them raise alike."""
        return [answer.error for answer in self._ask(fn, world_size, args, kwargs, timeout)]

    def stop(self) -> None:
        """End the processes; the next call starts others."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.connection.close()
        if workers:
            self._rendezvous.cleanup()

    def _start(self) -> None:
        """Processes that have built their groups."""
        context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        self._rendezvous = tempfile.TemporaryDirectory(prefix="world-", ignore_cleanup_errors=True)
        with self._stopping_on_failure():
            for rank in range(self.ranks):
                here, there = context.Pipe()
                process = context.Process(
                    target=_serve, args=(rank, self.ranks, self._rendezvous.name, there), daemon=True
                )
                process.start()
                there.close()
                self._workers.append(_Worker(process, here))
            _gather(self._workers, START_SECONDS)

    def _ask(self, fn: Callable, world_size: int, args: tuple, kwargs: dict, timeout: float) -> list[Answer]:
        if not 1 <= world_size <= self.ranks:
            raise ValueError(f"world_size must be in 1 .. {self.ranks}, not {world_size}")
        if "<" in fn.__qualname__:
            raise TypeError(f"{fn.__qualname__} is sent by its name: define it at the top level of a module")
        if not self._workers:
            self._start()
        answers = self._exchange((fn, world_size, args, kwargs), world_size, timeout)
        self._check_alignment(fn, world_size, raised=any(answer.error is not None for answer in answers))
        return answers

    def _check_alignment(self, fn: Callable, world_size: int, raised: bool) -> None:
        """One all-reduce, see [Note: a pool that survives its tests]; after an error a hang just costs the pool."""
        try:
            self._exchange((_align, world_size, (), {}), world_size, ALIGNMENT_SECONDS)
        except WorldFailure as failure:
            if not raised:
                raise WorldFailure(f"{fn.__qualname__} did not issue the same collectives on every rank") from failure

    def _exchange(self, call: tuple, world_size: int, timeout: float) -> list[Answer]:
        """The answers of the first ranks to `call`."""
        message = _packed(call)
        with self._stopping_on_failure():
            for worker in self._workers[:world_size]:
                with contextlib.suppress(ConnectionError):  # of a dead process, which _gather reports
                    worker.connection.send_bytes(message)
            return _gather(self._workers[:world_size], timeout)

    @contextlib.contextmanager
    def _stopping_on_failure(self) -> Iterator[None]:
        """Whatever ends the block early, Ctrl-C too, ends the pool: a late answer must not reach the next call."""
        try:
            yield
        except BaseException:
            self.stop()
            raise


class _Worker(NamedTuple):
    """The parent's view of one rank."""

    process: Any
    connection: Connection


def _gather(workers: list[_Worker], timeout: float) -> list[Answer]:
    """One answer a rank, in rank order; once one has raised, the others have GRACE_SECONDS left."""
    answers: dict[int, Answer] = {}
    began = since = time.monotonic()
    while len(answers) < len(workers):
        missing = {rank: worker for rank, worker in enumerate(workers) if rank not in answers}
        # Asked for anew whenever the time is up: the load may have come meanwhile.
        left = since + timeout * patience() - time.monotonic()
        ready = wait([worker.connection for worker in missing.values()], max(0.0, left))
        if not ready and left <= 0:
            raise WorldFailure(_complaint(f"no answer in {time.monotonic() - began:.0f} s", missing, answers))
        for rank in [rank for rank, worker in missing.items() if worker.connection in ready]:
            answers[rank] = _receive(workers[rank], rank, answers)
            if answers[rank].error is not None and timeout > GRACE_SECONDS:
                since, timeout = time.monotonic(), GRACE_SECONDS
    return [answers[rank] for rank in range(len(workers))]


def _receive(worker: _Worker, rank: int, answers: dict[int, Answer]) -> Answer:
    """The answer that is waiting in the pipe; where the pipe is closed instead, the process is dead."""
    try:
        return _unpacked(worker.connection.recv_bytes())
    except (EOFError, ConnectionError):
        worker.process.join(1.0)
        died = f"the process died (exit code {worker.process.exitcode}), so no answer"
        raise WorldFailure(_complaint(died, [rank], answers)) from None


def _complaint(what: str, ranks: Iterable[int], answers: dict[int, Answer]) -> str:
    """What happened, where, and what the other ranks had raised by then."""
    raised = _tracebacks([answers[rank] for rank in sorted(answers)])
    return f"{what} from rank {', '.join(map(str, ranks))}; the pool was killed.{raised}"


def _tracebacks(answers: list[Answer]) -> str:
    return "".join(f"\n\n{answer.traceback}" for answer in answers if answer.traceback)


def _serve(rank: int, ranks: int, rendezvous: str, connection: Connection) -> None:
    """The life of a worker: build the groups, then answer calls until the parent goes away."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.FileStore(f"{rendezvous}/store", ranks), rank=rank, world_size=ranks)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, ranks + 1)}
    connection.send_bytes(_packed(Answer("ready", None, "")))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answer(message, rank, groups))


def _answer(message: bytes, rank: int, groups: dict[int, Any]) -> bytes:
    """The packed Answer to one packed call."""
    try:
        fn, world_size, args, kwargs = _unpacked(message)
        torch.manual_seed(0)
        return _packed(Answer(fn(groups[world_size], *args, **kwargs), None, ""))
    except Exception as error:
        text = f"rank {rank}: {traceback.format_exc()}"
        return _packed(Answer(None, _portable(error), text))


def _portable(error: Exception) -> Exception:
    """`error`, or a RuntimeError that quotes it when it does not survive pickling."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _align(group: dist.ProcessGroup) -> None:
    dist.all_reduce(torch.zeros(1), group=group)


def _packed(message: Any) -> bytes:
    """Bytes by torch.save: tensors travel by value, not as file descriptors of shared memory."""
    buffer = io.BytesIO()
    torch.save(message, buffer)
    return buffer.getvalue()


def _unpacked(message: bytes) -> Any:
    return torch.load(io.BytesIO(message), weights_only=False)
