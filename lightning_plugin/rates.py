"""Which learning rates a converted AdamW becomes: its own, or by the rule that docs/learning.md found.

By the rule matrices train at `Method.lr_over_adamw` times AdamW's learning rate, five for KL-Shampoo, and what AdamW
goes on serving at half of that. `lr` of the groups stays AdamW's, so that schedules, callbacks and programs that set it
by hand go on as they are: `matrix_lr` and `adamw_lr` keep their ratio to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from kl_dist import METHODS
from kl_dist.modules import shape_of

WAYS = ("rule", "keep")
"""What `convert_lr` may be, beside None: by the rule unless most of the module is frozen."""


class Ratios(NamedTuple):
    """Learning rates over AdamW's."""

    matrices: float
    adamw: float  # of what AdamW goes on serving


def by_rule(module: nn.Module, given: Mapping[str, Any]) -> Ratios | None:
    """None: AdamW's learning rate is kept, or the strategy's options say another."""
    return of_method(given.get("method", "kl_shampoo")) if go_by_rule(module, given) else None


def go_by_rule(module: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether the rule holds for a module as it is now; groups that are added later go by what was found first."""
    if {"lr", "matrix_lr"} & given.keys() or given.get("convert_lr") == "keep":
        return False
    return given.get("convert_lr") == "rule" or not _mostly_frozen(module)


def of_method(name: str) -> Ratios | None:
    """What the rule says of a method; None where that is AdamW's learning rate."""
    method = METHODS.get(name)  # none is AdamW for all
    ratio = 1.0 if method is None else method.lr_over_adamw
    return None if ratio == 1 else Ratios(ratio, ratio / 2)


def of_group(ratios: Ratios | None, begins: float) -> dict[str, float]:
    """A group's options, where `begins` is the learning rate that its schedule begins from."""
    if ratios is None:
        return {}
    base = begins or 1.0  # of AdamW(lr=0), whose rate is set later, the ratio is all there is
    return {"base_lr": base, "matrix_lr": ratios.matrices * base, "adamw_lr": ratios.adamw * base}


def about(before: Optimizer, lr: float, module: nn.Module, given: Mapping[str, Any]) -> str | None:
    """One line on the rates, where the strategy's options do not say them themselves."""
    if {"lr", "matrix_lr"} & given.keys() or given.get("convert_lr") == "keep":
        return None
    kind = type(before).__name__
    if (ratios := by_rule(module, given)) is None:
        frozen = ", since most of the module is frozen" if _mostly_frozen(module) else ""
        return f"learning rates are {kind}'s own, {lr:g}{frozen}" + (
            ": convert_lr='rule' takes those for whole models" if frozen else ""
        )
    share = f"{given['adamw_lr']:g}" if "adamw_lr" in given else f"{ratios.adamw * lr:g}"
    return (
        f"learning rates by the rule for whole models: {ratios.matrices * lr:g} for matrices and {share} for what"
        f" AdamW serves, in proportion to {kind}'s {lr:g}, which groups and schedules keep; convert_lr='keep' trains"
        " all at that"
    )


def _mostly_frozen(module: nn.Module) -> bool:
    """Adapters, a new head on a backbone: AdamW's learning rate suits these as it is (docs/finetuning.md)."""
    sizes = [(shape_of(p).numel(), p.requires_grad) for p in module.parameters()]
    return 2 * sum(size for size, trained in sizes if trained) < sum(size for size, _ in sizes)
