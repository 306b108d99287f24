"""Whether the tests notice small faults: each of faults.yaml is put into a copy of the code, and the nearest tests run.

    python -m benchmarks.mutants                      all of them, with the tests of `make test`
    python -m benchmarks.mutants --only engine --full those of one file, with the tests of `make test-full`
    python -m benchmarks.mutants --tree ../before     another checkout's code and tests

A fault that no test notices has survived. What a run takes depends on how soon tests fail: about ten seconds a fault.
The tests must pass without any fault, or nothing is said here: run `make test` first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SECONDS = 600.0
"""For the nearest tests of one fault. Ranks that a fault makes wait for each other meet the tests' own limits first."""
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "runs", "__pycache__", "*.egg-info")
PASSED, NOTHING_RAN = 0, 5  # exit codes of pytest


class Fault(NamedTuple):
    """One edit of a file; `before` stands there once."""

    file: str
    tests: tuple[str, ...]  # paths of the nearest test modules
    what: str
    before: str
    after: str


class Verdict(NamedTuple):
    """What the tests said of a fault."""

    fault: Fault
    by: str  # the test that failed first; "" for none
    seconds: float

    @property
    def killed(self) -> bool:
        return bool(self.by)


def read(path: Path) -> list[Fault]:
    """All faults, in the order of the file."""
    return [
        Fault(of_file["file"], tuple(f"tests/test_{name}.py" for name in of_file["tests"].split()), **fault)
        for of_file in yaml.safe_load(path.read_text(encoding="utf-8"))
        for fault in of_file["faults"]
    ]


def put_in(fault: Fault, tree: Path) -> str:
    """Edit the file of a fault; returns what it was.

    Raises:
        ValueError: what the fault replaces does not stand there once.
    """
    path = tree / fault.file
    source = path.read_text(encoding="utf-8")
    if source.count(fault.before) != 1:
        raise ValueError(f"{fault.what!r}: what it replaces stands {source.count(fault.before)} times in {fault.file}")
    path.write_text(source.replace(fault.before, fault.after), encoding="utf-8")
    return source


def judge(fault: Fault, tree: Path, marked: str) -> Verdict:
    """Run the nearest tests of a fault in a tree, which is as it was afterwards."""
    source = put_in(fault, tree)
    began = time.monotonic()
    try:
        return Verdict(fault, first_failure(fault.tests, tree, marked), time.monotonic() - began)
    finally:
        (tree / fault.file).write_text(source, encoding="utf-8")


def first_failure(tests: Sequence[str], tree: Path, marked: str) -> str:
    """The first test that fails, or what else becomes of pytest; "" where all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", marked, *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return f"none had ended in {SECONDS:.0f} s"
        finally:
            end_session(process.pid)
            process.wait()
        said.seek(0)
        lines = said.read().splitlines()
    if status == PASSED:
        return ""
    if status == NOTHING_RAN:
        raise ValueError(f"no test ran: {' '.join(command)}")
    named = (line.split(" - ")[0].split(" ", 1)[1] for line in lines if line.startswith(("FAILED ", "ERROR ")))
    return next(named, f"pytest ended with {status}: {' '.join(lines[-1:])}")


def end_session(session: int) -> None:
    """Kill what a test run has left behind: ranks that wait for each other."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


def judged(faults: Sequence[Fault], tree: Path, marked: str, jobs: int) -> Iterator[Verdict]:
    """The verdicts as they come, `jobs` at a time, each in a copy of the tree of its own."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            copies.put(Path(shutil.copytree(tree, Path(folder, str(number)), ignore=NOT_COPIED)))

        def in_a_copy(fault: Fault) -> Verdict:
            copy = copies.get()
            try:
                return judge(fault, copy, marked)
            finally:
                copies.put(copy)

        for done in as_completed([pool.submit(in_a_copy, fault) for fault in faults]):
            yield done.result()


def main(argv: Sequence[str] | None = None) -> int:
    """Judge the faults, say which survive, and write a line for each; returns how many survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=Path, default=HERE / "faults.yaml", help="the file of faults")
    parser.add_argument("--only", default="", help="faults whose file or name has this in it")
    parser.add_argument("--full", action="store_true", help="with all cases of the tests, as `make test-full` runs")
    parser.add_argument("--tree", type=Path, default=HERE.parent, help="checkout whose code and tests are meant")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--out", type=Path, help="file of JSON lines, one a fault, to append to")
    asked = parser.parse_args(argv)
    marked = "not slow" if asked.full else "not slow and not full"
    faults = [fault for fault in read(asked.faults) if asked.only in f"{fault.file} {fault.what}"]
    if not faults:
        parser.error(f"no fault of {asked.faults} has {asked.only!r} in its file or its name")
    verdicts: list[Verdict] = []
    for verdict in tqdm(judged(faults, asked.tree.resolve(), marked, asked.jobs), total=len(faults)):
        verdicts.append(verdict)
        tqdm.write(f"{'killed  ' if verdict.killed else 'SURVIVES'}  {said_of(verdict)}")
        if asked.out:
            write(asked.out, verdict, asked.full)
    alive = [verdict for verdict in verdicts if not verdict.killed]
    print(f"{len(verdicts) - len(alive)} of {len(verdicts)} faults are noticed; {len(alive)} survive")
    for verdict in alive:
        print(f"  {said_of(verdict)}")
    return len(alive)


def said_of(verdict: Verdict) -> str:
    fault = verdict.fault
    return f"{fault.file}: {fault.what}" + (f" ({verdict.by}, {verdict.seconds:.0f} s)" if verdict.killed else "")


def write(path: Path, verdict: Verdict, full: bool) -> None:
    fault = verdict.fault
    line: dict[str, Any] = {"file": fault.file, "fault": fault.what, "killed_by": verdict.by or None, "full": full}
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line | {"seconds": round(verdict.seconds, 1)}) + "\n")


if __name__ == "__main__":
    sys.exit(main() > 0)
