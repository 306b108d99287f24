"""What this version of DeepSpeed and KLShampoo cannot do together, told at initialisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepspeed.moe.layer import MoE
from deepspeed.runtime.pipe.module import PipelineModule

from kl_dist import KLShampoo

ALONE = "use data parallelism alone"


def check_client(optimizer: Any) -> None:
    """Raises TypeError for kl_dist's own optimizer, which steps parameters as PyTorch lays them out."""
    if isinstance(optimizer, KLShampoo) or (isinstance(optimizer, type) and issubclass(optimizer, KLShampoo)):
        raise TypeError(
            "DeepSpeed lays parameters out anew, so kl_dist.KLShampoo cannot step them: hand over"
            " deepspeed_integration.KLShampoo, which takes the same groups and options"
        )


def check_config(config: Any) -> None:
    """Raises ValueError for the first thing that a DeepSpeedConfig asks for and cannot have, with the way out."""
    for what, remedy in _refused(config):
        raise ValueError(f"KLShampoo does not work with {what}: {remedy}")


def _refused(config: Any) -> Iterator[tuple[str, str]]:
    zero, fp16 = config.zero_config, config.float16_config
    stage = int(zero.stage)
    if stage == 0 and fp16.enabled and fp16.loss_scale != 1:
        remedy = 'DeepSpeed divides by a scale that it never applied; use ZeRO stage 1, bf16, or "loss_scale": 1'
        yield "fp16 at ZeRO stage 0 with loss scaling", remedy
    for name in ("offload_optimizer", "offload_param"):
        offload = getattr(zero, name)
        if offload is not None and str(getattr(offload.device, "value", offload.device)) == "nvme":
            yield f"{name} to NVMe", 'use "device": "cpu"'
    offload = zero.offload_optimizer
    if offload is not None and stage == 3 and offload.ratio < 1:
        yield "offload_optimizer with a ratio below 1", 'leave "ratio" out'
    if offload is not None and getattr(offload, "super_offload", False):
        yield "SuperOffload", 'leave "super_offload" out'
    if getattr(zero, "zenflow", None) is not None:
        yield "ZenFlow", 'leave "zenflow" out'
    if stage in (1, 2) and zero.elastic_checkpoint:
        yield "elastic_checkpoint", "another world size is for Universal Checkpoint: deepspeed_integration.universal"
    autocast = str(config.torch_autocast_dtype).removeprefix("torch.")
    if stage and config.torch_autocast_enabled and autocast == "float16":
        yield "torch_autocast in float16 at ZeRO 1 to 3", "DeepSpeed clips scaled gradients there; use bfloat16"
    for low in (config.bfloat16_config, fp16):
        for name in ("bf16_master_weights_and_grads", "fp16_master_weights_and_grads"):
            if getattr(low, name, False):
                yield name, "its updates need weights in float32; leave it out"
    if config.tensor_parallel_config.autotp_size > 1:
        yield "DeepSpeed's tensor parallelism", ALONE


def check_model(model: Any) -> None:
    """Raises ValueError for a model whose parameters DeepSpeed would not treat alike on all ranks."""
    if isinstance(model, PipelineModule):
        raise ValueError(f"KLShampoo does not work with DeepSpeed's pipeline parallelism: {ALONE}")
    if any(isinstance(part, MoE) for part in model.modules()):
        raise ValueError(f"KLShampoo does not work with DeepSpeed's expert parallelism: {ALONE}")


def check_engine(engine: Any) -> None:
    """Raises ValueError for what shows in the engine alone."""
    if engine.mp_world_size > 1:
        raise ValueError(f"KLShampoo does not work with DeepSpeed's model parallelism: {ALONE}")
