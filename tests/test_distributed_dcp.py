"""torch.distributed.checkpoint saves and loads the optimizer as it does any other."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from kl_dist import load_full_state_dict
from tests.checkpoints import EVERY, FURTHER, Run, flat, furthest
from tests.models import raising, same_bits

STOP = EVERY + 2
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
OFFLOADED = StateDictOptions(cpu_offload=True)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def stopped(group, layout: str) -> Run:
    return Run(group, layout).train(0, STOP)


@cache
def group_of_its_own() -> dist.ProcessGroup:
    """For what is said from another thread, which must not mix with what training says."""
    return dist.new_group()


def save(group, layout: str, folder: Path, options: StateDictOptions | None = None, later: bool = False) -> Any:
    """Save a run's model and optimizer; its weights and state at that moment."""
    run = stopped(group, layout)
    model, optimizer = get_state_dict(run.model, run.optimizer, options=options)
    state = {"model": model, "optimizer": optimizer}
    weights, canonical = run.weights(), copy.deepcopy(run.canonical())
    if later:
        saving = dcp.async_save(state, checkpoint_id=folder, process_group=group_of_its_own())
        run.train(STOP, STOP + 1)  # meanwhile the state goes on
        saving.result()
    else:
        dcp.save(state, checkpoint_id=folder, process_group=group)
    return weights, canonical


def load(group, layout: str, folder: Path, options: StateDictOptions | None = None) -> Any:
    """Load it into a run of another layout, which goes on; its state as loaded, and its weights later."""
    run = Run(group, layout, lr=0.5)
    model, optimizer = get_state_dict(run.model, run.optimizer, options=options)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=folder, process_group=group)
    set_state_dict(
        run.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )
    assert run.optimizer.param_groups[0]["lr"] == 1e-2
    loaded = copy.deepcopy(run.canonical())
    run.train(STOP, STOP + FURTHER)
    return loaded, run.weights()


@pytest.fixture(scope="module")
def later() -> dict[str, torch.Tensor]:
    return Run(None).train(0, STOP + FURTHER).weights()


FORMS = {"nested": None, "flat": FLAT, "offloaded": OFFLOADED}
CROSSINGS = {  # from one layout to another, and the form that the state takes; of the others `make test-full`
    (("ddp", 2), ("fsdp", 4)): "nested",
    (("fsdp", 4), ("ddp", 3)): "flat",
    (("ddp", 3), ("hsdp", 4)): "offloaded",
    (("hsdp", 4), ("fsdp", 2)): "nested",
    (("fsdp", 2), ("fsdp", 2)): "offloaded",
    (("tp", 2), ("ddp", 2)): "flat",
    (("fsdp+tp", 4), ("tp", 2)): "nested",
    (("ddp", 4), ("fsdp+tp", 4)): "flat",
}
CASES = [
    pytest.param(*layouts, form, id=f"{layouts}-{form}", marks=() if form == chosen else pytest.mark.full)
    for layouts, chosen in CROSSINGS.items()
    for form in FORMS
]


@pytest.mark.parametrize(("source", "target", "form"), CASES)
def test_what_one_layout_saves_another_loads(world, later, tmp_path, source, target, form):
    _, saved = world.run(save, source[1], source[0], tmp_path, FORMS[form])[0]
    results = world.run(load, target[1], target[0], tmp_path, FORMS[form])
    assert same_bits(results[0][0], saved)
    assert max(furthest(weights, later) for _, weights in results) < 1e-9


@pytest.mark.parametrize(("layout", "world_size"), [("ddp", 4), ("fsdp", 4)])
def test_an_asynchronous_save_has_the_state_of_its_moment(world, later, tmp_path, layout, world_size):
    _, saved = world.run(save, world_size, layout, tmp_path, None, later=True)[0]
    results = world.run(load, 2, "ddp", tmp_path)
    assert same_bits(results[0][0], saved)


def gather_by_torch(group, layout: str) -> Any:
    """The full state dict by torch and by kl_dist, and what loads it back."""
    run = stopped(group, layout)
    full = get_optimizer_state_dict(run.model, run.optimizer, options=FULL)
    mine = run.canonical()
    assert group.rank() != 0 or same_bits(flat(full), mine)
    everywhere = get_optimizer_state_dict(run.model, run.optimizer, options=StateDictOptions(full_state_dict=True))
    other = Run(group, layout)
    set_optimizer_state_dict(other.model, other.optimizer, everywhere, options=StateDictOptions(full_state_dict=True))
    theirs = other.canonical()
    assert group.rank() != 0 or same_bits(theirs, mine)
    third = Run(group, layout)
    load_full_state_dict(third.optimizer, full)
    theirs = third.canonical()
    assert group.rank() != 0 or same_bits(theirs, mine)
    return full


GATHERED = [("ddp", 3), ("fsdp+tp", 4), *(pytest.param(one, 4, marks=pytest.mark.full) for one in ("fsdp", "hsdp"))]


@pytest.mark.parametrize(("layout", "world_size"), GATHERED)
def test_torch_gathers_and_spreads_the_full_state(world, layout, world_size):
    world.run(gather_by_torch, world_size, layout)


def spread_from_rank_0(group, layout: str, full: dict[str, Any]) -> Any:
    run = Run(group, layout)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = full if group.rank() == 0 else {"state": {}, "param_groups": []}
    set_optimizer_state_dict(run.model, run.optimizer, copy.deepcopy(state), options=options)
    return run.canonical()


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "hsdp"])
def test_torch_spreads_the_state_of_rank_0(world, layout):
    run = Run(None).train(0, STOP)
    full = get_optimizer_state_dict(run.model, run.optimizer, options=StateDictOptions(full_state_dict=True))
    assert same_bits(world.run(spread_from_rank_0, 4, layout, full)[0], run.canonical())


def refuse(group, folder: Path, options: dict[str, Any]) -> None:
    """Before anything of it is written into the state that is there."""
    run = Run(group, **options)
    _, optimizer = get_state_dict(run.model, run.optimizer)
    before = copy.deepcopy(run.canonical())
    with raising(BaseException, r"Missing key in checkpoint state_dict: optimizer\.state"):
        dcp.load({"optimizer": optimizer}, checkpoint_id=folder, process_group=group)
    assert same_bits(run.canonical(), before)


def save_and_refuse(group, folder: Path, options: list[dict[str, Any]]) -> None:
    """Save runs with some options, and load what each has saved with those of the next."""
    for number, one in enumerate(options):
        run = Run(group, **one).train(0, 2)
        _, optimizer = get_state_dict(run.model, run.optimizer)
        dcp.save({"optimizer": optimizer}, checkpoint_id=folder / str(number), process_group=group)
    for number, one in enumerate(options):
        refuse(group, folder / str((number + 1) % len(options)), one)


@pytest.mark.parametrize("options", [{"method": "kl_soap"}, {"method": "soap"}, {"recipe": "paper"}], ids=str)
def test_a_checkpoint_of_another_method_is_refused_and_changes_nothing(world, tmp_path, options):
    """In both directions."""
    world.run(save_and_refuse, 2, tmp_path, [{}, options])
