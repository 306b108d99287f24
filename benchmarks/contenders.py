"""Who takes part: an optimizer, how to make it, and how to tell it when to refresh.

A step of these methods is of one of two kinds. A *plain* step updates the weights; a *refresh* step also computes new
eigenbases or roots, and is the one that comes every T steps. Both are asked of one and the same optimizer, by changing
T between steps: T = 1 makes the next step a refresh, T = NEVER a plain one. So what is timed is what a user gets, and
no part of an optimizer is called from outside its `step`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import kl_dist

NEVER = 10**9
SetFrequency = Callable[[torch.optim.Optimizer, int], None]


@dataclass(frozen=True)
class Contender:
    """One optimizer under test.

    Args:
        name: as tables and plots show it.
        make: from parameters, at T = 1.
        set_frequency: sets T between steps. None: the optimizer has no T to set.
        every_step: without a T, whether each of its steps is a refresh; else none is.
        note: what a reader must know of its settings.
    """

    name: str
    make: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
    set_frequency: SetFrequency | None = None
    every_step: bool = False
    note: str = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of step it has, "plain" and "refresh"."""
        if self.set_frequency is not None:
            return ("plain", "refresh")
        return ("refresh",) if self.every_step else ("plain",)


def set_in_groups(optimizer: torch.optim.Optimizer, every: int) -> None:
    """T where KLShampoo and most peers read it at each step: in the parameter groups."""
    for group in optimizer.param_groups:
        group["precondition_frequency"] = every


def ours(
    methods: Sequence[str],
    polar: Sequence[int] = (),
    recipes: Sequence[str] = (),
    package: Any = kl_dist,
    suffix: str = "",
) -> list[Contender]:
    """The project's methods at their defaults; only the staggering is off, so that a refresh is all in one step.

    And the bound on first updates is, so that a step is one of the long run.

    And KL-Shampoo with each number of Newton-Schulz steps in `polar`, and under each of `recipes`. `package` may be
    kl_dist of another checkout, of which those methods are taken that it has; `suffix` tells them apart.
    """

    def maker(method: str, **options: Any) -> Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]:
        options = {"polar": 0, "lr": 1e-3, "precondition_frequency": 1, "stagger": False} | options
        return lambda params: package.KLShampoo(list(params), method=method, **options)

    known = [method for method in methods if method in package.METHODS]
    found = [Contender(method + suffix, maker(method), set_in_groups) for method in known]
    more: list[dict[str, Any]] = [*({"polar": k} for k in polar), *({"recipe": one} for one in recipes)]
    for options in more:
        said = ", ".join(f"{name}={value}" for name, value in options.items())
        found.append(Contender(f"kl_shampoo {said}{suffix}", maker("kl_shampoo", **options), set_in_groups))
    return found


def torchs() -> list[Contender]:
    """AdamW and Muon as torch ships them, the floor and the one to beat."""
    found = [Contender("AdamW (torch)", lambda params: torch.optim.AdamW(list(params), lr=1e-3))]
    if hasattr(torch.optim, "Muon"):  # torch 2.9 and later
        muon: Any = torch.optim.Muon
        note = "its products run in bfloat16"
        found.append(Contender("Muon (torch)", lambda params: muon(list(params), lr=1e-3), note=note))
    return found


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors an optimizer keeps in `state`, each storage once: views of one buffer are not added up."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for one in value.values():
                visit(one)
        elif isinstance(value, (list, tuple)):
            for one in value:
                visit(one)
        elif hasattr(value, "__dict__") or hasattr(value, "__slots__"):
            for name in (*getattr(value, "__dict__", ()), *getattr(value, "__slots__", ())):
                visit(getattr(value, name, None))

    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        seen.add(id(parameter))
    visit(dict(optimizer.state))
    shards = (getattr(p, "to_local", lambda p=p: p)() for group in optimizer.param_groups for p in group["params"])
    weights = {shard.untyped_storage().data_ptr() for shard in shards}
    return sum(size for address, size in storages.items() if address not in weights)
