"""SOAP: Adam in the eigenbasis of Shampoo's Kronecker factors.

    S_a <- beta2 S_a + (1 - beta2) G G^T;   S_b likewise with G^T G;   U = Q_a Adam(Q_a^T G Q_b) Q_b^T

Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam" (arXiv 2409.11321) and its released code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kl_dist.methods import kl_factors, kronecker, polar
from kl_dist.methods.kronecker import Hyper
from kl_dist.methods.rule import Method, Rule, as_released
from kl_dist.methods.state import Side, SOAPState, unstarted

START_REFRESHES = 1
EXP_AVG_SQ_FLOOR = 1e-10  # of its mean: what lies below is rounding noise


def allocate(shape: Sequence[int], sides: Sequence[Side], batch: int, like: Tensor) -> SOAPState:
    """State of `batch` matrices of `shape`; a diagonal side keeps the coordinates it has, as an identity side does."""
    factors, bases, _ = kl_factors.allocate_sides(shape, sides, batch, like)
    zeros = like.new_zeros(batch, *shape)
    return SOAPState(*unstarted(batch), zeros, zeros.clone(), factors, bases, like.new_zeros(batch))


def start(state: SOAPState, grad: Tensor, hyper: Hyper) -> None:
    """Factors and eigenbases from the first non-zero gradient; the second moment starts at 1, its own mean."""
    kl_factors.start_bases(state, grad, START_REFRESHES)
    state.exp_avg_sq.fill_(1.0)


def update(state: SOAPState, grad: Tensor, hyper: Hyper) -> Tensor:
    """The update of one step, before the learning rate; eps is relative. Arguments as `kl_shampoo.update`."""
    state.step.add_(1)
    projected = kronecker.project(grad, state.bases)
    scale = kronecker.tracked_scale(state.grad_scale, kronecker.mean_square(projected), state.step, hyper.betas[1])
    unit = projected / kronecker.column(scale, grad)
    kronecker.learn_grams(state.factors, unit, state.step, kronecker.warm_beta(hyper.factor_beta), normalize=True)
    adam = scaled_adam(
        kronecker.momentum(state.exp_avg, projected, state.step, hyper),  # without a name, to be gone afterwards
        unit,
        scale,
        state.exp_avg_sq,
        state.step,
        hyper,
    )
    return kronecker.project_back(polar.orthogonalize_(adam, hyper.polar), state.bases)


def scaled_adam(
    direction: Tensor, unit: Tensor, scale: Tensor, exp_avg_sq: Tensor, step: Tensor, hyper: Hyper
) -> Tensor:
    """Adam with the gradients' scale taken out of the second moment, so that a jump of scale counts once.

        V <- b V + (1-b) K^2;   V <- max(V / mean(V), floor);   U = N / (r (sqrt(V) + eps))

    Args:
        direction: N, the bias-corrected momentum (B, ..).
        unit: K = G / r, the gradient at unit scale.
        scale: r (B,).
        exp_avg_sq: V, mutated.
        step: updates made, this one included.
        hyper: betas[1] and eps (relative).
    """
    old = kronecker.of_step(kronecker.warm_beta(hyper.betas[1]), step, unit)
    exp_avg_sq.mul_(old).add_(unit.square().mul_(1 - old))
    exp_avg_sq.div_(kronecker.column(exp_avg_sq.flatten(1).mean(1), unit)).clamp_min_(EXP_AVG_SQ_FLOOR)
    return direction / exp_avg_sq.sqrt().add_(hyper.eps).mul_(kronecker.column(scale, unit))


def start_as_released(state: SOAPState, grad: Tensor, hyper: Hyper) -> None:
    """The released code's first call: S = (1 - beta) G G^T and its eigenvectors; weights and moments stay."""
    kl_factors.start_in_eigenvectors(state, grad, [1 - hyper.factor_beta] * len(state.factors))


def update_as_released(state: SOAPState, grad: Tensor, hyper: Hyper) -> Tensor:
    """The released code's update: Adam with bias correction in the step size; eps absolute, beside the raw sqrt(v).

    U = sqrt(1 - beta2^t) / (1 - beta1^t) Q_a (m / (sqrt(v) + eps)) Q_b^T; the factors learn afterwards.
    """
    state.step.add_(1)
    beta1, beta2 = hyper.betas
    projected = kronecker.project(grad, state.bases)
    state.exp_avg.lerp_(projected, 1 - beta1)
    state.exp_avg_sq.mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
    adam = state.exp_avg / state.exp_avg_sq.sqrt().add_(hyper.eps)
    adam.mul_(kronecker.of_step(lambda t: (1 - beta2**t).sqrt() / (1 - beta1**t), state.step, adam))
    kronecker.learn_grams(
        state.factors, projected, state.step, kronecker.steady_beta(hyper.factor_beta), normalize=False
    )
    return kronecker.project_back(adam, state.bases)


def refresh_as_released(state: SOAPState, hyper: Hyper) -> None:
    """The released code's refresh: the basis is put in descending order of diag(S~) first, exp_avg_sq with it.

    With Pi the permutation, S~ Pi = O P (QR); Q <- Q O, S~ <- O^T S~ O, m <- m x_k O_k^T, v <- v x_k Pi_k^T.
    """
    for side, (factor, basis) in enumerate(zip(state.factors, state.bases, strict=True)):
        if factor is None or basis is None:
            continue
        order = factor.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        rotation = torch.linalg.qr(factor.take_along_dim(order[:, None, :], -1)).Q
        moved = rotation.mT @ factor @ rotation
        factor.copy_((moved + moved.mT) / 2)
        basis.copy_(kl_factors.without_drift(basis @ rotation, kl_factors.drift_is_due(state, hyper)))
        state.exp_avg.copy_(kronecker.multiply_side(state.exp_avg, rotation, side))
        state.exp_avg_sq.copy_(state.exp_avg_sq.take_along_dim(kronecker.along(order, side, state.exp_avg), side + 1))


FRESH = Rule(allocate, start, update, kl_factors.refresh, polar=True)
PAPER = as_released(allocate, start_as_released, update_as_released, refresh_as_released)
METHOD = Method("SOAP", {"fresh": FRESH, "paper": PAPER})
