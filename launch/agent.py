"""torchrun for one host of a job, which says in its last line how the job ended, and ends with its status.

    python launch/agent.py --nnodes 2 ... script.py arguments

The options are torchrun's own; launch/multinode.sh gives them. Three things differ from torchrun: SIGTERM and SIGUSR1
go to the processes and not to torchrun, so that a job which saves and stops between two steps has time for it, and its
status counts; what ended the job stands last, in the words of the process that failed first; and the exit status is
that process's.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError
from torch.distributed.run import parse_args, run

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)
GRACE = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
"""Seconds from a signal to the end of the processes; then they are killed."""

LOST_STORE = "the store on the head, {}, does not answer any more: the head has ended, or this host is cut off from it"
LOST = 5
"""Status of a process that ended because another did: see launch/endings.py."""
LINGER = 5.0
"""Seconds that the head stays at most, with the store, for the others to read there that all is over."""


def pass_on(number: int, _: FrameType | None) -> None:
    """A signal's handler: the processes of this host get it, and some seconds to end by themselves."""
    workers = children(os.getpid())
    for pid in workers:
        os.kill(pid, number)
    if not workers:  # the hosts are not all there yet
        raise SignalException("before the start", signal.Signals(number))

    def give_up(*_: object) -> None:
        raise SignalException(f"the processes did not end within {GRACE} s", signal.Signals(number))

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(GRACE)


def children(pid: int) -> list[int]:
    """The processes that one has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def last_words(name: str, failures: dict[int, ProcessFailure]) -> tuple[str, int]:
    """What the first process to fail has to say, below its traceback if it gave one, and its exit status."""
    rank, first = ChildFailedError(name, failures).get_first_failure()
    status = first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    told: Any = first.message
    where = told.get("extraInfo", {}).get("py_callstack", "") if isinstance(told, dict) else ""
    words = told["message"] if isinstance(told, dict) else told
    if first.exitcode < 0:
        words = f"killed by {first.signal_name()}"
    elif first.error_file == "<N/A>":
        words = f"ended with status {first.exitcode}; what it said stands above"
    name = f"rank {rank} on {socket.gethostname()}"
    return (f"{name}:\n{where}" if where else f"{name}: {words}"), status


class Store:
    """The store on the head, beside what torchrun does with it: which hosts have come, and which have left again."""

    def __init__(self, endpoint: str, host: int, nodes: str, timeout: float) -> None:
        head, _, port = endpoint.rpartition(":")
        self.host, self.endpoint, self.nodes, self.timeout = host, endpoint, nodes, timeout
        self.hosts = range(int(nodes.split(":")[-1]))
        self._told: list[tuple[int, str]] = []  # failures, as far as they are known
        self.killed = False  # this host's processes, for want of the others
        limit = timedelta(seconds=timeout)
        # One daemon serves all stores of a process at a port: torchrun's rendezvous shares it.
        self._keys = dist.TCPStore(
            head, int(port), is_master=host == 0, multi_tenant=True, wait_for_workers=False, timeout=limit
        )
        for one in self.hosts if host == 0 else (host,):
            self._keys.set(f"left/{one}", "[0, null]")
        self._keys.set(f"came/{host}", "")

    def missing(self) -> str:
        """Which hosts have not come."""
        absent = [host for host in self.hosts if not self._keys.check([f"came/{host}"])]
        if not absent:
            return f"not all of {self.nodes} hosts were ready together"
        return f"host{'s' * (len(absent) > 1)} {', '.join(map(str, absent))} of {self.nodes} did not come"

    def leave(self, status: int, words: str) -> None:
        """Say how this host ended; the head stays a moment longer than the others, since the store goes with it."""
        with contextlib.suppress(dist.DistError, RuntimeError):  # it has gone already
            self._keys.set(f"left/{self.host}", json.dumps([status, words]))
            there = [host for host in self.hosts if self.host == 0 and self._keys.check([f"came/{host}"])]
            deadline = time.monotonic() + LINGER
            while time.monotonic() < deadline and not all(self._left(host)[1] is not None for host in there):
                time.sleep(0.1)

    def failures(self) -> list[tuple[int, str]]:
        """Of hosts that did not end well, the status and the words."""
        left = [self._left(host) for host in self.hosts if host != self.host]
        return [(status, words) for status, words in left if words is not None and status]

    def _left(self, host: int) -> tuple[int, str | None]:
        status, words = json.loads(self._keys.get(f"left/{host}"))
        return status, words

    def end_with_the_others(self, elastic: bool) -> None:
        """From now on, end what still runs here some seconds after the store was lost, or after another host failed.

        Processes that are stopped do not end by themselves, and torchrun waits for a store that does not answer.
        """
        answered = [time.monotonic()]

        def follow() -> None:
            with contextlib.suppress(dist.DistError, RuntimeError):
                while elastic or not self._told:
                    self._told = self.failures()
                    self._keys.get("came/0")
                    answered[0] = time.monotonic()
                    time.sleep(1)
                time.sleep(GRACE)
                self._kill()
                answered[0] = time.monotonic()

        def see_to_the_store() -> None:
            # no call to the store can tell: its own time limit does not hold where nothing comes back at all
            while time.monotonic() - answered[0] < self.timeout + GRACE:
                time.sleep(1)
            self._kill()
            print(LOST_STORE.format(self.endpoint), file=sys.stderr, flush=True)
            os._exit(LOST)

        for job in (follow, see_to_the_store):
            threading.Thread(target=job, daemon=True).start()

    def _kill(self) -> None:
        """End this host's processes, those that are stopped too."""
        self.killed = True
        for pid in children(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cause(self) -> tuple[int, str] | None:
        """What ended another host, for one whose processes ended with it: what is not a consequence itself, if any."""
        found = self._told
        deadline = time.monotonic() + LINGER / 2
        with contextlib.suppress(dist.DistError, RuntimeError):
            while time.monotonic() < deadline:
                found = sorted(self.failures() or self._told, key=lambda told: told[0] == LOST)
                if found and found[0][0] != LOST:
                    break
                time.sleep(0.1)
        return found[0] if found else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Start this host's processes and stay until they end; returns the exit status."""
    given = parse_args(arguments)
    given.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    for number in PASSED_ON:
        signal.signal(number, pass_on)
    limits = dict(pair.split("=") for pair in given.rdzv_conf.split(",") if pair)
    host, given.node_rank = given.node_rank, 0  # torchrun's c10d rendezvous has no use for it, and says so
    store = None
    try:
        store = Store(given.rdzv_endpoint, host, given.nnodes, float(limits.get("read_timeout", "60")))
        store.end_with_the_others(elastic=given.max_restarts > 0 or ":" in given.nnodes)
        run(given)
        words, status = "", 0
    except ChildFailedError as error:
        words, status = last_words(error.name, error.failures)
        if store and (store.killed or status == LOST):
            status, words = store.cause() or (status, words)
    except RendezvousTimeoutError:
        assert store is not None
        words, status = f"{store.missing()} within {limits.get('join_timeout', '600')} s", 1
    except (RendezvousConnectionError, dist.DistError):
        status, words = (store.cause() if store else None) or (LOST, LOST_STORE.format(given.rdzv_endpoint))
    except SignalException as error:
        words, status = f"stopped by {error.sigval.name}: {error}", 128 + error.sigval
    except Exception:  # torchrun's own
        words, status = traceback.format_exc().strip(), 1
    finally:
        signal.alarm(0)
    if store is not None:
        store.leave(status, words)
    if words:
        print(words, file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # threads of the store's may run until then
