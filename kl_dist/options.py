"""Options of a parameter group: which there are, and the values that a recipe gives to those left at None."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kl_dist.methods import ELEMENTWISE, METHODS
from kl_dist.ranges import check_choice, check_count, check_flag, check_integer, check_numbers, nearest

log = logging.getLogger(__name__)

LONG_SIDES = ("cut", "diagonal", "identity")
BLOCKINGS = ("square", "none")

RECIPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "fresh": {
        "betas": (0.95, 0.95),
        "precondition_frequency": 2,
        "nesterov": True,
        "polar": 0,
        "stagger": True,
        "blocking": "square",
        "long_side": "cut",
        "merge_dims": True,
    },
    "paper": {
        "betas": (0.9, 0.98),
        "precondition_frequency": 10,
        "nesterov": False,
        "polar": 0,
        "compute_dtype": "float32",
        "stagger": False,
        "blocking": "none",
        "long_side": "cut",
        "merge_dims": False,
    },
}
ADAMW_BETAS = (0.9, 0.95)

TORCH_ADAMW_BETAS = (0.9, 0.999)
"""The default of torch's AdamW: the plugins take it for betas that nobody chose, and for matrices they are too slow."""

DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": None,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "method": "kl_shampoo",
    "recipe": "fresh",
    "precondition_frequency": None,
    "shampoo_beta": None,
    "nesterov": None,
    "final_beta1": None,
    "polar": None,
    "stagger": None,
    "blocking": None,
    "max_preconditioner_dim": 8192,
    "long_side": None,
    "merge_dims": None,
    "matrices": None,
    "shampoo_exponent": None,
    "adjust_lr_fn": None,
    "compute_dtype": None,
    "matrix_lr": None,
    "adamw_lr": None,
    "adamw_betas": None,
    "adamw_names": None,
}

STRUCTURAL = (
    "method",
    "recipe",
    "blocking",
    "max_preconditioner_dim",
    "long_side",
    "merge_dims",
    "matrices",
    "adamw_names",
)
"""What the plan and the shapes of the state follow from, and so what must not change once they are made."""

KEPT = (*DEFAULTS, "base_lr")
"""What a group has of options: those, and the `lr` that it began with."""

CHANGEABLE = tuple(key for key in KEPT if key not in STRUCTURAL)
"""What schedulers, users and a saved state may change of these."""

CAME_LATER = ("polar", "adjust_lr_fn", "compute_dtype", "matrix_lr", "final_beta1")
"""What a state saved earlier does not know: there the option stays as it is here, unless it BEGINS_WITH_A_RUN."""

BEGINS_WITH_A_RUN = ("matrix_lr", "final_beta1")
"""Options of these that a run which began without goes on without: None."""

IN_ITS_PLACE = {("polar", "bounded"): "start"}
"""What a saved run goes on with where an option had a value that is no more."""

_COUNTS = ("partition_size", "max_state_bytes", "compare_every")
"""Arguments of the whole optimizer that are whole numbers, or None."""

_NOT_OURS = {
    "amsgrad": "no method here has it",
    "maximize": "negate the loss instead",
    "fused": "the engine chooses its kernels itself",
    "foreach": "the engine batches equal shapes itself",
    "capturable": "the step exchanges data between ranks and cannot be captured",
    "differentiable": "the step runs without autograd",
    "momentum": "use betas",
}
_KNOWN_KEYS = {*DEFAULTS, "params", "param_names", "base_lr", "initial_lr", "max_lr", "min_lr", "max_momentum"}
_KNOWN_KEYS |= {"base_momentum", "swa_lr", "name", "lr_scale"}


def recipes(method: str) -> tuple[str, ...]:
    """The recipes that a method has; AdamW, which has none of its own, stands beside any."""
    found = [METHODS[method]] if method in METHODS else METHODS.values()
    return tuple(dict.fromkeys(recipe for one in found for recipe in one.rules))


def recipe_defaults(method: str, recipe: str) -> dict[str, Any]:
    """The values of the options that a method leaves to its recipe."""
    own = METHODS[method].rules[recipe].defaults if method in METHODS else {}
    return {**RECIPE_DEFAULTS.get(recipe, RECIPE_DEFAULTS["fresh"]), **own}


def unknown_option(key: str, known: Iterable[str]) -> TypeError:
    """The error for an option nobody knows, naming the nearest that exists, or why torch's own is not here."""
    if key in _NOT_OURS:
        return TypeError(f"KLShampoo has no option {key!r}: {_NOT_OURS[key]}")
    return TypeError(f"unknown option {key!r}{nearest(key, known)}")


def check_known(given: Iterable[str], *also: str) -> None:
    """Raises TypeError for what is neither an option nor among `also`."""
    for key in given:
        if key not in DEFAULTS and key not in also:
            raise unknown_option(key, [*DEFAULTS, *also])


def check_arguments(given: Mapping[str, Any], unknown: Mapping[str, Any]) -> None:
    """The checks on what is of the whole optimizer, and no option of a group.

    Raises:
        TypeError, ValueError: one of `unknown` is nothing, or one of `given` is out of range.
    """
    asked = [key for key, value in unknown.items() if not is_declined(key, value)]
    check_known(asked, "process_group", "on_nonfinite", *_COUNTS)
    for name in _COUNTS:
        check_count(name, given[name])
    if given["on_nonfinite"] not in ("skip", "raise"):
        raise ValueError(f'on_nonfinite is "skip" or "raise", not {given["on_nonfinite"]!r}')


def is_declined(key: str, value: Any) -> bool:
    """Whether it is an option of torch's that is not here, and not asked for either: `fused=False`, say."""
    return key in _NOT_OURS and value in (None, False)


def check_keys(group: Mapping[str, Any]) -> None:
    """Keys of the user's own are carried along, as torch's optimizers do; a warning where one is nearly an option.

    Raises:
        TypeError: an option of torch's optimizers that is not here is asked for.
    """
    for key, value in group.items():
        if key in _KNOWN_KEYS or is_declined(key, value):
            continue
        if key in _NOT_OURS:
            raise unknown_option(key, DEFAULTS)
        if isinstance(key, str) and (close := difflib.get_close_matches(key, DEFAULTS, n=1, cutoff=0.85)):
            log.warning("a parameter group has %r, which KLShampoo carries along unread; did you mean %r?", key, *close)


def resolve(group: dict[str, Any]) -> None:
    """Check a parameter group and fill what is None from its recipe, in place.

    Raises:
        TypeError: an option of torch's that is not here, or a value of the wrong type.
        ValueError: a value out of range; the message says which are in range.
    """
    check_keys(group)
    check_choice(group, "method", (*METHODS, ELEMENTWISE))
    check_choice(group, "recipe", recipes(group["method"]))
    if group["adamw_betas"] is None:
        group["adamw_betas"] = ADAMW_BETAS if group["betas"] is None else group["betas"]
    for key, value in recipe_defaults(group["method"], group["recipe"]).items():
        if group[key] is None:
            group[key] = value
    check_choice(group, "blocking", BLOCKINGS)
    check_choice(group, "long_side", LONG_SIDES)
    check_numbers(group)
    check_flag(group, "merge_dims")
    check_integer(group, "max_preconditioner_dim")
    names = group["adamw_names"] or ()
    group["adamw_names"] = names or None  # torch loses what is empty on its way to a file
    if not isinstance(names, (tuple, list)) or not all(isinstance(x, str) for x in names):
        raise TypeError(f'adamw_names is a tuple of names of parameters, such as ("head.weight",), not {names!r}')
    if group["matrices"] is not None and not isinstance(group["matrices"], Mapping):
        raise TypeError(
            'matrices is a dict such as {"batch": (0,), "rows": (1,), "columns": (2,)}, or one of names to such'
        )
    group.setdefault("base_lr", number(group["lr"]))
    for key in ("matrix_lr", "adamw_lr"):
        if group[key] is not None and float(group["base_lr"]) == 0:
            raise ValueError(f"{key} is kept in proportion to lr, so lr must not be 0 where {key} is given")


def describe(group: Mapping[str, Any]) -> str:
    """A group's options in one line, to compare across ranks."""
    values = {key: group[key] for key in KEPT}
    return ", ".join(f"{key}={number(x)!r}" if isinstance(x, Tensor) else f"{key}={x!r}" for key, x in values.items())


def number(value: float | Tensor) -> float:
    """A learning rate or the like as Python's number; of a float32 tensor the shortest that rounds to it.

    So 1e-3 is 1e-3 on a rank that has it as a tensor, too, and ranks apply the same.
    """
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return float(value)
    exact = value.item()
    short = (float(f"{exact:.{digits}g}") for digits in range(6, 9))
    return next((x for x in short if torch.tensor(x, dtype=torch.float32).item() == exact), exact)
