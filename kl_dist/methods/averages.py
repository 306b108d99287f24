"""Exponential moving averages, and the scalars that a step multiplies with.

A coefficient is a Python number where all matrices of a batch are at the same step, as they nearly always are: that
costs no transfer to a device. Otherwise it is one value per matrix (B,). `column` makes either fit a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kl_dist.methods.kronecker import Hyper, column, numel

OfStep = Callable[[int], float]
"""A coefficient as a function of t, the updates made."""

SPIKE = 10.0  # times the tracked scale: a gradient beyond that is cut down to it


def of_step(function: OfStep, step: Tensor, like: Tensor) -> float | Tensor:
    """The coefficient of every matrix: one number, or (B,) with dtype and device of `like` where they differ.

    Args:
        function: of t.
        step: t of every matrix, (B,) on the CPU.
        like: any tensor of the batch's state.
    """
    counts = step.tolist()
    if counts.count(counts[0]) == len(counts):
        return function(counts[0])
    return torch.tensor([function(t) for t in counts], dtype=torch.float64).to(like.device, like.dtype)


def warm_beta(beta: float) -> OfStep:
    """b(t) = min(beta, 1 - 1/(t+1)): a plain average at first, so that no start value outlives its turn."""
    return lambda t: min(beta, 1 - 1 / (t + 1))


def momentum_(exp_avg: Tensor, grad: Tensor, hyper: Hyper) -> Tensor:
    """exp_avg <- beta1 exp_avg + (1 - beta1) grad; returns it, one step ahead if Nesterov's, in the place of `grad`.

    exp_avg, or beta1 exp_avg + (1 - beta1) grad; not bias-corrected: see `correction`.
    """
    beta1 = hyper.betas[0]
    exp_avg.lerp_(grad, 1 - beta1)
    return grad.lerp_(exp_avg, beta1) if hyper.nesterov else grad.copy_(exp_avg)


def correction(step: Tensor, hyper: Hyper, like: Tensor) -> float | Tensor:
    """What makes the momentum's weights add up to 1: 1 / (1 - beta1^t), or 1 / (1 - beta1^(t+1)) if Nesterov's."""
    return of_step(lambda t: 1 / (1 - hyper.betas[0] ** (t + hyper.nesterov)), step, like)


def momentum(exp_avg: Tensor, grad: Tensor, step: Tensor, hyper: Hyper) -> Tensor:
    """`momentum_`, bias-corrected; in the place of `grad`."""
    return momentum_(exp_avg, grad, hyper).mul_(column(correction(step, hyper, grad), grad))


def tracked_scale(scale: Tensor, mean_squares: Tensor, step: Tensor, beta: float) -> Tensor:
    """scale <- beta scale + (1 - beta) mean_squares; returns sqrt(scale / (1 - beta^t)), (B,), never zero."""
    scale.lerp_(mean_squares, 1 - beta)
    corrected = scale * of_step(lambda t: 1 / (1 - beta**t), step, scale)
    return corrected.sqrt_().clamp_min_(smallest_scale(scale.dtype))


def share_of_spike(scale: Tensor, mean_squares: Tensor, step: Tensor, beta: float) -> Tensor | None:
    """p = min(1, SPIKE s' / r)^2 (B,), what is let through of gradients of RMS r where those before had s'; None: all.

    With s' = sqrt(scale / (1 - beta^(t-1))) of the step before; the first gradient has none, and passes. What is let
    through is a continuous function of the gradient, and does not change when all gradients are multiplied alike.

    Why: one gradient a million times the others would be in the momentum, beta1^n of it, and in the scale for hundreds
    of steps, in which nothing is learnt. So cut, a lasting jump is still followed, by a factor of sqrt(1 + 99 (1 -
    beta)) a step, and what passes leaves within a few lifetimes of the averages.
    """
    limit = of_step(lambda t: SPIKE**2 / (1 - beta ** (t - 1)) if t > 1 else math.inf, step, scale)
    if scale.device.type == "cpu" and not bool((mean_squares > scale * limit).any()):
        return None
    smallest = smallest_scale(scale.dtype) ** 2
    return (scale.clamp_min(smallest) * limit / mean_squares.clamp_min(smallest)).clamp_max_(1.0)


def scale_without_spikes_(x: Tensor, scale: Tensor, step: Tensor, beta: float) -> Tensor:
    """x <- sqrt(p) x of each matrix, p from `share_of_spike`; returns `tracked_scale` of mean(x^2) then, (B,)."""
    mean_squares = mean_square(x)
    share = share_of_spike(scale, mean_squares, step, beta)
    if share is not None:
        x.mul_(column(share.sqrt(), x))
        mean_squares.mul_(share)
    return tracked_scale(scale, mean_squares, step, beta)


def cut_spikes_by_momentum_(grad: Tensor, exp_avg: Tensor, step: Tensor, hyper: Hyper) -> None:
    """grad <- sqrt(p) grad, where no scale is tracked: s' is of gradients that as noise would have left this momentum.

    mean(exp_avg^2) = (1 - beta1^(2 t)) (1 - beta1) / (1 + beta1) s'^2 in the mean, after t gradients that are
    independent, and more where they agree.
    """
    beta1 = hyper.betas[0]
    noise = mean_square(exp_avg).mul_((1 + beta1) / (1 - beta1))
    share = share_of_spike(noise, mean_square(grad), step, beta1**2)
    if share is not None:
        grad.mul_(column(share.sqrt_(), grad))


def mean_square(x: Tensor) -> Tensor:
    """mean(x^2) of each matrix, (B,)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).square_() / numel(x)


def at_unit_scale(x: Tensor) -> Tensor:
    """x / RMS(x), matrix by matrix, computed so that no square over- or underflows."""
    x = x / x.abs().amax(tuple(range(1, x.ndim)), keepdim=True)
    return x / column(mean_square(x).sqrt(), x)


def smallest_scale(dtype: torch.dtype) -> float:
    """The smallest gradient worth dividing by: its square is still a normal number."""
    return 1e-100 if dtype == torch.float64 else 1e-15


def largest_gradient(dtype: torch.dtype) -> float:
    """A gradient beyond this is treated as not finite: whitened and squared it would overflow."""
    return 1e100 if dtype == torch.float64 else 1e12
