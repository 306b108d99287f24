"""What the singular values of whitened momentum are, and the polynomials that follow for `kl_dist.methods.polar`.

    python -m benchmarks.polar --layers 2 --width 64 --context 64 --tokens-per-step 8192 --steps 150 --lr 1.5e-2

trains as launch/train.py does, by exact polar factors (SVD), and prints quantiles of the singular values over t, the
bound that the iteration divides by; then, for each number of steps and several lower ends l of the fitted range, how
well the result is aligned with the polar factor: the cosine of the angle between the two, mean over all blocks.
`python -m benchmarks.polar --fit` prints the coefficients for the ends that were chosen.

A step is the odd quintic that is nearest to 1 on the range of its inputs, in the largest distance E; the next one has
the range from 1 - E to 1 + E. This greedy composition is the best there is: Amsel et al. (arXiv 2505.16932).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import report
from kl_dist.methods import Hyper, add_rule, averages, kl_factors, kronecker, polar, rule
from kl_dist.methods.state import KLShampooState
from launch.options import parse
from launch.ranks import joined_ranks
from launch.train import Job

Triple = tuple[float, float, float]
Array = NDArray[np.float64]

RESULTS = Path(__file__).parent / "results" / "polar-spectra.jsonl"
MUON = (3.4445, -4.7750, 2.0315)
TRIED = (0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.025, 0.01, 0.003)
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
NARROW = 1e-4  # a range so short that the best quintic is the one with two derivatives of 0 at 1


def best_quintic(low: float, high: float) -> tuple[Triple, float]:
    """(a, b, c) of p(x) = a x + b x^3 + c x^5 with the least E = max |1 - p(x)| on [low, high], and E; by exchange."""
    if high - low < NARROW:
        return (15 / 8, -10 / 8, 3 / 8), (high - low) ** 3
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    for _ in range(100):
        x = np.array([low, *inner, high])
        system = np.stack([x, x**3, x**5, np.array([1.0, -1.0, 1.0, -1.0])], 1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b**2 - 20 * a * c)
        extremes = np.sqrt(np.array([-3 * b - root, -3 * b + root]) / (10 * c))
        moved, inner = float(np.abs(extremes - inner).max()), extremes
        if moved < 1e-14:
            break
    return (float(a), float(b), float(c)), float(error)


def composition(low: float, steps: int) -> list[Triple]:
    """The coefficients of `steps` quintics whose composition is nearest to 1 on [low, 1]."""
    found, high = [], 1.0
    for _ in range(steps):
        triple, error = best_quintic(low, high)
        found.append(triple)
        low, high = 1 - error, 1 + error
    return found


def applied(x: Array, triples: Sequence[Triple]) -> Array:
    """The composition at x."""
    for a, b, c in triples:
        x = a * x + b * x**3 + c * x**5
    return x


def alignment(values: Array) -> float:
    """Cosine of the angle between U diag(s) V^T and U V^T, mean over rows of singular values s (.., d)."""
    cosines = values.sum(-1) / np.sqrt(values.shape[-1] * (values**2).sum(-1))
    return float(cosines.mean())


class Spectra:
    """KL-Shampoo's update with the exact polar factor, which notes the singular values it meets."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, state: KLShampooState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
        state.step.add_(1)
        projected, spare = kronecker.project(grad, spare, state.bases)
        scale = kl_factors.learn(state, projected, spare, hyper)
        direction = averages.momentum(state.exp_avg, projected, state.step, hyper)
        roots = [None if x is None else x.rsqrt() for x in state.eigenvalues]
        whitened = kronecker.scale_sides(direction, roots, scale.reciprocal(), out=direction)
        left, values, right = torch.linalg.svd(whitened, full_matrices=False)
        self.seen.append(values / values.pow(8).sum(-1, keepdim=True).pow(1 / 8))
        size = values.square().mean(-1).sqrt()
        return kronecker.project_back(left @ right * kronecker.column(size, grad), spare, state.bases)


def train(arguments: Sequence[str], spectra: Spectra) -> Array:
    """The singular values over t of the second half of a run, a row a block and step."""
    add_rule("kl_shampoo", "exact_polar", rule("kl_shampoo", "fresh")._replace(update=spectra.update))
    with joined_ranks() as ranks:
        job = Job(parse([*arguments, "--recipe", "exact_polar"]), ranks)
        for step in range(1, job.options.steps + 1):
            job.train_step(step)
    late = spectra.seen[len(spectra.seen) // 2 :]
    return torch.cat([values for values in late if values.shape[-1] == late[-1].shape[-1]]).double().numpy()


def look(values: Array) -> report.Line:
    """Quantiles of s / t (.., d), and alignments by number of steps for each l, for Muon and for no step at all (0)."""
    muon = values / np.sqrt((values**2).sum(-1, keepdims=True))
    found = {
        f"{low:g}": {k: alignment(applied(values, composition(low, k))) for k in polar.LOWER_ENDS} for low in TRIED
    }
    found["Muon"] = {k: alignment(applied(muon, [MUON] * k)) for k in polar.LOWER_ENDS}
    return {
        "quantiles": {f"{q:g}": float(np.quantile(values, q)) for q in QUANTILES},
        "alignments": {"none": {0: alignment(values)}, **found},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the coefficients, or quantiles and alignments of a run, which also become a line of the results."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--fit" in given:
        for steps, low in polar.LOWER_ENDS.items():
            for triple in composition(low, steps):
                print(steps, low, ", ".join(f"{x:.6f}" for x in triple))
        return
    seen = look(train(given, Spectra()))
    print("quantiles", *(f"{q}: {value:.4f}" for q, value in seen["quantiles"].items()), sep="  ")
    for low, by_steps in seen["alignments"].items():
        print(f"l {low:5}", *(f"{k} steps: {cosine:.4f}" for k, cosine in by_steps.items()), sep="  ")
    report.append([{**report.machine(), "job": given, **seen}], RESULTS)


if __name__ == "__main__":
    main()
