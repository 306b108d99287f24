"""The folders of a run's checkpoints: `step-000400` is whole (see kl_dist.checkpoint.manifest), another name is not.

A save writes into `step-000400.partial`. What is to go is renamed first (`.deleting`), so that nothing half deleted
bears a checkpoint's name.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from kl_dist.checkpoint.manifest import fault

NAME = re.compile(r"step-(\d{6,})")


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first; not those whose save was interrupted."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def step_of(checkpoint: Path) -> int:
    """After which step it was saved, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def last(folder: Path, before: int | None = None) -> str:
    """Where to go on from, as a sentence's end: the newest checkpoint, of a step before some step if given."""
    good = [path for path in saved(folder) if before is None or step_of(path) < before]
    return f". The last good checkpoint is {good[0]}" if good else ", and there is no earlier checkpoint"


def sweep(folder: Path) -> None:
    """Delete what interrupted saves and deletions left; a step that was being replaced is given its name back."""
    for path in [*folder.glob("step-*.deleting"), *folder.glob("step-*.partial")]:
        if path.suffix == ".deleting" and not path.with_suffix("").exists() and fault(path) is None:
            path.rename(path.with_suffix(""))
        else:
            shutil.rmtree(path)


def keep(folder: Path, count: int) -> None:
    """Delete all checkpoints but the newest `count`."""
    for path in saved(folder)[count:]:
        doomed = path.with_name(f"{path.name}.deleting")
        path.rename(doomed)
        shutil.rmtree(doomed)


def abandon(folder: Path, step: int) -> Path | None:
    """Move the checkpoints after `step` aside, for a run that goes on from there; where to, if there are any."""
    return move_aside([path for path in saved(folder) if step_of(path) > step], folder, "abandoned")


def move_aside(paths: Sequence[Path], folder: Path, stem: str) -> Path | None:
    """Move `paths`, if any, into a new folder in `folder`: the first of stem-1, stem-2 and so on that is not there."""
    if not paths:
        return None
    number = 1
    while (aside := folder / f"{stem}-{number}").exists():
        number += 1
    aside.mkdir()
    for path in paths:
        path.rename(aside / path.name)
    return aside
