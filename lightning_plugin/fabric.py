"""What makes a Fabric strategy train with KLShampoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from kl_dist import KLShampoo, clip_grad_norm_, clip_grad_value_
from lightning_plugin.conversion import announcement, convert
from lightning_plugin.sharding import shard
from lightning_plugin.unwrapping import unwrapped


class FabricTrainsWithKLShampoo:
    """Converts the optimizers that are set up, and clips as KLShampoo needs it."""

    _say: ClassVar[Callable[[str], None]]
    """The namespace's rank_zero_info."""

    optimizer_options: dict[str, Any]
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
        module = next(
            (one for one in reversed(self._modules) if held & {id(p) for p in one.parameters()}),
            None,
        )
        if module is None:
            raise ValueError("set up the model before its optimizer: no module that was set up has these parameters")
        converted = convert(optimizer, module, self.optimizer_options, () if scheduler is None else (scheduler,))
        type(self)._say(announcement(optimizer, converted))
        return converted

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
    shard(module, mesh["data_parallel"])
    return module
