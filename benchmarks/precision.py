"""What each `compute_dtype` costs in precision: one update against float64, and the bases after many refreshes.

    python -m benchmarks.precision

Gradients are noise of three decades of scales. Without a GPU the operands are rounded and multiplied in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.counts import RESULTS
from kl_dist.methods import METHODS, Hyper, MatrixState, rule
from kl_dist.methods.products import COMPUTE_DTYPES

WARMUP, REFRESHES = 6, 2000
OUT = RESULTS.with_name("precision.jsonl")


def gradients(count: int, d: int) -> Tensor:
    """(count, 1, d, d) in float64, the same always."""
    noise = torch.randn(count, 1, d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.logspace(0, -3, d, dtype=torch.float64)[:, None] * noise


def hyper(compute_dtype: str | None) -> Hyper:
    return Hyper(betas=(0.9, 0.95), eps=1e-8, nesterov=True, compute_dtype=compute_dtype)


def state_after(
    method: str, dtype: torch.dtype, compute_dtype: str | None, grads: Tensor, refreshes: int
) -> MatrixState:
    """The state of one matrix after so many steps with a refresh each."""
    rules, d = rule(method, "fresh"), grads.shape[-1]
    state: MatrixState = rules.allocate((d, d), ("full", "full"), 1, torch.empty((), dtype=dtype))
    rules.start(state, grads[0].to(dtype), hyper(compute_dtype))
    for step in range(refreshes):
        grad = grads[step % len(grads)].to(dtype, copy=True)
        rules.update(state, grad, hyper(compute_dtype), torch.empty_like(grad))
        if rules.refresh is not None:
            rules.refresh(state, hyper(compute_dtype))
    return state


def update_errors(method: str, d: int = 24) -> dict[str, float]:
    """|U - U_64| / |U_64| of one update from the same state, by compute_dtype."""
    grads, rules = gradients(WARMUP + 2, d), rule(method, "fresh")
    exact = state_after(method, torch.float64, None, grads, WARMUP)

    def update(dtype: torch.dtype, compute_dtype: str | None) -> Tensor:
        state = exact.map(lambda x: x.to(dtype, copy=True) if x.is_floating_point() else x.clone())
        grad = grads[-1].to(dtype, copy=True)
        return rules.update(state, grad, hyper(compute_dtype), torch.empty_like(grad)).double()

    right = update(torch.float64, None)
    return {name: float((update(torch.float32, name) - right).norm() / right.norm()) for name in COMPUTE_DTYPES}


def orthogonality(bases: tuple[Tensor, ...]) -> float:
    """The largest element of |Q^T Q - I|."""
    return max(float((Q.mT @ Q - torch.eye(Q.shape[-1])).abs().max()) for Q in bases)


def main() -> None:
    """Print two tables, write a line."""
    print("| one update |", " | ".join(COMPUTE_DTYPES), "|\n", "| --- " * (1 + len(COMPUTE_DTYPES)), "|", sep="")
    errors = {method: update_errors(method) for method in METHODS}
    for method, found in errors.items():
        print(f"| {method} |", " | ".join(f"{found[name]:.1e}" for name in COMPUTE_DTYPES), "|")
    grads = gradients(16, 16)
    states = {name: state_after("kl_shampoo", torch.float32, name, grads, REFRESHES) for name in COMPUTE_DTYPES}
    bases = {name: orthogonality(state.bases) for name, state in states.items()}  # type: ignore[attr-defined]
    print("| bases |", " | ".join(f"{bases[name]:.1e}" for name in COMPUTE_DTYPES), "|")
    report.append([{**report.machine(), "update_errors": errors, "refreshes": REFRESHES, "bases": bases}], OUT)


if __name__ == "__main__":
    main()
