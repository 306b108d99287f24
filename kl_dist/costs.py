"""What a unit costs: a fixed table of flops and bytes, the same on every rank and machine, never timed.

For a block of N elements, each full side of size d counts (in flops)

    project G, gram, project back      6 N d     (Shampoo: gram and inverse root, 4 N d)
    refresh, every T steps             QR 8/3 d^3, P O and Q O 4 d^3, momentum 2 N d
                                       (Shampoo: eigh 9 d^3, root 2 d^3)

QR and eigh run slower than products do, hence the factors below. Memory traffic counts FLOPS_PER_BYTE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from kl_dist.matrices import Block
from kl_dist.methods import Side, adamw, rule
from kl_dist.methods.state import state_dtype

FLOPS_PER_BYTE = 16  # what a processor computes in float32 while it moves one byte
WORKING_COPIES = {"kl_shampoo": 6, "kl_soap": 6, "soap": 7, "shampoo": 7, "adamw": 4}
"""Tensors as large as the gradients of a stack that an update holds at its peak, those gradients included."""
REFRESH_COPIES = 4.5  # as large as the Kronecker factors of one side of a stack, in a refresh
QR_SLOWNESS = 2  # of a flop in QR against one in a matrix product
EIGH_SLOWNESS = 4


def matrix_cost(method: str, recipe: str, block: Block, dtype: torch.dtype, every: int) -> float:
    """Flops per step of one block, refreshes divided by `every`, bytes counted as flops."""
    numel = math.prod(block.shape)
    products = refresh = 0.0
    for d, side in zip(block.shape, block.sides, strict=True):
        if side != "full":
            continue
        if method == "shampoo":
            products += 4 * numel * d
            refresh += (9 * EIGH_SLOWNESS + 2) * d**3
        else:
            products += 6 * numel * d
            refresh += (8 / 3 * QR_SLOWNESS + 4) * d**3 + 2 * numel * d
    moved = 2 * state_bytes(method, recipe, block.shape, block.sides, dtype) + 2 * numel * dtype.itemsize
    return products + refresh / every + FLOPS_PER_BYTE * moved


def working_bytes(method: str, blocks: Sequence[Block], dtype: torch.dtype) -> int:
    """Bytes that a step of equal blocks (or of slices) in one stack allocates at its peak and gives back."""
    size = state_dtype(dtype).itemsize
    update = WORKING_COPIES[method] * sum(math.prod(block.shape) for block in blocks)
    full = [d for d, side in zip(blocks[0].shape, blocks[0].sides, strict=True) if side == "full"]
    refresh = REFRESH_COPIES * len(blocks) * max((d * d for d in full), default=0)
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
    """Bytes of a slice's state, as AdamW allocates it."""
    state = adamw.allocate([numel], torch.empty((), dtype=state_dtype(dtype), device="meta"))
    return sum(x.nbytes for x in state.tensors().values())
