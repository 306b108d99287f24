"""What a step asks of a machine, counted and not timed: flops, passes over memory, calls, and memory at the peak.

    python -m benchmarks.counts                                  one GPT block of width 384
    python -m benchmarks.counts --hundred                        100 matrices of 100 shapes
    python -m benchmarks.counts --beside ../main                 also this project as it is in a worktree

A *pass* is one number read or written for each element of the gradients, outside of products: an addition in place has
three. *Views* are calls that compute nothing. *Temporaries* are what a step allocates and gives back at its peak, over
the parameters' bytes. Counts are those of the CPU; on a GPU a few calls differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report
from benchmarks.checkouts import package_of
from benchmarks.contenders import Contender, ours, torchs
from benchmarks.gpu import gpt_shapes
from benchmarks.memory import PeakMemory
from benchmarks.timing import Runner
from kl_dist import METHODS

HUNDRED = [(rows, 64) for rows in range(28, 128)]
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm")
RESULTS = Path(__file__).parent / "results" / "counts.jsonl"


class Calls(TorchDispatchMode):
    """Counts calls, those that make views apart, and the elements that are read and written outside of products.

    Of the calls `without_work` only ask for memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.views = self.elements = self.without_work = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view:
            self.views += 1
            return result
        self.calls += 1
        name = func._schema.name.removeprefix("aten::")
        self.without_work += "empty" in name
        if name not in PRODUCTS and "empty" not in name:
            read = (args, {key: value for key, value in kwargs.items() if key != "out"})
            self.elements += sum(x.numel() for x in tree_leaves((read, result)) if isinstance(x, Tensor))
        return result


def count(contender: Contender, shapes: Sequence[tuple[int, ...]]) -> dict[str, report.Line]:
    """By kind of step: flops, passes, calls, views and temporaries."""
    runner = Runner(contender, shapes, torch.device("cpu"))
    runner.warm_up(2)
    elements = sum(parameter.numel() for parameter in runner.parameters)
    found: dict[str, report.Line] = {}
    for kind in contender.kinds:
        calls, memory, flops = Calls(), PeakMemory(), FlopCounterMode(display=False)
        for mode in (calls, memory, flops):
            runner.prepare(kind)
            with mode:
                runner.optimizer.step()
        found[kind] = {
            "flops": flops.get_total_flops(),
            "passes": round(calls.elements / elements, 1),
            "calls": calls.calls,
            "views": calls.views,
            "temporaries": round(memory.peak / sum(p.nbytes for p in runner.parameters), 2),
        }
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print a table, write the lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--width", type=int, default=384, help="of one GPT block")
    parser.add_argument("--hundred", action="store_true", help="instead 100 matrices of 100 shapes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--beside", nargs="+", type=Path, default=[], metavar="DIR", help="checkouts of this project")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    shapes = HUNDRED if args.hundred else gpt_shapes(args.width, 1)
    contenders = ours(args.methods) + torchs()
    for folder in args.beside:
        contenders += ours(args.methods, package=package_of(folder), suffix=f" ({folder.resolve().name})")
    columns = ["flops", "passes", "calls", "views", "temporaries"]
    print("| contender | step |", " | ".join(columns), "|")
    print("| --- " * (len(columns) + 2) + "|")
    for contender in contenders:
        counts = count(contender, shapes)
        line = {**report.machine(), "shapes": shapes, "contender": contender.name, "counts": counts}
        report.append([line], args.out)
        for kind, seen in counts.items():
            print("|", " | ".join([contender.name, kind, *(f"{seen[column]:,}" for column in columns)]), "|")


if __name__ == "__main__":
    main()
