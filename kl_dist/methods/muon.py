"""Muon: the momentum made orthogonal, for a matrix M = P diag(s) Q^T nearly P Q^T, by five steps of Newton-Schulz.

    G <- G min(1, 10 s / RMS(G)), s^2 = mean(M^2) (1 + beta1) / (1 - beta1) / (1 - beta1^(2 t - 2)), but at t = 1
    M <- beta1 M + (1 - beta1) G;   N = beta1 M + (1 - beta1) G (Nesterov's) or M
    X = N / |N|;   five times X <- a X + (b A + c A^2) X with A = X X^T;   U = scale(m, n) X

where beta1 stays, as it does unless `final_beta1` is given: kl_dist.methods.averages has the shares then. For an m x n
matrix, with s = min(m, n) and l = max(m, n), that is 5 (4 s^2 l + 2 s^3) flops a step; the state is the momentum alone,
and nothing is ever refreshed. Tensors of more sides are read with their first side as rows.

Recipe "fresh" computes in the state's dtype, so that layouts agree but for its rounding; "paper" is torch.optim.Muon,
bfloat16 products included; "normuon" is "fresh" with the neurons normalised.
Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024) and torch.optim.Muon; Liu et
al., "Muon is Scalable for LLM Training" (arXiv 2502.16982); Li et al., "NorMuon" (arXiv 2510.05491).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kl_dist.methods import averages, kronecker, quintic
from kl_dist.methods.kronecker import Hyper
from kl_dist.methods.rule import MEASURED, Flops, Method, Rule
from kl_dist.methods.state import MatrixState, Side, unstarted

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c: the steepest at zero, so s ends anywhere in 0.7 to 1.2
STEPS = 5
NEURON_FLOOR = 1e-4  # of the neurons' mean: a row that is rounding noise is magnified a hundred times at most


@dataclass
class NorMuonState(MatrixState):
    """Muon's momentum, and a number for each neuron."""

    row_mean_square: Tensor  # (B, m)  v, of the orthogonal matrix's rows


def allocate(shape: Sequence[int], sides: Sequence[Side], batch: int, like: Tensor) -> MatrixState:
    """State of `batch` matrices of `shape`, zero, with dtype and device of `like`; `sides` keep nothing here."""
    return MatrixState(*unstarted(batch), like.new_zeros(batch, *shape))


def allocate_with_neurons(shape: Sequence[int], sides: Sequence[Side], batch: int, like: Tensor) -> NorMuonState:
    """As `allocate`, and a zero for each of the first side's rows."""
    return NorMuonState(*unstarted(batch), like.new_zeros(batch, *shape), like.new_zeros(batch, shape[0]))


def start(state: MatrixState, grad: Tensor, hyper: Hyper) -> None:
    """Nothing is learnt from the first gradient alone."""


def update(state: MatrixState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """The update U of one step, before the learning rate; it does not change when all gradients are multiplied.

    Args:
        state: mutated.
        grad: G, (B, d_1..d_K), overwritten: see [Note: two buffers] in kronecker.py.
        hyper: betas[0], final_beta1, nesterov and adjust_lr_fn; eps is relative here, X = N / (|N| (1 + eps)).
        spare: like grad, overwritten.

    Returns:
        U, in the memory of one of the two.
    """
    x, _ = _direction(state, grad, spare, hyper)
    return x.mul_(scale(grad.shape[1:], hyper.adjust_lr_fn)).view(grad.shape)


def update_of_neurons(state: NorMuonState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """`update` with each row of X at about the same size over time, and the size of X as it was.

        v <- beta2 v + (1 - beta2) mean over columns(X^2);   Y = X / sqrt(max(v, floor));   U = scale(m, n) Y |X| / |Y|

    A neuron is a row of what the method serves: of a block, where a matrix is cut along its columns.
    """
    x, spare = _direction(state, grad, spare, hyper)
    mean_square = state.row_mean_square
    mean_square.lerp_(torch.mul(x, x, out=spare).mean(-1), 1 - hyper.betas[1])
    floor = (NEURON_FLOOR * mean_square.mean(-1, keepdim=True)).clamp_min(averages.smallest_scale(x.dtype))
    normalized = torch.div(x, mean_square.maximum(floor).sqrt()[..., None], out=spare)
    smallest = averages.smallest_scale(x.dtype)  # of a momentum that is zero X and Y are
    restored = (
        kronecker.norm(x) / kronecker.norm(normalized).clamp_min(smallest) * scale(grad.shape[1:], hyper.adjust_lr_fn)
    )
    return normalized.mul_(restored[:, None, None]).view(grad.shape)


def update_as_released(state: MatrixState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """torch.optim.Muon's update, its operations in their order; eps is the least |N|.

    Matrix by matrix, since in bfloat16 a batch of others would give other numbers. Where the state is float64 the
    products are float64, as the rounding of bfloat16 would hide what that is chosen for.
    """
    state.step.add_(1)
    momentum = hyper.betas[0]
    state.exp_avg.lerp_(grad, 1 - momentum)
    direction = grad.lerp_(state.exp_avg, momentum) if hyper.nesterov else state.exp_avg
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.bfloat16
    for one, out in zip(direction.flatten(2), spare.flatten(2), strict=True):
        # never a view of the momentum; and laid out as torch lays it, for the order of the sum in the norm
        x = one.to(dtype, copy=True)
        x = x.mT if x.shape[0] > x.shape[1] else x
        x = newton_schulz(x.div_(x.norm().clamp(min=hyper.eps)))
        out.copy_(x if x.shape == one.shape else x.mT)
    return spare.mul_(scale(grad.shape[1:], hyper.adjust_lr_fn))


def newton_schulz(x: Tensor) -> Tensor:
    """Five times X <- a X + (b A + c A^2) X with A = X X^T, as torch computes it.

    Args:
        x: (m, n), wide rather than tall, for its cost; of Frobenius norm 1 at most.
    """
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def scale(shape: Sequence[int], adjust_lr_fn: str | None) -> float:
    """What the orthogonal matrix is multiplied by, under torch.optim.Muon's names for it.

    "original" is sqrt(max(1, m / n)), Keller Jordan's; "match_rms_adamw" 0.2 sqrt(max(m, n)), which gives every shape
    an update of RMS 0.2, about AdamW's.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def flops(shape: Sequence[int], sides: Sequence[Side]) -> Flops:
    """Five times the gram and its product with X, 4 s^2 l, and the gram's square, 2 s^3; no refreshes."""
    short, long = sorted((shape[0], math.prod(shape[1:])))
    return Flops(STEPS * (4.0 * short**2 * long + 2.0 * short**3), 0.0)


def _direction(state: MatrixState, grad: Tensor, spare: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor]:
    """The momentum with this step's gradient, made orthogonal: X (B, m, n), and the buffer that is free then."""
    state.step.add_(1)
    averages.cut_spikes_by_momentum_(grad, state.exp_avg, state.step, hyper)
    direction = averages.momentum_(state.exp_avg, grad, state.step, hyper)
    smallest = averages.smallest_scale(grad.dtype) * (1 - hyper.betas[0])  # the momentum is not corrected
    x = direction.div_(kronecker.column(kronecker.norm(direction).clamp_min(smallest) * (1 + hyper.eps), grad)).flatten(
        2
    )
    spare, room = spare.flatten(2), quintic.room_for(x)
    for _ in range(STEPS):
        gram = quintic.gram(x, spare, hyper.compute_dtype)
        matrix = quintic.polynomial(gram, COEFFICIENTS, hyper.compute_dtype, out=room)
        x, spare = quintic.apply(x, matrix, COEFFICIENTS[0], hyper.compute_dtype, out=spare), x
    return x, spare


NOTHING_KEPT: dict[str, Any] = {"long_side": "identity"}  # of any side, so that no side is too long
TUNED = {**NOTHING_KEPT, "betas": (0.85, 0.95), "adjust_lr_fn": "match_rms_adamw"}  # docs/learning.md
TORCHS = {**NOTHING_KEPT, "betas": (0.95, 0.95), "adjust_lr_fn": "original", "nesterov": True}

FRESH = Rule(allocate, start, update, None, flops=flops, working_copies=3, defaults=TUNED)
PAPER = Rule(allocate, start, update_as_released, None, flops=flops, working_copies=3, defaults=TORCHS)
NORMUON = Rule(allocate_with_neurons, start, update_of_neurons, None, flops=flops, working_copies=3, defaults=TUNED)
METHOD = Method("KL-Muon", {"fresh": FRESH, "paper": PAPER, "normuon": NORMUON}, from_adamw=MEASURED)
