"""One run of a comparison: what identifies it, and how it is trained and measured, in one process."""

import functools
import hashlib
import json
import math
import os
import platform
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.optimizers import Trainer
from launch.options import Options
from launch.ranks import Ranks, joined_ranks
from launch.records import Record
from launch.regression import Regression
from launch.train import Job

TASKS: dict[str, type[Job]] = {"text": Job, "regression": Regression}

DECIDING = ("optimizer", "steps", "grad_clip", "tokens_per_step", "seed", "layers", "width", "heads", "context")
"""Options that decide how a run goes, beside those that the optimizers' parameter groups show resolved."""


@dataclass(frozen=True)
class Run:
    """One setting with one seed: what to call it, how to start it, and what identifies it."""

    label: str
    task: str
    options: Options
    settings: Record


def settings_of(task: str, options: Options) -> Record:
    """All that decides how a run goes, with the optimizers' own options after every default is filled in."""
    job = TASKS[task]
    trainer = job.serve(options, job.build(options))
    settings = {name: getattr(options, name) for name in (*DECIDING, *job.deciding)}
    settings |= {"task": task, "data": data_hash(task, options.data, options.context), "warmup": options.warmup_steps}
    settings |= {"eval_every": options.eval_every, "groups": resolved(trainer)}
    if options.schedule != Options.schedule:  # what was measured before there were others stays known
        settings["schedule"] = options.schedule
    return json.loads(json.dumps(settings, default=str))


def resolved(trainer: Trainer) -> list[Record]:
    """Each optimizer's options; a list of values where its parameter groups differ."""
    options = []
    for optimizer in trainer.optimizers:
        groups = optimizer.param_groups
        record: Record = {"class": type(optimizer).__name__}
        for name in sorted(groups[0].keys() - {"params", "param_names", "name"}):
            values = [group.get(name) for group in groups]
            record[name] = values[0] if all(value == values[0] for value in values) else values
        options.append(record)
    return options


@functools.cache
def data_hash(task: str, data: str | None, context: int) -> str:
    corpus = TASKS[task].read(Options(data=data, context=context, tokens_per_step=context))
    digest = hashlib.sha256()
    for part in (corpus.train, corpus.validation):
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()[:16]


def execute(run: Run, jobs: int) -> Record:
    """Train one run to its record; whatever goes wrong is recorded too, for the others must not stop with it."""
    with joined_ranks() as ranks:
        record = {
            "label": run.label,
            "settings": run.settings,
            "ended": "",
            "versions": versions(),
            "machine": machine(ranks, jobs),
        }
        try:
            outcome = measure(TASKS[run.task](run.options, ranks))
        except Exception as error:
            outcome = {"status": "failed", "error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    return record | outcome | {"ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def measure(job: Job) -> Record:
    """Train a job; only the training itself is on the clock, not the evaluations: rows of step, seconds, loss.

    On a CPU the clock is the process's own, which neighbours on the machine disturb least; wall time stands beside it.
    """
    options = job.options
    cpu = "cpu_" if job.ranks.device.type == "cpu" else ""
    evaluations = [(0, 0.0, job.validate())]
    steps: list[Record] = []
    outcome: Record = {"status": "done"}
    for step in range(1, options.steps + 1):
        steps.append(job.train_step(step))
        losses = [steps[-1]["loss"]]
        if step == options.steps or step % options.eval_every == 0:
            losses.append(job.validate())
        if not all(map(math.isfinite, losses)):
            outcome = {"status": "diverged", "error": f"at step {step}"}
            break
        if len(losses) > 1:
            evaluations.append((step, sum(one[f"{cpu}seconds"] for one in steps), losses[-1]))
    return outcome | {
        "evaluations": evaluations,
        "seconds": sum(one[f"{cpu}seconds"] for one in steps),
        "wall_seconds": sum(one["seconds"] for one in steps),
        "step_seconds": statistics.median(one[f"{cpu}seconds"] for one in steps),
        "optimizer_seconds": statistics.median(one[f"optimizer_{cpu}seconds"] for one in steps),
        "optimizer_seconds_mean": statistics.fmean(one[f"optimizer_{cpu}seconds"] for one in steps),
        "state_bytes": state_bytes(job.trainer),
        "parameters": sum(parameter.numel() for parameter in job.model.parameters() if parameter.requires_grad),
    }


def state_bytes(trainer: Trainer) -> int:
    """What the optimizers hold on this rank between steps."""
    entries = (entry for optimizer in trainer.optimizers for entry in optimizer.state.values())
    return sum(value.nbytes for entry in entries for value in entry.values() if isinstance(value, torch.Tensor))


@functools.cache
def versions() -> Record:
    """Python, torch, and a hash of the engine's source, which between two releases says more than its number."""
    import kl_dist

    source = hashlib.sha256()
    for path in sorted(Path(kl_dist.__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    engine = {"kl_dist": kl_dist.__version__, "kl_dist_source": source.hexdigest()[:12]}
    return {"python": platform.python_version(), "torch": torch.__version__} | engine


def machine(ranks: Ranks, jobs: int) -> Record:
    """What the times were taken on."""
    processor, clock = platform.processor() or platform.machine(), "process CPU time"
    if ranks.device.type == "cuda":
        processor, clock = torch.cuda.get_device_name(ranks.device), "wall time"
    elif (information := Path("/proc/cpuinfo")).exists():
        processor = next(iter(re.findall(r"model name\s*: (.*)", information.read_text())), processor)
    threads = torch.get_num_threads()
    return {"processor": processor, "cores": os.cpu_count(), "threads": threads, "jobs": jobs, "clock": clock}
