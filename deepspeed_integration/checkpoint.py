"""Block state beside DeepSpeed's files: <save_dir>/<tag>/kl_dist, which any world size and stage can load."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

FOLDER, MANIFEST = "kl_dist", "manifest.json"


def folder(save_dir: Any, tag: Any) -> Path:
    return Path(save_dir) / str(tag) / FOLDER


def newest(load_dir: Any, universal: bool) -> str | None:
    path = Path(load_dir) / ("latest_universal" if universal else "latest")
    return path.read_text().strip() if path.is_file() else None


def _state(core: Any) -> dict[str, Any]:
    """By names: numbers of parameters depend on what is frozen and on the stage."""
    state = core.state_dict()
    names = {n: name for g in state["param_groups"] for n, name in zip(g["params"], g["param_names"], strict=True)}
    return {names[number]: entries for number, entries in state["state"].items()}


def save(optimizer: Any, path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    ranks = optimizer.core._ranks
    with ranks.together():
        if ranks.rank == 0:
            path.mkdir(parents=True, exist_ok=True)
            for old in path.iterdir():
                old.unlink()
    groups = [{k: x for k, x in g.items() if k != "params"} for g in optimizer._groups]
    with ranks.together():
        dcp.save({"state": _state(optimizer.core)}, storage_writer=dcp.FileSystemWriter(path, sync_files=True))
    with ranks.together():
        if ranks.rank == 0:
            import torch

            torch.save(groups, path / "groups.pt")
            sums = {p.name: _digest(p) for p in sorted(path.iterdir())}
            (path / MANIFEST).write_text(json.dumps(sums, indent=1))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def load(optimizer: Any, path: Path) -> list[dict[str, Any]]:
    """Check all, then fill the state that is there; returns the groups' options. A collective."""
    import torch
    import torch.distributed.checkpoint as dcp

    core = optimizer.core
    with core._ranks.together():
        if core._ranks.rank == 0:
            _check(path)
    state = {"state": _state(core)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(path))
    groups = [{**g, "params": list(g["param_names"])} for g in core.param_groups]
    core.load_state_dict({"state": state["state"], "param_groups": groups})
    return torch.load(path / "groups.pt", weights_only=False)


def _check(path: Path) -> None:
    try:
        sums = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path / MANIFEST} cannot be read ({error}): the checkpoint has no state of KLShampoo"
        ) from None
    for name, digest in sums.items():
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing")
        if _digest(path / name) != digest:
            raise ValueError(f"{path / name} is damaged: its checksum is not that of the manifest")
