"""Wrappers of optimizers, taken off."""

from typing import Any


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside a LightningOptimizer or a _FabricOptimizer, or what is none of these as it is."""
    inner = vars(optimizer).get("_optimizer")
    return optimizer if inner is None else inner


def is_missing(optimizer: Any) -> bool:
    """Whether this is Lightning's stand-in, where `configure_optimizers` returned None."""
    return type(optimizer).__name__ == "_MockOptimizer"


def kl_shampoo_in(optimizer: Any) -> Any:
    """What has KLShampoo's plan, routes and stats inside the wrappers of Lightning and DeepSpeed; else None."""
    while optimizer is not None and not hasattr(optimizer, "routes"):
        inside = vars(optimizer)
        optimizer = inside.get("_optimizer") or inside.get("optimizer")
    return optimizer
