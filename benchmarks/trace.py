"""Where the time of a step goes, as torch.profiler sees it: a trace of each rank, and a picture of all.

    OMP_NUM_THREADS=1 python -m benchmarks.trace --layout fsdp --ranks 2 --out runs/trace

writes runs/trace/rank0.json and so on, for ui.perfetto.dev or chrome://tracing, and runs/trace/trace.png. The matrices
are those of GPT blocks; gradients are made up, so that a step is the optimizer's alone. The phases are the names that
the engine gives them (`kl_shampoo::agree` and so on), which a trace of your own job has too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile

from benchmarks.distributed import LAYOUTS, Weights
from benchmarks.gpu import gpt_shapes
from kl_dist import KLShampoo

PREFIX = "kl_shampoo::"
COLOURS = {
    "agree": "#9d755d",
    "pack": "#bab0ac",
    "exchange": "#e45756",
    "update": "#4c78a8",
    "refresh": "#f2a65a",
    "apply": "#72b7b2",
}


class Span(NamedTuple):
    """A phase of a step on one rank, in milliseconds since the first step began."""

    phase: str
    start: float
    stop: float


Run = Callable[[argparse.Namespace], list[list[Span]]]
"""By rank the spans of its steps."""


def record(args: argparse.Namespace) -> list[Span]:
    """The steps of this rank of the default process group; its trace goes into the folder."""
    model = Weights(gpt_shapes(args.width, args.blocks))
    if args.layout == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    optimizer = KLShampoo(model.parameters(), lr=1e-3, polar=0)
    for parameter in model.parameters():
        parameter.grad = 0.05 * parameter.detach()
    for _ in range(args.warmup):
        optimizer.step()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(args.steps):
            optimizer.step()
    profiled.export_chrome_trace(str(args.out / f"rank{dist.get_rank()}.json"))
    return spans([(event.name, event.time_range.start, event.time_range.end) for event in profiled.events() or ()])


def spans(events: Sequence[tuple[str, float, float]]) -> list[Span]:
    """The phases among a profiler's events, (name, start, stop) in microseconds, in order."""
    found = sorted(event for event in events if event[0].startswith(PREFIX))
    began = min((start for _, start, _ in found), default=0.0)
    made = [Span(name[len(PREFIX) :], (start - began) / 1e3, (stop - began) / 1e3) for name, start, stop in found]
    return sorted(made, key=lambda span: span.start)


def _record_in_process(rank: int, store: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, args.ranks), rank=rank, world_size=args.ranks)
    Path(f"{store}.{rank}").write_text(json.dumps(record(args)))
    dist.barrier()
    dist.destroy_process_group()


def run(args: argparse.Namespace) -> list[list[Span]]:
    """Record on processes of their own."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        store = f"{folder}/store"
        mp.spawn(_record_in_process, (store, args), nprocs=args.ranks)
        texts = [Path(f"{store}.{rank}").read_text() for rank in range(args.ranks)]
    return [[Span(*span) for span in json.loads(text)] for text in texts]


def table(by_rank: Sequence[Sequence[Span]], steps: int) -> str:
    """Milliseconds a step by phase, in markdown."""
    rows = [("phase", *(f"rank {rank}, ms/step" for rank in range(len(by_rank)))), ("---", *("---:" for _ in by_rank))]
    for phase in COLOURS:
        sums = (sum(span.stop - span.start for span in found if span.phase == phase) for found in by_rank)
        rows.append((phase, *(f"{total / steps:.1f}" for total in sums)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(by_rank: Sequence[Sequence[Span]], title: str, path: Path) -> None:
    """A row for each rank, a bar for each phase."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.4 + 0.7 * len(by_rank)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for rank, found in enumerate(by_rank):
        for phase, colour in COLOURS.items():
            bars = [(span.start, span.stop - span.start) for span in found if span.phase == phase]
            axis.broken_barh(bars, (rank - 0.3, 0.6), color=colour, label=phase if rank == 0 else None)
    axis.set_yticks(range(len(by_rank)), [f"rank {rank}" for rank in range(len(by_rank))])
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(COLOURS), fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None, run: Run = run) -> None:
    """Record, print the table, draw the picture; `run` may have ranks that are there already."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trace", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layout", choices=LAYOUTS, default="fsdp")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--blocks", type=int, default=4, help="GPT blocks, of four matrices each")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/trace"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    by_rank = run(args)
    print(table(by_rank, args.steps))
    shape = f"{args.blocks} GPT blocks of width {args.width}"
    draw(by_rank, f"{args.steps} steps of KLShampoo under {args.layout}, {shape}", args.out / "trace.png")
    print(f"\n{args.out / 'trace.png'}; open {args.out / 'rank0.json'} at ui.perfetto.dev")


if __name__ == "__main__":
    main()
