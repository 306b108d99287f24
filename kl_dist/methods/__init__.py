"""The update rules, one a file, as pure functions on batches of equal-shaped matrices.

A rule is four functions and two facts; to add a method, write its file and its line here (docs/adding-a-method.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kl_dist.methods import kl_factors, kl_shampoo, kl_soap, shampoo, soap
from kl_dist.methods.kronecker import Hyper
from kl_dist.methods.state import MatrixState, Side, State

__all__ = ["MATRIX_METHODS", "METHODS", "Hyper", "MatrixState", "Rule", "Side", "State", "add_rule", "rule"]


class Rule(NamedTuple):
    """One method under one recipe. `start`, `update` and `refresh` mutate the state they are given, nothing else."""

    allocate: Callable[[Sequence[int], Sequence[Side], int, Tensor], Any]  # (shape, sides, batch, like)
    start: Callable[[Any, Tensor, Hyper], None]  # at the first non-zero gradient
    update: Callable[[Any, Tensor, Hyper], Tensor]  # every step; returns U, before the learning rate
    refresh: Callable[[Any, Hyper], None]  # every T steps, after the update
    starts_without_update: bool = False  # the released codes spend their first call on the start
    decays_last: bool = False  # W <- (W - lr U)(1 - lr wd) instead of W (1 - lr wd) - lr U


def _as_released(allocate: Any, start: Any, update: Any, refresh: Any) -> Rule:
    return Rule(allocate, start, update, refresh, starts_without_update=True, decays_last=True)


_RULES = {
    ("kl_shampoo", "fresh"): Rule(kl_shampoo.allocate, kl_shampoo.start, kl_shampoo.update, kl_factors.refresh),
    ("kl_soap", "fresh"): Rule(kl_soap.allocate, kl_soap.start, kl_soap.update, kl_factors.refresh),
    ("soap", "fresh"): Rule(soap.allocate, soap.start, soap.update, kl_factors.refresh),
    ("shampoo", "fresh"): Rule(shampoo.allocate, shampoo.start, shampoo.update, shampoo.refresh),
    ("kl_shampoo", "paper"): _as_released(
        kl_shampoo.allocate,
        kl_factors.start_as_released,
        kl_shampoo.update_as_released,
        kl_factors.refresh_as_released,
    ),
    ("kl_soap", "paper"): _as_released(
        kl_soap.allocate, kl_factors.start_as_released, kl_soap.update_as_released, kl_factors.refresh_as_released
    ),
    ("soap", "paper"): _as_released(
        soap.allocate, soap.start_as_released, soap.update_as_released, soap.refresh_as_released
    ),
    ("shampoo", "paper"): _as_released(
        shampoo.allocate, shampoo.start_as_released, shampoo.update_as_released, shampoo.refresh_as_released
    ),
}

MATRIX_METHODS = tuple(dict.fromkeys(method for method, _ in _RULES))
METHODS = (*MATRIX_METHODS, "adamw")


def add_rule(method: str, recipe: str, added: Rule) -> None:
    """Make a rule known under a method and a recipe; a new recipe also needs `kl_dist.options.RECIPE_DEFAULTS`."""
    _RULES[method, recipe] = added


def rule(method: str, recipe: str) -> Rule:
    """The update rule of a matrix method under a recipe."""
    return _RULES[method, recipe]
