"""The optimizers that can be compared, behind one small object, and the learning-rate schedule they share.

All of them decay the same parameters (matrices and embeddings, never norms). "muon", torch's, updates only the matrices
inside the blocks and has AdamW beside it; our methods bring their own AdamW route, "kl_muon" among them.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from kl_dist import KLShampoo, param_groups
from launch.model import Model
from launch.muon import Float32Muon
from launch.options import METHOD_OF, Options, UsageError

ADAMW_BETAS = (0.9, 0.95)
MUON_OPTIONS: dict[str, Any] = {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.85}
"""Muon's best on the demo, by docs/learning.md; torch's own defaults end 0.1 nats higher."""


class Trainer:
    """One or two optimizers that step as one, at learning rates that follow the schedule.

    The schedule is a function of the step alone. It has no state, so a job that continues at step 201 computes what one
    that never stopped would.
    """

    def __init__(self, optimizers: list[Optimizer], steps: int, warmup: int, shape: str = "cosine") -> None:
        self.optimizers = optimizers
        self.steps = steps
        self.warmup = warmup
        self.shape = shape
        self._peaks = [group["lr"] for group in self.groups]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers; looked up each time, because loading a state makes new ones."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, step: int) -> float:
        """Update the weights as step number `step`, counted from 1; returns the learning rate of the first group."""
        factor = schedule(step, self.steps, self.warmup, self.shape)
        for group, peak in zip(self.groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        for optimizer in self.optimizers:
            optimizer.step()
        return self.groups[0]["lr"]

    def numbers(self) -> dict[str, Any]:
        """What KLShampoo says of itself over all ranks, matrix by matrix; a collective. Empty of other optimizers."""
        ours = next((one for one in self.optimizers if isinstance(one, KLShampoo)), None)
        return {} if ours is None else ours.stats(all_ranks=True, matrices=True)

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


DECAY = 0.2
"""Of the steps after the warm-up, the share in which "wsd" (warm-up, stable, decay) falls to 0."""


def schedule(step: int, steps: int, warmup: int, shape: str = "cosine") -> float:
    """What the peak learning rate is multiplied by: linear from 0 to 1 over `warmup`, then what `--schedule` says."""
    if step <= warmup:
        return step / warmup
    left = 1 - (step - warmup) / (steps + 1 - warmup)  # from 1 to 0
    shapes = {
        "cosine": 0.5 - 0.5 * math.cos(math.pi * left),
        "linear": left,
        "wsd": min(1, left / DECAY),
        "constant": 1,
    }
    return shapes[shape]


def make_trainer(options: Options, model: Model) -> Trainer:
    """The optimizer that `options` name, over the parameters of the bare model (not its DDP wrapper)."""
    with blamed_on_set(options):
        if options.optimizer in METHOD_OF:
            lr, adamw_lr = options.rates
            # The schedule sets `lr` alone; the optimizer keeps `adamw_lr` in proportion to it.
            shared: dict[str, Any] = {"lr": lr, "adamw_lr": adamw_lr, "weight_decay": options.weight_decay}
            head = None if hasattr(model, "get_output_embeddings") else "head"  # transformers' models say it themselves
            optimizers = [kronecker(options, param_groups(model, output_head=head, **shared))]
        elif options.optimizer == "muon":
            optimizers = muon(options, model)
        else:
            optimizers = [adamw(model.parameters(), options, options.optimizer_options)]
    return Trainer(optimizers, options.steps, options.warmup_steps, options.schedule)


@contextlib.contextmanager
def blamed_on_set(options: Options) -> Iterator[None]:
    """What an optimizer refuses is a mistake of the user's where `--set` was given."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not options.set:
            raise
        raise UsageError(f"--set {' '.join(options.set)}: {options.optimizer} says: {error}") from error


def kronecker(options: Options, groups: Sequence[dict[str, Any]]) -> Optimizer:
    """One of our methods over parameter groups, its state and its work divided over the ranks."""
    return KLShampoo(
        groups,
        lr=options.rates.lr,
        method=METHOD_OF[options.optimizer],
        recipe=options.recipe or "fresh",
        precondition_frequency=options.precondition_frequency,
        **options.optimizer_options,
    )


def muon(options: Options, model: Model) -> list[Optimizer]:
    """Muon on the blocks' matrices, AdamW on the rest."""
    matrices = [parameter for parameter in model.blocks.parameters() if parameter.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    kind = Float32Muon if matrices[0].device.type == "cpu" else Muon
    return [
        kind(
            matrices,
            lr=options.rates.lr,
            weight_decay=options.weight_decay,
            **(MUON_OPTIONS | options.optimizer_options),
        ),
        adamw(rest, options),
    ]


def adamw(parameters: Any, options: Options, asked: Mapping[str, Any] = MappingProxyType({})) -> Optimizer:
    """AdamW that decays what has two dimensions; `asked` are options of its own."""
    # Those of one device mesh by themselves: torch's batched kernels do not take several at once.
    kinds: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for parameter in sorted(parameters, key=lambda parameter: parameter.ndim < 2):
        kinds.setdefault((parameter.ndim >= 2, getattr(parameter, "device_mesh", None)), []).append(parameter)
    return AdamW(
        [
            {"params": kind, "weight_decay": options.weight_decay if decayed else 0.0}
            for (decayed, _), kind in kinds.items()
        ],
        lr=options.rates.adamw_lr,
        **{"betas": ADAMW_BETAS, "fused": torch.cuda.is_available(), **asked},
    )
