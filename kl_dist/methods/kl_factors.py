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

from kl_dist.methods import averages, kronecker, linalg
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
    unit = averages.at_unit_scale(grad)
    projected, spare = kronecker.project(unit, torch.empty_like(unit), state.bases)
    kronecker.learn_grams(state.factors, projected, spare, keep=0.0)
    for _ in range(refreshes):
        refresh_bases(state, DAMPING, first=True)


def refresh_bases(state: InEigenbasis, damping: float, drifted: Tensor | None = None, *, first: bool = False) -> None:
    """One step of orthogonal iteration on every full side; factors and momentum move with the basis.

    With O from `linalg.orthogonal_iteration`: Q <- Q O, S~ <- O^T S~ O, M~ <- M~ x_k O_k^T. The eigenvalues keep their
    values and their order.
    """
    for side, factor in enumerate(state.factors):
        if factor is not None:
            _refresh_side(state, side, damping, drifted, first)  # a call each: what it holds is gone before the next


def _refresh_side(state: InEigenbasis, side: int, damping: float, drifted: Tensor | None, first: bool) -> None:
    factor, basis = state.factors[side], state.bases[side]
    assert factor is not None and basis is not None
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


def learn(state: KLShampooState, projected: Tensor, spare: Tensor, hyper: Hyper) -> Tensor:
    """One step of the estimate from G~, the gradient in the eigenbasis; returns s (B,), the scale of the gradients.

        G~ <- sqrt(p) G~, where it is far beyond the scale so far: `averages.share_of_spike`
        q_k = diag(H H^T), H = G~ whitened on the other sides: sums of G~^2 / prod of their lambda, (d_k,)
        v <- beta2 v + (1 - beta2) q_1 . (1 / lambda_1) / N;   s = sqrt(v / (1 - beta2^t))
        D_k = (d_k / N) H_k H_k^T with H_k = G~ / s whitened on the other sides
        S~_k <- b S~_k + (1-b) D_k;   lambda_k <- b lambda_k + (1-b) diag(D_k);   both divided by mean(lambda_k)

    with b = min(beta, 1 - 1/(t+1)), beta `averages.lasting`. Mutates factors, eigenvalues, scale, `projected` and
    `spare`; `state.step` must already count this step.
    """
    inverse = [None if x is None else x.reciprocal() for x in state.eigenvalues]
    roots = [None if x is None else x.sqrt() for x in inverse]
    sums = kronecker.square_sums(projected, inverse, spare)
    total = sums[0].sum(1) if inverse[0] is None else torch.linalg.vecdot(sums[0], inverse[0])
    numel = kronecker.numel(projected)
    passed = averages.share_of_spike(state.scale, total.div_(numel), state.step, hyper.betas[1])
    if passed is not None:
        projected.mul_(kronecker.column(passed.sqrt(), projected))
        sums, total = [x.mul_(passed[:, None]) for x in sums], total.mul_(passed)
    scale = averages.tracked_scale(state.scale, total, state.step, hyper.betas[1])
    by = scale.pow(-2)[:, None]  # per matrix and (B, 1) from here on, as are keep and unit_mean
    beta = averages.warm_beta(averages.lasting(hyper.factor_beta, hyper))
    keep = kronecker.column(averages.of_step(beta, state.step, scale), by)
    for side, (factor, eigenvalues) in enumerate(zip(state.factors, state.eigenvalues, strict=True)):
        if eigenvalues is None:
            continue
        share = by * ((1 - keep) * (eigenvalues.shape[-1] / numel))
        eigenvalues.mul_(keep).addcmul_(sums[side], share)
        unit_mean = eigenvalues.mean(-1, keepdim=True).reciprocal_()
        eigenvalues.mul_(unit_mean).clamp_min_(EIGENVALUE_FLOOR)
        if factor is not None:
            others = [None if k == side else root for k, root in enumerate(roots)]
            whitened = kronecker.scale_sides(projected, others, share.mul_(unit_mean).sqrt_(), out=spare)
            kronecker.add_gram(factor, whitened, side, unit_mean.mul_(keep), compute_dtype=hyper.compute_dtype)
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
            rows = kronecker.unfolded(own_grad.clone(), side)
            plain = (rows @ rows.mT) * shares[side]
            own_basis.copy_(linalg.descending_eigenbasis(plain))
            own_factor.copy_(own_basis.mT @ plain @ own_basis)


def learn_as_released(state: KLShampooState, projected: Tensor, spare: Tensor, hyper: Hyper) -> None:
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
        share = (1 - beta) * eigenvalues.shape[-1] / kronecker.numel(projected)
        if factor is not None:
            others = [None if k == side or x is None else x.rsqrt() for k, x in enumerate(seen_by_factor)]
            whitened = kronecker.scale_sides(projected, others, share**0.5, out=spare)
            kronecker.add_gram(factor, whitened, side, beta, compute_dtype=hyper.compute_dtype)
        inverse = [None if x is None else x.reciprocal() for x in seen_by_eigenvalues]
        eigenvalues.mul_(beta).add_(kronecker.square_sums(projected, inverse, spare)[side], alpha=share)
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
