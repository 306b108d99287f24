"""KL-Shampoo with one of its choices made otherwise, to see what the choice is worth.

    python -m benchmarks.variants --run "--optimizer kl_shampoo --set shampoo_exponent=0.5" \
        --grid recipe=fresh,stale_eigenvalues,one_refresh

is launch/compare.py with more recipes to choose from. Each is "fresh" but for one thing; none is part of the engine,
for what the study found to be worse, or no better and dearer, is no option a user should have to think about.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.refresh import rotation_by_products
from kl_dist.methods import (
    Hyper,
    MatrixState,
    Side,
    add_rule,
    averages,
    kl_factors,
    kl_shampoo,
    kronecker,
    linalg,
    products,
    roots,
    rule,
)
from kl_dist.methods.state import KLShampooState, unstarted
from launch import compare

Update = Callable[[KLShampooState, Tensor, Hyper, Tensor], Tensor]
ROOT_DAMPING = 1e-4  # c of an iterated root, of factors whose mean eigenvalue is 1


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


def refresh_by_products(compute_dtype: str) -> Callable[[KLShampooState, Hyper], None]:
    """After QR_STEPS steps a refresh turns the bases by `rotation_by_products`: products alone, no QR.

    Args:
        compute_dtype: of all products but the rotation's last and those with the basis.
    """

    def refresh(state: KLShampooState, hyper: Hyper) -> None:
        if bool((state.step <= QR_STEPS).any()):
            return kl_factors.refresh(state, hyper)
        for side, (factor, basis) in enumerate(zip(state.factors, state.bases, strict=True)):
            if factor is None or basis is None:
                continue
            turned = rotation_by_products(factor, compute_dtype)
            moved = products.product(factor, turned, compute_dtype, torch.empty_like(factor))
            moved = products.product(turned.mT, moved, compute_dtype, torch.empty_like(factor))
            factor.copy_(moved.add(moved.mT).mul_(0.5))
            basis.copy_(kl_factors.without_drift(basis @ turned, kl_factors.drift_is_due(state, hyper)))
            state.exp_avg.copy_(kronecker.multiply_side(state.exp_avg, turned, side, None, compute_dtype))

    return refresh


def clipped(state: KLShampooState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """No entry of the whitened momentum, in the eigenbasis, is larger than 1."""
    update = kl_shampoo.update(state, grad, hyper, spare)
    inside, free = kronecker.project(update, torch.empty_like(update), state.bases)
    return kronecker.project_back(inside.clamp_(-1, 1), free, state.bases)


def sooner(times: int) -> Update:
    """What eigenvalues and factors started from is forgotten faster: b(t) = min(beta, 1 - times / (t + times))."""

    def update(state: KLShampooState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
        beta = min(hyper.factor_beta, 1 - times / (int(state.step[0]) + 1 + times))
        return kl_shampoo.update(state, grad, replace(hyper, shampoo_beta=beta), spare)

    return update


LONGER_AFTER = 1000  # updates, from which on `longer_memory` remembers longer


def longer_memory(state: KLShampooState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """All averages lengthen with the run: beta(t) = 1 - (1 - beta) / min(2, max(1, sqrt(t / LONGER_AFTER)))."""
    longer = min(2.0, max(1.0, ((int(state.step[0]) + 1) / LONGER_AFTER) ** 0.5))
    first, second = (1 - (1 - beta) / longer for beta in hyper.betas)
    return kl_shampoo.update(state, grad, replace(hyper, betas=(first, second), final_beta1=None), spare)


@dataclass
class InverseRootsState(MatrixState):
    """KL-Shampoo's in the original coordinates: nothing waits for a refresh."""

    scale: Tensor  # (B,)
    factors: tuple[Tensor, ...]  # (B, d, d) a side, of unit mean diagonal
    roots: tuple[Tensor, ...]  # their inverse square roots


def allocate_roots(shape: Sequence[int], sides: Sequence[Side], batch: int, like: Tensor) -> InverseRootsState:
    factors, roots = ([like.new_zeros(batch, d, d) for d in shape] for _ in range(2))
    return InverseRootsState(
        *unstarted(batch), like.new_zeros(batch, *shape), like.new_zeros(batch), tuple(factors), tuple(roots)
    )


def start_roots(state: InverseRootsState, grad: Tensor, hyper: Hyper) -> None:
    """Factors of the first gradient, damped as a refresh is."""
    unit = averages.at_unit_scale(grad)
    for side, (factor, root) in enumerate(zip(state.factors, state.roots, strict=True)):
        factor.copy_(kl_factors.DAMPING * torch.eye(factor.shape[-1]))
        share = (factor.shape[-1] / kronecker.numel(grad)) ** 0.5
        kronecker.add_gram(factor, share * unit, side, factor.new_ones(len(factor), 1))
        root.copy_(exact_root(factor))


def zero_staleness(
    state: InverseRootsState, grad: Tensor, hyper: Hyper, spare: Tensor, inverse_root: Callable[[Tensor], Tensor]
) -> Tensor:
    """U = S_a^-1/2 N S_b^-1/2 / s with roots, made anew in every step, of factors that know this very gradient.

    By `exact_root` that is what an iteration for them would come to at its best, whatever it costs; by
    `iterated_root` it is one. Source: Zhang et al., "Online KL Shampoo" (Tilde Research, 2026), but for the scale
    beside factors of unit mean, the start and the averages, which are those of "fresh".
    """
    state.step.add_(1)

    def on_sides(x: Tensor, left_out: int | None = None) -> Tensor:
        for side, root in enumerate(state.roots):
            x = x if side == left_out else kronecker.multiply_side(x, root, side)
        return x

    scale = averages.tracked_scale(state.scale, averages.mean_square(on_sides(grad)), state.step, hyper.betas[1])
    column = scale[:, None]
    keep = kronecker.column(averages.of_step(averages.warm_beta(hyper.factor_beta), state.step, scale), column)
    whitened = [on_sides(grad, side) for side in range(len(state.factors))]
    for side, factor in enumerate(state.factors):
        share = (1 - keep) * (factor.shape[-1] / kronecker.numel(grad)) / column**2
        rows = whitened[side] * kronecker.column(share[:, 0].sqrt(), grad)
        kronecker.add_gram(factor, rows, side, keep)
        factor.div_(factor.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None])
        state.roots[side].copy_(inverse_root(factor))
    direction = averages.momentum(state.exp_avg, grad, state.step, hyper)
    return on_sides(direction) / kronecker.column(scale, grad)


def exact_root(factor: Tensor) -> Tensor:
    """S^-1/2 of each (B, d, d), its eigenvalues above the floor of all that learn eigenvalues."""
    eigenvalues, basis = torch.linalg.eigh(factor.double())
    floor = kl_factors.EIGENVALUE_FLOOR * eigenvalues.mean(-1, keepdim=True)
    return ((basis * eigenvalues.maximum(floor).rsqrt()[:, None]) @ basis.mT).to(factor.dtype)


def iterated_root(factor: Tensor) -> Tensor:
    """(S + c I)^-1/2 of each, c relative, by a coupled Newton iteration: products of d x d, no eigendecomposition."""
    return roots.by_products(factor, 2, ROOT_DAMPING, ROOT_DAMPING)


FRESH = rule("kl_shampoo", "fresh")
FRESH_ROOTS = FRESH._replace(
    allocate=allocate_roots,
    start=start_roots,
    refresh=None,
    working_copies=8,
    polar=False,
    defaults={key: value for key, value in FRESH.defaults.items() if key != "polar"},
)
VARIANTS = {
    "stale_eigenvalues": FRESH._replace(update=stale_eigenvalues),
    "unit_rms": FRESH._replace(update=unit_rms),
    "one_refresh": FRESH._replace(start=one_refresh),
    "eigh_start": FRESH._replace(start=eigh_start),
    "products": FRESH._replace(refresh=refresh_by_products("float32")),
    "products_in_tf32": FRESH._replace(refresh=refresh_by_products("tf32")),
    "clipped": FRESH._replace(update=clipped),
    "sooner": FRESH._replace(update=sooner(2)),
    "sooner_yet": FRESH._replace(update=sooner(3)),
    "longer_memory": FRESH._replace(update=longer_memory),
    "zero_staleness": FRESH_ROOTS._replace(update=partial(zero_staleness, inverse_root=exact_root)),
    "online": FRESH_ROOTS._replace(update=partial(zero_staleness, inverse_root=iterated_root)),
}

# At import, so that the processes which make the runs know them too.
for name, variant in VARIANTS.items():
    add_rule("kl_shampoo", name, variant)

if __name__ == "__main__":
    sys.exit(compare.main())
