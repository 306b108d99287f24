"""One step: agree, then send every bucket on its way; several are under way at a time.

A bucket makes up to three trips (see `kl_dist.planning.traffic`): gradients to the owners, updates back to the shards,
updates to the other replicas. Where a parameter is whole on every rank there is only the last; alone there is none, and
the path is the same. While one bucket travels the others compute.

[Note: failures] An owner that raises between two collectives would leave the others waiting. So what goes wrong after
the agreement is kept, and all ranks raise together: at the end of the step, told by an all-reduce of one number; or,
where that would cost a synchronisation (CUDA), in the next step's agreement.

[Note: updates that are not finite] The gradients of a step are finite, so an update that is not comes from a damaged
state: memory that failed, or a value that somebody wrote. Zeros go in its place, and weights stay as they are. The next
step's agreement tells all ranks, the unit rests in that step, and its state starts anew.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from kl_dist.layouts.local import LocalShards
from kl_dist.methods import ELEMENTWISE, products, rule
from kl_dist.methods.state import state_dtype
from kl_dist.options import describe, number
from kl_dist.planning.plan import Plan
from kl_dist.planning.traffic import LEGS_AT_A_TIME
from kl_dist.planning.units import Unit
from kl_dist.ranks import Exchange, Ranks
from kl_dist.step.agreement import Presence, Sight, Trouble, agreed, bounds_of, describe_gradients
from kl_dist.step.clock import Clock
from kl_dist.step.redistribution import Redistribution
from kl_dist.step.stacks import Gradients, Stack, Updates, build_stacks
from kl_dist.step.trips import Room, Trips, make_rooms

log = logging.getLogger(__name__)

IDLE_STEPS = 3  # without any gradient are no accident
OF_ONEDNN = products.of_onednn()  # tried now: within a step its products would be counted by whoever counts


class Engine:
    """Runs the plan over the parameters of this rank. Made anew when the plan changes."""

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        parameters: Sequence[Tensor],
        groups: list[dict[str, Any]],
        previous: Engine | None = None,
    ) -> None:
        self.plan, self.ranks, self.groups = plan, ranks, groups
        self.device = ranks.device
        if plan.partition_size < plan.world_size or any(bucket.on_node > 1 for bucket in plan.buckets):
            ranks.make_groups(plan.lines_of_exchange())
        self.shards = LocalShards(parameters)
        self.stacks = build_stacks(plan, ranks.rank, self.device)
        self.trips = [Trips(plan, number, ranks) for number in range(len(plan.buckets))]
        self.rooms = make_rooms(self.trips, self.device)
        self._seen = list(self._sights())
        self._bounds = bounds_of(self._seen, self.device)
        self.failure: Exception | None = None  # of this rank, not yet raised: see [Note: failures]
        self.refreshes = 0
        self.clock = Clock()
        self.idle_steps = 0  # in a row, without any gradient
        self.redistribution = Redistribution(self.shards, [p.name for p in plan.parameters], ranks)
        self.updates: list[Updates] = []  # of the last step
        if previous is not None:
            self.failure, self.idle_steps = previous.failure, previous.idle_steps
            self.refreshes, self.clock = previous.refreshes, previous.clock
            self.redistribution.expected = previous.redistribution.expected

    def agree(self, problem: Exception | None, moved: bool, steps: int) -> list[Presence] | None:
        """What all ranks know of this step before it changes anything: see [Note: agreement].

        Args:
            problem: what is wrong on this rank.
            moved: the plan no longer fits this rank's parameters.
            steps: made so far, as this rank knows; ranks that loaded what was saved at different times would not agree.

        Returns:
            What the units' gradients are like, or None when the plan must be made anew first.

        Raises:
            ValueError, TypeError, RuntimeError: on all ranks, when one has a problem, other options, or made another
                number of steps.
        """
        with record_function("kl_shampoo::agree"):
            told = torch.zeros(self.plan.agreement_size, dtype=torch.float32, device=self.device)
            trouble = Trouble.REPLAN if moved else Trouble.NONE
            options: tuple[str, ...] = ()
            try:
                unknown = self.redistribution.look(problem is not None or moved)
                if problem is None and not moved:
                    trouble = Trouble.REDISTRIBUTE if unknown else Trouble.NONE
                    describe_gradients(self._seen, self._gradients(), self._bounds, told)
                    self._say_who_waits(told)
                    self._say_what_is_damaged(told)
                if problem is None:
                    options = tuple(map(describe, self.groups))
            except Exception as error:
                problem = problem or error
            together = "\n".join((str(steps), *options))
            fingerprint = zlib.crc32(together.encode()) % 2**24  # a whole number that float32 holds
            trouble = trouble if problem is None else Trouble.ERROR
            told[-3:].copy_(torch.tensor([fingerprint, -fingerprint, trouble]), non_blocking=True)
            *values, largest, smallest, trouble_anywhere = self.ranks.largest(told)
        if trouble_anywhere == Trouble.ERROR:
            self.ranks.raise_together(problem)
        if largest != -smallest:
            self.ranks.check_same(
                str(steps),
                lambda: (f"{steps} steps made",),
                "what the optimizer has loaded (have all ranks load what was saved at one time): it",
            )
            self.ranks.check_same(together, lambda: options, "the options of a parameter group")
        if trouble_anywhere == Trouble.REDISTRIBUTE:
            self.redistribution.expected = True
            return self.agree(problem, moved, steps)
        return None if trouble_anywhere == Trouble.REPLAN else agreed(self.plan, values)

    def run(self, presences: Sequence[Presence]) -> None:
        """Compute, exchange and apply all updates.

        Raises:
            RuntimeError: on all ranks, when one of them failed: see [Note: failures].
        """
        self.updates = []
        self._note_idle(presences)
        under_way: list[Journey] = []
        free = list(self.rooms)
        with full_precision(self.device):
            for number in range(len(self.trips)):
                while not free:
                    under_way = _moved_on(under_way, free)
                room = free.pop(0)
                # the newest first: its trip begins before an older one is waited for
                under_way = _moved_on([Journey(self._journey(number, room, presences), room), *under_way], free)
            while under_way:
                under_way = _moved_on(under_way, free)
        self.shards.forget()
        self.clock.end_step(self.plan.cost[self.ranks.rank])
        if self.device.type != "cuda":
            self.ranks.raise_together(self.failure)

    def _note_idle(self, presences: Sequence[Presence]) -> None:
        """A word where no gradient comes: nothing would tell that the tensors here are not those that are trained."""
        idle = bool(presences) and all(presence is Presence.MISSING for presence in presences)
        self.idle_steps = self.idle_steps + 1 if idle else 0
        if self.idle_steps == IDLE_STEPS:
            log.warning(
                "%s steps in a row found no gradient on any parameter: has backward run, and are these the model's"
                " parameters still? fully_shard, for one, puts others in their place: construct KLShampoo after it, or"
                " put those into param_groups",
                IDLE_STEPS,
            )

    def pass_over(self) -> None:
        """Leave the step out that was agreed on."""
        self.shards.forget()

    def gradient_norm(self) -> Tensor:
        """|G| over all parameters and ranks (0-D, float64), each element counted once; a collective."""
        self.redistribution.look_together()
        mine = [
            gradient
            for sight, gradient in zip(self._seen, self._gradients(), strict=True)
            # of what several replicas keep alike (AdamW's shards) only the first counts
            if gradient is not None and self._counts(sight.unit)
        ]
        self.shards.forget()
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        for dtype in dict.fromkeys(gradient.dtype for gradient in mine):
            alike = [gradient for gradient in mine if gradient.dtype == dtype]
            norms = torch._foreach_norm(alike, 2, dtype=state_dtype(dtype))  # float16's would end at 65,504
            square += torch.stack(norms).double().square().sum().to(self.device)
        return self.ranks.total(square).sqrt()

    def _counts(self, unit: Unit) -> bool:
        """Whether this rank is to count its part: of groups, and of replicas of AdamW's shards, the first is."""
        sharding = self.plan.parameters[unit.parameter].sharding
        if self.ranks.rank >= self.plan.partition_size:
            return False
        return not unit.elementwise or sharding is None or self.ranks.rank in sharding.grid[0]

    def _journey(self, number: int, room: Room, presences: Sequence[Presence]) -> Iterator[None]:
        """One bucket from gradients to weights; yields while something of it is on its way."""
        trips, stacks = self.trips[number], self.stacks[number]
        if trips.sharded:
            self.attempt(trips.pack_gradients, self.shards, room)
            trip = trips.send_gradients(room)
            yield
            self.clock.wait(trip)
        gradients = partial(trips.read_gradients, shards=self.shards, room=room)
        self.attempt(self._compute, stacks, presences, gradients, trips.updates(room))
        self.attempt(trips.pack_updates, room)
        legs: list[Exchange] = []
        if trips.sharded:
            trip = trips.send_updates(room)
        else:
            legs = [trips.spread_updates(room, leg) for leg in range(min(LEGS_AT_A_TIME, trips.legs))]
        self.attempt(self._refresh, stacks, presences)
        if trips.sharded:
            yield
            self.clock.wait(trip)
            legs = [trips.spread_updates(room, leg) for leg in range(min(LEGS_AT_A_TIME, trips.legs))]
        for leg in range(trips.legs):
            if trips.replicated:
                yield
            self.clock.wait(legs[leg])
            within = trips.spread_within(room, leg)
            if within:
                yield
            for exchange in within:
                self.clock.wait(exchange)
            self.attempt(self._apply, trips, room, leg, presences)
            if leg + LEGS_AT_A_TIME < trips.legs:
                legs.append(trips.spread_updates(room, leg + LEGS_AT_A_TIME))

    def _sights(self) -> Iterator[Sight]:
        for trips in self.trips:
            for parcel in trips.traffic.outgoing.parcels:
                unit = self.plan.units[parcel.unit]
                whole = self.plan.parameters[unit.parameter].sharding is None
                shared = unit.elementwise or (whole and self.plan.partition_size < self.plan.world_size)
                yield Sight(parcel.unit, unit, parcel.piece, shared)

    def _gradients(self) -> list[Tensor | None]:
        """Of what is seen."""
        return [self.shards.gradient(sight.unit.parameter, sight.piece) for sight in self._seen]

    def _say_who_waits(self, told: Tensor) -> None:
        """After the units' numbers, one for each that may spend its next gradient on its start alone."""
        numbers = {index: len(self.plan.units) + number for number, index in enumerate(self.plan.waiting)}
        waits = [
            numbers[index]
            for stack in (stack for bucket in self.stacks for stack in bucket)
            for row, index in enumerate(stack.indices)
            if stack.waits(row)
        ]
        if waits:
            told.index_fill_(0, torch.tensor(waits).to(told.device, non_blocking=True), 1.0)

    def _say_what_is_damaged(self, told: Tensor) -> None:
        """DAMAGED for each unit of this rank whose last update was not finite."""
        if not self.updates:
            return
        bad = torch.cat([made.norms for made in self.updates]).isfinite().logical_not_()
        if bad.device.type == "cpu" and not bool(bad.any()):
            return
        numbers = torch.tensor([i for made in self.updates for i in made.indices])
        said = bad.to(told.dtype) * float(Presence.DAMAGED)
        told.scatter_reduce_(0, numbers.to(told.device, non_blocking=True), said.to(told.device), "amax")

    def start_anew(self, damaged: Collection[int]) -> None:
        """Have these units' state be as allocated, wherever a part of it lies."""
        for stack in (stack for bucket in self.stacks for stack in bucket):
            rows = [row for row, index in enumerate(stack.indices) if index in damaged]
            if rows:
                stack.forget(rows)
        self.forget_updates()

    def forget_updates(self) -> None:
        """Say no more of the last step's."""
        self.updates = []

    def _compute(
        self, stacks: Sequence[Stack], presences: Sequence[Presence], gradients: Gradients, updates: Tensor
    ) -> None:
        with self.clock.updating(), record_function("kl_shampoo::update"):
            for stack in stacks:
                out = updates[stack.offset : stack.offset + stack.numel]
                made = stack.update([presences[i] for i in stack.indices], gradients, self._group(stack), out)
                if made is not None:
                    self.updates.append(made)

    def _refresh(self, stacks: Sequence[Stack], presences: Sequence[Presence]) -> None:
        with self.clock.refreshing(), record_function("kl_shampoo::refresh"):
            for stack in stacks:
                self.refreshes += stack.refresh([presences[i] for i in stack.indices], self._group(stack))

    def _apply(self, trips: Trips, room: Room, leg: int, presences: Sequence[Presence]) -> None:
        with record_function("kl_shampoo::apply"):
            for (group, method), arrivals in trips.arrived(room, leg).items():
                moving = [one for one in arrivals if presences[one.number].moves(self.plan.units[one.number])]
                if moving:
                    self.shards.apply(moving, *step_size(self.groups[group], method))

    def _group(self, stack: Stack) -> Mapping[str, Any]:
        return self.groups[stack.units[0].group]

    def attempt(self, part: Callable[..., None], *arguments: Any) -> bool:
        """Do a part of the step, and say whether it went well; what it raises is kept: see [Note: failures]."""
        try:
            part(*arguments)
            return True
        except Exception as problem:
            if self.failure is None:
                self.failure = RuntimeError(
                    f"a step failed half-way ({type(problem).__name__}: {problem}); weights and state are no longer to"
                    " be trusted: resume from a checkpoint"
                )
                self.failure.__cause__ = problem
            return False


class Journey(NamedTuple):
    """A bucket under way, and the room it travels through."""

    rest: Iterator[None]
    room: Room


def _moved_on(journeys: Sequence[Journey], free: list[Room]) -> list[Journey]:
    """Each journey one leg further; without those that have ended, whose rooms are free again."""
    ended, left = object(), []
    for journey in journeys:
        if next(journey.rest, ended) is ended:
            free.append(journey.room)
        else:
            left.append(journey)
    return left


def step_size(group: Mapping[str, Any], method: str) -> tuple[float, float]:
    """(keep, lr) of W <- keep W - lr U.

    `matrix_lr` and `adamw_lr` are the learning rates when `lr` has the value it was constructed with; schedules of `lr`
    move them alike.
    """
    lr = number(group["lr"])
    own = group["adamw_lr" if method == ELEMENTWISE else "matrix_lr"]
    if own is not None:
        lr = number(own) * lr / group["base_lr"]
    keep = 1 - lr * number(group["weight_decay"])
    decays_last = method != ELEMENTWISE and rule(method, group["recipe"]).decays_last
    return keep, lr * keep if decays_last else lr


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, TF32 or bfloat16: factor products in lower precision lose the small eigenvalues.

    oneDNN alone may be told that it can do with bfloat16, where it has been seen not to: [Note: oneDNN] in products.py.
    """
    with torch.autocast(device.type, enabled=False), ExitStack() as after:
        if products.HAS_SWITCHES:
            after.enter_context(products.matmul_precision(torch.backends.cuda, "ieee"))
            after.enter_context(products.matmul_precision(torch.backends.mkldnn, OF_ONEDNN))
        else:
            after.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield
