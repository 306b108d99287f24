"""The text: bytes, split into train and validation by file, and the batch that belongs to a step.

The default text is on every machine that can run this job: the source files of Python's standard library. A file goes
to one side of the split by a hash of its name, so that no file is on both sides and adding files moves none.
"""

import hashlib
import sysconfig
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from launch.options import UsageError

LARGEST_LIBRARY = 20_000_000
"""Bytes of the standard library that are read at most; more would not be seen in a short run."""

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders inside the standard library's that hold other people's code, or tests full of odd data."""


@dataclass(frozen=True)
class Corpus:
    """A text as two uint8 tensors, the names of the files in each, and what to call it all."""

    name: str
    train: Tensor
    validation: Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]


def load_corpus(file: str | None, context: int, otherwise: Callable[[], Corpus] | None = None) -> Corpus:
    """The text of `file`, its last tenth for validation, or else the standard library's, or what `otherwise` makes."""
    corpus = (otherwise or standard_library)() if file is None else single_file(Path(file))
    for side, text in (("training", corpus.train), ("validation", corpus.validation)):
        if len(text) <= context:
            raise UsageError(f"{corpus.name} has {len(text)} bytes of {side} text, too few for --context {context}")
    return corpus


def standard_library(without: Collection[str] = ()) -> Corpus:
    """Python's own .py files, sorted by their path within the library, but for those in folders named in `without`."""
    root = Path(sysconfig.get_path("stdlib"))
    sides: dict[bool, dict[str, bytes]] = {True: {}, False: {}}
    size = 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if NOT_LIBRARY.union(without).intersection(relative.parts):
            continue
        text = path.read_bytes()
        size += len(text)
        if size > LARGEST_LIBRARY:
            break
        sides[is_validation(relative.as_posix())][relative.as_posix()] = text
    return Corpus(
        name="the Python standard library's source",
        train=as_tensor(b"\n".join(sides[False].values())),
        validation=as_tensor(b"\n".join(sides[True].values())),
        train_files=tuple(sides[False]),
        validation_files=tuple(sides[True]),
    )


def library_manual() -> Corpus:
    """The chapters of Python's reference that `help()` shows, prose; the last tenth of each for validation."""
    from pydoc_data.topics import topics

    chapters = {name: text.encode() for name, text in sorted(topics.items())}
    cuts = {name: len(text) * 9 // 10 for name, text in chapters.items()}
    return Corpus(
        name="the Python reference manual",
        train=as_tensor(b"\n".join(text[: cuts[name]] for name, text in chapters.items())),
        validation=as_tensor(b"\n".join(text[cuts[name] :] for name, text in chapters.items())),
        train_files=tuple(f"{name} (start)" for name in chapters),
        validation_files=tuple(f"{name} (end)" for name in chapters),
    )


def single_file(path: Path) -> Corpus:
    """One file, cut in two."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--data {path} cannot be read: {error.strerror}") from error
    cut = len(text) * 9 // 10
    name = path.name
    return Corpus(name, as_tensor(text[:cut]), as_tensor(text[cut:]), (f"{name} (start)",), (f"{name} (end)",))


def is_validation(name: str) -> bool:
    """Whether the file of this name is kept for validation: one in ten, by a hash that is the same everywhere."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def as_tensor(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (each windows x context, int64): the bytes after `starts`, and the same one byte further."""
    tokens = text[starts[:, None] + torch.arange(context + 1)].long()
    return tokens[:, :-1], tokens[:, 1:]


def training_starts(text: Tensor, seed: int, step: int, count: int, context: int) -> Tensor:
    """Where the windows of a step begin: a function of (seed, step) alone, so all ranks, however many, agree on it."""
    generator = np.random.default_rng((seed, step))
    return torch.from_numpy(generator.integers(0, len(text) - context, size=count))


def validation_starts(text: Tensor, count: int, context: int) -> Tensor:
    """Where the fixed validation windows begin: evenly over the text, and not more than it holds side by side."""
    count = min(count, (len(text) - 1) // context)
    return torch.linspace(0, len(text) - context - 1, count, dtype=torch.float64).long()
