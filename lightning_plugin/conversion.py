"""AdamW, as a module's `configure_optimizers` gives it, converted to KLShampoo: same groups, same schedules.

What carries over as it is: the groups with all their keys, learning rates, weight decays, eps, hooks. Betas that are
still AdamW's default (0.9, 0.999) become KLShampoo's for the matrices, for which they are far too slow; AdamW keeps
them for what it goes on serving. Other optimizers are refused, never quietly kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from kl_dist import KLShampoo, options
from kl_dist.routing import embeddings_and_head
from lightning_plugin.schedulers import hand_over

ADAMW_DEFAULT_BETAS = (0.9, 0.999)

_IMPLEMENTATION = {"foreach", "fused", "capturable", "decoupled_weight_decay"}
"""Keys of torch's groups that say how AdamW computes, and mean nothing to another optimizer."""
_CHANGES_THE_UPDATE = {
    "amsgrad": "no Kronecker method has it",
    "maximize": "negate the loss instead",
    "differentiable": "the step runs without autograd",
}
_OF_SGD = {"momentum", "dampening", "nesterov"}
_TORCHS = {"lr", "weight_decay", "eps", "betas"}
"""Options that AdamW's groups share with ours; others of ours may stand there too, for one group."""


def convert(
    optimizer: Optimizer, module: nn.Module, given: Mapping[str, Any], schedulers: Iterable[Any] = ()
) -> KLShampoo:
    """KLShampoo in the place of an optimizer; a collective.

    Args:
        optimizer: torch's AdamW, or Adam without weight decay; those whose numbers mean something else (Adam with
            weight decay, SGD) only where `given` has its own. KLShampoo is returned as it is.
        module: has the parameters; tells their names, and which are embeddings or output head.
        given: options of KLShampoo that go before what the optimizer has, and `output_head`.
        schedulers: those of `optimizer` drive KLShampoo afterwards.

    Raises:
        TypeError: an optimizer that cannot be converted.
        ValueError: options that cannot be, or that are given twice; a missing `lr` or `weight_decay`.
    """
    if isinstance(optimizer, KLShampoo):
        _check_not_given_twice(optimizer, given)
        return optimizer
    _check(optimizer, given)
    factor = 1.0
    if "lr" in given and optimizer.defaults["lr"]:
        factor = float(given["lr"]) / float(optimizer.defaults["lr"])
    names = names_of(module)
    for name in given.get("adamw_names", ()):
        if name not in names.values():
            raise ValueError(f"adamw_names has {name!r}, which is no parameter of the module")
    elementwise = embeddings_and_head(module, given.get("output_head"))
    own = {key: x for key, x in given.items() if key not in ("lr", "weight_decay", "output_head", "adamw_names")}
    groups = [_group(group, optimizer, given, factor, names, elementwise) for group in optimizer.param_groups]
    converted = KLShampoo([group for group, _, _ in groups], **{**_defaults(optimizer, factor), **own})
    for group, (_, lr, kept) in zip(converted.param_groups, groups, strict=True):
        group.update(kept)
        group["lr"] = lr
    converted._optimizer_step_pre_hooks = optimizer._optimizer_step_pre_hooks
    converted._optimizer_step_post_hooks = optimizer._optimizer_step_post_hooks
    hand_over(schedulers, optimizer, converted, factor)
    _retire(optimizer)
    return converted


def names_of(module: nn.Module) -> dict[int, str]:
    """Names of parameters by their ids, as KLShampoo has them."""
    return {id(p): name.replace("_orig_mod.", "") for name, p in module.named_parameters()}


def _check(optimizer: Optimizer, given: Mapping[str, Any]) -> None:
    kind = type(optimizer)
    if kind not in (AdamW, Adam, SGD):
        raise TypeError(
            f"configure_optimizers returned {kind.__module__}.{kind.__qualname__}, which cannot be converted to"
            " KLShampoo: return torch.optim.AdamW, which is converted, or kl_dist.KLShampoo, or choose another strategy"
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


def _check_not_given_twice(optimizer: KLShampoo, given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if key == "method" and all(value == group["method"] for group in optimizer.param_groups):
            continue
        raise ValueError(
            f"configure_optimizers returned a KLShampoo, and the strategy has {key}={value!r} for it: give the options"
            " to one of the two"
        )


def _defaults(optimizer: Optimizer, factor: float) -> dict[str, Any]:
    """What groups that are added later begin with."""
    lr = float(optimizer.defaults["lr"]) * factor
    return {"lr": lr} if lr else {}


def _group(
    group: Mapping[str, Any],
    optimizer: Optimizer,
    given: Mapping[str, Any],
    factor: float,
    names: Mapping[int, str],
    elementwise: set[int],
) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """(options to construct with, learning rate as it is now, keys to keep) of a converted group.

    It is constructed with the learning rate that its schedule begins from: `adamw_lr` is kept in proportion to it.
    """
    named = [(names.get(id(p), name), p) for name, p in _named(group)]
    begins = _times(group.get("initial_lr", group["lr"]), factor)
    made: dict[str, Any] = {"params": named, "lr": begins, "weight_decay": _decay(group, optimizer, given)}
    if "eps" in group and "eps" not in given:
        made["eps"] = group["eps"]
    if "betas" in group:
        made |= _betas(group, optimizer, given)
    if "adamw_lr" in given:
        usual = float(given.get("lr", optimizer.defaults["lr"]))
        made["adamw_lr"] = float(given["adamw_lr"]) * float(begins) / usual
    served = [name for name, p in named if id(p) in elementwise and p.ndim >= 2]
    here = {name for name, _ in named}
    made["adamw_names"] = (*served, *(name for name in given.get("adamw_names", ()) if name in here))
    left = {"params", "param_names", *_IMPLEMENTATION, *_CHANGES_THE_UPDATE, *(_OF_SGD if _is_sgd(group) else ())}
    ours = {key: group[key] for key in group.keys() & options.DEFAULTS.keys() - left if key not in _TORCHS}
    kept = {key: x for key, x in group.items() if key not in left | options.DEFAULTS.keys()}
    made = {**ours, **made}
    for key in ("initial_lr", "max_lr", "min_lr"):
        if key in kept:
            kept[key] = _times(kept[key], factor)
    return made, _times(group["lr"], factor), kept


def _named(group: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    """Parameters that the module does not have keep the name that the optimizer has for them, or its number."""
    if group.get("param_names"):
        return zip(group["param_names"], group["params"], strict=True)
    return ((f"parameter {i} of the optimizer alone", p) for i, p in enumerate(group["params"]))


def _is_sgd(group: Mapping[str, Any]) -> bool:
    return "dampening" in group


def _betas(group: Mapping[str, Any], optimizer: Optimizer, given: Mapping[str, Any]) -> dict[str, Any]:
    cycled = "max_momentum" in group  # by OneCycleLR or CyclicLR, which own betas[0] from the start
    chosen = tuple(optimizer.defaults["betas"] if cycled else group["betas"])
    made: dict[str, Any] = {"adamw_betas": given.get("adamw_betas", chosen)}
    if chosen == ADAMW_DEFAULT_BETAS or "betas" in given:
        method, recipe = given.get("method", "kl_shampoo"), given.get("recipe", "fresh")
        chosen = tuple(given.get("betas") or options.recipe_defaults(method, recipe)["betas"])
    made["betas"] = (group["betas"][0], chosen[1]) if cycled else chosen
    return made


def _decay(group: Mapping[str, Any], optimizer: Optimizer, given: Mapping[str, Any]) -> float:
    if "weight_decay" not in given:
        return group["weight_decay"]
    spared = group["weight_decay"] == 0 and any(other["weight_decay"] for other in optimizer.param_groups)
    return 0.0 if spared else given["weight_decay"]


def _times(lr: Any, factor: float) -> Any:
    return lr if factor == 1 else lr * factor


def _retire(optimizer: Optimizer) -> None:
    """Have the converted optimizer say so to those who still step it: it must not train beside its successor."""

    def step(closure: Any = None) -> None:
        raise RuntimeError(
            "this optimizer was converted to KLShampoo by the strategy: step what self.optimizers() returns, not the"
            f" {type(optimizer).__name__} that was made in configure_optimizers"
        )

    optimizer.step = step  # type: ignore[method-assign]
    optimizer.state.clear()
