"""Parameters exchanged in, appended to or taken out of `param_groups` in place are followed from the next step on."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from kl_dist import KLShampoo, full_state_dict
from tests.checkpoints import flat
from tests.made_up import give_gradients, parameters, same, train, values
from tests.models import deviation, raising, same_bits
from tests.sharded import layers, loss_of, mesh_of, tokens_of, weights_of

STEPS = range(6)
SHARDED_STEPS = 10


def copies(params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}


def test_exchanged_parameters_go_on_with_the_state_of_those_before():
    expected, params = parameters(), parameters()
    train(KLShampoo(expected.items()), expected, STEPS)
    opt = KLShampoo(params.items())
    train(opt, params, STEPS[:3])
    others = copies(params)
    opt.param_groups[0]["params"] = list(others.values())
    before = values(params)
    train(opt, others, STEPS[3:])
    assert same(values(others), values(expected)) and same(values(params), before)
    assert set(opt.state) == set(others.values())


def test_a_list_in_another_order_takes_every_state_along():
    expected, params = parameters(), parameters()
    train(KLShampoo(expected.items()), expected, STEPS)
    opt = KLShampoo(params.items())
    train(opt, params, STEPS[:3])
    opt.param_groups[0]["params"].reverse()
    train(opt, params, STEPS[3:])
    assert deviation(values(params), values(expected)) < 1e-12
    assert opt.param_groups[0]["param_names"] == list(reversed(params))


def test_what_is_appended_starts_and_what_is_taken_out_rests():
    params, expected = parameters(), parameters()
    opt, twin = KLShampoo(params.items()), KLShampoo(expected.items())
    train(opt, params, STEPS[:3])
    train(twin, expected, STEPS[:3])
    late = nn.Parameter(torch.ones(3, 5, dtype=torch.float64))
    gone = opt.param_groups[0]["params"].pop(1)  # "square"; its twin of the same shape stays
    opt.param_groups[0]["params"].append(late)
    rest = gone.detach().clone()
    for step in STEPS[3:]:
        give_gradients(expected, step)
        give_gradients(params, step)
        late.grad = torch.ones_like(late)
        opt.step()
        twin.step()
    assert torch.equal(gone, rest) and not torch.equal(late, torch.ones_like(late)) and gone not in opt.state
    for name in params.keys() - {"square"}:
        assert deviation({name: params[name].detach()}, {name: expected[name].detach()}) < 1e-12
    assert len(opt.plan.parameters) == len(params)


def test_a_parameter_of_another_shape_takes_no_ones_name():
    params = parameters()
    opt = KLShampoo(params.items())
    train(opt, params, STEPS[:2])
    wider = nn.Parameter(torch.ones(4, 9, dtype=torch.float64))
    opt.param_groups[0]["params"][0] = wider
    wider.grad = torch.randn(4, 9, dtype=torch.float64)
    opt.step()
    names = opt.param_groups[0]["param_names"]
    assert names[0] not in params and names[1:] == list(params)[1:]
    assert int(opt.state[wider]["step"]) == 1 and int(opt.state[params["square"]]["step"]) == 3


def test_a_parameter_that_changes_its_group_has_the_new_ones_options():
    params = parameters()
    square = [("square", params["square"])]
    rest = [(name, p) for name, p in params.items() if name != "square"]
    opt = KLShampoo([{"params": rest}, {"params": square, "lr": 0.0, "weight_decay": 0.0}])
    train(opt, params, STEPS[:2])
    moved = opt.param_groups[0]["params"].pop(0)
    opt.param_groups[1]["params"].append(moved)
    before = values(params)
    train(opt, params, STEPS[2:4])
    assert torch.equal(moved, before["wide"]) and int(opt.state[moved]["step"]) == 4
    assert not torch.equal(params["twin"], before["twin"])


@pytest.mark.parametrize("read", [lambda opt: opt.state_dict(), lambda opt: opt.load_state_dict({})])
def test_state_is_not_saved_or_loaded_for_parameters_that_no_step_has_followed(read):
    params = parameters()
    opt = KLShampoo(params.items())
    train(opt, params, STEPS[:2])
    opt.param_groups[0]["params"].pop()
    with pytest.raises(RuntimeError, match="call follow_groups\\(\\) on all ranks"):
        read(opt)
    opt.follow_groups()
    assert len(opt.state_dict()["param_groups"][0]["params"]) == len(params) - 1


def test_copies_follow_too():
    params = parameters()
    opt = KLShampoo(params.items())
    train(opt, params, STEPS[:2])
    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        others = copies(params)
        copied.param_groups[0]["params"] = list(others.values())
        train(copied, others, STEPS[2:4])
        assert int(copied.state[others["square"]]["step"]) == 4


# -- as accelerate does it: the optimizer first, FSDP2 afterwards ------------------------------------------------------


def sharded_after(group: dist.ProcessGroup, steps_before: int) -> tuple[dict[str, Tensor], dict]:
    """The weights after all steps, and the state; after some the model is sharded, and the lists are exchanged."""
    model = layers(torch.float64)
    names = [name for name, _ in model.named_parameters()]
    optimizer = KLShampoo(list(model.named_parameters()), lr=1e-2, process_group=group)
    rank, ranks = group.rank(), group.size()

    def step(number: int) -> None:
        optimizer.zero_grad()
        loss_of(model, tokens_of(number).chunk(ranks)[rank]).backward()
        if number < steps_before:  # as DDP would
            for parameter in model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=group)
                    parameter.grad /= ranks
        optimizer.step()

    for number in range(steps_before):
        step(number)
    fully_shard(model, mesh=mesh_of(group, (ranks,), ("shard",)))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    if steps_before:
        assert optimizer.state_dict()["param_groups"][0]["param_names"] == names  # a collective: it is followed here
    for number in range(steps_before, SHARDED_STEPS):
        step(number)
    return weights_of(model), full_state_dict(optimizer)


def on_one_process() -> tuple[dict[str, Tensor], dict]:
    model = layers(torch.float64)
    optimizer = KLShampoo(list(model.named_parameters()), lr=1e-2)
    for number in range(SHARDED_STEPS):
        optimizer.zero_grad()
        loss_of(model, tokens_of(number)).backward()
        optimizer.step()
    return weights_of(model), full_state_dict(optimizer)


@pytest.mark.parametrize("steps_before", [0, 3])
def test_what_is_sharded_after_the_optimizer_was_made_trains_as_on_one_process(world, steps_before):
    found = world.run(sharded_after, 2, steps_before)
    assert all(same_bits(weights, found[0][0]) for weights, _ in found)
    expected, state = on_one_process()
    assert deviation(found[0][0], expected) <= 1e-9
    sharded = flat(found[0][1])
    for name, tensor in flat(state).items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-7, atol=1e-9)


def exchanged_on_one_rank(group: dist.ProcessGroup) -> None:
    params = parameters()
    opt = KLShampoo(params.items(), process_group=group)
    if group.rank() == 1:
        opt.param_groups[0]["params"].pop()
    give_gradients(params, 0)
    with raising(ValueError, "the plan of KLShampoo differs between ranks"):
        opt.step()


def test_lists_that_differ_between_ranks_are_an_error_on_all(world):
    world.run(exchanged_on_one_rank, 3)
