"""Other implementations of the same methods, each made from whatever of them this machine can import.

Nothing here is a dependency. What pip knows can be installed beside torch (`heavyball`, `pytorch_optimizer`); the rest
is code to check out and put on PYTHONPATH: github.com/yorkerlin/KL-Methods (imported as `optim`),
github.com/facebookresearch/optimizers (`distributed_shampoo`) and github.com/NVIDIA-NeMo/Emerging-Optimizers
(`emerging_optimizers`, Python 3.12). A peer that cannot be imported is listed as not installed.

All are set to float32 and to their own defaults otherwise, as a user would first meet them.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.contenders import Contender, set_in_groups

AUTHORS = "KL-Shampoo (authors)"
Load = Callable[[], Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]]


def find_peers() -> tuple[list[Contender], dict[str, str]]:
    """The peers that can be imported, and for the others the reason why not."""
    found: list[Contender] = []
    missing: dict[str, str] = {}
    for name, load, options in _PEERS:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # some print banners, and stdout is for the table
                make = load()
        except Exception as problem:  # a broken installation raises anything at all
            missing[name] = f"{type(problem).__name__}: {problem}"
            continue
        found.append(Contender(name, make, **options))
    return found, missing


def _authors(**options: Any) -> Load:
    def load() -> Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]:
        optimizer = importlib.import_module("optim.kl_opt").KLOpt
        # bfloat16 by default: on a CPU without instructions for it that would be slower still, and not the same maths
        return lambda params: optimizer(list(params), cast_dtype=torch.float32, precondition_frequency=1, **options)

    return load


def _released_soap() -> Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]:
    module = importlib.import_module("optim.soap")
    options = {"cast_dtype": torch.float32}
    return lambda params: module.SOAP(list(params), precondition_frequency=1, **options)


def _meta(config: str) -> Load:
    def load() -> Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]:
        module = importlib.import_module("distributed_shampoo")
        chosen = getattr(module, config)
        options = {"betas": (0.9, 0.95), "precondition_frequency": 1, "start_preconditioning_step": 1}
        return lambda params: module.DistributedShampoo(
            list(params), preconditioner_config=chosen() if isinstance(chosen, type) else chosen, **options
        )

    return load


def _heavyball(optimizer: str) -> Load:
    def load() -> Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]:
        module = importlib.import_module("heavyball")
        # compiled in its default mode KLShampoo fails on CPUs, and autotuning takes longer than everything timed here
        switches: Any = importlib.import_module("heavyball.utils")
        switches.compile_mode = switches.compile_mode_recommended_to_none = None
        make = getattr(module, optimizer)
        return lambda params: make(list(params), precondition_frequency=1, use_precond_schedule=False)

    return load


def _pytorch_optimizer() -> Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]:
    optimizer = importlib.import_module("pytorch_optimizer").SOAP
    return lambda params: optimizer(list(params), precondition_frequency=1)


def _nvidia() -> Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]:
    optimizer = importlib.import_module("emerging_optimizers.legacy_soap.soap").SOAP
    return lambda params: optimizer(list(params), lr=1e-3, use_kl_shampoo=True)


def _set_in_state_too(optimizer: torch.optim.Optimizer, every: int) -> None:
    """The authors' code, the SOAP it grew from and a port of that copy T into each state at its first step."""
    set_in_groups(optimizer, every)
    for state in optimizer.state.values():
        state["precondition_frequency"] = every


def _set_schedule(optimizer: torch.optim.Optimizer, every: int) -> None:
    """heavyball adds 1 / T up and refreshes when the sum passes a whole number."""
    optimizer.precond_schedule = 1 / every  # type: ignore[attr-defined]


_IN_STATE: dict[str, Any] = {"set_frequency": _set_in_state_too}
_IN_GROUPS: dict[str, Any] = {"set_frequency": set_in_groups}
_EAGER: dict[str, Any] = {"set_frequency": _set_schedule, "note": "torch.compile off"}
_COMPILED: dict[str, Any] = {**_IN_STATE, "note": "cast_dtype=float32; partly under torch.compile, as released"}

_PEERS: tuple[tuple[str, Load, dict[str, Any]], ...] = (
    (AUTHORS, _authors(), _COMPILED),
    ("KL-SOAP (authors)", _authors(using_klsoap=True), _COMPILED),
    ("SOAP (nikhilvyas, in KL-Methods)", _released_soap, _IN_STATE),
    ("KL root inverse (Meta)", _meta("RootInvKLShampooPreconditionerConfig"), _IN_GROUPS),
    ("KL eigenbasis (Meta)", _meta("EigendecomposedKLShampooPreconditionerConfig"), _IN_GROUPS),
    ("SOAP (Meta)", _meta("DefaultSOAPConfig"), _IN_GROUPS),
    ("KL-Shampoo (heavyball)", _heavyball("KLShampoo"), _EAGER),
    ("SOAP (heavyball)", _heavyball("SOAP"), _EAGER),
    ("SOAP (pytorch_optimizer)", _pytorch_optimizer, _IN_STATE),
    ("KL-SOAP (NVIDIA)", _nvidia, {"every_step": True, "note": "refreshes at every step"}),
)
