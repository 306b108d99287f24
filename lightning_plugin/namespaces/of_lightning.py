"""Strategies and callbacks for lightning.pytorch and lightning.fabric."""

from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallelStrategy
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_plugin.callbacks import HasPatience, MonitorsKLShampoo, SummarizesPartition
from lightning_plugin.ddp import UnderDDP
from lightning_plugin.deepspeed import UnderDeepSpeed
from lightning_plugin.fabric import FabricShards, FabricTrainsWithKLShampoo
from lightning_plugin.fsdp2 import SpreadsOverAllRanks, UnderFSDP2
from lightning_plugin.options import TakesOptimizerOptions
from lightning_plugin.registration import add
from lightning_plugin.requeue import RequeuesBetweenBatches
from lightning_plugin.restarts import BeginsAnew
from lightning_plugin.trainer import TrainsWithKLShampoo


class KLShampooStrategy(
    UnderDDP, TrainsWithKLShampoo, RequeuesBetweenBatches, BeginsAnew, TakesOptimizerOptions, DDPStrategy
):
    """DDP, trained with KLShampoo: `Trainer(strategy="kl_shampoo")`."""

    strategy_name = "kl_shampoo"
    _say = staticmethod(rank_zero_info)
    _parent = DDPStrategy


class KLShampooFSDP2Strategy(
    UnderFSDP2,
    TrainsWithKLShampoo,
    SpreadsOverAllRanks,
    RequeuesBetweenBatches,
    BeginsAnew,
    TakesOptimizerOptions,
    ModelParallelStrategy,
):
    """FSDP2, trained with KLShampoo: `Trainer(strategy="kl_shampoo_fsdp2")`."""

    strategy_name = "kl_shampoo_fsdp2"
    _say = staticmethod(rank_zero_info)
    _is_overridden = staticmethod(is_overridden)
    _parent = ModelParallelStrategy


class KLShampooDeepSpeedStrategy(
    UnderDeepSpeed, TrainsWithKLShampoo, RequeuesBetweenBatches, BeginsAnew, TakesOptimizerOptions, DeepSpeedStrategy
):
    """DeepSpeed, trained with KLShampoo: `Trainer(strategy="kl_shampoo_deepspeed_stage_2")`."""

    strategy_name = "kl_shampoo_deepspeed"
    _say = staticmethod(rank_zero_info)
    _parent = DeepSpeedStrategy


class KLShampooFabricStrategy(FabricTrainsWithKLShampoo, BeginsAnew, TakesOptimizerOptions, FabricDDPStrategy):
    """DDP, trained with KLShampoo: `Fabric(strategy="kl_shampoo")`."""

    strategy_name = "kl_shampoo"
    _say = staticmethod(rank_zero_info)
    _parent = FabricDDPStrategy


class KLShampooFabricFSDP2Strategy(
    FabricTrainsWithKLShampoo,
    FabricShards,
    SpreadsOverAllRanks,
    BeginsAnew,
    TakesOptimizerOptions,
    FabricModelParallelStrategy,
):
    """FSDP2, trained with KLShampoo: `Fabric(strategy="kl_shampoo_fsdp2")`."""

    strategy_name = "kl_shampoo_fsdp2"
    _say = staticmethod(rank_zero_info)
    _parent = FabricModelParallelStrategy


class KLShampooMonitor(MonitorsKLShampoo, Callback):
    """Logs how KLShampoo does."""


class Patience(HasPatience, Callback):
    """Ends a fit when a rank has stopped."""


class PartitionSummary(SummarizesPartition, Callback):
    """Prints who owns what."""

    _say = staticmethod(rank_zero_info)


add("of_lightning")
