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

GROWTH = 20  # the share of the updates made that a momentum remembers at most is one in so many
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


def warm_beta(beta: float | OfStep) -> OfStep:
    """b(t) = min(beta, 1 - 1/(t+1)): a plain average at first, so that no start value outlives its turn."""
    of = beta if callable(beta) else lambda t: beta
    return lambda t: min(of(t), 1 - 1 / (t + 1))


def lasting(beta: float, hyper: Hyper) -> OfStep:
    """b(t) = beta, but at least beta1(t)^2 where beta1 has grown: of second moments that the momentum is divided by.

    Else they would forget a large gradient before the momentum has: where directions fall silent M would grow beside
    sqrt(v) by beta1 / sqrt(b) a step.
    """
    share = newest(hyper)
    return lambda t: max(beta, (1 - share(t)) ** 2) if has_grown(hyper)(t) else beta


def has_grown(hyper: Hyper) -> Callable[[int], bool]:
    """Whether beta1(t) is above beta1."""
    share = newest(hyper)
    return lambda t: share(t) < 1 - hyper.betas[0]


def change_of_scale(before: Tensor, now: Tensor, step: Tensor, hyper: Hyper) -> Tensor | None:
    """r = s_t / s_(t-1) (B,) where beta1 has grown, else 1; None: of all.

    Times r in each step, M / s is the average of gradients that were each divided by the scale of their own step. The
    scale can keep its short memory so: where gradients fall silent M / s fades, as fast as M.

    Args:
        before: v of the step before, (B,).
        now: v of this step.
        step: t (B,).
        hyper: betas[0] and final_beta1.
    """
    grown = [has_grown(hyper)(t) for t in step.tolist()]
    if not any(grown):
        return None
    smallest = smallest_scale(now.dtype) ** 2
    change = (now.clamp_min(smallest) / before.clamp_min(smallest)).sqrt_()
    return change if all(grown) else torch.where(torch.tensor(grown).to(change.device), change, 1.0)


def momentum_(exp_avg: Tensor, grad: Tensor, step: Tensor, hyper: Hyper, change: Tensor | None = None) -> Tensor:
    """M <- (1 - a) r M + a G; returns N = (1 - c) M + c G if Nesterov's, else M, in the place of `grad`.

    a from `newest`, c from `ahead`, r (B,) from `change_of_scale`, None where it is 1; not bias-corrected: see
    `correction`.
    """
    if change is not None:
        exp_avg.mul_(column(change, exp_avg))
    exp_avg.lerp_(grad, column(of_step(newest(hyper), step, grad), grad))
    if not hyper.nesterov:
        return grad.copy_(exp_avg)
    return grad.lerp_(exp_avg, column(of_step(lambda t: 1 - ahead(newest(hyper)(t), hyper), step, grad), grad))


def newest(hyper: Hyper) -> OfStep:
    """a(t) = 1 - beta1(t), beta1(t) = max(beta1, min(final_beta1, 1 - GROWTH / t)), the newest gradient's share of M.

    So that M remembers a twentieth of the updates made, but no fewer than beta1 does and no more than final_beta1.
    """
    shortest, longest = hyper.betas[0], hyper.final_beta1
    if longest is None or longest <= shortest:
        return lambda t: 1 - shortest
    return lambda t: min(1 - shortest, max(1 - longest, GROWTH / t))


def ahead(a: float, hyper: Hyper) -> float:
    """c, G's share of N = (1 - c) M + c G beside its share a of M: 1 - beta1 as long as a is, Nesterov's.

    Beyond, the one that leaves N as noisy, so that the best learning rate stays where it is: of independent gradients
    of variance 1 M has the variance v = a / (2 - a), and N

        c^2 + 2 c (1 - c) a + (1 - c)^2 v,

    which shall be what it is at a = c = 1 - beta1. A long memory alone would answer too late; the gradient itself
    keeps N at hand, as in accelerated SGD.
    Source: Morwani et al., "Connections between Schedule-Free Optimizers, AdEMAMix, and Accelerated SGD Variants"
    (arXiv 2502.02431), which decouples the two shares.
    """
    first = 1 - hyper.betas[0]
    if a >= first:
        return first
    noise = first**2 * (3 - 2 * first) + (1 - first) ** 2 * first / (2 - first)
    v = a / (2 - a)
    square, half = 1 - 2 * a + v, a - v
    return (math.sqrt(half**2 + square * (noise - v)) - half) / square


def correction(step: Tensor, hyper: Hyper, like: Tensor) -> float | Tensor:
    """What makes the momentum's weights add up to 1: 1 / (1 - beta1^t), or 1 / (1 - beta1^(t+1)) if Nesterov's.

    Where beta1 grows, it does so after GROWTH / (1 - beta1) updates, when 2e-9 is left to correct.
    """
    return of_step(lambda t: 1 / (1 - hyper.betas[0] ** (t + hyper.nesterov)), step, like)


def momentum(exp_avg: Tensor, grad: Tensor, step: Tensor, hyper: Hyper) -> Tensor:
    """`momentum_`, bias-corrected; in the place of `grad`."""
    return momentum_(exp_avg, grad, step, hyper).mul_(column(correction(step, hyper, grad), grad))


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
    share = scale.clamp_min(smallest) * limit / mean_squares.clamp_min(smallest)
    return share.clamp_(torch.finfo(share.dtype).tiny, 1.0)  # a share of 0 would let nothing through for ever


def scale_without_spikes_(x: Tensor, scale: Tensor, step: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor | None]:
    """x <- sqrt(p) x of each matrix, p from `share_of_spike`.

    Returns:
        `tracked_scale` of mean(x^2) then, (B,), and its `change_of_scale`.
    """
    before, mean_squares, beta = scale.clone(), mean_square(x), hyper.betas[1]
    share = share_of_spike(scale, mean_squares, step, beta)
    if share is not None:
        x.mul_(column(share.sqrt(), x))
        mean_squares.mul_(share)
    now = tracked_scale(scale, mean_squares, step, beta)
    return now, change_of_scale(before, scale, step, hyper)


def cut_spikes_by_momentum_(grad: Tensor, exp_avg: Tensor, step: Tensor, hyper: Hyper) -> None:
    """grad <- sqrt(p) grad, where no scale is tracked: s' is of gradients that as noise would have left this momentum.

    mean(exp_avg^2) = (1 - beta1^(2 t)) (1 - beta1) / (1 + beta1) s'^2 in the mean, after t gradients that are
    independent, and more where they agree. Where beta1 grows that is its value now, to 3 %.
    """
    a = newest(hyper)
    noise = mean_square(exp_avg).mul_(of_step(lambda t: (2 - a(t)) / a(t), step, exp_avg))
    share = share_of_spike(noise, mean_square(grad), step, hyper.betas[0] ** 2)
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
