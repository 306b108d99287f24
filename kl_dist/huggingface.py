"""Hugging Face's Trainer and Accelerate, without DeepSpeed: KLShampoo's state is whole in what rank 0 writes.

    Trainer(.., optimizer_cls_and_kwargs=(KLShampooFactory, {"lr": 1e-2}), callbacks=[ConsolidateState()])

    log_stats(trainer)  # its numbers beside the loss

    consolidate_on_save(accelerator)  # before accelerator.save_state

Both save on some ranks what is divided over all, so it is gathered there first. Under FSDP2, where parameters are
sharded, they save by torch.distributed.checkpoint, and nothing needs to be gathered. Needs transformers and accelerate
(`pip install '.[huggingface]'`); see docs/huggingface.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import SaveStrategy

from kl_dist.optimizer import KLShampoo
from kl_dist.step.stats import check_interval, scalars

if TYPE_CHECKING:
    from transformers import Trainer

REPORTERS: tuple[type[TrainerCallback], ...] = tuple(INTEGRATION_TO_CALLBACK.values())
"""The callbacks that `report_to` names."""


class KLShampooFactory:
    """What the Trainer calls with its model, where it would call a class with groups of nameless parameters."""

    def __call__(self, model: nn.Module, **options: Any) -> KLShampoo:
        return KLShampoo(model, **options)


class ConsolidateState(TrainerCallback):
    """Gathers KLShampoo's state on the ranks that write before the Trainer saves; any other optimizer is left alone.

    It sees what callbacks before it have decided; of a save that a later one asks for, a Trainer with `Consolidating`
    knows.

    Raises:
        ValueError: `enable_jit_checkpoint` on several ranks, when training begins.
    """

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **given: Any) -> None:
        _refuse_saves_apart(args)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **given: Any) -> None:
        if control.should_save:
            _consolidate(given.get("optimizer"), args)

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **given: Any) -> None:
        self.on_step_end(args, state, control, **given)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **given: Any) -> None:
        self.on_step_end(args, state, control, **given)

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **given: Any) -> None:
        """Under save_strategy "best" whether to save is decided after this, and with no word to callbacks."""
        if control.should_save or args.save_strategy == SaveStrategy.BEST:
            _consolidate(given.get("optimizer"), args)


class Consolidating:
    """Mixin of a Trainer, of any subclass: `class MyTrainer(Consolidating, Trainer)` gathers before every save.

    Raises:
        ValueError: as `ConsolidateState`.
    """

    def train(self, *arguments: Any, **named: Any) -> Any:
        trainer: Any = self
        _refuse_saves_apart(trainer.args)
        return super().train(*arguments, **named)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        trainer: Any = self
        consolidate(trainer.optimizer, trainer.args.should_save)
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]


class KLShampooCallback(TrainerCallback):
    """KLShampoo's numbers of all ranks beside the loss, wherever that is reported: see `log_stats`.

    Args:
        handler: the Trainer's `callback_handler`.
        matrices_every: steps between two looks at each matrix.
    """

    def __init__(self, handler: CallbackHandler, matrices_every: int | None = None) -> None:
        self._handler, self._every = handler, matrices_every
        self._due = 0  # the step from which on the matrices are to be looked at again

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **given: Any) -> None:
        logs, optimizer = given.pop("logs"), _watched(given["optimizer"])
        if optimizer is None or "loss" not in logs:  # what else there is to log, not all ranks come to
            return
        due = self._every is not None and state.global_step >= self._due
        found = optimizer.stats(all_ranks=True, matrices=due)
        of_matrices = scalars({"kl_shampoo/matrices": found.pop("matrices", {})})
        for line in (logs, state.log_history[-1]):  # the Trainer has copied the one into the other
            line.update(scalars({"kl_shampoo": found}))
        if due:
            self._due = state.global_step + (self._every or 0)
            for callback in self._handler.callbacks:
                if isinstance(callback, REPORTERS):  # not what prints, nor trainer_state.json: they may be thousands
                    callback.on_log(args, state, control, logs=of_matrices, **given)


def log_stats(trainer: Trainer, matrices_every: int | None = None) -> KLShampooCallback:
    """Have a Trainer put KLShampoo's numbers of all ranks beside the loss of each line that it logs.

    "kl_shampoo/update_rms" and the like, as `KLShampoo.stats(all_ranks=True)` has them, in `state.log_history`,
    TensorBoard, W&B or what else `report_to` names, with DeepSpeed too. Any other optimizer is left alone.

    Args:
        matrices_every: steps between two looks at each matrix, whose numbers (kl_dist.step.stats.of_matrices) go to
            what `report_to` names alone: "kl_shampoo/matrices/NAME/condition.0". None: never.

    Returns:
        The callback, which comes first, for the reports' are before those that a Trainer is given;
        `trainer.remove_callback` takes it away.

    Raises:
        ValueError: `matrices_every` is below 1.
    """
    check_interval(matrices_every)
    callback = KLShampooCallback(trainer.callback_handler, matrices_every)
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


def _refuse_saves_apart(args: TrainingArguments) -> None:
    if args.world_size > 1 and getattr(args, "enable_jit_checkpoint", False):
        raise ValueError(
            "enable_jit_checkpoint has each rank save when its own timer says so, and KLShampoo's state is gathered"
            " from all of them together: leave it off, and save every few steps (save_steps)"
        )


def _consolidate(optimizer: Any, args: TrainingArguments) -> None:
    if not args.save_only_model:
        consolidate(optimizer, args.should_save)


def consolidate_on_save(accelerator: Accelerator) -> Any:
    """Have every `accelerator.save_state` write the whole state of each KLShampoo that the accelerator has prepared.

    Returns:
        A handle; its `remove()` ends it.

    Raises:
        ValueError: accelerate takes this process for the only one of several.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if accelerator.num_processes != ranks:
        raise ValueError(
            f"torch has {ranks} ranks here and Accelerate says {accelerator.num_processes}, so that each trains a model"
            " of its own: on a machine without GPUs make Accelerator(cpu=True)"
        )

    def before(models: Any, weights: Any, folder: str) -> None:
        each_node = accelerator.project_configuration.save_on_each_node
        here = accelerator.is_local_main_process if each_node else accelerator.is_main_process
        for optimizer in accelerator._optimizers:
            consolidate(optimizer, here)

    return accelerator.register_save_state_pre_hook(before)


def consolidate(optimizer: Any, here: bool) -> None:
    """Have the next state_dict() be all of the state on every rank that says `here`; a collective.

    What is gathered already stays: a step that logs, evaluates and saves asks for it each time.

    Args:
        optimizer: KLShampoo as it is or as accelerate has wrapped it; others, and one of sharded parameters, are left.
    """
    optimizer = _unwrapped(optimizer)
    if isinstance(optimizer, KLShampoo) and not optimizer.is_sharded:
        for rank, writes in enumerate(optimizer.parts.ranks.gather_objects(here and not optimizer.is_consolidated)):
            if writes:
                optimizer.consolidate_state_dict(to=rank)


def _unwrapped(optimizer: Any) -> Any:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _watched(optimizer: Any) -> Any:
    """What has KLShampoo's stats inside the wrappers of accelerate and DeepSpeed, else None."""
    while optimizer is not None and not (hasattr(optimizer, "stats") and hasattr(optimizer, "routes")):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
