"""What a step costs on the adapters of GPT-2 124M, and what is kept of them: each route of KL-Shampoo, beside AdamW.

    OMP_NUM_THREADS=1 python -m benchmarks.adapters                 rank 8 and 64, all matrices of all 12 blocks

Process CPU time of one thread; the seconds of every single step go to --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import report
from benchmarks.contenders import Contender, set_in_groups, torchs
from benchmarks.gpu import WIDTHS, gpt_shapes
from benchmarks.timing import measure
from kl_dist import KLShampoo

RESULTS = Path(__file__).parent / "results"
Shapes = list[tuple[int, ...]]


def adapter_shapes(size: str, rank: int) -> Shapes:
    """A (rank x inputs) and B (outputs x rank) of every matrix in a GPT-2's blocks."""
    matrices = gpt_shapes(*WIDTHS[size])
    return [shape for outputs, inputs in matrices for shape in ((rank, inputs), (outputs, rank))]


def routes(rank: int) -> dict[str, dict[str, Any]]:
    """By name the options of KL-Shampoo that say what is kept of an adapter's two sides."""
    short = {"blocking": "none", "max_preconditioner_dim": rank}
    return {
        "kl_shampoo, blocks": {},
        "kl_shampoo, square blocks": {"max_preconditioner_dim": rank},
        "kl_shampoo, diagonal": {**short, "long_side": "diagonal"},
        "kl_shampoo, identity": {**short, "long_side": "identity"},
    }


def contenders(rank: int) -> list[Contender]:
    """KL-Shampoo by each route, all refreshed at once, and AdamW."""

    def contender(name: str, options: dict[str, Any]) -> Contender:
        def make(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
            return KLShampoo(list(parameters), lr=1e-3, precondition_frequency=1, stagger=False, polar=0, **options)

        return Contender(name, make, set_in_groups, note=str(options))

    return [*(contender(*one) for one in routes(rank).items()), torchs()[0]]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write the lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64], help="of the adapters")
    parser.add_argument("--size", choices=WIDTHS, default="gpt2-124m")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before those")
    parser.add_argument("--out", type=Path, default=RESULTS / "adapters.jsonl")
    args = parser.parse_args(argv)
    for rank in args.ranks:
        shapes = adapter_shapes(args.size, rank)
        runners, failed = measure(contenders(rank), shapes, repeats=args.repeats, warmup=args.warmup, threads=1)
        settings = {**report.machine(), "device": "cpu", "threads": 1, "dtype": "float32", "size": args.size}
        settings |= {"rank": rank, "repeats": args.repeats, "warmup": args.warmup}
        lines = report.lines_of(runners, failed, settings)
        print(f"\nRank {rank}, process CPU time, milliseconds a step, median (least to most): {args.size}\n")
        print(report.table(lines, (1, 2), "AdamW (torch)", "cpu"), flush=True)
        report.append(lines, args.out)


if __name__ == "__main__":
    main()
