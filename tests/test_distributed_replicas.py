"""Parameters that every rank has, and that are not the same on all: an error, unless they are a rank's own."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from kl_dist import KLShampoo
from kl_dist.layouts.replicas import checksum
from tests.models import Weights, deviation, raising, same_bits
from tests.sharded import LAYOUTS, lay_out, layers, loss_of, mesh_of, tokens_of, weights_of

DIFFERS = "has other weights on some ranks"


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def backward(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(4, 5, generator=generator, dtype=torch.float64)).square().mean().backward()


def gathered_for_a_forward(group: dist.ProcessGroup) -> None:
    model = net(0)
    fully_shard(model, mesh=mesh_of(group, (group.size(),), ("shard",)))
    with torch.no_grad():
        model(torch.ones(2, 5, dtype=torch.float64))
    optimizer = KLShampoo(model.parameters(), process_group=group)
    model.reshard()
    with raising(ValueError, "parameter 'group0.param0' has no memory: FSDP2 frees"):
        optimizer.step()


def test_what_fsdp2_has_gathered_for_a_forward_and_freed_is_refused(world):
    world.run(gathered_for_a_forward, 2)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> Weights:
    for step in range(3):
        optimizer.zero_grad()
        backward(model, 100 * seed + step)
        optimizer.step()
    return weights_of(model)


def differ(group: dist.ProcessGroup) -> None:
    model = net(0)
    with torch.no_grad():
        model[2].weight[0, 0] += 1e-9 * group.rank()
    optimizer = KLShampoo(model, process_group=group)
    backward(model, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):  # the second as well
        with raising(ValueError, f"parameter '2.weight' {DIFFERS}"):
            optimizer.step()
    assert same_bits({name: p.detach() for name, p in model.named_parameters()}, before)
    dist.broadcast(model[2].weight.data, group=group, group_src=0)
    optimizer.step()


def test_weights_that_differ_are_an_error_on_all_ranks_before_the_first_step(world):
    world.run(differ, 3)


def wrapped_later(group: dist.ProcessGroup) -> Weights:
    model = net(group.rank())
    optimizer = KLShampoo(model, lr=1e-2, process_group=group)
    wrapped = DistributedDataParallel(model, process_group=group)  # broadcasts rank 0's
    steps(wrapped, optimizer, 0)
    return weights_of(model)


def test_what_ddp_broadcasts_after_the_optimizer_was_made_is_no_error(world):
    model = net(0)
    expected = steps(model, KLShampoo(model, lr=1e-2), 0)
    for weights in world.run(wrapped_later, 2):
        assert deviation(weights, expected) < 1e-9


def hybrid(group: dist.ProcessGroup) -> None:
    model = layers(torch.float64)
    if group.rank() >= 2:
        with torch.no_grad():
            model.norm.bias[-1] = 1e-12
    part, parts = lay_out(model, "hsdp", group)
    optimizer = KLShampoo(model, process_group=group)
    loss_of(model, tokens_of(0).chunk(parts)[part]).backward()
    with raising(ValueError, f"parameter 'norm.bias' {DIFFERS}"):
        optimizer.step()


def test_replicas_of_shards_are_compared_too(world):
    assert LAYOUTS["hsdp"] == (4,)
    world.run(hybrid, 4)


def experts_of_a_rank(group: dist.ProcessGroup) -> Weights:
    """Beside what the ranks share, each has a model of its own under an optimizer of its own."""
    own = [dist.new_group([rank]) for rank in range(group.size())][group.rank()]
    shared, expert = net(0), net(10 + group.rank())
    steps(shared, KLShampoo(shared, process_group=group), 0)
    return steps(expert, KLShampoo(expert, lr=1e-2, process_group=own), group.rank())


def test_a_ranks_own_experts_are_served_by_its_own_group(worlds):
    for rank, weights in enumerate(worlds[2].run(experts_of_a_rank, 2)):
        expert = net(10 + rank)
        assert deviation(weights, steps(expert, KLShampoo(expert, lr=1e-2), rank)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_checksum_tells_any_bit(dtype):
    x: Tensor = torch.linspace(-3, 3, 64).reshape(8, 8).to(dtype)
    other = x.clone()
    other.view(torch.uint8)[3, 1] ^= 1
    assert checksum(x) == checksum(x.clone()) != checksum(other)
    assert checksum(x.t()) == checksum(x.t().contiguous())
