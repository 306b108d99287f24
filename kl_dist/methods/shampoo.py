"""Shampoo with AdamW grafting: the direction of Shampoo, the length of AdamW's update of the same matrix.

    S_k <- beta S_k + (1 - beta) G_k G_k^T;   U = M x_1 S_1^-p .. x_K S_K^-p;   U <- U |A| / |U|

with A the AdamW direction of the same matrix, Frobenius norms per matrix, p = 1 / (2 K) by default (1/4 for a matrix).
The inverse roots are those of the last refresh. Nothing is resident: a function of S needs no basis to be kept.
Source: Gupta et al. (arXiv 1802.09568), Shi et al. (arXiv 2309.06497).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kl_dist.methods import averages, kronecker, linalg, roots
from kl_dist.methods.kronecker import Hyper
from kl_dist.methods.rule import Flops, Method, Rule, as_released
from kl_dist.methods.soap import learn_squares
from kl_dist.methods.state import ShampooState, Side, unstarted

DAMPING = 1e-4  # of the mean eigenvalue, under the root: singular factors give continuous roots
SMALLEST_SHIFT = 1e-30  # under the root, so that its products over both sides still fit into float32


def allocate(shape: Sequence[int], sides: Sequence[Side], batch: int, like: Tensor) -> ShampooState:
    """State of `batch` matrices of `shape`, before any gradient, with dtype and device of `like`."""

    def zeros(side: Side, d: int) -> Tensor | None:
        shapes = {"full": (batch, d, d), "diagonal": (batch, d)}
        return like.new_zeros(shapes[side]) if side in shapes else None

    factors, roots = (tuple(zeros(side, d) for d, side in zip(shape, sides, strict=True)) for _ in range(2))
    exp_avg = like.new_zeros(batch, *shape)
    return ShampooState(*unstarted(batch), exp_avg, exp_avg.clone(), factors, roots, like.new_zeros(batch))


def start(state: ShampooState, grad: Tensor, hyper: Hyper) -> None:
    """Factors from the first non-zero gradient at unit scale, and their inverse roots."""
    unit = averages.at_unit_scale(grad)
    kronecker.learn_grams(state.factors, unit, torch.empty_like(unit), keep=0.0)
    state.exp_avg_sq.fill_(1.0)
    refresh(state, hyper)


def update(state: ShampooState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """The update of one step, before the learning rate; eps is relative. Arguments as `kl_shampoo.update`."""
    state.step.add_(1)
    scale, change = averages.scale_without_spikes_(grad, state.grad_scale, state.step, hyper)
    keep = averages.of_step(averages.warm_beta(averages.lasting(hyper.factor_beta, hyper)), state.step, scale)
    kronecker.learn_grams(state.factors, grad, spare, keep, by=scale.reciprocal(), compute_dtype=hyper.compute_dtype)
    learn_squares(state.exp_avg_sq, grad, spare, scale, state.step, hyper)
    size = scale.reciprocal() * averages.correction(state.step, hyper, scale)
    direction = averages.momentum_(state.exp_avg, grad, state.step, hyper, change).mul_(kronecker.column(size, grad))
    adam = torch.div(direction, torch.sqrt(state.exp_avg_sq, out=spare).add_(hyper.eps), out=spare)
    return _grafted(direction, spare, state.inverse_roots, kronecker.norm(adam), hyper.compute_dtype)


def refresh(state: ShampooState, hyper: Hyper) -> None:
    """Inverse roots anew, with relative damping."""
    _renew_roots(state, hyper, DAMPING, 0.0)


def start_as_released(state: ShampooState, grad: Tensor, hyper: Hyper) -> None:
    """First call of recipe "paper": factors and inverse roots from the gradient as it is; weights and moments stay.

    Matrix by matrix, each copied out of its batch, as in `kl_factors.start_in_eigenvectors`.
    """
    for i, own_grad in enumerate(grad.split(1)):
        own = state.rows([i])
        own_grad = own_grad.clone()
        kronecker.learn_grams(own.factors, own_grad, torch.empty_like(own_grad), hyper.factor_beta, normalize=False)
        refresh_as_released(own, hyper)


def update_as_released(state: ShampooState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """The update of recipe "paper": grafted to AdamW with bias correction; the factors learn this gradient too."""
    state.step.add_(1)
    beta1, beta2 = hyper.betas
    state.exp_avg.lerp_(grad, 1 - beta1)
    state.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    kronecker.learn_grams(
        state.factors, grad, spare, hyper.factor_beta, normalize=False, compute_dtype=hyper.compute_dtype
    )
    first = averages.of_step(lambda t: 1 / (1 - beta1**t), state.step, grad)
    second = averages.of_step(lambda t: 1 / (1 - beta2**t), state.step, grad)
    root = torch.mul(state.exp_avg_sq, kronecker.column(second, grad), out=spare).sqrt_().add_(hyper.eps)
    adamw = torch.div(state.exp_avg, root, out=spare).mul_(kronecker.column(first, grad))
    return _grafted(grad.copy_(state.exp_avg), spare, state.inverse_roots, kronecker.norm(adamw), hyper.compute_dtype)


def refresh_as_released(state: ShampooState, hyper: Hyper) -> None:
    """Inverse roots anew, with the absolute damping eps."""
    _renew_roots(state, hyper, 0.0, hyper.eps)


def _renew_roots(state: ShampooState, hyper: Hyper, damping: float, eps: float) -> None:
    """S_k^-p with c = damping * (mean eigenvalue) + eps on every side."""
    exponent = hyper.shampoo_exponent or 1 / (2 * len(state.factors))
    for factor, root in zip(state.factors, state.inverse_roots, strict=True):
        if factor is None or root is None:
            continue
        eigenvalues = factor if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1)
        # never zero: after long enough without a gradient the factors underflow, and the graft cares not for the size
        shift = (damping * eigenvalues.mean(-1, keepdim=True) + eps).clamp_min(SMALLEST_SHIFT)
        if factor.ndim == 3:
            root.copy_(roots.inverse_root(factor, exponent, shift, damping))
        else:
            root.copy_((factor + shift).pow(-exponent))


def _grafted(
    direction: Tensor,
    spare: Tensor,
    inverse_roots: Sequence[Tensor | None],
    length: Tensor,
    compute_dtype: str | None,
) -> Tensor:
    """direction x_1 S_1^-p .. x_K S_K^-p with the Frobenius norm `length` (B,), in one of the two buffers."""
    for side, root in enumerate(inverse_roots):
        if root is None:
            continue
        if root.ndim == 3:
            direction, spare = kronecker.multiply_side(direction, root, side, spare, compute_dtype), direction
        else:
            direction.mul_(kronecker.along(root, side, direction))
    smallest = averages.smallest_scale(direction.dtype)
    largest = torch.abs(direction, out=spare).amax(tuple(range(1, direction.ndim)), keepdim=True)
    unit = direction.div_(largest.clamp_min_(smallest))
    return unit.mul_(kronecker.column(length / kronecker.norm(unit).clamp_min_(smallest), unit))


def flops(shape: Sequence[int], sides: Sequence[Side]) -> Flops:
    """For a block of N elements, a sum over its full sides of size d: gram and inverse root 4 N d in every step;
    eigh 9 d^3 (linalg.EIGH_SLOWNESS) and the root 2 d^3 in a refresh."""
    full = [d for d, side in zip(shape, sides, strict=True) if side == "full"]
    refresh = sum((9.0 * linalg.EIGH_SLOWNESS + 2) * d**3 for d in full)
    return Flops(sum(4.0 * math.prod(shape) * d for d in full), refresh)


FRESH = Rule(allocate, start, update, refresh, flops=flops)
PAPER = as_released(allocate, start_as_released, update_as_released, refresh_as_released, flops=flops)
METHOD = Method("Shampoo", {"fresh": FRESH, "paper": PAPER})
