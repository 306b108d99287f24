"""The record of a run, `OUT/metrics.jsonl`: a line of JSON a step, of which `kl-shampoo report OUT` makes a page.

Only the first rank keeps it. A job that continues reads it back, without the lines that a crash left behind the last
checkpoint.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from launch.folders import move_aside
from launch.options import UsageError
from launch.ranks import Ranks

RUN_FILES = ("run.id", "metrics.jsonl", "tensorboard", "checkpoint", "adapter", "loss.png")
"""What a run leaves in its folder."""

Record = dict[str, Any]
"""Of a step: its `step`, `loss`, `lr`, `tokens`, `seconds`, `optimizer_seconds`, and `val_loss` where it was measured.

There also `optimizer`, what KLShampoo says of itself, and `memory`, the first rank's peak in bytes.
"""


class Records:
    """The records of a run on the disk; a context manager that closes the file.

    Once the run is under way, what cannot be written does not end it: that is said once, and tried again each step.
    """

    def __init__(self, folder: Path, done: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self.records = _read_until(self.path, done)
        # in a file of another name first: a run that is killed here must not lose what it has recorded
        kept = self.path.with_suffix(".kept")
        kept.write_bytes(b"".join(map(_line, self.records)))
        os.replace(kept, self.path)
        self._file = self._open()
        self._unwritten = b""
        self._said: set[str] = set()

    def record(self, record: Record) -> None:
        """Add one step."""
        self.records.append(record)
        self._unwritten += _line(record)
        with self._going_on(str(self.path)):
            self._write()

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def _write(self) -> None:
        """All that is not written yet; a line that a full disk took half of is completed when there is room."""
        if os.fstat(self._file).st_nlink == 0:  # deleted under the run
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(self._file)
            self._file = self._open()
            self._unwritten = b"".join(map(_line, self.records))
        while self._unwritten:
            self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]

    @contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if what not in self._said:
                self._said.add(what)
                print(f"\n{what} could not be written: {error.strerror or error}; the run goes on", file=sys.stderr)

    def close(self) -> None:
        with self._going_on(str(self.path)):
            self._write()
        os.close(self._file)

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Kept = TypeVar("Kept", bound=Records)


def opened(folder: Path, ranks: Ranks, open_it: Callable[[], Kept], flag: str = "--out") -> Kept | None:
    """The records, on the first rank; a collective.

    Args:
        flag: by which the folder was given.

    Raises:
        UsageError: the folder cannot be written, on all ranks.
    """
    kept, problem = None, None
    if ranks.first:
        try:
            kept = open_it()
        except OSError as error:
            problem = f"{flag} {folder} cannot be written: {error.strerror or error}"
    problem = ranks.tell(problem)
    if problem is not None:
        raise UsageError(problem)
    return kept


def set_aside(folder: Path) -> Path | None:
    """Move an earlier run's files into a folder of their own, so that a fresh start loses nothing; where to, if any."""
    return move_aside([folder / name for name in RUN_FILES if (folder / name).exists()], folder, "earlier")


def _line(record: Record) -> bytes:
    return f"{json.dumps(record)}\n".encode()


def _read_until(path: Path, step: int) -> list[Record]:
    """The records up to `step`, and to a line that a crash or a full disk cut short, if there is one before."""
    records: list[Record] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        if len(records) == step:
            break
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
