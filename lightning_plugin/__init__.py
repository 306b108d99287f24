"""KLShampoo for Lightning: after `import lightning_plugin`, `Trainer(strategy="kl_shampoo")` and Fabric's alike.

Where to look:

    registration.py   the strategies' names
    options.py        what a strategy is given for the optimizer
    conversion.py     KLShampoo out of the AdamW that a module configures; schedulers.py hands its schedules over
    trainer.py        what makes a Trainer's strategy train with it; ddp.py, fsdp2.py and deepspeed.py what each adds
    fabric.py         the same for Fabric
    restoring.py      optimizer state out of checkpoints
    sharding.py       what FSDP2 shards where a module does not say
    meeting.py        whether all ranks come to the same place; requeue.py Slurm's signal, answered by all together;
                      restarts.py a start after the first by torchrun --max-restarts
    callbacks.py      a monitor and a summary; unwrapping.py finds the optimizer for them
    namespaces/       the classes, for lightning and for pytorch_lightning: all else is mixins that know neither

docs/lightning.md is for users.
"""

from lightning_plugin.registration import installed, register

register()

_FIRST = next((classes for classes, _, _ in installed()), None)
if _FIRST is None:
    raise ImportError("lightning_plugin needs Lightning: pip install 'kl-shampoo[lightning]'")

KLShampooDeepSpeedStrategy = _FIRST.KLShampooDeepSpeedStrategy
KLShampooFSDP2Strategy = _FIRST.KLShampooFSDP2Strategy
KLShampooFabricFSDP2Strategy = _FIRST.KLShampooFabricFSDP2Strategy
KLShampooFabricStrategy = _FIRST.KLShampooFabricStrategy
KLShampooMonitor = _FIRST.KLShampooMonitor
KLShampooStrategy = _FIRST.KLShampooStrategy
PartitionSummary = _FIRST.PartitionSummary

__all__ = [
    "KLShampooDeepSpeedStrategy",
    "KLShampooFSDP2Strategy",
    "KLShampooFabricFSDP2Strategy",
    "KLShampooFabricStrategy",
    "KLShampooMonitor",
    "KLShampooStrategy",
    "PartitionSummary",
]
