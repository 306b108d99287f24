"""The optimizer's state beside DeepSpeed's own files, in <save_dir>/<tag>/kl_dist: for any world size and stage.

DeepSpeed writes what its inner optimizer says as each rank's own file, or at stage 0 as rank 0's alone. Neither suits
state that is divided over ranks; so it is written by torch.distributed.checkpoint, by names of parameters, with the
groups' options and a manifest of checksums that comes last.

[Note: two halves] A save is ours and DeepSpeed's, one after the other, and may be cut between them. So each has an
identity of its own: it stands in our manifest, and in each of DeepSpeed's files, in what the optimizer and the client
say of themselves. Halves of different saves are refused before anything is loaded.
"""

from __future__ import annotations

import logging
import mmap
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from kl_dist.checkpoint import manifest, reading
from kl_dist.checkpoint.load import causes_of
from kl_dist.checkpoint.seals import sealed

log = logging.getLogger(__name__)

FOLDER, GROUPS = "kl_dist", "groups.pt"
SAVE = "kl_dist_save"
"""Under which DeepSpeed's files have the save's identity, beside what the client gives engine.save_checkpoint."""

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


def save(optimizer: Any, path: Path) -> str:
    """Write all of the state; a collective, which raises on all ranks alike. Returns the save's identity."""
    core = optimizer.core
    ranks, partial = core.parts.ranks, path.with_suffix(".partial")
    identity = ranks.gather_objects(f"{SAVE} {uuid.uuid4().hex}")[0]
    with ranks.together():
        state = core.state_dict()
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    dcp.save({"state": _by_name(state)}, storage_writer=dcp.FileSystemWriter(partial, sync_files=True))
    with ranks.together():
        if ranks.rank == 0:
            groups = [{key: x for key, x in group.items() if key != "params"} for group in optimizer.groups]
            torch.save(groups, partial / GROUPS)
            sums = manifest.checksums(partial, (file.name for file in partial.iterdir()))
            about = {"save": identity, "world": ranks.size, "steps": state["param_groups"][0]["saved"]["steps"]}
            manifest.publish(partial, path, sums, about)
    return identity


def load(optimizer: Any, path: Path) -> list[dict[str, Any]]:
    """Check all files, then fill the state that is there; returns the groups' options. A collective.

    Raises:
        ValueError: a file is missing or damaged, or of another save, method, model or recipe; on all ranks, with
            nothing changed.
    """
    core, ranks = optimizer.core, optimizer.core.parts.ranks
    with ranks.together():
        if ranks.rank == 0:
            check(path)
    steps = manifest.about(path).get("steps")
    state = {"state": _by_name(core.state_dict())}
    try:
        reading.load(state, path)
    except dcp.CheckpointException as problem:
        raise ValueError(f"{path} does not fit: {causes_of(problem)}. {REMEDY}") from problem
    groups = [{**group, "params": list(group["param_names"])} for group in core.param_groups]
    groups = groups if steps is None else [sealed(group, steps) for group in groups]
    with ranks.together():
        core.load_state_dict({"state": state["state"], "param_groups": groups})
    return torch.load(path / GROUPS, weights_only=True)


def check(path: Path) -> None:
    """Raises ValueError, naming the file, unless all files are as they were written, DeepSpeed's in the same save."""
    if not path.parent.is_dir():
        raise ValueError(f"there is no checkpoint {path.parent}")
    problem = manifest.fault(path)
    if problem is not None:
        raise ValueError(f"{path}/{problem}: {REMEDY}")
    about = manifest.about(path)
    if "save" not in about:
        log.warning(
            "%s is of an earlier version, and does not say whether DeepSpeed's files are of the same save", path
        )
        return
    for file in _of_deepspeed(path.parent, about["world"]):
        if not _says(file, about["save"]):
            raise ValueError(f"{file} and {path} are of two saves, of which one was cut short: {REMEDY}")


def _of_deepspeed(folder: Path, world: int) -> Iterator[Path]:
    """The files that DeepSpeed wrote on so many ranks; those that more of them have left are not loaded."""
    for file in sorted(folder.glob("*_states.pt")):
        rank = re.search(r"zero_pp_rank_(\d+)_", file.name)
        if rank is None or int(rank[1]) < world:
            yield file


def _says(file: Path, identity: str) -> bool:
    """Whether a file has these words in it: torch writes them, uncompressed, before all tensors."""
    with file.open("rb") as opened:
        if not opened.seek(0, 2):
            return False
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            return raw.find(identity.encode()) >= 0


def _by_name(state: dict[str, Any]) -> dict[str, Any]:
    """The tensors by names, for the numbers of parameters depend on what is frozen and on the stage."""
    pairs = (zip(group["params"], group["param_names"], strict=True) for group in state["param_groups"])
    names = {number: name for group in pairs for number, name in group}
    return {names[number]: entries for number, entries in state["state"].items()}
