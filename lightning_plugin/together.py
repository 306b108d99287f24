"""A sharded module is called by all ranks, or by none: its forward gathers parameters from all of them.

Within a Trainer's steps they all call it. Elsewhere, in a callback that is for rank 0 alone, one rank would wait for
the others until the process group's time-out, and not even end when it is asked to: so there the ranks meet first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_plugin.meeting import all_come

SECONDS = 60.0  # that one rank may be later than another


class CalledTogether:
    """Watches the sharded parts of a module; costs a few milliseconds for each call outside of a step."""

    def __init__(self, module: nn.Module) -> None:
        self._expected = 0  # > 0: a step, or within a call for which the ranks have met
        self._handles: list[Any] = []
        for part in module.modules():
            if isinstance(part, FSDPModule) and isinstance(part, nn.Module):
                self._handles.append(part.register_forward_pre_hook(self._enter, prepend=True))
                self._handles.append(part.register_forward_hook(self._leave, always_call=True))

    @contextmanager
    def step(self) -> Iterator[None]:
        """All ranks are in the same step, and call what they call together."""
        self._expected += 1
        try:
            yield
        finally:
            self._expected -= 1

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()

    @torch._disable_dynamo
    def _enter(self, part: nn.Module, given: Any) -> None:
        self._expected += 1
        if self._expected == 1 and not all_come(f"a call of {type(part).__name__} outside of a step", SECONDS):
            raise RuntimeError(
                f"{type(part).__name__} is sharded over the ranks, and rank {dist.get_rank()} called it outside of a"
                f" step, where not all ranks did within {SECONDS:.0f} s: what is for rank 0 alone (rank_zero_only,"
                " is_global_zero) cannot call it. Have all ranks call it, and the first alone write what comes of it"
            )

    @torch._disable_dynamo
    def _leave(self, part: nn.Module, given: Any, output: Any) -> None:
        self._expected -= 1
