"""AdamW, for what is not a matrix, on slices of flat parameters laid end to end.

    m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
    u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

as torch.optim.AdamW computes it. Being elementwise it cuts anywhere, so its state is divided evenly over the ranks.
Source: Loshchilov and Hutter (arXiv 1711.05101).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kl_dist.methods.averages import OfStep, of_step
from kl_dist.methods.kronecker import Hyper
from kl_dist.methods.state import AdamWState, no_steps

WORKING_COPIES = 2  # tensors as large as its gradients that an update holds at its peak, those included


def allocate(lengths: Sequence[int], like: Tensor) -> AdamWState:
    """State of slices of these lengths, zero, with dtype and device of `like`."""
    return AdamWState(no_steps(len(lengths)), like.new_zeros(sum(lengths)), like.new_zeros(sum(lengths)), list(lengths))


def update(state: AdamWState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
    """The update u (sum of lengths,) before the learning rate, from the slices' gradients laid end to end.

    Mutates `state`, `grad` and `spare`, which is like grad; u lies in one of these two.
    """
    state.step.add_(1)
    beta1, beta2 = hyper.betas
    state.exp_avg.lerp_(grad, 1 - beta1)
    state.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    correction1 = _spread(lambda t: 1 - beta1**t, state)
    correction2 = _spread(lambda t: math.sqrt(1 - beta2**t), state)
    denominator = torch.sqrt(state.exp_avg_sq, out=spare).div_(correction2).add_(hyper.eps)
    return torch.div(state.exp_avg, denominator.mul_(correction1), out=grad)


def _spread(function: OfStep, state: AdamWState) -> float | Tensor:
    """The coefficient of every slice, repeated over its elements; a number where all slices agree."""
    values = of_step(function, state.step, state.exp_avg)
    if not isinstance(values, Tensor):
        return values
    lengths = torch.tensor(state.lengths, device=state.exp_avg.device)
    return values.repeat_interleave(lengths, output_size=state.exp_avg.numel())
