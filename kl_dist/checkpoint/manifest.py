"""Whether a checkpoint's files are as they were written: a manifest with the SHA-256 of each, which comes last.

A save writes into a folder of another name. When every file is on the disk the manifest is written, and then the folder
is renamed. So a folder with a checkpoint's name was whole once; whether it still is, its checksums tell.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

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


def publish(partial: Path, final: Path, sums: dict[str, str]) -> None:
    """Write the manifest and give the folder its name; all of it is on the disk before the name is."""
    path = partial / MANIFEST
    path.write_text(_text(sums))
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
