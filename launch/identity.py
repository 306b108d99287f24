"""Whose a folder of results is: the run that saves there, and the one job that is at it now.

    OUT/run.id      made when a run begins, and moved aside with its other files
    OUT/job.lock    locked while a job is at it; says which

The lock is the system's (flock) and goes with the process that has it, however that ends: what a dead job has left is
taken over. Between machines it holds where the file system passes it on, as Linux's NFS does by its manual.
"""

import fcntl
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from launch.options import UsageError
from launch.ranks import Ranks

FILE, LOCK = "run.id", "job.lock"


def of(folder: Path) -> str | None:
    """The run that saves in a folder, where it is known."""
    try:
        return (folder / FILE).read_text().strip() or None
    except OSError:
        return None


def settle(folder: Path, run: str | None = None) -> None:
    """Have a folder be of a run, by default a new one, unless it is of one already."""
    if of(folder) is None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(f"{run or uuid.uuid4().hex}\n")


@contextmanager
def alone(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Have a folder for this job alone while the block runs; a collective.

    Raises:
        UsageError: another job has it, or it cannot be made; on all ranks.
    """
    lock, problem = _locked(folder) if ranks.first else (None, None)
    problem = ranks.tell(problem)
    if problem is not None:
        raise UsageError(problem)
    try:
        yield
    finally:
        if lock is not None:
            lock.truncate(0)
            lock.close()


def _locked(folder: Path) -> tuple[IO[str] | None, str | None]:
    """The lock, or why there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+")
    except OSError as error:
        return None, f"--out {folder} cannot be written: {error.strerror}"
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        other = lock.read().strip() or "another job"
        lock.close()
        return None, f"{folder} is in use by {other}: wait for its end, or give another --out"
    except OSError as error:  # a file system without locks
        print(f"{folder} cannot be locked ({error.strerror}); see that no other job uses it", file=sys.stderr)
        return lock, None
    lock.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
    lock.flush()
    return lock, None
