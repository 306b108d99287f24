"""Learning-rate schedulers that were made for one optimizer, handed over to the one it is converted to."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from functools import wraps
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

_BY_GROUP = ("base_lrs", "max_lrs", "_last_lr")
"""Where schedulers keep a learning rate for each group (`eta_min`, `min_lrs` and the like are floors, and are left)."""


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
