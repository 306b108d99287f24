"""Lightning's own tests with KLShampooStrategy in the place of DDPStrategy, and what differs: for a new Lightning.

    pip install pytest-timeout pytest-rerunfailures cloudpickle scikit-learn   what its tests import
    python -m benchmarks.lightning_tests                                       all of FOLDERS, about half an hour
    python -m benchmarks.lightning_tests --source ../pytorch-lightning --folders trainer/optimization

Fetches Lightning's repository at the tag of the version that is installed (its packages come without tests), runs the
tests twice, under its own DDPStrategy and under ours (`benchmarks.in_place_of_ddp`), and compares. What passes under
the first alone must stand, with why, in lightning_tests.yaml; the exit status is 1 where something new does, or where
something there has come to pass. That file has, too, why tests fail under DDPStrategy already, of which nothing is
learned. Each difference is a line of the output file, and the counts are one, by reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import yaml
from jsonargparse import CLI

HERE = Path(__file__).resolve().parent
REPOSITORY = "https://github.com/Lightning-AI/pytorch-lightning"
KNOWN = HERE / "lightning_tests.yaml"
FOLDERS = (
    "trainer/optimization",
    "trainer/logging_",
    "trainer/flags",
    "trainer/properties",
    "trainer/connectors",
    "trainer/dynamic_args",
    "trainer/test_config_validator.py",
    "trainer/test_dataloaders.py",
    "trainer/test_states.py",
    "trainer/test_trainer.py",
    "loops",
    "callbacks",
    "checkpointing",
    "core",
    "models/test_hooks.py",
    "models/test_restore.py",
    "strategies/test_ddp.py",
    "strategies/test_ddp_integration.py",
    "tuner",
)
"""What trains, within Lightning's tests/tests_pytorch."""


class Outcome(NamedTuple):
    passed: bool | None  # None: skipped, for what this machine lacks
    said: str  # where it failed, or why it was skipped


class Known(NamedTuple):
    """Why tests fail, by a test's name, or by its beginning: its file, or all of its cases."""

    ours_alone: Mapping[str, str]
    already: Mapping[str, str]  # under DDPStrategy


def reason(reasons: Mapping[str, str], test: str) -> str | None:
    return next(
        (why for name, why in reasons.items() if test == name or test.startswith((f"{name}[", f"{name}::"))), None
    )


class Comparison(NamedTuple):
    """Of two runs of the same tests."""

    both: int  # pass under either strategy
    already: dict[str, str | None]  # fail under DDPStrategy already, and why, if that is known
    skipped: Counter[str]  # under either, by why
    new: dict[str, str]  # fail under ours alone and are not known: what they say
    known: dict[str, str]  # fail under ours alone, and why
    mended: list[str]  # are known to fail, ran, and pass


def compare(theirs: Mapping[str, Outcome], ours: Mapping[str, Outcome], known: Known) -> Comparison:
    in_both = sorted(theirs.keys() & ours.keys())
    skipped = {test: one.said for test in in_both for one in (theirs[test], ours[test]) if one.passed is None}
    ran = [test for test in in_both if test not in skipped]
    passed = [test for test in ran if theirs[test].passed]
    failed = {test: ours[test].said for test in passed if not ours[test].passed}
    why = {test: found for test in failed if (found := reason(known.ours_alone, test)) is not None}
    return Comparison(
        both=len(passed) - len(failed),
        already={test: reason(known.already, test) for test in ran if not theirs[test].passed},
        skipped=Counter(skipped.values()),
        new={test: said for test, said in failed.items() if test not in why},
        known=why,
        mended=[test for test in passed if test not in failed and reason(known.ours_alone, test) is not None],
    )


def run(source: Path, strategy: str, folders: Sequence[str], seconds: int, default: str = "ddp") -> dict[str, Outcome]:
    """The outcome of each test, by its name below tests_pytorch."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.jsonl"
        paths = [str(HERE.parent), str(source / "tests"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OUTCOMES": str(outcomes)}
        environment |= {"STRATEGY": strategy, "IN_PLACE_OF_ONE": default, "TORCH_DISTRIBUTED_DEBUG": "OFF"}
        command = [sys.executable, "-m", "pytest", "-q", "--tb", "line", "-p", "no:cacheprovider"]
        command += ["--timeout", str(seconds)] if find_spec("pytest_timeout") else []
        command += ["-p", "benchmarks.in_place_of_ddp", *(f"tests_pytorch/{one}" for one in folders)]
        done = subprocess.run(command, cwd=source / "tests", env=environment, stdout=subprocess.DEVNULL)
        if done.returncode not in (0, 1) or not outcomes.exists():
            raise SystemExit(f"pytest ended with status {done.returncode} under {strategy}; run it by hand:\n{command}")
        found: dict[str, Outcome] = {}
        for line in outcomes.read_text().splitlines():
            one = json.loads(line)
            name = one["test"].rpartition("tests_pytorch/")[2]
            before = found.get(name, Outcome(True, ""))  # a test may fail after its call, too
            passed = None if one["passed"] is None else bool(before.passed and one["passed"])
            found[name] = Outcome(passed, before.said or one["said"])
        return found


def fetched(folder: Path) -> Path:
    """Lightning's repository at the installed version."""
    tag = version("lightning")
    command = ["git", "clone", "--quiet", "--depth", "1", "--branch", tag, REPOSITORY, str(folder)]
    subprocess.run(command, check=True)
    return folder


def main(
    source: Path | None = None,
    folders: tuple[str, ...] = FOLDERS,
    out: Path | None = None,
    seconds: int = 60,
    default: str = "ddp",
) -> None:
    """Run Lightning's own tests under both strategies and compare.

    Args:
        source: a checkout of Lightning's repository at the installed version; fetched unless given.
        folders: which tests, within tests/tests_pytorch.
        out: file for a line of each difference and one of counts.
        seconds: for one test, where pytest-timeout is installed.
        default: the name by which tests that name no strategy are trained, ours in its place.
    """
    known = Known(**yaml.safe_load(KNOWN.read_text()))
    with tempfile.TemporaryDirectory() as folder:
        here = (source or fetched(Path(folder))).resolve()
        of = here / "src" / "version.info"
        tests = of.read_text().strip() if of.exists() else None
        theirs, ours = (run(here, strategy, folders, seconds, default) for strategy in ("ddp", "kl_shampoo"))
    found = compare(theirs, ours, known)
    counts: dict[str, object] = {"both": found.both, "ours alone, known": len(found.known)}
    counts |= {"ours alone, new": len(found.new), "mended": len(found.mended), "already": len(found.already)}
    counts |= {"already, why": Counter(why or "not looked into" for why in found.already.values())}
    counts |= {"skipped": found.skipped.total(), "skipped, why": found.skipped}
    about = {"lightning": version("lightning"), "tests": tests, "torch": version("torch"), "folders": list(folders)}
    about |= {"default": default}
    lines: list[object] = [{"test": test, "why": why} for test, why in found.known.items()]
    lines += [{"test": test, "new": said} for test, said in found.new.items()]
    lines += [{"test": test, "mended": True} for test in found.mended]
    lines += [{"test": test, "already": theirs[test].said} for test, why in found.already.items() if why is None]
    for line in [*lines, {**counts, **about}]:
        print(json.dumps(line))
    if out is not None:
        out.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {**counts, **about}]))
    raise SystemExit(1 if found.new or found.mended else 0)


if __name__ == "__main__":
    CLI(main, as_positional=False)
