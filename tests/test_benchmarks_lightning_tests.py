"""benchmarks/lightning_tests.py: what is compared with what, and that the plugin puts our strategy in ddp's place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import in_place_of_ddp
from benchmarks.lightning_tests import FOLDERS, KNOWN, Known, Outcome, compare, run

ROOT = Path(__file__).resolve().parent.parent
A_TEST = """
import pytest
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


@pytest.mark.skip(reason="Requires: [GPUs+2]")
def test_skipped():
    pass


def test_a_parameter_that_is_not_used():
    trainer, module = Trainer(**QUIET), BoringModel()
    module.unused = torch.nn.Parameter(torch.ones(2))
    trainer.fit(module)
"""


def test_tests_that_pass_under_ddp_alone_are_new_known_or_mended():
    theirs = {
        "a": (True, ""),
        "b": (True, ""),
        "c[1]": (True, ""),
        "d": (False, "x"),
        "e[2]": (True, ""),
        "f": (True, ""),
        "g": (True, ""),
        "h.py::i[3]": (False, "z"),
        "j": (None, "two GPUs"),
    }
    ours = {**theirs, "b": (False, "new"), "c[1]": (False, "why"), "d": (False, "y"), "g": (None, "two GPUs")}
    del ours["f"]  # did not run there
    known = Known(ours_alone={"c": "reason", "e": "-"}, already={"h.py": "its files"})
    found = compare(*({name: Outcome(*x) for name, x in one.items()} for one in (theirs, ours)), known)
    assert found.new == {"b": "new"} and found.known == {"c[1]": "reason"} and found.mended == ["e[2]"]
    assert found.both == 2 and found.already == {"d": None, "h.py::i[3]": "its files"}
    assert found.skipped == {"two GPUs": 2}


def test_every_known_difference_has_a_reason_and_is_of_a_test_that_is_run():
    known = Known(**yaml.safe_load(KNOWN.read_text()))
    for reasons in known:
        assert all(len(why) > 10 and any(name.startswith(one) for one in FOLDERS) for name, why in reasons.items())
    assert all("::" in name for name in known.ours_alone)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"outcome": "passed"}, [(True, "")]),
        ({"outcome": "failed", "longrepr": "at last\nan error"}, [(False, "an error")]),
        ({"outcome": "rerun", "longrepr": "an error"}, []),  # by pytest-rerunfailures; another follows
        ({"outcome": "passed", "when": "setup"}, []),
        ({"outcome": "skipped", "when": "setup", "longrepr": ("file", 1, "Skipped: why")}, [(None, "Skipped: why")]),
    ],
    ids=str,
)
def test_a_line_of_each_outcome_that_counts(tmp_path, monkeypatch, given, expected):
    monkeypatch.setenv("OUTCOMES", str(tmp_path / "outcomes"))
    report = pytest.TestReport("a", ("", 0, ""), {}, **{"longrepr": None, "when": "call", **given})
    in_place_of_ddp.pytest_runtest_logreport(report)
    lines = (tmp_path / "outcomes").read_text().splitlines() if expected else []
    assert [(one["passed"], one["said"]) for one in map(json.loads, lines)] == expected
    assert (tmp_path / "outcomes").exists() == bool(expected)


def test_a_checkout_is_run_under_both_strategies(tmp_path):
    """Of a checkout made up here; the real one is fetched, in half an hour."""
    folder = tmp_path / "tests" / "tests_pytorch"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "test_some.py").write_text(A_TEST)
    theirs = run(tmp_path, "ddp", ["test_some.py"], 60)
    ours = run(tmp_path, "kl_shampoo", ["test_some.py"], 60, "ddp_find_unused_parameters_true")
    assert [one.passed for one in theirs.values()] == [True, True, True, None, False]
    assert theirs["test_some.py::test_skipped"].said == "Skipped: Requires: [GPUs+2]"
    failed = {name.partition("::")[2]: one.said for name, one in ours.items() if one.passed is False}
    assert failed.keys() == {"test_without_a_strategy_as_ddp_it_is", "test_the_optimizer_has_sgds_learning_rate"}
    assert "InPlaceOfDDP" in failed["test_without_a_strategy_as_ddp_it_is"]


def test_the_plugin_leaves_ddp_in_its_place_where_it_is_told_so(tmp_path):
    code = "from benchmarks import in_place_of_ddp as p; p.pytest_configure(); print(*p._names_of_ddp())"
    for strategy, expected in (("ddp", True), ("kl_shampoo", False)):
        environment = {**os.environ, "STRATEGY": strategy, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert ("ddp" in done.stdout.splitlines()[-1].split()) is expected, json.dumps(done.stdout)
