"""The update rules, one a file, as pure functions on batches of equal-shaped matrices.

METHODS is the one table of them: the options and their defaults, the plan's costs, Lightning's strategies and
DeepSpeed's types all come from it. To add a method, write its file and its line here; a method of your own is made
known by `add_rule` (docs/adding-a-method.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from kl_dist.methods import kl_shampoo, kl_soap, muon, shampoo, soap
from kl_dist.methods.kronecker import Hyper
from kl_dist.methods.rule import Flops, Method, Rule, Transfer
from kl_dist.methods.state import MatrixState, Side, State

__all__ = [
    "ELEMENTWISE",
    "METHODS",
    "Flops",
    "Hyper",
    "MatrixState",
    "Method",
    "Rule",
    "Side",
    "State",
    "Transfer",
    "add_rule",
    "exchangeable",
    "for_each_method",
    "form",
    "rule",
]

_METHODS = {
    "kl_shampoo": kl_shampoo.METHOD,
    "kl_soap": kl_soap.METHOD,
    "soap": soap.METHOD,
    "shampoo": shampoo.METHOD,
    "muon": muon.METHOD,
}

METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)
"""Every method for matrices, by name."""

ELEMENTWISE = "adamw"
"""The method of all that is no matrix (see `kl_dist.methods.adamw`); it has no recipes and can be cut anywhere."""

_listeners: list[Callable[[str], None]] = []


def add_rule(method: str, recipe: str, added: Rule) -> None:
    """Make a rule known under a method and a recipe, of which either may be new or be there already.

    On every rank, before the optimizer is constructed. What derives from METHODS has it from then on: options, plans,
    `Trainer(strategy=method)`, a DeepSpeed config's `"type"`. A new recipe has the defaults of "fresh" but for those
    the rule has itself.

    Raises:
        ValueError: a name that a strategy or the key of a checkpoint cannot have.
    """
    for name in (method, recipe):
        if not name.isidentifier() or name == ELEMENTWISE:
            raise ValueError(f"a method or recipe of one's own is named by a word other than {ELEMENTWISE!r}: {name!r}")
    is_new = method not in _METHODS
    known = Method(method, {}) if is_new else _METHODS[method]
    _METHODS[method] = replace(known, rules={**known.rules, recipe: added})
    for listener in _listeners if is_new else ():
        listener(method)


def for_each_method(listener: Callable[[str], None]) -> None:
    """Call a function with the name of every method that is known, and of each that is added later."""
    if listener not in _listeners:
        _listeners.append(listener)
    for method in _METHODS:
        listener(method)


def form(method: str, recipe: str) -> str:
    """The recipe that the saved state of a method under a recipe is of: see `Rule.form`."""
    known = _METHODS[method].rules.get(recipe) if method in _METHODS else None
    return recipe if known is None else known.form or recipe


def exchangeable(method: str, recipe: str) -> list[str]:
    """The recipes whose saved state differs from this one's in dtypes at most, this one included."""
    known = _METHODS[method].rules if method in _METHODS else {}
    return [one for one in known if form(method, one) == form(method, recipe)]


def rule(method: str, recipe: str) -> Rule:
    """The update rule of a matrix method under a recipe."""
    return _METHODS[method].rules[recipe]
