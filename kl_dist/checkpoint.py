"""What a saved state must be to be loaded: checks that come before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kl_dist import options

ORIGIN = "kl_dist"
"""The entry of a state dict that says which rank of how many it was saved on."""


@torch.no_grad()
def load(
    saved: Mapping[str, Any],
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    rank: int,
    world_size: int,
) -> None:
    """Copy a saved state into the tensors and options that are there, after all checks.

    Raises:
        ValueError: it is not of this optimizer, rank or world size; nothing is changed then.
    """
    check_origin(saved, rank, world_size)
    check_groups(groups, saved["param_groups"])
    for target, source in matching_state(groups, state, saved["state"]):
        target.copy_(source)
    for group, other in zip(groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in other.items() if key not in ("params", "param_names")})


def check_origin(saved: Mapping[str, Any], rank: int, world_size: int) -> None:
    """Raises ValueError unless `saved` is KLShampoo's, from the same rank of as many."""
    origin = saved.get(ORIGIN)
    if origin is None:
        raise ValueError(f"this is not the state of KLShampoo (it has no entry {ORIGIN!r}): start the optimizer anew")
    for key in ("state", "param_groups"):
        if key not in saved:
            raise ValueError(f"the saved state is not whole: it has no entry {key!r}")
    for key, mine in (("world_size", world_size), ("rank", rank)):
        if origin[key] != mine:
            raise ValueError(f"the state was saved with {key} {origin[key]}, here it is {mine}: resume with the same")


def check_groups(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError unless the groups hold as many parameters, with the options that shape the state."""
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
        raise ValueError("the saved parameter groups have other lengths than this optimizer's")
    for index, (group, other) in enumerate(zip(groups, saved, strict=True)):
        for key in (*options.DEFAULTS, "base_lr"):
            if key not in other:
                raise ValueError(f"the saved parameter group {index} lacks the option {key!r}")
            if key in options.STRUCTURAL and other[key] != group[key]:
                raise ValueError(
                    f"parameter group {index} was saved with {key}={other[key]!r}, here it is {group[key]!r}"
                )


def matching_state(
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    saved: Mapping[int, Mapping[str, Tensor]],
) -> list[tuple[Tensor, Tensor]]:
    """(target, source) pairs of all state tensors.

    Raises:
        ValueError: a tensor is missing, too many, or of another shape; names it and its parameter.
    """
    pairs = []
    named = [pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True)]
    for number, (name, parameter) in enumerate(named):
        mine, theirs = state.get(parameter, {}), saved.get(number, {})
        for key in sorted(mine.keys() ^ theirs.keys()):
            where = "is missing from the saved state" if key in mine else "was saved but is not owned by this rank"
            raise ValueError(f"state {key!r} of parameter {name!r} {where}")
        for key, target in mine.items():
            source = theirs[key]
            if target.shape != source.shape:
                raise ValueError(
                    f"state {key!r} of parameter {name!r} has shape {tuple(source.shape)} in the saved state,"
                    f" here it is {tuple(target.shape)}"
                )
            pairs.append((target, source))
    return pairs
