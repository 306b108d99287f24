"""A small model with every kind of parameter, data that divides over 1 to 4 ranks, and the run that tests compare."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kl_dist
from kl_dist import KLShampoo
from kl_dist.planning import making

METHODS = tuple(kl_dist.METHODS)
TOKENS = 9
SAMPLES = 12  # of a step, over all ranks: divides by 1, 2, 3, 4
UNTOUCHED = ("never.weight", "never.bias", "nothing")  # parameters of Zoo that never have a gradient

Weights = dict[str, Tensor]


class Batch(NamedTuple):
    """The samples of a step, or one rank's share of them."""

    tokens: Tensor  # (B, 4) int64
    rare: Tensor  # (B,) bool: goes through the layer `sometimes`
    target: Tensor  # (B, 7)

    def share(self, rank: int, world_size: int) -> "Batch":
        return Batch(*(part.chunk(world_size)[rank] for part in self))


class Zoo(nn.Module):
    """Embedding, convolution, a long matrix, stacked experts, 1xN, 1-D, 0-D and empty parameters, odd sizes.

    `never` is used on no rank. `sometimes` is used on those ranks whose samples are marked rare, and on none on steps
    without such a sample. An expert that no token chose has a gradient of zero. The loss is scaled so that the absolute
    floors of recipe "paper" do not hide its factors.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 6)
        self.convolution = nn.Conv2d(2, 5, (2, 3), padding=(0, 1))
        self.long = nn.Linear(30, hidden, bias=False)
        self.odd = nn.Linear(hidden, 13)
        self.experts = nn.Parameter(torch.randn(3, 13, 7) / 3)
        self.sometimes = nn.Linear(7, 7)
        self.gain = nn.Linear(7, 1)
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.never = nn.Linear(5, 3)
        self.nothing = nn.Parameter(torch.empty(0, 3))

    def forward(self, batch: Batch) -> Tensor:
        x = self.embedding(batch.tokens).unflatten(1, (2, 2))
        x = torch.tanh(self.convolution(x)).flatten(1)
        x = torch.tanh(self.odd(torch.tanh(self.long(x))))
        chosen = self.experts[batch.tokens[:, 0] % 3]
        x = torch.tanh(torch.einsum("bi,bij->bj", x, chosen))
        if batch.rare.any():
            x = x + batch.rare[:, None] * torch.tanh(self.sometimes(x))
        return 100 * (x * (1 + self.gain(x)) * self.scalar - batch.target).square().mean()


def zoo(dtype: torch.dtype = torch.float64, hidden: int = 16) -> Zoo:
    """The same weights in every process. A `hidden` of 140 makes matrices that "square" cuts into blocks."""
    torch.manual_seed(1)
    return Zoo(hidden).to(dtype)


def samples(step: int, dtype: torch.dtype = torch.float64) -> Batch:
    """The data of a step. Two samples are marked rare on two steps of three; one step of four leaves experts out."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(TOKENS, (SAMPLES, 4), generator=generator)
    if step % 4 == 3:
        tokens[:, 0] -= tokens[:, 0] % 3
    rare = torch.zeros(SAMPLES, dtype=torch.bool)
    if step % 3 != 2:
        rare[torch.randperm(SAMPLES, generator=generator)[:2]] = True
    target = torch.sin(tokens.sum(1, keepdim=True) * torch.arange(1, 8)) / 2
    return Batch(tokens, rare, target.to(dtype))


def zoo_groups(model: nn.Module) -> list[dict[str, Any]]:
    """All parameters by name, the experts declared as a batch of matrices."""
    named = list(model.named_parameters())
    return [
        {"params": [(name, p) for name, p in named if name != "experts"]},
        {"params": [(name, p) for name, p in named if name == "experts"], "matrices": {"batch": (0,)}},
    ]


def weights_of(model: nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def backward(model: nn.Module, batch: Batch) -> None:
    model.zero_grad()
    model(batch).backward()


def train_alone(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, change: Callable[[int], None] = lambda step: None
) -> Weights:
    """Steps on all samples in this process; `change` may alter the gradients of a step before it is taken."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        backward(model, samples(step, dtype))
        change(step)
        optimizer.step()
    return weights_of(model)


def train_with_ddp(
    group: dist.ProcessGroup, dtype: torch.dtype, hidden: int, steps: int, bucket_bytes: int | None, options: dict
) -> tuple[Weights, int]:
    """Steps on this rank's share of the samples, under DistributedDataParallel: (weights, number of buckets).

    Recipe "paper" starts from the eigenvectors of the first gradients, where those of a null space are anybody's guess:
    under it the first step's gradients are to the last bit those of one process.
    """
    model = zoo(dtype, hidden)
    ddp = DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
    with small_buckets(bucket_bytes):
        optimizer = KLShampoo(zoo_groups(model), process_group=group, **options)
    for step in range(steps):
        batch = samples(step, dtype)
        if step == 0 and options["recipe"] == "paper":
            take_gradients(model, zoo(dtype, hidden), batch)
        else:
            backward(ddp, batch.share(group.rank(), group.size()))
        optimizer.step()
    return weights_of(model), len(optimizer.plan.buckets)


def take_gradients(model: nn.Module, twin: nn.Module, batch: Batch) -> None:
    """Give `model` the gradients of its `twin`, without any hook of DDP's."""
    backward(twin, batch)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        parameter.grad = other.grad


def small_buckets(size: int | None) -> contextlib.AbstractContextManager:
    """Plans made inside have buckets of `size` bytes; None leaves the default."""
    return contextlib.nullcontext() if size is None else mock.patch.object(making, "BUCKET_BYTES", size)


def deviation(weights: Weights, expected: Weights) -> float:
    """The largest relative distance of a parameter from what is expected of it."""
    assert weights.keys() == expected.keys()
    distances = [
        float(torch.linalg.vector_norm(weights[name].double() - x.double()) / torch.linalg.vector_norm(x.double()))
        for name, x in expected.items()
        if x.numel()
    ]
    return max(distances)


def same_bits(weights: Weights, others: Weights) -> bool:
    return weights.keys() == others.keys() and all(torch.equal(x, others[name]) for name, x in weights.items())


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> Weights:
    """Copies of all weights and of this rank's state, by name."""
    found = weights_of(model)
    for name, parameter in model.named_parameters():
        for key, tensor in optimizer.state.get(parameter, {}).items():
            found[f"state {key!r} of {name}"] = tensor.clone()
    return found


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What a rank holds; what has no element holds nothing, though it has a step count that is not one."""
    return [x for parameter, entry in optimizer.state.items() if parameter.numel() for x in entry.values()]


@contextlib.contextmanager
def raising(kind: type[Exception], match: str) -> Iterator[None]:
    """`pytest.raises` on a rank, where a failure has to be an ordinary exception to reach the test."""
    try:
        with pytest.raises(kind, match=match):
            yield
    except pytest.fail.Exception as failure:
        raise AssertionError(str(failure)) from None
