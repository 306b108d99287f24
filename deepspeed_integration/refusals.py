"""What this version of DeepSpeed and KLShampoo cannot do together, told at initialisation."""

from __future__ import annotations

from typing import Any


def check_config(config: Any) -> None:
    """Raises ValueError for what the config asks for and cannot be had. `config` is DeepSpeed's DeepSpeedConfig."""
    zero = config.zero_config
    stage = int(zero.stage)
    fp16 = config.float16_config
    offload, offload_param = zero.offload_optimizer, zero.offload_param

    def refuse(what: str, remedy: str) -> None:
        raise ValueError(f"KLShampoo does not work with {what}: {remedy}")

    if stage == 0 and fp16.enabled and (fp16.loss_scale != 1):
        refuse(
            "fp16 at ZeRO stage 0 with loss scaling",
            'DeepSpeed divides by a scale it never applied; use stage 1 or more, bf16, or "loss_scale": 1',
        )
    if offload is not None and str(offload.device) in ("nvme", "OffloadDeviceEnum.nvme"):
        refuse("offload_optimizer to NVMe", 'use "device": "cpu"')
    if offload is not None and stage == 3 and offload.ratio < 1:
        refuse("offload_optimizer with ratio < 1", 'leave "ratio" at 1')
    if offload is not None and getattr(offload, "super_offload", False):
        refuse("SuperOffload", 'leave "super_offload" out')
    if offload_param is not None and str(offload_param.device) in ("nvme", "OffloadDeviceEnum.nvme"):
        refuse("offload_param to NVMe", 'use "device": "cpu"')
    if getattr(zero, "zenflow", None) is not None:
        refuse("ZenFlow", 'leave "zenflow" out')
    if stage in (1, 2) and zero.elastic_checkpoint:
        refuse("elastic_checkpoint", "use Universal Checkpoint for another world size")


def check_engine(engine: Any) -> None:
    if engine.pipeline_parallelism:
        raise ValueError("KLShampoo does not work with pipeline parallelism")
    if engine.has_moe_layers:
        raise ValueError("KLShampoo does not work with expert parallelism")
    if engine.autotp_size() > 1 or engine.mp_world_size > 1:
        raise ValueError("KLShampoo does not work with DeepSpeed's tensor parallelism")
