"""The optimizer's state beside DeepSpeed's own files, in <save_dir>/<tag>/kl_dist: for any world size and stage.

DeepSpeed writes what its inner optimizer says as each rank's own file, or at stage 0 as rank 0's alone. Neither suits
state that is divided over ranks; so it is written by torch.distributed.checkpoint, by names of parameters, with the
groups' options and a manifest of checksums that comes last.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from kl_dist.checkpoint import manifest
from kl_dist.checkpoint.load import causes_of

FOLDER, GROUPS = "kl_dist", "groups.pt"

REMEDY = (
    "engine.load_checkpoint(.., load_optimizer_states=False) loads the weights alone, and the optimizer starts anew"
    " (optimizer_checkpoint='ignore' of a Lightning strategy)"
)


def folder(save_dir: Any, tag: Any) -> Path:
    return Path(save_dir) / str(tag) / FOLDER


def newest(load_dir: Any, universal: bool) -> str | None:
    """The tag that DeepSpeed would load."""
    path = Path(load_dir) / ("latest_universal" if universal else "latest")
    return path.read_text().strip() if path.is_file() else None


def save(optimizer: Any, path: Path) -> None:
    """Write all of the state; a collective, which raises on all ranks alike."""
    ranks, partial = optimizer.core.parts.ranks, path.with_suffix(".partial")
    with ranks.together():
        state = _state(optimizer.core)
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    dcp.save({"state": state}, storage_writer=dcp.FileSystemWriter(partial, sync_files=True))
    with ranks.together():
        if ranks.rank == 0:
            groups = [{key: x for key, x in group.items() if key != "params"} for group in optimizer.groups]
            torch.save(groups, partial / GROUPS)
            sums = manifest.checksums(partial, (file.name for file in partial.iterdir()))
            manifest.publish(partial, path, sums)


def load(optimizer: Any, path: Path) -> list[dict[str, Any]]:
    """Check all files, then fill the state that is there; returns the groups' options. A collective.

    Raises:
        ValueError: a file is missing or damaged, or of another method, model or recipe; on all ranks, with nothing
            changed.
    """
    core, ranks = optimizer.core, optimizer.core.parts.ranks
    with ranks.together():
        if ranks.rank == 0:
            check(path)
    state = {"state": _state(core)}
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(path))
    except dcp.CheckpointException as problem:
        raise ValueError(f"{path} does not fit: {causes_of(problem)}. {REMEDY}") from problem
    groups = [{**group, "params": list(group["param_names"])} for group in core.param_groups]
    core.load_state_dict({"state": state["state"], "param_groups": groups})
    return torch.load(path / GROUPS, weights_only=True)


def check(path: Path) -> None:
    """Raises ValueError, naming the file, unless all that the manifest lists is there and as it was written."""
    if not path.parent.is_dir():
        raise ValueError(f"there is no checkpoint {path.parent}")
    problem = manifest.fault(path)
    if problem is not None:
        raise ValueError(f"{path}/{problem}: {REMEDY}")


def _state(core: Any) -> dict[str, Any]:
    """By names, for the numbers of parameters depend on what is frozen and on the stage."""
    state = core.state_dict()
    pairs = (zip(group["params"], group["param_names"], strict=True) for group in state["param_groups"])
    names = {number: name for group in pairs for number, name in group}
    return {names[number]: entries for number, entries in state["state"].items()}
