"""(S + c I)^-p of symmetric positive semi-definite factors: by eigh, or by products of matrices alone.

Every function works on a batch, shape (B, d, d), in the dtype it is given, and changes none of its arguments.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kl_dist.methods import fallbacks
from kl_dist.methods.linalg import eigh, mean_diagonal

CONVERGED = 1e-3  # of every entry of M - I; where it converges in float32 it is below 1e-5


def inverse_root(factor: Tensor, exponent: float, shift: Tensor | float, damping: float = 0.0) -> Tensor:
    """(S + c I)^-p: by products on a GPU in float32 where 1/p is even and the damping relative, else by eigh.

    Args:
        factor: S.
        exponent: p > 0.
        shift: c > 0, a number or (B, 1): with a singular S it alone makes the root a continuous function of S.
        damping: c is at least so much of the mean of diag(S); 0 where nothing is known.
    """
    order = round(1 / exponent)
    is_even = order % 2 == 0 and abs(order * exponent - 1) < 1e-9
    if factor.is_cuda and factor.dtype == torch.float32 and damping > 0 and is_even:
        return by_products(factor, order, shift, damping)
    return by_eigh(factor, exponent, shift)


def by_eigh(factor: Tensor, exponent: float, shift: Tensor | float) -> Tensor:
    """Q diag((max(lambda, 0) + c)^-p) Q^T with S = Q diag(lambda) Q^T."""
    eigenvalues, basis = eigh(factor)
    scaled = basis * (eigenvalues.clamp_min(0) + shift).pow(-exponent).unsqueeze(-2)
    return scaled @ basis.mT


def by_products(factor: Tensor, order: int, shift: Tensor | float, damping: float) -> Tensor:
    """(S + c I)^(-1/r), r even, by the coupled Newton iteration, its steps scaled to the spectrum that is left.

        M = (S + c I) / t,  X = t^(-1/r) I;   T = a I - b M,   X <- X T,   M <- T^(r/2) M T^(r/2)

    t bounds the largest eigenvalue. M goes to I and X^r (S + c I) stays equal to M. Newton's own a = (r + 1) / r and
    b = 1 / r let an eigenvalue of M that is small grow by ((r + 1) / r)^r, 2.4 at r = 4, in a step; those of
    `coefficients` by 12, and end as Newton's. From a damping of 1e-4 it takes 10 steps at d = 768, r = 4, of 8 d^3
    flops each (2 (log2(r) + 2) d^3). M is kept symmetric, without which it diverges where c is near the rounding of S.

    In float32 it is as near to the exact root as eigh is in float32, from 1e-5 at a condition of 1e3 to 3e-2 at 1e7,
    where rounding S alone moves it as far. What does not converge is done by eigh, and counted; that is the one answer
    of the device that is waited for. Sources: Guo and Higham, "A Schur-Newton method for the matrix pth root and its
    inverse" (2006); Anil et al., "Scalable second order optimization for deep learning" (arXiv 2002.09018); the scaled
    steps are, for r = 2, Chen and Chow's, "A stable scaling of Newton-Schulz for improving the sign function" (2014).
    """
    d = factor.shape[-1]
    identity = torch.eye(d, dtype=factor.dtype, device=factor.device)
    shifted = factor + _column(shift, factor) * identity
    trace = d * mean_diagonal(shifted)[..., None]
    m = shifted.div_(trace)
    rows = m.abs().sum(-1).amax(-1)[:, None, None]
    bound = torch.linalg.vector_norm(m, dim=(1, 2), keepdim=True).minimum(rows) * (1 + 1e-6)
    m = m.div_(bound)
    x = identity * (trace * bound).pow(-1 / order)
    for a, b in coefficients(order, damping / (d * (1 + damping))):
        step = identity * a - m * b
        x = _symmetric(x @ step)
        power = torch.linalg.matrix_power(step, order // 2)
        m = _symmetric(power @ m @ power)
    failed = ~((m - identity).abs().amax((1, 2)) < CONVERGED)  # NaN fails too
    if bool(failed.any()):
        fallbacks.count("inverse root by eigh", failed.sum())
        x[failed] = by_eigh(factor[failed], 1 / order, shift[failed] if isinstance(shift, Tensor) else shift)
    return x


@lru_cache
def coefficients(order: int, smallest: float) -> tuple[tuple[float, float], ...]:
    """(a, b) of each step, from a spectrum of M in [l, 1] to one within 1e-12 of 1.

    f(m) = m (a - b m)^r is as small at l as at 1 and has its peak between them at 1, which no other a and b can better:
    b / a = (1 - q) / (1 - l q) with q = l^(1/r), a = ((r + 1) b / a)^(1/r) (r + 1) / r; then l <- f(l). Where l is
    near 1 that is Newton's step, which squares what is left.
    """
    found = []
    while 1 - smallest > 1e-3:
        q = smallest ** (1 / order)
        ratio = (1 - q) / (1 - smallest * q)
        a = ((order + 1) * ratio) ** (1 / order) * (order + 1) / order
        found.append((a, a * ratio))
        smallest *= (a * (1 - ratio * smallest)) ** order
    return (*found, *[((order + 1) / order, 1 / order)] * 2)


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT).mul_(0.5)


def _column(shift: Tensor | float, like: Tensor) -> Tensor | float:
    return shift[..., None] if isinstance(shift, Tensor) else shift
