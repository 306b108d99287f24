"""What makes a folder a checkpoint: a manifest with the checksum of every file, written last, and a name put on last.

A save writes into `step-000400.partial`. When every file is on the disk, the manifest is written, and then the folder
is renamed. So a folder with a checkpoint's name was whole once; whether it still is, its checksums tell. What is to go
is renamed first (`.deleting`), so that nothing half deleted bears a checkpoint's name.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{6,})")


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 by name of file."""
    found = {}
    for name in names:
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        found[name] = digest.hexdigest()
    return found


def publish(partial: Path, final: Path, sums: dict[str, str]) -> None:
    """Write the manifest and give the folder its name; all of it is on the disk before the name is."""
    path = partial / MANIFEST
    path.write_text(_text(sums))
    for name in (MANIFEST, *sums):
        sync(partial / name)
    sync(partial)
    before = final.with_name(f"{final.name}.deleting")
    if final.exists():
        final.rename(before)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(before, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file there is, whole and unchanged."""
    try:
        text = (folder / MANIFEST).read_text()
        expected = json.loads(text)
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except ValueError:
        return f"{MANIFEST} is damaged"
    if not isinstance(expected, dict) or not expected or text != _text(expected):
        return f"{MANIFEST} is damaged"
    for name, digest in expected.items():
        try:
            if checksums(folder, [name])[name] != digest:
                return f"{name} is damaged: its checksum is not that of the manifest"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _text(sums: dict[str, str]) -> str:
    return json.dumps(sums, indent=1, sort_keys=True)


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first; not those whose save was interrupted."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


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
    return move_aside([path for path in saved(folder) if int(path.name[5:]) > step], folder, "abandoned")


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
