"""KLShampoo for Lightning: after `import lightning_plugin`, `Trainer(strategy="kl_shampoo")` and Fabric's alike.

Where to look: `conversion` makes KLShampoo of the AdamW that a module configures, `trainer`, `model_parallel` and
`fabric` are what the strategies add to Lightning's own, `namespaces` has the classes, `registration` their names.
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
