"""Learning-rate schedulers that were made for one optimizer, handed over to the one it is converted to."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

_BY_GROUP = ("base_lrs", "max_lrs", "_last_lr")
"""Where schedulers keep a learning rate for each group (`eta_min`, `min_lrs` and the like are floors, and are left)."""

_LONGEST = 2**20
"""Steps within which a schedule has reached its peak."""


def hand_over(schedulers: Iterable[Any], old: Optimizer, new: Optimizer, factor: float) -> None:
    """Have schedulers of `old` drive `new`, whose learning rates are `factor` times as large."""
    tracked = False
    for scheduler in (part for whole in schedulers for part in _parts(whole)):
        if getattr(scheduler, "optimizer", None) is not old:
            continue
        if factor != 1 and not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
            raise ValueError(
                f"{type(scheduler).__name__} keeps learning rates in a way of its own, which the strategy's lr cannot"
                " scale: set lr in configure_optimizers instead, and adamw_lr in the strategy"
            )
        scheduler.optimizer = new
        tracked = True
        for key in _BY_GROUP:
            if factor != 1 and isinstance(getattr(scheduler, key, None), list):
                setattr(scheduler, key, [_scaled(lr, factor) for lr in getattr(scheduler, key)])
    if tracked:
        _track_steps(new)


def peaks(schedulers: Iterable[Any], optimizer: Optimizer) -> list[float]:
    """The highest learning rate of each group, as far as its schedules tell; without one, what it begins from."""
    parts = (part for whole in schedulers for part in _parts(whole) if isinstance(part, LRScheduler))
    driving = [part for part in parts if part.optimizer is optimizer]
    found = []
    for number, group in enumerate(optimizer.param_groups):
        reached = [_reached(one, number) for one in driving if number < len(getattr(one, "base_lrs", ()))]
        reached = reached or [float(group.get("initial_lr", group["lr"]))]
        found.append(max(*reached, float(group.get("max_lr", 0.0))))  # OneCycleLR's is there
    return found


def hand_back(schedulers: Iterable[Any], new: Optimizer, old: Optimizer) -> None:
    """Have schedulers that were handed over name `old` again, beside which they are returned; it has `new`'s groups."""
    for scheduler in (part for whole in schedulers for part in _parts(whole)):
        if getattr(scheduler, "optimizer", None) is new:
            scheduler.optimizer = old


def _parts(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those inside it (SequentialLR, ChainedScheduler, wrappers), each once."""
    seen: set[int] = set()
    waiting = [scheduler]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or not hasattr(one, "optimizer"):
            continue
        seen.add(id(one))
        yield one
        for value in getattr(one, "__dict__", {}).values():
            waiting += value if isinstance(value, (list, tuple)) else [value]


def _reached(scheduler: Any, number: int) -> float:
    """Of one scheduler and one group. Those of torch that are not named here begin at it, or warm up to it."""
    base = float(scheduler.base_lrs[number])
    if isinstance(scheduler, LambdaLR):
        return base * _highest(scheduler.lr_lambdas[number])
    return float(getattr(scheduler, "max_lrs", scheduler.base_lrs)[number])  # CyclicLR's


def _highest(multiplier: Callable[[int], float]) -> float:
    """The peak of a LambdaLR's function, from steps a tenth apart: until it has halved since, or what it says ends.

    An object that is called may count its calls, so a copy is asked.
    """
    highest, step = 0.0, 0
    multiplier = copy.copy(multiplier)
    while step < _LONGEST:
        try:
            now = float(multiplier(step))
        except Exception:  # whatever a stranger's function raises beyond its last step
            break
        if not now >= highest / 2:  # NaN as well
            break
        highest = max(highest, now)
        step += 1 + step // 10
    return highest


def _scaled(lr: Any, factor: float) -> Any:
    return lr * factor if isinstance(lr, (int, float, Tensor)) else lr


def _track_steps(optimizer: Optimizer) -> None:
    """What torch's schedulers do to an optimizer when they are made: they warn where its step is not marked so."""
    reference, step = weakref.ref(optimizer), type(optimizer).step

    @wraps(step)
    def tracked(*arguments: Any, **options: Any) -> Any:
        optimizer = reference()
        optimizer._opt_called = True  # type: ignore[union-attr]
        return step(optimizer, *arguments, **options)  # type: ignore[arg-type]

    tracked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = tracked  # type: ignore[method-assign]
