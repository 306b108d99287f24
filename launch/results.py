"""The record of finished runs: a file with one line of JSON a run, to which lines are only ever added.

A run is known by its settings: every number that decides how it goes, after all defaults are filled in, and a hash of
its data. One whose defaults have changed since is not mistaken for it.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from launch.records import Record

ARENA = ("task", "data", "steps", "tokens_per_step", "layers", "width", "heads", "context")
"""The settings that two runs must share for their losses to be comparable."""

AS_BEFORE = {"final_beta1": 0}
"""By option, where it is not None, what changes nothing."""


def read(path: Path) -> list[Record]:
    """The runs of a file; of runs with the same settings the last, and no line that a crash cut short."""
    runs: dict[str, Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        runs[identity(record["settings"])] = record
    return list(runs.values())


def append(path: Path, record: Record) -> None:
    """Add one run, in a single write, so that readers and other writers see all of its line or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, allow_nan=False) + "\n"
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        # What a crash left of a line must not swallow this one.
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        os.write(file, ("\n" * torn + line).encode())
        os.fsync(file)
    finally:
        os.close(file)


def identity(settings: Record, leave_out: Iterable[str] = ()) -> str:
    """Settings as a text that is the same exactly when they are.

    An option at None counts for none, and so does one that leaves things as they were before there was it: a run made
    then is not made again.
    """
    kept = {key: value for key, value in settings.items() if key not in leave_out}
    if "groups" in kept:
        kept["groups"] = [
            {key: x for key, x in one.items() if x not in (None, AS_BEFORE.get(key))} for one in kept["groups"]
        ]
    return json.dumps(kept, sort_keys=True)


def arena(settings: Record) -> tuple[object, ...]:
    return tuple(settings[key] for key in ARENA)
