"""What makes a Trainer's strategy train with KLShampoo: mixins, without a word of which Lightning they are mixed into.

[Note: two Lightnings] `lightning.pytorch` and `pytorch_lightning` are the same code twice, and their classes do not
mix. So what is ours stands in mixins that import neither; `lightning_plugin.namespaces` mixes them into each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from kl_dist import KLShampoo, clip_grad_norm_, clip_grad_value_
from lightning_plugin.conversion import convert
from lightning_plugin.restoring import restore, with_word_to_adamw
from lightning_plugin.unwrapping import unwrapped


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
        what = "KLShampoo" if converted is optimizer else f"KLShampoo in the place of {type(optimizer).__name__}"
        type(self)._say(f"{what}, where each parameter goes:\n{converted.routes()}")
        return converted

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def lightning_restore_optimizer(self: Any) -> bool:
        return self.optimizer_checkpoint != "ignore" and super().lightning_restore_optimizer  # type: ignore[misc]

    def optimizer_state(self: Any, optimizer: Any) -> dict[str, Any]:
        return with_word_to_adamw(super().optimizer_state(optimizer))  # type: ignore[misc]

    def load_optimizer_state_dict(self: Any, checkpoint: Mapping[str, Any]) -> None:
        restore(self.optimizers, checkpoint["optimizer_states"], self.optimizer_checkpoint)


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


class ReducesToOwners:
    """Under DDP: gradients may be reduced to their owners instead of to all ranks.

    Args:
        reduce_to_owners: a third less to communicate; see `KLShampoo.reduce_to_owners`. What changes gradients between
            backward and step must then go through the Trainer's clipping.
    """

    def __init__(self, *, reduce_to_owners: bool = False, **others: Any) -> None:
        if reduce_to_owners and others.get("ddp_comm_hook") is not None:
            raise ValueError("reduce_to_owners is a communication hook of DDP's itself: leave out ddp_comm_hook")
        self.reduce_to_owners = reduce_to_owners
        super().__init__(**others)

    def setup_optimizers(self: Any, trainer: Any) -> None:
        super().setup_optimizers(trainer)  # type: ignore[misc]
        if not self.reduce_to_owners:
            return
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                "reduce_to_owners does not go with precision='16-mixed', whose GradScaler looks at all gradients on"
                " every rank: train with bf16-mixed, or without reduce_to_owners"
            )
        for optimizer in self.optimizers:
            if isinstance(unwrapped(optimizer), KLShampoo):
                unwrapped(optimizer).reduce_to_owners(self.model)

    def on_exception(self: Any, exception: BaseException) -> None:
        """Name our strategy, not Lightning's, where DDP misses gradients of parameters that were not used."""
        exception.args = tuple(
            arg.replace(UNUSED, UNUSED_ADVICE) if isinstance(arg, str) and UNUSED in arg else arg
            for arg in exception.args
        )
        super().on_exception(exception)  # type: ignore[misc]


UNUSED = "Expected to have finished reduction in the prior iteration"
UNUSED_ADVICE = (
    "Some parameters took no part in the loss that training_step returned. If that is intended, train with"
    " strategy='kl_shampoo_find_unused_parameters_true' or give the strategy find_unused_parameters=True. DDP:"
    " expected to have finished reduction in the prior iteration"
)
