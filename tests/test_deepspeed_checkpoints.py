"""Checkpoints of DeepSpeed's engine with our optimizer: exact, at another world size too, or refused by name."""

import json
import math
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from tests.deepspeed_runs import alone, config, deepspeed_here, engine_of, noisy, train, weights_of
from tests.models import Weights, deviation, raising, same_bits
from tests.noise import float32_limit
from tests.world import World

STOP, STEPS = 4, 8
BF16 = {"bf16": {"enabled": True}}
CASES = {
    "stage 0": (0, {}),
    "stage 0, bf16": (0, BF16),
    "stage 1": (1, {}),
    "stage 1, bf16 with gradients in float32": (1, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    "stage 2": (2, {}),
    "stage 3": (3, {"zero": {"sub_group_size": 500}}),
}
FIRST, LAST = 1e-3, 2e-2
SCHEDULE = {"type": "WarmupLR", "params": {"warmup_min_lr": FIRST, "warmup_max_lr": LAST, "warmup_num_steps": STEPS}}


def rate(step: int) -> float:
    """DeepSpeed's WarmupLR, whose first step is not of the warm-up."""
    return FIRST + (LAST - FIRST) * math.log(max(step, 1)) / math.log(STEPS)


SCHEDULED = {"steps": STEPS, "schedule": rate}
YARDSTICKS = {"deepspeed scheduled": partial(noisy, **SCHEDULED)}
reference = cache(alone)


class Seen(NamedTuple):
    """Of one run: the weights where it was saved or loaded and at its end, and the groups' options at its end."""

    stopped: Weights
    ended: Weights
    options: list[tuple[float, float]]


def made(deepspeed, group, name: str, **more):
    stage, options = CASES[name]
    given = config(stage, ranks=group.size(), scheduler=SCHEDULE, **{**options, **more})
    return engine_of(deepspeed, given)


def go_on(deepspeed, engine) -> Seen:
    stopped = weights_of(deepspeed, engine)
    train(engine, range(STOP, STEPS))
    options = [(group["lr"], group["weight_decay"]) for group in engine.basic_optimizer.groups]
    seen = Seen(stopped, weights_of(deepspeed, engine), options)
    engine.destroy()
    return seen


def saved(group, name: str, folder: str) -> Seen:
    with deepspeed_here(group) as deepspeed:
        engine = made(deepspeed, group, name)
        train(engine, range(STOP))
        engine.save_checkpoint(folder)
        return go_on(deepspeed, engine)


def resumed(group, name: str, folder: str, universal: bool = False) -> Seen:
    """Of a run that had begun otherwise and loaded the checkpoint."""
    with deepspeed_here(group) as deepspeed:
        engine = made(deepspeed, group, name, **({"checkpoint": {"load_universal": True}} if universal else {}))
        if not universal:
            train(engine, range(2))
        path, _ = engine.load_checkpoint(folder)
        assert path is not None
        return go_on(deepspeed, engine)


class Checkpoints:
    """Each is saved once, and lent as a copy."""

    def __init__(self, worlds: dict[int, World], folder_of: Callable[[str], Path]) -> None:
        self.worlds, self.folder_of = worlds, folder_of
        self.made: dict[tuple[str, int], tuple[Path, Seen]] = {}

    def lend(self, name: str, to: Path, ranks: int = 2) -> tuple[Path, Seen]:
        """The folder for engine.load_checkpoint, and what rank 0 saw of the run that saved it."""
        if (name, ranks) not in self.made:
            folder = self.folder_of("checkpoint")
            self.made[name, ranks] = folder, self.worlds[ranks].run(saved, ranks, name, str(folder), timeout=120)[0]
        folder, seen = self.made[name, ranks]
        return shutil.copytree(folder, to), seen


@pytest.fixture(scope="module")
def checkpoints(worlds, tmp_path_factory) -> Checkpoints:
    return Checkpoints(worlds, tmp_path_factory.mktemp)


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_to_the_bit_the_undisturbed_one(worlds, checkpoints, name, tmp_path):
    folder, expected = checkpoints.lend(name, tmp_path / "saved")
    found = worlds[2].run(resumed, 2, name, str(folder), timeout=120)[0]
    assert same_bits(found.stopped, expected.stopped)
    assert same_bits(found.ended, expected.ended) and found.options == expected.options


@pytest.mark.parametrize("name", ["stage 0", "stage 1", "stage 2", "stage 3"])
def test_the_undisturbed_run_is_that_of_one_process_on_this_schedule(checkpoints, name, tmp_path):
    """So that the comparisons above are of the right thing."""
    _, seen = checkpoints.lend(name, tmp_path / "saved")
    assert deviation(seen.ended, reference(**SCHEDULED)) <= float32_limit("deepspeed scheduled")


RESIZED = [
    *[("stage 1", 2, 4), ("stage 2", 4, 2), ("stage 3", 2, 4)],
    *[pytest.param(f"stage {stage}", 2, after, marks=pytest.mark.full) for stage in (1, 2, 3) for after in (1, 3)],
]


@pytest.mark.parametrize(("name", "before", "after"), RESIZED)
def test_a_universal_checkpoint_goes_on_at_another_world_size(worlds, checkpoints, name, before, after, tmp_path):
    from deepspeed_integration.universal import convert

    folder, seen = checkpoints.lend(name, tmp_path / "saved", before)
    for _ in range(2):  # what a first conversion has left is replaced
        convert(folder / f"global_step{STOP}", folder / f"global_step{STOP}_universal")
    found = worlds[after].run(resumed, after, name, str(folder), True, timeout=120)[0]
    assert same_bits(found.stopped, seen.stopped) and found.options == seen.options
    assert deviation(found.ended, reference(**SCHEDULED)) <= float32_limit("deepspeed scheduled")


def test_what_cannot_be_converted_is_said(checkpoints, tmp_path):
    from deepspeed_integration.universal import convert

    folder, _ = checkpoints.lend("stage 0", tmp_path / "saved")
    for tag, said in ((f"global_step{STOP}", "as it is"), ("global_step77", "there is no checkpoint")):
        with pytest.raises(ValueError, match=said):
            convert(folder / tag, tmp_path / "universal")
    assert not (tmp_path / "universal").exists()


def loading_fails(group, name: str, folders: list[str]) -> tuple[list[tuple[str, bool]], Weights]:
    """By folder the error, and whether weights and state are as they were; then the weights one step later."""
    with deepspeed_here(group) as deepspeed:
        engine = made(deepspeed, group, name)
        train(engine, range(2))
        before, state, found = weights_of(deepspeed, engine), copies(engine), []
        for folder in folders:
            error = ""
            try:
                engine.load_checkpoint(folder)
            except ValueError as problem:
                error = str(problem)
            same = same_bits(before, weights_of(deepspeed, engine)) and same_bits(state, copies(engine))
            found.append((error, same))
        train(engine, range(2, 3))
        weights = weights_of(deepspeed, engine)
        engine.destroy()
        return found, weights


def copies(engine) -> Weights:
    entries = enumerate(engine.basic_optimizer.core.state.values())
    return {f"{number} {key}": x.clone() for number, one in entries for key, x in one.items()}


def damaged(folder: Path, how: str) -> Path:
    """The file of a checkpoint that is not as it should be."""
    inside = folder / f"global_step{STOP}" / "kl_dist"
    victim = next(inside.glob("__1_*")) if how != "no manifest" else inside / "manifest.json"
    if how == "changed":
        raw = bytearray(victim.read_bytes())
        raw[len(raw) // 2] ^= 255
        victim.write_bytes(raw)
    else:
        victim.unlink()
    return victim


@pytest.mark.parametrize("name", ["stage 0", "stage 2", "stage 3"])
def test_damaged_state_is_refused_by_name_and_leaves_the_run_as_it_was(worlds, checkpoints, name, tmp_path):
    folders = [checkpoints.lend(name, tmp_path / how)[0] for how in ("missing", "changed", "no manifest")]
    victims = [damaged(folder, folder.name) for folder in folders]
    for found, weights in worlds[2].run(loading_fails, 2, name, list(map(str, folders)), timeout=120):
        for (error, same), victim in zip(found, victims, strict=True):
            assert str(victim) in error and "load_optimizer_states=False" in error and same
        assert deviation(weights, reference(**{**SCHEDULED, "steps": 3})) <= float32_limit("deepspeed scheduled")


class Cut(Exception):
    """The end of a process between the two halves of a save."""


def cut_between_the_halves(group, name: str, folder: str) -> None:
    """A run is saved, goes on, and is saved to the same tag; that save ends before DeepSpeed's half of it."""
    with deepspeed_here(group) as deepspeed:
        engine = made(deepspeed, group, name)
        train(engine, range(2))
        engine.save_checkpoint(folder, f"global_step{STOP}")
        train(engine, range(2, 3))
        with mock.patch.object(type(engine), "_create_checkpoint_file", side_effect=Cut), raising(Cut, ""):
            engine.save_checkpoint(folder, f"global_step{STOP}")
        engine.destroy()


@pytest.mark.parametrize("name", ["stage 0", "stage 2", "stage 3"])
def test_halves_of_two_saves_are_refused_and_leave_the_run_as_it_was(worlds, name, tmp_path):
    """One that was cut short, and one with our folder of an earlier step."""
    worlds[2].run(cut_between_the_halves, 2, name, str(tmp_path / "cut"), timeout=120)
    for found, _ in worlds[2].run(loading_fails, 2, name, [str(tmp_path / "cut")], timeout=120):
        ((error, same),) = found
        assert (
            "are of two saves, of which one was cut short" in error and "load_optimizer_states=False" in error and same
        )


def with_another_rate(group, name: str, folder: str) -> list[Weights]:
    """Of a run, and of one that was begun at twice the rate and has loaded its checkpoint; matrices have their own."""
    stage, options = CASES[name]
    found = []
    with deepspeed_here(group) as deepspeed:
        for lr in (1e-3, 2e-3):
            own = {"lr": lr, "matrix_lr": 1e-1, "adamw_lr": 5e-3}
            engine = engine_of(deepspeed, config(stage, ranks=group.size(), options=own, **options), one_group=True)
            if not found:
                train(engine, range(2))
                engine.save_checkpoint(folder)
            else:
                engine.load_checkpoint(folder)
            train(engine, range(2, 4))
            found.append(weights_of(deepspeed, engine))
            engine.destroy()
    return found


@pytest.mark.parametrize("name", ["stage 0", "stage 1"])
def test_rates_in_proportion_to_lr_are_those_of_the_run_that_saved(worlds, name, tmp_path):
    for expected, found in worlds[2].run(with_another_rate, 2, name, str(tmp_path), timeout=120):
        assert same_bits(found, expected)


def kept_out(group, name: str, folder: str) -> tuple[dict, dict]:
    """What the client gave to a save, and what a load gives back."""
    with deepspeed_here(group) as deepspeed:
        engine = made(deepspeed, group, name)
        given = {"epoch": 3}
        engine.save_checkpoint(folder, client_state=given)
        _, found = engine.load_checkpoint(folder)
        engine.destroy()
        return given, found


def test_the_identity_of_a_save_is_not_the_clients(worlds, tmp_path):
    for given, found in worlds[2].run(kept_out, 2, "stage 1", str(tmp_path), timeout=120):
        assert given == {"epoch": 3} and found["epoch"] == 3 and not [key for key in found if "kl_dist" in key]


def test_a_checkpoint_without_an_identity_loads(worlds, checkpoints, tmp_path):
    """Of DeepSpeed's files alone nothing is said then; the state has its checksums."""
    folder, expected = checkpoints.lend("stage 2", tmp_path / "saved")
    path = folder / f"global_step{STOP}" / "kl_dist" / "manifest.json"
    said = json.loads(path.read_text())
    del said["about"]["save"]
    path.write_text(json.dumps(said, indent=1, sort_keys=True))
    found = worlds[2].run(resumed, 2, "stage 2", str(folder), timeout=120)[0]
    assert same_bits(found.stopped, expected.stopped) and same_bits(found.ended, expected.ended)


def saved_with_soap(group, folder: str) -> None:
    with deepspeed_here(group) as deepspeed:
        engine = engine_of(deepspeed, config(2, "soap", group.size(), scheduler=SCHEDULE))
        train(engine, range(2))
        engine.save_checkpoint(folder)
        engine.destroy()


def test_another_methods_checkpoint_is_refused(worlds, tmp_path):
    worlds[2].run(saved_with_soap, 2, str(tmp_path), timeout=120)
    for (found,), _ in worlds[2].run(loading_fails, 2, "stage 2", [str(tmp_path)], timeout=120):
        error, same = found
        assert "does not fit" in error and same


def test_nothing_half_written_is_left(checkpoints, tmp_path):
    folder, _ = checkpoints.lend("stage 1", tmp_path / "saved")
    inside = folder / f"global_step{STOP}"
    assert not list(inside.glob("*.partial")) and (inside / "kl_dist" / "manifest.json").exists()
    assert torch.load(inside / "kl_dist" / "groups.pt", weights_only=True)[1]["weight_decay"] == 0.0
    assert Path(folder / "latest").read_text() == inside.name
