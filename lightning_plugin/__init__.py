"""KLShampoo for Lightning: after `import lightning_plugin`, `Trainer(strategy="kl_shampoo")` and Fabric's alike.

Where to look:

    registration.py   the strategies' names
    options.py        what a strategy is given for the optimizer
    conversion.py     KLShampoo out of the AdamW that a module configures; schedulers.py hands its schedules over,
                      rates.py says which learning rates become of AdamW's
    trainer.py        what makes a Trainer's strategy train with it; ddp.py, fsdp2.py and deepspeed.py what each adds
    fabric.py         the same for Fabric
    restoring.py      optimizer state out of checkpoints
    sharding.py       what FSDP2 shards where a module does not say; together.py who may call it, and when
    meeting.py        whether all ranks come to the same place; requeue.py Slurm's signal, answered by all together;
                      restarts.py a start after the first by torchrun --max-restarts
    callbacks.py      a monitor, a summary, a watch over the ranks; unwrapping.py finds the optimizer for them
    namespaces/       the classes, for lightning and for pytorch_lightning: all else is mixins that know neither

docs/lightning.md is for users.
"""

from typing import Any

from lightning_plugin.registration import classes, register

register()

__all__ = [
    "KLShampooDeepSpeedStrategy",
    "KLShampooFSDP2Strategy",
    "KLShampooFabricFSDP2Strategy",
    "KLShampooFabricStrategy",
    "KLShampooMonitor",
    "KLShampooStrategy",
    "PartitionSummary",
    "Patience",
]


def __getattr__(name: str) -> Any:
    """The classes above, for the Lightning that is imported."""
    if name in __all__:
        return getattr(classes(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
