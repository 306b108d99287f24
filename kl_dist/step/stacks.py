"""What one rank owns, in batches: equal-shaped matrices of a bucket stacked, flat slices laid end to end.

A stack has the state of its units and knows how to step and refresh those that take part. Staggered refreshes meet
neighbours: the plan orders a stack by turn, so that those due lie together and are views rather than copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_dist.methods import Hyper, MatrixState, Rule, State, adamw, rule
from kl_dist.methods.state import AdamWState, span, state_dtype
from kl_dist.options import number
from kl_dist.planning.buckets import Member
from kl_dist.planning.costs import copied_at_once, refreshed_at_once
from kl_dist.planning.plan import Plan
from kl_dist.planning.units import Unit, stack_key
from kl_dist.step.agreement import Presence

Gradients = Callable[[Sequence[int], Sequence[Tensor]], None]
"""Writes gradients of this rank's units, by their indices in the plan, into tensors shaped as the units."""


class Updates(NamedTuple):
    """What one step made of a stack."""

    indices: tuple[int, ...]  # of the units that moved, into Plan.units
    norms: Tensor  # |U| of each, before it was rounded, also where it is not finite
    elements: int  # of matrices; 0 under AdamW


@dataclass
class Stack:
    """Units of one kind in one bucket. Rows of the state are the units, in order."""

    indices: tuple[int, ...]  # into Plan.units
    units: tuple[Unit, ...]  # those, or under AdamW this rank's parts of them
    offset: int  # of its updates in this rank's chunk of the bucket
    state: State

    @property
    def numel(self) -> int:
        return sum(unit.numel for unit in self.units)

    def waits(self, row: int) -> bool:
        """Whether the next gradient of this unit is spent on its start alone."""
        return False

    def update(
        self, presences: Sequence[Presence], gradients: Gradients, group: Mapping[str, Any], out: Tensor
    ) -> Updates | None:
        """Step the units that take part; their updates go to `out` (numel,), zero elsewhere. `presences` is by row.

        Zero is also what is not finite: see [Note: updates that are not finite] in kl_dist.step.engine.

        Returns:
            What was made of those that moved, None where none did.
        """
        raise NotImplementedError

    def forget(self, rows: Sequence[int]) -> None:
        """Have the state of some units be as allocated."""
        raise NotImplementedError

    def refresh(self, presences: Sequence[Presence], group: Mapping[str, Any]) -> int:
        """Refresh what is due after the update; returns how many matrices were."""
        return 0


@dataclass
class MatrixStack(Stack):
    """Matrices of one shape and method."""

    state: MatrixState
    rule: Rule
    unsound: tuple[int, ...] = ()  # rows whose last update was not finite, as far as the host knows

    def waits(self, row: int) -> bool:
        return self.rule.starts_without_update and not self.state.started[row]

    def update(
        self, presences: Sequence[Presence], gradients: Gradients, group: Mapping[str, Any], out: Tensor
    ) -> Updates | None:
        active = [row for row, unit in enumerate(self.units) if presences[row].steps(unit)]
        if not active:
            return None
        hyper = matrix_hyper(group)
        started = self.state.started.tolist()
        starting = [row for row in active if not started[row] and presences[row] is not Presence.ZERO]
        if starting:
            self.forget(starting)
            part = self.state.rows(starting)
            self.rule.start(part, self._read(gradients, starting), hyper)
            part.started.fill_(True)
            self.state.put(starting, part)
            started = self.state.started.tolist()
        running = [row for row in active if started[row] and presences[row].moves(self.units[row])]
        if not running:
            return None
        self.unsound = ()
        norms = [self._update_rows(rows, gradients, hyper, out) for rows in self._together(running, len(self.units))]
        elements = len(running) * self.units[0].numel
        return Updates(tuple(self.indices[row] for row in running), torch.cat(norms), elements)

    def _update_rows(self, rows: Sequence[int], gradients: Gradients, hyper: Hyper, out: Tensor) -> Tensor:
        """|U| of each of these rows, whose U go to their places in `out`."""
        part = self.state.rows(rows)
        grads = self._read(gradients, rows)
        updates = self.rule.update(part, grads, hyper, torch.empty_like(grads))
        norms = torch.linalg.vector_norm(updates.flatten(1), dim=1)
        self.unsound += tuple(rows[i] for i in _zero_what_is_not_finite([updates], norms))
        into = out.view(len(self.units), *updates.shape[1:])
        if len(rows) == len(self.units):
            into.copy_(updates)
        else:
            into[span(rows)] = updates.to(into.dtype)
        self.state.put(rows, part)
        return norms

    def _together(self, rows: Sequence[int], most: int) -> Iterator[Sequence[int]]:
        """Ascending rows in parts, none above `most`, and where their state would be copied, fewer."""
        if rows and not isinstance(span(rows), slice):
            most = min(most, copied_at_once(len(self.units)))
        for first in range(0, len(rows), most):
            yield rows[first : first + most]

    def _read(self, gradients: Gradients, rows: Sequence[int]) -> Tensor:
        """The gradients of some rows (B, d_1..d_K), in the dtype that a step computes in."""
        unit = self.units[0]
        read = self.state.exp_avg.new_empty(len(rows), *unit.block.shape, dtype=state_dtype(unit.dtype))
        gradients([self.indices[row] for row in rows], read.unbind())
        return read

    def forget(self, rows: Sequence[int]) -> None:
        """As allocated; a start may also follow on a run whose state somebody has zeroed in place."""
        state = self.state.rows(rows)
        block = self.units[0].block
        like = state.exp_avg.new_empty((), dtype=state_dtype(self.units[0].dtype))
        pristine = self.rule.allocate(block.shape, block.sides, 1, like).tensors()
        for name, tensor in state.tensors().items():
            tensor.copy_(pristine[name])
        self.state.put(rows, state)

    def refresh(self, presences: Sequence[Presence], group: Mapping[str, Any]) -> int:
        if self.rule.refresh is None:
            return 0
        every = group["precondition_frequency"]
        started, steps = self.state.started.tolist(), self.state.step.tolist()
        due = [
            row
            for row, (unit, presence) in enumerate(zip(self.units, presences, strict=True))
            if started[row] and presence.moves(unit) and (steps[row] + unit.phase * group["stagger"]) % every == 0
        ]
        if self.unsound:
            due = [row for row in due if row not in self.unsound]
        for some in self._together(due, refreshed_at_once(len(self.units))):
            part = self.state.rows(some)
            self.rule.refresh(part, matrix_hyper(group))
            self.state.put(some, part)
        return len(due)


@dataclass
class SliceStack(Stack):
    """Slices of flat parameters under AdamW, of any length."""

    state: AdamWState

    def update(
        self, presences: Sequence[Presence], gradients: Gradients, group: Mapping[str, Any], out: Tensor
    ) -> Updates | None:
        active = [row for row, unit in enumerate(self.units) if presences[row].steps(unit)]
        if not active:
            return None
        part = self.state.rows(active)
        grads = torch.empty_like(part.exp_avg)
        pieces = zip(active, grads.split(part.lengths), strict=True)
        shaped = [one.view(self.units[row].block.shape) for row, one in pieces]
        gradients([self.indices[row] for row in active], shaped)
        hyper = Hyper(betas=_numbers(group["adamw_betas"]), eps=group["eps"])
        updates = adamw.update(part, grads, hyper, torch.empty_like(grads))
        self.state.put(active, part)
        pieces = updates.split(part.lengths)
        norms = torch.stack(torch._foreach_norm(pieces))
        _zero_what_is_not_finite(pieces, norms)
        slices = out.split([unit.numel for unit in self.units])
        for row, piece in zip(active, pieces, strict=True):
            slices[row].copy_(piece)
        return Updates(tuple(self.indices[row] for row in active), norms, 0)

    def forget(self, rows: Sequence[int]) -> None:
        state = self.state.rows(rows)
        for tensor in (state.step, state.exp_avg, state.exp_avg_sq):
            tensor.zero_()
        self.state.put(rows, state)


def _zero_what_is_not_finite(updates: Sequence[Tensor], norms: Tensor) -> list[int]:
    """Have updates whose norm is not finite be zero, in place; returns which, where the host knows without waiting.

    Args:
        updates: B tensors, or one of B matrices.
        norms: (B,).
    """
    bad = norms.isfinite().logical_not_()
    if bad.device.type == "cpu" and not bool(bad.any()):
        return []
    for update, one in zip(updates, bad.split(len(bad) // len(updates)), strict=True):
        update.masked_fill_(one.view(-1, *[1] * (update.ndim - 1)), 0.0)
    return bad.nonzero().flatten().tolist() if bad.device.type == "cpu" else []


def build_stacks(plan: Plan, rank: int, device: torch.device) -> list[list[Stack]]:
    """For each bucket the stacks of `rank`, with all state allocated now, so that no step surprises anyone.

    AdamW's is allocated at once for all buckets, so that what a rank has of a parameter lies together.
    """
    pools: dict[torch.dtype, list[int]] = {}
    by_bucket = plan.members(rank)
    for unit in (member.unit for members in by_bucket for member in members):
        if unit.elementwise:
            pools.setdefault(state_dtype(unit.dtype), []).append(unit.numel)
    slices = {dtype: _Pool(lengths, dtype, device) for dtype, lengths in pools.items()}
    return [list(_stacks_of(members, device, slices)) for members in by_bucket]


class _Pool:
    """State of all slices of a dtype on this rank, handed out in order."""

    def __init__(self, lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self._state = adamw.allocate(lengths, torch.empty((), dtype=dtype, device=device))
        self._taken = 0

    def take(self, count: int) -> AdamWState:
        first, self._taken = self._taken, self._taken + count
        return self._state.rows(range(first, self._taken))


def unit_states(stacks: Sequence[Sequence[Stack]]) -> Iterator[tuple[Unit, dict[str, Tensor]]]:
    """Every unit of this rank with views of its state, by name."""
    for stack in (stack for bucket in stacks for stack in bucket):
        for row, unit in enumerate(stack.units):
            yield unit, stack.state.row(row)


def matrix_hyper(group: Mapping[str, Any]) -> Hyper:
    """The numbers of a group as they are now: schedulers change them between steps."""
    return Hyper(
        betas=_numbers(group["betas"]),
        eps=group["eps"],
        precondition_frequency=group["precondition_frequency"],
        shampoo_beta=None if group["shampoo_beta"] is None else number(group["shampoo_beta"]),
        nesterov=group["nesterov"],
        final_beta1=None if group["final_beta1"] is None else number(group["final_beta1"]),
        polar=group["polar"],
        shampoo_exponent=group["shampoo_exponent"],
        adjust_lr_fn=group["adjust_lr_fn"],
        compute_dtype=group["compute_dtype"],
    )


def _numbers(betas: Iterable[float | Tensor]) -> tuple[float, float]:
    """A pair as Python's numbers: coefficients of a step are functions of t that tensors would make tensors."""
    first, second = betas
    return number(first), number(second)


def _stacks_of(members: Sequence[Member], device: torch.device, slices: Mapping[torch.dtype, _Pool]) -> Iterator[Stack]:
    offset = 0
    for _, together in groupby(members, key=lambda member: stack_key(member.unit)):
        indices, units, _ = zip(*together, strict=True)
        first = units[0]
        dtype = state_dtype(first.dtype)
        stack: Stack
        if first.elementwise:
            stack = SliceStack(indices, units, offset, slices[dtype].take(len(units)))
        else:
            like = torch.empty((), dtype=dtype, device=device)
            update_rule = rule(first.method, first.recipe)
            state = update_rule.allocate(first.block.shape, first.block.sides, len(units), like)
            stack = MatrixStack(indices, units, offset, state, update_rule)
        yield stack
        offset += stack.numel
