"""What a unit costs: a fixed table of flops and bytes, the same on every rank and machine, never timed.

A method says its own flops (`kl_dist.methods.rule`); to these comes memory traffic, state and gradient read and
written, which counts FLOPS_PER_BYTE.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from kl_dist.methods import ELEMENTWISE, Side, adamw, polar, rule
from kl_dist.methods.state import state_dtype
from kl_dist.planning.matrices import Block

FLOPS_PER_BYTE = 16  # what a processor computes in float32 while it moves one byte
REFRESH_COPIES = 4.5  # as large as the Kronecker factors of one side of a stack, that a refresh holds at its peak


def matrix_cost(method: str, recipe: str, block: Block, dtype: torch.dtype, every: int, polar_steps: int) -> float:
    """Flops per step of one block, refreshes divided by `every`, bytes counted as flops."""
    flops = rule(method, recipe).flops(block.shape, block.sides)
    moved = 2 * state_bytes(method, recipe, block.shape, block.sides, dtype) + 2 * block.numel * dtype.itemsize
    products = flops.update + polar.flops(block.shape, polar_steps) + flops.refresh / every
    return products + FLOPS_PER_BYTE * moved


def working_bytes(method: str, recipe: str, blocks: Sequence[Block], dtype: torch.dtype) -> int:
    """Bytes that a step of equal blocks (or of slices) in one stack allocates at its peak and gives back."""
    size = state_dtype(dtype).itemsize
    if method == ELEMENTWISE:
        copies, refreshes = adamw.WORKING_COPIES, False
    else:
        copies, refreshes = rule(method, recipe).working_copies, rule(method, recipe).refresh is not None
    update = copies * sum(block.numel for block in blocks)
    full = [d for d, side in zip(blocks[0].shape, blocks[0].sides, strict=True) if side == "full"]
    refresh = refreshes * REFRESH_COPIES * len(blocks) * max((d * d for d in full), default=0)
    return round(size * max(update, refresh))


def adamw_cost(numel: int, dtype: torch.dtype) -> float:
    """Flops per step of a slice; all of it memory traffic."""
    return FLOPS_PER_BYTE * (2 * adamw_state_bytes(numel, dtype) + 2 * numel * dtype.itemsize)


@lru_cache(maxsize=4096)
def state_bytes(method: str, recipe: str, shape: tuple[int, ...], sides: tuple[Side, ...], dtype: torch.dtype) -> int:
    """Bytes of a block's state, as the method allocates it."""
    like = torch.empty((), dtype=state_dtype(dtype), device="meta")
    state = rule(method, recipe).allocate(shape, sides, 1, like)
    return sum(x.nbytes for x in state.tensors().values())


def adamw_state_bytes(numel: int, dtype: torch.dtype) -> int:
    """Bytes of a slice's state, as AdamW allocates it: two moments, and a count of steps."""
    return 2 * numel * state_dtype(dtype).itemsize + torch.int64.itemsize
