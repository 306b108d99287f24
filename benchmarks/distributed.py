"""What dividing the optimizer over ranks saves, and what it costs: CPU time, bytes, state, and waiting.

    OMP_NUM_THREADS=1 python -m benchmarks.distributed                      DDP and FSDP2 on 1, 2 and 4 processes
    PYTHONPATH=../optimizers python -m benchmarks.distributed --ranks 2     with Meta's distributed_shampoo beside

The matrices are those of GPT blocks; gradients are made up, so that a step is the optimizer's alone. Process CPU time
is the figure to read where processes share cores. `hidden` is the share of the communication that a step does not wait
for: 1 - (time waited) / (time waited when every exchange is waited for as soon as it is launched).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from benchmarks import report
from benchmarks.contenders import state_bytes
from benchmarks.gpu import gpt_shapes
from kl_dist import KLShampoo
from kl_dist.ranks import Exchange, Team

RESULTS = Path(__file__).parent / "results"
LAYOUTS = ("ddp", "fsdp")
OURS, META = "kl_shampoo", "KL eigenbasis (Meta), DDP"
COLUMNS = (
    ("cpu", "CPU ms/step, median of ranks", 1e3),
    ("cpu_most", "largest", 1e3),
    ("wall", "wall ms/step", 1e3),
    ("sent", "sent, MB/step", 1e-6),
    ("state", "state, MB", 1e-6),
    ("balance", "balance", 1.0),
    ("hidden", "hidden", 1.0),
)


class Weights(nn.Module):
    """Matrices alone, as a module, so that FSDP2 can shard them; nothing is ever computed with them."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrices = nn.ParameterList(nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes)

    def forward(self) -> None:
        """FSDP2 asks for one."""


Run = Callable[[int, str, str, argparse.Namespace], report.Line]
"""(ranks, layout, contender, sizes)."""


def measure(layout: str, contender: str, args: argparse.Namespace) -> dict[str, Any]:
    """What this rank of the default process group finds."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = Weights(gpt_shapes(args.width, args.blocks))
    if layout == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    parameters = list(model.parameters())
    optimizer = KLShampoo(parameters, lr=1e-3, polar=0) if contender == OURS else _meta(parameters, ranks)
    for parameter in parameters:
        parameter.grad = 0.05 * parameter.detach()  # as random as the weights, and sharded as they are
    waits = Waits()
    for _ in range(args.warmup):
        optimizer.step()
    samples = [_timed(optimizer.step) for _ in range(args.repeats)]
    found: dict[str, Any] = {
        "cpu": median(cpu for cpu, _ in samples),
        "wall": median(wall for _, wall in samples),
        "state": state_bytes(optimizer),
    }
    if isinstance(optimizer, KLShampoo):
        overlapped = median(waits.during(optimizer.step) for _ in range(args.repeats))
        with waits.at_once():
            alone = median(waits.during(optimizer.step) for _ in range(args.repeats))
        found |= {"sent": optimizer.plan.comm_bytes[rank], "balance": optimizer.plan.balance}
        found |= {"hidden": max(0.0, 1 - overlapped / alone) if ranks > 1 else None}
    return found


def _measure_in_process(
    rank: int, ranks: int, store: str, layout: str, contender: str, args: argparse.Namespace
) -> None:
    """One rank of one measurement; what it found goes to a file beside the store."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    Path(f"{store}.{rank}").write_text(json.dumps(measure(layout, contender, args)))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # torch's caches of DTensors hold the group, and gloo's threads may abort what is taken apart


def _timed(step: Callable[[], Any]) -> tuple[float, float]:
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.process_time() - cpu, time.perf_counter() - wall


class Waits:
    """Adds up how long exchanges are waited for."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def during(self, step: Callable[[], Any]) -> float:
        """Seconds of waiting in one step."""
        real, self.seconds = Exchange.wait, 0.0

        def wait(exchange: Exchange) -> Tensor:
            began = time.perf_counter()
            buffer = real(exchange)
            self.seconds += time.perf_counter() - began
            return buffer

        dist.barrier()
        with mock.patch.object(Exchange, "wait", wait):
            step()
        return self.seconds

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Every exchange is waited for as soon as it is launched."""
        with contextlib.ExitStack() as patches:
            for name in ("gather", "swap"):
                patches.enter_context(mock.patch.object(Team, name, _waiting(getattr(Team, name))))
            yield


def _waiting(launch: Callable[..., Exchange]) -> Callable[..., Exchange]:
    def launch_and_wait(*arguments: Any) -> Exchange:
        exchange = launch(*arguments)
        return Exchange(exchange.wait(), ())

    return launch_and_wait


def _meta(parameters: list[nn.Parameter], ranks: int) -> torch.optim.Optimizer:
    meta: Any = importlib.import_module("distributed_shampoo")  # github.com/facebookresearch/optimizers
    made: torch.optim.Optimizer = meta.DistributedShampoo(
        parameters,
        lr=1e-3,
        betas=(0.9, 0.95),
        precondition_frequency=2,
        start_preconditioning_step=2,
        preconditioner_config=meta.EigendecomposedKLShampooPreconditionerConfig(),
        distributed_config=meta.DDPDistributedConfig(num_trainers_per_group=ranks),
    )
    return made


def run(ranks: int, layout: str, contender: str, args: argparse.Namespace) -> report.Line:
    """Measure on processes of their own."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        store = f"{folder}/store"
        try:
            mp.spawn(_measure_in_process, (ranks, store, layout, contender, args), nprocs=ranks)
        except mp.ProcessRaisedException as problem:
            error = str(problem).strip().splitlines()[-1]
            return {"contender": contender, "layout": layout, "ranks": ranks, "error": error}
        found = [json.loads(Path(f"{store}.{rank}").read_text()) for rank in range(ranks)]
    return together(layout, contender, found)


def together(layout: str, contender: str, found: Sequence[dict[str, Any]]) -> report.Line:
    """What the ranks found; the state is that of the fullest."""
    line: report.Line = {"contender": contender, "layout": layout, "ranks": len(found)}
    merged = {key: median(one[key] for one in found) for key in found[0] if found[0][key] is not None}
    merged["state"] = max(one["state"] for one in found)
    return line | merged | {"cpu_most": max(one["cpu"] for one in found)}


def table(lines: Sequence[report.Line]) -> str:
    """The measurements in markdown; state is that of the rank that holds most."""
    rows = [("optimizer", "layout", "ranks", *(heading for _, heading, _ in COLUMNS))]
    rows.append(("---", "---", "---:", *("---:" for _ in COLUMNS)))
    for line in lines:
        cells = (f"{line[key] * unit:.4g}" if key in line else "" for key, _, unit in COLUMNS)
        rows.append((line["contender"], line["layout"], str(line["ranks"]), *cells))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None, run: Run = run) -> None:
    """Measure, print the table, add the lines to the results; `run` may have ranks that are there already."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributed", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--blocks", type=int, default=4, help="GPT blocks, of four matrices each")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--out", type=Path, default=RESULTS / "distributed.jsonl")
    args = parser.parse_args(argv)
    lines = [run(ranks, layout, OURS, args) for layout in args.layouts for ranks in args.ranks]
    if args.peers:
        lines += [run(ranks, "ddp", META, args) for ranks in args.ranks if ranks > 1]
    settings = {**report.machine(), "shapes": gpt_shapes(args.width, 1), "blocks": args.blocks, "repeats": args.repeats}
    report.append([{**settings, **line} for line in lines], args.out)
    print(table([line for line in lines if "error" not in line]))
    for line in lines:
        if "error" in line:
            print(f"\n{line['contender']} on {line['ranks']} ranks: {line['error']}")


if __name__ == "__main__":
    main()
