"""Whether all ranks come to the same place, found out without a collective that would wait for those who do not."""

from __future__ import annotations

import itertools
import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from kl_dist.ranks import start_of_torchrun

SECONDS = 5.0
_numbers = itertools.count()  # of meetings: ranks that hold the same ones are at the same


def all_come(what: str, seconds: float = SECONDS) -> bool:
    """Wait a few seconds for every rank to call this; False on those that came when one had left again."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    store = dist.PrefixStore(f"{what} {start_of_torchrun()}.{next(_numbers)}", _get_default_store())
    store.add("came", 1)
    deadline = time.monotonic() + seconds
    while store.add("came", 0) < dist.get_world_size():
        if time.monotonic() > deadline or store.add("left", 0):
            store.add("left", 1)
            return False
        time.sleep(0.05)
    return store.add("left", 0) == 0
