"""AdamW, for what is not a matrix, on slices of flat parameters laid end to end.

    m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
    u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

as torch.optim.AdamW computes it. Being elementwise it cuts anywhere, so its state is divided evenly over the ranks.
Source: Loshchilov and Hutter (arXiv 1711.05101).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kl_dist.methods.kronecker import Hyper
from kl_dist.methods.state import AdamWState, no_steps

WORKING_COPIES = 4  # tensors as large as its gradients that an update holds at its peak, those included


def allocate(lengths: Sequence[int], like: Tensor) -> AdamWState:
    """State of slices of these lengths, zero, with dtype and device of `like`."""
    return AdamWState(no_steps(len(lengths)), like.new_zeros(sum(lengths)), like.new_zeros(sum(lengths)), list(lengths))


def update(state: AdamWState, grad: Tensor, hyper: Hyper) -> Tensor:
    """The update u (sum of lengths,) before the learning rate, from the slices' gradients laid end to end.

    Mutates `state`; `grad` is not changed.
    """
    state.step.add_(1)
    beta1, beta2 = hyper.betas
    state.exp_avg.lerp_(grad, 1 - beta1)
    state.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    steps = state.step.double()
    correction1 = _spread(1 - beta1**steps, state)
    correction2 = _spread((1 - beta2**steps).sqrt(), state)
    denominator = state.exp_avg_sq.sqrt().div_(correction2).add_(hyper.eps)
    return state.exp_avg / denominator.mul_(correction1)


def _spread(values: Tensor, state: AdamWState) -> float | Tensor:
    """One value per slice, repeated over the slice's elements; a number where all slices agree."""
    if bool((values == values[0]).all()):
        return float(values[0])
    lengths = torch.tensor(state.lengths, device=state.exp_avg.device)
    return values.to(state.exp_avg).repeat_interleave(lengths, output_size=state.exp_avg.numel())
