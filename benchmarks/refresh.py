"""The ways to make a refresh's parts, in time and in what rounding leaves: QR of a factor, and Shampoo's inverse root.

    OMP_NUM_THREADS=1 python -m benchmarks.refresh                 on the CPU, and on a GPU where there is one
    python -m benchmarks.refresh --shapes 12x384 --repeats 5       batches of other sizes

QR by reflections, by Cholesky once in float64, twice and three times in float32, and the rotation by products alone
that benchmarks/variants.py trains with, also with all but its last products in TF32 (on a CPU rounded to it, so what it
leaves is a GPU's, and its time is not); the inverse fourth root by eigh and by products. In float32, of factors that
are nearly diagonal, as between two refreshes, and of rank one in a basis that knows nothing of them, the worst that a
start meets.

`off` is max |O^T O - I| of a rotation, and |R - R'| / |R'| of a root, R' by eigh in float64. Times are process CPU time
on a CPU, wall time on a GPU; medians of repetitions that take turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks import report
from kl_dist.methods import kl_factors, linalg, products, qr, roots, shampoo

RESULTS = Path(__file__).parent / "results"
SHAPES = [(32, 64), (8, 256), (12, 384), (4, 768)]
SHAPES_ON_GPU = [(72, 768), (144, 1024), (8, 4096)]

ORTHOGONALIZATIONS = 2


def rotation_by_products(factor: Tensor, compute_dtype: str = "float32") -> Tensor:
    """O (B, d, d), orthogonal, by which QR would turn a nearly diagonal S (B, d, d), to the first order.

    L_ij = S_ij / (max(S_ii, S_jj) + c), i > j;   X = L - L^T;   a = min(1, 0.9 / |X^2|_F^1/2)
    O = I + a X + a^2 X^2 / 2, then O <- O (3 I - O^T O) / 2, ORTHOGONALIZATIONS times

    All in `compute_dtype`, 6 d^3 flops, but the last orthogonalization, 4 d^3 in the factor's dtype, which undoes what
    rounding has left.
    """
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    damped = diagonal + kl_factors.DAMPING * linalg.mean_diagonal(factor)
    lower = (factor / torch.maximum(damped[:, :, None], damped[:, None, :])).tril(-1)
    x = lower - lower.mT
    square = products.product(x, x, compute_dtype, torch.empty_like(x))
    norm = torch.linalg.vector_norm(square, dim=(1, 2), keepdim=True)
    a = (0.9 / norm.sqrt().clamp_min(1e-15)).clamp_max(1.0)
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    turned = identity + a * x + a.square() / 2 * square
    for _ in range(ORTHOGONALIZATIONS - 1):
        gram = products.product(turned.mT, turned, compute_dtype, square)
        turned = products.product(turned, 1.5 * identity - 0.5 * gram, compute_dtype, torch.empty_like(turned))
    return linalg.reorthogonalize(turned)


Way = Callable[[Tensor], Tensor]  # of factors (B, d, d); gives rotations or roots

ROTATIONS: dict[str, Way] = {
    "QR by reflections": lambda S: qr.by_reflections(_damped(S)).rotation,
    "QR by Cholesky in float64": lambda S: qr.by_cholesky(_damped(S)).rotation,
    "QR by Cholesky twice": lambda S: qr.by_scaled_cholesky(_damped(S), 2).rotation,
    "QR by Cholesky three times": lambda S: qr.by_scaled_cholesky(_damped(S), 3).rotation,
    "rotation by products": rotation_by_products,
    "rotation by products, TF32 but for the last": lambda S: rotation_by_products(S, "tf32"),
}
ROOTS: dict[str, Way] = {
    "root by eigh": lambda S: roots.by_eigh(S, 1 / 4, _shift(S)),
    "root by products": lambda S: roots.by_products(S, 4, _shift(S), shampoo.DAMPING),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, keep the lines."""
    args = _arguments(argv)
    lines = _measured(torch.device("cpu"), args.shapes, args.repeats)
    if torch.cuda.is_available():
        lines += _measured(torch.device("cuda"), args.gpu_shapes, args.repeats)
    print("| device | matrices | way | ms | off, nearly diagonal | off, rank one |")
    print("|---|---|---|---:|---:|---:|")
    for line in lines:
        ms, near, far = 1e3 * median(line["seconds"]), line["off"]["near"], line["off"]["far"]
        print(f"| {line['device']} | {line['matrices']} | {line['way']} | {ms:.3g} | {near:.1e} | {far:.1e} |")
    report.append(lines, args.out)


def factors(kind: str, batch: int, d: int) -> Tensor:
    """Factors (B, d, d) in float64: "near" diagonal, with a spectrum of 1e4, or "far", dense and of rank one."""
    noise = torch.randn(batch, d, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    if kind == "far":
        return noise[:, :, :1] @ noise[:, :, :1].mT
    root = torch.logspace(0, -2, d, dtype=torch.float64)
    half = root[:, None] * (torch.eye(d, dtype=torch.float64) + 0.1 / d**0.5 * noise)
    return half @ half.mT


def _measured(device: torch.device, shapes: Sequence[tuple[int, int]], repeats: int) -> list[report.Line]:
    common = {**report.machine(), "device": device.type, "threads": torch.get_num_threads(), "dtype": "float32"}
    lines = []
    for batch, d in shapes:
        cases = {kind: factors(kind, batch, d) for kind in ("near", "far")}
        known = {kind: S.to(device, torch.float32) for kind, S in cases.items()}
        ways = {name: partial(way, known["near"]) for name, way in (ROTATIONS | ROOTS).items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(repeats + 1):
            for name, way in ways.items():
                took = _time(way, device)
                if number:  # the first is the warm-up
                    seconds[name].append(took)
        for name in ways:
            off = {kind: _off(name, S.cpu().double(), known[kind]) for kind, S in cases.items()}
            lines.append(common | {"matrices": f"{batch}x{d}x{d}", "way": name, "seconds": seconds[name], "off": off})
    return lines


def _off(name: str, exact: Tensor, factor: Tensor) -> float:
    found = (ROTATIONS | ROOTS)[name](factor).cpu().double()
    if name in ROTATIONS:
        return float((found.mT @ found - torch.eye(found.shape[-1])).abs().max())
    expected = ROOTS["root by eigh"](exact)
    norms = [torch.linalg.matrix_norm(x) for x in (found - expected, expected)]
    return float((norms[0] / norms[1]).max())


def _time(way: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cpu":
        began = time.process_time()
        way()
        return time.process_time() - began
    torch.cuda.synchronize()
    start = time.perf_counter()
    way()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _damped(factor: Tensor) -> Tensor:
    return factor + kl_factors.DAMPING * linalg.mean_diagonal(factor)[..., None] * _identity(factor)


def _shift(factor: Tensor) -> Tensor:
    return shampoo.DAMPING * linalg.mean_diagonal(factor)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def batch_shape(text: str) -> tuple[int, int]:
    """B and d of "12x384", an argument."""
    batch, _, d = text.partition("x")
    try:
        return int(batch), int(d)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a batch is written like 12x384, matrices x size, not {text!r}") from None


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refresh", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=batch_shape, default=SHAPES, metavar="BxD")
    parser.add_argument("--gpu-shapes", nargs="+", type=batch_shape, default=SHAPES_ON_GPU, metavar="BxD")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "refresh.jsonl")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with torch.no_grad():
        main()
