"""The three public methods of DeepSpeed's engine that are wrapped, each with its reason."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine

from deepspeed_integration import checkpoint
from deepspeed_integration.optimizer import TYPES, DeepSpeedOptimizer
from deepspeed_integration.refusals import check_client, check_config, check_engine, check_model

MARK = "_kl_dist_wraps"


def wrap() -> None:
    """Idempotent.

    Raises:
        RuntimeError: this version of DeepSpeed is made in another way.
    """
    takes = inspect.signature(DeepSpeedEngine.__init__).parameters
    if not {"optimizer", "config_class"} <= takes.keys():
        raise RuntimeError(
            f"deepspeed_integration does not know how DeepSpeed {deepspeed.__version__} makes its engine: use 0.19.8"
        )
    for name, make in (("__init__", _init), ("save_checkpoint", _save), ("load_checkpoint", _load)):
        original = getattr(DeepSpeedEngine, name)
        if not hasattr(original, MARK):
            wrapper = functools.wraps(original)(make(original))
            setattr(wrapper, MARK, original)
            setattr(DeepSpeedEngine, name, wrapper)


def ours(engine: DeepSpeedEngine) -> DeepSpeedOptimizer | None:
    optimizer = getattr(engine, "basic_optimizer", None)
    return optimizer if isinstance(optimizer, DeepSpeedOptimizer) else None


def _init(original: Any) -> Any:
    """Reason: names, modules and partitions are known when the engine is whole; refusals come before it is."""

    def init(self: DeepSpeedEngine, *args: Any, **kwargs: Any) -> None:
        given: dict[str, Any] = inspect.signature(original).bind(self, *args, **kwargs).arguments
        config: Any = given.get("config_class")
        client = given.get("optimizer")
        check_client(client)
        if isinstance(client, DeepSpeedOptimizer) or getattr(config, "optimizer_name", None) in TYPES:
            check_config(config)  # before DeepSpeed begins: what it sets for all engines to come would stay
            check_model(given["model"])
            config.zero_force_ds_cpu_optimizer = False  # offload refuses what is handed over but is not its own Adam
        original(self, *args, **kwargs)
        check_client(getattr(self, "basic_optimizer", None))  # which a callable has made
        optimizer = ours(self)
        if optimizer is not None:
            check_config(config)  # as above
            check_model(self.module)
            check_engine(self)
            optimizer.attach(self)

    return init


def _save(original: Any) -> Any:
    """Reason: block state lies with its owners, and is saved by all ranks into a folder of its own."""

    def save_checkpoint(self: DeepSpeedEngine, save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        optimizer = ours(self)
        if optimizer is None or not save_dir:
            return original(self, save_dir, tag, *args, **kwargs)
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        given = inspect.signature(original).bind(self, save_dir, tag, *args, **kwargs)
        optimizer.save = checkpoint.save(optimizer, checkpoint.folder(save_dir, tag))
        given.arguments["client_state"] = {
            **(given.arguments.get("client_state") or {}),
            checkpoint.SAVE: optimizer.save,
        }
        return original(*given.args, **given.kwargs)

    return save_checkpoint


def _load(original: Any) -> Any:
    """Reason: as for saving; and DeepSpeed's universal load of stage 3 gives all groups the options of the first."""

    def load_checkpoint(self: DeepSpeedEngine, load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        optimizer = ours(self)
        given = inspect.signature(original).bind(self, load_dir, tag, *args, **kwargs)
        given.apply_defaults()
        wanted = given.arguments["load_optimizer_states"] and not given.arguments["load_module_only"]
        if optimizer is None:
            return original(self, load_dir, tag, *args, **kwargs)
        if not wanted:
            found = original(self, load_dir, tag, *args, **kwargs)
            if not self.zero_optimization() and hasattr(self.optimizer, "refresh_fp32_params"):
                self.optimizer.refresh_fp32_params()  # else the next step puts the old weights back
            return found
        tag = checkpoint.newest(load_dir, self.load_universal_checkpoint()) if tag is None else tag
        if tag is None:
            return original(self, load_dir, tag, *args, **kwargs)
        groups = checkpoint.load(optimizer, checkpoint.folder(load_dir, tag))
        with optimizer.loading():
            found = original(self, load_dir, tag, *args, **kwargs)
        optimizer.take_options(groups)
        if isinstance(found[1], dict):
            found[1].pop(checkpoint.SAVE, None)
        return found

    return load_checkpoint
