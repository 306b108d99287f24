"""Checkpoints of DeepSpeed's engine with our optimizer: exact, at another world size too, or refused by name."""

from pathlib import Path

import pytest
import torch

from tests.deepspeed_runs import SHARES, alone, config, deepspeed_here, engine_of, train, weights_of
from tests.models import deviation, same_bits

HALF, ALL = range(6), range(6, 12)
BF16 = {"bf16": {"enabled": True}}
CASES = {
    "stage 0": (0, {}),
    "stage 0, bf16": (0, BF16),
    "stage 1": (1, {}),
    "stage 1, bf16 with gradients in float32": (1, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    "stage 2": (2, {}),
    "stage 3": (3, {"zero": {"sub_group_size": 500}}),
}
SCHEDULE = {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-3, "warmup_max_lr": 2e-2, "warmup_num_steps": 8}}


def made(deepspeed, group, name: str, **more):
    stage, options = CASES[name]
    given = config(stage, ranks=group.size(), scheduler=SCHEDULE, **{**options, **more})
    return engine_of(deepspeed, given)


def saved(group, name: str, folder: str):
    """The weights at the save, and of the run that went on."""
    with deepspeed_here(group) as deepspeed:
        engine = made(deepspeed, group, name)
        train(engine, HALF)
        engine.save_checkpoint(folder)
        at_save = weights_of(deepspeed, engine)
        train(engine, ALL)
        found = at_save, weights_of(deepspeed, engine), rates(engine)
        engine.destroy()
        return found


def resumed(group, name: str, folder: str, universal: bool = False):
    """The same, of a run that had begun otherwise and loaded the checkpoint."""
    with deepspeed_here(group) as deepspeed:
        engine = made(deepspeed, group, name, **({"checkpoint": {"load_universal": True}} if universal else {}))
        if not universal:
            train(engine, range(2))
        path, _ = engine.load_checkpoint(folder)
        assert path is not None
        at_load = weights_of(deepspeed, engine)
        train(engine, ALL)
        found = at_load, weights_of(deepspeed, engine), rates(engine)
        engine.destroy()
        return found


def rates(engine):
    return [(group["lr"], group["weight_decay"]) for group in engine.basic_optimizer.groups]


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_to_the_bit_the_undisturbed_one(worlds, name, tmp_path):
    (at_save, weights, lrs), _ = worlds[2].run(saved, 2, name, str(tmp_path), timeout=120)
    (at_load, others, theirs), _ = worlds[2].run(resumed, 2, name, str(tmp_path), timeout=120)
    assert same_bits(at_load, at_save)
    assert same_bits(others, weights) and theirs == lrs


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", ["stage 1", "stage 2", "stage 3"])
def test_a_universal_checkpoint_goes_on_at_another_world_size(worlds, name, ranks, tmp_path):
    from deepspeed_integration.universal import convert

    (_, weights, lrs), _ = worlds[2].run(saved, 2, name, str(tmp_path), timeout=120)
    for _ in range(2):  # what a first conversion has left is replaced
        convert(tmp_path / "global_step6", tmp_path / "global_step6_universal")
    found = worlds[ranks].run(resumed, ranks, name, str(tmp_path), True, timeout=120)[0]
    assert deviation(found[1], weights) <= 1e-3 and found[2] == lrs


def test_what_cannot_be_converted_is_said(worlds, tmp_path):
    from deepspeed_integration.universal import convert

    worlds[2].run(saved, 2, "stage 0", str(tmp_path), timeout=120)
    for source, said in (("global_step6", "as it is"), ("global_step7", "there is no checkpoint")):
        with pytest.raises(ValueError, match=said):
            convert(tmp_path / source, tmp_path / "universal")
    assert not (tmp_path / "universal").exists()


def loading_fails(group, name: str, folder: str):
    """The error, and whether weights and state are as they were."""
    with deepspeed_here(group) as deepspeed:
        engine = made(deepspeed, group, name)
        train(engine, range(2))
        before, state = weights_of(deepspeed, engine), copies(engine)
        try:
            engine.load_checkpoint(folder)
        except ValueError as problem:
            error = str(problem)
        same = same_bits(before, weights_of(deepspeed, engine)) and same_bits(state, copies(engine))
        train(engine, range(2, 3))
        engine.destroy()
        return error, same


def copies(engine):
    core = engine.basic_optimizer.core
    pairs = ((p, entries) for p, entries in core.state.items())
    return {f"{i} {key}": x.clone() for i, (_, entries) in enumerate(pairs) for key, x in entries.items()}


@pytest.mark.parametrize("name", ["stage 0", "stage 2", "stage 3"])
@pytest.mark.parametrize("damage", ["missing", "changed", "no manifest"])
def test_damaged_state_is_refused_by_name_and_leaves_the_run_as_it_was(worlds, name, damage, tmp_path):
    worlds[2].run(saved, 2, name, str(tmp_path), timeout=120)
    folder = tmp_path / "global_step6" / "kl_dist"
    victim = next(folder.glob("__1_*")) if damage != "no manifest" else folder / "manifest.json"
    if damage == "changed":
        raw = bytearray(victim.read_bytes())
        raw[len(raw) // 2] ^= 255
        victim.write_bytes(raw)
    else:
        victim.unlink()
    for error, same in worlds[2].run(loading_fails, 2, name, str(tmp_path), timeout=120):
        assert victim.name in error and "load_optimizer_states=False" in error and same


def test_another_methods_checkpoint_is_refused(worlds, tmp_path):
    worlds[2].run(saved_with_soap, 2, str(tmp_path), timeout=120)
    for error, same in worlds[2].run(loading_fails, 2, "stage 2", str(tmp_path), timeout=120):
        assert "does not fit" in error and same


def saved_with_soap(group, folder: str):
    with deepspeed_here(group) as deepspeed:
        engine = engine_of(deepspeed, config(2, "soap", group.size(), scheduler=SCHEDULE))
        train(engine, range(2))
        engine.save_checkpoint(folder)
        engine.destroy()


def test_nothing_half_written_is_left(worlds, tmp_path):
    worlds[2].run(saved, 2, "stage 1", str(tmp_path), timeout=120)
    folder = tmp_path / "global_step6"
    assert not list(folder.glob("*.partial")) and (folder / "kl_dist" / "manifest.json").exists()
    assert torch.load(folder / "kl_dist" / "groups.pt", weights_only=True)[1]["weight_decay"] == 0.0
    assert Path(tmp_path / "latest").read_text() == "global_step6"


def test_the_undisturbed_run_is_that_of_one_process_on_this_schedule(worlds, tmp_path):
    """So that the comparisons above are of the right thing: without a schedule the weights are known."""
    with_schedule = worlds[2].run(saved, 2, "stage 1", str(tmp_path), timeout=120)[0][1]
    assert 1e-3 < deviation(with_schedule, alone(steps=12, shares=SHARES)) < 1
