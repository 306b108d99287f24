"""KLShampoo as torch's own tests describe an optimizer: torch.testing._internal.common_optimizers.OptimizerInfo."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import kl_dist
from kl_dist import KLShampoo
from kl_dist.options import recipes


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """What an import in here changes for the whole process is changed back.

    torch's testing library forbids to set torch.backends' flags from then on, which a Trainer does; it adds a variable
    to the environment, and filters of warnings.
    """
    names, filters, frozen = set(os.environ), warnings.filters[:], torch.backends.flags_frozen()
    yield
    variables = torch.backends.flags_frozen.__globals__  # torch.backends itself is a wrapper of its module
    assert torch.backends.flags_frozen() != variables["__allow_nonbracketed_mutation_flag"]
    variables["__allow_nonbracketed_mutation_flag"] = not frozen
    warnings.filters[:] = filters
    for name in os.environ.keys() - names:
        del os.environ[name]


with unnoticed():
    pytest.importorskip("expecttest", reason="torch's testing library needs it")
    from torch.testing._internal.common_optimizers import (
        OptimizerErrorEnum,
        OptimizerInfo,
        OptimizerInput,
        get_error_inputs_for_all_optims,
    )

LR = 2.0**-8
"""The same as a number and as a tensor of float32."""


def inputs(device: str = "cpu", dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    """Options of a parameter group: every method under every recipe, and what else shapes an update."""
    given: dict[str, dict[str, Any]] = {
        f"{method}, {recipe}": {"method": method, "recipe": recipe}
        for method in kl_dist.METHODS
        for recipe in recipes(method)
    }
    given |= {
        "adamw": {"method": "adamw"},
        "lr": {"lr": LR},
        "a tensor for lr": {"lr": torch.tensor(LR)},
        "a tensor of one element for lr": {"lr": torch.tensor([LR]), "adamw_lr": LR},
        "weight decay": {"lr": 1e-2, "weight_decay": 0.5},
        "no weight decay": {"weight_decay": 0.0},
        "betas and eps": {"betas": (0.8, 0.95), "adamw_betas": (0.7, 0.99), "eps": 1e-6},
        "a refresh of all every third step": {"precondition_frequency": 3, "stagger": False},
        "a long side kept diagonal": {"max_preconditioner_dim": 8, "long_side": "diagonal", "blocking": "none"},
    }
    return [OptimizerInput(params=None, kwargs=options, desc=name) for name, options in given.items()]


def errors(device: str, dtype: torch.dtype) -> list[Any]:
    """What every optimizer of torch's refuses."""
    return get_error_inputs_for_all_optims(device, dtype)


INFO = OptimizerInfo(
    KLShampoo,
    optim_inputs_func=inputs,
    optim_error_inputs_func=errors,
    supported_impls=(),
    not_og_supported_flags=(),
    supports_complex=False,
    supports_multiple_devices=False,
)
NAMES = [one.desc for one in INFO.optim_inputs_func(device="cpu")]


def options_of(name: str) -> dict[str, Any]:
    """Made anew: a schedule writes into a learning rate that is a tensor."""
    return next(one.kwargs for one in INFO.optim_inputs_func(device="cpu") if one.desc == name)


SCHEDULES = {
    "no schedule": (),
    **{f"torch's schedules {i}": schedules for i, schedules in enumerate(INFO.scheduler_inputs)},
    "a cosine after a warm-up": (
        lambda opt: lr_scheduler.SequentialLR(
            opt, [lr_scheduler.LinearLR(opt, 0.5, total_iters=4), lr_scheduler.CosineAnnealingLR(opt, 40)], [4]
        ),
    ),
}

__all__ = ["INFO", "LR", "NAMES", "SCHEDULES", "OptimizerErrorEnum", "options_of"]
