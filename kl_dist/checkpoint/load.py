"""State of the optimizer, loaded: checks that come before anything is written, and the copying itself.

Three forms of a state dict are read alike. In the *local* one (`kl_dist.checkpoint.local`) a tensor is what one rank
holds; in the *full* one it is all of it; in that of torch.distributed.checkpoint it is a `Divided`, which knows. See
kl_dist.checkpoint.inventory, [Note: canonical state], for the tensors and their keys.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kl_dist import options
from kl_dist.checkpoint import values, verify
from kl_dist.checkpoint.holdings import Holding
from kl_dist.checkpoint.inventory import FORM
from kl_dist.checkpoint.local import ORIGIN, STEPS, origin_of
from kl_dist.checkpoint.sums import SAVED, by_unit, entry_of
from kl_dist.layouts.dtensor import is_dtensor
from kl_dist.methods import form
from kl_dist.ranks import Ranks


class InPlaceError(ValueError):
    """A damaged state has taken the place of the one that was here."""


REMEDY = "of a full state, kl_dist.load_full_state_dict(optimizer, state, strict=False) loads what fits"


def causes_of(problem: BaseException) -> str:
    """What torch.distributed.checkpoint says went wrong, each cause once, whichever ranks met it."""
    failures = getattr(problem, "failures", None)
    return "; ".join(sorted({str(cause) for cause, _ in failures.values()})) if failures else str(problem)


# -- checks ------------------------------------------------------------------------------------------------------------


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
        for key, name in zip(group["params"], _names_in(group), strict=False)
        if _is_key(key) and key in names
    }
    steps = sealed if steps is None else steps
    return Saved(saved, dict(_tensors(theirs, names)), local, mine, recipes, steps, sealed, said)


def check_origin(saved: Any, here: Mapping[str, Any]) -> None:
    """Raises ValueError unless what one rank saved was held by this rank of as many."""
    if not isinstance(saved, Mapping):
        raise ValueError(f"the entry {ORIGIN!r} of the saved state is damaged: {saved!r}")
    for key in ("world_size", "rank"):
        if saved.get(key) != here[key]:
            raise ValueError(
                f"the state was saved with {key} {saved.get(key)}, here it is {here[key]}: this is the part of"
                " one rank; to resume elsewhere call consolidate_state_dict() before the save, or save with"
                " torch.distributed.checkpoint or kl_dist.full_state_dict"
            )


def check_division(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises ValueError when the ranks had divided the same state among them in another way."""
    if here["world_size"] > 1 and saved.get("division") != here["division"]:
        raise ValueError(
            "the state was saved by ranks that held other parts of it (another layout, or parameters given in another"
            " order): save with torch.distributed.checkpoint or kl_dist.full_state_dict to resume elsewhere"
        )


def _names(saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> dict[Any, str]:
    """What the saved state's identifiers of parameters mean: by their names, or else by their order here.

    By order where either side was given no names and made some up.
    """
    here = [group["param_names"] for group in groups]
    alike = [len(group["params"]) for group in saved] == [len(names) for names in here]
    found: dict[Any, str] = {}
    for index, group in enumerate(saved):
        names = _names_in(group) or [str(key) for key in group["params"]]
        if alike and (not _names_in(group) or is_made_up(names) or is_made_up(here[index])):
            names = here[index]
        if len(names) < len(group["params"]):
            raise ValueError(f"the saved parameter group {index} has more parameters than names; {REMEDY}")
        found.update((key, name) for key, name in zip(group["params"], names, strict=False) if _is_key(key))
    return found


def _called(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By its name here what a parameter is called in a saved state."""
    pairs = zip(groups, saved, strict=False)
    return {
        mine: theirs
        for group, other in pairs
        for mine, theirs in zip(group["param_names"], _names_in(other), strict=False)
    }


def _names_in(group: Mapping[str, Any]) -> list[str]:
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
    plain = tensor.to_local() if is_dtensor(tensor) and not _divided(tensor) else tensor
    return plain.to(torch.uint8) if plain.dtype is torch.bool else plain


def check_groups(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError unless the groups have the same parameters, and the options that shape their state."""
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
        raise ValueError(f"the saved parameter groups have other lengths than this optimizer's; {REMEDY}")
    for index, (group, other) in enumerate(zip(groups, saved, strict=True)):
        saved_names = _names_in(other) or group["param_names"]
        nameless = is_made_up(saved_names) or is_made_up(group["param_names"])
        for mine, theirs in zip(group["param_names"], saved_names, strict=False):
            if mine != theirs and not nameless:
                raise ValueError(
                    f"parameter group {index} was saved with parameter {theirs!r} where {mine!r} is here: give"
                    f" KLShampoo the same parameters in the same order; {REMEDY}"
                )
        for key in (*options.DEFAULTS, "base_lr"):
            if key not in other and key not in options.CAME_LATER:
                raise ValueError(f"the saved parameter group {index} lacks the option {key!r}")
            if key in options.STRUCTURAL and _structure(other, key) != _structure(group, key):
                raise ValueError(
                    f"parameter group {index} was saved with {key}={other[key]!r}, here it is {group[key]!r}: construct"
                    " KLShampoo with what was saved, or start its state anew"
                )
        try:
            options.check_numbers({**group, **_taken(other)})
        except (ValueError, TypeError) as problem:
            raise ValueError(f"the saved parameter group {index}: {problem}") from None


def misfit(holding: Holding, saved: Saved) -> str | None:
    """Why a saved tensor cannot be loaded, or None where it can; the same on all ranks unless they were given other
    files."""
    entry = holding.entry
    what = f"state {entry.key!r} of parameter {holding.name!r}"
    tensor = saved.tensors.get((holding.name, entry.key))
    if entry.is_form:
        return _other_form(holding, saved)
    if tensor is None:
        return f"{what} is missing from the saved state"
    wanted: tuple[int, ...] = tuple(holding.value.shape) if saved.local and not _divided(tensor) else entry.shape
    if tuple(tensor.shape) != wanted:
        return f"{what} has shape {tuple(tensor.shape)} in the saved state, here it is {wanted}"
    if tensor.dtype not in (entry.dtype, dict(entry.dtypes).get(saved.recipes.get(holding.name, ""))):
        return f"{what} has dtype {tensor.dtype} in the saved state, here it is {entry.dtype}"
    if _divided(tensor) and tensor.boxes != holding.boxes:  # type: ignore[attr-defined]
        return f"{what} is divided over the ranks in another way in the saved state"
    return None


def damage(holding: Holding, saved: Saved) -> str | None:
    """What is wrong with the values of a saved tensor that fits, or None."""
    if holding.entry.constant is not None:
        return None
    tensor = saved.tensors[holding.name, holding.entry.key]
    wrong = values.fault(holding.entry.field, _here(tensor), holding.memory.device)
    return None if wrong is None else f"state {holding.entry.key!r} of parameter {holding.name!r} {wrong}"


def _other_form(holding: Holding, saved: Saved) -> str | None:
    """Why a parameter's state means something else. Without any form it is one that torch had flattened: it leaves the
    form out, having found it in the file."""
    forms = [key for name, key in saved.tensors if name == holding.name and key.startswith(FORM)]
    if not forms or holding.entry.key in forms:
        return None
    return f"parameter {holding.name!r} was saved as {forms[0]!r}, here it is {holding.entry.key!r}"


def homeless(held: Sequence[Holding], saved: Saved) -> list[str]:
    """What was saved and has no place here."""
    known = {(holding.name, holding.entry.key) for holding in held}
    known |= {(unit[0].name, entry_of(unit).key) for unit in by_unit(held)}
    return [f"state {key!r} of parameter {name!r}" for name, key in saved.tensors if (name, key) not in known]


def check_all(held: Sequence[Holding], saved: Saved, frozen: Collection[str] = ()) -> list[Holding]:
    """What there is to load: all of it, but for parameters that are frozen now and of which nothing was handed over.

    torch.distributed.checkpoint.state_dict leaves those out.

    Raises:
        ValueError: a tensor has no place, or a place no tensor, or a value cannot be what it stands for.
        InPlaceError: the last, of what torch.distributed.checkpoint has read into the state that is here.
    """
    given = {name for name, _ in saved.tensors}
    wanted = [holding for holding in held if holding.name in given or holding.name not in frozen]
    for holding in wanted:
        problem = misfit(holding, saved)
        if problem is not None:
            raise ValueError(f"{problem}; {REMEDY}")
    for what in homeless(held, saved):
        raise ValueError(f"{what} was saved, but here it is frozen or not there; {REMEDY}")
    for holding in wanted:
        problem = damage(holding, saved)
        if problem is not None and _is_in_place(holding, saved):
            raise InPlaceError(f"{problem}, and was read into the state that is here: load another checkpoint")
        if problem is not None:
            raise ValueError(f"{problem} in the saved state: load another checkpoint; {REMEDY}")
    return wanted


def faults(held: Sequence[Holding], saved: Saved) -> Iterator[tuple[list[Holding], str]]:
    """The units that fit and are not as they were saved, each with what is wrong: see kl_dist.checkpoint.verify."""
    dtypes = {
        (one.name, one.entry.key): dict(one.entry.dtypes).get(saved.recipes.get(one.name, ""), one.entry.dtype)
        for one in held
    }
    is_full = not saved.local and not any(_divided(x) for x in saved.tensors.values())
    return verify.faults(held, saved.tensors, saved.sealed, saved.called, dtypes, is_full)


def check_options(state: Any) -> None:
    """Raises ValueError unless the options of a state's groups are as they were saved."""
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    verify.check_options(groups if isinstance(groups, (list, tuple)) else ())


def _divided(tensor: Tensor) -> bool:
    return hasattr(tensor, "boxes")


def _here(tensor: Tensor) -> Tensor:
    """What this rank has of it."""
    return tensor._local_tensor if _divided(tensor) else tensor  # type: ignore[attr-defined]


def _is_in_place(holding: Holding, saved: Saved) -> bool:
    """Whether the saved tensor is the one that is here, as torch.distributed.checkpoint loads."""
    mine, given = holding.memory, _here(saved.tensors[holding.name, holding.entry.key])
    return bool(mine.numel()) and mine.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()


def was_read_here(state: Any, held: Sequence[Holding]) -> bool:
    """Whether torch.distributed.checkpoint has read a state into what is here: its checksums were written since."""
    own = {holding.memory.untyped_storage().data_ptr() for holding in held if holding.memory.numel()}
    entries = state.get("state") if isinstance(state, Mapping) else None
    for one in entries.values() if isinstance(entries, Mapping) else ():
        tensors = {key: x for key, x in one.items() if isinstance(x, Tensor)} if isinstance(one, Mapping) else {}
        written = any(verify.is_sums(str(key)) and _here(x)._version for key, x in tensors.items())
        if written and any(_here(x).untyped_storage().data_ptr() in own for x in tensors.values()):
            return True
    return False


def in_place(problem: ValueError) -> InPlaceError:
    """The same, with what it means for the state that is here."""
    if isinstance(problem, InPlaceError):
        return problem
    return InPlaceError(f"{problem}. It was read into the state that is here, which is a mixture now")


# -- copying -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load(
    state: Any,
    groups: Sequence[dict[str, Any]],
    held: Sequence[Holding],
    ranks: Ranks,
    frozen: Collection[str],
) -> Saved:
    """Copy a saved state of any form into the tensors and options that are there, after all checks; local.

    Args:
        frozen: names of parameters that may be missing from the saved state.

    Returns:
        What was read.

    Raises:
        ValueError: it does not fit, or is damaged; nothing is changed then, unless it is an InPlaceError.
    """
    saved = read(state, groups)
    here = origin_of(held, ranks, _called(groups, saved.groups)) if saved.local else {}
    if saved.local:
        check_origin(state[ORIGIN], here)
    check_groups(groups, saved.groups)
    wanted = check_all(held, saved, frozen)
    if saved.local:
        check_division(state[ORIGIN], here)
    for _, problem in faults(wanted, saved):
        raise ValueError(problem)
    for holding in wanted:
        if holding.entry.constant is not None or not holding.memory.numel():
            continue
        tensor = saved.tensors[holding.name, holding.entry.key]
        if _divided(tensor):
            holding.fill(tensor._local_tensor)  # type: ignore[attr-defined]
        elif saved.local:
            holding.fill(tensor)
        else:
            holding.fill_from_all(tensor)
    take_options(groups, saved.groups)
    return saved


def take_options(groups: Sequence[dict[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Every option of the saved groups, as torch.optim does; those that shape the state are the same already."""
    for group, other in zip(groups, saved, strict=True):
        group.update({"matrix_lr": None, **_taken(other)})


def _taken(saved: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("params", "param_names", SAVED, *options.STRUCTURAL)
    taken = {key: value for key, value in saved.items() if key not in kept}
    taken = copy.deepcopy(taken)  # a schedule writes into a learning rate that is a tensor
    return {key: tuple(value) if isinstance(value, list) else value for key, value in taken.items()}


def _structure(group: Mapping[str, Any], key: str) -> Any:
    """An option that shapes the state, as far as what is saved depends on it."""
    if key == "recipe":
        return form(str(group["method"]), str(group["recipe"]))
    return _lists(group[key])


def _lists(value: Any) -> Any:
    """With lists for tuples and strings for keys, as torch.distributed.checkpoint hands things back."""
    if isinstance(value, Mapping):
        return {str(key): _lists(x) for key, x in value.items()}
    return [_lists(x) for x in value] if isinstance(value, (list, tuple)) else value
