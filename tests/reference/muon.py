"""Muon by singular values: Newton-Schulz changes these alone, so that N = P diag(s) Q^T becomes P diag(f(s)) Q^T.

f is p five times over, p(s) = 3.4445 s - 4.7750 s^3 + 2.0315 s^5, from s = the singular values of N over |N|. A tensor
of more sides than two is read with its first side as rows. The sleep until the first gradient, the momentum and the
order of a step are those of the fresh methods; no first gradient is spent on a start, in recipe "paper" neither.
"""

import math

import torch
from torch import Tensor

from tests.reference import fresh
from tests.reference.algebra import ema
from tests.reference.options import Options

SMALLEST_NEURON = 1e-4  # of v, relative to its mean


class Muon(fresh.Reference):
    """U = c P diag(f(s)) Q^T, s of N / (|N| (1 + eps)), c by `adjust_lr_fn`."""

    adjustment = "match_rms_adamw"

    def start(self) -> None:
        """Nothing."""

    def without_spike(self, G: Tensor) -> Tensor:
        """By the size of independent gradients whose momentum M would be."""
        beta1 = self.options.beta1_of(self.t)
        square = self.M.square().mean() * (1 + beta1) / (1 - beta1)
        return fresh.cut_down(G, fresh.rms(G), square, self.options.beta1**2, self.t)

    def update(self, G: Tensor) -> Tensor:
        return (self.factor * self.orthogonal(self.momentum(G).flatten(1))).reshape(self.shape)

    def refresh(self) -> None:
        """Nothing."""

    def orthogonal(self, N: Tensor) -> Tensor:
        P, s, Qt = torch.linalg.svd(N, full_matrices=False)
        s = s / self.size(N)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        return P @ torch.diag(s) @ Qt

    def size(self, N: Tensor) -> Tensor:
        return N.norm() * (1 + self.options.eps)

    @property
    def factor(self) -> float:
        """c = sqrt(max(1, m/n)), or 0.2 sqrt(max(m, n))."""
        m, n = self.shape[0], math.prod(self.shape[1:])
        adjustment = self.options.adjust_lr_fn or self.adjustment
        return math.sqrt(max(1, m / n)) if adjustment == "original" else 0.2 * math.sqrt(max(m, n))


class Released(Muon):
    """torch.optim.Muon in exact arithmetic: N is not bias-corrected, and eps is the least |N|."""

    adjustment = "original"

    def without_spike(self, G: Tensor) -> Tensor:
        return G

    def momentum(self, G: Tensor) -> Tensor:
        return ema(self.M, G, self.options.beta1) if self.options.nesterov else self.M

    def size(self, N: Tensor) -> Tensor:
        return N.norm().clamp(min=self.options.eps)


class NorMuon(Muon):
    """v <- beta2 v + (1-beta2) mean of a row's squares;  Y = X / sqrt(max(v, 1e-4 mean(v)));  U = c |X| / |Y| Y."""

    def __init__(self, shape: tuple[int, ...], options: Options):
        super().__init__(shape, options)
        self.v = torch.zeros(shape[0], dtype=options.dtype)

    def orthogonal(self, N: Tensor) -> Tensor:
        X = super().orthogonal(N)
        self.v = ema(self.v, X.square().mean(1), self.options.beta2)
        Y = torch.diag(self.v.clamp(min=SMALLEST_NEURON * float(self.v.mean())) ** -0.5) @ X
        return Y * (X.norm() / Y.norm())
