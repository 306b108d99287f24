"""benchmarks/by_name.py: every contender trains, from the same weights, and by name alone the head is found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.optim import AdamW

from benchmarks import by_name
from lightning_plugin.conversion import convert
from tests.lightning_runs import adamw

ROOT = Path(__file__).resolve().parent.parent


def test_a_line_of_each_contender_and_no_two_of_them_train_alike(tmp_path: Path) -> None:
    contenders = list(by_name.STRATEGIES)
    command = [sys.executable, "-m", "benchmarks.by_name", "--out", str(tmp_path / "found.jsonl"), "--steps", "3"]
    command += ["--batch_size", "2", "--lrs", "[1e-2]", "--seeds", "1", "--contenders", json.dumps(contenders)]
    # a process of its own, for a Trainer leaves its process group and more behind
    subprocess.run(command, cwd=ROOT, check=True, timeout=180)
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [line["contender"] for line in lines] == contenders
    losses = [line["val_loss"] for line in lines]
    assert len(set(losses)) == len(contenders) and all(3 < loss < 6 for loss in losses)


def test_by_name_is_the_rule_of_its_ceiling() -> None:
    """Other ceilings are compared by rates that are given, so by name alone must be what two of them give, too."""
    module = by_name.Program(by_name.model_of("bytes"), 1e-3)
    for lr in (1e-3, 1e-2):
        found = [
            convert(AdamW(module.parameters(), lr=lr), module, told).param_groups[0]
            for told in (by_name.STRATEGIES["by name"](lr), by_name.lifted(2e-2)(lr))
        ]
        one, other = ([group[key] / group["base_lr"] for key in ("matrix_lr", "adamw_lr")] for group in found)
        assert one == pytest.approx(other)


def test_the_convolutional_net_has_matrices_of_its_convolutions_and_a_loss() -> None:
    program = by_name.Digits(2e-3)
    loss = program.training_step([torch.randn(32, 1, 8, 8), torch.arange(32) % 10], 0)
    assert 2 < float(loss.detach()) < 4
    plan = convert(AdamW(program.parameters()), program, {}).plan
    served = {plan.parameters[unit.parameter].name for unit in plan.units if not unit.elementwise}
    assert served == {"net.0.0.weight", "net.1.0.weight", "net.2.0.weight", "net.4.weight"}


def test_the_digits_are_divided_alike_for_every_seed() -> None:
    pytest.importorskip("sklearn")
    one, other = (by_name.digits_data(16, seed) for seed in (0, 1))
    assert len(one["train_dataloaders"].dataset) == 1200
    (pictures, _), (others, _) = next(iter(one["val_dataloaders"])), next(iter(other["val_dataloaders"]))
    assert torch.equal(pictures, others) and pictures.shape == (597, 1, 8, 8)


def test_the_program_says_nothing_of_its_head() -> None:
    program = by_name.Program(by_name.model_of("bytes"), 2e-3)
    for given, method in (({}, "adamw"), ({"output_head": ""}, "kl_shampoo")):
        plan = convert(adamw(program), program, given).plan
        served = {plan.parameters[unit.parameter].name: unit.method for unit in plan.units}
        assert served["gpt.head.weight"] == method
