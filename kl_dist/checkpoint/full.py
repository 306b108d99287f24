"""All of the state on one rank, and back, a tensor at a time: no rank needs room for more than it holds and one matrix,
except the one that collects.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_dist.checkpoint import load
from kl_dist.checkpoint.holdings import Holding
from kl_dist.checkpoint.local import ORIGIN, STEPS
from kl_dist.checkpoint.saved import Saved, read
from kl_dist.checkpoint.seals import sealed
from kl_dist.checkpoint.sums import with_sums
from kl_dist.planning.boxes import in_boxes, narrowed
from kl_dist.ranks import Ranks

log = logging.getLogger(__name__)


@torch.no_grad()
def gather(
    held: Sequence[Holding], groups: Sequence[Mapping[str, Any]], ranks: Ranks, to: int, steps: int
) -> dict[str, Any]:
    """All of the state on the CPU of rank `to`, by names of parameters, with the steps made; empty elsewhere.

    A collective.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for holding in with_sums(held, steps, ranks.rank):
        full = _gathered(holding, ranks, to)
        if full is not None:
            state.setdefault(holding.name, {})[holding.entry.key] = full
    if ranks.rank != to:
        return {}
    return {"state": state, "param_groups": groups_of(groups, steps), STEPS: steps}


def groups_of(groups: Sequence[Mapping[str, Any]], steps: int) -> list[dict[str, Any]]:
    """The parameter groups in a full state: names for parameters."""
    return [{**sealed(group, steps), "params": list(group["param_names"])} for group in groups]


def _gathered(holding: Holding, ranks: Ranks, to: int) -> Tensor | None:
    """One tensor of the state, whole, on rank `to`."""
    entry, here = holding.entry, ranks.rank == to
    if entry.constant is not None:
        return holding.memory.clone() if here else None
    full = torch.zeros(entry.shape, dtype=entry.dtype) if here else None
    held = dict(in_boxes(holding.memory, holding.boxes))
    for box, keepers in entry.holders:
        source = to if to in keepers else keepers[0]
        if here and source == to:
            part = held[box]
        elif ranks.rank == source:
            part = held[box].to(ranks.device).contiguous()
            ranks.hand_over(part, source, to)
        elif here:
            shape = [stop - start for start, stop in box]
            part = torch.empty(shape, dtype=entry.dtype, device=ranks.device)
            ranks.hand_over(part, source, to)
        if full is not None:
            narrowed(full, box).copy_(part)
    return full


class Decision(NamedTuple):
    """What rank 0 found in a full state, for all to follow."""

    fits: list[bool]  # by holding
    left: list[str]  # what is not loaded, and why
    groups: list[dict[str, Any]] | None  # options to take
    steps: int | None  # that were made


@torch.no_grad()
def scatter(
    state: Any, groups: Sequence[dict[str, Any]], held: Sequence[Holding], ranks: Ranks, strict: bool
) -> Decision:
    """Load what rank 0 has of `gather`'s; a collective. Returns what was decided.

    Raises:
        ValueError: under strict, when something does not fit or is damaged; on all ranks, with nothing changed.
    """
    saved, decided = None, None
    with ranks.together():
        if ranks.rank == 0:
            saved, decided = _decide(state, groups, held, strict)
    decision = next(told for told in ranks.gather_objects(decided) if told is not None)
    for holding, fits in zip(held, decision.fits, strict=True):
        if fits and holding.entry.constant is None:
            full = None if saved is None else saved.tensors[holding.name, holding.entry.key]
            _scattered(holding, full, ranks)
    if decision.groups is not None:
        load.take_options(groups, decision.groups)
    if decision.left and ranks.rank == 0:
        log.warning("left as it is, which is new before the first step:\n  %s", "\n  ".join(decision.left))
    return decision


def _decide(
    state: Any, groups: Sequence[Mapping[str, Any]], held: Sequence[Holding], strict: bool
) -> tuple[Saved, Decision]:
    if isinstance(state, Mapping) and isinstance(state.get(ORIGIN), Mapping):
        if state[ORIGIN].get("world_size") != 1:
            raise ValueError(
                "this is the part of one rank, as local_state_dict() gives it: load it with load_state_dict"
            )
        state = {key: value for key, value in state.items() if key != ORIGIN}  # of one rank it is all
    saved = read(state, groups)
    if strict:
        load.check_options(state)
        load.check_groups(groups, saved.groups)
        wanted = load.check_all(held, saved)
        for _, problem in load.faults(wanted, saved):
            raise ValueError(problem)
        return saved, Decision([True] * len(wanted), [], _plain(saved.groups), saved.steps)
    problems = [load.misfit(holding, saved) or load.damage(holding, saved) for holding in held]
    # a block is loaded whole or not at all, and none of a parameter of another form
    bad = {_block(holding) for holding, problem in zip(held, problems, strict=True) if problem is not None}
    damaged = list(load.faults([one for one in held if _block(one) not in bad], saved))
    bad |= {_block(unit[0]) for unit, _ in damaged}
    left = list(dict.fromkeys(problem for problem in problems if problem is not None))
    left += [problem for _, problem in damaged]
    left += [f"{what} was saved, and has no place here" for what in load.homeless(held, saved)]
    options: list[dict[str, Any]] | None = _plain(saved.groups)
    try:
        load.check_options(state)
        load.check_groups(groups, saved.groups)
    except ValueError as problem:
        options = None
        left.append(f"the options of the groups: {problem}")
    fits = [not {_block(holding), (holding.name, "form")} & bad for holding in held]
    return saved, Decision(fits, left, options, saved.steps)


def _block(holding: Holding) -> tuple[str, str]:
    if holding.entry.is_form:
        return holding.name, "form"
    return holding.name, holding.entry.key.removesuffix(holding.entry.field)


def _plain(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def _scattered(holding: Holding, full: Tensor | None, ranks: Ranks) -> None:
    """One tensor of the state from rank 0, which has all of it, to those that hold it."""
    dtype = holding.entry.dtype
    held = dict(in_boxes(holding.memory, holding.boxes))
    for box, keepers in holding.entry.holders:
        shape = [stop - start for start, stop in box]
        for keeper in keepers:
            if ranks.rank == 0:
                assert full is not None
                part = narrowed(full, box).to(dtype)
                if keeper != 0:
                    ranks.hand_over(part.to(ranks.device).contiguous(), 0, keeper)
            elif ranks.rank == keeper:
                part = torch.empty(shape, dtype=dtype, device=ranks.device)
                ranks.hand_over(part, 0, keeper)
            if ranks.rank == keeper:
                held[box].copy_(part)
    if holding.memory.numel() > sum(part.numel() for part in held.values()):  # a step count for each slice
        holding.fill(holding.value)
