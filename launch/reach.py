"""How this host reaches the head of a job, for launch/multinode.sh: by which interface, and whether it answers.

    python launch/reach.py --node-rank 1 --head 10.0.0.1 --port 29400 --timeout 300
    eth0 10.0.0.2 10.0.0.1

Prints the interface, this host's address there, and the head's; or one line of what is wrong, with status 2. A host
that is not the head waits until the head listens. With the standard library alone: it runs before torch is imported.
"""

import argparse
import errno
import fcntl
import socket
import struct
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

SIOCGIFADDR = 0x8915
PAUSE = 0.5  # seconds between two tries to reach the head
NOWHERE = "192.0.2.1"  # of the addresses for documents: what is sent there takes the default route


class Unreachable(Exception):
    """The message is one line for the user."""


class Way(NamedTuple):
    """The interface that reaches the head, this host's address there, and the head's."""

    interface: str
    here: str
    head: str


def way_to(head: str, port: int, is_head: bool, timeout: float) -> Way:
    """Find the way, and see that it is open: the head's port free on the head, answered on the others.

    With a `timeout` of 0 the others do not ask.

    Raises:
        Unreachable: there is none, or not within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    address = _resolved(head, deadline)
    if is_head:
        if address.startswith("127.") and head != "localhost" and head != address:
            # Debian and Ubuntu give a host's own name this address, at which no other host finds it
            address = _source(NOWHERE) or _the_only_address(head)
        _see_that_it_is_free(address, port)
    elif timeout:
        _wait_for(address, port, timeout, deadline)
    here = address if is_head else _source(address) or address
    return Way(_interface(here), here, address)


def addresses() -> dict[str, str]:
    """By interface that has one, its IPv4 address."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _resolved(head: str, deadline: float) -> str:
    while True:
        try:
            return socket.getaddrinfo(head, None, socket.AF_INET)[0][4][0]  # type: ignore[return-value]
        except socket.gaierror as error:
            why = error.strerror
        if time.monotonic() + PAUSE > deadline:
            raise Unreachable(f"--head {head} is not known here as a name or an IPv4 address: {why}")
        time.sleep(PAUSE)  # of a host that is only just being made


def _source(address: str) -> str | None:
    """This host's address on the way to another; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return None
        return probe.getsockname()[0]


def _the_only_address(head: str) -> str:
    outward = {name: address for name, address in addresses().items() if not address.startswith("127.")}
    if len(outward) == 1:
        return outward.popitem()[1]
    raise Unreachable(
        f"--head {head} is a loopback address on this host, and which of its own the others reach cannot be told: "
        f"give the head's address, {_list(outward)}"
    )


def _interface(address: str) -> str:
    for name, its_address in addresses().items():
        if its_address == address or (address.startswith("127.") and its_address.startswith("127.")):
            return name
    raise Unreachable(
        f"no interface of this host has {address} as its first address ({_list(addresses())}): name the one to use in "
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, and its first address in --head"
    )


def _see_that_it_is_free(address: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise Unreachable(
                    f"--head {address} is no address of this host, which --node-rank 0 calls the head: it has "
                    f"{_list(addresses())}"
                ) from None
            reason = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise Unreachable(f"port {port} of the head {reason}; choose another by --port, on all hosts") from None


def _wait_for(address: str, port: int, timeout: float, deadline: float) -> None:
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((address, port), max(left, PAUSE)).close()
            return
        except ConnectionRefusedError:
            why = "the host is there, but nothing listens: is the head started, with --node-rank 0 and the same --port?"
        except OSError as error:
            why = f"{error.strerror or error}: is the address right, the host up, the port open in the firewall?"
        if time.monotonic() + PAUSE > deadline:
            raise Unreachable(f"no answer from the head at {address}, port {port}, within {timeout:g} s; {why}")
        time.sleep(PAUSE)


def _list(found: dict[str, str]) -> str:
    return ", ".join(f"{address} ({name})" for name, address in found.items()) or "none"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the way; returns the exit status."""
    parser = argparse.ArgumentParser(prog="launch/reach.py", allow_abbrev=False)
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--head", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--timeout", type=float, required=True)
    given = parser.parse_args(arguments)
    try:
        print(*way_to(given.head, given.port, given.node_rank == 0, given.timeout))
    except Unreachable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
