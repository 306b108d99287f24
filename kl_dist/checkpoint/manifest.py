"""Whether a checkpoint's files are as they were written: a manifest with the SHA-256 of each, which comes last.

It names every file of the folder, and says of which save they are: a step, a run, whatever a job wants to know.

A save writes into a folder of another name. When every file is on the disk the manifest is written, and then the folder
is renamed. So a folder with a checkpoint's name was whole once; whether it still is, its checksums tell.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 by name of file.

    Raises:
        OSError: one cannot be read.
    """
    found = {}
    for name in names:
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        found[name] = digest.hexdigest()
    return found


def publish(partial: Path, final: Path, sums: dict[str, str], about: Mapping[str, Any] | None = None) -> None:
    """Write the manifest and give the folder its name; all of it is on the disk before the name is.

    Args:
        sums: of every file of the folder.
        about: what to say of the save, as JSON has it.
    """
    path = partial / MANIFEST
    path.write_text(_text({"about": dict(about or {}), "files": sums}))
    for name in (MANIFEST, *sums):
        sync(partial / name)
    sync(partial)
    before = final.with_name(f"{final.name}.deleting")
    if final.exists():
        shutil.rmtree(before, ignore_errors=True)  # of a save that was interrupted here
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
    """What is wrong with a checkpoint, or None: every file there is, whole and unchanged, and no other."""
    try:
        expected = _read(folder)["files"]
        found = {path.name: path for path in folder.iterdir()}
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except ValueError:
        return f"{MANIFEST} is damaged"
    for name, path in found.items():
        if path.is_symlink():
            return f"{name} is a link, which may lead anywhere: a checkpoint has files of its own"
        if name != MANIFEST and name not in expected:
            return f"{name} is not in the manifest: it was put there later, or the manifest is damaged"
    for name, digest in expected.items():
        try:
            if checksums(folder, [name])[name] != digest:
                return f"{name} is damaged: its checksum is not that of the manifest"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def about(folder: Path) -> dict[str, Any]:
    """What the manifest says of the save; nothing in one of an earlier version.

    Raises:
        OSError, ValueError: it cannot be read, or is damaged.
    """
    return _read(folder)["about"]


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """Raises OSError or ValueError unless it is as `_text` has written it."""
    text = (folder / MANIFEST).read_text()
    said = json.loads(text)
    if not isinstance(said, dict) or text != _text(said):
        raise ValueError
    if all(isinstance(digest, str) for digest in said.values()):
        said = {"about": {}, "files": said}  # of an earlier version
    if said.keys() != {"about", "files"} or not isinstance(said["about"], dict) or not said["files"]:
        raise ValueError
    if not isinstance(said["files"], dict) or any(Path(name).name != name for name in said["files"]):
        raise ValueError
    return said


def _text(said: Mapping[str, Any]) -> str:
    return json.dumps(said, indent=1, sort_keys=True)
