"""What makes a Trainer's strategy train with KLShampoo: mixins, without a word of which Lightning they are mixed into.

[Note: two Lightnings] `lightning.pytorch` and `pytorch_lightning` are the same code twice, and their classes do not
mix. So what is ours stands in mixins that import neither; `lightning_plugin.namespaces` mixes them into each.
"""

from __future__ import annotations

import atexit
import contextlib
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from kl_dist import KLShampoo, clip_grad_norm_, clip_grad_value_
from lightning_plugin.conversion import announcement, convert
from lightning_plugin.schedulers import hand_back
from lightning_plugin.unwrapping import is_missing, unwrapped

SECONDS_OF_GRACE = 5.0


class TrainsWithKLShampoo:
    """Converts what `configure_optimizers` returns, clips and restores as KLShampoo needs it."""

    _say: ClassVar[Callable[[str], None]]
    """The namespace's rank_zero_info."""

    optimizer_options: dict[str, Any]
    optimizer_checkpoint: str
    _conversions: Sequence[tuple[Any, Any]] = ()

    def setup_optimizers(self: Any, trainer: Any) -> None:
        super().setup_optimizers(trainer)  # type: ignore[misc]
        self._check_schedules(self.lr_scheduler_configs)
        schedulers = [config.scheduler for config in self.lr_scheduler_configs]
        self.optimizers = [self._converted(unwrapped(optimizer), schedulers) for optimizer in self.optimizers]
        _take_over_clipping(self.precision_plugin)

    def _check_schedules(self, schedules: Sequence[Any]) -> None:
        if schedules and self.optimizer_checkpoint == "ignore" and "lr" in self.optimizer_options:
            raise ValueError(
                "with optimizer_checkpoint='ignore' schedules go on from the checkpoint, with its learning rates: set"
                " lr in configure_optimizers rather than in the strategy"
            )

    def _converted(self: Any, optimizer: Any, schedulers: list[Any]) -> Any:
        if is_missing(optimizer):
            return optimizer
        converted = convert(optimizer, self.lightning_module, self.optimizer_options, schedulers)
        type(self)._say(announcement(optimizer, converted, self.lightning_module, self.optimizer_options))
        self._conversions = [*self._conversions, (optimizer, converted)]
        return converted

    def teardown(self: Any) -> None:
        """A module that keeps its optimizer and schedule has them as it made them, and may be fitted again."""
        schedulers = [config.scheduler for config in self.lr_scheduler_configs]
        for old, new in self._conversions:
            hand_back(schedulers, new, old)
        self._conversions = []
        super().teardown()  # type: ignore[misc]

    def on_exception(self: Any, exception: BaseException) -> None:
        super().on_exception(exception)  # type: ignore[misc]
        if _children(self.launcher):
            atexit.register(_end_children, self.launcher)

    def on_train_start(self: Any) -> None:
        """Schedules go on where they were when new optimizer state begins: so must the learning rates."""
        super().on_train_start()  # type: ignore[misc]
        if self.optimizer_checkpoint == "ignore" and self.lightning_module.trainer.ckpt_path is not None:
            for config in self.lr_scheduler_configs:
                rates = getattr(config.scheduler, "_last_lr", ())
                for group, rate in zip(config.scheduler.optimizer.param_groups, rates, strict=False):
                    group["lr"] = rate

    def load_checkpoint(self: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        loaded = super().load_checkpoint(*arguments, **options)  # type: ignore[misc]
        if self.optimizer_checkpoint == "ignore":
            loaded.setdefault("lr_schedulers", [])  # a checkpoint of weights alone has none, which Lightning refuses
        return loaded

    @property
    def lightning_restore_optimizer(self: Any) -> bool:
        return self.optimizer_checkpoint != "ignore" and super().lightning_restore_optimizer  # type: ignore[misc]


def _children(launcher: Any) -> list[subprocess.Popen]:
    """The processes that the script itself has started."""
    return [child for child in getattr(launcher, "procs", ()) if isinstance(child, subprocess.Popen)]


def _end_children(launcher: Any) -> None:
    """End them with the script: first by themselves, so that one can tell what it died of, and else by force, for they
    may be waiting in a collective. Not at the exception, which a script may catch and go on."""
    deadline = time.monotonic() + SECONDS_OF_GRACE
    for child in _children(launcher):
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
        if child.poll() is None:
            child.kill()


def _take_over_clipping(plugin: Any) -> None:
    """Have a precision plugin clip KLShampoo's gradients with `kl_dist`.

    The plugin is the strategy's own, and clipping is its business alone; torch's would be wrong where gradients are
    reduced to their owners, or where some parameters are sharded and others are not.
    """
    kind = type(plugin)
    plugin.clip_grad_by_norm = partial(_clip, clip_grad_norm_, partial(kind.clip_grad_by_norm, plugin))
    plugin.clip_grad_by_value = partial(_clip, clip_grad_value_, partial(kind.clip_grad_by_value, plugin))


def _clip(ours: Callable[..., Any], theirs: Callable[..., Any], optimizer: Any, clip_val: float) -> None:
    inner = unwrapped(optimizer)
    if isinstance(inner, KLShampoo):
        ours(inner, clip_val)
    else:
        theirs(optimizer, clip_val)
