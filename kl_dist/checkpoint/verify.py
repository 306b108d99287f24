"""Whether a state that comes in is as it was saved: its checksums are compared before anything of it is taken.

See kl_dist.checkpoint.sums, [Note: checksums]. A state without any is of an earlier version, or torch has flattened it,
and is taken as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kl_dist.checkpoint.holdings import Holding, held_here, is_divided
from kl_dist.checkpoint.seals import SAVED, changed_option
from kl_dist.checkpoint.sums import SUMS, AtHand, T, are_sums_of, by_unit, entry_of, sums_of
from kl_dist.planning.boxes import Box, whole

log = logging.getLogger(__name__)

WAY_OUT = (
    "load another checkpoint; to take it as it is, leave 'saved' out of its param_groups and every 'sums' out of its"
    " state"
)

Tensors = Mapping[tuple[str, str], Tensor]
"""What is loaded, by name of the parameter here and key."""


def check_options(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError, naming the option, unless those of saved groups are as they were, where that is known."""
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or SAVED not in group:
            continue
        try:
            option = changed_option(group)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"the entry {SAVED!r} of the saved parameter group {index} is damaged") from None
        if option is not None:
            raise ValueError(
                f"the option {option!r} of the saved parameter group {index} is not as it was saved: change options"
                f" after the load; {WAY_OUT}"
            )


def steps_of(groups: Sequence[Mapping[str, Any]]) -> int | None:
    """How many steps had been made when a state was saved; None of one without checksums.

    Raises:
        ValueError: the groups do not agree.
    """
    seals = [group.get(SAVED) for group in groups]
    if all(seal is None for seal in seals):
        return None
    steps = [seal.get("steps") if isinstance(seal, Mapping) else None for seal in seals]
    if any(type(one) is not int or one != steps[0] for one in steps):
        raise ValueError(f"the saved parameter groups are damaged, or of several saves: they are of the steps {steps}")
    return steps[0]


def is_sums(key: str) -> bool:
    return key == SUMS or key.endswith(f".{SUMS}")


def faults(
    held: Sequence[Holding],
    tensors: Tensors,
    steps: int | None,
    called: Mapping[str, str],
    saved_dtype: Mapping[tuple[str, str], torch.dtype],
    is_full: bool,
) -> Iterator[tuple[list[Holding], str]]:
    """The units that are not as they were saved, each with what is wrong.

    Args:
        held: what is loaded, all of which fits.
        steps: as `steps_of`.
        called: by its name here what a parameter is called in the saved state, where it says so.
        saved_dtype: what tensors had in the file; of what was converted on the way nothing can be told.
        is_full: the tensors are whole, and all are looked at; else they are what this rank holds.
    """
    if steps is None:
        if any(is_sums(key) for _, key in tensors):
            raise ValueError(f"the saved state is damaged: it has checksums, and its groups no {SAVED!r}")
        log.warning(
            "this state came without checksums, by an earlier version or flattened by torch, and is taken as it is"
        )
        return
    looked_at, sums = [], []
    for unit in by_unit(held):
        key = entry_of(unit).key
        name, given = unit[0].name, tensors.get((unit[0].name, key))
        what = f"state {key!r} of parameter {name!r}"
        if given is None:
            yield unit, f"{what} is missing from the saved state"
            continue
        found = [tensors[name, holding.entry.key] for holding in unit]
        converted = any(
            tensor.dtype != saved_dtype[name, one.entry.key] for tensor, one in zip(found, unit, strict=True)
        )
        if name not in called or converted or not (is_full or unit[-1].boxes):
            continue
        given = held_here(given)
        if not written(given) and any(map(is_live, found, unit)):
            continue  # this very state, as state_dict() gave it
        boxes = _boxes(unit[-1], found[-1], is_full)
        looked_at.append(AtHand(unit, [held_here(x) for x in found], boxes, called[name]))
        sums.append(given.reshape(-1).to(looked_at[-1].device))
    for one, given, same in zip(looked_at, sums, are_sums_of(sums, looked_at, steps), strict=True):
        if not same:
            yield list(one.unit), f"{_difference(one.unit, given, *sums_of([one], steps))}; {WAY_OUT}"


def _difference(unit: Sequence[Holding], given: Tensor, wanted: Tensor) -> str:
    """What is wrong where sums differ."""
    name, keys = unit[0].name, [holding.entry.key for holding in unit]
    if given.dtype != wanted.dtype or given.shape != wanted.shape:
        return f"the checksums of parameter {name!r} are damaged"
    if given.dtype is torch.uint8:
        which = f"{', '.join(map(repr, keys))} of parameter {name!r}"
        return f"state {which} are not as they were saved: a file is damaged, or of another save"
    apart = (given - wanted).tolist()
    later = apart[0] * pow(T, -1, 1 << 64) % (1 << 64)
    later -= (later >> 63) << 64
    if len(set(apart)) == 1 and abs(later) < 1 << 40:
        apart_by = "1 step" if abs(later) == 1 else f"{abs(later)} steps"
        when = f"{apart_by} {'later' if later > 0 else 'earlier'} than its param_groups"
        return f"the state of parameter {name!r} was saved {when}: parts of several saves lie together"
    key = next(key for key, x in zip(keys, apart, strict=True) if x)
    return f"state {key!r} of parameter {name!r} is not as it was saved: its checksum is another one"


def is_live(tensor: Any, holding: Holding) -> bool:
    """Whether a tensor that is loaded is the state's own memory, as torch.distributed.checkpoint writes into it."""
    own = holding.memory
    return own.numel() > 0 and holding.entry.constant is None and held_here(tensor).data_ptr() == own.data_ptr()


def written(tensor: Tensor) -> bool:
    """Whether anything was written into it since it was made; of what inference mode has made that is not known."""
    return not tensor.is_inference() and tensor._version > 0


def _boxes(holding: Holding, tensor: Tensor, is_full: bool) -> Sequence[Box]:
    return (whole(holding.entry.shape),) if is_full and not is_divided(tensor) else holding.boxes
