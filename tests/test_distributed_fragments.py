"""Parameters cut into ranges of their elements, as ZeRO does, get the update that one process computes."""

from functools import cache

import pytest
import torch
import torch.distributed as dist

from kl_dist import KLShampoo, clip_grad_norm_, full_state_dict, load_full_state_dict
from kl_dist.layouts.fragment import Fragment
from tests.models import METHODS, deviation, same_bits, small_buckets
from tests.products import product
from tests.sharded import Layers, layers, loss_of, tokens_of, train_alone, weights_of

STEPS = 12


class Flat:
    """A model whose parameters lie end to end in one flat tensor, of which each rank steps its own part."""

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype, method: str, **options) -> None:
        self.group, self.model = group, layers(dtype)
        parameters = list(self.model.parameters())
        total = sum(p.numel() for p in parameters)
        self.size = -(-total // group.size())
        self.whole = torch.zeros(self.size * group.size(), dtype=dtype)
        self.mine = self.whole[group.rank() * self.size :][: self.size].clone()
        self.fragments: list[tuple[torch.nn.Parameter, Fragment, int, int]] = []
        ranks, offset = dist.get_process_group_ranks(group), 0
        for p in parameters:
            self.whole[offset : offset + p.numel()].copy_(p.detach().view(-1))
            first, last = (min(max(offset + n - group.rank() * self.size, 0), self.size) for n in (0, p.numel()))
            start = min(max(group.rank() * self.size - offset, 0), p.numel())
            self.fragments.append((p, Fragment(p.shape, self.mine[first:last], start, ranks), first, last))
            offset += p.numel()
        self.mine.copy_(self.whole[group.rank() * self.size :][: self.size])
        names = [name for name, _ in self.model.named_parameters()]
        named = [(name, one[1]) for name, one in zip(names, self.fragments, strict=True)]
        plain = [pair for pair in named if pair[0] != "experts"]
        experts = [pair for pair in named if pair[0] == "experts"]
        groups = [{"params": plain}, {"params": experts, "matrices": {"batch": (0,)}}]
        self.optimizer = KLShampoo(groups, lr=1e-2, method=method, process_group=group, **options)

    def backward(self, step: int) -> None:
        """Every rank has the gradient of all samples, and hands its part of it over."""
        self.model.zero_grad()
        loss_of(self.model, tokens_of(step)).backward()
        for p, fragment, first, last in self.fragments:
            part = p.grad.view(-1)[fragment.start : fragment.start + last - first]
            fragment.holds(self.mine[first:last], part.clone())

    def step(self) -> None:
        self.optimizer.step()
        if self.group.size() > 1:
            dist.all_gather_into_tensor(self.whole, self.mine, group=self.group)
        else:
            self.whole.copy_(self.mine)
        offset = 0
        for p in self.model.parameters():
            p.detach().view(-1).copy_(self.whole[offset : offset + p.numel()])
            offset += p.numel()


def train(group, dtype: torch.dtype, method: str, clip: bool = False):
    run, norms = Flat(group, dtype, method), []
    for step in range(STEPS):
        run.backward(step)
        if clip:
            norms.append(float(clip_grad_norm_(run.optimizer, 0.1)))
        run.step()
    return weights_of(run.model), norms


@cache
def alone(dtype: torch.dtype, method: str):
    return train_alone(dtype, STEPS, {"lr": 1e-2, "method": method})


@product(world_size=[1, 2, 3, 4], method=METHODS)
def test_the_weights_are_those_of_one_process(world, world_size, method):
    found = world.run(train, world_size, torch.float64, method)
    assert all(same_bits(other, found[0][0]) for other, _ in found)
    assert deviation(found[0][0], alone(torch.float64, method)) <= 1e-9


def test_the_norm_is_that_of_the_whole_gradient(world):
    one, three = (
        world.run(train, 1, torch.float64, "kl_shampoo", True),
        world.run(train, 3, torch.float64, "kl_shampoo", True),
    )
    assert three[0][1] == pytest.approx(one[0][1], rel=1e-12)
    assert deviation(three[0][0], one[0][0]) <= 1e-9


def state_goes_on(group, state):
    """Half of the steps, or what another world size had made of them, and the others."""
    with small_buckets(256):  # so that ranks have several units of a parameter under AdamW
        run = Flat(group, torch.float64, "kl_shampoo")
    if state is None:
        for step in range(STEPS // 2):
            run.backward(step)
            run.step()
        return full_state_dict(run.optimizer), run.whole[: sum(p.numel() for p in run.model.parameters())]
    saved, weights = state
    load_full_state_dict(run.optimizer, saved)
    run.whole[: len(weights)].copy_(weights)
    run.mine.copy_(run.whole[group.rank() * run.size :][: run.size])
    offset = 0
    for p in run.model.parameters():
        p.detach().view(-1).copy_(weights[offset : offset + p.numel()])
        offset += p.numel()
    for step in range(STEPS // 2, STEPS):
        run.backward(step)
        run.step()
    return weights_of(run.model)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 4)])
def test_the_state_is_that_of_any_other_layout(world, before, after):
    state = world.run(state_goes_on, before, None)[0]
    found = world.run(state_goes_on, after, state)
    assert deviation(found[0], alone(torch.float64, "kl_shampoo")) <= 1e-9


def test_a_fragment_cannot_be_computed_with():
    fragment = Fragment((2, 3), torch.zeros(4), 0, (0, 1))
    assert fragment.shape == (2, 3) and "0 to 4" in repr(fragment)
    with pytest.raises(TypeError, match="fragment of a parameter"):
        torch.add(fragment, 1)


def with_a_gap(group):
    model = Layers()
    part = torch.zeros(model.one.weight.numel() - 2)
    KLShampoo([("one", Fragment(model.one.weight.shape, part, 0, (0, 1)))], process_group=group)


def test_ranges_that_leave_a_part_out_are_refused(world):
    errors = world.run_expecting_errors(with_a_gap, 2)
    assert all("'one'" in str(error) and "leave a part out" in str(error) for error in errors)
