"""DeepSpeed under a Trainer: what Lightning's DeepSpeedStrategy needs to train with KLShampoo at ZeRO 0 to 3.

DeepSpeed lays parameters out anew and steps, clips and saves by itself. So what is made of the module's AdamW is the
optimizer that DeepSpeed constructs from a config's `"optimizer": {"type": "KLShampoo"}`, and all else is left to it.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import torch
from torch.optim import Optimizer

from kl_dist import METHODS
from lightning_plugin.conversion import announcement, convert
from lightning_plugin.unwrapping import is_missing

GROUP = "kl_shampoo.deepspeed"
"""Entry points whose loading makes KLShampoo known to DeepSpeed."""


def optimizer_of_deepspeed() -> type[Optimizer]:
    """KLShampoo where DeepSpeed looks for optimizers by name: in torch.optim.

    Raises:
        ImportError: nothing has put it there, and nothing that is installed can.
    """
    if not hasattr(torch.optim, "KLShampoo"):
        for integration in entry_points(group=GROUP):
            integration.load()
    if not hasattr(torch.optim, "KLShampoo"):
        raise ImportError(
            "DeepSpeed does not know KLShampoo: pip install 'kl-shampoo[deepspeed]', or import deepspeed_integration"
        )
    return torch.optim.KLShampoo


class UnderDeepSpeed:
    """Mixin of a Trainer's strategy: converts what DeepSpeed is handed.

    `optimizer_checkpoint` may be "strict" or "ignore" here.

    Raises:
        ValueError: it is "partial"; or the config has another optimizer, or one beside options of the strategy.
        ImportError: DeepSpeed or its integration is not installed.
    """

    optimizer_options: dict[str, Any]
    optimizer_checkpoint: str
    config: dict[str, Any] | None

    def __init__(self: Any, **options: Any) -> None:
        super().__init__(**options)
        if self.optimizer_checkpoint == "partial":
            raise ValueError("optimizer_checkpoint='partial' needs a checkpoint in one file, which DeepSpeed has not")
        self._check_entry(self.config.get("optimizer"))
        self.config = {"zero_allow_untested_optimizer": True, **self.config}  # Lightning asks for it at stage 3
        optimizer_of_deepspeed()

    def _check_entry(self, entry: dict[str, Any] | None) -> None:
        """A config's own entry goes before `configure_optimizers`, so it must be ours and the only one."""
        if entry is None:
            return
        asked, given = str(entry.get("type")), dict(self.optimizer_options)
        methods = [given.pop("method")] if "method" in given else METHODS
        if asked.lower().replace("_", "") not in [METHODS[method].called.replace("_", "") for method in methods]:
            raise ValueError(
                f"the DeepSpeed config asks for {asked!r}, and the strategy trains with KLShampoo: leave the config's"
                ' "optimizer" out, and AdamW of configure_optimizers is converted, or have it say "type": "KLShampoo"'
            )
        if given:
            raise ValueError(
                f"the DeepSpeed config has an optimizer, and the strategy has {', '.join(given)} for it: give these to"
                " one of the two"
            )

    def _init_optimizers(self: Any) -> tuple[Any, Any]:
        optimizer, schedule = super()._init_optimizers()  # type: ignore[misc]
        if is_missing(optimizer):
            raise ValueError(
                "configure_optimizers returned None, and the DeepSpeed config has no optimizer: return"
                ' torch.optim.AdamW, or give the strategy a config with {"optimizer": {"type": "KLShampoo"}}'
            )
        self._check_schedules([schedule] if schedule else [])
        schedulers = [schedule.scheduler] if schedule else []
        kind, self._converted_from = optimizer_of_deepspeed(), optimizer
        return convert(optimizer, self.lightning_module, self.optimizer_options, schedulers, kind), schedule

    def _setup_model_and_optimizer(self: Any, model: Any, optimizer: Any, *scheduler: Any) -> tuple[Any, Any]:
        engine, stepped = super()._setup_model_and_optimizer(model, optimizer, *scheduler)  # type: ignore[misc]
        before = self._converted_from if optimizer is not None else None
        # it can tell now what goes where
        about = announcement(before, engine.basic_optimizer, self.lightning_module, self.optimizer_options)
        type(self)._say(about)
        return engine, stepped

    def load_checkpoint(self: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        engine = self.deepspeed_engine
        if self.optimizer_checkpoint == "ignore":
            load = engine.load_checkpoint
            engine.load_checkpoint = lambda *given, **more: load(*given, **{**more, "load_optimizer_states": False})
        try:
            return super().load_checkpoint(*arguments, **options)  # type: ignore[misc]
        finally:
            vars(engine).pop("load_checkpoint", None)
