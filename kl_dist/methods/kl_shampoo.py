"""KL-Shampoo: U = S_a^-1/2 M S_b^-1/2 with Kronecker factors that minimise a Kullback-Leibler divergence.

Resident in the eigenbasis, one projection of the gradient is all a step needs:

    G~ = Q_a^T G Q_b;   M~ <- beta1 M~ + (1 - beta1) G~;   U = Q_a (M~ / D) Q_b^T,   D_ij = sqrt(lambda_a,i lambda_b,j)

6 mn(m+n) flops for an m x n matrix. Recipe "fresh" goes on from S^-1/2 to S^-0.7: `beyond_whitening`. Letters:
M exp_avg, S factors, Q bases, lambda eigenvalues, v scale.
Source: Lin et al., "Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization", ICLR 2026.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from kl_dist.methods import averages, kl_factors, kronecker, polar
from kl_dist.methods.compact import compact
from kl_dist.methods.kronecker import Hyper
from kl_dist.methods.rule import MEASURED, Method, Rule, as_released
from kl_dist.methods.state import KLShampooState, Side, unstarted

START_REFRESHES = 4
EXPONENT_FLOOR = 0.1  # of the mean eigenvalue: below, no exponent but 1/2, for what is left there may be rounding noise


def allocate(shape: Sequence[int], sides: Sequence[Side], batch: int, like: Tensor) -> KLShampooState:
    """State of `batch` matrices of `shape`, before any gradient, with dtype and device of `like`."""
    factors, bases, eigenvalues = kl_factors.allocate_sides(shape, sides, batch, like)
    return KLShampooState(
        *unstarted(batch),
        like.new_zeros(batch, *shape),
        factors,
        bases,
        eigenvalues,
        like.new_zeros(batch),
    )


def start(state: KLShampooState, grad: Tensor, hyper: Hyper) -> None:
    """Factors and eigenbases from the first non-zero gradient; the first update follows in the same step."""
    kl_factors.start_bases(state, grad, START_REFRESHES)


def update(state: KLShampooState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """The update U of one step, before the learning rate; the factors already know this step's gradient.

        U = Q_a (t_a P t_b^T) Q_b^T,   P = N / (s sqrt(lambda_a lambda_b^T) (1 + eps)),   t_k ~ lambda_k^-(p - 1/2)

    with N the bias-corrected momentum, s the gradients' scale, so that U does not change when all gradients are
    multiplied by a constant, p the `shampoo_exponent`, and t from `beyond_whitening`. P is
    orthogonalised as `polar` says.

    Args:
        state: mutated.
        grad: G, (B, d_1..d_K), overwritten: see [Note: two buffers] in kronecker.py.
        hyper: eps is relative here.
        spare: like grad, overwritten.

    Returns:
        U, in the memory of one of the two.
    """
    state.step.add_(1)
    projected, spare = kronecker.project(grad, spare, state.bases, hyper.compute_dtype)
    before = state.scale.clone()
    scale = kl_factors.learn(state, projected, spare, hyper)
    change = averages.change_of_scale(before, state.scale, state.step, hyper)
    direction = averages.momentum_(state.exp_avg, projected, state.step, hyper, change)
    roots = [None if x is None else x.rsqrt() for x in state.eigenvalues]
    beyond = [None if x is None else beyond_whitening(x, hyper.shampoo_exponent or 0.5) for x in state.eigenvalues]
    both = [root if root is None or t is None else root.mul_(t) for root, t in zip(roots, beyond, strict=True)]
    size = scale.reciprocal() * (averages.correction(state.step, hyper, scale) / (1 + hyper.eps))
    whitened = kronecker.scale_sides(direction, both, size, out=direction)
    whitened = polar.orthogonalize_as_asked_(whitened, state.step, hyper, spare, hyper.factor_beta, beyond)
    return kronecker.project_back(whitened, spare, state.bases, hyper.compute_dtype)


def beyond_whitening(eigenvalues: Tensor, exponent: float) -> Tensor | None:
    """t of a side (B, d), max(lambda, EXPONENT_FLOOR)^-(p - 1/2) divided by its RMS; None where that is 1.

    lambda^-1/2 whitens the gradient's noise. Some of the way on from there to lambda^-1, where a natural gradient would
    be, what was white keeps its size, for t has a mean square of one.

    Args:
        eigenvalues: lambda, of unit mean.
        exponent: p.
    """
    if exponent == 0.5:
        return None
    further = eigenvalues.clamp_min(EXPONENT_FLOOR).pow_(0.5 - exponent)
    size = torch.linalg.vector_norm(further, dim=-1, keepdim=True) / further.shape[-1] ** 0.5
    return further.div_(size)


def update_as_released(state: KLShampooState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """The released code's update: U = Q_a (M~ / (D + eps)) Q_b^T with the eigenvalues of the step before.

    No bias correction, no Nesterov momentum; eps is absolute. Arguments as `update`.
    """
    state.step.add_(1)
    projected, spare = kronecker.project(grad, spare, state.bases, hyper.compute_dtype)
    state.exp_avg.lerp_(projected, 1 - hyper.betas[0])
    roots = [None if x is None else x.sqrt() for x in state.eigenvalues]
    kl_factors.learn_as_released(state, projected, spare, hyper)
    root = kronecker.scale_sides(projected.fill_(1.0), roots, 1.0, out=projected)
    preconditioned = torch.div(state.exp_avg, root.add_(hyper.eps), out=spare)
    return kronecker.project_back(preconditioned, projected, state.bases, hyper.compute_dtype)


FRESH = Rule(
    allocate,
    start,
    update,
    kl_factors.refresh,
    polar=True,
    defaults=MappingProxyType(
        {"betas": (0.9, 0.9), "final_beta1": 0.99, "polar": polar.START, "shampoo_exponent": 0.7}
    ),
)
PAPER = as_released(allocate, kl_factors.start_as_released, update_as_released, kl_factors.refresh_as_released)
METHOD = Method("KL-Shampoo", {"fresh": FRESH, "paper": PAPER, "compact": compact(FRESH, "fresh")}, from_adamw=MEASURED)
