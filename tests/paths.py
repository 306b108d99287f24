"""The weights of single parameters on their way, by KLShampoo in one process and by the references."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from benchmarks.memory import PeakMemory
from kl_dist import KLShampoo
from tests.reference import METHODS, reference
from tests.test_reference import run

EVERY = sorted(METHODS)
FRESH = [method for method, recipe in EVERY if recipe == "fresh"]
OPTIONS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, precondition_frequency=3)
WHOLE = dict(blocking="none", merge_dims=False, stagger=False)
UNIT_LR = dict(lr=1.0, weight_decay=0.0)


def train(grads: Tensor, W: Tensor | None = None, **options) -> Tensor:
    """All weights on the way, (steps + 1, *shape), of one parameter that starts at W (zeros)."""
    return train_many([grads], None if W is None else [W], **options)[0]


def train_many(grads: Sequence[Tensor], W: Sequence[Tensor] | None = None, **options) -> list[Tensor]:
    """`train` for several parameters of one optimizer. A gradient that starts with NaN is missing on that step."""
    params = [nn.Parameter(torch.zeros_like(g[0]) if W is None else W[i].clone()) for i, g in enumerate(grads)]
    opt = KLShampoo(params, **{**OPTIONS, **options})
    paths = [[p.detach().clone()] for p in params]
    for step in zip(*grads, strict=True):
        for p, G in zip(params, step, strict=True):
            p.grad = None if G.flatten()[0].isnan() else G.clone()
        opt.step()
        for path, p in zip(paths, params, strict=True):
            path.append(p.detach().clone())
    return [torch.stack(path) for path in paths]


def follow(method: str, recipe: str, grads: Tensor, W: Tensor | None = None, **options) -> Tensor:
    """The same from the reference."""
    return run(reference(method, recipe, grads.shape[1:], **{**OPTIONS, **options}), grads, W)


def weights(shape: Sequence[int]) -> Tensor:
    """Weights to start from, (shape)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def update_sizes(path: Tensor) -> Tensor:
    """RMS(U) of every step of a path with learning rate 1."""
    return path.diff(dim=0).flatten(1).square().mean(1).sqrt()


def peak_of_a_step(
    count: int = 6, shape: tuple[int, int] = (96, 96), resting: Collection[int] = (), **options
) -> tuple[int, int]:
    """Bytes that a step of `count` equal matrices holds at its peak, the fourth, and what the plan says of it.

    Some of them rest from the third on.
    """
    opt = KLShampoo([(f"W{i}", nn.Parameter(torch.zeros(shape))) for i in range(count)], **options)
    for step in range(4):
        for number, parameter in enumerate(opt.param_groups[0]["params"]):
            parameter.grad = None if number in resting and step > 1 else torch.randn(shape)
        with PeakMemory() as memory:
            opt.step()
    return memory.peak, opt.plan.working_bytes(0)
