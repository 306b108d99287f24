"""Lightning's and Fabric's wrappers of optimizers, taken off."""

from typing import Any


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside a LightningOptimizer or a _FabricOptimizer, or what is none of these as it is."""
    inner = vars(optimizer).get("_optimizer")
    return optimizer if inner is None else inner
