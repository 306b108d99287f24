"""A run that is stopped anywhere and resumed goes on as if it had not been."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.memory import PeakMemory
from kl_dist import KLShampoo, full_state_dict, load_full_state_dict
from tests.checkpoints import EVERY, FURTHER, LAYOUTS, Run, flat, furthest
from tests.counting import Counter
from tests.models import Weights, deviation, same_bits
from tests.noise import NOISE, float32_limit
from tests.products import product
from tests.sharded import groups_of, layers, loss_of, tokens_of, train_alone


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def stop_and_go_on(group, layout: str, stop: int) -> None:
    """Each rank's own part, to the bit."""
    run, other = Run(group, layout).train(0, stop), Run(group, layout, lr=0.5)
    saved, weights = through_a_file(run.optimizer.local_state_dict()), run.weights()
    assert same_keys(group, saved)
    other.set_weights(weights)
    other.optimizer.load_state_dict(saved)
    for one in (run, other):
        one.train(stop, stop + FURTHER)
    assert same_bits(run.weights(), other.weights())
    assert same_bits(run.canonical(), other.canonical())


def same_keys(group, saved: dict[str, Any]) -> bool:
    keys = {(number, key) for number, entries in saved["state"].items() for key in entries}
    everywhere: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(everywhere, keys, group=group)
    return all(other == keys for other in everywhere)


@product(**{"layout,world_size": LAYOUTS, "stop": range(EVERY + 1)})
def test_at_the_same_world_size_it_is_the_same_run_to_the_bit(world, layout, world_size, stop):
    world.run(stop_and_go_on, world_size, layout, stop)


class Surrounded:
    """A run in float64 with a schedule and a gradient scaler around it."""

    def __init__(self, group) -> None:
        self.model = layers(torch.float64)
        self.optimizer = KLShampoo(groups_of(self.model), process_group=group, precondition_frequency=EVERY)
        self.schedule = OneCycleLR(self.optimizer, 2e-2, total_steps=20)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)

    def train(self, first: int, last: int) -> "Surrounded":
        for step in range(first, last):
            self.optimizer.zero_grad()
            self.scaler.scale(loss_of(self.model, tokens_of(step))).backward()
            if step == 3:
                self.model.one.weight.grad[0, 0] = float("inf")  # this step is left out and the scale halved
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
        return self

    def save(self) -> dict[str, Any]:
        return {
            "model": copy.deepcopy(self.model.state_dict()),
            "optimizer": full_state_dict(self.optimizer),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, saved: dict[str, Any]) -> "Surrounded":
        self.model.load_state_dict(saved["model"])
        load_full_state_dict(self.optimizer, saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.scaler.load_state_dict(saved["scaler"])
        return self


def resume_surrounded(group, saved: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    return Surrounded(group).load(saved).train(first, last).save()


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    return Surrounded(None).train(0, 12).save()


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_schedule_and_scaler_go_on_too(world, undisturbed, stop):
    saved = through_a_file(Surrounded(None).train(0, stop).save())
    saved = world.run(resume_surrounded, 2, saved, stop, 8)[0]
    for resumed in world.run(resume_surrounded, 3, through_a_file(saved), 8, 12):
        assert furthest(resumed["model"], undisturbed["model"]) < 1e-9
        assert resumed["scaler"] == undisturbed["scaler"]
        assert resumed["schedule"] == undisturbed["schedule"]


def resume_in_float32(group, layout: str, saved: Any, first: int, last: int) -> Any:
    run = Run(group, layout, torch.float32)
    if saved is not None:
        run.set_weights(saved[0])
        load_full_state_dict(run.optimizer, saved[1])
    run.train(first, last)
    return run.weights(), full_state_dict(run.optimizer)


def in_float32(seed: int = 0) -> Weights:
    options = {"precondition_frequency": EVERY, "lr": 1e-2}
    return train_alone(torch.float32, 15, options, NOISE if seed else 0.0, seed)


YARDSTICKS = {"resumed at other world sizes": in_float32}


def test_in_float32_at_another_world_size_it_differs_as_rounding_does(world):
    saved = world.run(resume_in_float32, 2, "ddp", None, 0, 5)[0]
    saved = world.run(resume_in_float32, 4, "fsdp", saved, 5, 10)[0]
    for weights, _ in world.run(resume_in_float32, 3, "ddp", saved, 10, 15):
        assert deviation(weights, in_float32()) <= float32_limit("resumed at other world sizes")


def change_after_resuming(group, layout: str, saved: Any) -> Any:
    run = Run(group, layout)
    run.set_weights(saved[0])
    load_full_state_dict(run.optimizer, saved[1])
    for changed in run.optimizer.param_groups:
        changed.update(precondition_frequency=2, lr=3e-3, weight_decay=0.1)
    run.model.mix.weight.requires_grad_(False)
    run.train(4, 8)
    run.model.mix.weight.requires_grad_(True)
    return run.train(8, 11).weights()


def test_what_is_changed_after_a_resume_is_changed_alike(world):
    run = Run(None).train(0, 4)
    saved = (run.weights(), full_state_dict(run.optimizer))
    alone = change_after_resuming(None, "ddp", saved)
    for layout, world_size in (("ddp", 3), ("fsdp", 2)):
        for weights in world.run(change_after_resuming, world_size, layout, saved):
            assert furthest(weights, alone) < 1e-9


def consolidate(group, to: int) -> Any:
    """ZeroRedundancyOptimizer's protocol, as Lightning follows it; then what is left is each rank's own part."""
    run = Run(group).train(0, 5)
    canonical = flat(full_state_dict(run.optimizer, to))
    run.optimizer.consolidate_state_dict(to=to)
    given = run.optimizer.state_dict()
    assert ("kl_dist" in given) == (group.rank() != to)
    if group.rank() == to:
        assert same_bits(flat(given), canonical)
    assert run.optimizer.state_dict()["kl_dist"]["rank"] == group.rank()
    return given if group.rank() == to else None


def load_consolidated(group, saved: dict[str, Any]) -> dict[str, torch.Tensor]:
    run = Run(group, "fsdp")
    run.optimizer.load_state_dict(saved)
    return run.canonical()


def test_a_consolidated_state_is_all_of_it_on_one_rank_and_loads_anywhere(world):
    saved = through_a_file(next(given for given in world.run(consolidate, 3, 1) if given is not None))
    assert same_bits(world.run(load_consolidated, 2, saved)[0], flat(saved))


def copied(group) -> None:
    """copy.deepcopy, and a group that is added, leave every rank's state alone."""
    run = Run(group).train(0, 4)
    twin = copy.deepcopy(run)
    before = run.canonical()
    assert same_bits(twin.canonical(), before)
    twin.optimizer.add_param_group({"params": [("late", torch.nn.Parameter(torch.ones(4, 4, dtype=torch.float64)))]})
    after = twin.canonical()
    if group.rank() == 0:
        assert same_bits({name: x for name, x in after.items() if not name.startswith("late ")}, before)
    run.train(4, 8)
    assert same_bits(twin.train(4, 8).weights(), run.weights())


def test_copies_and_added_groups_keep_every_ranks_state(world):
    world.run(copied, 3)


# -- costs -------------------------------------------------------------------------------------------------------------


def costs(group, saved: Any) -> tuple[int, int, int]:
    """Bytes at the peak of loading, of the largest tensor, and sent while a state dict is made.

    Of a second load: what the first keeps for those after it, such as weights of checksums, is not asked for again.
    """
    run = Run(group)
    load_full_state_dict(run.optimizer, saved if group.rank() == 0 else None)
    largest = max(x.nbytes for entry in saved["state"].values() for x in entry.values())
    with PeakMemory() as memory:
        load_full_state_dict(run.optimizer, saved if group.rank() == 0 else None)
    counter = Counter()
    with counter.counting():
        run.optimizer.state_dict()
    sent = counter.gathered + int(counter.reduced) + sum(counter.swapped_out)
    return memory.peak, largest, sent


def test_loading_needs_room_for_one_matrix_and_a_state_dict_sends_nothing(world):
    run = Run(None).train(0, 2)
    saved = full_state_dict(run.optimizer)
    whole = sum(x.nbytes for entry in saved["state"].values() for x in entry.values())
    for peak, largest, sent in world.run(costs, 4, saved):
        assert sent == 0
        assert peak <= 1.5 * largest + 2048 < whole / 4


def shares(group, folder) -> tuple[int, int, int]:
    run = Run(group).train(0, 2)
    state = run.optimizer.state_dict()["state"]
    dcp.save({"optimizer": state}, checkpoint_id=folder, process_group=group)
    written = sum(path.stat().st_size for path in folder.glob(f"__{group.rank()}_*"))
    tensors = sum(len(entries) for entries in state.values())
    return written, run.optimizer.plan.state_bytes[group.rank()], tensors


def test_each_rank_writes_its_own_share(world, tmp_path):
    results = world.run(shares, 4, tmp_path)
    whole = sum(held for _, held, _ in results)
    for written, held, tensors in results:
        # torch writes each tensor as a file of its own within the file
        assert held <= written <= held + 1600 * tensors / 2
    assert whole > 4 * min(held for _, held, _ in results)


def save_where_one_fails(group, folder) -> None:
    """A file that one rank cannot write is an error on all."""
    run = Run(group).train(0, 2)
    if group.rank() == 1:
        (folder / "__1_0.distcp").mkdir()
    torch.distributed.barrier(group=group)
    with pytest.raises(BaseException, match=r"__1_0\.distcp"):
        dcp.save({"optimizer": run.optimizer.state_dict()}, checkpoint_id=folder, process_group=group)


def test_a_save_that_fails_on_one_rank_fails_on_all(world, tmp_path):
    world.run(save_where_one_fails, 2, tmp_path)
