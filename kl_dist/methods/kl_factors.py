"""The Kullback-Leibler estimate of the Kronecker factors, which KL-Shampoo and KL-SOAP share.

The factors minimise KL(E[g g^T] || S_1 x .. x S_K). Each is learnt from the gradient whitened on the *other* sides,

    S_k = E[H_k H_k^T] d_k / N,    H_k = mode-k unfolding of G times S_j^-1/2 on every side j != k,    N = d_1 .. d_K,

here in the eigenbasis, where S_j^-1/2 is diag(lambda_j)^-1/2. Source: Lin et al., ICLR 2026 (arXiv 2509.03378).

`learn` is the project's form (recipe "fresh"): the scale of the gradients is a factor of its own, a scalar v beside
factors of unit mean, so that a jump of scale counts once and not once per side. `learn_as_released` follows the
authors' released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kl_dist.methods import kronecker, linalg
from kl_dist.methods.kronecker import Hyper
from kl_dist.methods.state import KLShampooState, Side, SOAPState

Eigenvalues = Sequence[Tensor | None]
InEigenbasis = TypeVar("InEigenbasis", KLShampooState, SOAPState)

DAMPING = 0.01  # of the mean eigenvalue, in a refresh: keeps the basis of a null space where it is
EIGENVALUE_FLOOR = 1e-6  # of the mean eigenvalue
RELEASED_EIGENVALUE = 0.1  # `init_factor` of the released code
REFRESHES_PER_REORTHOGONALIZATION = 64  # the drift of Q O O' .. in float32 stays below 1e-5


def allocate_sides(
    shape: Sequence[int], sides: Sequence[Side], batch: int, like: Tensor
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Factors, eigenbases and eigenvalues of `batch` matrices, before any gradient: 0, I and 1."""
    factors: list[Tensor | None] = []
    bases: list[Tensor | None] = []
    for d, side in zip(shape, sides, strict=True):
        full = side == "full"
        factors.append(like.new_zeros(batch, d, d) if full else None)
        bases.append(torch.eye(d, dtype=like.dtype, device=like.device).repeat(batch, 1, 1) if full else None)
    eigenvalues = [
        None if side == "identity" else like.new_ones(batch, d) for d, side in zip(shape, sides, strict=True)
    ]
    return tuple(factors), tuple(bases), tuple(eigenvalues)


def start_bases(state: InEigenbasis, grad: Tensor, refreshes: int) -> None:
    """Factors and eigenbases from the first gradient, at unit scale: S_k = G^_k G^_k^T d_k / N with G^ = G / RMS(G).

    The basis starts from `linalg.start_basis` and gets `refreshes` steps of orthogonal iteration.
    """
    for basis in state.bases:
        if basis is not None:
            basis.copy_(linalg.start_basis(basis.shape[-1], basis))
    projected = kronecker.project(kronecker.at_unit_scale(grad), state.bases)
    kronecker.learn_grams(state.factors, projected, state.step, kronecker.steady_beta(0.0), normalize=True)
    for _ in range(refreshes):
        refresh_bases(state, DAMPING, first=True)


def refresh_bases(state: InEigenbasis, damping: float, drifted: Tensor | None = None, *, first: bool = False) -> None:
    """One step of orthogonal iteration on every full side; factors and momentum move with the basis.

    With O from `linalg.orthogonal_iteration`: Q <- Q O, S~ <- O^T S~ O, M~ <- M~ x_k O_k^T. The eigenvalues keep their
    values and their order.
    """
    for side, (factor, basis) in enumerate(zip(state.factors, state.bases, strict=True)):
        if factor is None or basis is None:
            continue
        rotation, rotated = linalg.orthogonal_iteration(factor, damping, first)
        factor.copy_(rotated)
        basis.copy_(without_drift(basis @ rotation, drifted))
        state.exp_avg.copy_(kronecker.multiply_side(state.exp_avg, rotation, side))


def refresh(state: InEigenbasis, hyper: Hyper) -> None:
    """The refresh of recipe "fresh", damped."""
    refresh_bases(state, DAMPING, drift_is_due(state, hyper))


def refresh_as_released(state: KLShampooState, hyper: Hyper) -> None:
    """The refresh of recipe "paper": undamped."""
    refresh_bases(state, 0.0, drift_is_due(state, hyper))


def drift_is_due(state: InEigenbasis, hyper: Hyper, every: int = REFRESHES_PER_REORTHOGONALIZATION) -> Tensor | None:
    """Of which matrices (B,) this refresh must also undo what rounding did to the orthogonality of Q; None of none."""
    due = (state.step // hyper.precondition_frequency) % every == every - 1
    return due if bool(due.any()) else None


def without_drift(basis: Tensor, drifted: Tensor | None) -> Tensor:
    """Q (B, d, d), orthogonal again where `drifted` says so."""
    if drifted is None:
        return basis
    return torch.where(drifted.to(basis.device)[:, None, None], linalg.reorthogonalize(basis), basis)


def learn(state: KLShampooState, projected: Tensor, hyper: Hyper) -> Tensor:
    """One step of the estimate from G~, the gradient in the eigenbasis; returns s (B,), the scale of the gradients.

        v <- beta2 v + (1 - beta2) mean(Z^2),   Z = G~ prod_k diag(lambda_k)^-1/2,   s = sqrt(v / (1 - beta2^t))
        D_k = (d_k / N) H_k H_k^T with H_k = G~ / s whitened on the other sides
        S~_k <- b S~_k + (1-b) D_k;   lambda_k <- b lambda_k + (1-b) diag(D_k);   both divided by mean(lambda_k)

    with b = min(beta, 1 - 1/(t+1)). H_k is Z times diag(lambda_k)^1/2 on side k, so one Z serves all sides. Mutates
    factors, eigenvalues and scale; `state.step` must already count this step.
    """
    whitened = kronecker.scale_sides(projected, state.eigenvalues, -0.5)
    scale = kronecker.tracked_scale(state.scale, kronecker.mean_square(whitened), state.step, hyper.betas[1])
    keep = kronecker.warm_beta(hyper.factor_beta)
    for side, (factor, eigenvalues) in enumerate(zip(state.factors, state.eigenvalues, strict=True)):
        if eigenvalues is None:
            continue
        old = kronecker.of_step(keep, state.step, eigenvalues)
        # R = diag(root) Z has R R^T = (1-b) D_k: lambda_k, 1 - b, d_k / N and 1 / s^2 in one vector
        share = (1 - old) * (eigenvalues.shape[-1] / kronecker.numel(projected))
        root = (eigenvalues * share).sqrt() / scale[:, None]
        rooted = whitened * kronecker.along(root, side, whitened)
        eigenvalues.mul_(old).add_(kronecker.square_sums(rooted, side))
        mean = eigenvalues.mean(-1, keepdim=True)
        eigenvalues.div_(mean).clamp_min_(EIGENVALUE_FLOOR)
        if factor is not None:
            kronecker.add_gram(factor, rooted, side, kronecker.of_step(keep, state.step, factor))
            factor.div_(mean[..., None])
    return scale


def start_as_released(state: KLShampooState, grad: Tensor, hyper: Hyper) -> None:
    """The released code's first call: factors from the gradient as it is, eigh, lambda = 0.1; weights stay."""
    start_in_eigenvectors(state, grad, [(1 - hyper.factor_beta) * d / kronecker.numel(grad) for d in grad.shape[1:]])
    for eigenvalues in state.eigenvalues:
        if eigenvalues is not None:
            eigenvalues.fill_(RELEASED_EIGENVALUE)


def start_in_eigenvectors(state: InEigenbasis, grad: Tensor, shares: Sequence[float]) -> None:
    """S_k = c_k G_k G_k^T and its eigenvectors, with c_k from `shares`; S~_k is in the basis of these.

    Matrix by matrix, each copied out of its batch: where S_k is singular the basis of its null space is rounding noise,
    and that depends on how many matrices a product takes at once and on where in memory they begin. Which matrices
    share a batch depends on the number of ranks.
    """
    for side, (factor, basis) in enumerate(zip(state.factors, state.bases, strict=True)):
        if factor is None or basis is None:
            continue
        for own_factor, own_basis, own_grad in zip(factor.split(1), basis.split(1), grad.split(1), strict=True):
            plain = kronecker.gram(own_grad.clone(), side) * shares[side]
            own_basis.copy_(linalg.descending_eigenbasis(plain))
            own_factor.copy_(own_basis.mT @ plain @ own_basis)


def learn_as_released(state: KLShampooState, projected: Tensor, hyper: Hyper) -> None:
    """One step of the estimate from G~ with the eigenvalues of the step before, and the absolute floor.

    D_k = (d_k / N) H_k H_k^T;   S~_k <- beta S~_k + (1 - beta) D_k;   lambda_k likewise with diag(D_k)
    lambda_k >= 1 / max(10, min(d_k, 4000))^2
    """
    beta = hyper.factor_beta
    old = [None if x is None else x.clone() for x in state.eigenvalues]
    for side, seen_by_factor, seen_by_eigenvalues in _released_order(state.eigenvalues, old):
        factor, eigenvalues = state.factors[side], state.eigenvalues[side]
        if eigenvalues is None:
            continue
        if factor is not None:
            moment = _second_moment(projected, seen_by_factor, side)
            factor.lerp_(moment, 1 - beta)
        if factor is None or seen_by_factor is not seen_by_eigenvalues:
            moment = _second_moment(projected, seen_by_eigenvalues, side)
        eigenvalues.lerp_(moment.diagonal(dim1=-2, dim2=-1), 1 - beta)
        eigenvalues.clamp_min_(1 / max(10, min(eigenvalues.shape[-1], 4000)) ** 2)


def _released_order(new: Eigenvalues, old: Eigenvalues) -> list[tuple[int, Eigenvalues, Eigenvalues]]:
    """(side, eigenvalues its factor sees, eigenvalues its eigenvalues see), in the order of the updates.

    All sides see the old eigenvalues (Jacobi) but for the released code's three-sided case, which this reproduces:
    lambda_2 sees the new lambda_3, and side 1 sees the new lambda_2 beside the old lambda_3.
    """
    if len(old) != 3:
        return [(side, old, old) for side in range(len(old))]
    first = [old[0], new[1], old[2]]
    return [(2, old, old), (1, old, [old[0], old[1], new[2]]), (0, first, first)]


def _second_moment(projected: Tensor, eigenvalues: Eigenvalues, side: int) -> Tensor:
    """(d_k / N) H_k H_k^T, (B, d_k, d_k), with H_k whitened on every side but `side`."""
    others = [None if k == side else x for k, x in enumerate(eigenvalues)]
    whitened = kronecker.scale_sides(projected, others, -0.5)
    return kronecker.gram(whitened, side) * (projected.shape[side + 1] / kronecker.numel(projected))
