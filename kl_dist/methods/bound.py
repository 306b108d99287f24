"""A bound on what an update does in its strongest directions, before eigenvalues have been learnt.

    P <- min(1, w sqrt(n) / tau) P,   tau = |P P^T|_F / |P|_F,   w = 1 / (1 - (t/T)^2),   t < T

with P the whitened momentum (B, m, n), n the longer side, and tau the mean of its singular values, as a root mean
square in which each counts by its own square: at most the largest, and near to it where few directions are most of P.

Why: for a gradient that stays and is of full rank, whitening ends where all singular values of P are sqrt(n), as
lambda_a lambda_b = sigma^2 / n solves KL-Shampoo's equations. A direction that gradients turn to, though, is divided by
what they were in it before, on both sides, and P goes several times beyond that end until eigenvalues have come up. In
a run's first steps the gradients are largest and turn most, so in a matrix's first T - 1 updates
(kl_dist.methods.polar) all of P is made smaller, and its directions are left as they are. w widens the bound until it
is none: gradients that stay in r of m directions end at sqrt(m n / r), and nothing shall jump. Where noise in all
directions is most of P, tau is sqrt(m + n) times its RMS, which is 0.25 or so, and nothing is bounded.

P knows no scale, and tau does not know which basis P is in: the bound is a continuous function of the gradients that
does not change when all are multiplied by a constant.
"""

from __future__ import annotations

from torch import Tensor

from kl_dist.methods import averages, kronecker, quintic


def bound_(
    whitened: Tensor, spare: Tensor, compute_dtype: str | None = "float32", wider: float | Tensor = 1.0
) -> Tensor:
    """P as above, matrix by matrix.

    Args:
        whitened: P (B, m, n), overwritten.
        spare: like P, overwritten.
        compute_dtype: of the product.
        wider: w, one number or one for each matrix (B,).

    Returns:
        P. Zero where it was.
    """
    gram = quintic.gram(whitened, spare, compute_dtype)
    size = kronecker.norm(whitened).clamp_min_(averages.smallest_scale(whitened.dtype))
    tau = kronecker.norm(gram).div_(size)
    largest = wider * max(whitened.shape[1:]) ** 0.5
    return whitened.mul_(kronecker.column((largest / tau).clamp_max_(1.0), whitened))
