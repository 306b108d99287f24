"""A job that `torchrun --max-restarts` has begun anew: its ranks find each other, and not those of before.

torchrun keeps one store for all starts, and torch's ranks put their addresses there under the same keys each time: one
that reads a dead rank's connects to nobody, and the start fails or hangs. So from the second start on the process group
is made on a part of the store that is that start's own, before Lightning would make it on all of it.
"""

from __future__ import annotations

import atexit
from typing import Any

import torch.distributed as dist

from kl_dist.ranks import start_of_torchrun


class BeginsAnew:
    """Mixin of a strategy. Where several torchruns count their starts, one a machine, it can do nothing: see docs."""

    def setup_environment(self: Any) -> None:
        if (number := start_of_torchrun()) and not dist.is_initialized():
            store, rank, size = next(dist.rendezvous("env://", timeout=self._timeout))
            backend, device = self._get_process_group_backend(), self.root_device
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(f"start-{number}", store),
                rank=rank,
                world_size=size,
                timeout=self._timeout,
                device_id=None if device.type == "cpu" else device,
            )
            if backend == "nccl":
                atexit.register(_leave)  # as Lightning does for the groups that it makes
        super().setup_environment()  # type: ignore[misc]


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
