"""What an optimizer can say of its run: a few numbers of one rank, and of all of them together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from kl_dist.methods import fallbacks
from kl_dist.step.engine import Engine
from kl_dist.step.stacks import unit_states


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
        "refresh_seconds": engine.refresh_seconds,
        "fallbacks": fallbacks.read(),
        "condition": float(torch.stack(ratios).amax()) if ratios else None,
        "update_rms": float(torch.cat(norms).norm()) / math.sqrt(elements) if elements else None,
        "update_elements": elements,
    }


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
        "refresh_balance": max(seconds) * len(seconds) / sum(seconds) if sum(seconds) else 1.0,
        "fallbacks": dict(computed_otherwise),
        "condition": max((one["condition"] for one in ranks if one["condition"] is not None), default=None),
        "update_rms": math.sqrt(square / elements) if elements else None,
        "update_elements": elements,
    }
