"""Checkpoints: a folder a step, complete or not there at all.

    OUT/checkpoint/step-000400/model.pt                    weights, step, options; written by rank 0
    OUT/checkpoint/step-000400/optimizer-rank1-of-2.pt     the optimizer state that rank 1 holds; one file a rank

Optimizer state is divided over the ranks, so each writes its own. All write into a folder with another name; only when
the last rank is done does rank 0 rename it, so a save that was interrupted is never taken for a checkpoint.
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from launch.model import Model
from launch.optimizers import Trainer
from launch.options import Options, UsageError
from launch.parallel import whole
from launch.ranks import Ranks

MUST_AGREE = ("optimizer", "parallel", "inner", "layers", "width", "heads", "context")
"""Options without which the saved tensors have no place to go."""


def save(folder: Path, step: int, options: Options, ranks: Ranks, model: Model, trainer: Trainer) -> Path:
    """Write the checkpoint of `step`; every rank calls this. Returns its folder."""
    final = folder / f"step-{step:06d}"
    partial = folder / f"{final.name}.partial"
    weights = whole_weights(model)
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        run = {"step": step, "world_size": ranks.size, "options": asdict(options)}
        torch.save({"model": weights, **run}, partial / "model.pt")
    ranks.barrier()
    torch.save(trainer.state_dict(), partial / optimizer_file(ranks))
    ranks.barrier()
    if ranks.first:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    return final


def load(checkpoint: Path, options: Options, ranks: Ranks, model: Model, trainer: Trainer) -> int:
    """Continue from `checkpoint`: fills model and optimizer in place and returns the step it was saved after."""
    saved = _read(checkpoint / "model.pt", ranks)
    if saved["world_size"] != ranks.size:
        raise UsageError(
            f"{checkpoint} was saved by {saved['world_size']} processes and this job has {ranks.size}; "
            f"start it with {saved['world_size']}, because each holds its own part of the optimizer's state"
        )
    for name in MUST_AGREE:
        before, now = saved["options"][name], getattr(options, name)
        if before != now:
            raise UsageError(f"{checkpoint} was saved with {name} {before}, this job asks for {now}")
    load_whole_weights(model, saved["model"])
    trainer.load_state_dict(_read(checkpoint / optimizer_file(ranks), ranks))
    return saved["step"]


def whole_weights(model: Model) -> dict[str, Any]:
    """The model's state dict with whole tensors, however they are sharded; a collective where they are."""
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def load_whole_weights(model: Model, weights: dict[str, Any]) -> None:
    """The inverse: each rank keeps what belongs to it."""
    if not any(hasattr(parameter, "placements") for parameter in model.parameters()):
        model.load_state_dict(weights)
        return
    # only here: it takes seconds to import
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))


def newest(folder: Path) -> Path:
    """The complete checkpoint with the highest step."""
    complete = sorted(folder.glob("step-" + "[0-9]" * 6))
    if not complete:
        raise UsageError(f"--resume found no checkpoint in {folder}; leave it out to start from the beginning")
    return complete[-1]


def optimizer_file(ranks: Ranks) -> str:
    return f"optimizer-rank{ranks.rank}-of-{ranks.size}.pt"


def _read(path: Path, ranks: Ranks) -> dict[str, Any]:
    return torch.load(path, map_location=ranks.device, weights_only=True)
