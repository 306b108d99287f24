"""Eigenbases of symmetric matrices: orthogonal iteration, and eigh with fall-backs.

Every function works on a batch, shape (B, d, d), in the dtype it is given, and changes none of its arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kl_dist.methods import fallbacks, qr

QR_SLOWNESS = 2  # of a flop in QR against one in a product of matrices, in the fixed table of costs
EIGH_SLOWNESS = 4
SLAB = {"cpu": 64, "cuda": 512}  # rows of a symmetric product that are made at once: as kronecker.SMALLEST_HALF


def start_basis(d: int, like: Tensor) -> Tensor:
    """A fixed generic orthogonal matrix (d, d): the same for a given d on every rank and at every world size.

    Why not the identity: coordinate axes can be exact eigenvectors (a row whose gradient is zero), and in the wrong
    place such an axis is an *unstable* equilibrium of orthogonal iteration. Rounding noise then decides when it
    leaves, and two runs that differ by 1e-15 end up 1e-2 apart. From a generic basis they stay at 1e-12.
    """
    seeded = torch.Generator().manual_seed(d)
    gaussian = torch.randn(d, d, generator=seeded, dtype=torch.float32)
    return torch.linalg.qr(gaussian.to(like.device, like.dtype)).Q


def orthogonal_iteration(factor: Tensor, damping: float, first: bool = False) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration, seen from the current basis.

        S + c I = O P  (QR),   c = damping * mean(diag S);   S' = O^T S O = P O - c I

    Args:
        factor: S, the Kronecker factor in its current basis, (B, d, d), symmetric.
        damping: relative damping; 0 is the released code's iteration, above 0 the null space is left in peace.
        first: whether the basis knows nothing of S yet.

    Returns:
        O, the rotation from the current basis to the refreshed one, and S' in the refreshed basis, symmetric. Where
        there is no factorisation, O = I and S' = S: the basis stays what it is, and unless S is zero that is counted.
    """
    shift = damping * mean_diagonal(factor)
    damped = factor.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(shift)
    rotation, upper, failed = qr.factorize(damped, damped=damping > 0, first=first)
    rotated = _symmetric_product(upper, rotation)
    rotated.diagonal(dim1=-2, dim2=-1).sub_(shift)
    if failed is not None:
        fallbacks.count("refresh left out", (failed & (shift[:, 0] != 0)).sum())
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        rotation = torch.where(failed[:, None, None], identity, rotation)
        rotated = torch.where(failed[:, None, None], factor, rotated)
    return rotation, rotated


def _symmetric_product(upper: Tensor, right: Tensor) -> Tensor:
    """P O (B, d, d) of an upper triangular P where the product is symmetric.

    Computed are SLAB rows at a time, at most half of all, up to the diagonal, from what of P is not zero: d^3 / 3
    flops, and some for slabs that reach beyond. What is above the diagonal is copied.
    """
    d = upper.shape[-1]
    rows = min(SLAB.get(upper.device.type, 512), -(-d // 2))
    product = torch.empty_like(right, memory_format=torch.contiguous_format)
    for first in range(0, d, rows):
        last = min(first + rows, d)
        torch.bmm(upper[:, first:last, first:], right[:, first:, :last], out=product[:, first:last, :last])
        product[:, :first, first:last] = product[:, first:last, :first].mT
        corner = product[:, first:last, first:last]
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


def eigh(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, d), ascending, and eigenvectors (B, d, d), with two fall-backs where the solver gives up.

    First float64 on the CPU (a failed eigh on CUDA can leave its context unusable, so nothing is retried there), then
    the same with 1e-12 of the mean diagonal added. Both are counted (`kl_dist.methods.fallbacks`).

    Raises:
        RuntimeError: all of them failed (torch.linalg.LinAlgError).
    """
    try:
        return _finite(torch.linalg.eigh(factor))
    except torch.linalg.LinAlgError:
        fallbacks.count("eigh in float64 on the CPU")
    exact = factor.to("cpu", torch.float64)
    try:
        eigenvalues, basis = _finite(torch.linalg.eigh(exact))
    except torch.linalg.LinAlgError:
        fallbacks.count("eigh with jitter")
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
