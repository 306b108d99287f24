"""Orthogonalisation after whitening: option `polar`, the number of Newton-Schulz steps towards the polar factor.

With P, the whitened momentum of a block in its eigenbasis, m x n and m <= n (else its transpose),

    X_0 = P / t,   t = |(P P^T)^2|_F^1/4;       X_k+1 = a_k X_k + (b_k A + c_k A^2) X_k,   A = X_k X_k^T
    P' = X_K |P|_F / |X_K|_F;                   U = Q_a (r_a P' r_b^T) Q_b^T

A step turns each singular value s into a s + b s^3 + c s^5 and leaves the singular vectors, so P' is near the polar
factor of P, at P's norm. It commutes with the bases: no projection is added. t is the norm of the singular values to
the power of 8, at least the largest and at most d^1/8 of it, and comes with the first step's products. What KL-Shampoo
scales by beyond whitening, r_a and r_b for an exponent other than 1/2, comes after: orthogonalised it would be lost.

"start", the default, is for a matrix's first T - 1 updates alone:

    P <- P + a (START_LENGTH P' - P),   a = 1 - (t/T)^2,   t < T

Eigenvalues begin equal and take that long to come to their own. Until then weak directions are divided by too much, and
what gradients turn to, which is divided on both sides by what they were in it before, is overshot; P' moves all as far.
It fades, so that nothing jumps when eigenvalues take over.

P's singular values are not those of a raw momentum, and the steps are fitted to them: the odd quintics whose
composition is nearest to 1 on [l, 1], l from LOWER_ENDS. Two then do what three of Muon's do, three what five do.

A singular value of 0 stays 0, and none grows by more than GROWTH, nearly the product of the a_k: the null space of a
rank-deficient gradient stays as small as rounding left it, times that. But a few hundred directions of it, each a
hundredth of the signal then, would be most of P'. So the last step of a start has a = 0: what is below t / 800 shrinks.
Blocks of one or of three and more sides are left as they are. Source: Amsel et al., "The Polar Express" (arXiv
2505.16932); benchmarks/polar.py makes the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from kl_dist.methods import averages, kronecker, quintic
from kl_dist.methods.kronecker import Hyper, Polar

START: Final = "start"
START_LENGTH = 1.25
"""Of P' beside P. At P's own norm strong directions, which alone move where the learning rate is low, are made so short
that such runs end higher; at 1.4 times it short runs at the best rates do (docs/learning.md)."""
START_LIFETIMES, START_AT_MOST = 5, 750
"""How long, in lifetimes of the averages that P is divided by, and at most: a 500th or less is left of what these began
with."""

LOWER_ENDS = {1: 0.15, 2: 0.07, 3: 0.025, 4: 0.01, 5: 0.01}
"""l by number of steps: of those tried, that which aligns P' best with the polar factor in training, of a GPT of width
64 at 1,024 and at 8,192 bytes a step. At either, half of all s / t lie between 0.14 and 0.5, and a twentieth below
0.023. Five steps from 0.003 would be aligned better by 0.001, and GROWTH would be doubled."""

COEFFICIENTS: dict[int, tuple[tuple[float, float, float], ...]] = {
    1: ((4.811113, -10.848687, 7.351964),),
    2: ((6.237570, -16.341615, 11.673001), (2.317097, -1.683620, 0.420399)),
    3: ((7.532763, -21.412573, 15.691826), (3.054176, -2.288511, 0.487458), (2.114614, -1.496300, 0.400362)),
    4: (
        (8.093369, -23.620430, 17.446152),
        (3.636586, -2.721927, 0.536546),
        (2.661300, -1.977155, 0.452616),
        (1.956172, -1.337508, 0.383853),
    ),
}
COEFFICIENTS[5] = (*COEFFICIENTS[4], (1.875166, -1.250184, 0.375018))
"""(a, b, c) of each step, by number of steps."""

START_LOWER_END = 0.015
START_COEFFICIENTS = (
    (7.897655, -22.848975, 16.832932),
    (3.406791, -2.554052, 0.517480),
    (2.383019, -1.741878, 0.426726),
    (0.0, 5 / 2, -3 / 2),
)
"""Of a start: three fitted to [START_LOWER_END, 1], and one that has no slope at 0, nor at 1."""

GROWTH = {1: 6, 2: 17, 3: 52, 4: 156, 5: 288}
"""What a singular value of P can grow by at most, by number of steps; each step beyond the fifth adds a factor 15/8."""

PLACES = 3
"""As large as what is orthogonalised: the other buffer of each Newton-Schulz step, its A, and P itself for "start"."""

SMALLEST_BOUND = 1e-3  # t of a matrix of unit norm is d^-3/8 or more; of zero it is 0

LAST = (15 / 8, -10 / 8, 3 / 8)
"""Of every step beyond the fifth: the quintic that converges fastest from near 1."""


def coefficients(steps: Polar) -> tuple[tuple[float, float, float], ...]:
    """(a, b, c) of each of `steps` steps, or of those of a start."""
    if isinstance(steps, str):
        return START_COEFFICIENTS
    fitted = COEFFICIENTS[min(steps, max(COEFFICIENTS))]
    return fitted + (LAST,) * (steps - len(fitted))


def orthogonalize_as_asked_(
    whitened: Tensor, step: Tensor, hyper: Hyper, spare: Tensor, memory: float, beyond: Sequence[Tensor | None] = ()
) -> Tensor:
    """`orthogonalize_` as `hyper.polar` says, of those matrices whose number of updates it says it for.

    Args:
        whitened: P (B, m, n), overwritten by P'; of any other number of sides it is left as it is.
        step: t of each, this update counted (B,), on the CPU.
        spare: like P, overwritten.
        memory: beta of the averages that P was divided by, by which a start is as long.
        beyond: what P is scaled by on each side (B, d) beside what whitens it; taken off before, and put on after.
    """
    if not hyper.polar or whitened.ndim != 3:
        return whitened
    last = start_updates(memory) if isinstance(hyper.polar, str) else math.inf
    due = [row for row, t in enumerate(step.tolist()) if t <= last]
    for rows in _neighbours(due, orthogonalized_at_once(len(step))):
        put_on = [None if x is None else x[rows] for x in beyond]
        _shape_(whitened[rows], step[rows], hyper, spare, last, put_on)
    return whitened


def _neighbours(rows: Sequence[int], most: int) -> Iterator[slice]:
    """Ascending rows as ranges, of which none is longer than `most`."""
    first = 0
    for last, row in enumerate(rows, start=1):
        if last - first == most or rows[last : last + 1] != [row + 1]:
            yield slice(rows[first], row + 1)
            first = last


def _shape_(
    part: Tensor, step: Tensor, hyper: Hyper, spare: Tensor, last: float, put_on: Sequence[Tensor | None]
) -> None:
    """P', or some of the way there, of matrices in the first `last` updates of which it is due."""
    kronecker.scale_sides(part, [None if x is None else x.reciprocal() for x in put_on], 1.0, out=part)
    first, *free = spare.split(len(part))[:PLACES]
    if hyper.polar == START:
        kept = (free.pop() if free else torch.empty_like(part)).copy_(part)
        share = kronecker.column(averages.of_step(lambda t: 1 - (t / (last + 1)) ** 2, step, part), part)
        polar = orthogonalize_(part, START, first, hyper.compute_dtype, *free)
        torch.lerp(kept, polar.mul_(START_LENGTH), share, out=part)
    else:
        orthogonalize_(part, hyper.polar, first, hyper.compute_dtype, *free[:1])
    kronecker.scale_sides(part, put_on, 1.0, out=part)


def orthogonalized_at_once(count: int) -> int:
    """How many of the `count` matrices of a stack are orthogonalised together, so that its spare has all PLACES."""
    return max(1, count // PLACES)


def start_updates(beta: float) -> int:
    """How many first updates "start" is for, T - 1 = min(5 / (1 - beta), 750), beta of what P is divided by.

    Averages begin as plain means (`averages.warm_beta`), so of what they began with n updates leave 1 / (n + 1) and no
    more, however long they remember.
    """
    return round(min(START_LIFETIMES / (1 - beta), START_AT_MOST))


def lasting_steps(polar: Polar) -> int:
    """Newton-Schulz steps of an update in the long run."""
    return 0 if isinstance(polar, str) else polar


def orthogonalize_(
    direction: Tensor,
    steps: Polar,
    spare: Tensor | None = None,
    compute_dtype: str | None = "float32",
    room: Tensor | None = None,
) -> Tensor:
    """P', the whitened momentum near its polar factor, with the Frobenius norm that it had.

    Args:
        direction: P (B, m, n), overwritten by P'; of any other number of sides it is left as it is.
        steps: K, or "start" for those of a start; 0 leaves P itself.
        spare: like P, overwritten; made here where there is none.
        compute_dtype: of the products.
        room: like P, overwritten; where there is none, a square of the shorter side is made.

    Returns:
        P' (B, m, n). Zero where P is.
    """
    if not steps or direction.ndim != 3:
        return direction
    spare = torch.empty_like(direction) if spare is None else spare
    smallest = averages.smallest_scale(direction.dtype)
    norm = _norm(direction)
    x, room = direction.div_(norm.clamp_min(smallest)), quintic.room_for(direction, room)
    for number, (a, b, c) in enumerate(coefficients(steps)):
        gram = quintic.gram(x, spare, compute_dtype)
        if number == 0:
            square = quintic.polynomial(gram, (0.0, 0.0, 1.0), compute_dtype, out=room)
            bound = _norm(square).pow(1 / 4).clamp_min(SMALLEST_BOUND)
            x.div_(bound)
            matrix = square.mul_(c / bound.pow(4)).addcmul_(gram, b / bound.square())
        else:
            matrix = quintic.polynomial(gram, (a, b, c), compute_dtype, out=room)
        x, spare = quintic.apply(x, matrix, a, compute_dtype, out=spare), x
    return torch.mul(x, norm / _norm(x).clamp_min(smallest), out=direction)


def _norm(x: Tensor) -> Tensor:
    """|X|_F of each matrix, (B, 1, 1)."""
    return kronecker.norm(x)[:, None, None]


def flops(shape: Sequence[int], steps: int) -> float:
    """Of one block: K (4 m^2 n + 2 m^3) for two sides m <= n, else none, as nothing is done."""
    if len(shape) != 2:
        return 0.0
    m, n = sorted(shape)
    return steps * (4.0 * m**2 * n + 2.0 * m**3)
