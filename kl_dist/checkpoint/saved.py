"""A saved state, understood: what a state dict of any form says, by names of parameters.

Three forms are read alike. In the *local* one (`kl_dist.checkpoint.local`) a tensor is what one rank holds; in the
*full* one it is all of it; in that of torch.distributed.checkpoint it is a `Divided`, which knows. See
kl_dist.checkpoint.inventory, [Note: canonical state], for the tensors and their keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kl_dist.checkpoint import verify
from kl_dist.checkpoint.holdings import is_divided
from kl_dist.checkpoint.local import ORIGIN, STEPS
from kl_dist.layouts.dtensor import is_dtensor

REMEDY = "of a full state, kl_dist.load_full_state_dict(optimizer, state, strict=False) loads what fits"


@dataclass(frozen=True)
class Saved:
    """A state dict, read."""

    groups: Sequence[Mapping[str, Any]]
    tensors: Mapping[tuple[str, str], Tensor]  # by name of the parameter and key
    local: bool  # what one rank holds, in plain tensors
    own: Mapping[Any, Any]  # the user's, under keys that are no parameters; in the local form alone
    recipes: Mapping[str, str]  # by name of the parameter
    steps: int | None  # that the optimizer had made, where it is said
    sealed: int | None  # the same, as its checksums have it; None of what has none
    called: Mapping[str, str]  # by its name here what a parameter is called there, where that is said


def read(state: Any, groups: Sequence[Mapping[str, Any]]) -> Saved:
    """Understand a state dict of any form.

    Raises:
        ValueError: it is not KLShampoo's.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("param_groups"), (list, tuple)):
        raise ValueError("this is not the state of KLShampoo: it has no 'param_groups'")
    if not isinstance(state.get("state"), Mapping):
        raise ValueError("the saved state is not whole: it has no entry 'state'")
    saved = state["param_groups"]
    for index, group in enumerate(saved):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(f"the saved parameter group {index} names no 'params'")
        if "method" not in group or "recipe" not in group:
            raise ValueError(
                f"this is not the state of KLShampoo (its parameter group {index} has no 'method'): start the optimizer"
                " anew"
            )
        if not isinstance(group.get("param_names", []), (list, tuple)):
            raise ValueError(f"the 'param_names' of the saved parameter group {index} are no list")
    local = ORIGIN in state
    mine = {key: value for key, value in state["state"].items() if local and not isinstance(key, int)}
    theirs = {key: value for key, value in state["state"].items() if key not in mine}
    names = _names(saved, groups)
    recipes = {
        names[key]: str(group["recipe"]) for group in saved for key in group["params"] if _is_key(key) and key in names
    }
    steps, sealed = state.get(STEPS), verify.steps_of(saved)
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
        raise ValueError(f"the entry {STEPS!r} of the saved state is damaged: {steps!r}")
    if None not in (steps, sealed) and steps != sealed:
        raise ValueError(f"the saved state is of several saves: {STEPS!r} is {steps}, its groups are of step {sealed}")
    said = {
        names[key]: name
        for group in saved
        for key, name in zip(group["params"], names_in(group), strict=False)
        if _is_key(key) and key in names
    }
    steps = sealed if steps is None else steps
    return Saved(saved, dict(_tensors(theirs, names)), local, mine, recipes, steps, sealed, said)


def _names(saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> dict[Any, str]:
    """What the saved state's identifiers of parameters mean: by their names, or else by their order here.

    By order where either side was given no names and made some up.
    """
    here = [group["param_names"] for group in groups]
    alike = [len(group["params"]) for group in saved] == [len(names) for names in here]
    found: dict[Any, str] = {}
    for index, group in enumerate(saved):
        names = names_in(group) or [str(key) for key in group["params"]]
        if alike and (not names_in(group) or is_made_up(names) or is_made_up(here[index])):
            names = here[index]
        if len(names) < len(group["params"]):
            raise ValueError(f"the saved parameter group {index} has more parameters than names; {REMEDY}")
        found.update((key, name) for key, name in zip(group["params"], names, strict=False) if _is_key(key))
    return found


def names_in(group: Mapping[str, Any]) -> list[str]:
    """The names of a saved group's parameters; torch may have taken parameters away from it, and left their names."""
    return list(group.get("param_names") or ())[: len(group["params"])]


def is_made_up(names: Sequence[str]) -> bool:
    """Whether all of a group's names are those that parameters without any are given (see `kl_dist.groups`)."""
    return all(isinstance(name, str) and re.fullmatch(r"group\d+\.param\d+'*", name) for name in names)


def _is_key(key: Any) -> bool:
    return isinstance(key, (int, str))


def _tensors(state: Mapping[Any, Any], names: Mapping[Any, str]) -> Iterator[tuple[tuple[str, str], Tensor]]:
    for identifier, entries in state.items():
        if identifier not in names or not isinstance(entries, Mapping):
            raise ValueError(f"the saved state {identifier!r} belongs to no parameter")
        for key, tensor in entries.items():
            if key == "step" and isinstance(tensor, (int, float)):  # as some make of it that can be a number
                tensor = torch.tensor([int(tensor)])
            if not isinstance(tensor, Tensor):
                raise ValueError(f"state {key!r} of parameter {names[identifier]!r} is no tensor in the saved state")
            yield (names[identifier], key), _as_given(tensor)


def _as_given(tensor: Any) -> Tensor:
    """What torch has spread to all ranks as a DTensor, as the plain tensor it is; flags, once bool, as numbers."""
    plain = tensor.to_local() if is_dtensor(tensor) and not is_divided(tensor) else tensor
    return plain.to(torch.uint8) if plain.dtype is torch.bool else plain
