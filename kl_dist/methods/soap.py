"""SOAP: Adam in the eigenbasis of Shampoo's Kronecker factors.

    S_a <- beta2 S_a + (1 - beta2) G G^T;   S_b likewise with G^T G;   U = Q_a Adam(Q_a^T G Q_b) Q_b^T

Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam" (arXiv 2409.11321) and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from kl_dist.methods import averages, kl_factors, kronecker, polar
from kl_dist.methods.kronecker import Hyper
from kl_dist.methods.rule import MEASURED, Method, Rule, as_released
from kl_dist.methods.state import KLSOAPState, Side, SOAPState, unstarted

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


def update(state: SOAPState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """The update of one step, before the learning rate; eps is relative. Arguments as `kl_shampoo.update`."""
    state.step.add_(1)
    projected, spare = kronecker.project(grad, spare, state.bases, hyper.compute_dtype)
    scale, change = averages.scale_without_spikes_(projected, state.grad_scale, state.step, hyper)
    keep = averages.of_step(averages.warm_beta(averages.lasting(hyper.factor_beta, hyper)), state.step, scale)
    kronecker.learn_grams(
        state.factors, projected, spare, keep, by=scale.reciprocal(), compute_dtype=hyper.compute_dtype
    )
    adam = scaled_adam(state, projected, spare, scale, hyper, change)
    adam = polar.orthogonalize_as_asked_(adam, state.step, hyper, spare, hyper.betas[1])
    return kronecker.project_back(adam, spare, state.bases, hyper.compute_dtype)


def scaled_adam(
    state: SOAPState | KLSOAPState, grad: Tensor, spare: Tensor, scale: Tensor, hyper: Hyper, change: Tensor | None
) -> Tensor:
    """Adam with the gradients' scale taken out of the second moment, so that a jump of scale counts once.

        V <- b V + (1-b) (G / r)^2;   V <- max(V / mean(V), floor);   U = N / (r (sqrt(V) + eps))

    with N the bias-corrected momentum.

    Args:
        state: exp_avg_sq (V) and exp_avg are mutated; `step` counts this step already.
        grad: G (B, ..), overwritten by what is returned.
        spare: overwritten.
        scale: r (B,).
        hyper: betas and eps (relative).
        change: r / r of the step before (B,), or None: `averages.change_of_scale`.
    """
    learn_squares(state.exp_avg_sq, grad, spare, scale, state.step, hyper)
    direction = averages.momentum_(state.exp_avg, grad, state.step, hyper, change)
    size = scale.reciprocal() * averages.correction(state.step, hyper, scale)
    return direction.div_(torch.sqrt(state.exp_avg_sq, out=spare).add_(hyper.eps)).mul_(kronecker.column(size, grad))


def learn_squares(exp_avg_sq: Tensor, grad: Tensor, spare: Tensor, scale: Tensor, step: Tensor, hyper: Hyper) -> None:
    """V <- b V + (1-b) (G / r)^2;   V <- max(V / mean(V), floor). Mutates V and `spare`."""
    keep = averages.of_step(averages.warm_beta(averages.lasting(hyper.betas[1], hyper)), step, scale)
    unit = torch.mul(grad, kronecker.column((1 - keep) ** 0.5 / scale, grad), out=spare)
    exp_avg_sq.mul_(kronecker.column(keep, unit)).addcmul_(unit, unit)
    exp_avg_sq.div_(kronecker.column(exp_avg_sq.flatten(1).mean(1), unit)).clamp_min_(EXP_AVG_SQ_FLOOR)


def start_as_released(state: SOAPState, grad: Tensor, hyper: Hyper) -> None:
    """The released code's first call: S = (1 - beta) G G^T and its eigenvectors; weights and moments stay."""
    kl_factors.start_in_eigenvectors(state, grad, [1 - hyper.factor_beta] * len(state.factors))


def update_as_released(state: SOAPState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """The released code's update: Adam with bias correction in the step size; eps absolute, beside the raw sqrt(v).

    U = sqrt(1 - beta2^t) / (1 - beta1^t) Q_a (m / (sqrt(v) + eps)) Q_b^T; the factors learn this gradient too.
    """
    state.step.add_(1)
    beta1, beta2 = hyper.betas
    projected, spare = kronecker.project(grad, spare, state.bases, hyper.compute_dtype)
    state.exp_avg.lerp_(projected, 1 - beta1)
    state.exp_avg_sq.mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
    kronecker.learn_grams(
        state.factors, projected, spare, hyper.factor_beta, normalize=False, compute_dtype=hyper.compute_dtype
    )
    root = torch.sqrt(state.exp_avg_sq, out=projected).add_(hyper.eps)
    size = averages.of_step(lambda t: math.sqrt(1 - beta2**t) / (1 - beta1**t), state.step, root)
    adam = torch.div(state.exp_avg, root, out=spare).mul_(kronecker.column(size, root))
    return kronecker.project_back(adam, projected, state.bases, hyper.compute_dtype)


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


FRESH = Rule(allocate, start, update, kl_factors.refresh, polar=True, defaults=MappingProxyType({"polar": polar.START}))
PAPER = as_released(allocate, start_as_released, update_as_released, refresh_as_released)
METHOD = Method("SOAP", {"fresh": FRESH, "paper": PAPER}, from_adamw=MEASURED)
