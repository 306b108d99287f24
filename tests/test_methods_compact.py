"""Recipe "compact": the state in half the bytes, the training of "fresh" but for rounding, and its checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from kl_dist import KLShampoo, full_state_dict, load_full_state_dict, plan
from kl_dist.methods import Hyper, compact, rule
from tests.checkpoints import EVERY, Run
from tests.paths import WHOLE, peak_of_a_step, train, train_many
from tests.products import product
from tests.test_reference import gradients, low_rank_gradients

COMPACT: dict[str, Any] = {"recipe": "compact"}
STOP = EVERY + 2


def test_a_square_block_keeps_two_and_a_half_numbers_of_four_bytes_for_each_parameter():
    """10 d^2 bytes, and of eigenvalues, scale, step and start 8 d + 4 + 8 + 1."""
    d, model = 96, nn.Linear(96, 4 * 96, bias=False)
    expected = 4 * (10 * d * d + 8 * d + 13)
    optimizer = KLShampoo(model.parameters(), **COMPACT)
    held = [x for x in optimizer.state[model.weight].values() if isinstance(x, Tensor)]
    assert sum(x.nbytes for x in held) == expected == sum(optimizer.plan.state_bytes)
    assert plan(model, world_size=2, **COMPACT).state_bytes == (expected // 2, expected // 2)
    assert expected / 4 / model.weight.numel() < 2.6


def test_in_float64_it_is_fresh():
    grads = gradients((9, 7), 20)
    assert torch.equal(train(grads, **COMPACT), train(grads))


@pytest.mark.parametrize(("rank", "limit"), [(1, 0.15), (3, 0.03), (20, 0.01)])
@pytest.mark.parametrize("options", [{}, {"polar": 3}, {"nesterov": False}], ids=str)
def test_in_float32_it_is_fresh_but_for_rounding(rank, limit, options):
    """40 steps: weights within 1 % of the way that they have come; with gradients of few directions, 3 or 15 %."""
    grads = low_rank_gradients(24, 20, rank, 40).float()
    expected = train(grads, **WHOLE, **options)
    path = train(grads, **WHOLE, **COMPACT, **options)
    assert path.dtype == torch.float32 and path.isfinite().all()
    off = (path[-1] - expected[-1]).norm() / (expected[-1] - expected[0]).norm()
    assert 1e-7 < off < limit


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**20])
def test_the_scale_of_the_gradients_is_not_seen(scale):
    """Demand (a), exactly where the scale is a power of two."""
    grads = gradients((12, 8), 20).float()
    assert torch.equal(train(scale * grads, **COMPACT), train(grads, **COMPACT))


def test_what_is_made_wide_at_a_time_changes_nothing(monkeypatch):
    grads = [gradients((8, 8), 12, seed=i).float() for i in range(5)]
    expected = train_many(grads, **COMPACT)
    monkeypatch.setattr(compact, "AT_ONCE", 2 * 64)
    found = train_many(grads, **COMPACT)
    assert all(torch.allclose(x, y, rtol=0, atol=1e-5) for x, y in zip(found, expected, strict=True))


def test_bases_are_as_orthogonal_as_float16_has_them_for_ever():
    """1,200 refreshes of a 32 x 32: 5e-3, and no more in the last third than in the second."""
    d, rules = 32, rule("kl_shampoo", "compact")
    hyper = Hyper(betas=(0.9, 0.95), eps=1e-8, precondition_frequency=1)
    state = rules.allocate((d, d), ("full", "full"), 1, torch.empty(()))
    generator, spectrum = torch.Generator().manual_seed(0), torch.logspace(0, -3, d)[:, None]
    errors = []
    rules.start(state, spectrum * torch.randn(1, d, d, generator=generator), hyper)
    for _ in range(1200):
        rules.update(state, spectrum * torch.randn(1, d, d, generator=generator), hyper, torch.empty(1, d, d))
        rules.refresh(state, hyper)
        wide = [basis.float() for basis in state.bases]
        errors.append(max(float((Q.mT @ Q - torch.eye(d)).abs().max()) for Q in wide))
    _, second, last = torch.tensor(errors).chunk(3)
    assert last.max() < 8e-3 and last.mean() < 1.2 * second.mean()
    assert state.bases[0].dtype == state.factors[1].dtype == torch.float16 and state.exp_avg.dtype == torch.bfloat16


def test_after_a_spike_and_a_silence_nothing_is_out_of_range():
    """A gradient of rank one a million times larger, then zeros, then tiny ones: factors reach d, momenta 1e6 and 0."""
    signs = gradients((64, 64), 30).sign().float()
    grads = torch.cat([signs[:10], 1e6 * torch.ones(1, 64, 64), torch.zeros(30, 64, 64), 1e-20 * signs[10:]])
    path = train(grads, lr=1.0, weight_decay=0.0, **COMPACT)
    sizes = path.diff(dim=0).flatten(1).square().mean(1).sqrt()
    assert path.isfinite().all() and sizes.max() < 10


# -- checkpoints -------------------------------------------------------------------------------------------------------


def as_stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A fresh state as "compact" stores it."""
    field = {name: name.rsplit(" ", 1)[-1].split(".") for name in state}
    matrices = {name.split(" ")[0] for name in state if "bases" in name}
    return {
        name: next(
            (x.to(to) for part, to in compact.NARROW.items() if part in field[name] and name.split(" ")[0] in matrices),
            x,
        )
        for name, x in state.items()
        if "form" not in name
    }


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Names, dtypes and every number, but for the forms."""
    ours = {name: x for name, x in ours.items() if "form" not in name}
    return (
        ours.keys() == theirs.keys()
        and all(x.dtype == theirs[name].dtype for name, x in ours.items())
        and all(torch.equal(x, theirs[name]) for name, x in ours.items())
    )


@pytest.mark.parametrize("recipes", [("fresh", "compact"), ("compact", "fresh")], ids=str)
@pytest.mark.parametrize("way", ["full", "state_dict", "file"])
def test_checkpoints_go_from_one_form_to_the_other(recipes, way, tmp_path):
    before = Run(None, dtype=torch.float32, recipe=recipes[0]).train(0, STOP)
    after = Run(None, dtype=torch.float32, recipe=recipes[1], lr=0.5)
    after.set_weights(before.weights())
    if way == "full":
        load_full_state_dict(after.optimizer, full_state_dict(before.optimizer))
    else:
        state = before.optimizer.state_dict()
        if way == "file":
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt")
        after.optimizer.load_state_dict(state)
    group = after.optimizer.param_groups[0]
    assert group["recipe"] == recipes[1] and group["lr"] == 1e-2
    ours, theirs = after.canonical(), before.canonical()
    if recipes[1] == "compact":
        assert same(ours, as_stored(theirs))
    else:
        assert same(ours, {name: x.to(ours[name].dtype) for name, x in theirs.items() if "form" not in name})
    after.train(STOP, STOP + EVERY)
    twin = Run(None, dtype=torch.float32).train(0, STOP + EVERY).weights()
    start = Run(None, dtype=torch.float32).weights()
    for name, x in after.weights().items():
        assert (x - twin[name]).norm() < 0.05 * (twin[name] - start[name]).norm() + 1e-6, name


def test_other_dtypes_and_recipes_are_still_refused():
    run = Run(None, dtype=torch.float32, recipe="compact").train(0, 2)
    with pytest.raises(ValueError, match="has dtype"):
        load_full_state_dict(Run(None, recipe="compact").optimizer, full_state_dict(run.optimizer))
    with pytest.raises(ValueError, match="recipe"):
        load_full_state_dict(Run(None, dtype=torch.float32, recipe="paper").optimizer, full_state_dict(run.optimizer))


def saved_by_two(group, recipe: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    run = Run(group, dtype=torch.float32, recipe=recipe).train(0, STOP)
    model, optimizer = get_state_dict(run.model, run.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder, process_group=group)
    return run.canonical(), run.weights()


def loaded_by_two(group, recipe: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    run = Run(group, "fsdp", dtype=torch.float32, recipe=recipe, lr=0.5)
    model, optimizer = get_state_dict(run.model, run.optimizer)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=folder, process_group=group)
    set_state_dict(run.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loaded = run.canonical()
    run.train(STOP, STOP + EVERY)
    return loaded, run.weights()


def resharded(group) -> bool:
    """A full state of this form, gathered from two ranks and given to two in another layout."""
    run = Run(group, dtype=torch.float32, recipe="compact").train(0, STOP)
    state = full_state_dict(run.optimizer)
    other = Run(group, "fsdp", dtype=torch.float32, recipe="compact")
    load_full_state_dict(other.optimizer, state)
    mine, theirs = run.canonical(), other.canonical()
    return same(mine, {name: x for name, x in theirs.items() if "form" not in name})


@pytest.mark.parametrize("recipes", [("fresh", "compact"), ("compact", "fresh")], ids=str)
def test_torchs_distributed_checkpoint_goes_from_one_form_and_layout_to_the_other(recipes, world, tmp_path):
    saved = world.run(saved_by_two, 2, recipes[0], tmp_path / "c")[0]
    loaded = world.run(loaded_by_two, 2, recipes[1], tmp_path / "c")[0]
    assert same(as_stored(loaded[0]), as_stored(saved[0]))
    assert {x.dtype for name, x in loaded[0].items() if "bases" in name} == {
        torch.float16 if recipes[1] == "compact" else torch.float32
    }
    start = Run(None, dtype=torch.float32).weights()
    twin = Run(None, dtype=torch.float32).train(0, STOP + EVERY).weights()
    for name, x in loaded[1].items():
        assert (x - twin[name]).norm() < 0.05 * (twin[name] - start[name]).norm() + 1e-6, name


def test_a_full_state_goes_to_other_ranks_and_another_layout(world):
    assert all(world.run(resharded, 2))


def two_ranks(group) -> dict[str, Tensor]:
    return Run(group, dtype=torch.float32, recipe="compact").train(0, 12).weights()


def test_two_ranks_train_as_one(world):
    """To a tenth of a percent of the way, where gradients averaged in another order change the rounding."""
    expected, start = Run(None, dtype=torch.float32, recipe="compact").train(0, 12).weights(), Run(None).weights()
    for name, x in world.run(two_ranks, 2)[0].items():
        assert (x - expected[name]).norm() < 1e-2 * (expected[name] - start[name]).norm() + 1e-6, name


@product(shape=[(96, 96), (96, 64), (40, 120)], count=[1, 2, 6], options=[{}, {"polar": 0}, {"blocking": "none"}])
def test_the_peak_of_a_step_is_what_the_plan_says(shape, count, options):
    """The state of what is stepped at a time, made wide, and what "fresh" takes."""
    peak, said = peak_of_a_step(count, shape, **COMPACT, **options)
    assert peak == pytest.approx(said, rel=0.05)


def test_of_large_stacks_a_part_is_wide_at_a_time_and_never_two():
    """32 of 70 matrices of 256 x 256, with five numbers each of a gradient."""
    peak, said = peak_of_a_step(70, (256, 256), **COMPACT)
    assert peak == pytest.approx(said, rel=0.05) and said < 4 * 256**2 * (2 * 70 + 5.1 * 32)
