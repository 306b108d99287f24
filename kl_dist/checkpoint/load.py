"""State of the optimizer, loaded: checks that come before anything is written, and the copying itself.

What a state dict says is read in kl_dist.checkpoint.saved.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kl_dist import options, ranges
from kl_dist.checkpoint import values, verify
from kl_dist.checkpoint.holdings import Holding, held_here, is_divided
from kl_dist.checkpoint.inventory import FORM
from kl_dist.checkpoint.local import ORIGIN, origin_of
from kl_dist.checkpoint.saved import REMEDY, Saved, is_made_up, names_in, read
from kl_dist.checkpoint.seals import SAVED, as_read, without_what_came_later
from kl_dist.checkpoint.sums import by_unit, entry_of
from kl_dist.methods import form
from kl_dist.ranks import Ranks


class InPlaceError(ValueError):
    """A damaged state has taken the place of the one that was here."""


def causes_of(problem: BaseException) -> str:
    """What torch.distributed.checkpoint says went wrong, each cause once, whichever ranks met it."""
    failures = getattr(problem, "failures", None)
    return "; ".join(sorted({str(cause) for cause, _ in failures.values()})) if failures else str(problem)


# -- checks ------------------------------------------------------------------------------------------------------------


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


def check_groups(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError unless the groups have the same parameters, and the options that shape their state."""
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
        raise ValueError(f"the saved parameter groups have other lengths than this optimizer's; {REMEDY}")
    for index, (group, other) in enumerate(zip(groups, saved, strict=True)):
        saved_names = names_in(other) or group["param_names"]
        nameless = is_made_up(saved_names) or is_made_up(group["param_names"])
        for mine, theirs in zip(group["param_names"], saved_names, strict=False):
            if mine != theirs and not nameless:
                raise ValueError(
                    f"parameter group {index} was saved with parameter {theirs!r} where {mine!r} is here: give"
                    f" KLShampoo the same parameters in the same order; {REMEDY}"
                )
        for key in options.KEPT:
            if key not in other and key not in options.CAME_LATER:
                raise ValueError(f"the saved parameter group {index} lacks the option {key!r}")
            if key in options.STRUCTURAL and _structure(other, key) != _structure(group, key):
                raise ValueError(
                    f"parameter group {index} was saved with {key}={other[key]!r}, here it is {group[key]!r}: construct"
                    " KLShampoo with what was saved, or start its state anew"
                )
        try:
            ranges.check_numbers({**group, **_taken(other)})
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
    wanted: tuple[int, ...] = tuple(holding.value.shape) if saved.local and not is_divided(tensor) else entry.shape
    if tuple(tensor.shape) != wanted:
        return f"{what} has shape {tuple(tensor.shape)} in the saved state, here it is {wanted}"
    if tensor.dtype not in (entry.dtype, dict(entry.dtypes).get(saved.recipes.get(holding.name, ""))):
        return f"{what} has dtype {tensor.dtype} in the saved state, here it is {entry.dtype}"
    if is_divided(tensor) and tensor.boxes != holding.boxes:  # type: ignore[attr-defined]
        return f"{what} is divided over the ranks in another way in the saved state"
    return None


def damage(holding: Holding, saved: Saved) -> str | None:
    """What is wrong with the values of a saved tensor that fits, or None."""
    if holding.entry.constant is not None:
        return None
    tensor = saved.tensors[holding.name, holding.entry.key]
    wrong = values.fault(holding.entry.field, held_here(tensor), holding.memory.device)
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
        if problem is not None and verify.is_live(saved.tensors[holding.name, holding.entry.key], holding):
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
    is_full = not saved.local and not any(is_divided(x) for x in saved.tensors.values())
    return verify.faults(held, saved.tensors, saved.sealed, saved.called, dtypes, is_full)


def check_options(state: Any) -> None:
    """Raises ValueError unless the options of a state's groups are as they were saved."""
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    verify.check_options(groups if isinstance(groups, (list, tuple)) else ())


def was_read_here(state: Any, held: Sequence[Holding]) -> bool:
    """Whether torch.distributed.checkpoint has read a state into what is here: its checksums were written since."""
    own = {holding.memory.untyped_storage().data_ptr() for holding in held if holding.memory.numel()}
    entries = state.get("state") if isinstance(state, Mapping) else None
    for one in entries.values() if isinstance(entries, Mapping) else ():
        tensors = {key: x for key, x in one.items() if isinstance(x, Tensor)} if isinstance(one, Mapping) else {}
        written = any(verify.is_sums(str(key)) and verify.written(held_here(x)) for key, x in tensors.items())
        if written and any(held_here(x).untyped_storage().data_ptr() in own for x in tensors.values()):
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
    here = origin_of(held, ranks, saved.called) if saved.local else {}
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
        if is_divided(tensor):
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
        group.update({**dict.fromkeys(options.BEGINS_WITH_A_RUN), **_taken(other)})


def _taken(saved: Mapping[str, Any]) -> dict[str, Any]:
    saved = without_what_came_later(saved) if SAVED in saved else saved
    kept = ("params", "param_names", SAVED, *options.STRUCTURAL)
    taken = {key: value for key, value in saved.items() if key not in kept}
    for (key, former), value in options.IN_ITS_PLACE.items():
        if taken.get(key) == former:
            taken[key] = value
    taken = copy.deepcopy(taken)  # a schedule writes into a learning rate that is a tensor
    return {key: tuple(value) if isinstance(value, list) else value for key, value in taken.items()}


def _structure(group: Mapping[str, Any], key: str) -> Any:
    """An option that shapes the state, as far as what is saved depends on it."""
    if key == "recipe":
        return form(str(group["method"]), str(group["recipe"]))
    return as_read(group[key])
