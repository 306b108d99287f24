"""A = O P of batches of symmetric matrices: O orthogonal, P upper triangular. By reflections, or by Cholesky.

By reflections it is what it is called whatever A is. By Cholesky it is products of matrices but for two factorisations
of triangles, and wants a condition that a damping has bounded: with 0.01 of the mean diagonal that is 100 d at worst,
which a factor of rank one has. For a GPU, where reflections take one matrix after the other and a column at a time.

Each takes A (B, d, d) and changes it not; temporaries are those of ELEMENTS_AT_ONCE at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

ELEMENTS_AT_ONCE = 2**24  # of A; by Cholesky five copies of as many in float64, 0.7 GB, are the most

SHIFT = 4  # times d and the unit roundoff, of a gram of unit diagonal: above what rounding takes from its eigenvalues

FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (9, 4), (9, 5), (10, 0)}
"""Compute capabilities of GPUs with at least half as many float64 operations a second as float32: P100, V100, A100,
H100 and H200, AMD's MI200 and MI300, B200. The others have a 32nd or a 64th."""


class Factored(NamedTuple):
    """O and P (B, d, d), and of which matrices (B,) there is none; None: of none."""

    rotation: Tensor
    upper: Tensor
    failed: Tensor | None


def factorize(symmetric: Tensor, damped: bool, first: bool) -> Factored:
    """A = O P, in the way that costs least where A is.

    Float64 state and what is not damped go by reflections, and so does all on a CPU, as measured (docs/gpu.md). On a
    GPU it is Cholesky, by the count of operations: once in float64 (3.3 d^3) where that is at most twice as slow, else
    twice in float32 (8.7 d^3), and three times for a matrix that is far from diagonal.

    Args:
        symmetric: A.
        damped: whether the condition of A is bounded.
        first: whether A is far from diagonal, as at a start.
    """
    if not symmetric.is_cuda or symmetric.dtype == torch.float64 or not damped:
        return by_reflections(symmetric)
    if _capability(symmetric.device) in FAST_FLOAT64:
        return by_cholesky(symmetric)
    return by_scaled_cholesky(symmetric, passes=3 if first else 2)


def by_reflections(symmetric: Tensor) -> Factored:
    """QR, whatever the condition.

    torch.linalg.qr in its two steps. LAPACK wants columns: a symmetric matrix transposed is one, at no copy.
    """
    reflectors, scales = torch.geqrf(symmetric.mT)
    return Factored(torch.linalg.householder_product(reflectors, scales), reflectors.triu_(), None)


def by_cholesky(symmetric: Tensor) -> Factored:
    """A^T A = P^T P (Cholesky), O = A P^-1, in float64, as it squares the condition.

    With the worst that the damping leaves O^T O is off by 7e-7 at d = 2048, less than by reflections in float32.
    """
    found = _like(symmetric)
    for part, rotation, upper, failed in _parts(symmetric, found):
        exact = part.double()
        lower, info = torch.linalg.cholesky_ex(exact.mT @ exact)
        rotation.copy_(torch.linalg.solve_triangular(lower.mT, exact, upper=True, left=False))
        upper.copy_(lower.mT)
        failed.copy_(info != 0)
    return found


def by_scaled_cholesky(symmetric: Tensor, passes: int) -> Factored:
    """Cholesky QR in the dtype of A: its columns at unit norm, the first gram shifted, and again on what comes of it.

        X = A diag(n)^-1;   X^T X + s I = R_1^T R_1,  X <- X R_1^-1;   X^T X = R_2^T R_2,  X <- X R_2^-1;  ..
        O = X,   P = .. R_2 R_1 diag(n)

    n the columns' norms, s = 4 d u, u the unit roundoff. A = O P holds whatever the shift; with it the first
    factorisation exists, and what it leaves undone the others do. In float32 two passes leave |O^T O - I| at 1.0 to 1.4
    times what reflections leave where A is nearly diagonal, and at 5e-5 where it is a damped rank one in a basis that
    knows nothing of it; three passes leave less than reflections in either (`benchmarks/refresh.py`).

    Sources: Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices" (arXiv
    1809.11085); a scale of the columns is within sqrt(d) of the best there is, by van der Sluis (1969).
    """
    found = _like(symmetric)
    d = symmetric.shape[-1]
    smallest = torch.finfo(symmetric.dtype).tiny
    shift = SHIFT * d * torch.finfo(symmetric.dtype).eps / 2
    for part, rotation, upper, failed in _parts(symmetric, found):
        largest = part.abs().amax((1, 2), keepdim=True)  # so that no square over- or underflows
        x = part / largest.clamp_min(smallest)
        norms = torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp_min(smallest)
        x.div_(norms)
        failed.fill_(False)
        for number in range(passes):
            gram = x.mT @ x
            if number == 0:
                gram.diagonal(dim1=-2, dim2=-1).add_(shift)
            lower, info = torch.linalg.cholesky_ex(gram)
            x = torch.linalg.solve_triangular(lower.mT, x, upper=True, left=False)
            upper.copy_(lower.mT @ upper if number else lower.mT)
            failed.logical_or_(info != 0)
        failed.logical_or_(x.isfinite().all(-1).all(-1).logical_not_())
        rotation.copy_(x)
        upper.mul_(norms * largest)
    return found


def _like(symmetric: Tensor) -> Factored:
    """Room for what is found."""
    failed = torch.empty(symmetric.shape[0], dtype=torch.bool, device=symmetric.device)
    return Factored(torch.empty_like(symmetric), torch.empty_like(symmetric), failed)


def _parts(symmetric: Tensor, found: Factored) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A and the room for what is found of it, so many matrices at a time."""
    assert found.failed is not None
    at_once = max(1, ELEMENTS_AT_ONCE // symmetric[0].numel())
    tensors = (symmetric, found.rotation, found.upper, found.failed)
    return zip(*(x.split(at_once) for x in tensors), strict=True)


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
