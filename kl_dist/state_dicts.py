"""The half of KLShampoo that is saved, loaded, pickled and copied."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from kl_dist import groups, options
from kl_dist.checkpoint import full, load, shown
from kl_dist.checkpoint.holdings import Holding
from kl_dist.checkpoint.local import Form, local_form
from kl_dist.checkpoint.seals import SAVED, resealed
from kl_dist.layouts import placement
from kl_dist.layouts.reduction import Reduction
from kl_dist.layouts.replicas import Comparisons
from kl_dist.planning.partition import Partition
from kl_dist.planning.plan import Plan
from kl_dist.ranks import Ranks
from kl_dist.step.engine import Engine


class Parts(NamedTuple):
    """What a KLShampoo is a shell of: see `KLShampoo.parts`."""

    ranks: Ranks
    engine: Engine
    holdings: Sequence[Holding]  # the state on this rank, under the names of a checkpoint
    reduction: Reduction | None  # where `reduce_to_owners` was called


class StateDicts(torch.optim.Optimizer):
    """State dicts of three forms, see docs/checkpoints.md, and copies; the other half is `kl_dist.optimizer`."""

    _ranks: Ranks
    _engine: Engine | None
    _holdings: list[Holding]
    _reduction: Reduction | None
    _named: groups.Named
    _on_nonfinite: str
    _partition: Partition
    _compare_every: int | None
    _steps: int
    _skipped: int
    _restarts: int
    _replicas: Comparisons
    _consolidated: dict[str, Any] | None = None

    def follow_groups(self) -> None:
        raise NotImplementedError

    def _adopt(self, plan: Plan) -> None:
        raise NotImplementedError

    @property
    def _running(self) -> Engine:
        assert self._engine is not None
        return self._engine

    @property
    def _replaced(self) -> bool:
        return self.param_groups is not self._running.groups

    @property
    def parts(self) -> Parts:
        """The ranks, the engine and the state behind this shell, as they are now: for what works on an optimizer."""
        return Parts(self._ranks, self._running, self._holdings, self._reduction)

    @property
    def is_sharded(self) -> bool:
        """Whether this rank has less than all of some parameter, so that no optimizer's state would be whole here."""
        return not all(placement.is_whole(p) for group in self.param_groups for p in group["params"])

    @property
    def is_consolidated(self) -> bool:
        """Whether the next `state_dict()` of this rank is all of the state."""
        return self._consolidated is not None

    def _check_followed(self) -> None:
        """Before state is saved or loaded, of what is sharded now by all ranks together: there it is followed."""
        if self._replaced or groups.are_changed(self.param_groups, self._named):
            if not self.is_sharded:
                raise RuntimeError(groups.NOT_FOLLOWED)
            self.follow_groups()

    def state_dict(self) -> dict[str, Any]:
        """The state in torch.optim's form, with the same keys on all ranks; local, never a collective.

        torch.distributed.checkpoint finds in it what every rank has of every tensor, and loads it at any world size and
        in any layout. After `consolidate_state_dict` it is, once and on the rank that was named, all of the state, for
        torch.save. Without, where parameters are whole on every rank, what pickles it raises a RuntimeError that says
        so: a file of one rank would lack what the others hold.
        """
        consolidated, self._consolidated = self._consolidated, None
        if consolidated is not None:  # a schedule may have stepped since
            steps = consolidated["param_groups"][0][SAVED]["steps"]
            consolidated["param_groups"] = full.groups_of(self.param_groups, steps)
        return self._saved(lambda: consolidated or self._held_here(plain=False))

    def local_state_dict(self) -> dict[str, Any]:
        """What this rank holds, in plain tensors: for a file of each rank's own, which the same rank of as many loads.

        Local, never a collective.
        """
        return self._saved(lambda: self._held_here(plain=True))

    def _held_here(self, plain: bool) -> dict[str, Any]:
        frozen = groups.frozen_names(self.param_groups)
        form = Form.PLAIN if plain else Form.SHARDED if self.is_sharded else Form.WHOLE
        return local_form(self.param_groups, self._holdings, self._ranks, frozen, self.state, form, self._steps)

    def _saved(self, state_of: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a state dict is made of, after the checks and between the hooks."""
        if self._running.failure is not None:
            raise self._running.failure
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self.state = shown.settled(self.state, self._holdings, self._named)
        self._check_followed()
        state = state_of()
        for after in self._optimizer_state_dict_post_hooks.values():
            state = after(self, state) or state
        return resealed(state) if self._optimizer_state_dict_post_hooks else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of any form; local, never a collective: see kl_dist.checkpoint.load.

        Raises:
            ValueError: it is not of this optimizer, another rank's part, or damaged; nothing is changed then, but where
                torch.distributed.checkpoint has read what is damaged into the state that is here: then steps and saves
                raise too, until another state is loaded.
        """
        self._check_followed()
        given, state_dict = state_dict, copy.copy(state_dict)  # a hook may put something else into it
        frozen = groups.frozen_names(self.param_groups)
        try:
            load.check_options(given)
            for before in self._optimizer_load_state_dict_pre_hooks.values():
                state_dict = before(self, state_dict) or state_dict
            saved = load.load(state_dict, self.param_groups, self._holdings, self._ranks, frozen)
        except ValueError as problem:
            if not isinstance(problem, load.InPlaceError) and not load.was_read_here(given, self._holdings):
                raise
            self._running.failure = RuntimeError(str(problem))  # for the next step of all ranks, if one is made
            raise load.in_place(problem) from None
        self.state = shown.show(self._holdings, groups.by_name(self.param_groups), saved.own)
        self._took_up(saved.steps)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _took_up(self, steps: int | None) -> None:
        """After a load: what was known of the state that was here is no longer true."""
        self._consolidated = None
        self._running.failure = None
        self._running.forget_updates()
        if steps is not None:
            self._steps = steps

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Have the next `state_dict()` of one rank be all of the state; a collective, as ZeroRedundancyOptimizer's."""
        self._ranks.raise_together(self._running.failure)
        gathered = full.gather(self._holdings, self.param_groups, self._ranks, to, self._steps)
        self._consolidated = gathered or self._consolidated

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and copying take: everything but the process group, which is a connection and not data."""
        own = {
            "_plan": self._running.plan,
            "_rank": self._ranks.rank,
            "_on_nonfinite": self._on_nonfinite,
            "_partition": self._partition,
            "_compare_every": self._compare_every,
            "_steps": self._steps,
            "_skipped": self._skipped,
            "_restarts": self._restarts,
        }
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Local, never a collective. Unpickled it shares its work with all ranks, of which there must be as many.

        Raises:
            RuntimeError: it was pickled at another world size.
        """
        self._restore(state, Ranks())

    def __deepcopy__(self, memo: dict[int, Any]) -> StateDicts:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied._restore(copy.deepcopy(self.__getstate__(), memo), self._ranks)
        return copied

    def _restore(self, state: dict[str, Any], ranks: Ranks) -> None:
        plan, rank = state.pop("_plan"), state.pop("_rank", ranks.rank)
        if rank != ranks.rank:
            raise RuntimeError(
                f"this KLShampoo was pickled on rank {rank}, and holds that rank's part of the state; here is rank"
                f" {ranks.rank}: have each rank pickle its own, or save a state dict"
            )
        if plan.world_size != ranks.size:
            raise RuntimeError(f"this KLShampoo was pickled on {plan.world_size} ranks, here are {ranks.size}")
        super().__setstate__(state)
        self.defaults = {key: self.defaults[key] for key in options.DEFAULTS}
        held = self.state
        self._ranks, self._engine, self._holdings, self._reduction = ranks, None, [], None
        self._replicas = Comparisons()
        self._adopt(plan)
        shown.take_up(held, self._holdings, groups.by_name(self.param_groups))
