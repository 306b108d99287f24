"""Checkpoints by torch.distributed.checkpoint: every rank writes what it holds, and any number of ranks can load it.

    OUT/checkpoint/step-000400/__0_0.distcp, __1_0.distcp, .metadata    model and optimizer
    OUT/checkpoint/step-000400/run.json                                 step and options
    OUT/checkpoint/step-000400/manifest.json                            checksums, and which save of which run it is
    OUT/run.id                                                          the run that saves here

A save goes into a folder with another name, which is renamed when all of it is on the disk. Which step, run and number
of processes it is of stands in the manifest, in run.json and in the state, and must agree, with the folder's name too.
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
from launch import folders, identity
from launch.optimizers import Trainer
from launch.options import Options, UsageError
from launch.ranks import Ranks

# torch.distributed.checkpoint is imported where it is used: it takes seconds.

MUST_AGREE = ("optimizer", "layers", "width", "heads", "context", "seed", "tokens_per_step")
"""Options without which the saved tensors have no place to go, or the data another order."""

RUN, SAVE = "run.json", "save"


class SaveError(Exception):
    """A checkpoint could not be written; raised on all ranks alike."""


def save(folder: Path, step: int, options: Options, ranks: Ranks, model: nn.Module, trainer: Trainer) -> Path:
    """Write the checkpoint of `step`, then delete those that `--keep` is too few for; every rank calls this.

    Raises:
        SaveError: it could not be written, on all ranks; earlier checkpoints are as they were.
    """
    final = folder / f"step-{step:06d}"
    partial = folder / f"{final.name}.partial"
    about = {"step": step, "run": ranks.tell(identity.of(folder.parent)), "world": ranks.size}
    try:
        sums = _write(partial, about, options, ranks, model, trainer)
        with _on_all(ranks):
            if ranks.first:
                manifest.publish(partial, final, sums, about)
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


def _write(
    partial: Path, about: dict[str, Any], options: Options, ranks: Ranks, model: nn.Module, trainer: Trainer
) -> dict[str, str]:
    """All files but the manifest; returns their checksums, each rank having read its own."""
    import torch.distributed.checkpoint as dcp

    with _on_all(ranks):
        if ranks.first:
            folders.sweep(partial.parent)
            partial.mkdir(parents=True)
            (partial / RUN).write_text(json.dumps({**about, "options": asdict(options)}))
    with _on_all(ranks), _quiet():
        state = {**_state(model, trainer), SAVE: about}
        dcp.save(state, storage_writer=dcp.FileSystemWriter(partial, sync_files=True))
    sums: dict[str, str] = {}
    with _on_all(ranks):
        names = [path.name for path in partial.glob(f"__{ranks.rank}_*")]
        sums = manifest.checksums(partial, names + ([RUN, ".metadata"] if ranks.first else []))
    return {name: digest for some in ranks.gather(sums) for name, digest in some.items()}


def load(checkpoint: Path, options: Options, ranks: Ranks, model: nn.Module, trainer: Trainer) -> int:
    """Continue from `checkpoint`: fills model and optimizer in place and returns the step it was saved after.

    The optimizer's options are those that this job asks for, not those that were saved.

    Raises:
        UsageError: it is of another job, or its files are not of one save; on all ranks.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    saved = json.loads((checkpoint / RUN).read_text())
    for name in MUST_AGREE:
        before, now = saved["options"][name], getattr(options, name)
        if before != now:
            raise UsageError(f"{checkpoint} was saved with {name} {before}, this job asks for {now}")
    asked = [{key: value for key, value in group.items() if key != "params"} for group in trainer.groups]
    problem = None
    try:
        _fill(checkpoint, saved, model, trainer)
    except (CheckpointException, ValueError) as error:
        problem = _reason(error)
    problems = [told for told in ranks.gather(problem) if told is not None]
    if problems:
        raise UsageError(f"{checkpoint} does not fit what this job asks for: {problems[0]}")
    for group, its_options in zip(trainer.groups, asked, strict=True):
        group.update(its_options)
    return saved["step"]


def _fill(checkpoint: Path, saved: dict[str, Any], model: nn.Module, trainer: Trainer) -> None:
    """Read a checkpoint into model and optimizer; a collective. First that it is of one save.

    Raises:
        ValueError or CheckpointException: it is not, does not fit or is damaged.
    """
    from torch.distributed.checkpoint.state_dict import set_state_dict

    from kl_dist.checkpoint import reading

    about = manifest.about(checkpoint)
    if about:  # an earlier version said nothing
        told: dict[str, Any] = {SAVE: dict.fromkeys(about)}
        with _quiet():
            reading.load(told, checkpoint)
        for where, what in ((RUN, {key: saved.get(key) for key in about}), ("the state", told[SAVE])):
            if what != about:
                raise ValueError(f"{manifest.MANIFEST} is of {_said(about)}, {where} of {_said(what)}")
    state = _state(model, trainer)
    with _quiet():
        reading.load(state, checkpoint)
        set_state_dict(
            model,
            trainer.optimizers,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def _said(about: dict[str, Any]) -> str:
    return ", ".join(f"{key} {about[key]}" for key in sorted(about))


def choose(folder: Path, which: str, ranks: Ranks) -> Path | None:
    """The checkpoint that `--resume` means, the same on every rank; None to start from the beginning.

    What is damaged is named and passed over for the one before.

    Raises:
        UsageError: there is none, and "auto" was not asked for; or it is of another run, and was not asked for.
    """
    chosen, complaint = ranks.tell(_choose(folder, which) if ranks.first else None)
    if complaint is not None:
        raise UsageError(complaint)
    return chosen


def _choose(folder: Path, which: str) -> tuple[Path | None, str | None]:
    if which not in ("auto", "newest"):
        problem = fault(Path(which))
        return Path(which), problem and f"--resume {which}: {problem}"
    own = identity.of(folder.parent)
    for path in folders.saved(folder):
        problem = fault(path)
        if problem is None:
            run = manifest.about(path).get("run")
            if None not in (own, run) and own != run:
                other = f"{path} was saved by run {run}, and {folder.parent} is of run {own}"
                return None, f"{other}: --resume {path} goes on from it all the same"
            return path, None
        print(f"{path} is passed over: {problem}", file=sys.stderr)
    if which == "auto":
        return None, None
    return None, f"--resume found no checkpoint in {folder}; leave it out, or say --resume auto, to start anew"


def run_of(checkpoint: Path, which: str) -> str | None:
    """The run that goes on from a checkpoint: its own; that of another folder's begins a run of its own."""
    return manifest.about(checkpoint).get("run") if which in ("auto", "newest") else None


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or with its name, or None."""
    problem = manifest.fault(path)
    if problem is not None:
        return problem
    step, named = manifest.about(path).get("step"), folders.NAME.fullmatch(path.name)
    if None not in (step, named) and int(named[1]) != step:  # type: ignore[index]
        return f"it is of step {step}, and was given the name of another"
    return None


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
