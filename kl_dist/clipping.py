"""Clipping to a global norm, computed from what each rank owns or holds, and of single values."""

from __future__ import annotations

import torch
from torch import Tensor

from kl_dist.optimizer import KLShampoo


@torch.no_grad()
def clip_grad_norm_(optimizer: KLShampoo, max_norm: float, *, error_if_nonfinite: bool = False) -> Tensor:
    """Scale the gradients of an optimizer's parameters so that the norm of all together is max_norm at most.

        G <- G min(1, max_norm / (|G| + 1e-6)),   |G|^2 = sum of squares over parameters and ranks, each element once

    As torch.nn.utils.clip_grad_norm_, but right wherever the parameters live: whole on every rank, reduced to their
    owners (`KLShampoo.reduce_to_owners`), sharded (DTensors, on several device meshes or beside others that are not).
    A collective.

    Args:
        optimizer: has the parameters.
        max_norm: not negative.
        error_if_nonfinite: raise where the norm is NaN or infinite, on all ranks; otherwise `step` meets it.

    Returns:
        |G| before, 0-D, the same on all ranks.

    Raises:
        ValueError: max_norm is negative or not a number.
        RuntimeError: with error_if_nonfinite; nothing is changed then.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0, not {max_norm!r}")
    ranks, engine, _, reduction = optimizer.parts
    if reduction is not None:
        with ranks.together():
            reduction.check()
    norm = engine.gradient_norm()
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(f"the norm of the gradients is {float(norm)}; nothing was changed")
    engine.shards.scale_gradients((max_norm / (norm + 1e-6)).clamp_max(1.0))
    if reduction is not None:
        reduction.accept()
    return norm


@torch.no_grad()
def clip_grad_value_(optimizer: KLShampoo, clip_value: float) -> None:
    """Bring every element of an optimizer's gradients into [-clip_value, clip_value], in place.

    As torch.nn.utils.clip_grad_value_, and allowed with gradients that were reduced to their owners. Local.

    Raises:
        ValueError: clip_value is negative or not a number.
        RuntimeError: a gradient is not what the hook of `KLShampoo.reduce_to_owners` made of it.
    """
    if not clip_value >= 0:
        raise ValueError(f"clip_value must be at least 0, not {clip_value!r}")
    reduction = optimizer.parts.reduction
    if reduction is not None:
        reduction.check()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_value_(parameters, clip_value)
    if reduction is not None:
        reduction.accept()
