"""What a run writes down while it trains: a progress bar, one JSON line a step, and TensorBoard.

Only the first rank keeps a log. `OUT/metrics.jsonl` is the record; the report at the end is made from it, and a job
that continues reads it back, without the lines that a crash left behind the last checkpoint.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from launch.folders import move_aside
from launch.options import UsageError
from launch.ranks import Ranks

RUN_FILES = ("run.id", "metrics.jsonl", "tensorboard", "checkpoint", "adapter", "loss.png")
"""What a run leaves in its folder."""

Record = dict[str, Any]


class Log:
    """The record of a run, on the rank that speaks to the user; a context manager that closes its files.

    Once the run is under way, what cannot be written does not end it: that is said once, and tried again each step.
    """

    def __init__(self, folder: Path, steps: int, done: int) -> None:
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
        self._hook = threading.excepthook
        threading.excepthook = self._of_the_board
        self._board: SummaryWriter | None = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        # A bar that goes to a file gets a line every ten seconds, not one every step.
        self._bar = tqdm(total=steps, initial=done, unit="step", mininterval=0.2 if sys.stderr.isatty() else 10)
        self._validation = ""

    def record(self, record: Record) -> None:
        """Add one step: its step, loss, lr, tokens, seconds, optimizer_seconds, and val_loss where it was measured.

        There also `optimizer`, what KLShampoo says of itself, and `memory`, the first rank's peak in bytes.
        """
        self.records.append(record)
        self._unwritten += _line(record)
        with self._going_on(str(self.path)):
            self._write()
        before = self.records[-2]["tokens"] if len(self.records) > 1 else 0
        speed = (record["tokens"] - before) / record["seconds"]
        values = {name: record[name] for name in ("loss", "val_loss", "lr", "optimizer_seconds") if name in record}
        said = record.get("optimizer", {})
        numbers = {f"optimizer/{name}": x for name, x in said.items() if isinstance(x, (int, float))}
        self._show(values | {"tokens_per_second": speed} | numbers, record["step"])
        if "val_loss" in record:
            self._validation = f"validation {record['val_loss']:.3f}, "
        self._bar.set_postfix_str(
            f"loss {record['loss']:.3f}, {self._validation}{speed:,.0f} tokens/s, "
            f"optimizer {1000 * record['optimizer_seconds']:.1f} ms",
            refresh=False,
        )
        self._bar.update()

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

    def _show(self, values: dict[str, float], step: int) -> None:
        """To TensorBoard, until it fails: its thread does not come back."""
        board, self._board = self._board, None
        if board is None:
            return
        with self._going_on("TensorBoard's file"):
            for name, value in values.items():
                board.add_scalar(name, value, step)
            self._board = board

    def _of_the_board(self, failed: threading.ExceptHookArgs) -> None:
        """What ends TensorBoard's thread is told of by the next call."""
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard")):
            self._hook(failed)

    @contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if what not in self._said:
                self._said.add(what)
                print(f"\n{what} could not be written: {error.strerror or error}; the run goes on", file=sys.stderr)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        with self._going_on("TensorBoard's file"):
            if self._board:
                self._board.close()
        with self._going_on(str(self.path)):
            self._write()
        os.close(self._file)
        threading.excepthook = self._hook


@contextmanager
def opened_log(folder: Path, steps: int, done: int, ranks: Ranks) -> Iterator[Log | None]:
    """The log, on the first rank; where its folder cannot be written, UsageError on all."""
    log, problem = None, None
    if ranks.first:
        try:
            log = Log(folder, steps, done)
        except OSError as error:
            problem = f"--out {folder} cannot be written: {error.strerror or error}"
    problem = ranks.tell(problem)
    if problem is not None:
        raise UsageError(problem)
    with log or nullcontext():
        yield log


def _line(record: Record) -> bytes:
    return f"{json.dumps(record)}\n".encode()


def set_aside(folder: Path) -> Path | None:
    """Move an earlier run's files into a folder of their own, so that a fresh start loses nothing; where to, if any."""
    return move_aside([folder / name for name in RUN_FILES if (folder / name).exists()], folder, "earlier")


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
