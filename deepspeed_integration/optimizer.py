"""The optimizer that DeepSpeed constructs: it keeps the groups, and steps kl_dist's over what DeepSpeed made of them.

[Note: two optimizers] DeepSpeed constructs an optimizer from the parameters, and then lays these out anew: as flat
partitions (ZeRO 1 and 2), in sub-groups (3), in float32 copies (stage 0 in low precision). It steps the optimizer group
by group, or sub-group by sub-group. So what it constructs is a shell with the groups and their options; the real
KLShampoo, `core`, is made once the layout is known, over `Fragment`s of the original parameters, and makes one step of
the whole model when the last part of it has arrived.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import kl_dist
from deepspeed_integration import partitions
from deepspeed_integration.partitions import Flat
from kl_dist import modules, options
from kl_dist.groups import check_names
from kl_dist.planning.matrices import names_of
from kl_dist.planning.plan import Plan
from kl_dist.ranks import Ranks

SIDECAR = "kl_dist"


class DeepSpeedOptimizer(torch.optim.Optimizer):
    """What a DeepSpeed config's `"optimizer"` entry makes: see [Note: two optimizers].

    Args:
        params: as DeepSpeed or the user has them.
        lr, betas, eps, weight_decay: as KLShampoo's. Betas of (0.9, 0.999), AdamW's default and HF Trainer's, become
            KLShampoo's own for matrices, and stay what they are for what AdamW serves.
        output_head: name of the module that is the model's output head, which AdamW serves; embeddings go there too. ""
            where none is one.
            Experts and other stacks are read as `kl_dist.param_groups` does.
        on_nonfinite: "skip"; or "raise" at stage 0 in float32, elsewhere DeepSpeed leaves such steps out by itself.
        given: any option of a group of KLShampoo.

    Raises:
        TypeError, ValueError: a bad option.
    """

    method = "kl_shampoo"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Any = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        output_head: str | None = None,
        on_nonfinite: str = "skip",
        **given: Any,
    ) -> None:
        options.check_known(given, "output_head", "on_nonfinite")
        self.core: kl_dist.KLShampoo | None = None
        self.groups: list[dict[str, Any]] = []  # DeepSpeed puts a list of one in the place of param_groups as it steps
        self._output_head, self._on_nonfinite, self._is_loading = output_head, on_nonfinite, False
        self._engine: Any = None
        self._zero: Any = None
        self._served: list[dict[str, Any]] = []  # the groups that have something to train, as the core has them
        self._flats: list[Flat] = []
        self.save = "not saved"  # the identity of the save under way: deepspeed_integration.checkpoint
        self._waiting: dict[int, Tensor | None] = {}  # gradients of flat tensors that have arrived, by their ids
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "method": self.method, **given}
        super().__init__(params, {**options.DEFAULTS, **own})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Under construction; afterwards it is an error, for DeepSpeed has laid the parameters out."""
        if self.core is not None:
            raise RuntimeError("parameter groups cannot be added once DeepSpeed has laid the parameters out")
        # Names come from the engine: torch wants all groups named or none.
        params = param_group["params"]
        unnamed = params if isinstance(params, Tensor) else [p[1] if isinstance(p, tuple) else p for p in params]
        super().add_param_group({**param_group, "params": unnamed})
        group = self.param_groups[-1]
        if isinstance(group["betas"], (list, tuple)) and tuple(group["betas"]) == options.TORCH_ADAMW_BETAS:
            group["adamw_betas"] = group["adamw_betas"] or options.TORCH_ADAMW_BETAS
            group["betas"] = None
        options.resolve(group)

    def attach(self, engine: Any) -> None:
        """Take up what DeepSpeed made of the parameters, and plan; a collective.

        Raises:
            ValueError: names that no parameter or module has; on_nonfinite="raise" where DeepSpeed looks first.
        """
        self._engine = engine
        self._zero = engine.optimizer if engine.optimizer is not self else None
        if self._zero is not None and self._on_nonfinite == "raise":
            raise ValueError(
                'on_nonfinite="raise" is for ZeRO stage 0 in float32: elsewhere DeepSpeed leaves a step out that is not'
                " finite before KLShampoo hears of it; watch engine.skipped_steps"
            )
        self.groups = list(self.param_groups)
        stand_ins = self._stand_ins(engine.zero_optimization_stage(), torch.device(engine.device))
        said = modules.look_up(engine.module, self._output_head)
        names = {p: name.replace("_orig_mod.", "") for p, name in engine.param_names.items()}
        made = []
        for i, (group, pairs) in enumerate(zip(self.groups, stand_ins, strict=True)):
            check_names("adamw_names", group["adamw_names"] or (), names.values())
            check_names("matrices", names_of(group["matrices"]), names.values())
            named = [(names.get(p, f"group{i}.param{j}"), p, s) for j, (p, s) in enumerate(pairs)]
            served = said.serve([(name, p) for name, p, _ in named], group["matrices"], group["adamw_names"])
            own = {key: group[key] for key in options.KEPT}
            own |= {"lr": group["base_lr"], "adamw_names": served.adamw_names, "matrices": served.matrices}
            if named:
                made.append({**own, "params": [(name, s) for name, _, s in named]})
                self._served.append(group)
        process_group = self._zero.dp_process_group if self._flats else None
        self.core = kl_dist.KLShampoo(made, process_group=process_group, on_nonfinite=self._on_nonfinite)
        self._clear_state()

    def _stand_ins(self, stage: int, device: torch.device) -> list[list[tuple[Tensor, Tensor]]]:
        """For every group its parameters, each with what is stepped in its place."""
        if self._zero is None:
            return [[(p, p) for p in group["params"]] for group in self.groups]
        if stage == 0:
            pairs = zip(self._zero.fp16_groups, self._zero.fp32_groups, strict=True)
            return [list(zip(low, high, strict=True)) for low, high in pairs]
        find = partitions.of_stage_3 if stage == 3 else partitions.of_stages_1_and_2
        ranks = Ranks(self._zero.dp_process_group)
        with ranks.together():
            self._flats = list(find(self._zero, device))
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.groups]
        for flat in self._flats:
            found[flat.group] += [(one.parameter, one.fragment) for one in flat.slices]
        return found

    # -- the step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take what has arrived; when it is all there, step the whole model. A collective then."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.core is None:  # FP16_UnfusedOptimizer tries a step at its construction, with gradients of zero
            return loss
        if not self._flats:
            self._hand_over_options()
            self.core.step()
            return loss
        arrived = {id(p): p.grad for group in self.param_groups for p in group["params"]}
        if arrived.keys() & self._waiting.keys():
            self._waiting.clear()  # a step was given up half-way
        self._waiting.update(arrived)
        if len(self._waiting) == len(self._flats):
            self._step_flats(self.core, arrived.keys())
        return loss

    def _step_flats(self, core: kl_dist.KLShampoo, last: Iterable[int]) -> None:
        """Step all flat tensors; DeepSpeed copies those that came `last` to the model, and has copied the others."""
        for flat in self._flats:
            flat.find(self._waiting[id(flat.master)])
        self._hand_over_options()
        core.step()
        copied = set(last)
        for number, flat in enumerate(self._flats):
            flat.find(None)
            if id(flat.master) not in copied:
                low = partitions.low_precision(self._zero, number, flat.master)
                if low.data_ptr() != flat.master.data_ptr():
                    low.copy_(flat.master)
        self._waiting.clear()
        partitions.forget_gradients(self._zero, self._flats)

    def _hand_over_options(self) -> None:
        """Learning rates and the like, as schedulers have set them here."""
        assert self.core is not None
        for mine, theirs in zip(self._served, self.core.param_groups, strict=True):
            theirs.update({key: mine[key] for key in options.CHANGEABLE})

    # -- what it says of itself ---------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """Who owns what, in flops and bytes."""
        return self._attached.plan

    def routes(self) -> str:
        """Which parameter is trained by which method, a line each."""
        return self._attached.routes()

    def stats(self, all_ranks: bool = False, matrices: bool = False) -> dict[str, Any]:
        """As `KLShampoo.stats`, the steps that DeepSpeed has left out counted in; a collective with `all_ranks`."""
        found = self._attached.stats(all_ranks, matrices)
        return {**found, "skipped_steps": found["skipped_steps"] + self._engine.skipped_steps}

    @property
    def _attached(self) -> kl_dist.KLShampoo:
        if self.core is None:
            raise RuntimeError("deepspeed.initialize has not made this optimizer ready yet")
        return self.core

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The options, and moments of zero for DeepSpeed's converter; the state itself goes into a folder of its own.

        See `deepspeed_integration.checkpoint`.
        """
        saved: dict[str, Any] = {"state": {}, "param_groups": [], SIDECAR: f"in the folder of this name, {self.save}"}
        for group in self.param_groups:
            first = len(saved["state"])
            for number, p in enumerate(group["params"], first):
                nothing = p.detach().new_zeros(()).expand(p.numel()) if self._flats else None
                saved["state"][number] = {"step": 0, "exp_avg": nothing, "exp_avg_sq": nothing} if self._flats else {}
            numbers = list(range(first, len(saved["state"])))
            saved["param_groups"].append({**group, "params": numbers})
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by engine.load_checkpoint, which loads the state itself too; by nobody else.

        Raises:
            RuntimeError: it was.
        """
        if not self._is_loading:
            raise RuntimeError("the state of KLShampoo is loaded by engine.load_checkpoint alone")
        self.take_options(state_dict["param_groups"])

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While DeepSpeed loads what it has saved."""
        self._is_loading = True
        try:
            yield
        finally:
            self._is_loading = False
            self._clear_state()  # of what a universal load has put there

    def _clear_state(self) -> None:
        """[Note: moments] DeepSpeed asks for flat moments in places, on some ranks only: where there are none it leaves
        the others waiting. NaN in no memory says that these are not to be had.
        """
        self.state.clear()
        for flat in self._flats:
            nothing = torch.full((), float("nan"), device=flat.master.device).expand(flat.master.numel())
            self.state[flat.master] = {"step": 0, "exp_avg": nothing, "exp_avg_sq": nothing}

    def take_options(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """The options of saved groups, but for those that shape the state."""
        kept = ("params", *options.STRUCTURAL)
        for mine, saved in zip(self.groups, groups, strict=True):
            taken = {key: x for key, x in saved.items() if key not in kept}
            taken = {**dict.fromkeys(options.BEGINS_WITH_A_RUN), **taken}  # which a state saved earlier does not know
            mine.update({key: tuple(x) if isinstance(x, list) else x for key, x in taken.items()})


TYPES: dict[str, type[DeepSpeedOptimizer]] = {}
"""What `"type"` may be: of every method its title without hyphens, that in small letters, with underscores and without;
DeepSpeed's look-up tells upper from lower case. "Muon" is DeepSpeed's own, so method "muon" is "KLMuon"."""


def make_type(method: str) -> None:
    """Make the class that `"type"` asks for, for a method of `kl_dist.METHODS`."""
    called = kl_dist.METHODS[method].called
    title = kl_dist.METHODS[method].title.replace("-", "")
    made = type(title, (DeepSpeedOptimizer,), {"method": method, "__doc__": f'`{{"type": "{title}"}}`.'})
    for name in (title, called, called.replace("_", "")):
        TYPES[name] = made
