"""Train several optimizers and settings on the same model and the same data in the same order, and rank them.

    python launch/compare.py --steps 400 --seeds 0 1 2 --run "--optimizer adamw" --run "--optimizer muon --lr 3e-2"
    python launch/compare.py --task regression --layers 2 --run "--optimizer kl_shampoo" --grid lr=1e-2,3e-2
    python launch/compare.py --report-only --steps 400

Each --run holds flags of launch/train.py for one setting; flags of the job given outside of them hold for all. A --grid
makes one setting of each of its values: `--grid lr=3e-3,1e-2` of a flag, `--grid "betas=(0.9,0.9),(0.95,0.95)"` of what
--set would take. Finished runs are kept in the results file and not repeated; failed ones are tried again.
"""

import argparse
import itertools
import multiprocessing
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from pathlib import Path

if not __package__:
    # Started as a file, Python looks for modules beside it; this package's folder is one up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from launch import results, standings
from launch.options import Options, UsageError, parse
from launch.records import Record
from launch.runs import TASKS, Run, execute, settings_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs that are missing, then the table and the picture; returns the exit status."""
    try:
        asked, shared = command_line().parse_known_args(arguments)
        runs = plan(asked, shared)
        if not asked.report_only:
            train_missing(runs, asked.results, asked.jobs)
        report(asked, shared, runs)
    except (UsageError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on with the runs that are missing.", file=sys.stderr)
        return 130
    return 0


def command_line() -> argparse.ArgumentParser:
    """What belongs to the comparison; every other flag is left to the job."""
    parser = argparse.ArgumentParser(
        prog="launch/compare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    add = parser.add_argument
    add("--run", action="append", default=[], metavar="FLAGS", help="one setting, as flags of launch/train.py")
    add("--grid", action="append", default=[], metavar="NAME=A,B", help="values that every setting is tried with")
    add("--seeds", nargs="+", type=int, default=[0], help="seeds that every setting is tried with")
    add("--task", choices=TASKS, default="text", help="what is learned")
    add("--jobs", type=int, default=1, help="how many runs to train at once, each a process; their times then suffer")
    add("--results", type=Path, default=Path("runs/compare/results.jsonl"), help="file of finished runs")
    add("--report", type=Path, help="table and picture, without their .md and .png; by default beside the results")
    add("--report-only", action="store_true", help="train nothing; without --run, show all that the results hold")
    return parser


# -- which runs --------------------------------------------------------------------------------------------------------


def plan(asked: argparse.Namespace, shared: Sequence[str]) -> list[Run]:
    """Every setting with every seed, each checked down to its optimizer before the first one starts."""
    if asked.jobs < 1:
        raise UsageError(f"--jobs {asked.jobs} is too small; the least is 1")
    if not asked.run and not asked.report_only:
        raise UsageError('there is nothing to compare; give at least one --run, such as --run "--optimizer adamw"')
    if "RANK" in os.environ:
        raise UsageError("a comparison is one process that makes its own; start it without torchrun")
    runs: dict[str, Run] = {}
    choices = [grid(text, TASKS[asked.task].kind) for text in asked.grid]
    for text, choice in itertools.product(asked.run, itertools.product(*choices)):
        flags = [*words(text), *itertools.chain.from_iterable(choice)]
        for seed in asked.seeds:
            try:
                options = parse([*shared, *flags, "--seed", str(seed)], TASKS[asked.task].kind)
                settings = settings_of(asked.task, options)
            except UsageError as error:
                raise UsageError(f"{error} (in --run {shlex.join(flags)!r})") from error
            run = Run(label(flags), asked.task, options, settings)
            runs.setdefault(results.identity(settings), run)
    return list(runs.values())


def words(text: str) -> list[str]:
    """A --run as the flags that a shell would make of it."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--run {text!r} cannot be read: {error}") from error


def grid(text: str, options: type[Options] = Options) -> list[list[str]]:
    """The flags of each value of a grid; a comma within parentheses is part of a value."""
    name, equals, values = text.partition("=")
    choices = re.split(r",(?![^()\[\]]*[)\]])", values)
    if not (name and equals and all(choices)):
        raise UsageError(f"--grid takes NAME=A,B, not {text}")
    name = name.removeprefix("--").replace("-", "_")
    is_flag = name in {field.name for field in fields(options)}
    return [[f"--{name.replace('_', '-')}", one] if is_flag else ["--set", f"{name}={one}"] for one in choices]


def label(flags: Sequence[str]) -> str:
    """A setting's flags as people say them: `kl_shampoo lr 1e-2 nesterov=False`."""
    return " ".join(flag.removeprefix("--") for flag in flags if flag not in ("--optimizer", "--set")) or "defaults"


# -- running them ------------------------------------------------------------------------------------------------------


def train_missing(runs: Sequence[Run], file: Path, jobs: int) -> None:
    """Train what the file lacks, writing each run down as soon as it ends."""
    done = {results.identity(run["settings"]) for run in results.read(file) if run["status"] != "failed"}
    missing = [run for run in runs if results.identity(run.settings) not in done]
    print(f"{len(runs)} runs: {len(runs) - len(missing)} are in {file} already, {len(missing)} to train", flush=True)
    for number, (run, record) in enumerate(finished(missing, jobs), start=1):
        results.append(file, record)
        speed = f" in {record['seconds']:.0f} s" if "seconds" in record else ""
        said = f"{run.label}, seed {run.options.seed}: {standings.outcome(record)}{speed}"
        print(f"[{number}/{len(missing)}] {said}", flush=True)


def finished(runs: Sequence[Run], jobs: int) -> Iterator[tuple[Run, Record]]:
    """The runs with their records, as they end; in this process, or `jobs` at once in processes of their own."""
    if jobs == 1 or len(runs) < 2:
        yield from ((run, execute(run, 1)) for run in runs)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        futures = {pool.submit(execute, run, jobs): run for run in runs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UsageError("a run's process died, perhaps for lack of memory; try a smaller --jobs") from error
        finally:
            pool.shutdown(cancel_futures=True)


# -- saying how they went ----------------------------------------------------------------------------------------------


def report(asked: argparse.Namespace, shared: Sequence[str], runs: Sequence[Run]) -> None:
    """Write and print the table, and draw the picture, of the runs asked for."""
    records = results.read(asked.results)
    shown = among(records, runs) if runs else matching(records, asked.task, shared)
    if not shown:
        raise UsageError(f"{asked.results} holds none of the runs asked for")
    settings = standings.collect(shown)
    table = standings.table(settings, standings.collect(records))
    stem = asked.report or asked.results.with_suffix("")
    stem.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.md").write_text(table, encoding="utf-8")
    standings.draw(settings, Path(f"{stem}.png"))
    print(f"\n{table}\nTable    {stem}.md\nPicture  {stem}.png")


def among(records: Sequence[Record], runs: Sequence[Run]) -> list[Record]:
    """The records of `runs`, under the names they have on this command line."""
    labels = {results.identity(run.settings): run.label for run in runs}
    known = ((results.identity(record["settings"]), record) for record in records)
    return [record | {"label": labels[key]} for key, record in known if key in labels]


def matching(records: Sequence[Record], task: str, shared: Sequence[str]) -> list[Record]:
    """The records of a task, and of the steps and sizes given on the command line, if any were."""
    options = parse(shared, TASKS[task].kind)
    given = {flag.split("=")[0].removeprefix("--").replace("-", "_") for flag in shared}
    wanted = {name: getattr(options, name) for name in set(results.ARENA) & given} | {"task": task}
    return [one for one in records if all(one["settings"][name] == value for name, value in wanted.items())]


if __name__ == "__main__":
    sys.exit(main())
