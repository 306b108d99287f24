"""State of a batch of equal-shaped matrices, as typed dataclasses of tensors.

Shapes: B matrices, each with K sides d_1..d_K (K = 2: rows and columns). The first axis of every tensor is the batch,
so that one matrix is one row of it. `None` stands where a side keeps nothing of that kind (see `Side`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

import torch
from torch import Tensor

Side = Literal["full", "diagonal", "identity"]
"""What one side of a matrix keeps: a Kronecker factor, only its diagonal, or nothing."""

S = TypeVar("S", bound="State")


def span(indices: Sequence[int]) -> slice | list[int]:
    """Indices as a slice where they are an unbroken range: it gives views, and costs no transfer to a device."""
    first, count = indices[0], len(indices)
    unbroken = list(indices) == list(range(first, first + count))
    return slice(first, first + count) if unbroken else list(indices)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """State is float64 for float64 parameters and float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_steps(batch: int) -> Tensor:
    """The step counts of what has not been updated yet."""
    return torch.zeros(batch, dtype=torch.int64)


def unstarted(batch: int) -> tuple[Tensor, Tensor]:
    """`step` and `started` of matrices that have not seen a gradient yet."""
    return no_steps(batch), torch.zeros(batch, dtype=torch.uint8)


@dataclass
class State:
    """A flat bag of tensors, changed in place throughout."""

    step: Tensor  # (B,) int64 on the CPU: updates made, so that schedules never wait for a device

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; the k-th entry of a per-side field is called `field.k`."""
        found: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found[field.name] = value
            elif isinstance(value, tuple):
                found.update({f"{field.name}.{k}": x for k, x in enumerate(value) if isinstance(x, Tensor)})
        return found

    def map(self: S, function: Callable[[Tensor], Tensor]) -> S:
        """The same kind of state with `function` applied to every tensor."""
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value = function(value)
            elif isinstance(value, tuple):
                value = tuple(function(x) if isinstance(x, Tensor) else x for x in value)
            changed[field.name] = value
        return type(self)(**changed)

    def row(self, index: int) -> dict[str, Tensor]:
        """Views of one matrix's tensors, by name."""
        return {name: x[index] for name, x in self.tensors().items()}

    def rows(self: S, indices: Sequence[int]) -> S:
        """Some of the matrices: views where `indices` is an unbroken range, copies otherwise."""
        chosen = span(indices)
        return self if chosen == slice(0, len(self.step)) else self.map(lambda x: x[chosen])

    def put(self: S, indices: Sequence[int], part: S) -> None:
        """Write back what `rows(indices)` gave; nothing to do where it gave views."""
        chosen = span(indices)
        if not isinstance(chosen, slice):
            for mine, theirs in zip(self.tensors().values(), part.tensors().values(), strict=True):
                mine[chosen] = theirs


@dataclass
class MatrixState(State):
    """What every matrix method keeps."""

    started: Tensor  # (B,) uint8 on the CPU: 1 once the first non-zero gradient has been seen
    exp_avg: Tensor  # (B, d_1..d_K)


@dataclass
class KLShampooState(MatrixState):
    """Factors and momentum live in the eigenbasis: S~ = Q^T S Q and M~ = Q_a^T M Q_b."""

    factors: tuple[Tensor | None, ...]  # (B, d_k, d_k)  S~_k
    bases: tuple[Tensor | None, ...]  # (B, d_k, d_k)  Q_k, eigenvectors as columns
    eigenvalues: tuple[Tensor | None, ...]  # (B, d_k)  lambda_k
    scale: Tensor  # (B,)  v, the mean square of the whitened gradient


@dataclass
class KLSOAPState(KLShampooState):
    """KL-Shampoo's, and Adam's second moment with its scale."""

    exp_avg_sq: Tensor  # (B, d_1..d_K)  second moment in the eigenbasis
    grad_scale: Tensor  # (B,)  w, the mean square of the gradient


@dataclass
class SOAPState(MatrixState):
    """As KL-Shampoo's, resident in the eigenbasis; no eigenvalues are kept."""

    exp_avg_sq: Tensor  # (B, d_1..d_K)  second moment in the eigenbasis
    factors: tuple[Tensor | None, ...]  # (B, d_k, d_k)  S~_k
    bases: tuple[Tensor | None, ...]  # (B, d_k, d_k)  Q_k
    grad_scale: Tensor  # (B,)  w


@dataclass
class ShampooState(MatrixState):
    """Everything in the original coordinates; a diagonal side has (B, d_k) vectors."""

    exp_avg_sq: Tensor  # (B, d_1..d_K)  of the grafted AdamW
    factors: tuple[Tensor | None, ...]  # (B, d_k, d_k)  S_k
    inverse_roots: tuple[Tensor | None, ...]  # (B, d_k, d_k)  S_k^-p
    grad_scale: Tensor  # (B,)  w


@dataclass
class AdamWState(State):
    """Slices of flat parameters, of different lengths, laid end to end; only `step` has an entry per slice."""

    exp_avg: Tensor  # (sum of lengths,)
    exp_avg_sq: Tensor  # (sum of lengths,)
    lengths: list[int]

    def row(self, index: int) -> dict[str, Tensor]:
        return {name: x[0] if name == "step" else x for name, x in self._range(index, index + 1).tensors().items()}

    def rows(self, indices: Sequence[int]) -> AdamWState:
        chosen = span(indices)
        if isinstance(chosen, slice):
            return self._range(chosen.start, chosen.stop)
        parts = [self._range(i, i + 1) for i in indices]
        return AdamWState(
            torch.cat([part.step for part in parts]),
            torch.cat([part.exp_avg for part in parts]),
            torch.cat([part.exp_avg_sq for part in parts]),
            [self.lengths[i] for i in indices],
        )

    def put(self, indices: Sequence[int], part: AdamWState) -> None:
        if not isinstance(span(indices), slice):
            for i, index in enumerate(indices):
                for name, value in part.row(i).items():
                    self.row(index)[name].copy_(value)

    def _range(self, first: int, last: int) -> AdamWState:
        """Views of neighbouring slices."""
        start = sum(self.lengths[:first])
        lengths = self.lengths[first:last]
        flat = slice(start, start + sum(lengths))
        return AdamWState(self.step[first:last], self.exp_avg[flat], self.exp_avg_sq[flat], lengths)
