"""How fast a CPU multiplies batches of float32 matrices: by the library that torch takes for that, and by oneDNN.

    OMP_NUM_THREADS=1 python -m benchmarks.products                      sizes from 16 to 768
    OMP_NUM_THREADS=1 python -m benchmarks.products --shapes 12x384      twelve products of 384 x 384

As a step has them made where oneDNN keeps float32 (`kl_dist.methods.products`, [Note: oneDNN]); elsewhere the second
way is what the CPU makes of float32 products that may be bfloat16's. An operand lies in memory by rows or by columns.
Process CPU time, medians of repetitions that take turns.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.refresh import batch_shape
from kl_dist.methods import products

RESULTS = Path(__file__).parent / "results"
SHAPES = [(96, 16), (96, 32), (60, 64), (60, 96), (60, 128), (40, 192), (12, 384), (4, 768)]
WAYS = {"BLAS": "ieee", "oneDNN": "bf16"}
"""torch's switch for each."""
LIE: dict[str, Callable[[Tensor], Tensor]] = {"rows": lambda x: x, "columns": lambda x: x.mT}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, keep the lines."""
    args = _arguments(argv)
    print("| matrices | left by | right by |", " | ".join(f"{way}, Gflop/s" for way in WAYS), "|")
    print("|---|---|---|" + "---:|" * len(WAYS))
    for batch, d in args.shapes:
        for left, right in itertools.product(LIE, repeat=2):
            seconds = measured(batch, d, (left, right), args.repeats)
            line = {**report.machine(), "threads": torch.get_num_threads(), "matrices": f"{batch}x{d}x{d}"}
            report.append([line | {"left": left, "right": right, "seconds": seconds}], args.out)
            rates = [f"{2 * batch * d**3 / median(each) / 1e9:.0f}" for each in seconds.values()]
            print("|", " | ".join([f"{batch}x{d}x{d}", left, right, *rates]), "|", flush=True)


def measured(batch: int, d: int, lie: tuple[str, str], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of L R, (B, d, d) each, by each way."""
    generator = torch.Generator().manual_seed(d)
    left, right = (LIE[how](torch.randn(batch, d, d, generator=generator)) for how in lie)
    out = torch.empty(batch, d, d)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(repeats + 1):
        for way, precision in WAYS.items():
            with products.matmul_precision(torch.backends.mkldnn, precision):
                began = time.process_time()
                torch.bmm(left, right, out=out)
                if number:  # the first is the warm-up
                    seconds[way].append(time.process_time() - began)
    return seconds


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=batch_shape, default=SHAPES, metavar="BxD")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu-products.jsonl")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
