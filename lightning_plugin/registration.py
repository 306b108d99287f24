"""The strategies' names, made known to every Lightning that is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from kl_dist import METHODS
from kl_dist.methods import for_each_method

NAMESPACES = {"of_lightning": ("lightning.pytorch", "lightning.fabric")}
NAMESPACES["of_pytorch_lightning"] = ("pytorch_lightning", "lightning_fabric")
"""Modules of `lightning_plugin.namespaces`, and the two packages that each is for."""

Variant = tuple[type, dict[str, Any]]
"""A strategy's class and what its name gives it."""

_OFFLOADED = {"offload_optimizer": True}
DEEPSPEED: dict[str, dict[str, Any]] = {
    "_deepspeed": {},
    "_deepspeed_stage_1": {"stage": 1},
    "_deepspeed_stage_2": {"stage": 2},
    "_deepspeed_stage_2_offload": {"stage": 2, **_OFFLOADED},
    "_deepspeed_stage_3": {"stage": 3},
    "_deepspeed_stage_3_offload": {"stage": 3, **_OFFLOADED, "offload_parameters": True},
}
"""The endings that Lightning's own DeepSpeed strategy has, apart from that for NVMe, and what they mean."""


def installed() -> Iterator[tuple[ModuleType, str, str]]:
    """For every Lightning that is there: our classes, and its packages for the Trainer and for Fabric."""
    for module, (trainer, fabric) in NAMESPACES.items():
        if find_spec(trainer.partition(".")[0]) is not None:
            yield import_module(f"lightning_plugin.namespaces.{module}"), trainer, fabric


def register() -> None:
    """Register the strategies of every method, those that are added later too, with every Lightning that is there."""
    for_each_method(register_method)


def register_method(method: str) -> None:
    """Register all of a method's names with all of them; again is no matter."""
    for classes, trainer, fabric in installed():
        of_trainer = import_module(f"{trainer}.strategies").StrategyRegistry
        of_fabric = import_module(f"{fabric}.strategies").STRATEGY_REGISTRY
        _register(method, of_trainer, _variants(classes.KLShampooStrategy, classes.KLShampooFSDP2Strategy))
        _register(method, of_fabric, _variants(classes.KLShampooFabricStrategy, classes.KLShampooFabricFSDP2Strategy))
        deepspeed = {end: (classes.KLShampooDeepSpeedStrategy, given) for end, given in DEEPSPEED.items()}
        _register(method, of_trainer, deepspeed)


def _variants(ddp: type, fsdp2: type) -> dict[str, Variant]:
    return {
        "": (ddp, {}),
        "_find_unused_parameters_true": (ddp, {"find_unused_parameters": True}),
        "_spawn": (ddp, {"start_method": "spawn"}),
        "_fsdp2": (fsdp2, {}),
    }


def _register(method: str, registry: Any, variants: Mapping[str, Variant]) -> None:
    for ending, (kind, options) in variants.items():
        given = {} if method == "kl_shampoo" else {"method": method}
        if method + ending not in registry:
            said = (kind.__doc__ or "").partition(":")[0]
            registry.register(method + ending, kind, description=f"{said}, {METHODS[method].title}", **options, **given)
