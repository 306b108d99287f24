"""What a unit costs: a fixed table of flops and bytes, the same on every rank and machine, never timed.

A method says its own flops (`kl_dist.methods.rule`); to these comes memory traffic, state and gradient read and
written, which counts FLOPS_PER_BYTE.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from kl_dist.methods import Side, adamw, polar, rule
from kl_dist.methods.kronecker import Polar
from kl_dist.methods.state import state_dtype
from kl_dist.planning.matrices import Block

FLOPS_PER_BYTE = 16  # what a processor computes in float32 while it moves one byte
REFRESH_COPIES = 4.25  # as large as the Kronecker factors of one side of a stack, that a refresh holds at its peak


class Work(NamedTuple):
    """What one block, or a slice, asks for."""

    products: float  # flops in every step
    refresh: float  # flops in every T-th
    moved: float  # bytes of memory read and written in every step

    def cost(self, every: int) -> float:
        """Flops per step, refreshes divided by `every`, bytes counted as flops."""
        return self.products + self.refresh / every + FLOPS_PER_BYTE * self.moved


def matrix_work(method: str, recipe: str, block: Block, dtype: torch.dtype, polar_option: Polar) -> Work:
    """Of one block."""
    return _work(method, recipe, block.shape, block.sides, dtype, polar_option)


@lru_cache(maxsize=4096)
def _work(
    method: str, recipe: str, shape: tuple[int, ...], sides: tuple[Side, ...], dtype: torch.dtype, polar_option: Polar
) -> Work:
    flops = rule(method, recipe).flops(shape, sides)
    moved = 2 * state_bytes(method, recipe, shape, sides, dtype) + 2 * math.prod(shape) * dtype.itemsize
    return Work(flops.update + polar.flops(shape, polar.lasting_steps(polar_option)), flops.refresh, moved)


def matrix_cost(method: str, recipe: str, block: Block, dtype: torch.dtype, every: int, polar_option: Polar) -> float:
    """Flops per step of one block, refreshes divided by `every`, bytes counted as flops."""
    return matrix_work(method, recipe, block, dtype, polar_option).cost(every)


def update_bytes(method: str, recipe: str, block: Block, dtype: torch.dtype) -> int:
    """Bytes that an update of one block holds at its peak, but for `polar_bytes`; those of a stack add up."""
    copies = rule(method, recipe).working_copies
    copies += 2 * (len(block.shape) > 2)  # of a side in the middle, moved to the end and multiplied there
    return copies * block.numel * state_dtype(dtype).itemsize


def polar_bytes(method: str, recipe: str, block: Block, dtype: torch.dtype, polar_option: Polar) -> tuple[int, ...]:
    """Bytes of each place that orthogonalising one block's update takes beside these; in a stack others have them."""
    if not (polar_option and rule(method, recipe).polar and len(block.shape) == 2):
        return ()
    kept = (block.numel,) if polar_option == polar.START else ()
    return tuple(numbers * state_dtype(dtype).itemsize for numbers in (*kept, min(block.shape) ** 2))


def adamw_update_bytes(numel: int, dtype: torch.dtype) -> int:
    """Bytes that an update of a slice holds at its peak."""
    return adamw.WORKING_COPIES * numel * state_dtype(dtype).itemsize


def refresh_bytes(method: str, recipe: str, block: Block, dtype: torch.dtype, count: int) -> int:
    """Bytes that the refresh of a stack of `count` equal blocks holds at its peak, but for `wide_bytes`."""
    if rule(method, recipe).refresh is None:
        return 0
    full = [d for d, side in zip(block.shape, block.sides, strict=True) if side == "full"]
    together = min(refreshed_at_once(count), wide_at_once(method, recipe, block, dtype) or count)
    return round(REFRESH_COPIES * together * max((d * d for d in full), default=0) * state_dtype(dtype).itemsize)


def wide_at_once(method: str, recipe: str, block: Block, dtype: torch.dtype) -> int:
    """How many matrices of a stack have their state made float32 together; 0 where it is kept so."""
    elements = rule(method, recipe).wide_at_once
    return max(1, elements // block.numel) if elements and state_dtype(dtype) == torch.float32 else 0


def wide_bytes(method: str, recipe: str, block: Block, dtype: torch.dtype, count: int) -> int:
    """Bytes of the state that is made float32 at a time of `count` equal blocks, beside what is kept."""
    together = min(count, wide_at_once(method, recipe, block, dtype))
    form = rule(method, recipe).form
    return together * state_bytes(method, form or recipe, block.shape, block.sides, dtype)


def refreshed_at_once(count: int) -> int:
    """How many of the `count` matrices of a stack are refreshed together; all would hold twice what an update does."""
    return -(-count // 2)


def copied_at_once(count: int) -> int:
    """How many of the `count` matrices of a stack are stepped together where others between them rest.

    Their state is copied then, five or six times their gradients: so many hold no more than an update of all does.
    """
    return max(1, count // 5)


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
