"""The optimizer that DeepSpeed constructs: it keeps the groups, and steps kl_dist's over what DeepSpeed made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

import kl_dist
from deepspeed_integration import partitions
from deepspeed_integration.partitions import Flat
from deepspeed_integration.refusals import check_config
from kl_dist import options
from kl_dist.routing import embeddings_and_head

CONSTRUCTING: ContextVar[Any] = ContextVar("CONSTRUCTING", default=None)
"""The DeepSpeedConfig of the engine under construction."""

ADAMW_DEFAULT_BETAS = (0.9, 0.999)
SIDECAR = "kl_dist"


class DeepSpeedOptimizer(torch.optim.Optimizer):
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
        for key in given:
            if key not in options.DEFAULTS:
                raise options.unknown_option(key, [*options.DEFAULTS, "output_head", "on_nonfinite"])
        config = CONSTRUCTING.get()
        if config is not None:
            check_config(config)
        self.core: kl_dist.KLShampoo | None = None
        self._output_head, self._on_nonfinite, self._is_loading = output_head, on_nonfinite, False
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "method": self.method, **given}
        super().__init__(params, {**options.DEFAULTS, **own})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if getattr(self, "core", None) is not None:
            raise RuntimeError("parameter groups cannot be added once DeepSpeed has laid the parameters out")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.pop("param_names", None)
        if group["betas"] is not None and tuple(group["betas"]) == ADAMW_DEFAULT_BETAS:
            group["adamw_betas"] = group["adamw_betas"] or ADAMW_DEFAULT_BETAS
            group["betas"] = None
        options.resolve(group)

    def attach(self, engine: Any) -> None:
        """Take up what DeepSpeed made of the parameters, and plan; a collective."""
        self._zero = engine.optimizer if engine.optimizer is not self else None
        self._groups = list(self.param_groups)  # DeepSpeed puts a list of one in their place while it steps
        self._flats: list[Flat] = []
        self._waiting: dict[int, Tensor | None] = {}
        stage, device = engine.zero_optimization_stage(), torch.device(engine.device)
        process_group = None
        stand_ins: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self._groups]  # (parameter, what is stepped)
        if self._zero is None:
            for i, group in enumerate(self._groups):
                stand_ins[i] = [(p, p) for p in group["params"]]
        elif stage == 0:
            for i, (low, high) in enumerate(zip(self._zero.fp16_groups, self._zero.fp32_groups, strict=True)):
                stand_ins[i] = list(zip(low, high, strict=True))
        else:
            find = partitions.of_stage_3 if stage == 3 else partitions.of_stages_1_and_2
            self._flats = list(find(self._zero, device))
            process_group = self._zero.dp_process_group
            for flat in self._flats:
                stand_ins[flat.group] += [(s.parameter, s.fragment) for s in flat.slices]
        names, elementwise = engine.param_names, embeddings_and_head(engine.module, self._output_head)
        made = []
        for i, (group, pairs) in enumerate(zip(self._groups, stand_ins, strict=True)):
            named = [(names.get(p, f"group{i}.param{j}"), p, s) for j, (p, s) in enumerate(pairs)]
            here = {name for name, _, _ in named}
            served = [name for name, p, s in named if id(p) in elementwise and s.ndim >= 2]
            kept = [name for name in group["adamw_names"] or () if name in here]
            own = {key: group[key] for key in (*options.DEFAULTS, "base_lr")}
            own |= {"lr": group["base_lr"], "adamw_names": tuple(dict.fromkeys((*kept, *served)))}
            made.append({**own, "params": [(name, s) for name, _, s in named]})
        self.core = kl_dist.KLShampoo(made, process_group=process_group, on_nonfinite=self._on_nonfinite)
        for flat in self._flats:  # what DeepSpeed's converter asks for, in no memory
            nothing = flat.master.detach().new_zeros(()).expand(flat.master.numel())
            self.state[flat.master] = {"step": 0}
            del nothing

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
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
        arrived = {id(p): p for group in self.param_groups for p in group["params"]}
        if arrived.keys() & self._waiting.keys():
            self._waiting.clear()  # a step was given up half-way
        self._waiting.update({key: p.grad for key, p in arrived.items()})
        if len(self._waiting) < len(self._flats):
            return loss
        for flat in self._flats:
            flat.find(self._waiting[id(flat.master)])
        self._hand_over_options()
        self.core.step()
        for number, flat in enumerate(self._flats):
            if id(flat.master) not in arrived:  # DeepSpeed has copied it already
                low = partitions.low_precision(self._zero, number, flat.master)
                if low.data_ptr() != flat.master.data_ptr():
                    low.copy_(flat.master)
            flat.find(None)
        self._waiting.clear()
        partitions.forget_gradients(self._zero, self._flats)
        return loss

    def _hand_over_options(self) -> None:
        assert self.core is not None
        for mine, theirs in zip(self._groups, self.core.param_groups, strict=True):
            theirs.update({key: mine[key] for key in options.DEFAULTS if key not in options.STRUCTURAL})

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The options, and for DeepSpeed's converter moments of zero; the state goes into a folder of its own."""
        group_options = [{key: x for key, x in group.items() if key != "params"} for group in self.param_groups]
        places, packed, state = iter(range(10**9)), [], {}
        for group, its_options in zip(self.param_groups, group_options, strict=True):
            numbers = []
            for p in group["params"]:
                number = next(places)
                numbers.append(number)
                if self._flats:
                    nothing = p.detach().new_zeros(()).expand(p.numel())
                    state[number] = {"step": 0, "exp_avg": nothing, "exp_avg_sq": nothing}
            packed.append({**its_options, "params": numbers})
        return {"state": state, "param_groups": packed, SIDECAR: "in the checkpoint's folder of this name"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._is_loading:
            raise RuntimeError("the state of KLShampoo is loaded by engine.load_checkpoint alone")
        self.take_options([{k: x for k, x in g.items() if k != "params"} for g in state_dict["param_groups"]])

    @contextmanager
    def loading(self) -> Iterator[None]:
        self._is_loading = True
        try:
            yield
        finally:
            self._is_loading = False
            self.state.clear()  # what a universal load has put there
            for flat in self._flats:
                self.state[flat.master] = {"step": 0}

    def take_options(self, groups: Iterable[Mapping[str, Any]]) -> None:
        for mine, saved in zip(self._groups, groups, strict=True):
            mine.update(
                {
                    key: tuple(x) if isinstance(x, list) else x
                    for key, x in saved.items()
                    if key not in ("params", *options.STRUCTURAL)
                }
            )


class KLShampoo(DeepSpeedOptimizer):
    method = "kl_shampoo"


class KLSOAP(DeepSpeedOptimizer):
    method = "kl_soap"


class SOAP(DeepSpeedOptimizer):
    method = "soap"


class Shampoo(DeepSpeedOptimizer):
    method = "shampoo"
