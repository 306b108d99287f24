"""What a run writes down while it trains: a progress bar, one JSON line a step, and TensorBoard.

Only the first rank keeps a log. `OUT/metrics.jsonl` is the record; the report at the end is made from it, and a job
that continues reads it back, without the lines that a crash left behind the last checkpoint.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from launch.folders import move_aside

RUN_FILES = ("run.id", "metrics.jsonl", "tensorboard", "checkpoint", "adapter", "loss.png")
"""What a run leaves in its folder."""

Record = dict[str, Any]


class Log:
    """The record of a run, on the rank that speaks to the user; a context manager that closes its files."""

    def __init__(self, folder: Path, steps: int, done: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self.records = _read_until(self.path, done)
        # in a file of another name first: a run that is killed here must not lose what it has recorded
        kept = self.path.with_suffix(".kept")
        kept.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")
        os.replace(kept, self.path)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        # A bar that goes to a file gets a line every ten seconds, not one every step.
        self._bar = tqdm(total=steps, initial=done, unit="step", mininterval=0.2 if sys.stderr.isatty() else 10)
        self._validation = ""

    def record(self, record: Record) -> None:
        """Add one step: its step, loss, lr, tokens, seconds, optimizer_seconds, and val_loss where it was measured."""
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        before = self.records[-2]["tokens"] if len(self.records) > 1 else 0
        speed = (record["tokens"] - before) / record["seconds"]
        values = {name: record[name] for name in ("loss", "val_loss", "lr", "optimizer_seconds") if name in record}
        for name, value in (values | {"tokens_per_second": speed}).items():
            self._board.add_scalar(name, value, record["step"])
        if "val_loss" in record:
            self._validation = f"validation {record['val_loss']:.3f}, "
        self._bar.set_postfix_str(
            f"loss {record['loss']:.3f}, {self._validation}{speed:,.0f} tokens/s, "
            f"optimizer {1000 * record['optimizer_seconds']:.1f} ms",
            refresh=False,
        )
        self._bar.update()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()


def set_aside(folder: Path) -> Path | None:
    """Move an earlier run's files into a folder of their own, so that a fresh start loses nothing; where to, if any."""
    return move_aside([folder / name for name in RUN_FILES if (folder / name).exists()], folder, "earlier")


def _read_until(path: Path, step: int) -> list[Record]:
    """The records up to `step`; a last line that a crash cut short comes after any checkpoint and is left out."""
    records: list[Record] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        if len(records) == step:
            break
        records.append(json.loads(line))
    return records
