"""What is on disk may be damaged in any way: nothing wrong is taken for right, nothing hangs, and a refusal changes
nothing where the form allows.

Seeded damage to every form of a checkpoint, through the functions that users call. Each ends as `refused`, or as
`harmless`: what is loaded is to the bit what was saved. `python -m tests.test_faults_files` makes all of them, and
writes the counts to benchmarks/results/corruptions.jsonl.
"""

import copy
import io
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from kl_dist import KLShampoo, full_state_dict, load_full_state_dict
from kl_dist.checkpoint import reading
from launch import checkpoint
from launch.options import UsageError
from tests.checkpoints import Run, make, options_of, state_of
from tests.corruptions import BYTES, FOLDERS, MANIFESTS, damage, damaged, manifest_damage
from tests.deepspeed_runs import config, deepspeed_here, engine_of, train, weights_of
from tests.models import same_bits
from tests.test_launch_checkpoint import ALONE, job
from tests.world import World

COUNTS = {"launch": (30, 150), "full": (60, 220), "local": (40, 150), "dcp": (8, 60), "deepspeed": (6, 40)}
"""By form how many in `make test`, and in `make test-full`."""

Outcomes = Counter[str]
SHAPES = {"wide": (9, 30), "square": (7, 7), "table": (11, 5), "vector": (6,)}


def snapshot(optimizer: KLShampoo) -> tuple[dict[str, Tensor], Any]:
    return state_of(optimizer), options_of(optimizer)


def same(one: tuple[dict[str, Tensor], Any], other: tuple[dict[str, Tensor], Any]) -> bool:
    return same_bits(one[0], other[0]) and one[1] == other[1]


# -- one file ----------------------------------------------------------------------------------------------------------


def in_a_file(form: str, count: int) -> Outcomes:
    """A full state, or a rank's own, written by torch.save and read with weights_only."""
    save: Callable[[KLShampoo], Any] = full_state_dict if form == "full" else KLShampoo.local_state_dict
    load: Callable[[KLShampoo, Any], Any] = load_full_state_dict if form == "full" else KLShampoo.load_state_dict
    optimizer, begun = (make(SHAPES, steps, adamw_names=("table",)) for steps in (3, 1))
    file = io.BytesIO()
    torch.save(save(optimizer), file)
    saved, before, found = snapshot(optimizer), snapshot(begun), Outcomes()
    for number in range(count):
        chance = random.Random(f"{form} {number}")
        kind = chance.choice(BYTES)
        raw, target = damaged(file.getvalue(), chance, kind), copy.deepcopy(begun)
        try:
            load(target, torch.load(io.BytesIO(raw), weights_only=True))
        except Exception:
            found["refused"] += 1
            assert same(snapshot(target), before), (form, number, kind, "a refusal changed something")
            continue
        outcome = "harmless" if same(snapshot(target), saved) else "wrong"
        assert outcome == "harmless", (form, number, kind)
        found[outcome] += 1
    return found


# -- the job's folders -------------------------------------------------------------------------------------------------


def in_a_jobs_folder(count: int) -> Outcomes:
    """Saved by launch/train.py's functions, chosen and loaded as --resume FOLDER does."""
    found = Outcomes()
    with tempfile.TemporaryDirectory() as place:
        options, model, trainer = job()
        (optimizer,) = trainer.optimizers
        assert isinstance(optimizer, KLShampoo)
        whole = checkpoint.save(Path(place, "whole"), 7, options, ALONE, model, trainer)
        saved, weights = snapshot(optimizer), copy.deepcopy(model.state_dict())
        model(torch.arange(16)[None]).square().mean().backward()
        trainer.step(3)
        later = checkpoint.save(Path(place, "whole"), 8, options, ALONE, model, trainer)
        before = snapshot(optimizer), copy.deepcopy(model.state_dict())
        for number in range(count):
            chance = random.Random(f"launch {number}")
            kind = chance.choice((*FOLDERS, *MANIFESTS, "renamed"))
            folder = Path(place, f"{number}", "step-000007")
            shutil.copytree(whole, folder)
            if kind == "renamed":
                folder = folder.rename(folder.with_name("step-000008"))
            elif kind in MANIFESTS:
                kind = manifest_damage(folder, chance, kind)
            else:
                kind = damage(folder, later, chance, kind)
            try:
                chosen = checkpoint.choose(folder.parent, str(folder), ALONE)
                assert chosen is not None
                checkpoint.load(chosen, options, ALONE, model, trainer)
            except UsageError:
                found["refused"] += 1
                unchanged = same(snapshot(optimizer), before[0]) and same_bits(model.state_dict(), before[1])
                assert unchanged, (number, kind, "a refusal changed something")
            else:
                assert same(snapshot(optimizer), saved) and same_bits(model.state_dict(), weights), (number, kind)
                found["harmless"] += 1
            shutil.rmtree(folder.parent)
    return found


# -- torch.distributed.checkpoint --------------------------------------------------------------------------------------


def dcp_kind(chance: random.Random) -> str:
    return chance.choice((*FOLDERS, "shards swapped", "metadata of another save"))


def damage_shards(folder: Path, later: Path, chance: random.Random, kind: str) -> str:
    shards = sorted(folder.glob("__*"))
    if kind == "shards swapped":
        away = shards[0].rename(folder / "away")
        shards[1].rename(shards[0])
        away.rename(shards[1])
    elif kind == "metadata of another save":
        shutil.copy(later / ".metadata", folder / ".metadata")
    else:
        return damage(folder, later, chance, kind)
    return kind


def on_two_ranks(group: dist.ProcessGroup, place: str, count: int) -> list[tuple[str, str]]:
    """Two saves of a run and what becomes of the first, damaged: of each trial the kind and the outcome."""
    run, found = Run(group).train(0, 3), []
    whole, later = Path(place, "whole"), Path(place, "later")
    dcp.save(
        {"optimizer": get_optimizer_state_dict(run.model, run.optimizer)}, checkpoint_id=whole, process_group=group
    )
    saved = snapshot(run.optimizer)
    run.train(3, 4)
    dcp.save(
        {"optimizer": get_optimizer_state_dict(run.model, run.optimizer)}, checkpoint_id=later, process_group=group
    )
    for number in range(count):
        chance = random.Random(f"dcp {number}")
        kind, folder = dcp_kind(chance), Path(place, str(number))
        if group.rank() == 0:
            shutil.copytree(whole, folder)
            kind = damage_shards(folder, later, chance, kind)
        dist.barrier(group=group)
        told: list[Any] = [None] * 2
        dist.all_gather_object(told, _load(Run(group), folder, group, saved), group=group)
        outcomes = [outcome for outcome, _ in told]
        what = "refused" if "refused" in outcomes else "wrong" if "wrong" in outcomes else "harmless"
        found.append((kind, what if all(good for _, good in told) else "refused in silence"))
    return found


def _load(run: Run, folder: Path, group: dist.ProcessGroup, saved: Any) -> tuple[str, bool]:
    """The outcome on this rank, and whether what was read into the live state and refused stops the run."""
    optimizer = run.optimizer
    state, before = {"optimizer": get_optimizer_state_dict(run.model, optimizer)}, state_of(optimizer)
    try:
        reading.load(state, folder, group)
    except (ValueError, dcp.CheckpointException):
        return "refused", True  # by torch, on all ranks
    try:
        set_optimizer_state_dict(run.model, optimizer, state["optimizer"])
    except ValueError:
        stopped = optimizer.parts.engine.failure is not None
        return "refused", stopped or same_bits(state_of(optimizer), before)
    return ("harmless" if same(snapshot(optimizer), saved) else "wrong"), True


def in_a_folder_of_torchs(world: World, count: int) -> Outcomes:
    with tempfile.TemporaryDirectory() as place:
        trials = world.run(on_two_ranks, 2, place, count, timeout=300)[0]
    bad = [(number, *trial) for number, trial in enumerate(trials) if trial[1] not in ("refused", "harmless")]
    assert bad == []
    return Outcomes(outcome for _, outcome in trials)


# -- DeepSpeed's -------------------------------------------------------------------------------------------------------


def under_deepspeed(group: dist.ProcessGroup, place: str, count: int) -> list[tuple[str, str]]:
    """Our folder of a checkpoint damaged, or of another save than DeepSpeed's files."""
    found = []
    with deepspeed_here(group) as deepspeed:
        engine = engine_of(deepspeed, config(2, ranks=group.size()))
        train(engine, range(2))
        engine.save_checkpoint(f"{place}/whole", "tag")
        saved = _of(deepspeed, engine)
        train(engine, range(2, 3))
        engine.save_checkpoint(f"{place}/later", "tag")
        for number in range(count):
            chance = random.Random(f"deepspeed {number}")
            kind = chance.choice(
                (*FOLDERS, *MANIFESTS, "our folder of another save", "one of its files of another save")
            )
            folder = Path(place, str(number))
            if group.rank() == 0:
                shutil.copytree(Path(place, "whole"), folder)
                kind = _damage_halves(folder / "tag", Path(place, "later", "tag"), chance, kind)
            dist.barrier(group=group)
            before = _of(deepspeed, engine)
            try:
                engine.load_checkpoint(str(folder), "tag")
            except ValueError:
                outcome = "refused" if same_bits(before, _of(deepspeed, engine)) else "refused and changed"
            else:
                outcome = "harmless" if same_bits(saved, _of(deepspeed, engine)) else "wrong"
            found.append((kind, outcome))
        engine.destroy()
    return found


def _of(deepspeed: Any, engine: Any) -> dict[str, Tensor]:
    entries = enumerate(engine.basic_optimizer.core.state.values())
    state = {f"{number} {key}": x.clone() for number, one in entries for key, x in one.items()}
    return weights_of(deepspeed, engine) | state


def _damage_halves(tag: Path, later: Path, chance: random.Random, kind: str) -> str:
    ours = tag / "kl_dist"
    if kind == "our folder of another save":
        shutil.rmtree(ours)
        shutil.copytree(later / "kl_dist", ours)
    elif kind == "one of its files of another save":
        file = chance.choice(sorted(tag.glob("*_states.pt")))
        shutil.copy(later / file.name, file)
        return f"{file.name} of another save"
    elif kind in MANIFESTS:
        return manifest_damage(ours, chance, kind)
    else:
        return damage(ours, later / "kl_dist", chance, kind)
    return kind


def in_deepspeeds_folder(world: World, count: int) -> Outcomes:
    with tempfile.TemporaryDirectory() as place:
        ranks = world.run(under_deepspeed, 2, place, count, timeout=300)
    for trials in ranks:
        assert [trial for trial in trials if trial[1] not in ("refused", "harmless")] == []
    return Outcomes(outcome for _, outcome in ranks[0])


# -- all of them -------------------------------------------------------------------------------------------------------


def outcomes(form: str, count: int, worlds: dict[int, World]) -> Outcomes:
    made: dict[str, Callable[[int], Outcomes]] = {
        "launch": in_a_jobs_folder,
        "full": partial(in_a_file, "full"),
        "local": partial(in_a_file, "local"),
        "dcp": partial(in_a_folder_of_torchs, worlds[2]),
        "deepspeed": partial(in_deepspeeds_folder, worlds[2]),
    }
    return made[form](count)


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.full)], ids=["some", "all"])
@pytest.mark.parametrize("form", COUNTS)
def test_no_damage_is_taken_for_what_was_saved(worlds, form, everything):
    count = COUNTS[form][everything]
    found = outcomes(form, count, worlds)
    assert found.keys() <= {"refused", "harmless"} and found.total() == count
    assert found["refused"] > count / 3


def main() -> None:
    """All of them, counted."""
    pools = {2: World(2)}
    with Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/corruptions.jsonl").open("w") as file:
        for form, (_, count) in COUNTS.items():
            found = outcomes(form, count, pools)
            line = {"form": form, "trials": count, **{key: found[key] for key in ("refused", "harmless", "wrong")}}
            file.write(json.dumps({**line, "torch": torch.__version__}) + "\n")
            print(line)
    pools[2].stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
