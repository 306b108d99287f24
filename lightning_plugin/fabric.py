"""What makes a Fabric strategy train with KLShampoo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from kl_dist import KLShampoo, clip_grad_norm_, clip_grad_value_
from kl_dist.checkpoint.reading import check
from lightning_plugin.conversion import announcement, convert
from lightning_plugin.restoring import REMEDY, restore, with_word_to_adamw
from lightning_plugin.sharding import shard
from lightning_plugin.unwrapping import unwrapped


class FabricTrainsWithKLShampoo:
    """Converts the optimizers that are set up, and clips as KLShampoo needs it."""

    _say: ClassVar[Callable[[str], None]]
    """The namespace's rank_zero_info."""

    optimizer_options: dict[str, Any]
    optimizer_checkpoint: str
    _modules: tuple[nn.Module, ...] = ()  # those set up so far

    def setup_module(self: Any, module: nn.Module) -> Any:
        self._modules = (*self._modules, module)
        return super().setup_module(module)  # type: ignore[misc]

    def setup_module_and_optimizers(
        self: Any, module: nn.Module, optimizers: list[Any], scheduler: Any = None
    ) -> tuple[nn.Module, list[Any], Any]:
        wrapped = self.setup_module(module)
        return wrapped, [self._converted(optimizer, scheduler) for optimizer in optimizers], scheduler

    def setup_optimizer(self: Any, optimizer: Any) -> KLShampoo:
        if hasattr(optimizer.step, "_wrapped_by_lr_sched") and not isinstance(optimizer, KLShampoo):
            raise ValueError(
                f"a learning-rate scheduler drives this {type(optimizer).__name__} already, and would not follow when"
                " it is converted to KLShampoo: make the scheduler after setup_optimizers, or set up model, optimizer"
                " and scheduler together"
            )
        return self._converted(optimizer, None)

    def _converted(self: Any, optimizer: Any, scheduler: Any) -> KLShampoo:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        modules = [one for one in self._modules if held & {id(p) for p in one.parameters()}]
        if not modules:
            raise ValueError(
                "no module that was set up has these parameters: call setup_module first, then make the optimizer of"
                " the parameters it has then"
            )
        module = modules[0] if len(modules) == 1 else nn.ModuleList(modules)
        converted = convert(optimizer, module, self.optimizer_options, () if scheduler is None else (scheduler,))
        type(self)._say(announcement(optimizer, converted, module, self.optimizer_options))
        return converted

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def get_optimizer_state(self: Any, optimizer: Any) -> dict[str, Any]:
        state = super().get_optimizer_state(optimizer)  # type: ignore[misc]
        return with_word_to_adamw(state) if isinstance(optimizer, KLShampoo) else state

    def load_checkpoint(self: Any, path: Any, state: Any = None, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Optimizers of ours are loaded as `optimizer_checkpoint` says, where the checkpoint is one file."""
        if Path(path).is_dir():
            check(Path(path))  # torch would run what a stranger has put there
        ours = {key: x for key, x in state.items() if isinstance(x, KLShampoo)} if isinstance(state, dict) else {}
        if not ours or (Path(path).is_dir() and self.optimizer_checkpoint == "strict"):
            return super().load_checkpoint(path, state, *arguments, **options)  # type: ignore[misc]
        others = {key: x for key, x in state.items() if key not in ours}
        rest = super().load_checkpoint(path, others, *arguments, **options)  # type: ignore[misc]
        state.update(others)
        for key, optimizer in ours.items():
            if self.optimizer_checkpoint == "ignore":
                rest.pop(key, None)
            elif key in rest:
                restore([optimizer], [rest.pop(key)], self.optimizer_checkpoint)
            else:
                raise KeyError(f"the checkpoint has no {key!r}. {REMEDY}")
        return rest

    # -- clipping -----------------------------------------------------------------------------------------------------

    def clip_gradients_norm(
        self: Any,
        module: Any,
        optimizer: Any,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Any:
        inner = unwrapped(optimizer)
        if not isinstance(inner, KLShampoo) or norm_type != 2:
            return super().clip_gradients_norm(  # type: ignore[misc]
                module, optimizer, max_norm, norm_type, error_if_nonfinite
            )
        self.precision.unscale_gradients(optimizer)
        return clip_grad_norm_(inner, max_norm, error_if_nonfinite=error_if_nonfinite)

    def clip_gradients_value(self: Any, module: Any, optimizer: Any, clip_val: float) -> None:
        inner = unwrapped(optimizer)
        if not isinstance(inner, KLShampoo):
            super().clip_gradients_value(module, optimizer, clip_val)  # type: ignore[misc]
            return
        self.precision.unscale_gradients(optimizer)
        clip_grad_value_(inner, clip_val)


class FabricShards:
    """Mixin of a Fabric strategy: shards modules itself, where it is given no `parallelize_fn`."""

    def __init__(self, *, parallelize_fn: Callable[[Any, DeviceMesh], nn.Module] | None = None, **others: Any) -> None:
        super().__init__(parallelize_fn=parallelize_fn or _sharded, **others)  # type: ignore[call-arg]


def _sharded(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    shard(module, mesh["data_parallel"], _device_of(mesh))
    return module


def _device_of(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())
