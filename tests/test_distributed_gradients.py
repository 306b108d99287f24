"""Gradients that are missing or not finite on some ranks only: the owner decides, and the ranks stay together."""

import logging
from typing import NamedTuple

import pytest
import torch

from kl_dist import KLShampoo
from tests.models import UNTOUCHED, Weights, backward, raising, same_bits, samples, snapshot, zoo, zoo_groups
from tests.sharded import groups_of, lay_out, layers, loss_of, tokens_of
from tests.sharded import weights_of as sharded_weights

MATRIX = "odd.weight"


class Run:
    """A model and its optimizer on one rank, stepped with the gradients of all samples unless a test changes them."""

    def __init__(self, group, steps: int = 3, **options) -> None:
        self.group, self.model = group, zoo()
        self.optimizer = KLShampoo(zoo_groups(self.model), process_group=group, **options)
        self.parameters = dict(self.model.named_parameters())
        for step in range(steps):
            self.prepare(step)
            self.optimizer.step()

    def prepare(self, step: int) -> None:
        backward(self.model, samples(step))

    def owner(self, name: str, element: int = 0) -> int:
        """The rank that owns an element of a parameter, counted as if it were flat."""
        for unit, rank in self.optimizer.plan.owner.items():
            if unit == name:
                return rank
            if unit.startswith(f"{name}[flat "):
                start, stop = map(int, unit.removesuffix("]").split(" ")[-1].split(":"))
                if start <= element < stop:
                    return rank
        raise AssertionError(f"nobody owns {name}")

    def snapshot(self) -> Weights:
        return snapshot(self.model, self.optimizer)


class Outcome(NamedTuple):
    before: Weights
    after: Weights
    usual: Weights  # after the same step with all gradients present and finite, on all ranks

    def changed(self) -> set[str]:
        return {name for name, x in self.before.items() if not torch.equal(x, self.after[name])}


def lose_a_gradient(group, where: str) -> Outcome:
    run, usual = Run(group), Run(group)
    usual.prepare(3)
    usual.optimizer.step()
    before = run.snapshot()
    run.prepare(3)
    owner = run.owner(MATRIX) == group.rank()
    if where == "everywhere" or owner is (where == "on its owner"):
        run.parameters[MATRIX].grad = None
    run.optimizer.step()
    return Outcome(before, run.snapshot(), usual.snapshot())


def weights_in(names: Weights) -> Weights:
    return {name: x for name, x in names.items() if not name.startswith("state ")}


@pytest.mark.parametrize("where", ["on its owner", "everywhere"])
def test_a_matrix_whose_owner_has_no_gradient_rests_on_all_ranks(world, where):
    outcomes = world.run(lose_a_gradient, 3, where)
    for outcome in outcomes:
        resting = {name for name in outcome.before if name.split(" of ")[-1] == MATRIX}
        assert not outcome.changed() & resting
        assert {"convolution.weight", "odd.bias", "experts", "embedding.weight"} <= outcome.changed()
        others = outcome.after.keys() - resting
        assert all(torch.equal(outcome.after[name], outcome.usual[name]) for name in others)
        assert same_bits(weights_in(outcome.after), weights_in(outcomes[0].after))
    assert sum(outcome.before[f"state 'exp_avg' of {MATRIX}"].numel() > 0 for outcome in outcomes) == 1


def test_a_gradient_that_only_others_than_the_owner_lack_changes_nothing(world):
    for outcome in world.run(lose_a_gradient, 3, "off its owner"):
        assert MATRIX in outcome.changed()
        assert same_bits(outcome.after, outcome.usual)


def lose_the_gradient_of_slices(group) -> tuple[Outcome, str]:
    """One owner lacks the gradient of a parameter that AdamW serves in slices, whose other owners have it."""
    run, usual = Run(group, method="adamw"), Run(group, method="adamw")
    usual.prepare(3)
    usual.optimizer.step()
    before = run.snapshot()
    run.prepare(3)
    owners = {name: {run.owner(name, i) for i in range(p.numel())} for name, p in run.parameters.items()}
    name = next(name for name, ranks in owners.items() if len(ranks) > 1 and name not in UNTOUCHED)
    if group.rank() == max(owners[name]):
        run.parameters[name].grad = None
    run.optimizer.step()
    return Outcome(before, run.snapshot(), usual.snapshot()), name


def test_a_parameter_in_slices_rests_as_a_whole_when_one_owner_lacks_its_gradient(world):
    for outcome, name in world.run(lose_the_gradient_of_slices, 3):
        resting = {key for key in outcome.before if key.split(" of ")[-1] == name}
        assert name in resting and not outcome.changed() & resting
        assert all(torch.equal(x, outcome.usual[key]) for key, x in outcome.after.items() if key not in resting)


def without_a_shards_gradient(group, how: str) -> Weights:
    """FSDP2, where one rank has no gradient of its rows, or one of zero; before that all have had theirs."""
    model = layers(torch.float64)
    lay_out(model, "fsdp", group)
    optimizer = KLShampoo(groups_of(model), lr=1e-2, process_group=group)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, tokens_of(step).chunk(group.size())[group.rank()]).backward()
        if step > 1 and group.rank() == 1 and how == "zero":
            model.mix.weight.grad.to_local().zero_()
        if step > 1 and group.rank() == 1 and how == "none":
            model.mix.weight.grad = None
        optimizer.step()
    return sharded_weights(model)


def test_a_shard_without_a_gradient_is_one_with_a_gradient_of_zero(world):
    found = {how: world.run(without_a_shards_gradient, 2, how)[0] for how in ("zero", "none", "there")}
    assert same_bits(found["none"], found["zero"])
    assert not torch.equal(found["zero"]["mix.weight"], found["there"]["mix.weight"])


def lose_gradients_at_random(group, steps: int) -> Weights:
    run = Run(group, steps=0)
    generator = torch.Generator().manual_seed(group.rank())
    for step in range(steps):
        run.prepare(step)
        for parameter in run.parameters.values():
            if torch.rand((), generator=generator) < 0.4:
                parameter.grad = None
        run.optimizer.step()
    run.model.zero_grad()
    run.optimizer.step()  # no gradient at all, anywhere
    return weights_in(run.snapshot())


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_that_lack_gradients_at_random_neither_hang_nor_diverge(world, world_size):
    weights, *others = world.run(lose_gradients_at_random, world_size, 12)
    assert all(same_bits(other, weights) for other in others)
    assert all(x.isfinite().all() for x in weights.values())
    start = dict(zoo().named_parameters())
    assert all(torch.equal(x, start[name]) is (name in UNTOUCHED) for name, x in weights.items())


def freeze_on_one_rank(group, on_owner: bool) -> tuple[bool, Weights]:
    """Whether the matrix moved, and all weights."""
    run = Run(group)
    owner = run.owner(MATRIX)
    if group.rank() == (owner if on_owner else (owner + 1) % group.size()):
        run.parameters[MATRIX].requires_grad_(False)
    before = run.snapshot()
    for step in range(3, 6):
        run.prepare(step)
        run.optimizer.step()
    after = run.snapshot()
    return not torch.equal(before[MATRIX], after[MATRIX]), weights_in(after)


@pytest.mark.parametrize("on_owner", [True, False])
def test_a_matrix_frozen_on_one_rank_only_does_as_on_its_owner(world, on_owner):
    results = world.run(freeze_on_one_rank, 3, on_owner)
    assert [moved for moved, _ in results] == [not on_owner] * 3
    assert all(same_bits(weights, results[0][1]) for _, weights in results)


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def spoil(run: Run, name: str, value: float, on_owner: bool) -> None:
    """Write `value` into the last element of a gradient, on the rank that owns this element or on all others."""
    grad = run.parameters[name].grad
    if (run.owner(name, grad.numel() - 1) == run.group.rank()) is on_owner:
        grad.view(-1)[-1] = value


def meet_nonfinite_gradients(group, name: str, value: float) -> None:
    """Three spoiled steps in a row, then a good one: as if the three had never been."""
    run, usual = Run(group), Run(group)
    before, records, logger = run.snapshot(), Records(), logging.getLogger("kl_dist")
    logger.addHandler(records)
    try:
        for _ in range(3):
            run.prepare(3)
            spoil(run, name, value, on_owner=True)
            run.optimizer.step()
            assert same_bits(run.snapshot(), before)
    finally:
        logger.removeHandler(records)
    assert run.optimizer.stats()["skipped_steps"] == 3
    assert len(records.texts) == 1
    assert name in records.texts[0]
    for each in (run, usual):
        each.prepare(3)
        each.optimizer.step()
    assert same_bits(run.snapshot(), usual.snapshot())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", [MATRIX, "embedding.weight", "odd.bias", "scalar"])
def test_a_nonfinite_gradient_on_its_owner_skips_the_step_on_all_ranks(world, name, value):
    world.run(meet_nonfinite_gradients, 3, name, value)


def meet_what_the_owner_does_not_see(group, name: str) -> None:
    run, usual = Run(group), Run(group)
    for each in (run, usual):
        each.prepare(3)
    spoil(run, name, float("nan"), on_owner=False)
    for each in (run, usual):
        each.optimizer.step()
    assert run.optimizer.stats()["skipped_steps"] == 0
    assert same_bits(run.snapshot(), usual.snapshot())


@pytest.mark.parametrize("name", [MATRIX, "odd.bias"])
def test_a_nonfinite_gradient_off_its_owner_is_never_read(world, name):
    world.run(meet_what_the_owner_does_not_see, 3, name)


def raise_for_nonfinite(group) -> None:
    run = Run(group, on_nonfinite="raise")
    before = run.snapshot()
    run.prepare(3)
    spoil(run, MATRIX, float("inf"), on_owner=True)
    with raising(FloatingPointError, f"'{MATRIX}'"):
        run.optimizer.step()
    assert same_bits(run.snapshot(), before)
    run.prepare(3)
    run.optimizer.step()
    assert not same_bits(run.snapshot(), before)


def test_a_nonfinite_gradient_raises_on_all_ranks_where_asked_to(world):
    world.run(raise_for_nonfinite, 3)
