"""Wrappers of optimizers, taken off."""

from typing import Any

from kl_dist import KLShampoo


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside a LightningOptimizer or a _FabricOptimizer, or what is none of these as it is."""
    inner = vars(optimizer).get("_optimizer")
    return optimizer if inner is None else inner


def kl_shampoo_in(optimizer: Any) -> KLShampoo | None:
    """The KLShampoo inside Lightning's wrapper, or inside DeepSpeed's and of what DeepSpeed constructs; else None."""
    while optimizer is not None and not isinstance(optimizer, KLShampoo):
        inside = vars(optimizer)
        optimizer = inside.get("_optimizer") or inside.get("optimizer") or inside.get("core")
    return optimizer
