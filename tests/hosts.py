"""Hosts for a test: network namespaces, each with a name, an address and a file /etc/hosts of its own, on one switch.

    with Hosts(2) as hosts:
        job = hosts.start(1, ["sh", "launch/multinode.sh", ...])     a process on host1, as seen by everything it asks
        hosts.cut(1)                                                 its link takes frames and delivers none
        hosts.join(1)

As on Debian and Ubuntu, a host's own name is a loopback address to itself: 127.0.1.1. Files are shared, as by a network
file system. Needs root, or whatever else lets `unshare` make these; `why_not` says what is missing.

Between two hosts the switch can be a program that delays and drops frames (`slow`): netem would do the same, where the
kernel has it.
"""

import contextlib
import ctypes
import fcntl
import functools
import heapq
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.jobs import QUIET, ROOT, Begun

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


def address(host: int) -> str:
    return f"10.77.0.{host + 1}"


@functools.cache
def why_not() -> str | None:
    """Why hosts cannot be made here, if so."""
    needed = [tool for tool in ("unshare", "nsenter", "ip", "mount") if shutil.which(tool) is None]
    if needed:
        return f"hosts need {', '.join(needed)}"
    try:
        with Hosts(2) as hosts:
            hosts.run(0, "true")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}".strip()
    return None


class Hosts:
    """Some hosts on a switch; a context manager that ends all that was started on them."""

    def __init__(self, count: int, delay: float = 0.0, loss: float = 0.0) -> None:
        self.count = count
        self.slow = (delay, loss) if delay or loss else None
        self._ends = contextlib.ExitStack()
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Hosts":
        with self._ends:
            self._folder = Path(self._ends.enter_context(tempfile.TemporaryDirectory()))
            self._switch = self._namespace("--net")
            self._hosts = [self._namespace("--net", "--uts", "--mount") for _ in range(self.count)]
            if self.slow:
                self._link_by_a_program(*self.slow)
            else:
                self._link_by_a_bridge()
            for host in range(self.count):
                self._set_up(host)
            self._ends = self._ends.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    # -- what a test does ------------------------------------------------------------------------------------------

    def run(self, host: int, *command: str) -> str:
        """A command on a host, to its end; what it says."""
        return _said(*self._on(host), *command)

    @contextlib.contextmanager
    def begun(self, host: int, command: Sequence[Any], **environment: str) -> Iterator[Begun]:
        """A command on a host, in a session of its own; killed with the block, and all that it started."""
        given = {key: value for key, value in (os.environ | QUIET).items() if not key.endswith("SOCKET_IFNAME")}
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen(
                [*self._on(host), *map(str, command)],
                cwd=ROOT,
                env={**given, "PYTHON": sys.executable, **environment},
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            try:
                yield Begun(process, out, err)
            finally:
                self.kill(process)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """As a power failure ends a host: without a word to anybody, all that the process has started too."""
        for pid in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def cut(self, host: int) -> None:
        """From now on nothing reaches the host or leaves it, and nobody is told: frames get lost."""
        self.switch("link", "set", f"port{host}", "nomaster")

    def join(self, host: int) -> None:
        self.switch("link", "set", f"port{host}", "master", "bridge")

    def switch(self, *words: str) -> None:
        _said("nsenter", "-t", str(self._switch), "-n", "ip", *words)

    # -- how they are made -----------------------------------------------------------------------------------------

    def _namespace(self, *kinds: str) -> int:
        """A process that keeps namespaces of its own, ready when it has said so."""
        # a mount in it must not show outside
        private = ["--propagation", "private"] if "--mount" in kinds else []
        process = subprocess.Popen(
            ["unshare", *kinds, *private, "sh", "-c", "echo ready; exec sleep infinity"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._ends.callback(process.wait)
        self._ends.callback(process.kill)
        assert process.stdout and process.stderr
        with process.stdout, process.stderr:
            if process.stdout.readline() != "ready\n":
                raise OSError(process.stderr.read())
        return process.pid

    def _on(self, host: int) -> list[str]:
        return ["nsenter", "-t", str(self._hosts[host]), "-n", "-u", "-m", f"--wd={ROOT}"]

    def _link_by_a_bridge(self) -> None:
        self.switch("link", "add", "bridge", "type", "bridge")
        self.switch("link", "set", "bridge", "up")
        for host, pid in enumerate(self._hosts):
            peer = ["peer", "name", "eth7", "netns", str(pid)]
            self.switch("link", "add", f"port{host}", "type", "veth", *peer)
            self.switch("link", "set", f"port{host}", "up", "master", "bridge")

    def _link_by_a_program(self, delay: float, loss: float) -> None:
        assert self.count == 2
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.hosts", str(self._switch), *map(str, self._hosts), str(delay), str(loss)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ends.callback(process.wait)
        self._ends.callback(process.kill)
        assert process.stdout
        with process.stdout:
            if process.stdout.readline() != "ready\n":
                raise OSError("the slow link did not start")

    def _set_up(self, host: int) -> None:
        file = self._folder / f"hosts{host}"
        others = (f"{address(other)} host{other}\n" for other in range(self.count) if other != host)
        file.write_text(f"127.0.0.1 localhost\n127.0.1.1 host{host}\n{''.join(others)}")
        self.run(host, "mount", "--bind", str(file), "/etc/hosts")
        self.run(host, "hostname", f"host{host}")
        for words in (
            ["link", "set", "lo", "up"],
            ["addr", "add", f"{address(host)}/24", "dev", "eth7"],
            ["link", "set", "eth7", "up"],
        ):
            self.run(host, "ip", *words)


def _said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def descendants(pid: int) -> list[int]:
    """All that a process has started, and these have."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(path.read_text().rsplit(")", 1)[1].split()[1]), []).append(int(path.parent.name))
    found, more = [], [pid]
    while more:
        more = [child for parent in more for child in children.get(parent, ())]
        found += more
    return found


# -- a slow link ------------------------------------------------------------------------------------------------------


def relay(ends: Sequence[int], delay: float, loss: float) -> None:
    """Carry frames between two TAP devices: each `delay` seconds later, and a share of `loss` of them not at all."""
    chance, due = random.Random(0), list[tuple[float, int, int, bytes]]()
    for number in range(1 << 62):
        wait = max(due[0][0] - time.monotonic(), 0) if due else None
        for end in select.select(ends, [], [], wait)[0]:
            frame, other = os.read(end, 65536), ends[end == ends[0]]
            if chance.random() >= loss:
                heapq.heappush(due, (time.monotonic() + delay, number, other, frame))
        while due and due[0][0] <= time.monotonic():
            with contextlib.suppress(OSError):  # before the other end is up
                os.write(due[0][2], due[0][3])
            heapq.heappop(due)


def tap(name: str) -> int:
    """A network device of this namespace whose frames are read from and written to the file it returns."""
    file = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    return file


def main() -> None:
    switch, first, second, delay, loss = sys.argv[1:]
    with open(f"/proc/{switch}/ns/net") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    ends = [tap("eth0"), tap("eth1")]
    for number, pid in enumerate((first, second)):
        subprocess.run(["ip", "link", "set", f"eth{number}", "netns", pid, "name", "eth7"], check=True)
    print("ready", flush=True)
    relay(ends, float(delay), float(loss))


if __name__ == "__main__":
    main()
