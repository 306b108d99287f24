"""What an optimizer can say of its run: a few numbers of one rank, and of all of them together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kl_dist.methods import fallbacks
from kl_dist.ranks import Ranks
from kl_dist.step.clock import Times
from kl_dist.step.engine import Engine
from kl_dist.step.stacks import unit_states

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


def of(engine: Engine, ranks: Ranks | None, matrices: bool) -> dict[str, Any]:
    """Of this rank, or of all together, which is a collective of `ranks`; see `KLShampoo.stats`."""
    lately, on_host = engine.clock.lately(), engine.device.type == "cpu"
    mine = of_rank(engine)
    if ranks is None:
        found = mine | of_times([lately], on_host)
    else:
        told = ranks.gather_objects((mine, lately))
        found = of_all([one for one, _ in told]) | of_times([times for _, times in told], on_host)
    if matrices:
        named = of_matrices(engine)
        told = [named] if ranks is None else ranks.gather_objects(named)
        found["matrices"] = {name: said for one in reversed(told) for name, said in one.items()}
    return found


def of_rank(engine: Engine) -> dict[str, Any]:
    """Of what this rank owns; waits for the device."""
    ratios = [
        tensor.amax() / tensor.amin()
        for _, tensors in unit_states(engine.stacks)
        for name, tensor in tensors.items()
        if name.startswith("eigenvalues.")
    ]
    matrices = [made for made in engine.updates if made.elements]
    elements = sum(made.elements for made in matrices)
    norms = [made.norms.double().nan_to_num_(0.0, 0.0, 0.0) for made in matrices]
    return {
        "refreshes": engine.refreshes,
        "refresh_seconds": engine.clock.refreshes,
        "update_seconds": engine.clock.updates,
        "wait_seconds": engine.clock.waits,
        "fallbacks": fallbacks.read(),
        "condition": float(torch.stack(ratios).amax()) if ratios else None,
        "update_rms": float(torch.cat(norms).norm()) / math.sqrt(elements) if elements else None,
        "update_elements": elements,
    }


def of_times(ranks: Sequence[Times], on_host: bool) -> dict[str, Any]:
    """Of the steps since they were last asked for, on one rank or several.

    `communication_hidden`, with the sums over ranks,

        1 - (seconds of waiting) / (seconds in flight)

    where one exchange at least of gradients or updates is in flight, launched and not yet in the host's hands; the
    agreement that begins a step is not among them. 1 is all hidden behind computing. A rank that is late is an exchange
    in flight to those that wait for it, which the host cannot tell from a slow network. None alone, and on CUDA, where
    only waiting for the device would tell.

    `flops_per_second`, planned flops (`Plan.cost`: refreshes amortised, bytes counted as flops) over seconds of updates
    and refreshes. `work_as_run`, the largest over ranks of (its share of these seconds) / (its share of planned flops):
    1 is as planned, 1.3 a rank that takes 30 % more than it was given. Both as if every parameter had a gradient, over
    as many steps as several refreshes take; None on CUDA, where the host does not see the work.
    """
    waits, in_flight = sum(one.waits for one in ranks), sum(one.in_flight for one in ranks)
    told = in_flight > 0 and not any(one.silent for one in ranks)
    work = [(one.updates + one.refreshes, one.flops) for one in ranks if one.flops]
    seconds, flops = (sum(parts) for parts in zip(*work, strict=True)) if work else (0.0, 0.0)
    seen = on_host and seconds > 0
    return {
        "communication_hidden": 1 - waits / in_flight if told else None,
        "flops_per_second": flops / seconds if seen else None,
        "work_as_run": max(mine / planned for mine, planned in work) * flops / seconds if seen else None,
    }


def of_matrices(engine: Engine) -> dict[str, dict[str, Any]]:
    """Of every matrix or block that this rank owns, by name; waits for the device.

    For each side k that keeps a factor, `condition.k`, the ratio of its eigenvalues; `effective_rank.k`, exp of the
    entropy of eigenvalues that add up to 1 (Roy and Vetterli, 2007), from 1 to d_k; `eigenvalues.k`, the quantiles 0,
    10, 50, 90 and 100 % of eigenvalues of unit mean. `update_rms` of the last step, before the learning rate, and
    `weight_rms`, of what this rank has of the parameter. Method "shampoo" keeps no eigenvalues, and Muon no factors.
    """
    moved = {i: norm for made in engine.updates for i, norm in zip(made.indices, made.norms.tolist(), strict=True)}
    weights: dict[int, float] = {}
    found: dict[str, dict[str, Any]] = {}
    for stack in (stack for bucket in engine.stacks for stack in bucket):
        for row, (index, unit) in enumerate(zip(stack.indices, stack.units, strict=True)):
            if unit.elementwise:
                continue
            if unit.parameter not in weights:
                weights[unit.parameter] = engine.shards.rms(unit.parameter)
            said: dict[str, Any] = {"weight_rms": weights[unit.parameter]}
            if index in moved:
                said["update_rms"] = moved[index] / math.sqrt(unit.numel)
            for side, values in _eigenvalues(stack.state.row(row)):
                share = values / values.sum()
                entropy = -torch.special.xlogy(share, share).sum()
                quantiles = torch.tensor(QUANTILES, dtype=values.dtype, device=values.device)
                said[f"condition.{side}"] = float(values.amax() / values.amin())
                said[f"effective_rank.{side}"] = float(entropy.exp())
                said[f"eigenvalues.{side}"] = (values / values.mean()).quantile(quantiles).tolist()
            found[unit.name] = said
    return found


def check_interval(matrices_every: int | None) -> None:
    """Raises ValueError unless it can be the steps between two looks at the matrices, or None for no look."""
    if matrices_every is not None and matrices_every < 1:
        raise ValueError(f"matrices_every is {matrices_every}: a number of steps, or None to leave the matrices out")


def scalars(said: Mapping[str, Any]) -> dict[str, float]:
    """What `stats` says, as names and numbers for a board.

    Of a matrix "matrices/NAME/condition.0"; of quantiles "matrices/NAME/eigenvalues.0/q10"; what is None is left out.
    """
    found: dict[str, float] = {}
    for name, value in said.items():
        if isinstance(value, list):
            value = {f"q{100 * q:.0f}": x for q, x in zip(QUANTILES, value, strict=True)}
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": x for inner, x in scalars(value).items()}
        elif value is not None:
            found[name] = float(value)
    return found


def _eigenvalues(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(side, eigenvalues in float64) of a matrix: those it keeps, or the diagonal of what is in an eigenbasis."""
    kept = {name.split(".")[1]: x for name, x in state.items() if name.startswith("eigenvalues.")}
    if not kept:
        sides = [name.split(".")[1] for name in state if name.startswith("bases.")]
        kept = {side: state[f"factors.{side}"].diagonal() for side in sides}
    for side, values in kept.items():
        yield side, values.double().clamp_min(torch.finfo(torch.float32).tiny)


def of_all(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all ranks together: the largest condition and refresh time, one update RMS, counters added up.

    `refresh_balance` is the largest refresh time over the mean: 1 is perfect.
    """
    computed_otherwise: Counter[str] = Counter()
    for one in ranks:
        computed_otherwise.update(one["fallbacks"])
    seconds = [one["refresh_seconds"] for one in ranks]
    elements = sum(one["update_elements"] for one in ranks)
    square = sum(one["update_rms"] ** 2 * one["update_elements"] for one in ranks if one["update_elements"])
    return {
        "refreshes": sum(one["refreshes"] for one in ranks),
        "refresh_seconds": max(seconds),
        "update_seconds": max(one["update_seconds"] for one in ranks),
        "wait_seconds": max(one["wait_seconds"] for one in ranks),
        "refresh_balance": max(seconds) * len(seconds) / sum(seconds) if sum(seconds) else 1.0,
        "fallbacks": dict(computed_otherwise),
        "condition": max((one["condition"] for one in ranks if one["condition"] is not None), default=None),
        "update_rms": math.sqrt(square / elements) if elements else None,
        "update_elements": elements,
    }
