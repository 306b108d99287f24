"""Products with the sides of a batch of tensors, and the scalars of a step.

A tensor here is (B, d_1..d_K). "Side k" is its k-th axis after the batch; matrices that act on side k are
(B, d_k, d_k), vectors (B, d_k), and `None` in their place is the identity.

[Note: two buffers] Memory that a step asks for anew costs more than what is computed in it. A step of a batch has two
tensors to itself, the gradients' and a spare one like it, and works from one into the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kl_dist.methods import products
from kl_dist.methods.products import Operand

SMALLEST_HALF = {"cpu": 48, "cuda": 512}
"""Rows that a symmetric product is halved down to: below, a call costs more than the flops it saves. On a CPU that was
measured; on a GPU counted: 24 grams of 768 x 768 are 22 Gflop, 54 us in TF32 on an H200, as long as ten launches take,
and cut down to 48 they are 46 calls."""

Polar = int | Literal["start"]
"""Option `polar`: kl_dist.methods.polar."""


@dataclass(frozen=True)
class Hyper:
    """The numbers one step of a method needs, for one parameter group; named as the group's options are."""

    betas: tuple[float, float]
    eps: float
    precondition_frequency: int = 1
    shampoo_beta: float | None = None
    nesterov: bool = False
    final_beta1: float | None = None
    polar: Polar = 0
    shampoo_exponent: float | None = None
    adjust_lr_fn: str | None = None
    compute_dtype: str | None = "float32"

    @property
    def factor_beta(self) -> float:
        """Weight of the old factors and eigenvalues."""
        return self.betas[1] if self.shampoo_beta is None else self.shampoo_beta


def project(
    x: Tensor, spare: Tensor, bases: Sequence[Tensor | None], compute_dtype: str | None = "float32"
) -> tuple[Tensor, Tensor]:
    """x in the eigenbasis: Q_a^T x Q_b for a matrix, x x_k Q_k^T on every side in general.

    Returns:
        The projection and what is free then: `x` and `spare`, either way round. See [Note: two buffers].
    """
    for side, basis in enumerate(bases):
        if basis is not None:
            x, spare = multiply_side(x, basis, side, spare, compute_dtype), x
    return x, spare


def project_back(
    x: Tensor, spare: Tensor, bases: Sequence[Tensor | None], compute_dtype: str | None = "float32"
) -> Tensor:
    """x in the original coordinates, in one of the two: Q_a x Q_b^T for a matrix; the inverse of `project`."""
    return project(x, spare, [None if basis is None else basis.mT for basis in bases], compute_dtype)[0]


def multiply_side(
    x: Tensor, matrix: Tensor, side: int, out: Tensor | None = None, compute_dtype: str | None = "float32"
) -> Tensor:
    """x x_k A^T: contracts side k of x with the rows of A (B, d_k, d_k)."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if side == 0:
        products.product(matrix.mT, x.flatten(2), compute_dtype, out.flatten(2))
    elif side == x.ndim - 2:
        products.product(x.flatten(1, -2), matrix, compute_dtype, out.flatten(1, -2))
    else:
        moved = x.movedim(side + 1, -1)
        rows = moved.flatten(1, -2)
        found = products.product(rows, matrix, compute_dtype, torch.empty_like(rows))
        out.copy_(found.view(moved.shape).movedim(-1, side + 1))
    return out


def add_gram(
    total: Tensor,
    x: Tensor,
    side: int,
    keep: float | Tensor,
    share: float = 1.0,
    compute_dtype: str | None = "float32",
) -> None:
    """total <- keep total + share X_k X_k^T (B, d_k, d_k), in place; keep is a number or one per matrix (B,)."""
    if isinstance(keep, Tensor):
        total.mul_(column(keep, total))
        keep = 1.0
    add_symmetric(total, products.operand(unfolded(x, side), compute_dtype), keep, share)


def add_symmetric(total: Tensor, rows: Operand, keep: float, share: float) -> None:
    """total <- keep total + share X X^T: what is above the diagonal is copied, down to small blocks beside it."""
    d = total.shape[1]
    half = d // 2
    if half < SMALLEST_HALF.get(total.device.type, 512):
        products.add_product(total, rows, rows.mT, keep, share)
        return
    first, last = rows.rows(0, half), rows.rows(half, d)
    add_symmetric(total[:, :half, :half], first, keep, share)
    add_symmetric(total[:, half:, half:], last, keep, share)
    below = total[:, half:, :half]
    products.add_product(below, last, first.mT, keep, share)
    total[:, :half, half:].copy_(below.mT)


def unfolded(x: Tensor, side: int) -> Tensor:
    """X_k (B, d_k, N / d_k), x with side k as rows and its other sides, in order, as columns."""
    return x.flatten(2) if side == 0 else x.movedim(side + 1, -1).flatten(1, -2).mT


def square_sums(x: Tensor, weights: Sequence[Tensor | None], spare: Tensor) -> list[Tensor]:
    """For every side k, diag(H_k H_k^T) (B, d_k): the sums over all other sides of x^2 times the weights of these.

    `spare`, like x, is overwritten.
    """
    return _sums(torch.mul(x, x, out=spare), weights)


def _sums(x: Tensor, weights: Sequence[Tensor | None]) -> list[Tensor]:
    *front, last = weights
    if not front:
        return [x]
    rows = x.flatten(1, -2)
    of_rows = _outer(front, x)
    of_last = rows.sum(1) if of_rows is None else torch.bmm(of_rows[:, None], rows)[:, 0]
    if last is not None:
        x.mul_(along(last, x.ndim - 2, x))
    return [*_sums(x.sum(-1), front), of_last]


def _outer(vectors: Sequence[Tensor | None], x: Tensor) -> Tensor | None:
    """The products of vectors (B, d_1) .. of the first sides of x, (B, d_1 ..); None where all are the identity."""
    if len(vectors) == 1 or all(vector is None for vector in vectors):
        return vectors[0]
    product = x.new_ones(*x.shape[:-1])
    return scale_sides(product, vectors, 1.0, out=product).flatten(1)


def along(vector: Tensor, side: int, x: Tensor) -> Tensor:
    """A vector per matrix (B, d_k), shaped to broadcast along side k of x."""
    shape = [1] * x.ndim
    shape[0], shape[side + 1] = vector.shape
    return vector.view(shape)


def scale_sides(x: Tensor, vectors: Sequence[Tensor | None], by: float | Tensor, out: Tensor) -> Tensor:
    """x times a vector along every side, and times `by`, a number or one per matrix (B,); `out` may be x itself."""
    for side, vector in enumerate(vectors):
        if vector is not None:
            torch.mul(x, along(vector * column(by, vector), side, x), out=out)
            x, by = out, 1.0
    return x if x is out else torch.mul(x, column(by, x), out=out)


def numel(x: Tensor) -> int:
    """Elements of one matrix of the batch."""
    return x.numel() // x.shape[0]


def column(values: float | Tensor, x: Tensor) -> float | Tensor:
    """One value per matrix, (B,) or so shaped already, to broadcast over x; a number as it is."""
    if not isinstance(values, Tensor) or values.ndim == x.ndim:
        return values
    return values.view(-1, *[1] * (x.ndim - 1))


def norm(x: Tensor) -> Tensor:
    """|x| of each matrix, (B,)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def learn_grams(
    factors: Sequence[Tensor | None],
    x: Tensor,
    spare: Tensor,
    keep: float | Tensor,
    by: float | Tensor = 1.0,
    normalize: bool = True,
    compute_dtype: str | None = "float32",
) -> None:
    """S_k <- b S_k + (1 - b) c_k H_k H_k^T, H = x times `by`, on every side that keeps something.

    c_k = d_k / N with `normalize`, else 1. A diagonal side, (B, d_k), learns diag(H_k H_k^T).

    Args:
        factors: S_k, mutated.
        x: (B, d_1..d_K).
        spare: overwritten.
        keep: b, a number or one per matrix (B,).
        by: a number or one per matrix (B,).
        normalize: see above.
        compute_dtype: of the products.
    """
    for side, factor in enumerate(factors):
        if factor is None:
            continue
        root = ((1 - keep) * (factor.shape[-1] / numel(x) if normalize else 1.0)) ** 0.5 * by
        if factor.ndim == 3 and isinstance(root, float):
            add_gram(factor, x, side, keep, root**2, compute_dtype)
            continue
        scaled = torch.mul(x, column(root, x), out=spare)
        if factor.ndim == 3:
            add_gram(factor, scaled, side, keep, compute_dtype=compute_dtype)
        else:
            factor.mul_(column(keep, factor)).add_(square_sums(scaled, [None] * len(factors), spare)[side])
