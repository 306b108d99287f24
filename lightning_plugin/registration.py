"""The strategies' names, made known to every Lightning that is imported, before this or after."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
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


_known: dict[str, ModuleType] = {}
"""The modules of NAMESPACES that are imported."""


def register() -> None:
    """Register the strategies of every method, those that are added later too, with every Lightning that is imported.

    One that is imported later is told as soon as it is. The other is left alone: importing it would cost seconds, and
    put back what the script has set of its loggers.
    """
    if _WATCH not in sys.meta_path:
        sys.meta_path.insert(0, _WATCH)
    _import_classes()
    for_each_method(register_method)


def register_method(method: str) -> None:
    """Register all of a method's names with the Lightnings that are imported; again is no matter."""
    for namespace in _known:
        _register_with(namespace, method)


def add(namespace: str) -> None:
    """What a module of NAMESPACES calls at the end of its import: its classes are there."""
    _known[namespace] = sys.modules[f"lightning_plugin.namespaces.{namespace}"]
    for method in METHODS:
        _register_with(namespace, method)


def classes() -> ModuleType:
    """Our classes for the Lightning that is imported; for `lightning` where both are, or none.

    Raises:
        ImportError: none is installed.
    """
    for namespace in (*filter(_is_imported, NAMESPACES), *filter(_is_installed, NAMESPACES)):
        return import_module(f"lightning_plugin.namespaces.{namespace}")
    raise ImportError("lightning_plugin needs Lightning: pip install 'kl-shampoo[lightning]'")


def _import_classes() -> None:
    for namespace in filter(_is_imported, NAMESPACES):
        import_module(f"lightning_plugin.namespaces.{namespace}")


def _packages(namespace: str) -> set[str]:
    return {name.partition(".")[0] for name in NAMESPACES[namespace]}


def _is_installed(namespace: str) -> bool:
    return all(find_spec(name) is not None for name in _packages(namespace))


def _is_imported(namespace: str) -> bool:
    """Whether one of its packages is, and none is in the middle of it: one imports the other."""
    packages = _packages(namespace)
    return not packages.isdisjoint(sys.modules) and packages.isdisjoint(_WATCH.under_way) and _is_installed(namespace)


class _Watch(MetaPathFinder):
    """Has our classes imported when a Lightning's import is done; finds nothing that others do not."""

    def __init__(self) -> None:
        self.asked: set[str] = set()  # of the other finders, at the moment
        self.under_way: set[str] = set()  # packages of Lightning's that are being imported

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name in self.asked or not any(name in _packages(namespace) for namespace in NAMESPACES):
            return None
        self.asked.add(name)
        try:
            spec = find_spec(name)
        finally:
            self.asked.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(self._import, name, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    def _import(self, name: str, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        self.under_way.add(name)
        try:
            execute(module)
        finally:
            self.under_way.discard(name)
        _import_classes()


_WATCH = _Watch()


def _register_with(namespace: str, method: str) -> None:
    ours = _known[namespace]
    of_trainer, of_fabric = (import_module(f"{package}.strategies") for package in NAMESPACES[namespace])
    trainer, fabric = of_trainer.StrategyRegistry, of_fabric.STRATEGY_REGISTRY
    _register(method, trainer, _variants(ours.KLShampooStrategy, ours.KLShampooFSDP2Strategy))
    _register(method, fabric, _variants(ours.KLShampooFabricStrategy, ours.KLShampooFabricFSDP2Strategy))
    deepspeed = {end: (ours.KLShampooDeepSpeedStrategy, given) for end, given in DEEPSPEED.items()}
    _register(method, trainer, deepspeed)


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
