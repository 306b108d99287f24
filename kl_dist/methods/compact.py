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

from collections.abc import Callable, Mapping
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

AT_ONCE = 2**21  # elements of gradients whose state is wide at a time; 42 MB of it in square blocks


def compact(rule: Rule, form: str) -> Rule:
    """A rule resident in the eigenbasis, with its state narrow; `form` is the recipe whose checkpoints it shares."""
    refresh_wide = rule.refresh
    assert refresh_wide is not None

    def allocate(*arguments: Any) -> KLShampooState:
        state: KLShampooState = rule.allocate(*arguments)
        return _cast(state, NARROW) if state.exp_avg.dtype == torch.float32 else state

    def start(state: KLShampooState, grad: Tensor, hyper: Hyper) -> None:
        _in_float32(state, lambda part, rows: rule.start(part, grad[rows], hyper))

    def update(state: KLShampooState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
        def update_part(part: KLShampooState, rows: slice) -> None:
            grad[rows] = rule.update(part, grad[rows], hyper, spare[rows])

        _in_float32(state, update_part)
        return grad

    def refresh(state: KLShampooState, hyper: Hyper) -> None:
        def refresh_part(part: KLShampooState, rows: slice) -> None:
            refresh_wide(part, hyper)
            due = kl_factors.drift_is_due(part, hyper, REFRESHES_PER_REORTHOGONALIZATION) if _is_narrow(state) else None
            for basis in part.bases:
                if basis is not None and due is not None:
                    basis.copy_(kl_factors.without_drift(basis, due))

        _in_float32(state, refresh_part)

    return rule._replace(
        allocate=allocate, start=start, update=update, refresh=refresh, form=form, wide_at_once=AT_ONCE
    )


def _is_narrow(state: KLShampooState) -> bool:
    return state.exp_avg.dtype in NARROW.values()


def _in_float32(state: KLShampooState, do: Callable[[KLShampooState, slice], None]) -> None:
    """Do it to so many matrices at a time, their state made float32, and rounded into what is kept when it is done.

    State that is not narrow is given as it is.
    """
    if not _is_narrow(state):
        do(state, slice(None))
        return
    at_once = max(1, AT_ONCE // state.exp_avg[0].numel())
    for first in range(0, len(state.exp_avg), at_once):
        rows = range(first, min(first + at_once, len(state.exp_avg)))
        kept = state.rows(rows)
        wide = _cast(kept, dict.fromkeys(NARROW, torch.float32))
        do(wide, slice(rows.start, rows.stop))
        found = wide.tensors()
        for name, tensor in kept.tensors().items():
            if name.split(".")[0] in NARROW:
                tensor.copy_(found[name])
        del wide, found  # before others are made wide


def _cast(state: KLShampooState, dtypes: Mapping[str, torch.dtype]) -> KLShampooState:
    """The state with some fields in other dtypes; the others are the same tensors."""

    def cast(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, tuple):
            return tuple(cast(x, dtype) for x in value)
        return value if value is None else value.to(dtype)

    return replace(state, **{name: cast(getattr(state, name), dtype) for name, dtype in dtypes.items()})
