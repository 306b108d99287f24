"""Slurm's requeue signal, answered by all ranks together between two batches.

Lightning answers it within the signal's handler: it saves a checkpoint wherever the rank happens to be. With state that
is divided over ranks saving is a collective, and ranks that are interrupted at different places would wait for each
other for ever. So the handler only takes note; before the next batch the ranks agree whether anyone has.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
import torch.distributed as dist


class RequeuesBetweenBatches:
    """Mixin of a Trainer's strategy. Costs one all-reduce of a number per batch, in jobs that Slurm may requeue."""

    _answer: Any = None  # Lightning's handler, where it has one for the requeue signal
    _signalled: tuple[Any, Any] | None = None

    def on_train_start(self: Any) -> None:
        super().on_train_start()  # type: ignore[misc]
        self._answer = self._signalled = None
        environment = self.cluster_environment
        number = getattr(environment, "requeue_signal", None)  # Slurm's environment alone has it
        if number is None or not environment.auto_requeue or threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(number)
        if callable(handler):
            self._answer = handler
            signal.signal(number, self._take_note)  # Lightning puts back what there was when the Trainer is done

    def _take_note(self, number: int, frame: Any) -> None:
        self._signalled = (number, frame)

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]
        if self._answer is None:
            return
        signalled = torch.tensor(float(self._signalled is not None), device=self.root_device)
        dist.all_reduce(signalled, op=dist.ReduceOp.MAX)
        if signalled:
            number, frame = self._signalled or (self.cluster_environment.requeue_signal, None)
            answer, self._answer = self._answer, None  # once: a second save would be cut off by the end of the job
            answer(number, frame)
