"""DDP's gradients reduced to their owners: the same weights for a third less traffic, and no misuse unseen."""

import contextlib
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from kl_dist import KLShampoo, clip_grad_norm_, clip_grad_value_
from tests.counting import Counter
from tests.models import METHODS, Weights, backward, deviation, raising, same_bits, samples, weights_of, zoo, zoo_groups
from tests.noise import NOISE, float32_limit
from tests.products import product

STEPS = 16
CLIP = 0.5


class Run:
    """A model under DDP, on one rank, whose gradients are reduced to their owners."""

    def __init__(self, group, dtype: torch.dtype = torch.float64, views: bool = False, **options: Any) -> None:
        self.group, self.model = group, zoo(dtype, hidden=140)
        self.ddp = DistributedDataParallel(
            self.model,
            process_group=group,
            find_unused_parameters=True,
            gradient_as_bucket_view=views,
            bucket_cap_mb=0.01,
        )
        self.optimizer = KLShampoo(zoo_groups(self.model), process_group=group, lr=1e-2, **options)
        self.optimizer.reduce_to_owners(self.ddp)
        self.dtype = dtype

    def backward(self, step: int) -> None:
        backward(self.ddp, samples(step, self.dtype).share(self.group.rank(), self.group.size()))


def train(group, dtype: torch.dtype, method: str, views: bool, clip: bool) -> tuple[Weights, list[float]]:
    run = Run(group, dtype, views, method=method)
    norms = []
    for step in range(STEPS):
        run.backward(step)
        if clip:
            norms.append(float(clip_grad_norm_(run.optimizer, CLIP)))
        run.optimizer.step()
    return weights_of(run.model), norms


@cache
def one_process(dtype: torch.dtype, method: str, clip: bool = False, seed: int = 0):
    model = zoo(dtype, hidden=140)
    optimizer = KLShampoo(zoo_groups(model), lr=1e-2, method=method)
    generator, norms = torch.Generator().manual_seed(seed), []
    for step in range(STEPS):
        backward(model, samples(step, dtype))
        for parameter in model.parameters():
            if seed and parameter.grad is not None:
                factor = 1 + NOISE * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.grad.copy_(parameter.grad.double() * factor)
        if clip:
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    return weights_of(model), norms


@product(method=METHODS, world_size=[2, 4], views=[False, True])
def test_the_weights_are_those_of_one_process(world, method, world_size, views):
    (weights, _), *others = world.run(train, world_size, torch.float64, method, views, False)
    assert all(same_bits(other, weights) for other, _ in others)
    assert deviation(weights, one_process(torch.float64, method)[0]) <= 1e-9


YARDSTICKS = {"reduced kl_shampoo": lambda seed: one_process(torch.float32, "kl_shampoo", seed=seed)[0]}


@pytest.mark.parametrize("world_size", [2, 4])
def test_float32_weights_differ_no_more_than_noise_of_1e_7_makes_them(world, world_size):
    expected, _ = one_process(torch.float32, "kl_shampoo")
    weights, _ = world.run(train, world_size, torch.float32, "kl_shampoo", False, False)[0]
    assert deviation(weights, expected) <= float32_limit("reduced kl_shampoo")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_clipping_from_the_owned_parts_is_torchs_on_one_process(world, world_size):
    expected, expected_norms = one_process(torch.float64, "kl_shampoo", clip=True)
    assert min(expected_norms) > CLIP
    for weights, norms in world.run(train, world_size, torch.float64, "kl_shampoo", True, True):
        assert norms == pytest.approx(expected_norms, rel=1e-9)
        assert deviation(weights, expected) <= 1e-9


def test_gradients_within_the_norm_stay_as_they_are():
    model = zoo()
    optimizer = KLShampoo(zoo_groups(model))
    backward(model, samples(0))
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = clip_grad_norm_(optimizer, 1e6)
    assert float(norm) == pytest.approx(float(torch.stack([x.norm() for x in before.values()]).norm()), rel=1e-12)
    assert same_bits({name: dict(model.named_parameters())[name].grad for name in before}, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_norm_of_narrow_gradients_is_not_narrow(dtype):
    """In float16 one beyond 65,504 would be infinite, and all gradients zeros then."""
    values = {"large": torch.full((1000, 1000), 100.0), "small": torch.ones(8, 8)}
    named = {name: torch.nn.Parameter(torch.zeros_like(x, dtype=dtype)) for name, x in values.items()}
    for name, parameter in named.items():
        parameter.grad = values[name].to(dtype)
    norm = clip_grad_norm_(KLShampoo(named.items()), 1000.0)
    assert float(norm) == pytest.approx((1e10 + 64) ** 0.5, rel=1e-3)  # float32 sums, up to a million elements
    assert torch.allclose(named["large"].grad.float(), torch.ones(()), rtol=1e-2)


def count_bytes(group) -> tuple[Counter, int, int]:
    """What this rank sends in one backward and step, the parameters' bytes, and the padding of all ranks."""
    run = Run(group, torch.float32)
    for step in range(2):
        run.backward(step)
        run.optimizer.step()
    run.model.zero_grad()
    loss = run.ddp(samples(2, torch.float32).share(group.rank(), group.size()))
    with Counter().counting() as counter:
        loss.backward()
        run.optimizer.step()
    plan = run.optimizer.plan
    return counter, sum(unit.nbytes for unit in plan.units), plan.padding_bytes


def clipped_by_value(group, reduced: bool) -> Weights:
    run = Run(group)
    if not reduced:
        run.ddp, run.optimizer = run.model, KLShampoo(zoo_groups(run.model), lr=1e-2, process_group=group)
    for step in range(5):
        run.backward(step)
        clip_grad_value_(run.optimizer, 0.01)
        run.optimizer.step()
    return weights_of(run.model)


def test_clipping_by_value_goes_with_the_hook(world):
    expected = world.run(clipped_by_value, 1, False)[0]
    assert deviation(world.run(clipped_by_value, 2, True)[0], expected) <= 1e-9


def test_a_negative_clip_value_is_refused():
    with pytest.raises(ValueError, match="at least 0"):
        clip_grad_value_(KLShampoo([torch.nn.Parameter(torch.ones(2, 2))]), -1.0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_and_updates_cost_what_an_all_reduce_does(world, world_size):
    """2 (W-1)/W of the parameters' bytes a rank, and the padding of the all-gathers."""
    found = world.run(count_bytes, world_size)
    _, size, padding = found[0]
    assert sum(sum(counter.swapped_out) for counter, _, _ in found) == (world_size - 1) * size
    assert sum(counter.gathered for counter, _, _ in found) == (world_size - 1) * size + padding
    assert all(len(counter.swapped_out) > 1 for counter, _, _ in found)


def misuse(group, how: str) -> None:
    run = Run(group)
    run.backward(0)
    if how == "clipped by torch":
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), CLIP)
    elif how == "changed on one rank" and group.rank() == 0:
        run.model.odd.weight.grad.mul_(2)
    elif how == "not reduced":
        run.model.zero_grad()
        with run.ddp.no_sync():
            run.backward(1)
    before = weights_of(run.model)
    message = "not reduced to its owner" if how == "not reduced" else "kl_dist.clip_grad_norm_"
    with raising(RuntimeError, message):
        run.optimizer.step()
    assert same_bits(weights_of(run.model), before)
    if how != "not reduced":
        run.backward(2)
        run.optimizer.step()


@pytest.mark.parametrize("how", ["clipped by torch", "changed on one rank", "not reduced"])
def test_a_gradient_that_is_not_the_hooks_is_refused_on_all_ranks(world, how):
    world.run(misuse, 2, how)


def left_out(group, views: bool, by_model: bool, set_to_none: bool) -> Weights:
    """A backward of which no step is made, and another after the gradients were cleared."""
    run = Run(group, views=views)
    for step in range(3):
        run.backward(step + 50)
        (run.model if by_model else run.optimizer).zero_grad(set_to_none)
        run.ddp(samples(step).share(group.rank(), group.size())).backward()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none)
    return weights_of(run.model)


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize(("by_model", "set_to_none"), [(False, True), (False, False), (True, True)])
def test_a_step_may_be_left_out_once_gradients_are_cleared(world, views, by_model, set_to_none):
    model = zoo(hidden=140)
    optimizer = KLShampoo(zoo_groups(model), lr=1e-2)
    for step in range(3):
        model.zero_grad(set_to_none)
        model(samples(step)).backward()
        optimizer.step()
    for weights in world.run(left_out, 2, views, by_model, set_to_none):
        assert deviation(weights, weights_of(model)) <= 1e-9


def accumulate(group, right: bool) -> Weights:
    """Two backwards for every step."""
    run = Run(group)
    for step in range(4):
        run.model.zero_grad()
        batch = samples(step).share(group.rank(), group.size())
        with run.ddp.no_sync() if right else contextlib.nullcontext():
            run.ddp(batch).backward()
        with contextlib.nullcontext() if right else raising(RuntimeError, r"no_sync\(\)"):
            run.ddp(samples(step + 50).share(group.rank(), group.size())).backward()
        if not right:
            return {}
        run.optimizer.step()
    return weights_of(run.model)


def test_gradients_accumulated_under_no_sync_are_reduced_once(world):
    model = zoo(hidden=140)
    optimizer = KLShampoo(zoo_groups(model), lr=1e-2)
    for step in range(4):
        model.zero_grad()
        model(samples(step)).backward()
        model(samples(step + 50)).backward()
        optimizer.step()
    for weights in world.run(accumulate, 2, True):
        assert deviation(weights, weights_of(model)) <= 1e-9


def refuse(group) -> None:
    model = zoo()
    optimizer = KLShampoo(zoo_groups(model), process_group=group)
    with raising(TypeError, "DistributedDataParallel, not Zoo"):
        optimizer.reduce_to_owners(model)
    some = KLShampoo([("odd.weight", model.odd.weight)], process_group=group)
    with raising(ValueError, "is trained but not by KLShampoo"):
        some.reduce_to_owners(DistributedDataParallel(model, process_group=group))
    with raising(ValueError, "max_norm must be at least 0"):
        clip_grad_norm_(optimizer, -1.0)


def test_what_cannot_be_reduced_is_refused(world):
    world.run(refuse, 2)
