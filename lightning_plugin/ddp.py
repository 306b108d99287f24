"""What DDP adds under a Trainer: whole checkpoints, and a communication hook of ours."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from kl_dist import KLShampoo
from lightning_plugin.meeting import all_come
from lightning_plugin.restoring import restore, with_word_to_adamw
from lightning_plugin.unwrapping import unwrapped

UNUSED = "Expected to have finished reduction in the prior iteration"
UNUSED_ADVICE = (
    "Some parameters took no part in the loss that training_step returned. If that is intended, train with"
    " strategy='kl_shampoo_find_unused_parameters_true' or give the strategy find_unused_parameters=True. DDP:"
    " expected to have finished reduction in the prior iteration"
)


class UnderDDP:
    """Mixin of a Trainer's strategy: all of the state in one file, gradients reduced to their owners if wished.

    Args:
        reduce_to_owners: a third less to communicate; see `KLShampoo.reduce_to_owners`. What changes gradients between
            backward and step must then go through the Trainer's clipping.
    """

    def __init__(self, *, reduce_to_owners: bool = False, **others: Any) -> None:
        if reduce_to_owners and others.get("ddp_comm_hook") is not None:
            raise ValueError("reduce_to_owners is a communication hook of DDP's itself: leave out ddp_comm_hook")
        if type(others.get("ddp_comm_state")).__name__ == "PostLocalSGDState":
            raise ValueError("local SGD lets ranks have gradients of their own, KLShampoo needs one: leave it out")
        self.reduce_to_owners = reduce_to_owners
        super().__init__(**others)

    def setup_optimizers(self: Any, trainer: Any) -> None:
        super().setup_optimizers(trainer)  # type: ignore[misc]
        self._warn_of_finetuning(trainer)
        if not self.reduce_to_owners:
            return
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                "reduce_to_owners does not go with precision='16-mixed', whose GradScaler looks at all gradients on"
                " every rank: train with bf16-mixed, or without reduce_to_owners"
            )
        if len(self.optimizers) != 1:
            raise ValueError("reduce_to_owners is for one optimizer that has all of the module's parameters")
        if isinstance(unwrapped(self.optimizers[0]), KLShampoo):
            unwrapped(self.optimizers[0]).reduce_to_owners(self.model)

    def _warn_of_finetuning(self: Any, trainer: Any) -> None:
        """DDP is built by now: what its reducer does not know now it never averages."""
        finetunes = [one for one in trainer.callbacks if any(k.__name__ == "BaseFinetuning" for k in type(one).__mro__)]
        frozen = [name for name, p in self.lightning_module.named_parameters() if not p.requires_grad]
        if finetunes and frozen and self.world_size > 1 and self.is_global_zero:
            warnings.warn(
                f"{type(finetunes[0]).__name__} under DDP: {len(frozen)} parameters are frozen now ({frozen[0]!r}, ..);"
                " what of them is unfrozen later trains on the samples of one rank alone, since DDP averages only what"
                " it was built for. Train on one device, or give the backbone a learning rate of 0 for those epochs"
                " instead (Lightning's issue 20340)",
                stacklevel=2,
            )

    def optimizer_state(self: Any, optimizer: Any) -> dict[str, Any]:
        if not isinstance(unwrapped(optimizer), KLShampoo):
            return super().optimizer_state(optimizer)  # type: ignore[misc]
        if self._is_interrupted and not all_come("a checkpoint after an exception"):
            warnings.warn(
                "not every rank came to save a checkpoint after the exception: it is without the optimizer's state, and"
                " can be loaded with optimizer_checkpoint='ignore'",
                stacklevel=2,
            )
            return {}
        return with_word_to_adamw(super().optimizer_state(optimizer))  # type: ignore[misc]

    def barrier(self: Any, *arguments: Any, **options: Any) -> None:
        """After an exception, of which other ranks may know nothing, it waits for them a few seconds and no more."""
        if self._is_interrupted:
            all_come("a barrier after an exception")
        else:
            super().barrier(*arguments, **options)  # type: ignore[misc]

    @property
    def _is_interrupted(self: Any) -> bool:
        module = self.lightning_module
        return module is not None and module._trainer is not None and module._trainer.interrupted

    def load_optimizer_state_dict(self: Any, checkpoint: Mapping[str, Any]) -> None:
        for optimizer in self.optimizers:
            if isinstance(unwrapped(optimizer), KLShampoo):
                unwrapped(optimizer).follow_groups()  # callbacks may have put other groups there by now
        restore(self.optimizers, checkpoint["optimizer_states"], self.optimizer_checkpoint)

    def on_exception(self: Any, exception: BaseException) -> None:
        """Name our strategy, not Lightning's, where DDP misses gradients of parameters that were not used."""
        exception.args = tuple(
            arg.replace(UNUSED, UNUSED_ADVICE) if isinstance(arg, str) and UNUSED in arg else arg
            for arg in exception.args
        )
        super().on_exception(exception)  # type: ignore[misc]
