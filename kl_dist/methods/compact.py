"""A rule with its state in half the bytes: what is kept is narrow, what is computed with is as wide as ever.

    S~_k, Q_k in float16, M~ in bfloat16;   a step: made float32, stepped, rounded to the nearest

5 numbers per parameter of a square block are 10 bytes so, where they were 20: those of 2.5 in float32. float16 has
eleven bits and reaches from 6e-8 to 65504, which holds what has a scale of its own: entries of Q are at most 1, those
of S~ at most d, beside a mean of 1. M~ has the gradients' scale, and the range of bfloat16. Eigenvalues and scales stay
as they are.

Rounded, Q is no longer orthogonal: by up to 5e-3 in an entry of Q^T Q - I, where every 8th refresh makes it so again.
Rounding is no continuous function of the gradients either, and layouts agree to what it makes of their noise. State in
float64 stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kl_dist.methods import kl_factors
from kl_dist.methods.kronecker import Hyper
from kl_dist.methods.rule import Rule
from kl_dist.methods.state import KLShampooState

NARROW = {"factors": torch.float16, "bases": torch.float16, "exp_avg": torch.bfloat16}
"""By field of the state."""

REFRESHES_PER_REORTHOGONALIZATION = 8

WIDE_COPIES = 5  # of square blocks' gradients: the state that is made wide

AT_ONCE = 2**21  # elements of gradients whose state is wide at a time; 42 MB of it in square blocks


def compact(rule: Rule, form: str) -> Rule:
    """A rule resident in the eigenbasis, with its state narrow; `form` is the recipe whose checkpoints it shares."""
    refresh_wide = rule.refresh
    assert refresh_wide is not None

    def allocate(*arguments: Any) -> KLShampooState:
        state: KLShampooState = rule.allocate(*arguments)
        return _cast(state, NARROW) if state.exp_avg.dtype == torch.float32 else state

    def start(state: KLShampooState, grad: Tensor, hyper: Hyper) -> None:
        for rows in _ranges(grad):
            with _wide(state.rows(rows)) as part:
                rule.start(part, grad[rows[0] : rows[-1] + 1], hyper)

    def update(state: KLShampooState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
        for rows in _ranges(grad):
            with _wide(state.rows(rows)) as part:
                chosen = slice(rows[0], rows[-1] + 1)
                grad[chosen] = rule.update(part, grad[chosen], hyper, spare[chosen])
        return grad

    def refresh(state: KLShampooState, hyper: Hyper) -> None:
        for rows in _ranges(state.exp_avg):
            kept = state.rows(rows)
            with _wide(kept) as part:
                refresh_wide(part, hyper)
                due = None if part is kept else kl_factors.drift_is_due(part, hyper, REFRESHES_PER_REORTHOGONALIZATION)
                for basis in part.bases:
                    if basis is not None and due is not None:
                        basis.copy_(kl_factors.without_drift(basis, due))

    copies = rule.working_copies + WIDE_COPIES
    return rule._replace(
        allocate=allocate, start=start, update=update, refresh=refresh, working_copies=copies, form=form
    )


def _ranges(x: Tensor) -> Iterator[range]:
    """The matrices of a batch, so many at a time."""
    at_once = max(1, AT_ONCE // x[0].numel())
    for first in range(0, len(x), at_once):
        yield range(first, min(first + at_once, len(x)))


@contextmanager
def _wide(state: KLShampooState) -> Iterator[KLShampooState]:
    """The state in float32, rounded into what is kept when it is done with; itself where nothing of it is narrow."""
    if state.exp_avg.dtype not in NARROW.values():
        yield state
        return
    wide = _cast(state, dict.fromkeys(NARROW, torch.float32))
    yield wide
    kept, found = state.tensors(), wide.tensors()
    for name, tensor in kept.items():
        if name.split(".")[0] in NARROW:
            tensor.copy_(found[name])


def _cast(state: KLShampooState, dtypes: Mapping[str, torch.dtype]) -> KLShampooState:
    """The state with some fields in other dtypes; the others are the same tensors."""

    def cast(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, tuple):
            return tuple(cast(x, dtype) for x in value)
        return value if value is None else value.to(dtype)

    return replace(state, **{name: cast(getattr(state, name), dtype) for name, dtype in dtypes.items()})
