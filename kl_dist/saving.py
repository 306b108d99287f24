"""Files that any number of ranks, in any layout, can load: all of the state on one rank, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kl_dist.checkpoint import full
from kl_dist.optimizer import KLShampoo


def full_state_dict(optimizer: KLShampoo, rank: int = 0) -> dict[str, Any]:
    """All of the state, on the CPU of one rank; a collective. The others get an empty dict.

    Plain tensors by names of parameters, as torch's get_optimizer_state_dict(full_state_dict=True) gives them. One
    tensor at a time travels, so only the rank that collects needs room for more than it holds.

    Raises:
        RuntimeError: a step has failed half-way and the state is not to be trusted.
    """
    parts = optimizer.parts
    parts.ranks.raise_together(parts.engine.failure)
    return full.gather(parts.holdings, optimizer.param_groups, parts.ranks, rank, optimizer._steps)


def load_full_state_dict(
    optimizer: KLShampoo, state: Mapping[str, Any] | None = None, strict: bool = True
) -> list[str]:
    """Load what `full_state_dict` gave, at any world size and in any layout; a collective.

    Args:
        optimizer: of the same parameters by name, where strict in the same order.
        state: rank 0's counts; the others may leave it out.
        strict: False loads what fits, block by block and by name, and leaves the rest as it is: new, in an optimizer
            that has made no step. The groups' options are taken only where all groups fit.

    Returns:
        What was left and why, also logged; empty under strict.

    Raises:
        ValueError: it does not fit, or is not as it was saved; on all ranks, with nothing changed.
    """
    parts = optimizer.parts
    decision = full.scatter(state, optimizer.param_groups, parts.holdings, parts.ranks, strict)
    optimizer._took_up(decision.steps)
    return decision.left
