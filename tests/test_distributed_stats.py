"""What an optimizer says of itself: of one rank, and of all together."""

import math
import time
from unittest import mock

import pytest
import torch

from kl_dist import KLShampoo
from kl_dist.step import stacks
from tests.models import METHODS, backward, samples, zoo, zoo_groups


def said(group, method: str, steps: int = 3):
    model = zoo()
    optimizer = KLShampoo(zoo_groups(model), lr=0.0, weight_decay=0.0, method=method, process_group=group)
    assert optimizer.stats(all_ranks=True)["update_rms"] is None
    for step in range(steps):
        backward(model, samples(step))
        optimizer.step()
    return optimizer.stats(matrices=True), optimizer.stats(all_ranks=True, matrices=True)


def measured(method: str, steps: int = 3) -> float:
    """The RMS of the last update of matrices, from what the weights move by."""
    model = zoo()
    optimizer = KLShampoo(zoo_groups(model), lr=1.0, adamw_lr=1.0, weight_decay=0.0, method=method)
    for step in range(steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        backward(model, samples(step))
        optimizer.step()
        with torch.no_grad():
            moves = {name: before[name] - p for name, p in model.named_parameters()}
            for name, p in model.named_parameters():
                p.copy_(before[name])  # so that every step starts where the other run's does
    served = {unit.parameter for unit in optimizer.plan.units if unit.method != "adamw"}
    names = [optimizer.plan.parameters[i].name for i in served]
    moved = [moves[name] for name in names if moves[name].any()]
    return math.sqrt(sum(float(x.square().sum()) for x in moved) / sum(x.numel() for x in moved))


@pytest.mark.parametrize("method", METHODS)
def test_all_ranks_together_say_what_one_process_says(world, method):
    (alone,) = world.run(said, 1, method)
    found = world.run(said, 3, method)
    assert all(both[1] == found[0][1] for both in found)
    whole = found[0][1]
    has_eigenvalues = method.startswith("kl_")
    assert (whole["condition"] is not None) is has_eigenvalues
    assert not has_eigenvalues or whole["condition"] == pytest.approx(alone[0]["condition"], rel=1e-9)
    assert whole["update_rms"] == pytest.approx(alone[0]["update_rms"], rel=1e-9)
    assert whole["refreshes"] == alone[0]["refreshes"] == sum(mine["refreshes"] for mine, _ in found)
    assert whole["refresh_seconds"] == max(mine["refresh_seconds"] for mine, _ in found)
    assert whole["refresh_balance"] >= 1 and whole["skipped_steps"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_update_rms_is_that_of_what_the_matrices_move_by(world, method):
    (alone,) = world.run(said, 1, method)
    assert alone[0]["update_rms"] == pytest.approx(measured(method), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_each_matrix_is_said_to_be_what_one_process_says_it_is(world, method):
    (alone,) = world.run(said, 1, method)
    found = world.run(said, 3, method)
    wanted = alone[0]["matrices"]
    assert all(both[1]["matrices"].keys() == wanted.keys() for both in found)
    assert {name for mine, _ in found for name in mine["matrices"]} == wanted.keys()
    for name, numbers in found[0][1]["matrices"].items():
        assert numbers.keys() == wanted[name].keys()
        for key, value in numbers.items():
            assert value == pytest.approx(wanted[name][key], rel=1e-6), (name, key)


class Uneven(torch.nn.Module):
    """One large matrix, which has one owner."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large = torch.nn.Linear(384, 384, bias=False)


def lately(group, steps: int = 3) -> tuple:
    model = Uneven()
    optimizer = KLShampoo(
        [("W", model.large.weight)], method="kl_shampoo", precondition_frequency=1, process_group=group
    )
    first = optimizer.stats(all_ranks=True)
    for _ in range(steps):
        model.large.weight.grad = torch.randn(384, 384)
        optimizer.step()
    mine, ours = optimizer.stats(), optimizer.stats(all_ranks=True)
    return first, mine, ours, optimizer.plan.cost, optimizer.parts.engine.clock.lately()


LATELY = ("communication_hidden", "flops_per_second", "work_as_run")


def test_the_owner_computes_while_its_updates_travel_and_the_others_wait(world):
    found = world.run(lately, 2)
    costs = found[0][3]
    owner = costs.index(max(costs))
    assert costs[1 - owner] == 0
    for first, mine, ours, _, times in found:
        assert all(first[key] is None for key in LATELY)
        assert times.steps == 3 and mine["communication_hidden"] == 1 - times.waits / times.in_flight
        assert 0 < times.waits <= times.in_flight
        assert ours == {**ours, **{key: found[0][2][key] for key in LATELY}}
        assert ours["work_as_run"] == pytest.approx(1)  # of those who have work
    (hidden, waited), pooled = [found[rank][1]["communication_hidden"] for rank in (owner, 1 - owner)], found[0][2]
    assert 0 <= waited < hidden <= 1
    waits, in_flight = (sum(getattr(one[4], name) for one in found) for name in ("waits", "in_flight"))
    assert pooled["communication_hidden"] == 1 - waits / in_flight


def slowed(group, slow: int | None) -> tuple:
    """Two matrices and two owners, of whom one takes a nap in each of its updates."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(24, 24)) for _ in range(2)]
    optimizer = KLShampoo(weights, process_group=group)
    updated = stacks.MatrixStack.update

    def update(self, *arguments):
        time.sleep(0.05)
        return updated(self, *arguments)

    with mock.patch.object(stacks.MatrixStack, "update", update if group.rank() == slow else updated):
        for _ in range(4):
            for weight in weights:
                weight.grad = torch.randn(24, 24)
            optimizer.step()
    return optimizer.stats(), optimizer.stats(all_ranks=True), optimizer.plan.cost


def test_work_as_run_says_how_far_a_rank_falls_behind_its_plan(world):
    found = world.run(slowed, 2, 1)
    costs = found[0][2]
    assert costs[0] == costs[1] > 0
    seconds = [4 * cost / mine["flops_per_second"] for cost, (mine, _, _) in zip(costs, found, strict=True)]
    for mine, ours, _ in found:
        assert mine["work_as_run"] == pytest.approx(1)
        assert ours["flops_per_second"] == pytest.approx(4 * sum(costs) / sum(seconds))
        assert ours["work_as_run"] == pytest.approx(max(seconds) / sum(seconds) / 0.5)
    assert seconds[1] == max(seconds) >= 4 * 0.05


def test_alone_nothing_travels_and_all_work_is_as_planned():
    parameter = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = KLShampoo([("W", parameter)])
    parameter.grad = torch.randn(6, 4)
    optimizer.step()
    for found in (optimizer.stats(), optimizer.stats(all_ranks=True)):
        assert found["communication_hidden"] is None and found["flops_per_second"] > 0
        assert found["work_as_run"] == pytest.approx(1)


def numbers_of(parameter: torch.nn.Parameter, optimizer: KLShampoo) -> dict:
    return optimizer.stats(matrices=True)["matrices"]["W"]


@pytest.mark.parametrize("method", METHODS)
def test_the_numbers_of_a_matrix_are_what_their_names_say(method):
    parameter = torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    optimizer = KLShampoo([("W", parameter)], lr=1.0, weight_decay=0.0, method=method, blocking="none")
    for step in range(5):
        parameter.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        before = parameter.detach().clone()
        optimizer.step()
    numbers = numbers_of(parameter, optimizer)
    assert numbers["weight_rms"] == pytest.approx(float(parameter.detach().square().mean().sqrt()))
    assert numbers["update_rms"] == pytest.approx(float((parameter.detach() - before).square().mean().sqrt()))
    state = optimizer.state[parameter]
    sides = [key.split(".")[1] for key in state if key.startswith("bases.")]
    assert {key.split(".")[1] for key in numbers if "." in key} == set(sides)
    for side in sides:
        values = state.get(f"eigenvalues.{side}", state[f"factors.{side}"].diagonal())
        p = values / values.sum()
        assert numbers[f"condition.{side}"] == pytest.approx(float(values.max() / values.min()))
        assert numbers[f"effective_rank.{side}"] == pytest.approx(
            float(torch.distributions.Categorical(p).entropy().exp())
        )
        assert 1 <= numbers[f"effective_rank.{side}"] <= len(values)
        low, *_, high = numbers[f"eigenvalues.{side}"]
        assert low * values.mean() == pytest.approx(float(values.min())) and high >= 1 >= low


def test_before_the_first_gradient_a_factor_has_full_effective_rank():
    parameter = torch.nn.Parameter(torch.ones(6, 4))
    numbers = numbers_of(parameter, KLShampoo([("W", parameter)], blocking="none"))
    assert (
        numbers["effective_rank.0"] == pytest.approx(6) and numbers["condition.1"] == 1 and "update_rms" not in numbers
    )


def test_a_program_that_replaces_the_clock_has_its_looks_to_itself(monkeypatch):
    """As Lightning's tests of its ThroughputMonitor do, which give the clock as many values as they look themselves."""
    parameter = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = KLShampoo([("W", parameter)], precondition_frequency=1)

    def look():
        raise StopIteration

    monkeypatch.setattr("time.perf_counter", look)
    for _ in range(3):
        parameter.grad = torch.ones(6, 4)
        optimizer.step()
    assert optimizer.stats()["refresh_seconds"] > 0
