"""What our optimizer communicates in a step under DeepSpeed is what the plan says, to the byte, and little."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from kl_dist.planning.ownership import UNEVENNESS
from kl_dist.planning.traffic import Bytes
from tests.counting import Counter
from tests.deepspeed_runs import config, deepspeed_here, engine_of, train
from tests.models import small_buckets
from tests.products import product
from tests.world import World
from tests.zero_plans import zero_plan

BF16 = {"bf16": {"enabled": True}}
PRECISIONS = {
    "float32": {},
    "bf16": BF16,
    "bf16, gradients in float32": {**BF16, "data_types": {"grad_accum_dtype": "fp32"}},
}


RANKS = [2, pytest.param(3, marks=pytest.mark.full), 4]


class Seen(NamedTuple):
    """What one rank saw of one step."""

    sent: Counter
    said: Bytes
    agreement: int
    parameters: int  # bytes of all that is trained, in float32

    @property
    def trips(self) -> Bytes:
        """What was counted, of a step with one bucket of matrices."""
        (gradients_out, updates_out), (gradients_in, updates_in) = self.sent.swapped_out, self.sent.swapped_in
        return Bytes(gradients_out, gradients_in, updates_out, updates_in, self.said.padding)


def observe(engine: Any, train: Callable[[], None]) -> Seen:
    """Counts within the step of our optimizer that `train` makes."""
    core, sent = engine.basic_optimizer.core, Counter()
    step = core.step

    def counted() -> None:
        with sent.counting():
            step()

    core.step = counted
    train()
    found, rank = core.plan, torch.distributed.get_rank()
    return Seen(sent, found.traffic_bytes[rank], found.agreement_size, sum(4 * p.numel for p in found.parameters))


def of_net(group, stage: int, bucket_bytes: int | None = None, **more: Any) -> Seen:
    with deepspeed_here(group) as deepspeed:
        with small_buckets(bucket_bytes):
            engine = engine_of(deepspeed, config(stage, ranks=group.size(), **more))
        train(engine, range(2))
        seen = observe(engine, lambda: train(engine, range(2, 3)))
        engine.destroy()
        return seen


@pytest.mark.parametrize("precision", ["float32", "bf16"])  # at stage 0 there are no others
@pytest.mark.parametrize("ranks", RANKS)
def test_a_step_without_zero_gathers_updates_alone(worlds, ranks, precision):
    for seen in worlds[ranks].run(of_net, ranks, 0, timeout=120, **PRECISIONS[precision]):
        assert seen.sent.reduces == [seen.agreement, 1]
        assert seen.sent.gathered == seen.said.updates_sent == seen.said.updates_received > 0
        assert not seen.sent.swapped_out and seen.said.gradients_sent == seen.said.gradients_received == 0


def check_trips(world: World, stage: int, precision: str) -> None:
    found = world.run(of_net, world.ranks, stage, timeout=120, **PRECISIONS[precision])
    for seen in found:
        assert seen.sent.reduces == [seen.agreement, 1]
        assert seen.trips == seen.said and not seen.sent.gathers
    for trip in ("gradients_sent", "gradients_received", "updates_sent", "updates_received"):
        assert 0 < mean(getattr(seen.trips, trip) for seen in found) <= found[0].parameters / world.ranks


@product(ranks=[2, 4], stage=[1, 2, 3], precision=PRECISIONS)
def test_a_step_sends_and_receives_what_the_plan_says(worlds, ranks, stage, precision):
    """Gradients and updates apart; on average a rank's share of the parameters at most, in and out."""
    check_trips(worlds[ranks], stage, precision)


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_three_ranks_do_too(worlds, stage):
    check_trips(worlds[3], stage, "float32")


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_with_several_buckets_too(worlds, stage):
    for seen in worlds[2].run(of_net, 2, stage, 2048, timeout=120):
        said, sent = seen.said, seen.sent
        assert len(sent.gathers) + len(sent.swapped_out) > 2
        assert sum(sent.swapped_out) + sent.gathered == said.gradients_sent + said.updates_sent
        assert sum(sent.swapped_in) + sent.gathered == said.gradients_received + said.updates_received


SIDE = 48


def of_equal_matrices(group, stage: int) -> Seen:
    """As many as there are ranks: at stages 1 and 2 a partition each."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(group.size())))
    given = {**config(stage, shares=1), "train_micro_batch_size_per_gpu": 2}
    with deepspeed_here(group) as deepspeed:
        engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=given)[0]

        def one_step() -> None:
            engine.backward(engine(torch.randn(2, SIDE)).square().mean())
            engine.step()

        one_step()
        seen = observe(engine, one_step)
        engine.destroy()
        return seen


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", RANKS)
def test_a_matrix_that_lies_whole_with_its_owner_moves_nothing(worlds, ranks, stage):
    """At stage 3 every rank has a part of each matrix."""
    for seen in worlds[ranks].run(of_equal_matrices, ranks, stage, timeout=120):
        of_each_other = 4 * SIDE * SIDE // ranks if stage == 3 else 0
        assert seen.sent.swapped_out == seen.sent.swapped_in == 2 * [(ranks - 1) * of_each_other]


def planned(group, stage: int) -> tuple[Any, Any]:
    """By DeepSpeed's engine, and by arithmetic."""
    with deepspeed_here(group) as deepspeed:
        engine = engine_of(deepspeed, config(stage, ranks=group.size()), one_group=True)
        found = engine.basic_optimizer.core.plan
        engine.destroy()
    shapes = {parameter.name: parameter.shape for parameter in found.parameters}
    expected = zero_plan(shapes, group.size(), stage, ["embedding.weight"])
    return [(one.parameters, one.units, one.owners, one.traffic_bytes, one.balance) for one in (found, expected)]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", RANKS)
def test_partitions_are_what_arithmetic_says(worlds, ranks, stage):
    for found, expected in worlds[ranks].run(planned, ranks, stage, timeout=120):
        assert found == expected and found[-1] < 1.5


# Of P / W, where P are the bytes of all parameters: what a rank sends on average, gradients or updates.
SHARES = {
    (1, 2): 0.13,
    (1, 4): 0.16,
    (1, 8): 0.2,
    (1, 64): 0.19,
    (3, 2): 0.18,
    (3, 4): 0.29,
    (3, 8): 0.6,
    (3, 64): 0.68,
}


@pytest.mark.parametrize(("stage", "ranks"), SHARES)
def test_gpt2_communicates_less_than_its_share(gpt2, stage, ranks):
    """And the largest share of work is a tenth above that of the evenest division, at most."""
    shapes = {name: tuple(p.shape) for name, p in gpt2.named_parameters()}
    found, even = (zero_plan(shapes, ranks, at, ["wte.weight", "wpe.weight"]) for at in (stage, 0))
    share = sum(4 * p.numel for p in found.parameters) / ranks
    for trip in ("gradients_sent", "gradients_received", "updates_sent", "updates_received"):
        assert mean(getattr(one, trip) for one in found.traffic_bytes) <= SHARES[stage, ranks] * share
    assert max(found.cost) <= (1 + UNEVENNESS) * max(even.cost)
    assert max(found.state_bytes) <= 1.3 * max(even.state_bytes)


def test_the_page_has_what_gpt2_takes_of_a_ranks_memory(gpt2):
    shapes = {name: tuple(p.shape) for name, p in gpt2.named_parameters()}
    plans = {ranks: zero_plan(shapes, ranks, 1, ["wte.weight", "wpe.weight"]) for ranks in (2, 4, 8, 64)}
    buffers, steps = (
        ", ".join(f"{max(map(getattr(plan, what), range(ranks))) / 1e6:.0f}" for ranks, plan in plans.items())
        for what in ("room_bytes", "working_bytes")
    )
    page = (Path(__file__).parents[1] / "docs/deepspeed.md").read_text()
    assert f"GPT-2 at stage 1: {buffers} MB at W = 2, 4, 8, 64 |" in page
    assert f"freed after it; GPT-2 at stage 1: {steps} MB;" in page
