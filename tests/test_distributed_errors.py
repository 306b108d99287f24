"""What is wrong on one rank is an error on all of them, before anything changes, and never a hang."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from kl_dist import KLShampoo
from tests.models import backward, raising, same_bits, samples, snapshot, train_alone, zoo, zoo_groups

ODD = 1  # the rank that differs
WORLD = 3

Named = list[tuple[str, torch.Tensor]]


def parameters() -> Named:
    shapes = {"first": (4, 3), "second": (5, 5), "bias": (5,), "last": (3, 2)}
    return [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]


# What the odd rank does with its parameters and options before it constructs the optimizer.


def other_option(named: Named, options: dict[str, Any], **changed: Any) -> None:
    options.update(changed)


def no_parameters(named: Named, options: dict[str, Any]) -> None:
    named.clear()


def one_less(named: Named, options: dict[str, Any]) -> None:
    del named[-1]


def one_more(named: Named, options: dict[str, Any]) -> None:
    named.append(("extra", torch.nn.Parameter(torch.ones(2, 2))))


def swapped(named: Named, options: dict[str, Any]) -> None:
    named[0], named[1] = named[1], named[0]


def replaced(named: Named, options: dict[str, Any], index: int, **kind: Any) -> None:
    name, parameter = named[index]
    named[index] = name, torch.ones(**{"size": parameter.shape, "requires_grad": True, **kind})


def frozen(named: Named, options: dict[str, Any]) -> None:
    named[1][1].requires_grad_(False)


def construct(group, alter: Callable, changes: dict[str, Any]) -> None:
    named, options = parameters(), {"lr": 1e-3}
    if group.rank() == ODD:
        alter(named, options, **changes)
    KLShampoo(named, process_group=group, **options)


@pytest.mark.parametrize(
    ("alter", "changes", "kind", "complaint"),
    [
        (other_option, {"lr": -1.0}, ValueError, r"lr must be at least 0"),
        (other_option, {"betas": (0.9, float("nan"))}, ValueError, r"betas\[1\] must be"),
        (other_option, {"method": "kl_shampo"}, ValueError, r"unknown method 'kl_shampo'; did you mean 'kl_shampoo'"),
        (other_option, {"fused": True}, TypeError, r"no option 'fused'"),
        (other_option, {"lr": 2e-3}, ValueError, r"differs between ranks: .*lr=0\.001.*, rank 1 has .*lr=0\.002"),
        (other_option, {"method": "soap"}, ValueError, r"differs between ranks: .*rank 1 has .*soap"),
        (other_option, {"on_nonfinite": "raise"}, ValueError, r"differs between ranks: .*skip.*, rank 1 has .*raise"),
        (no_parameters, {}, ValueError, r"empty parameter list"),
        (one_less, {}, ValueError, r"differs between ranks: .*'last'"),
        (one_more, {}, ValueError, r"differs between ranks: .*'extra'"),
        (swapped, {}, ValueError, r"differs between ranks: .*'first'.*, rank 1 has .*'second'"),
        (frozen, {}, ValueError, r"differs between ranks: .*'second'.*, rank 1 has "),
        (replaced, {"index": 0, "size": (4, 2)}, ValueError, r"'first', shape \(4, 3\).* rank 1 .*shape \(4, 2\)"),
        (replaced, {"index": 2, "dtype": torch.float64}, ValueError, r"'bias'.*float32.* rank 1 .*'bias'.*float64"),
        (replaced, {"index": 3, "dtype": torch.complex64}, TypeError, r"'last' is torch.complex64"),
        (
            replaced,
            {"index": 3, "dtype": torch.int32, "requires_grad": False},
            ValueError,
            "the plan of KLShampoo differs",
        ),
    ],
)
def test_what_differs_on_one_rank_fails_the_construction_on_all(world, alter, changes, kind, complaint):
    errors = world.run_expecting_errors(construct, WORLD, alter, changes)
    for rank, error in enumerate(errors):
        assert type(error) is kind, f"rank {rank}: {error!r}"
        with pytest.raises(kind, match=complaint):
            raise error


# What goes wrong on the odd rank before a step, and how to mend it.


def sparse_gradient(model, optimizer) -> Callable[[], None]:
    dense = model.embedding.weight.grad
    model.embedding.weight.grad = dense.to_sparse()
    return lambda: setattr(model.embedding.weight, "grad", dense)


def set_in_group(optimizer, key: str, value: Any) -> Callable[[], None]:
    group = optimizer.param_groups[0]
    before, group[key] = group[key], value
    return lambda: group.update({key: before})


def structural_option(model, optimizer) -> Callable[[], None]:
    return set_in_group(optimizer, "method", "unheard_of")


def infinite_lr(model, optimizer) -> Callable[[], None]:
    return set_in_group(optimizer, "lr", float("inf"))


def other_lr(model, optimizer) -> Callable[[], None]:
    return set_in_group(optimizer, "lr", 0.5)


def taken_away(model, optimizer, key: str) -> Callable[[], None]:
    group = optimizer.param_groups[0]
    before = dict(group)
    del group[key]
    return lambda: group.update(before)


def no_tensor(model, optimizer) -> Callable[[], None]:
    parameters = optimizer.param_groups[0]["params"]
    parameters.append("odd.weight")
    return lambda: parameters.remove("odd.weight")


def two_rates(model, optimizer) -> Callable[[], None]:
    return set_in_group(optimizer, "lr", torch.tensor([0.1, 0.2]))


def thaw_one(model, optimizer) -> Callable[[], None]:
    model.never.weight.requires_grad_(True)
    return lambda: model.never.weight.requires_grad_(False)


def set_data(parameter, data) -> Callable[[], None]:
    before, parameter.data = parameter.data, data
    return lambda: setattr(parameter, "data", before)


def cast_one(model, optimizer) -> Callable[[], None]:
    return set_data(model.never.bias, model.never.bias.float())


def resize_one(model, optimizer) -> Callable[[], None]:
    return set_data(model.never.bias, torch.zeros(4, dtype=torch.float64))


def fail_at_a_step(group, spoil: Callable, kind: type[Exception], complaint: str) -> None:
    """The step fails on all ranks and changes nothing; once mended, it is taken."""
    model = zoo()
    model.never.weight.requires_grad_(False)
    optimizer = KLShampoo(zoo_groups(model), process_group=group, lr=1e-2)
    train_alone(model, optimizer, range(3))
    backward(model, samples(3))
    before = snapshot(model, optimizer)
    mend = spoil(model, optimizer) if group.rank() == ODD else lambda: None
    for _ in range(2):
        with raising(kind, complaint):
            optimizer.step()
        mine = {name: x for name, x in snapshot(model, optimizer).items() if name != "never.bias"}
        assert all(torch.equal(x, before[name]) for name, x in mine.items())
    mend()
    optimizer.step()
    assert not same_bits(snapshot(model, optimizer), before)


@pytest.mark.parametrize(
    ("spoil", "kind", "complaint"),
    [
        (sparse_gradient, TypeError, r"the gradient of 'embedding.weight' is sparse"),
        (structural_option, ValueError, r"method.* cannot be changed after"),
        (infinite_lr, ValueError, r"lr must be at least 0 and finite"),
        (other_lr, ValueError, r"differs between ranks: .*lr=0\.01.*, rank 1 has .*lr=0\.5"),
        (two_rates, TypeError, r"lr is a number, not tensor"),
        (partial(taken_away, key="eps"), ValueError, r"parameter group 0 has no option 'eps': change options"),
        (partial(taken_away, key="base_lr"), ValueError, r"parameter group 0 has no option 'base_lr'"),
        (partial(taken_away, key="param_names"), ValueError, r"parameters and 0 param_names"),
        (no_tensor, TypeError, r"parameter group 0 has a str among its parameters"),
        (thaw_one, ValueError, r"differs between ranks: .*, rank 1 has .*'never.weight'"),
        (cast_one, ValueError, r"differs between ranks: .*'never.bias'.*float64.*, rank 1 has .*float32"),
        (resize_one, ValueError, r"'never.bias' had shape \(3,\) and now has \(4,\)"),
    ],
)
def test_what_is_wrong_on_one_rank_fails_the_step_on_all(world, spoil, kind, complaint):
    world.run(fail_at_a_step, WORLD, spoil, kind, complaint)


def state_that_is_no_dict(group) -> None:
    model = zoo()
    optimizer = KLShampoo(zoo_groups(model), process_group=group, lr=1e-2)
    backward(model, samples(0))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = optimizer.state[model.odd.weight]
    if group.rank() == ODD:
        optimizer.state[model.odd.weight] = 5
    with raising(ValueError, "the state of parameter 'odd.weight' was replaced by 5: put back the dict"):
        optimizer.step()
    assert same_bits({name: p.detach() for name, p in model.named_parameters()}, weights)
    optimizer.state[model.odd.weight] = before
    optimizer.step()
    assert not torch.equal(model.odd.weight, weights["odd.weight"])


def test_state_that_is_no_dict_on_one_rank_fails_the_step_on_all(world):
    world.run(state_that_is_no_dict, WORLD)


def fail_inside(group, function: str) -> tuple[int, str]:
    """From the third step on a function raises on the odd rank: which step raised here, and what."""
    model = zoo()
    optimizer = KLShampoo(zoo_groups(model), process_group=group, stagger=False)  # refreshes after steps 1, 3, 5, ..
    train_alone(model, optimizer, range(2))
    odd = group.rank() == ODD
    with mock.patch(function, side_effect=ArithmeticError("no luck")) if odd else contextlib.nullcontext():
        for step in range(2, 6):
            backward(model, samples(step))
            try:
                optimizer.step()
            except RuntimeError as error:
                _check_it_is_over(optimizer, odd)
                return step, str(error)
    raise AssertionError("no step raised")


def _check_it_is_over(optimizer, odd: bool) -> None:
    with raising(RuntimeError, "failed half-way"):
        optimizer.step()
    with raising(RuntimeError, "failed half-way") if odd else contextlib.nullcontext():
        optimizer.state_dict()


@pytest.mark.parametrize(
    ("function", "step"),
    [("kl_dist.methods.kronecker.project", 2), ("kl_dist.methods.linalg.orthogonal_iteration", 3)],
    ids=["an update", "a refresh"],
)
def test_a_failure_inside_an_owners_step_ends_all_ranks(world, function, step):
    message = "a step failed half-way (ArithmeticError: no luck)"
    for rank, (raised_at, text) in enumerate(world.run(fail_inside, WORLD, function)):
        assert raised_at == step
        assert text.startswith(message if rank == ODD else f"rank {ODD}: {message}")


UNREADY = """
import sys, torch
from kl_dist import KLShampoo
try:
    KLShampoo([torch.nn.Parameter(torch.ones(2, 2))], process_group=eval(sys.argv[1]))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("process_group", "processes", "complaint"),
    [
        ("None", "2", "one of 2 processes (WORLD_SIZE) but torch.distributed is not initialised: call"),
        ("object()", "1", "a process_group was given but torch.distributed is not initialised"),
    ],
)
def test_a_process_group_that_is_not_initialised_is_refused(process_group, processes, complaint):
    env = {**os.environ, "WORLD_SIZE": processes, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", UNREADY, process_group]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    assert complaint in found.stdout


def construct_in_the_first_two(group) -> int:
    """A group that the others of the world know of and do not belong to."""
    pair = dist.new_group([0, 1])
    optimizer = KLShampoo(parameters(), process_group=pair)
    return optimizer.plan.world_size


def test_a_rank_that_is_not_in_the_process_group_is_told_so(world):
    errors = world.run_expecting_errors(construct_in_the_first_two, 4)
    assert errors[:2] == [None, None]
    for error in errors[2:]:
        assert type(error) is ValueError
        assert "does not belong to the process_group" in str(error)


def go_on_after_an_error(group, fails: bool) -> dict[str, torch.Tensor]:
    """Two steps; where it fails, one between them is an error on all ranks, which the caller catches."""
    model = zoo()
    optimizer = KLShampoo(zoo_groups(model), process_group=group)
    for step in range(2):
        if step and fails:
            backward(model, samples(7))
            kept = optimizer.param_groups[0]["eps"]
            optimizer.param_groups[0]["eps"] = -1.0 if group.rank() == ODD else kept
            with contextlib.suppress(ValueError):
                optimizer.step()
                raise AssertionError("eps=-1 passed")
            optimizer.param_groups[0]["eps"] = kept
        backward(model, samples(step))
        optimizer.step()
    return snapshot(model, optimizer)


def test_a_step_after_an_error_takes_the_gradients_that_are_there_then(world):
    """Not those that had been looked at when the error was raised."""
    for failed, usual in zip(
        world.run(go_on_after_an_error, 2, True), world.run(go_on_after_an_error, 2, False), strict=True
    ):
        assert same_bits(failed, usual)
