"""KLShampoo, the torch.optim.Optimizer: a thin shell around the plan and the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kl_dist import groups, options
from kl_dist.checkpoint import shown
from kl_dist.checkpoint.holdings import Holding, carry_over, holdings
from kl_dist.layouts import placement
from kl_dist.layouts.reduction import Reduction
from kl_dist.layouts.replicas import Comparisons
from kl_dist.methods.kronecker import Polar
from kl_dist.methods.products import check_device
from kl_dist.planning.making import make_plan
from kl_dist.planning.partition import FEWEST, Partition
from kl_dist.planning.plan import Plan
from kl_dist.planning.routes import doubts, routing_table
from kl_dist.ranks import Ranks
from kl_dist.state_dicts import StateDicts
from kl_dist.step import stats
from kl_dist.step.agreement import Presence, check_step, damaged, describe_damage, not_finite
from kl_dist.step.engine import Engine

log = logging.getLogger(__name__)


class KLShampoo(StateDicts):
    r"""KL-Shampoo and its family, with preconditioners partitioned over ranks.

    For a weight W with gradient G, Kronecker factors S_a, S_b and their eigenbases Q_a, Q_b,

        W <- W (1 - lr weight_decay) - lr S_a^-p M S_b^-p

    where M is G's momentum, p the `shampoo_exponent`, and the factors minimise KL(E[g g^T] || S_a x S_b). Each rank
    holds and updates the factors of its own matrices only; the updates are all-gathered. Construct it on every rank,
    after init_process_group and after the model is on its device (and wrapped by DDP): that is a collective.

    Args:
        params: a model, which `kl_dist.param_groups` divides; or parameters, (name, parameter) pairs as
            `model.named_parameters()` gives them, or parameter groups. Of these two or more dimensions are served by
            `method`, all others by AdamW.
        lr: learning rate of matrices unless `matrix_lr` is given, and of AdamW unless `adamw_lr` is.
        betas: weights of the old momentum and the old second moments. None: (0.9, 0.9), for the other methods
            (0.95, 0.95), for recipe "paper" (0.9, 0.98); "muon" has (0.85, 0.95) and (0.95, 0.95).
        eps: added to denominators; relative to the gradients' scale for matrices under "fresh".
        weight_decay: decoupled.
        method: "kl_shampoo", "kl_soap", "soap", "shampoo", "muon", or "adamw".
        recipe: "fresh", the project's form, "paper", the released codes' to the letter (torch.optim.Muon's for method
            "muon"), "compact", method "kl_shampoo" with its state in half the bytes, or "normuon", method "muon" with
            its neurons normalised.
        precondition_frequency: T; the eigenbases are refreshed every T steps. None: 2 ("paper": 10).
        shampoo_beta: weight of the old factors. None: betas[1].
        blocking: "square" cuts a matrix along its long side into near-square blocks; "none". None: the recipe's.
        max_preconditioner_dim: sides longer than this are handled as `long_side` says.
        process_group: ranks to partition over. None: all of them.
        nesterov: momentum one step ahead. None: True ("paper": False).
        final_beta1: what betas[0] grows to in a long run, as 1 - 20 / t after t updates (kl_dist.methods.averages); 0:
            it stays. Under "compact" both are at most 0.996; "paper": 0. None: 0.99 with method "kl_shampoo", else 0.
        polar: Newton-Schulz steps that orthogonalise the whitened momentum of each matrix, its norm kept
            (kl_dist.methods.polar); "start": four, a quarter longer and less from one to the next, in the first
            5 / (1 - b), at most 750, b shampoo_beta or SOAPs' betas[1]; 0 where it cannot. None: "start" ("paper": 0).
        stagger: spread the refreshes over the T steps. None: True ("paper": False).
        long_side: "cut", "diagonal" or "identity". None: "cut", but for "muon", which keeps nothing of any side.
        merge_dims: read small trailing dimensions (convolution kernels) as columns. None: True ("paper": False).
        matrices: which axes are batch, rows and columns, and equal parts along an axis, of all parameters of a group
            or by name: kl_dist.planning.matrices.
        shampoo_exponent: p of S_k^-p, with methods "kl_shampoo" and "shampoo". None: 0.7, and 1 / (2 K) for K sides.
            KL-Shampoo's is 1/2 under "paper".
        adjust_lr_fn: the scale of method "muon", as torch.optim.Muon names it: "original", Keller Jordan's, or
            "match_rms_adamw". None: "match_rms_adamw" ("paper": "original").
        compute_dtype: what projections, grams and back-projections of float32 state are multiplied in: "float32",
            "tf32", "bfloat16" or "bf16x3" (kl_dist.methods.products). None: TF32 on CUDA devices that have it, else
            float32 ("paper": "float32"). Refreshes stay in float32.
        matrix_lr: the matrices' learning rate while `lr` has its constructed value; schedules move both in proportion.
        adamw_lr: AdamW's, likewise.
        adamw_betas: None: `betas` where given, else (0.9, 0.95).
        adamw_names: names of parameters that AdamW serves though they have two dimensions or more.
        on_nonfinite: "skip" leaves out a step with a NaN or Inf gradient on all ranks alike, and starts state anew
            whose update is not finite; "raise".
        partition_size: ranks that share state and work; groups of so many do the same, each for itself. None: the plan
            chooses beyond 8 ranks, by balance (docs/partition.md).
        max_state_bytes: of a rank, where the plan chooses.
        compare_every: steps after which ranks compare the weights that they have in common. None: 100 where there are
            several groups, else never after the first step.

    All but the last four of these and `process_group` can be given per parameter group.

    Raises:
        TypeError, ValueError: a bad option or parameter, by name, on every rank.
        RuntimeError: torch.distributed is needed and not initialised.

    Source: Lin et al., ICLR 2026 (arXiv 2509.03378); see docs/algorithm.md.
    """

    def __init__(
        self,
        params: torch.nn.Module | Iterable[Any],
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
        final_beta1: float | None = None,
        polar: Polar | None = None,
        stagger: bool | None = None,
        long_side: str | None = None,
        merge_dims: bool | None = None,
        matrices: Mapping[str, Any] | None = None,
        shampoo_exponent: float | None = None,
        adjust_lr_fn: str | None = None,
        compute_dtype: str | None = None,
        matrix_lr: float | None = None,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] | None = None,
        adamw_names: Sequence[str] | None = None,
        on_nonfinite: str = "skip",
        partition_size: int | None = None,
        max_state_bytes: int | None = None,
        compare_every: int | None = None,
        **unknown: Any,
    ) -> None:
        given = locals()
        defaults = {key: given[key] for key in options.DEFAULTS}
        self._ranks = Ranks(process_group)
        self._engine: Engine | None = None
        self._holdings: list[Holding] = []
        self._reduction: Reduction | None = None
        self._replicas = Comparisons()
        self._on_nonfinite = on_nonfinite
        self._partition = Partition(partition_size, max_state_bytes)
        self._compare_every, self._steps = compare_every, 0
        self._skipped = self._restarts = 0
        with self._ranks.together():
            options.check_arguments(given, unknown)
            if isinstance(params, torch.nn.Module):
                told = {key: value for key in ("matrices", "adamw_names") if (value := given[key]) is not None}
                params = groups.param_groups(params, weight_decay=weight_decay, **told)
            if isinstance(params, (set, frozenset)):
                raise TypeError("parameters in a set have no fixed order, and ranks would disagree: give a list")
            super().__init__(params, defaults)
        plan = self._new_plan(None)
        with self._ranks.together():
            self._adopt(plan)
        for said in doubts(plan) if self._ranks.rank == 0 else ():
            log.warning(said)

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
            groups.check_group_names(self.param_groups)
            self._ranks.settle_on(placement.device_of(trained, self._ranks.device))
            for group in self.param_groups:
                check_device(group["compute_dtype"], self._ranks.device)
            shardings = placement.known_from_here(trained, self._ranks)
        per_node = self._ranks.per_node(FEWEST) if self._ranks.size > 1 else FEWEST
        everywhere = None
        if self._ranks.any(shardings is None):
            with self._ranks.together():
                seen = placement.seen_from_here(trained, self._ranks)
            everywhere = self._ranks.gather_objects(seen)
        with self._ranks.together():
            if everywhere is not None:
                shardings = placement.told_by_all(trained, everywhere)
            assert shardings is not None
            size = self._ranks.size
            partition = self._partition._replace(ranks_per_node=per_node)
            if not self._ranks.is_everyone:
                partition = partition.of_some(size)
            parameters = placement.parameters_of(trained, shardings)
            plan = make_plan(parameters, self.param_groups, size, previous, partition)
        own = f"on_nonfinite={self._on_nonfinite!r}, compare_every={self._compare_every!r}"
        self._ranks.check_same(own + plan.digest(), lambda: (own, *plan.lines), "the plan of KLShampoo")
        return plan

    def _adopt(self, plan: Plan) -> None:
        """Build the state a plan asks for, with what was there copied into it."""
        self._consolidated = None  # of the parameters as they were
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
            FloatingPointError: a gradient that is not finite, or an update of the step before, under
                on_nonfinite="raise"; on all ranks.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        presences = self._agree()
        self._consolidated = None  # of the state as it was
        if bad_units := damaged(presences):
            presences = self._start_anew(bad_units, presences)
        compared = self._running.shards.parameters
        self._replicas.before_step(compared, self.plan, self._ranks, self._steps, self._compare_every)
        self._steps += 1
        bad = not_finite(self.plan, presences)
        if bad is None:
            self._running.run(presences)
        else:
            self._running.pass_over()
            self._skip(bad)
        if self._reduction is not None:
            self._reduction.forget()
        return loss

    def follow_groups(self) -> None:
        """Take up what was put in the place of `param_groups`, of a group or of its parameters; a collective.

        `step` does so by itself; call it before loading or saving state where groups were changed since. State goes
        with a parameter's name: see kl_dist.groups.follow.
        """
        with self._ranks.together():
            _, moved = self._follow()
        if self._ranks.any(moved):
            self._adopt(self._new_plan(self.plan))

    def _follow(self) -> tuple[list[groups.Trained], bool]:
        """What stands in the groups now, named, and whether it is anything else than the plan is made for."""
        self._named = groups.follow(self.param_groups, self._named)
        trained = self._trained()
        return trained, self._replaced or groups.signature(trained) != self._signature

    def _agree(self) -> Sequence[Presence]:
        problem, moved = self._running.failure, False
        try:
            self.state = shown.settled(self.state, self._holdings, self._named)
            trained, moved = self._follow()
            planned = self.param_groups[: len(self.plan.structure)] if self._replaced else self.param_groups
            check_step(self.plan, trained, planned)
            if self._reduction is not None:
                self._reduction.check()
        except Exception as error:  # of any kind: the other ranks wait in the agreement
            problem = problem or error
        presences = self._running.agree(problem, moved, self._steps)
        if presences is None:
            self._adopt(self._new_plan(self.plan))
            presences = self._running.agree(None, False, self._steps)
        assert presences is not None
        return presences

    def _start_anew(self, bad: Sequence[int], presences: Sequence[Presence]) -> Sequence[Presence]:
        """Have units whose last update was not finite rest in this step, and start anew with their next gradient.

        Raises:
            FloatingPointError: under on_nonfinite="raise".
            RuntimeError: ranks compute some of them each for itself, and of those some had a finite update.
        """
        self._running.attempt(self._running.start_anew, bad)
        what = describe_damage(self.plan, bad)
        if self._on_nonfinite == "raise":
            self._running.pass_over()
        if any(map(self.plan.is_computed_twice, bad)):
            self._running.failure = RuntimeError(f"{what}, on some replicas at least: resume from a checkpoint")
            self._ranks.raise_together(self._running.failure)
        if self._on_nonfinite == "raise":
            raise FloatingPointError(f"{what}, and the state starts anew with the next gradient")
        self._restarts += len(bad)
        log.warning("%s, and the state starts anew; stats()['restarts'] counts these", what)
        return [Presence.MISSING if presence is Presence.DAMAGED else presence for presence in presences]

    def _skip(self, what: str) -> None:
        if self._on_nonfinite == "raise":
            raise FloatingPointError(f"{what}; nothing was changed")
        self._skipped += 1
        if self._skipped == 1:
            log.warning("%s: this step is skipped on all ranks; stats()['skipped_steps'] counts those to come", what)

    # -- gradients that only their owners have ------------------------------------------------------------------------

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's. What was reduced to owners is forgotten with it, so that a step may be left out."""
        super().zero_grad(set_to_none)
        reduction = vars(self).get("_optimizer", self)._reduction  # of what a wrapper of Lightning's is around
        if reduction is not None:
            reduction.forget()

    def reduce_to_owners(self, ddp: DistributedDataParallel) -> None:
        """Have DDP reduce each gradient to its owner rank instead of to all of them; a third less to communicate.

        Call it once, before the first backward. From then on a gradient is right only where its owner is: clip with
        `kl_dist.clip_grad_norm_`, accumulate under `no_sync()`. What changes gradients otherwise is an error in `step`.

        Raises:
            TypeError, ValueError: `ddp` is something else, or does not have this optimizer's parameters and ranks.
        """
        if any(parameter.sharding is not None for parameter in self.plan.parameters):
            raise ValueError("reduce_to_owners is for parameters that are whole on every rank; some here are sharded")
        if self.plan.partition_size < self._ranks.size:  # there a gradient would have several owners
            self._partition = Partition(self._ranks.size)
            plan = self._new_plan(None)
            with self._ranks.together():
                self._adopt(plan)
        reduction = Reduction(self._ranks, self.plan, self._running.shards.parameters)
        reduction.register(ddp)
        self._reduction = reduction

    # -- what one can ask ---------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The frozen plan: `owner`, `state_bytes`, `comm_bytes`, `cost`, `balance`; printing it shows a table."""
        return self._running.plan

    def routes(self) -> str:
        """A table of every parameter: its shape, the method that serves it, as which matrices, and who owns them."""
        return routing_table(self.plan)

    def stats(self, all_ranks: bool = False, matrices: bool = False) -> dict[str, Any]:
        """A few numbers, cheaply; `condition` and `update_rms` wait for the device.

        So far: `skipped_steps`, `restarts` (of matrices, or parameters under AdamW, whose state was damaged),
        `refreshes`, `fallbacks` (decompositions computed another way), and seconds of the host: `refresh_seconds`,
        `update_seconds`, `wait_seconds` (in which exchanges were waited for and nothing was computed). Of the last
        step: `condition` (largest ratio of eigenvalues of a Kronecker factor, None without any), `update_rms` (of the
        updates of matrices, before the learning rate; None without any), `update_elements` in them. Of the steps since
        they were last asked for: `communication_hidden` (1 - waiting / time in flight), `flops_per_second`,
        `work_as_run` (against the plan; 1 is as planned): kl_dist.step.stats.of_times.

        Args:
            all_ranks: False is of this rank; True of all of them, and a collective: counters are added up, of times
                the largest, and `refresh_balance` is the largest refresh time over the mean.
            matrices: also of each matrix, or block of one, by name, under "matrices": condition, effective rank and
                quantiles of the eigenvalues of each side, RMS of update and weight (kl_dist.step.stats.of_matrices).
        """
        counted = {"skipped_steps": self._skipped, "restarts": self._restarts}
        return counted | stats.of(self._running, self._ranks if all_ranks else None, matrices)
