"""What every reference is given, under the letters of the spec."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Options:
    """Hyperparameters of one tensor; nothing here is left to be filled in later."""

    lr: float
    beta1: float  # weight of the OLD momentum
    beta2: float  # weight of the OLD second moment
    factor_beta: float  # weight of the OLD factors and eigenvalues: shampoo_beta, or beta2
    eps: float
    weight_decay: float
    refresh_every: int  # T
    phase: int
    nesterov: bool
    final_beta1: float  # what beta1 grows to; at most beta1 where it stays
    exponent: float  # p, Shampoo's and KL-Shampoo's
    adjust_lr_fn: str | None  # Muon's; None is the recipe's
    polar: tuple[tuple[float, float, float], ...]  # (a, b, c) of each Newton-Schulz step; none without
    start_updates: int  # how many first updates go some of the way to their polar factor
    dtype: torch.dtype

    def beta1_of(self, t: int) -> float:
        """beta1(t), between beta1 and final_beta1 that at which a twentieth of the updates made is remembered."""
        return max(self.beta1, min(self.final_beta1, 1 - 20 / t))

    def grown(self, t: int) -> bool:
        """Whether beta1(t) is above beta1."""
        return self.beta1_of(t) > self.beta1

    def lasting(self, beta: float, t: int) -> float:
        """beta, of what divides the momentum; at least beta1(t)^2 where beta1 has grown."""
        return max(beta, self.beta1_of(t) ** 2) if self.grown(t) else beta

    def refresh_due(self, t: int) -> bool:
        """(t + phase) mod T == 0."""
        return (t + self.phase) % self.refresh_every == 0
