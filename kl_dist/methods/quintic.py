"""A step of Newton-Schulz in two buffers: an odd quintic of all singular values of a batch of matrices.

    X <- a X + (b A + c A^2) X,    A = X X^T (of a tall X from the right, A = X^T X)

turns each singular value s into a s + b s^3 + c s^5, leaving the singular vectors. A and b A + c A^2 are symmetric, so
that half of each is computed, as `kronecker.add_symmetric` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kl_dist.methods import kronecker
from kl_dist.methods.products import add_product, operand

Coefficients = tuple[float, float, float]


def room_for(x: Tensor, within: Tensor | None = None) -> Tensor:
    """Memory for A of every matrix of x (B, m, n): (B, s, s), s the shorter side; that of `within`, which is like x."""
    short = min(x.shape[1:])
    if within is None:
        return x.new_empty(x.shape[0], short, short)
    return within.view(-1)[: x.shape[0] * short**2].view(-1, short, short)


def gram(x: Tensor, spare: Tensor, compute_dtype: str | None) -> Tensor:
    """A (B, s, s), in the memory of `spare`, which is like x (B, m, n)."""
    found = room_for(x, spare)
    rows = x.mT if x.shape[1] > x.shape[2] else x
    kronecker.add_symmetric(found, operand(rows, compute_dtype), 0.0, 1.0)
    return found


def polynomial(gram: Tensor, coefficients: Coefficients, compute_dtype: str | None, out: Tensor) -> Tensor:
    """b A + c A^2 (B, s, s)."""
    _, b, c = coefficients
    kronecker.add_symmetric(torch.mul(gram, b, out=out), operand(gram, compute_dtype), 1.0, c)
    return out


def apply(x: Tensor, matrix: Tensor, a: float, compute_dtype: str | None, out: Tensor) -> Tensor:
    """a X + P X (of a tall X: a X + X P) with a symmetric P (B, s, s)."""
    left, right = (x, matrix) if x.shape[1] > x.shape[2] else (matrix, x)
    add_product(torch.mul(x, a, out=out), operand(left, compute_dtype), operand(right, compute_dtype), 1.0, 1.0)
    return out
