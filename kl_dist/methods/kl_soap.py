"""KL-SOAP: Adam in the eigenbasis of KL-Shampoo's Kronecker factors.

    m <- beta1 m + (1 - beta1) G~,   v <- beta2 v + (1 - beta2) G~^2,   U = Q_a (m / (sqrt(v) + eps)) Q_b^T

Letters: m exp_avg, v exp_avg_sq, G~ = Q_a^T G Q_b. At a refresh m moves with the basis, v does not. Source: Lin et al.,
ICLR 2026 (arXiv 2509.03378).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from kl_dist.methods import averages, kl_factors, kronecker, polar
from kl_dist.methods.kronecker import Hyper
from kl_dist.methods.rule import MEASURED, Method, Rule, as_released
from kl_dist.methods.soap import scaled_adam
from kl_dist.methods.state import KLSOAPState, Side, unstarted

START_REFRESHES = 1  # a basis made wholly from this gradient would leave rounding noise off the diagonal for Adam


def allocate(shape: Sequence[int], sides: Sequence[Side], batch: int, like: Tensor) -> KLSOAPState:
    """State of `batch` matrices of `shape`, before any gradient, with dtype and device of `like`."""
    factors, bases, eigenvalues = kl_factors.allocate_sides(shape, sides, batch, like)
    zeros, scale = like.new_zeros(batch, *shape), like.new_zeros(batch)
    return KLSOAPState(*unstarted(batch), zeros, factors, bases, eigenvalues, scale, zeros.clone(), scale.clone())


def start(state: KLSOAPState, grad: Tensor, hyper: Hyper) -> None:
    """Factors and eigenbases from the first non-zero gradient; the second moment starts at 1, its own mean."""
    kl_factors.start_bases(state, grad, START_REFRESHES)
    state.exp_avg_sq.fill_(1.0)


def update(state: KLSOAPState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """The update of one step, before the learning rate; eps is relative. Arguments as `kl_shampoo.update`."""
    state.step.add_(1)
    projected, spare = kronecker.project(grad, spare, state.bases, hyper.compute_dtype)
    kl_factors.learn(state, projected, spare, hyper)
    scale, change = averages.scale_without_spikes_(projected, state.grad_scale, state.step, hyper)
    adam = scaled_adam(state, projected, spare, scale, hyper, change)
    adam = polar.orthogonalize_as_asked_(adam, state.step, hyper, spare, hyper.betas[1])
    return kronecker.project_back(adam, spare, state.bases, hyper.compute_dtype)


def update_as_released(state: KLSOAPState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """The released code's update: Adam as above, without bias correction, eps absolute."""
    state.step.add_(1)
    projected, spare = kronecker.project(grad, spare, state.bases, hyper.compute_dtype)
    beta1, beta2 = hyper.betas
    state.exp_avg.lerp_(projected, 1 - beta1)
    state.exp_avg_sq.mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
    kl_factors.learn_as_released(state, projected, spare, hyper)
    root = torch.sqrt(state.exp_avg_sq, out=projected).add_(hyper.eps)
    adam = torch.div(state.exp_avg, root, out=spare)
    return kronecker.project_back(adam, projected, state.bases, hyper.compute_dtype)


FRESH = Rule(allocate, start, update, kl_factors.refresh, polar=True, defaults=MappingProxyType({"polar": polar.START}))
PAPER = as_released(allocate, kl_factors.start_as_released, update_as_released, kl_factors.refresh_as_released)
METHOD = Method("KL-SOAP", {"fresh": FRESH, "paper": PAPER}, from_adamw=MEASURED)
