"""AdamW, as a module's `configure_optimizers` gives it, converted to KLShampoo: same groups, same schedules.

What carries over as it is: the groups with all their keys, schedules, weight decays, eps, hooks. Matrices and what
AdamW goes on serving get rates in proportion to AdamW's: rates.py. Betas that are still AdamW's default (0.9, 0.999)
become KLShampoo's for the matrices, for which they are far too slow; AdamW keeps them for what it goes on serving.
Other optimizers are refused, never quietly kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from kl_dist import KLShampoo, modules, options
from kl_dist.groups import check_names
from kl_dist.modules import shape_of
from kl_dist.planning.matrices import names_of
from lightning_plugin import rates
from lightning_plugin.schedulers import hand_over, peaks

_IMPLEMENTATION = {"foreach", "fused", "capturable", "decoupled_weight_decay"}
"""Keys of torch's groups that say how AdamW computes, and mean nothing to another optimizer."""
_CHANGES_THE_UPDATE = {
    "amsgrad": "no Kronecker method has it",
    "maximize": "negate the loss instead",
    "differentiable": "the step runs without autograd",
}
_OF_SGD = {"momentum", "dampening", "nesterov"}
_SHARED = {"lr", "weight_decay", "eps", "betas"}
"""Options that AdamW's groups share with ours; others of ours may stand there too, for one group."""


def convert(
    optimizer: Optimizer,
    module: nn.Module,
    given: Mapping[str, Any],
    schedulers: Iterable[Any] = (),
    kind: type[Optimizer] = KLShampoo,
) -> Any:
    """KLShampoo in the place of an optimizer; a collective.

    Args:
        optimizer: torch's AdamW, or Adam without weight decay; those whose numbers mean something else (Adam with
            weight decay, SGD) only where `given` has its own. KLShampoo is returned as it is.
        module: has the parameters; tells their names, and which are embeddings, output head or stacks of experts.
        given: options of KLShampoo that go before what the optimizer has, `output_head` and `convert_lr`.
        schedulers: those of `optimizer` drive KLShampoo afterwards.
        kind: of optimizer to make: KLShampoo, or one that takes its options and groups.

    One that an earlier fit converted, for a module that keeps its optimizer, gives the same KLShampoo, state and all.

    Raises:
        TypeError: an optimizer that cannot be converted.
        ValueError: options that cannot be, or that are given twice; a missing `lr` or `weight_decay`.
    """
    _check_parameters(optimizer, module)
    if (before := vars(optimizer).get(_CONVERTED)) is not None and isinstance(before.to, kind) and kind is KLShampoo:
        _check_given_again(optimizer, before.given, given)
        hand_over(schedulers, optimizer, before.to, 1.0)
        return before.to
    if isinstance(optimizer, kind):
        _check_not_given_twice(optimizer, given)
        return optimizer
    _check(optimizer, given, kind)
    schedulers = list(schedulers)
    conversion = _Conversion.of(optimizer, module, given, schedulers)
    groups = [conversion.group(*one) for one in zip(optimizer.param_groups, conversion.peaks, strict=True)]
    converted = kind([group.made_with for group in groups], **conversion.defaults)
    for group, of_old in zip(converted.param_groups, groups, strict=True):
        group.update(of_old.keeps)
    converted._optimizer_step_pre_hooks = optimizer._optimizer_step_pre_hooks
    converted._optimizer_step_post_hooks = optimizer._optimizer_step_post_hooks
    hand_over(schedulers, optimizer, converted, conversion.factor)
    _convert_later_groups(converted, conversion)
    _retire(optimizer, _Converted(converted, dict(given), conversion.peak))
    return converted


def announcement(before: Optimizer | None, after: Any, module: nn.Module, given: Mapping[str, Any]) -> str:
    """What to say of a conversion, once: where each parameter goes, which output head was found, and rates and betas
    that may not be meant for KLShampoo."""
    kept = before is None or after is before
    what = "KLShampoo" if kept else f"KLShampoo in the place of {type(before).__name__}"
    said = [f"{what}, where each parameter goes:", after.routes()]
    about_head = None if kept else modules.look_up(module, given.get("output_head")).about_head
    said += [about_head] if about_head else []
    if before is not None and not kept:
        about_rates = rates.about(before, _usual_lr(after), vars(before)[_CONVERTED].peak, module, given)
        said += [about_rates] if about_rates else []
    for number, group in enumerate(() if kept else after.param_groups):
        usual = options.recipe_defaults(group["method"], group["recipe"])["betas"]
        if group["betas"] != usual and group["betas"] == group["adamw_betas"]:
            said.append(
                f"betas={group['betas']} of group {number} were set, and so are kept; {usual} are KLShampoo's own"
            )
    return "\n".join(said)


_CONVERTED = "_converted_to_kl_shampoo"
"""Where a converted optimizer has its successor."""


class _Converted(NamedTuple):
    """What became of an optimizer, by which options."""

    to: Any
    given: dict[str, Any]
    peak: float  # the highest learning rate of its usual group


class _Group(NamedTuple):
    """A group on its way."""

    made_with: dict[str, Any]  # what KLShampoo is constructed with
    keeps: dict[str, Any]  # what the group has afterwards, its learning rate of the moment included


@dataclass(frozen=True)
class _Conversion:
    """What becomes of an optimizer's groups."""

    optimizer: Optimizer
    given: Mapping[str, Any]
    names: Mapping[int, str]  # of the module's parameters, by their ids
    said: modules.Said  # of embeddings, the output head, experts and their like
    factor: float  # new learning rates over old ones, of groups and schedules
    by_rule: bool  # whether learning rates go by the rule of lightning_plugin.rates
    peaks: tuple[float, ...]  # the highest learning rate of each group, for the rule
    peak: float  # that of the usual one

    @classmethod
    def of(
        cls, optimizer: Optimizer, module: nn.Module, given: Mapping[str, Any], schedulers: Sequence[Any]
    ) -> _Conversion:
        usual = _usual_lr(optimizer)
        factor = float(given["lr"]) / usual if "lr" in given and usual else 1.0
        names = {id(p): name.replace("_orig_mod.", "") for name, p in module.named_parameters()}
        check_names("adamw_names", given.get("adamw_names", ()), names.values())
        check_names("matrices", names_of(given.get("matrices")), names.values())
        said = modules.look_up(module, given.get("output_head"))
        by_rule = rates.go_by_rule(module, given)
        highest = tuple(peaks(schedulers, optimizer) if by_rule else [0.0] * len(optimizer.param_groups))
        return cls(optimizer, given, names, said, factor, by_rule, highest, highest[_usual_group(optimizer)])

    @property
    def defaults(self) -> dict[str, Any]:
        """What KLShampoo is constructed with for all groups, and those that are added later begin with."""
        own = ("lr", "matrix_lr", "adamw_lr", "weight_decay", "output_head", "adamw_names", "convert_lr")
        lr = self.lr(_usual_lr(self.optimizer))
        return {**({"lr": lr} if lr else {}), **{key: x for key, x in self.given.items() if key not in own}}

    def later_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group that is added after the conversion, filled with what AdamW would have filled it with."""
        filled = {**self.optimizer.defaults, **group}
        params = filled["params"]
        filled["params"] = [params] if isinstance(params, Tensor) else list(params)
        filled["lr"] = group.get("lr", _usual_lr(self.optimizer))
        made = self.group(filled, max(float(filled["lr"]), self.peak)).made_with  # it may come up to the others'
        return {**made, "lr": filled["lr"] if "lr" in group else self.lr(filled["lr"])}

    def group(self, group: Mapping[str, Any], peak: float) -> _Group:
        """It is constructed with the learning rate that its schedule begins from: its others keep in proportion.

        `peak` is the highest that its schedule reaches.
        """
        left = {"params", "param_names", *_IMPLEMENTATION, *_CHANGES_THE_UPDATE}
        if "dampening" in group:
            left |= _OF_SGD
        made = {key: group[key] for key in group.keys() & options.DEFAULTS.keys() - left - _SHARED}
        named = [(self.names.get(id(p), name), p) for name, p in _named(group)]
        begins = self.lr(group.get("initial_lr", group["lr"]))
        method = group.get("method", self.given.get("method", "kl_shampoo"))
        made = {**(rates.of_group(method, float(begins), peak) if self.by_rule else {}), **made}
        made |= {"params": named, "lr": begins, "weight_decay": self.weight_decay(group), **self.betas(group)}
        made |= self.served(named, group.get("matrices", self.given.get("matrices")))
        if "eps" in group and "eps" not in self.given:
            made["eps"] = group["eps"]
        for key in self.given.keys() & {"matrix_lr", "adamw_lr"}:
            usual = float(self.given.get("lr", _usual_lr(self.optimizer)))
            if not usual:
                raise ValueError(f"{key} is kept in proportion to lr, which is 0 here: give the strategy an lr, too")
            made[key] = float(self.given[key]) * float(begins) / usual
        keeps = {key: x for key, x in group.items() if key not in left | options.DEFAULTS.keys()}
        now = {key: self.lr(group[key]) for key in ("lr", "initial_lr", "max_lr", "min_lr") if key in group}
        return _Group(made, {**keeps, **now})

    def lr(self, old: Any) -> Any:
        return old if self.factor == 1 else old * self.factor

    def weight_decay(self, group: Mapping[str, Any]) -> float:
        if "weight_decay" not in self.given:
            return group["weight_decay"]
        spared = group["weight_decay"] == 0 and any(other["weight_decay"] for other in self.optimizer.param_groups)
        return 0.0 if spared else self.given["weight_decay"]

    def betas(self, group: Mapping[str, Any]) -> dict[str, Any]:
        if "betas" not in group:
            return {}
        cycled = "max_momentum" in group  # by OneCycleLR or CyclicLR, which own betas[0] from the start
        chosen = tuple(self.optimizer.defaults["betas"] if cycled else group["betas"])
        found: dict[str, Any] = {"adamw_betas": self.given.get("adamw_betas", chosen)}
        if "betas" in self.given:
            chosen = self.given["betas"]
        elif chosen == options.TORCH_ADAMW_BETAS:
            method, recipe = self.given.get("method", "kl_shampoo"), self.given.get("recipe", "fresh")
            chosen = options.recipe_defaults(method, recipe)["betas"]
        return {**found, "betas": (group["betas"][0], chosen[1]) if cycled else tuple(chosen)}

    def served(self, named: Collection[tuple[str, Tensor]], matrices: Mapping[str, Any] | None) -> dict[str, Any]:
        """Which parameters of a group AdamW serves, and as which matrices the others are read."""
        served = self.said.serve(named, matrices, self.given.get("adamw_names"))
        return {"adamw_names": served.adamw_names, "matrices": served.matrices}


def _named(group: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    """Parameters with the names that the optimizer has for them, or numbers."""
    if group.get("param_names"):
        return zip(group["param_names"], group["params"], strict=True)
    return ((f"parameter {i}", p) for i, p in enumerate(group["params"]))


def _usual_lr(optimizer: Optimizer) -> float:
    """The learning rate that an optimizer was made with: where no group has it, that of the largest group."""
    usual = float(optimizer.defaults["lr"])
    cycled = ("max_lr", "max_momentum")  # OneCycleLR and CyclicLR have put rates of their own there
    if any(key in group for group in optimizer.param_groups for key in cycled):
        return usual
    group = optimizer.param_groups[_usual_group(optimizer)]
    return float(group.get("initial_lr", group["lr"]))


def _usual_group(optimizer: Optimizer) -> int:
    """Which group has the learning rate that the optimizer was made with, or else is the largest."""
    begin = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    if (usual := float(optimizer.defaults["lr"])) in begin:
        return begin.index(usual)
    sizes = [sum(shape_of(p).numel() for p in group["params"]) for group in optimizer.param_groups]
    return sizes.index(max(sizes))


def _check(optimizer: Optimizer, given: Mapping[str, Any], wanted: type) -> None:
    kind = type(optimizer)
    if kind not in (AdamW, Adam, SGD):
        raise TypeError(
            f"configure_optimizers returned {kind.__module__}.{kind.__qualname__}, which cannot be converted to"
            " KLShampoo: return torch.optim.AdamW, which is converted, or"
            f" {wanted.__module__.partition('.')[0]}.{wanted.__qualname__}, or choose another strategy"
        )
    if kind is SGD and "lr" not in given:
        raise ValueError(
            "configure_optimizers returned SGD, whose learning rate means something else: give the strategy an lr"
            " (begin at five times AdamW's), or return torch.optim.AdamW"
        )
    for number, group in enumerate(optimizer.param_groups):
        coupled = kind is SGD or (kind is Adam and not group.get("decoupled_weight_decay", False))
        if coupled and group["weight_decay"] and "weight_decay" not in given:
            raise ValueError(
                f"{kind.__name__}'s weight_decay={group['weight_decay']} (parameter group {number}) is added to the"
                " gradient, KLShampoo's is not: return torch.optim.AdamW, or give the strategy a weight_decay"
            )
        for key, reason in _CHANGES_THE_UPDATE.items():
            if group.get(key):
                raise ValueError(f"{kind.__name__}({key}=True) cannot be converted to KLShampoo: {reason}")


def _check_parameters(optimizer: Optimizer, module: nn.Module) -> None:
    known = {id(p) for p in module.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for name, p in _named(group):
            if id(p) not in known:
                raise ValueError(
                    f"{name!r} of parameter group {number}, of shape {tuple(shape_of(p))}, is no parameter of the"
                    " module, and no gradient would reach it: make the optimizer of the module's parameters, in"
                    " configure_optimizers (FSDP2 has put others in the place of those there were before)"
                )


def _check_not_given_twice(optimizer: Optimizer, given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if key == "convert_lr":
            continue
        if key == "method" and all(group["method"] in (value, "adamw") for group in optimizer.param_groups):
            continue
        raise ValueError(
            f"configure_optimizers returned a KLShampoo, and the strategy has {key}={value!r} for it: give the options"
            " to one of the two"
        )


def _convert_later_groups(converted: Optimizer, conversion: _Conversion) -> None:
    """Groups that are added to what was AdamW come as AdamW's, from Lightning's finetuning callbacks, say."""
    add = converted.add_param_group

    def add_param_group(param_group: dict[str, Any]) -> None:
        add(conversion.later_group(param_group))

    converted.add_param_group = add_param_group  # type: ignore[method-assign]


def _check_given_again(optimizer: Optimizer, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if changed:
        raise ValueError(
            f"this {type(optimizer).__name__} was converted to KLShampoo by a strategy with other options"
            f" ({', '.join(changed)}): return a new one from configure_optimizers"
        )


def _retire(optimizer: Optimizer, converted: _Converted) -> None:
    """Have the converted optimizer say so to those who still step it: it must not train beside its successor.

    Its groups are those of its successor, for schedulers that nobody handed over and rates that are set by hand.
    """

    def step(closure: Any = None) -> None:
        raise RuntimeError(
            "this optimizer was converted to KLShampoo by the strategy: step what self.optimizers() returns, not the"
            f" {type(optimizer).__name__} that was made in configure_optimizers"
        )

    optimizer.step = step  # type: ignore[method-assign,assignment]
    optimizer.state.clear()
    optimizer.param_groups = converted.to.param_groups
    vars(optimizer)[_CONVERTED] = converted
