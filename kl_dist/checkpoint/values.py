"""Whether a saved tensor can be what its name says: a bad value would spread, and be seen later and somewhere else."""

from __future__ import annotations

import torch
from torch import Tensor

from kl_dist.methods import kronecker
from kl_dist.methods.products import operand

NON_NEGATIVE = {"eigenvalues", "exp_avg_sq", "scale", "grad_scale", "row_mean_square", "step", "started"}
"""Sums of squares and their averages, and counts; fields of `kl_dist.methods.state`."""

ORTHOGONAL = {"bases"}

ORTHOGONALITY = {torch.float16: 3e-2, torch.bfloat16: 3e-2}
"""Bound on an entry of |Q^T Q - I| where Q is kept rounded; else 1e-2, a hundred times what training makes of it."""

BELOW_ZERO = 1e-2
"""Of a factor's largest diagonal entry: a refresh, which takes its damping away again, may leave so much below zero."""


@torch.no_grad()
def fault(field: str, tensor: Tensor, device: torch.device) -> str | None:
    """What is wrong with a tensor of a unit's state, or None.

    Costs little more than d^3 flops for an eigenbasis (d, d), less than a hundredth of a step and its refresh there.

    Args:
        field: what the state calls it ("bases.0"); of others than those above only that they are finite is asked.
        tensor: all of it, or some boxes end to end of what is elementwise.
        device: where to look.
    """
    if not tensor.numel():
        return None
    name = field.split(".")[0]
    tensor = tensor.detach().to(device)
    if not tensor.is_floating_point():
        return "is negative" if name in NON_NEGATIVE and bool((tensor < 0).any()) else None
    if not _is_finite(tensor):
        return "is not finite"
    if name in NON_NEGATIVE and bool(tensor.amin() < 0):
        return "has negative values, where none can be"
    if name == "factors" and _falls_below_zero(tensor):
        return "has a negative diagonal, as no sum of squares has"
    if name in ORTHOGONAL and tensor.ndim == 2:
        off = _distance_from_orthogonal(tensor)
        if not off <= ORTHOGONALITY.get(tensor.dtype, 1e-2):  # NaN, where products overflow, is far off
            return f"is not orthogonal: an entry of Q^T Q - I is {off:.2g}"
    return None


def _is_finite(x: Tensor) -> bool:
    """Whether all of x is: NaN and infinities stay in a sum, which costs little; else it may have been too large."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def _falls_below_zero(factor: Tensor) -> bool:
    diagonal = (factor.diagonal() if factor.ndim == 2 else factor).float()
    return bool(diagonal.amin() < -BELOW_ZERO * diagonal.amax().clamp_min(0))


def _distance_from_orthogonal(basis: Tensor) -> float:
    """The largest entry of |Q^T Q - I|."""
    wide = basis if basis.dtype == torch.float64 else basis.float()
    gram = wide.new_empty(1, *wide.shape)
    kronecker.add_symmetric(gram, operand(wide.mT[None], "float32"), 0.0, 1.0)
    gram[0].diagonal().sub_(1.0)
    return float(gram.abs_().amax())
