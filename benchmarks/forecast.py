"""Whether `kl-shampoo plan --machine cpu` says how long a step takes: its forecast beside steps that were measured.

    OMP_NUM_THREADS=1 python -m benchmarks.forecast --out benchmarks/results/forecast.jsonl

The matrices are those of two GPT blocks, on 1, 2 and 4 processes by gloo, as `benchmarks.distributed` steps them; the
machine is measured anew before each. Two figures of each step: the CPU time of the busiest rank beside the forecast's
computing, which other work on the machine does not change, and the time by the clock beside the forecast's step, which
it does (`load` is how many processes wanted a core).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

import kl_dist
from benchmarks import report
from benchmarks.distributed import LAYOUTS, OURS, run
from benchmarks.gpu import gpt_shapes
from kl_dist import options
from kl_dist.cli.forecast import forecast, matrices_of_a_rank, shared_side
from kl_dist.cli.machine import this_cpu

BLOCKS = 2
COLUMNS = ("width", "layout", "ranks", "load", "cpu", "forecast cpu", "off", "wall", "forecast wall", "off")


def measure(width: int, layout: str, ranks: int, repeats: int) -> report.Line:
    """Seconds of a step, forecast and measured."""
    shapes = {f"matrices.{i}": shape for i, shape in enumerate(gpt_shapes(width, BLOCKS))}
    plan = kl_dist.plan(shapes, ranks, shard_size=ranks if layout == "fsdp" else 1)
    group = dict(options.DEFAULTS)
    options.resolve(group)
    machine = this_cpu(shared_side(plan), ranks, matrices_of_a_rank(plan), sharded=layout == "fsdp")
    found = forecast(plan, group, machine, ranks)
    sizes = argparse.Namespace(width=width, blocks=BLOCKS, repeats=repeats, warmup=3)
    stepped = run(ranks, layout, OURS, sizes)
    if "error" in stepped:
        raise RuntimeError(stepped["error"])
    rates = {"flops": machine.flops, "refresh_flops": machine.refresh_flops, "memory": machine.memory}
    return {
        "width": width,
        "layout": layout,
        "ranks": ranks,
        "load": os.getloadavg()[0],
        "cpu": stepped["cpu_most"],
        "forecast_cpu": found.seconds.compute / machine.sharing(ranks),
        "wall": stepped["wall"],
        "forecast_wall": found.step_seconds,
        **rates,
        "within": machine.within,
        "latency": machine.latency,
        "host": machine.host,
    }


def table(lines: Sequence[report.Line]) -> str:
    """Markdown, milliseconds; "off" is the forecast over what was measured, less 1."""
    rows = [COLUMNS, ("---:", "---", *["---:"] * (len(COLUMNS) - 2))]
    for line in lines:
        pairs = [(line[kind], line[f"forecast_{kind}"]) for kind in ("cpu", "wall")]
        cells = [cell for a, b in pairs for cell in (f"{1e3 * a:.1f}", f"{1e3 * b:.1f}", f"{100 * (b / a - 1):+.0f} %")]
        rows.append((str(line["width"]), line["layout"], str(line["ranks"]), f"{line['load']:.0f}", *cells))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forecast", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 384])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a file of JSON lines, added to")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines = []
    for width in args.widths:
        for layout in args.layouts:
            for ranks in args.ranks:
                lines.append({**report.machine(), **measure(width, layout, ranks, args.repeats)})
                if args.out:
                    report.append(lines[-1:], args.out)
    print(table(lines))


if __name__ == "__main__":
    main()
