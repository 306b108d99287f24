"""Eigenbases of symmetric matrices: orthogonal iteration, eigh with fall-backs, inverse roots.

Every function works on a batch, shape (B, d, d), in the dtype it is given, and changes none of its arguments.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

ELEMENTS_AT_ONCE = 2**24  # of the matrices that are copied to float64 at a time; five copies, 0.7 GB, is the most

QR_SLOWNESS = 2  # of a flop in QR against one in a product of matrices, in the fixed table of costs
EIGH_SLOWNESS = 4

fallbacks: Counter[str] = Counter()
"""How often a decomposition had to be computed another way, by the reason; read by ``KLShampoo.stats()``."""


def start_basis(d: int, like: Tensor) -> Tensor:
    """A fixed generic orthogonal matrix (d, d): the same for a given d on every rank and at every world size.

    Why not the identity: coordinate axes can be exact eigenvectors (a row whose gradient is zero), and in the wrong
    place such an axis is an *unstable* equilibrium of orthogonal iteration. Rounding noise then decides when it
    leaves, and two runs that differ by 1e-15 end up 1e-2 apart. From a generic basis they stay at 1e-12.
    """
    seeded = torch.Generator().manual_seed(d)
    gaussian = torch.randn(d, d, generator=seeded, dtype=torch.float32)
    return torch.linalg.qr(gaussian.to(like.device, like.dtype)).Q


def orthogonal_iteration(factor: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration, seen from the current basis.

        S + c I = O P  (QR),   c = damping * mean(diag S);   S' = O^T S O = P O - c I

    Args:
        factor: S, the Kronecker factor in its current basis, (B, d, d), symmetric.
        damping: relative damping; 0 is the released code's iteration, above 0 the null space is left in peace.

    Returns:
        O, the rotation from the current basis to the refreshed one, and S' in the refreshed basis, symmetric.
    """
    shift = damping * mean_diagonal(factor)
    damped = factor.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(shift)
    by_cholesky = factor.is_cuda and factor.dtype == torch.float32 and damping > 0
    rotation, upper = qr_by_cholesky(damped) if by_cholesky else qr_by_reflections(damped)
    rotated = _symmetric_product(upper, rotation)
    rotated.diagonal(dim1=-2, dim2=-1).sub_(shift)
    return rotation, rotated


def qr_by_reflections(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """A = O P of a batch (B, d, d) of symmetric matrices, whatever their condition: orthogonal O, upper triangular P.

    torch.linalg.qr in its two steps. LAPACK wants columns: a symmetric matrix transposed is one, at no copy.
    """
    reflectors, scales = torch.geqrf(symmetric.mT)
    return torch.linalg.householder_product(reflectors, scales), reflectors.triu_()


def qr_by_cholesky(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """A = O P of a batch (B, d, d) of damped symmetric matrices: A^T A = P^T P (Cholesky), O = A P^-1.

    For GPUs, where QR by reflections takes one matrix after the other and a column at a time, and this is products
    alone, thirty times faster at d = 768. It squares the condition, so it is done in float64: with one of 100 d, which
    a damping of 0.01 leaves of rank one, O^T O is off by 7e-7 at d = 2048, less than by reflections in float32.
    A matrix of zero, which has no such factorisation, gets O = I, and no rank waits to hear of it.
    """
    rotation, upper = torch.empty_like(symmetric), torch.empty_like(symmetric)
    at_once = max(1, ELEMENTS_AT_ONCE // symmetric[0].numel())
    for part, o, p in zip(*(x.split(at_once) for x in (symmetric, rotation, upper)), strict=True):
        exact = part.double()
        lower, failed = torch.linalg.cholesky_ex(exact.mT @ exact)
        solved = torch.linalg.solve_triangular(lower.mT, exact, upper=True, left=False)
        identity = torch.eye(exact.shape[-1], dtype=exact.dtype, device=exact.device)
        fails = (failed != 0)[:, None, None]
        o.copy_(torch.where(fails, identity, solved))
        p.copy_(torch.where(fails, exact, lower.mT).triu())
    return rotation, upper


def _symmetric_product(upper: Tensor, right: Tensor) -> Tensor:
    """P O (B, d, d) of an upper triangular P where the product is symmetric: half of it is computed, for d^3 flops."""
    half = upper.shape[-1] // 2
    product = torch.empty_like(right, memory_format=torch.contiguous_format)
    product[:, :half, :half] = upper[:, :half] @ right[:, :, :half]
    product[:, half:] = upper[:, half:, half:] @ right[:, half:]
    product[:, :half, half:] = product[:, half:, :half].mT
    corners = (product[:, :half, :half], product[:, half:, half:])
    for corner in corners:
        corner.copy_((corner + corner.mT).mul_(0.5))
    return product


def reorthogonalize(basis: Tensor) -> Tensor:
    """One Newton-Schulz step towards the nearest orthogonal matrix: Q (3 I - Q^T Q) / 2.

    Turns an error |Q^T Q - I| = e into about 3/4 e^2, for 4 d^3 flops.
    """
    identity = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
    return basis @ (1.5 * identity - 0.5 * (basis.mT @ basis))


def descending_eigenbasis(factor: Tensor) -> Tensor:
    """Eigenvectors (B, d, d) of a symmetric factor, as columns, in descending order of eigenvalue."""
    return eigh(factor)[1].flip(-1)


def inverse_root(factor: Tensor, exponent: float, shift: Tensor | float) -> Tensor:
    """(S + c I)^-p = Q diag((max(lambda, 0) + c)^-p) Q^T of a symmetric positive semi-definite factor (B, d, d).

    Args:
        factor: S.
        exponent: p > 0.
        shift: c > 0, a number or (B, 1): with a singular S it alone makes the root a continuous function of S.
    """
    eigenvalues, basis = eigh(factor)
    scaled = basis * (eigenvalues.clamp_min(0) + shift).pow(-exponent).unsqueeze(-2)
    return scaled @ basis.mT


def eigh(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, d), ascending, and eigenvectors (B, d, d), with two fall-backs where the solver gives up.

    First float64 on the CPU (a failed eigh on CUDA can leave its context unusable, so nothing is retried there), then
    the same with 1e-12 of the mean diagonal added. Both are counted in ``fallbacks``.

    Raises:
        RuntimeError: all of them failed (torch.linalg.LinAlgError).
    """
    try:
        return _finite(torch.linalg.eigh(factor))
    except torch.linalg.LinAlgError:
        fallbacks["eigh in float64 on the CPU"] += 1
    exact = factor.to("cpu", torch.float64)
    try:
        eigenvalues, basis = _finite(torch.linalg.eigh(exact))
    except torch.linalg.LinAlgError:
        fallbacks["eigh with jitter"] += 1
        jitter = 1e-12 * mean_diagonal(exact)[..., None] * torch.eye(exact.shape[-1], dtype=exact.dtype)
        eigenvalues, basis = _finite(torch.linalg.eigh(exact + jitter))
    return eigenvalues.to(factor), basis.to(factor)


def mean_diagonal(factor: Tensor) -> Tensor:
    """mean(diag S) of each matrix, shaped (B, 1)."""
    return factor.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)


def _finite(decomposition: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    # LAPACK can return NaN without complaint. On CUDA the check would be a synchronisation, and cuSOLVER raises.
    eigenvalues, basis = decomposition
    if eigenvalues.device.type == "cpu" and not bool(eigenvalues.isfinite().all()):
        raise torch.linalg.LinAlgError("eigh returned values that are not finite")
    return eigenvalues, basis
