"""What a step costs, beside torch's optimizers and the other implementations of the same methods.

    OMP_NUM_THREADS=1 python -m benchmarks.step                       one GPT block of width 384, one thread
    python -m benchmarks.step --threads 1 2 --shapes 768x768 64x16    other matrices, one thread and then two
    PYTHONPATH=../KL-Methods:../optimizers python -m benchmarks.step  with peers that are checked out beside
    python -m benchmarks.step --beside ../main --against "kl_shampoo (main)"  with this project as it is in a worktree

Printed are markdown tables; the seconds of every single step go to --out. Process CPU time is the figure to read on a
machine that others use too; with several threads it adds theirs up, waiting included, and wall time tells what they
save. Where there is a GPU, the matrices of GPT-2 at three sizes follow, timed there (--gpu none leaves that out).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.checkouts import package_of
from benchmarks.contenders import Contender, ours, torchs
from benchmarks.gpu import WIDTHS, gpt_shapes, measure_on_gpu
from benchmarks.peers import AUTHORS, find_peers
from benchmarks.timing import measure
from kl_dist import METHODS

EVERY = (1, 2, 10)  # T
RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the lines and the picture."""
    args = _arguments(argv)
    contenders, missing = ours(args.methods, args.polar, args.recipes) + torchs(), dict[str, str]()
    for folder in args.beside:
        contenders += ours(args.methods, args.polar, package=package_of(folder), suffix=f" ({folder.resolve().name})")
    if args.peers:
        peers, missing = find_peers()
        contenders += peers
    if args.only:
        contenders = [one for one in contenders if any(word in one.name for word in args.only)]
    for threads in args.threads:
        _on_cpu(args, contenders, missing, threads)
    if torch.cuda.is_available():
        for size in args.gpu:
            _on_gpu(args, contenders, missing, size)


def _on_cpu(args: argparse.Namespace, contenders: list[Contender], missing: dict[str, str], threads: int) -> None:
    runners, failed = measure(contenders, args.shapes, repeats=args.repeats, warmup=args.warmup, threads=threads)
    settings = {**report.machine(), "device": "cpu", "threads": threads, "shapes": args.shapes}
    settings |= {"dtype": "float32", "repeats": args.repeats, "warmup": args.warmup}
    what = f"{', '.join('x'.join(map(str, shape)) for shape in args.shapes)}, float32, {threads} thread(s)"
    _tell(args, report.lines_of(runners, missing | failed, settings), what, f"step-{threads}-threads.png", "cpu")


def _on_gpu(args: argparse.Namespace, contenders: list[Contender], missing: dict[str, str], size: str) -> None:
    runners, failed = measure_on_gpu(contenders, size, repeats=args.repeats, warmup=args.warmup)
    settings = {**report.machine(), "device": "cuda", "size": size, "shapes": gpt_shapes(*WIDTHS[size])[:4]}
    settings |= {"blocks": WIDTHS[size][1], "dtype": "float32", "repeats": args.repeats, "warmup": args.warmup}
    lines = report.lines_of(runners, missing | failed, settings)
    _tell(args, lines, f"{size}, float32, {settings['gpu']}", f"step-{size}.png", "wall")


def _tell(args: argparse.Namespace, lines: list[report.Line], what: str, picture: str, clock: str) -> None:
    """Print and keep one set of lines; the picture shows `clock`."""
    timed = [line["contender"] for line in lines if "error" not in line]
    against = args.against or (AUTHORS if AUTHORS in timed else "AdamW (torch)")
    for name, label in (("cpu", "Process CPU time"), ("wall", "Wall time")):
        print(f"\n{label}, milliseconds a step, median (least to most): {what}\n")
        print(report.table(lines, EVERY, against, name))
    print(flush=True)
    for line in lines:
        if "error" in line:
            print(f"{line['contender']}: {line['error']}", file=sys.stderr)
    report.append(lines, args.out)
    try:
        report.plot(lines, EVERY, clock, what, args.out.with_name(picture))
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(d) for d in text.split("x"))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"a shape is written like 1152x384, not {text!r}")
    return shape


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=_shape, default=gpt_shapes(384, 1), metavar="MxN")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--polar", nargs="+", type=int, default=[], metavar="K", help="KL-Shampoo also with polar=K")
    parser.add_argument("--recipes", nargs="+", default=[], metavar="NAME", help="KL-Shampoo also under these")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before those")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="contenders with one of these words in their name")
    parser.add_argument("--against", metavar="NAME", help="ratios are to this one; the authors' release, or AdamW")
    parser.add_argument("--beside", nargs="+", type=Path, default=[], metavar="DIR", help="checkouts of this project")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--gpu", nargs="+", choices=[*WIDTHS, "none"], default=list(WIDTHS), help="with a GPU only")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.jsonl")
    args = parser.parse_args(argv)
    args.gpu = [size for size in args.gpu if size != "none"]
    return args


if __name__ == "__main__":
    main()
