"""KLShampoo, the torch.optim.Optimizer: a thin shell around the plan and the engine."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kl_dist import groups, options
from kl_dist.checkpoint import full, load, shown
from kl_dist.checkpoint.holdings import Holding, carry_over, holdings
from kl_dist.layouts import placement
from kl_dist.layouts.reduction import Reduction
from kl_dist.planning.plan import Plan, make_plan
from kl_dist.planning.routes import routing_table
from kl_dist.ranks import Ranks
from kl_dist.step import stats
from kl_dist.step.agreement import Presence, find_problem, not_finite
from kl_dist.step.engine import Engine

log = logging.getLogger(__name__)


class Parts(NamedTuple):
    """What a KLShampoo is a shell of: see `KLShampoo.parts`."""

    ranks: Ranks
    engine: Engine
    holdings: Sequence[Holding]  # the state on this rank, under the names of a checkpoint
    reduction: Reduction | None  # where `reduce_to_owners` was called


class KLShampoo(torch.optim.Optimizer):
    r"""KL-Shampoo and its family, with preconditioners partitioned over ranks.

    For a weight W with gradient G, Kronecker factors S_a, S_b and their eigenbases Q_a, Q_b,

        W <- W (1 - lr weight_decay) - lr S_a^-1/2 M S_b^-1/2

    where M is G's momentum and the factors minimise KL(E[g g^T] || S_a x S_b). Each rank holds and updates the factors
    of its own matrices only; the updates are all-gathered. Construct it on every rank, after init_process_group and
    after the model is on its device (and wrapped by DDP); construction is a collective.

    Args:
        params: parameters, (name, parameter) pairs as `model.named_parameters()` gives them, or parameter groups.
            Two or more dimensions are served by `method`, all others by AdamW.
        lr: learning rate of matrices, and of AdamW unless `adamw_lr` is given.
        betas: weights of the old momentum and the old second moments. None: (0.9, 0.9), for the other methods
            (0.95, 0.95), for recipe "paper" (0.9, 0.98).
        eps: added to denominators; relative to the gradients' scale for matrices under "fresh".
        weight_decay: decoupled.
        method: "kl_shampoo", "kl_soap", "soap", "shampoo", or "adamw".
        recipe: "fresh", the project's form, or "paper", the released codes' to the letter.
        precondition_frequency: T; the eigenbases are refreshed every T steps. None: 2 ("paper": 10).
        shampoo_beta: weight of the old factors. None: betas[1].
        blocking: "square" cuts a matrix along its long side into near-square blocks; "none". None: the recipe's.
        max_preconditioner_dim: sides longer than this are handled as `long_side` says.
        process_group: ranks to partition over. None: all of them.
        nesterov: momentum one step ahead. None: True ("paper": False).
        stagger: spread the refreshes over the T steps. None: True ("paper": False).
        long_side: "cut", "diagonal" or "identity".
        merge_dims: read small trailing dimensions (convolution kernels) as columns. None: True ("paper": False).
        matrices: which axes are batch, rows and columns, and equal parts along an axis: kl_dist.planning.matrices.
        shampoo_exponent: p of method "shampoo". None: 1 / (2 K) for K sides.
        adamw_lr: AdamW's learning rate while `lr` has its constructed value; schedules move both in proportion.
        adamw_betas: None: `betas` where given, else (0.9, 0.95).
        adamw_names: names of parameters that AdamW serves though they have two dimensions or more.
        on_nonfinite: "skip" leaves out a step with a NaN or Inf gradient on all ranks alike; "raise".

    All but the last of these and `process_group` can be given per parameter group.

    Raises:
        TypeError, ValueError: a bad option or parameter, by name, on every rank.
        RuntimeError: torch.distributed is needed and not initialised.

    Source: Lin et al., ICLR 2026 (arXiv 2509.03378); see docs/algorithm.md.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        method: str = "kl_shampoo",
        recipe: str = "fresh",
        precondition_frequency: int | None = None,
        shampoo_beta: float | None = None,
        blocking: str | None = None,
        max_preconditioner_dim: int = 8192,
        process_group: dist.ProcessGroup | None = None,
        nesterov: bool | None = None,
        stagger: bool | None = None,
        long_side: str = "cut",
        merge_dims: bool | None = None,
        matrices: Mapping[str, Any] | None = None,
        shampoo_exponent: float | None = None,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] | None = None,
        adamw_names: Sequence[str] | None = None,
        on_nonfinite: str = "skip",
        **unknown: Any,
    ) -> None:
        given = locals()
        defaults = {key: given[key] for key in options.DEFAULTS}
        self._ranks = Ranks(process_group)
        self._engine: Engine | None = None
        self._holdings: list[Holding] = []
        self._reduction: Reduction | None = None
        self._consolidated: dict[str, Any] | None = None
        self._on_nonfinite = on_nonfinite
        self._skipped = 0
        with self._ranks.together():
            asked = [key for key, value in unknown.items() if not options.is_declined(key, value)]
            options.check_known(asked, "process_group", "on_nonfinite")
            if on_nonfinite not in ("skip", "raise"):
                raise ValueError(f'on_nonfinite is "skip" or "raise", not {on_nonfinite!r}')
            if isinstance(params, (set, frozenset)):
                raise TypeError("parameters in a set have no fixed order, and ranks would disagree: give a list")
            super().__init__(params, defaults)
        plan = self._new_plan(None)
        with self._ranks.together():
            self._adopt(plan)

    # -- parameters and plan ------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; a collective after construction. What has an owner keeps it.

        Raises:
            TypeError, ValueError: as the constructor; nothing is added then.
        """
        inner = vars(self).get("_optimizer")
        if inner is not None:  # a wrapper of Lightning's is of this class too, and what is set here would be lost
            inner.add_param_group(param_group)
            return
        if self._engine is None:  # under construction: the constructor tells the other ranks
            group = groups.checked(param_group, self.defaults, self.param_groups)
            if group["params"]:
                self._ranks.settle_on(group["params"][0][1].device)
            super().add_param_group(group)
            return
        before = len(self.param_groups)
        try:
            with self._ranks.together():
                super().add_param_group(groups.checked(param_group, self.defaults, self.param_groups))
            plan = self._new_plan(self.plan)
        except Exception:
            del self.param_groups[before:]
            raise
        self._adopt(plan)

    def _trained(self) -> list[groups.Trained]:
        known = () if self._engine is None else (parameter.name for parameter in self.plan.parameters)
        return groups.trained(self.param_groups, set(known))

    def _new_plan(self, previous: Plan | None) -> Plan:
        """A plan for the parameters as they are now; a collective, which raises on all ranks alike."""
        with self._ranks.together():
            trained = self._trained()
            groups.check_adamw_names(self.param_groups)
            self._ranks.settle_on(placement.device_of(trained, self._ranks.device))
            seen = placement.seen_from_here(trained, self._ranks)
        everywhere = self._ranks.gather_objects(seen)
        with self._ranks.together():
            parameters = placement.parameters_of(trained, everywhere)
            plan = make_plan(parameters, self.param_groups, self._ranks.size, previous)
        own = f"on_nonfinite={self._on_nonfinite!r}"
        self._ranks.check_same(own + plan.digest(), (own, *plan.lines), "the plan of KLShampoo")
        return plan

    def _adopt(self, plan: Plan) -> None:
        """Build the state a plan asks for, with what was there copied into it."""
        by_name = groups.by_name(self.param_groups)
        parameters = [by_name[parameter.name] for parameter in plan.parameters]
        old = self._holdings
        self._engine = Engine(plan, self._ranks, parameters, self.param_groups, self._engine)
        if self._reduction is not None:
            self._reduction.follow(plan, parameters)
        self._named = [list(groups.pairs_of(group)) for group in self.param_groups]
        self._signature = groups.signature(self._trained())
        self._holdings = holdings(plan, self._engine.stacks, self._ranks)
        carry_over(old, self._holdings, self._ranks)
        self.state = shown.show(self._holdings, by_name, self.state)

    # -- the step -----------------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # what is compiled around a step goes on behind it
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient. A collective.

        Args:
            closure: evaluates the model again and returns the loss, as in torch.optim.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError, TypeError: a bad gradient or option on any rank; on all ranks, before anything changes.
            FloatingPointError: a gradient that is not finite, under on_nonfinite="raise"; on all ranks.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        presences = self._agree()
        bad = not_finite(self.plan, presences)
        if bad is None:
            self._running.run(presences)
        else:
            self._running.pass_over()
            self._skip(bad)
        if self._reduction is not None:
            self._reduction.forget()
        return loss

    @property
    def _running(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def follow_groups(self) -> None:
        """Take up what was put in the place of `param_groups`, of a group or of its parameters; a collective.

        `step` does so by itself; call it before loading or saving state where groups were changed since. State goes
        with a parameter's name: see kl_dist.groups.follow.
        """
        self._named = groups.follow(self.param_groups, self._named)
        moved = self._replaced or groups.signature(self._trained()) != self._signature
        if any(self._ranks.gather_objects(moved)):
            self._adopt(self._new_plan(self.plan))

    def _check_followed(self) -> None:
        """Before state is saved or loaded, of what is sharded now by all ranks together: there it is followed."""
        if self._replaced or groups.are_changed(self.param_groups, self._named):
            if all(placement.is_whole(p) for group in self.param_groups for p in group["params"]):
                raise RuntimeError(groups.NOT_FOLLOWED)
            self.follow_groups()

    @property
    def _replaced(self) -> bool:
        return self.param_groups is not self._running.groups

    def _agree(self) -> Sequence[Presence]:
        problem = self._running.failure
        try:
            self.state = shown.settled(self.state, self._holdings, self._named)
        except ValueError as error:
            problem = problem or error
        self._named = groups.follow(self.param_groups, self._named)
        trained = self._trained()
        moved = self._replaced or groups.signature(trained) != self._signature
        planned = self.param_groups[: len(self.plan.structure)] if self._replaced else self.param_groups
        problem = problem or find_problem(self.plan, trained, planned)
        if problem is None and self._reduction is not None:
            problem = self._reduction.find_problem()
        presences = self._running.agree(problem, moved)
        if presences is None:
            self._adopt(self._new_plan(self.plan))
            presences = self._running.agree(None, False)
        assert presences is not None
        return presences

    def _skip(self, what: str) -> None:
        if self._on_nonfinite == "raise":
            raise FloatingPointError(f"{what}; nothing was changed")
        self._skipped += 1
        if self._skipped == 1:
            log.warning("%s: this step is skipped on all ranks; stats()['skipped_steps'] counts those to come", what)

    # -- gradients that only their owners have ------------------------------------------------------------------------

    def reduce_to_owners(self, ddp: DistributedDataParallel) -> None:
        """Have DDP reduce each gradient to its owner rank instead of to all of them; a third less to communicate.

        Call it once, before the first backward. From then on a gradient is right only where its owner is: clip with
        `kl_dist.clip_grad_norm_`, accumulate under `no_sync()`. What changes gradients otherwise is an error in `step`.

        Raises:
            TypeError, ValueError: `ddp` is something else, or does not have this optimizer's parameters and ranks.
        """
        if any(parameter.sharding is not None for parameter in self.plan.parameters):
            raise ValueError("reduce_to_owners is for parameters that are whole on every rank; some here are sharded")
        reduction = Reduction(self._ranks, self.plan, self._running.shards.parameters)
        reduction.register(ddp)
        self._reduction = reduction

    # -- what one can ask ---------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The frozen plan: `owner`, `state_bytes`, `comm_bytes`, `cost`, `balance`; printing it shows a table."""
        return self._running.plan

    @property
    def parts(self) -> Parts:
        """The ranks, the engine and the state behind this shell, as they are now: for what works on an optimizer."""
        return Parts(self._ranks, self._running, self._holdings, self._reduction)

    def routes(self) -> str:
        """A table of every parameter: its shape, the method that serves it, as which matrices, and who owns them."""
        return routing_table(self.plan)

    def stats(self, all_ranks: bool = False) -> dict[str, Any]:
        """A few numbers, cheaply; `condition` and `update_rms` wait for the device.

        `skipped_steps`, `refreshes` and `refresh_seconds` (host time), `fallbacks` (decompositions computed another
        way), `condition` (largest ratio of eigenvalues of a Kronecker factor, None without any), `update_rms` (of the
        last step's updates of matrices, before the learning rate; None without any), `update_elements` in them.

        Args:
            all_ranks: False is of this rank; True of all of them, and a collective: counters are added up, of times
                the largest, and `refresh_balance` is the largest refresh time over the mean.
        """
        mine = stats.of_rank(self._running)
        found = stats.of_all(self._ranks.gather_objects(mine)) if all_ranks else mine
        return {"skipped_steps": self._skipped, **found}

    # -- state dicts and copies ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What this rank holds, in torch.optim's form, with the same keys on all ranks; local, never a collective.

        Written by torch.save it is plain tensors, for the same rank of as many ranks. torch.distributed.checkpoint
        finds in it what every rank has of every tensor, and loads it at any world size and in any layout. After
        `consolidate_state_dict` it is, once and on the rank that was named, all of the state.
        """
        if self._running.failure is not None:
            raise self._running.failure
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self.state = shown.settled(self.state, self._holdings, self._named)
        self._check_followed()
        consolidated, self._consolidated = self._consolidated, None
        frozen = groups.frozen_names(self.param_groups)
        state = consolidated or load.local_form(self.param_groups, self._holdings, self._ranks, frozen, self.state)
        for after in self._optimizer_state_dict_post_hooks.values():
            state = after(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of any form; local, never a collective: see kl_dist.checkpoint.load.

        Raises:
            ValueError: it is not of this optimizer, or another rank's part; nothing is changed then.
        """
        self._check_followed()
        state_dict = copy.copy(state_dict)  # a hook may put something else into it
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        frozen = groups.frozen_names(self.param_groups)
        own = load.load(state_dict, self.param_groups, self._holdings, self._ranks, frozen)
        self.state = shown.show(self._holdings, groups.by_name(self.param_groups), own)
        self._running.failure = None
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Have the next `state_dict()` of one rank be all of the state; a collective, as ZeroRedundancyOptimizer's."""
        self._ranks.raise_together(self._running.failure)
        self._consolidated = full.gather(self._holdings, self.param_groups, self._ranks, to) or None

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and copying take: everything but the process group, which is a connection and not data."""
        own = {"_plan": self.plan, "_on_nonfinite": self._on_nonfinite, "_skipped": self._skipped}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Local, never a collective. Unpickled it shares its work with all ranks, of which there must be as many.

        Raises:
            RuntimeError: it was pickled at another world size.
        """
        self._restore(state, Ranks())

    def __deepcopy__(self, memo: dict[int, Any]) -> KLShampoo:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied._restore(copy.deepcopy(self.__getstate__(), memo), self._ranks)
        return copied

    def _restore(self, state: dict[str, Any], ranks: Ranks) -> None:
        plan: Plan = state.pop("_plan")
        if plan.world_size != ranks.size:
            raise RuntimeError(f"this KLShampoo was pickled on {plan.world_size} ranks, here are {ranks.size}")
        super().__setstate__(state)
        self.defaults = {key: self.defaults[key] for key in options.DEFAULTS}
        held = self.state
        self._ranks, self._engine, self._holdings, self._reduction, self._consolidated = ranks, None, [], None, None
        self._adopt(plan)
        shown.take_up(held, self._holdings, groups.by_name(self.param_groups))
