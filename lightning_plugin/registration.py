"""The strategies' names, made known to every Lightning that is installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

NAMESPACES = {"of_lightning": ("lightning.pytorch", "lightning.fabric")}
NAMESPACES["of_pytorch_lightning"] = ("pytorch_lightning", "lightning_fabric")
"""Modules of `lightning_plugin.namespaces`, and the two packages that each is for."""

METHODS = ("kl_shampoo", "kl_soap", "soap", "shampoo")


def installed() -> Iterator[tuple[ModuleType, str, str]]:
    """For every Lightning that is there: our classes, and its packages for the Trainer and for Fabric."""
    for module, (trainer, fabric) in NAMESPACES.items():
        if find_spec(trainer.partition(".")[0]) is not None:
            yield import_module(f"lightning_plugin.namespaces.{module}"), trainer, fabric


def register() -> None:
    """Register all names with all of them; again is no matter."""
    for classes, trainer, fabric in installed():
        of_trainer = import_module(f"{trainer}.strategies").StrategyRegistry
        of_fabric = import_module(f"{fabric}.strategies").STRATEGY_REGISTRY
        for method in METHODS:
            given = {} if method == "kl_shampoo" else {"method": method}
            _register(of_trainer, classes.KLShampooStrategy, classes.KLShampooFSDP2Strategy, method, given)
            _register(of_fabric, classes.KLShampooFabricStrategy, classes.KLShampooFabricFSDP2Strategy, method, given)


def _register(registry: Any, ddp: type, fsdp2: type, method: str, given: dict[str, Any]) -> None:
    variants: dict[str, tuple[type, dict[str, Any]]] = {
        method: (ddp, {}),
        f"{method}_find_unused_parameters_true": (ddp, {"find_unused_parameters": True}),
        f"{method}_spawn": (ddp, {"start_method": "spawn"}),
        f"{method}_fsdp2": (fsdp2, {}),
    }
    for name, (kind, options) in variants.items():
        if name not in registry:
            said = (kind.__doc__ or "").partition(":")[0]
            registry.register(name, kind, description=f"{said}, method {method}", **options, **given)
