"""What makes a Trainer's strategy train with KLShampoo: mixins, without a word of which Lightning they are mixed into.

[Note: two Lightnings] `lightning.pytorch` and `pytorch_lightning` are the same code twice, and their classes do not
mix. So what is ours stands in mixins that import neither; `lightning_plugin.namespaces` mixes them into each.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from typing import Any, ClassVar

from kl_dist import KLShampoo, clip_grad_norm_, clip_grad_value_
from lightning_plugin.conversion import announcement, convert
from lightning_plugin.unwrapping import unwrapped

SECONDS_OF_GRACE = 5.0


class TrainsWithKLShampoo:
    """Converts what `configure_optimizers` returns, clips and restores as KLShampoo needs it."""

    _say: ClassVar[Callable[[str], None]]
    """The namespace's rank_zero_info."""

    optimizer_options: dict[str, Any]
    optimizer_checkpoint: str

    def setup_optimizers(self: Any, trainer: Any) -> None:
        super().setup_optimizers(trainer)  # type: ignore[misc]
        schedulers = [config.scheduler for config in self.lr_scheduler_configs]
        self.optimizers = [self._converted(unwrapped(optimizer), schedulers) for optimizer in self.optimizers]
        _take_over_clipping(self.precision_plugin)

    def _converted(self: Any, optimizer: Any, schedulers: list[Any]) -> Any:
        if type(optimizer).__name__ == "_MockOptimizer":  # Lightning's, where configure_optimizers returned None
            return optimizer
        converted = convert(optimizer, self.lightning_module, self.optimizer_options, schedulers)
        type(self)._say(announcement(optimizer, converted))
        return converted

    def on_exception(self: Any, exception: BaseException) -> None:
        super().on_exception(exception)  # type: ignore[misc]
        _end_children(self.launcher)

    @property
    def lightning_restore_optimizer(self: Any) -> bool:
        return self.optimizer_checkpoint != "ignore" and super().lightning_restore_optimizer  # type: ignore[misc]


def _end_children(launcher: Any) -> None:
    """The processes that the script itself has started end with it: first by themselves, so that one of them can tell
    what it died of, and else by force, for they may be waiting in a collective."""
    children = [child for child in getattr(launcher, "procs", ()) if isinstance(child, subprocess.Popen)]
    deadline = time.monotonic() + SECONDS_OF_GRACE
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
        if child.poll() is None:
            child.kill()


def _take_over_clipping(plugin: Any) -> None:
    """Have a precision plugin clip KLShampoo's gradients with `kl_dist`.

    The plugin is the strategy's own, and clipping is its business alone; torch's would be wrong where gradients are
    reduced to their owners, or where some parameters are sharded and others are not.
    """

    def by_norm(optimizer: Any, clip_val: float) -> None:
        inner = unwrapped(optimizer)
        if isinstance(inner, KLShampoo):
            clip_grad_norm_(inner, clip_val)
        else:
            type(plugin).clip_grad_by_norm(plugin, optimizer, clip_val)

    def by_value(optimizer: Any, clip_val: float) -> None:
        inner = unwrapped(optimizer)
        if isinstance(inner, KLShampoo):
            clip_grad_value_(inner, clip_val)
        else:
            type(plugin).clip_grad_by_value(plugin, optimizer, clip_val)

    plugin.clip_grad_by_norm, plugin.clip_grad_by_value = by_norm, by_value
