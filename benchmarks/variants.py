"""KL-Shampoo with one of its choices made otherwise, to see what the choice is worth.

    python -m benchmarks.variants --run "--optimizer kl_shampoo" --grid recipe=fresh,stale_eigenvalues,one_refresh

is launch/compare.py with more recipes to choose from. Each is "fresh" but for one thing; none is part of the engine,
for what the study found to be worse, or no better and dearer, is no option a user should have to think about.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.refresh import rotation_by_products
from kl_dist.methods import Hyper, add_rule, averages, kl_factors, kl_shampoo, kronecker, linalg, rule
from kl_dist.methods.state import KLShampooState
from launch import compare


def stale_eigenvalues(state: KLShampooState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """The momentum is divided by the eigenvalues and the scale of the step before, as in the released code."""
    before = [None if x is None else x.rsqrt() for x in state.eigenvalues]
    scale = state.scale.clone()
    state.step.add_(1)
    projected, spare = kronecker.project(grad, spare, state.bases)
    now = kl_factors.learn(state, projected, spare, hyper)
    direction = averages.momentum(state.exp_avg, projected, state.step, hyper)
    steps = state.step - 1
    old = (scale / (1 - hyper.betas[1] ** steps.double()).to(scale)).sqrt()
    scale = torch.where(steps == 0, now, old)
    preconditioned = kronecker.scale_sides(direction, before, scale.reciprocal(), out=direction)
    return kronecker.project_back(preconditioned, spare, state.bases)


def unit_rms(state: KLShampooState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """Every update has the same size, an RMS of 0.2 as Adam's in a steady run has, as Muon's updates do."""
    update = kl_shampoo.update(state, grad, hyper, spare)
    return 0.2 * update / kronecker.column(averages.mean_square(update).sqrt().clamp_min(1e-15), update)


def one_refresh(state: KLShampooState, grad: Tensor, hyper: Hyper) -> None:
    """The start makes one refresh from the generic basis where "fresh" makes four."""
    kl_factors.start_bases(state, grad, 1)


def eigh_start(state: KLShampooState, grad: Tensor, hyper: Hyper) -> None:
    """The start takes the eigenvectors of the first gradient's factors, as the released code does."""
    kl_factors.start_bases(state, grad, 0)
    for factor, basis in zip(state.factors, state.bases, strict=True):
        if factor is not None and basis is not None:
            rotation = linalg.descending_eigenbasis(factor)
            factor.copy_(rotation.mT @ factor @ rotation)
            basis.copy_(basis @ rotation)


QR_STEPS = 50  # of a run, before `refresh_by_products`


def refresh_by_products(state: KLShampooState, hyper: Hyper) -> None:
    """After QR_STEPS steps a refresh turns the bases by `rotation_by_products`: products alone, no QR."""
    if bool((state.step <= QR_STEPS).any()):
        return kl_factors.refresh(state, hyper)
    for side, (factor, basis) in enumerate(zip(state.factors, state.bases, strict=True)):
        if factor is None or basis is None:
            continue
        turned = rotation_by_products(factor)
        moved = turned.mT @ factor @ turned
        factor.copy_(moved.add(moved.mT).mul_(0.5))
        basis.copy_(kl_factors.without_drift(basis @ turned, kl_factors.drift_is_due(state, hyper)))
        state.exp_avg.copy_(kronecker.multiply_side(state.exp_avg, turned, side))


def clipped(state: KLShampooState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """No entry of the whitened momentum, in the eigenbasis, is larger than 1."""
    update = kl_shampoo.update(state, grad, hyper, spare)
    inside, free = kronecker.project(update, torch.empty_like(update), state.bases)
    return kronecker.project_back(inside.clamp_(-1, 1), free, state.bases)


def sooner(state: KLShampooState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """What eigenvalues and factors started from is forgotten twice as fast: b(t) = min(beta, 1 - 2/(t+2))."""
    beta = min(hyper.factor_beta, 1 - 2 / (int(state.step[0]) + 3))
    return kl_shampoo.update(state, grad, replace(hyper, shampoo_beta=beta), spare)


FRESH = rule("kl_shampoo", "fresh")
VARIANTS = {
    "stale_eigenvalues": FRESH._replace(update=stale_eigenvalues),
    "unit_rms": FRESH._replace(update=unit_rms),
    "one_refresh": FRESH._replace(start=one_refresh),
    "eigh_start": FRESH._replace(start=eigh_start),
    "products": FRESH._replace(refresh=refresh_by_products),
    "clipped": FRESH._replace(update=clipped),
    "sooner": FRESH._replace(update=sooner),
}

# At import, so that the processes which make the runs know them too.
for name, variant in VARIANTS.items():
    add_rule("kl_shampoo", name, variant)

if __name__ == "__main__":
    sys.exit(compare.main())
