"""What the plan of a large model says at many ranks, how long it takes to make, and what a step costs the host there.

    OMP_NUM_THREADS=1 python -m benchmarks.scale --out benchmarks/results/scale.jsonl

Nothing needs the ranks: a plan is arithmetic on shapes, and the step is rank 0's own, run over tensors on the meta
device, with every collective replaced by what this rank has of it and without the methods' maths. So what is timed is
Python and torch's own dispatch. Every case has a process of its own, and ends at a time limit.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import kl_dist
from benchmarks.report import Line, append, machine
from kl_dist import options
from kl_dist.cli.models import BUILT_IN, options_of
from kl_dist.planning.boxes import whole
from kl_dist.planning.plan import Plan
from kl_dist.ranks import Exchange, Ranks, Team
from kl_dist.step.agreement import Presence
from kl_dist.step.engine import Engine
from kl_dist.step.stacks import MatrixStack

MODELS = ("gpt2", "gpt2-xl", "llama-8b", "llama-70b")


class Case(NamedTuple):
    """A model in bfloat16, embeddings under AdamW, over `ranks` of which `shard_size` have a replica together."""

    model: str
    ranks: int
    shard_size: int
    largest: int = options.DEFAULTS["max_preconditioner_dim"]

    @property
    def layout(self) -> str:
        if self.shard_size == 1:
            return "DDP"
        return "FSDP2" if self.shard_size == self.ranks else f"HSDP {self.ranks // self.shard_size} x {self.shard_size}"


CASES = (
    *(Case("llama-8b", ranks, 1) for ranks in (4, 64, 512, 1024, 4096)),
    *(Case("llama-8b", ranks, 8) for ranks in (256, 1024)),
    *(Case("llama-8b", 1024, 1, largest) for largest in (2048, 1024)),
    *(Case("llama-70b", 1024, 1024, largest) for largest in (8192, 4096, 2048)),
    *(Case("llama-70b", 4096, 4096, largest) for largest in (8192, 4096)),
    *(Case("llama-70b", 4096, 64, largest) for largest in (8192, 4096)),
    *(Case("gpt2-xl", ranks, 1) for ranks in (64, 1024)),
    *(Case("gpt2", ranks, 1) for ranks in (8, 16, 32, 48, 64, 128, 256, 512, 1000, 1024, 2048, 4096)),
)


# -- the ranks that are not there --------------------------------------------------------------------------------------


class LocalTeam(Team):
    """Exchanges that are over at once, with whatever is in the buffers for what others would have sent."""

    def gather(self, chunk: Tensor, room: Tensor) -> Exchange:
        return Exchange(room[: self.size * chunk.nbytes].view(chunk.dtype).view(self.size, -1), ())

    def broadcast(self, sent: Sequence[tuple[int, Tensor]]) -> Exchange:
        return Exchange(sent[0][1], ())

    def swap(self, out: Tensor, sent: Sequence[int], into: Tensor, received: Sequence[int]) -> Exchange:
        assert (sum(sent), sum(received)) == (out.numel(), into.numel())
        return Exchange(into, ())


class LocalRanks(LocalTeam, Ranks):
    """Rank 0 of many, alone: what is agreed is that all gradients are there."""

    def __init__(self, size: int) -> None:
        Team.__init__(self, None, range(size), whole=True)
        self.rank, self.device = 0, torch.device("meta")

    def make_groups(self, lines: Iterable[tuple[int, ...]]) -> None:
        pass

    def team(self, members: Sequence[int]) -> Team:
        return LocalTeam(None, members, whole=True)

    def largest(self, values: Tensor) -> list[float]:
        return [float(Presence.PRESENT)] * (values.numel() - 3) + [0.0, 0.0, 0.0]

    def any(self, here: bool) -> bool:
        return here


def local_parameters(plan: Plan) -> Iterator[Tensor]:
    """What rank 0 has of every parameter, with a gradient, on the meta device."""
    for parameter in plan.parameters:
        box = whole(parameter.shape)
        if parameter.sharding is not None:
            ((box, _),) = parameter.sharding.held(0)
        shard = torch.empty([b - a for a, b in box], dtype=parameter.dtype, device="meta", requires_grad=True)
        shard.grad = torch.empty_like(shard)
        yield shard


def quick_meta_kernels() -> torch.library.Library:
    """Kernels of many tensors at once that look at none of them, as the CPU's and a GPU's do not in Python.

    torch's own of the meta device infer each tensor's shape there, for ten times what a launch costs.
    """
    found = torch.library.Library("aten", "IMPL")
    found.impl("_foreach_add_.List", lambda tensors, others, alpha=1: None, "Meta")
    found.impl("_foreach_norm.Scalar", lambda tensors, ord=2, dtype=None: [_numbers(1)[0]] * len(tensors), "Meta")
    found.impl("stack", lambda tensors, dim=0: _numbers(len(tensors)), "Meta")
    found.impl("abs", lambda x: torch.empty_like(x), "Meta")  # with the next three: isfinite
    found.impl("eq.Tensor", lambda x, y: torch.empty_like(x, dtype=torch.bool), "Meta")
    found.impl("ne.Scalar", lambda x, y: torch.empty_like(x, dtype=torch.bool), "Meta")
    found.impl("mul.Tensor", lambda x, y: torch.empty_like(x), "Meta")
    found.impl("cat", lambda tensors, dim=0: tensors[0].new_empty(sum(x.numel() for x in tensors)), "Meta")
    return found


def _numbers(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float64, device="meta")


def host_seconds(plan: Plan, group: dict[str, Any], steps: int) -> dict[str, float]:
    """CPU seconds of this process for rank 0's step, by part: medians."""
    kernels = quick_meta_kernels()
    # autocast, which a step turns off, does not know of the meta device
    without_autocast = mock.patch("kl_dist.step.engine.full_precision", lambda _: nullcontext())
    without_adamw = mock.patch("kl_dist.methods.adamw.update", lambda state, grad, hyper, spare: grad)
    with torch.no_grad(), without_autocast, without_adamw:
        engine = Engine(plan, LocalRanks(plan.world_size), list(local_parameters(plan)), [group])
        for stack in (stack for bucket in engine.stacks for stack in bucket if isinstance(stack, MatrixStack)):
            stack.update = lambda *_: None  # type: ignore[method-assign]
            stack.refresh = lambda *_: 0  # type: ignore[method-assign]
        agreed, ran = [], []
        for _ in range(steps + 1):
            began = time.process_time()
            presences = engine.agree(None, False, 0)
            assert presences is not None
            between = time.process_time()
            engine.run(presences)
            if engine.failure is not None:
                raise engine.failure
            agreed.append(between - began)
            ran.append(time.process_time() - between)
    kernels._destroy()
    return {"agree": median(agreed[1:]), "run": median(ran[1:])}


# -- one case, and all -------------------------------------------------------------------------------------------------


def measure(case: Case, steps: int) -> Line:
    """A plan and its numbers; of ranks' numbers those of rank 0, which has as much to do as any."""
    shapes = BUILT_IN[case.model]
    found: Line = {"model": case.model, "layout": case.layout, "ranks": case.ranks, "largest": case.largest}
    given: dict[str, Any] = {**options_of(shapes), "max_preconditioner_dim": case.largest}
    began = time.process_time()
    plan = kl_dist.plan(shapes, case.ranks, shard_size=case.shard_size, dtype=torch.bfloat16, **given)
    digest = plan.digest()
    found |= {"plan_seconds": time.process_time() - began, "digest": digest}
    group = {**options.DEFAULTS, **given}
    options.resolve(group)
    host = host_seconds(plan, group, steps)
    # of this rank alone: what the optimizer itself needs, without the tables of all ranks
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found |= {f"host_{part}_seconds": seconds for part, seconds in host.items()}
    parameters = sum(unit.nbytes for unit in plan.units)
    return found | {
        "units": len(plan.units),
        "buckets": len(plan.buckets),
        "agreement_bytes": 4 * plan.agreement_size,
        "room_bytes": plan.room_bytes(0),
        "parameter_bytes": parameters,
        "partition_size": plan.partition_size,
        "balance": plan.balance,
        "flops": max(plan.cost),
        "state_bytes": plan.state_bytes[0],
        "sent_bytes": plan.sent_bytes(0),
        "padding": plan.bytes_of(0).padding / max(plan.sent_bytes(0), 1),
    }


def measured(case: Case, steps: int, limit: float) -> Line:
    """The same in a process of its own, or what became of it."""
    command = [sys.executable, "-m", "benchmarks.scale", "--steps", str(steps), "--case", *map(str, case)]
    failed = {"model": case.model, "layout": case.layout, "ranks": case.ranks, "largest": case.largest}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {**failed, "error": f"not in {limit:g} s"}
    if done.returncode:
        return {**failed, "error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    found: Line = json.loads(done.stdout)
    return found


COLUMNS = {
    "groups of": lambda x: str(x["partition_size"]),
    "plan, s": lambda x: f"{x['plan_seconds']:.2f}",
    "peak, MiB": lambda x: f"{x['peak_bytes'] / 2**20:.0f}",
    "units": lambda x: str(x["units"]),
    "agreement, KB": lambda x: f"{x['agreement_bytes'] / 1e3:.1f}",
    "buffers, GiB": lambda x: f"{x['room_bytes'] / 2**30:.2f}",
    "state, GiB": lambda x: f"{x['state_bytes'] / 2**30:.2f}",
    "padding": lambda x: f"{100 * x['padding']:.1f} %",
    "balance": lambda x: f"{x['balance']:.2f}",
    "Tflop": lambda x: f"{x['flops'] / 1e12:.2f}",
    "sent / parameters": lambda x: f"{x['sent_bytes'] / x['parameter_bytes']:.3f}",
    "host, ms/step": lambda x: f"{1e3 * (x['host_agree_seconds'] + x['host_run_seconds']):.1f}",
}


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a row a case."""
    rows = [["model", "layout", "ranks", "largest block", *COLUMNS]]
    rows.append(["---", "---", *["---:"] * (2 + len(COLUMNS))])
    for line in lines:
        cells = [line["error"], *[""] * (len(COLUMNS) - 1)] if "error" in line else [f(line) for f in COLUMNS.values()]
        rows.append([line["model"], line["layout"], f"{line['ranks']:,}", f"{line['largest']:,}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, help="those cases alone that have so many")
    parser.add_argument("--steps", type=int, default=5, help="timed, after one more")
    parser.add_argument("--limit", type=float, default=120, help="seconds that a case may take")
    parser.add_argument("--commit", help="what the lines are called in the file")
    parser.add_argument("--out", type=Path, help="a file of JSON lines, added to")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.case:
        model, *numbers = args.case
        print(json.dumps(measure(Case(model, *map(int, numbers)), args.steps)))
        return
    chosen = [case for case in CASES if case.model in args.models and case.ranks in (args.ranks or [case.ranks])]
    lines = [measured(case, args.steps, args.limit) for case in chosen]
    print(table(lines))
    if args.out:
        append([{**machine(), "commit": args.commit, **line} for line in lines], args.out)


if __name__ == "__main__":
    main()
