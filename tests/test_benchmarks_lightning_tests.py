"""benchmarks/lightning_tests.py: what is compared with what, and that the plugin puts our strategy in ddp's place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from benchmarks.lightning_tests import KNOWN, Outcome, compare, run

ROOT = Path(__file__).resolve().parent.parent
A_TEST = """
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

QUIET = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "logger": False, "enable_checkpointing": False}
QUIET |= {"enable_progress_bar": False, "enable_model_summary": False}


def fitted(**options):
    trainer = Trainer(**QUIET, **options)
    trainer.fit(BoringModel())
    return trainer


def test_without_a_strategy_as_ddp_it_is():
    assert {type(fitted(**given).strategy).__name__ for given in ({}, {"strategy": "ddp"})} == {"DDPStrategy"}


def test_the_optimizer_has_sgds_learning_rate():
    (optimizer,) = fitted().optimizers
    assert optimizer.param_groups[0]["lr"] == 0.1 and "momentum" in optimizer.param_groups[0]


def test_both():
    assert fitted().global_step == 2
"""


def test_tests_that_pass_under_ddp_alone_are_new_known_or_mended():
    theirs = {
        "a": (True, ""),
        "b": (True, ""),
        "c[1]": (True, ""),
        "d": (False, "x"),
        "e[2]": (True, ""),
        "f": (True, ""),
    }
    ours = {**theirs, "b": (False, "new"), "c[1]": (False, "why"), "d": (False, "y")}
    del ours["f"]  # skipped there
    found = compare(
        *({name: Outcome(*x) for name, x in one.items()} for one in (theirs, ours)), {"c": "reason", "e": "-"}
    )
    assert found.new == {"b": "new"} and found.known == {"c[1]": "reason"} and found.mended == ["e[2]"]
    assert (found.both, found.neither) == (2, 1)


def test_every_known_difference_has_a_reason():
    known = yaml.safe_load(KNOWN.read_text())
    assert known and all("::" in name and len(why) > 10 for name, why in known.items())


def test_a_checkout_is_run_under_both_strategies(tmp_path):
    """Of a checkout made up here; the real one is fetched, in half an hour."""
    folder = tmp_path / "tests" / "tests_pytorch"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "test_some.py").write_text(A_TEST)
    theirs, ours = (run(tmp_path, strategy, ["test_some.py"], 60) for strategy in ("ddp", "kl_shampoo"))
    assert len(theirs) == 3 and all(one.passed for one in theirs.values())
    failed = {name.partition("::")[2]: one.said for name, one in ours.items() if not one.passed}
    assert failed.keys() == {"test_without_a_strategy_as_ddp_it_is", "test_the_optimizer_has_sgds_learning_rate"}
    assert "InPlaceOfDDP" in failed["test_without_a_strategy_as_ddp_it_is"]


def test_the_plugin_leaves_ddp_in_its_place_where_it_is_told_so(tmp_path):
    code = "from benchmarks import in_place_of_ddp as p; p.pytest_configure(); print(*p._names_of_ddp())"
    for strategy, expected in (("ddp", True), ("kl_shampoo", False)):
        environment = {**os.environ, "STRATEGY": strategy, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert ("ddp" in done.stdout.splitlines()[-1].split()) is expected, json.dumps(done.stdout)
