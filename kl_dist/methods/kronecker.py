"""Products with the sides of a batch of tensors, and the scalars of a step.

A tensor here is (B, d_1..d_K). "Side k" is its k-th axis after the batch; matrices that act on side k are
(B, d_k, d_k), and `None` in their place is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hyper:
    """The numbers one step of a method needs, for one parameter group; named as the group's options are."""

    betas: tuple[float, float]
    eps: float
    precondition_frequency: int = 1
    shampoo_beta: float | None = None
    nesterov: bool = False
    polar: int = 0
    shampoo_exponent: float | None = None
    adjust_lr_fn: str | None = None

    @property
    def factor_beta(self) -> float:
        """Weight of the old factors and eigenvalues."""
        return self.betas[1] if self.shampoo_beta is None else self.shampoo_beta


def project(x: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """x in the eigenbasis: Q_a^T x Q_b for a matrix, x x_k Q_k^T on every side in general."""
    for side, basis in enumerate(bases):
        if basis is not None:
            x = multiply_side(x, basis, side)
    return x


def project_back(x: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """x in the original coordinates: Q_a x Q_b^T for a matrix; the inverse of `project`."""
    return project(x, [None if basis is None else basis.mT for basis in bases])


def multiply_side(x: Tensor, matrix: Tensor, side: int) -> Tensor:
    """x x_k A^T: contracts side k of x with the rows of A (B, d_k, d_k)."""
    batch, d = x.shape[0], x.shape[side + 1]
    if side == 0:
        return (matrix.mT @ x.reshape(batch, d, -1)).reshape(x.shape)
    moved = x.movedim(side + 1, -1)
    return (moved.reshape(batch, -1, d) @ matrix).reshape(moved.shape).movedim(-1, side + 1)


def gram(x: Tensor, side: int) -> Tensor:
    """X_k X_k^T (B, d_k, d_k), X_k the unfolding of x with side k as rows."""
    rows = unfolded(x, side)
    return rows @ rows.mT


def add_gram(total: Tensor, x: Tensor, side: int, keep: float | Tensor) -> None:
    """total <- keep total + X_k X_k^T, in place; keep is a number or (B, 1, 1)."""
    rows = unfolded(x, side)
    if isinstance(keep, Tensor):
        total.mul_(keep)
        keep = 1.0
    torch.baddbmm(total, rows, rows.mT, beta=keep, out=total)


def unfolded(x: Tensor, side: int) -> Tensor:
    """X_k (B, d_k, N / d_k), x with side k as rows and its other sides, in order, as columns."""
    batch, d = x.shape[0], x.shape[side + 1]
    if side == 0:
        return x.reshape(batch, d, -1)
    return x.movedim(side + 1, -1).reshape(batch, -1, d).mT


def square_sums(x: Tensor, side: int) -> Tensor:
    """diag(X_k X_k^T) (B, d_k), for a side that keeps no more than its diagonal."""
    others = [axis for axis in range(1, x.ndim) if axis != side + 1]
    return x.square().sum(others)


def along(vector: Tensor, side: int, x: Tensor) -> Tensor:
    """A vector per matrix (B, d_k), shaped to broadcast along side k of x."""
    shape = [1] * x.ndim
    shape[0], shape[side + 1] = vector.shape
    return vector.reshape(shape)


def scale_sides(x: Tensor, vectors: Sequence[Tensor | None], power: float) -> Tensor:
    """x times the product over sides of vector_k^power, broadcast along side k; a new tensor."""
    scaled = x
    for side, vector in enumerate(vectors):
        if vector is not None:
            by = along(vector.pow(power), side, x)
            scaled = x * by if scaled is x else scaled.mul_(by)
    return x.clone() if scaled is x else scaled


def scale_sides_(x: Tensor, vectors: Sequence[Tensor | None], power: float) -> Tensor:
    """`scale_sides` in place: memory that a step asks for anew costs more than the multiplication does."""
    for side, vector in enumerate(vectors):
        if vector is not None:
            x.mul_(along(vector.pow(power), side, x))
    return x


def numel(x: Tensor) -> int:
    """Elements of one matrix of the batch."""
    return x[0].numel()


def mean_square(x: Tensor) -> Tensor:
    """mean(x^2) of each matrix, (B,)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).square() / numel(x)


def at_unit_scale(x: Tensor) -> Tensor:
    """x / RMS(x), matrix by matrix, computed so that no square over- or underflows."""
    x = x / x.abs().amax(tuple(range(1, x.ndim)), keepdim=True)
    return x / column(mean_square(x).sqrt(), x)


def learn_grams(
    factors: Sequence[Tensor | None], x: Tensor, step: Tensor, beta: Callable[[Tensor], Tensor], normalize: bool
) -> None:
    """S_k <- b S_k + (1 - b) c_k X_k X_k^T on every side that keeps something, with b = beta(t).

    c_k = d_k / N with `normalize`, else 1. A diagonal side, (B, d_k), learns diag(X_k X_k^T).
    """
    for side, factor in enumerate(factors):
        if factor is None:
            continue
        old = of_step(beta, step, factor)
        share = factor.shape[-1] / numel(x) if normalize else 1.0
        moment = gram(x, side) if factor.ndim == 3 else square_sums(x, side)
        factor.mul_(old).add_(moment.mul_((1 - old) * share))


def column(values: Tensor, x: Tensor) -> Tensor:
    """One value per matrix (B,), shaped to broadcast over x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def of_step(function: Callable[[Tensor], Tensor], step: Tensor, x: Tensor) -> float | Tensor:
    """A coefficient that depends on the step count, to multiply x with.

    Almost always all matrices of a batch are at the same step, and a Python number costs no transfer to the device.
    """
    values = function(step.double())
    first = float(values[0])
    if bool((values == first).all()):
        return first
    return column(values.to(x.device, x.dtype), x)


def warm_beta(beta: float) -> Callable[[Tensor], Tensor]:
    """b(t) = min(beta, 1 - 1/(t+1)): a plain average at first, so that no start value outlives its turn."""
    return lambda t: (1 - 1 / (t + 1)).clamp_max(beta)


def steady_beta(beta: float) -> Callable[[Tensor], Tensor]:
    """b(t) = beta."""
    return lambda t: torch.full_like(t, beta)


def momentum(exp_avg: Tensor, grad: Tensor, step: Tensor, hyper: Hyper) -> Tensor:
    """exp_avg <- beta1 exp_avg + (1 - beta1) grad; returns it bias-corrected, one step ahead if Nesterov's.

    exp_avg / (1 - beta1^t), or (beta1 exp_avg + (1 - beta1) grad) / (1 - beta1^(t+1)).
    """
    beta1 = hyper.betas[0]
    exp_avg.lerp_(grad, 1 - beta1)
    if hyper.nesterov:
        return exp_avg.lerp(grad, 1 - beta1).mul_(of_step(lambda t: 1 / (1 - beta1 ** (t + 1)), step, grad))
    return exp_avg * of_step(lambda t: 1 / (1 - beta1**t), step, grad)


def tracked_scale(scale: Tensor, mean_squares: Tensor, step: Tensor, beta: float) -> Tensor:
    """scale <- beta scale + (1 - beta) mean_squares; returns sqrt(scale / (1 - beta^t)), (B,), never zero."""
    scale.lerp_(mean_squares, 1 - beta)
    corrected = scale * of_step(lambda t: 1 / (1 - beta**t), step, scale)
    return corrected.sqrt().clamp_min(smallest_scale(scale.dtype))


def smallest_scale(dtype: torch.dtype) -> float:
    """The smallest gradient worth dividing by: its square is still a normal number."""
    return 1e-100 if dtype == torch.float64 else 1e-15


def largest_gradient(dtype: torch.dtype) -> float:
    """A gradient beyond this is treated as not finite: whitened and squared it would overflow."""
    return 1e100 if dtype == torch.float64 else 1e12
