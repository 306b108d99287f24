"""What a step's stacks of matrices ask of a GPU, counted without one: launches, and passes over memory.

    python -m benchmarks.launches                      the 144 blocks of GPT-2 124M, of 768 x 768
    python -m benchmarks.launches --matrices 288x1024

A step goes over tensors of torch's device "meta", which have shapes and no memory. What would wait for a device, to
read a number from it, is an error there, so nothing that is counted does. A *launch* is a call that computes; a *pass*
is one number read or written for each element of the gradients, outside of products. Refreshes are by Cholesky in
float64, as on an H200, of the half that is due; products are in float32, and TF32 asks for as many calls.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import kl_dist
from benchmarks import report
from benchmarks.counts import Calls
from kl_dist.methods import fallbacks, qr
from kl_dist.step.agreement import Presence
from kl_dist.step.stacks import Stack, build_stacks

RESULTS = Path(__file__).parent / "results" / "launches.jsonl"
RULES = [("kl_shampoo", "fresh"), ("kl_soap", "fresh"), ("soap", "fresh"), ("shampoo", "fresh"), ("muon", "fresh")]


def count(method: str, recipe: str, matrices: int, d: int) -> dict[str, report.Line]:
    """Launches and passes of a plain step and of a refresh in the long run, when nothing is orthogonalised any more.

    Raises:
        RuntimeError: something of it would wait for the device.
    """
    plan = kl_dist.plan({f"W{i}": (d, d) for i in range(matrices)}, 1, method=method, recipe=recipe)
    parameter = nn.Parameter(torch.zeros(2, 2))
    group = kl_dist.KLShampoo([parameter], method=method, recipe=recipe, polar=0).param_groups[0]
    stacks = [stack for bucket in build_stacks(plan, 0, torch.device("meta")) for stack in bucket]
    present = [Presence.PRESENT] * matrices
    gradient = torch.empty(d, d, device="meta")

    def read(indices: Sequence[int], into: Sequence[Tensor]) -> None:
        torch._foreach_copy_(list(into), [gradient] * len(indices))

    def update(stack: Stack) -> None:
        out = torch.empty(stack.numel, device="meta")
        stack.update(present[: len(stack.units)], read, group, out)

    parts: dict[str, Callable[[Stack], Any]] = {
        "plain step": update,
        "refresh": lambda stack: stack.refresh(present[: len(stack.units)], group),
    }
    found: dict[str, report.Line] = {}
    by_cholesky = mock.patch.object(qr, "factorize", lambda factor, **_: qr.by_cholesky(factor))
    uncounted = mock.patch.object(fallbacks, "count")  # which would be read with those of this process
    with torch.no_grad(), by_cholesky, uncounted:
        for _ in range(2):
            for part, work in parts.items():
                with Calls() as calls:
                    for stack in stacks:
                        work(stack)
                found[part] = {
                    "launches": calls.calls - calls.without_work,
                    "passes": round(calls.elements / (matrices * d * d), 1),
                }
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print a table, write the lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--matrices", default="144x768", help="how many x their width")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    matrices, d = map(int, args.matrices.split("x"))
    print("| method | plain step: launches | passes | a refresh: launches | passes |")
    print("|---|---:|---:|---:|---:|")
    for method, recipe in RULES:
        counts = count(method, recipe, matrices, d)
        line = {**report.machine(), "method": method, "recipe": recipe, "matrices": args.matrices, "counts": counts}
        report.append([line], args.out)
        print("|", " | ".join([method, *(f"{x}" for part in counts.values() for x in part.values())]), "|")


if __name__ == "__main__":
    main()
