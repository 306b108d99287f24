"""What a run shows while it trains, beside its records: a progress bar, and TensorBoard."""

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from kl_dist.step.stats import scalars
from launch.ranks import Ranks
from launch.records import Record, Records, opened


class Log(Records):
    """The records of a run, its bar and its board, on the rank that speaks to the user."""

    def __init__(self, folder: Path, steps: int, done: int) -> None:
        super().__init__(folder, done)
        self._hook = threading.excepthook
        threading.excepthook = self._of_the_board
        self._board: SummaryWriter | None = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        # A bar that goes to a file gets a line every ten seconds, not one every step.
        self._bar = tqdm(total=steps, initial=done, unit="step", mininterval=0.2 if sys.stderr.isatty() else 10)
        self._validation = ""

    def record(self, record: Record) -> None:
        super().record(record)
        before = self.records[-2]["tokens"] if len(self.records) > 1 else 0
        speed = (record["tokens"] - before) / record["seconds"]
        values = {name: record[name] for name in ("loss", "val_loss", "lr", "optimizer_seconds") if name in record}
        numbers = scalars({"kl_shampoo": record.get("optimizer", {})})
        self._show(values | {"tokens_per_second": speed} | numbers, record["step"])
        if "val_loss" in record:
            self._validation = f"validation {record['val_loss']:.3f}, "
        self._bar.set_postfix_str(
            f"loss {record['loss']:.3f}, {self._validation}{speed:,.0f} tokens/s, "
            f"optimizer {1000 * record['optimizer_seconds']:.1f} ms",
            refresh=False,
        )
        self._bar.update()

    def _show(self, values: Mapping[str, float], step: int) -> None:
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

    def __enter__(self) -> "Log":
        return self

    def close(self) -> None:
        self._bar.close()
        with self._going_on("TensorBoard's file"):
            if self._board:
                self._board.close()
        super().close()
        threading.excepthook = self._hook


@contextmanager
def opened_log(folder: Path, steps: int, done: int, ranks: Ranks) -> Iterator[Log | None]:
    """The log, on the first rank; where its folder cannot be written, UsageError on all."""
    log = opened(folder, ranks, lambda: Log(folder, steps, done))
    with log or nullcontext():
        yield log
