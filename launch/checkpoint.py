"""Checkpoints by torch.distributed.checkpoint: every rank writes what it holds, and any number of ranks can load it.

    OUT/checkpoint/step-000400/__0_0.distcp, __1_0.distcp, .metadata    model and optimizer
    OUT/checkpoint/step-000400/run.json                                 step and options
    OUT/checkpoint/step-000400/manifest.json                            checksums

A save goes into a folder with another name, which is renamed when all of it is on the disk.
"""

import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from kl_dist.checkpoint import manifest
from launch import folders
from launch.optimizers import Trainer
from launch.options import Options, UsageError
from launch.ranks import Ranks

# torch.distributed.checkpoint is imported where it is used: it takes seconds.

MUST_AGREE = ("optimizer", "layers", "width", "heads", "context", "seed", "tokens_per_step")
"""Options without which the saved tensors have no place to go, or the data another order."""

RUN = "run.json"


class SaveError(Exception):
    """A checkpoint could not be written; raised on all ranks alike."""


def save(folder: Path, step: int, options: Options, ranks: Ranks, model: nn.Module, trainer: Trainer) -> Path:
    """Write the checkpoint of `step`, then delete those that `--keep` is too few for; every rank calls this.

    Raises:
        SaveError: it could not be written, on all ranks; earlier checkpoints are as they were.
    """
    final = folder / f"step-{step:06d}"
    partial = folder / f"{final.name}.partial"
    run = {"step": step, "options": asdict(options)}
    try:
        sums = _write(partial, run, ranks, model, trainer)
        with _on_all(ranks):
            if ranks.first:
                manifest.publish(partial, final, sums)
    except SaveError:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if ranks.first and options.keep is not None:
        try:
            folders.keep(folder, options.keep)
        except OSError as error:
            print(f"Old checkpoints could not be deleted: {error}", file=sys.stderr)
    return final


def _write(partial: Path, run: dict[str, Any], ranks: Ranks, model: nn.Module, trainer: Trainer) -> dict[str, str]:
    """All files but the manifest; returns their checksums, each rank having read its own."""
    import torch.distributed.checkpoint as dcp

    with _on_all(ranks):
        if ranks.first:
            folders.sweep(partial.parent)
            partial.mkdir(parents=True)
            (partial / RUN).write_text(json.dumps(run))
    with _on_all(ranks), _quiet():
        dcp.save(_state(model, trainer), storage_writer=dcp.FileSystemWriter(partial, sync_files=True))
    sums: dict[str, str] = {}
    with _on_all(ranks):
        names = [path.name for path in partial.glob(f"__{ranks.rank}_*")]
        sums = manifest.checksums(partial, names + ([RUN, ".metadata"] if ranks.first else []))
    return {name: digest for some in ranks.gather(sums) for name, digest in some.items()}


def load(checkpoint: Path, options: Options, model: nn.Module, trainer: Trainer) -> int:
    """Continue from `checkpoint`: fills model and optimizer in place and returns the step it was saved after.

    The optimizer's options are those that this job asks for, not those that were saved.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import set_state_dict

    saved = json.loads((checkpoint / RUN).read_text())
    for name in MUST_AGREE:
        before, now = saved["options"][name], getattr(options, name)
        if before != now:
            raise UsageError(f"{checkpoint} was saved with {name} {before}, this job asks for {now}")
    state = _state(model, trainer)
    asked = [{key: value for key, value in group.items() if key != "params"} for group in trainer.groups]
    try:
        with _quiet():
            dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint))
            set_state_dict(
                model,
                trainer.optimizers,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
    except (CheckpointException, ValueError) as error:
        raise UsageError(f"{checkpoint} does not fit what this job asks for: {_reason(error)}") from error
    for group, its_options in zip(trainer.groups, asked, strict=True):
        group.update(its_options)
    return saved["step"]


def choose(folder: Path, which: str, ranks: Ranks) -> Path | None:
    """The checkpoint that `--resume` means, the same on every rank; None to start from the beginning.

    What is damaged is named and passed over for the one before.

    Raises:
        UsageError: there is none, and "auto" was not asked for.
    """
    chosen, complaint = ranks.tell(_choose(folder, which) if ranks.first else None)
    if complaint is not None:
        raise UsageError(complaint)
    return chosen


def _choose(folder: Path, which: str) -> tuple[Path | None, str | None]:
    if which not in ("auto", "newest"):
        problem = manifest.fault(Path(which))
        return Path(which), problem and f"--resume {which}: {problem}"
    for path in folders.saved(folder):
        problem = manifest.fault(path)
        if problem is None:
            return path, None
        print(f"{path} is passed over: {problem}", file=sys.stderr)
    if which == "auto":
        return None, None
    return None, f"--resume found no checkpoint in {folder}; leave it out, or say --resume auto, to start anew"


def _state(model: nn.Module, trainer: Trainer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, optimizer = get_state_dict(model, trainer.optimizers)
    return {"model": weights, "optimizer": optimizer}


@contextmanager
def _on_all(ranks: Ranks) -> Iterator[None]:
    """Run the block; what fails on one rank is a SaveError on all."""
    from torch.distributed.checkpoint.api import CheckpointException

    problem = None
    try:
        yield
    except (OSError, CheckpointException) as error:
        problem = _reason(error)
    problems = [told for told in ranks.gather(problem) if told is not None]
    if problems:
        raise SaveError(problems[0])


def _reason(error: BaseException) -> str:
    """One line: of what went wrong on several ranks, the first."""
    failures = getattr(error, "failures", None)
    return str(next(iter(failures.values()))[0] if failures else error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that a single process saves alone, which it does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
