"""What a Trainer's callbacks say of KLShampoo, without a word of which Lightning they are mixed into."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch.distributed as dist

from kl_dist.step.stats import check_interval, scalars
from kl_dist.watch import Watch
from lightning_plugin.unwrapping import kl_shampoo_in


class MonitorsKLShampoo:
    """Logs what KLShampoo says of itself, over all ranks, as often as the Trainer logs: `KLShampoo.stats`.

    Args:
        prefix: of the names, "kl_shampoo/update_rms"; a second optimizer's have "2" after it, and so on.
        prog_bar: show `update_rms` and `skipped_steps` in the progress bar.
        matrices_every: steps between two looks at each matrix, whose numbers (kl_dist.step.stats.of_matrices) go to the
            loggers alone: "kl_shampoo/matrices/NAME/condition.0". None: never.

    Raises:
        ValueError: `matrices_every` is below 1.
    """

    def __init__(self, prefix: str = "kl_shampoo", prog_bar: bool = True, matrices_every: int | None = None) -> None:
        super().__init__()
        check_interval(matrices_every)
        self.prefix, self.prog_bar, self.matrices_every = prefix, prog_bar, matrices_every
        self._due = 0  # the step from which on the matrices are to be looked at again

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._due = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not trainer._logger_connector.should_update_logs and not trainer.fast_dev_run:
            return
        due = self.matrices_every is not None and trainer.global_step >= self._due
        if due:
            self._due = trainer.global_step + (self.matrices_every or 0)
        for number, optimizer in enumerate(_optimizers(trainer), 1):
            prefix = self.prefix if number == 1 else f"{self.prefix}{number}"
            found = optimizer.stats(all_ranks=True, matrices=due)
            of_matrices = scalars({f"{prefix}/matrices": found.pop("matrices", {})})
            for name, value in scalars(found).items():
                shown = self.prog_bar and name in ("update_rms", "skipped_steps")
                pl_module.log(f"{prefix}/{name}", value, prog_bar=shown, on_step=True, on_epoch=False)
            for logger in trainer.loggers if of_matrices else ():  # Lightning would keep thousands of them itself
                logger.log_metrics(of_matrices, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


class SummarizesPartition:
    """Prints at the start of a fit who owns what: flops, bytes of state and traffic of each rank, and every parameter.

    Args:
        parameters: list them all, with the method, the matrices they are read as, and their owners.
    """

    _say: ClassVar[Callable[[str], None]]
    """The namespace's rank_zero_info."""

    def __init__(self, parameters: bool = False) -> None:
        super().__init__()
        self.parameters = parameters

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in _optimizers(trainer):
            said = f"KLShampoo over {optimizer.plan.world_size} ranks:\n{optimizer.plan}"
            type(self)._say(f"{said}\n{optimizer.routes()}" if self.parameters else said)


class HasPatience:
    """Ends a fit on all ranks when one of them has stopped without a word, naming it: see kl_dist.watch.

    A rank that is between two batches, for a checkpoint say, or validates may take ten times as long.

    Args:
        seconds: how long the others wait for it.
    """

    def __init__(self, seconds: float = 300.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._watch: Watch | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.world_size > 1 and dist.is_initialized():
            self._watch = Watch.of_the_job(self.seconds)
            self._watch.start()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._doing(f"batch {batch_idx} of epoch {trainer.current_epoch}", unhurried=trainer.global_step == 0)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._doing(f"after batch {batch_idx} of epoch {trainer.current_epoch}", unhurried=True)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._doing("the validation", unhurried=True)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def _doing(self, what: str, unhurried: bool) -> None:
        if self._watch is not None:
            self._watch.doing(what, unhurried)


def _optimizers(trainer: Any) -> list[Any]:
    """Those of ours; without any, a callback has nothing to say, so that a strategy can be changed by itself."""
    found = [kl_shampoo_in(optimizer) for optimizer in trainer.optimizers]
    ours = [optimizer for optimizer in found if optimizer is not None]
    if not ours and trainer.is_global_zero:
        warnings.warn("nothing here is trained with KLShampoo: give the Trainer strategy='kl_shampoo'", stacklevel=2)
    return ours
