"""What happens to files: seeded damage to bytes and to folders, and a stranger's, for the tests of what is on disk."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

from kl_dist.checkpoint.manifest import MANIFEST

BYTES = ("flipped", "flipped", "flipped", "truncated", "zeroed", "grown", "overwritten")
"""Kinds of damage to a file; of single bits the most."""


def damaged(raw: bytes, chance: random.Random, kind: str) -> bytes:
    """A file's bytes with one thing wrong; never the same."""
    data = bytearray(raw)
    start = chance.randrange(len(data))
    length = chance.choice((1, 8, 64, 512, 4096))
    if kind == "flipped":
        data[start] ^= 1 << chance.randrange(8)
    elif kind == "truncated":
        del data[start:]
    elif kind == "grown":
        data += chance.randbytes(length)
    else:  # a sector that was never written, or that is of something else
        size = len(data[start : start + length])
        data[start : start + size] = bytes(size) if kind == "zeroed" else chance.randbytes(size)
    if bytes(data) == raw:
        data[start] ^= 1
    return bytes(data)


FOLDERS = (*BYTES, "gone", "more", "a link", "exchanged", "exchanged", "swapped")


def damage(folder: Path, other: Path, chance: random.Random, kind: str) -> str:
    """Do one thing to a folder, with what a later save of the same run has written; says what."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    path = folder / chance.choice(names)
    if kind in BYTES:
        path.write_bytes(damaged(path.read_bytes(), chance, kind))
    elif kind == "gone":
        path.unlink()
    elif kind == "more":
        shutil.copy(path, folder / f"{path.name}.more")
    elif kind == "a link":
        away = folder.with_name(f"{folder.name}.{path.name}")
        path.rename(away)
        path.symlink_to(away)
    elif kind == "exchanged":  # beside those of another save
        shutil.copy(other / path.name, path)
    elif kind == "swapped":
        second = folder / chance.choice([name for name in names if name != path.name])
        mine, theirs = path.read_bytes(), second.read_bytes()
        path.write_bytes(theirs)
        second.write_bytes(mine)
        return f"{path.name} and {second.name} {kind}"
    return f"{path.name} {kind}"


def manifest_damage(folder: Path, chance: random.Random, kind: str) -> str:
    """A manifest that is well written, and does not say what it should."""
    path = folder / MANIFEST
    said = json.loads(path.read_text())
    if kind == "without an entry":
        del said["files"][chance.choice(sorted(said["files"]))]
    elif kind == "with one more":
        said["files"]["more"] = chance.choice(sorted(said["files"].values()))
    elif kind == "of two exchanged":
        one, other = chance.sample(sorted(said["files"]), 2)
        said["files"][one], said["files"][other] = said["files"][other], said["files"][one]
    elif kind == "with nothing":
        said = {}
    path.write_text(json.dumps(said, indent=1, sort_keys=True))
    return f"a manifest {kind}"


MANIFESTS = ("without an entry", "with one more", "of two exchanged", "with nothing")


class Stranger:
    """What pickle would run if it were let: it is harmless, and makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def estrange(folder: Path, proof: Path) -> None:
    """Have a folder of torch.distributed.checkpoint make the folder `proof` when torch reads it."""
    path = folder / ".metadata"
    found = pickle.loads(path.read_bytes())
    found.planner_data["mine"] = Stranger(proof)
    path.write_bytes(pickle.dumps(found))
