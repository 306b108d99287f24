"""A LightningModule, its data, and runs of a Trainer on ranks that are there already."""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import lightning_plugin  # noqa: F401 (registers the strategies)
from kl_dist import KLShampoo, modules
from tests.jobs import torchrun
from tests.models import Weights
from tests.sharded import SAMPLES, layers, loss_of, tokens_of, weights_of

STEPS = 12
LR, DECAY = 2e-3, 0.02
BY_RULE = {"lr": LR, "matrix_lr": 5 * LR, "adamw_lr": 2.5 * LR}
"""What AdamW's learning rate becomes where the strategy says nothing of it: lightning_plugin.rates."""
SMOOTH = {"betas": (0.9, 0.9), "adamw_betas": (0.9, 0.999)}
"""What AdamW's default betas become."""


class Rows(Dataset):
    """Sample i is a row of step i // SAMPLES, so that ranks which take turns have together what one process has."""

    def __init__(self, steps: int = STEPS) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps * SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return tokens_of(index // SAMPLES)[index % SAMPLES]


def rows(ranks: int, rank: int, steps: int = STEPS, share: int = 1) -> DataLoader:
    """A rank's batches in order (Lightning's own sampler shuffles); `share` of them make a step."""
    data = Rows(steps)
    sampler = DistributedSampler(data, ranks, rank, shuffle=False)
    return DataLoader(data, batch_size=SAMPLES // ranks // share, sampler=sampler)


class OfLayers:
    """The module, for either Lightning: `configure_optimizers` is what a test makes of it."""

    def __init__(
        self,
        configure: Callable[[Any], Any] | None = None,
        dtype: torch.dtype = torch.float64,
        attend: Callable[[Any, int], None] | None = None,
    ) -> None:
        super().__init__()
        self.net = layers(dtype)
        self.configure, self.attend = configure or adamw, attend

    def training_step(self: Any, batch: Tensor, batch_idx: int) -> Tensor:
        if self.attend is not None:
            self.attend(self, batch_idx)
        loss = loss_of(self.net, batch)
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self: Any, batch: Tensor, batch_idx: int) -> None:
        self.log("validation", loss_of(self.net, batch), sync_dist=True)

    def test_step(self: Any, batch: Tensor, batch_idx: int) -> None:
        self.log("test", loss_of(self.net, batch), sync_dist=True)

    def predict_step(self: Any, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch)

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def adamw(module: Any, **options: Any) -> AdamW:
    return AdamW(module.parameters(), **{"lr": LR, "weight_decay": DECAY, **options})


def pytorch(name: str = "lightning.pytorch") -> ModuleType:
    return import_module(name)


def module_class(pl: ModuleType) -> type:
    return type("Module", (OfLayers, pl.LightningModule), {})


def module(pl: ModuleType | None = None, *arguments: Any, **options: Any) -> Any:
    return module_class(pl or pytorch())(*arguments, **options)


def trainer(pl: ModuleType | None = None, strategy: Any = "kl_shampoo", **options: Any) -> Any:
    """A quiet Trainer over all ranks of the default process group."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "max_steps": STEPS, "max_epochs": 1}
    quiet |= {"accelerator": "cpu", "devices": dist.get_world_size() if dist.is_initialized() else 1}
    return (pl or pytorch()).Trainer(strategy=strategy, **{**quiet, **options})


@contextlib.contextmanager
def launched(group: dist.ProcessGroup) -> Iterator[None]:
    """The environment that torchrun makes, for a process that is in its process group already."""
    given = torchrun(group)
    os.environ.update(given)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*(num_workers|val_dataloader|tensorboard|litlogger).*")
            yield
    finally:
        for key in given:
            os.environ.pop(key, None)


def on_ranks(worlds: dict[int, Any], ranks: int, run: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    """`run` on a pool, or where it is one rank in this process, which keeps nothing of it."""
    if ranks > 1:
        return worlds[ranks].run(run, ranks, *arguments, timeout=120, **options)
    before = dict(os.environ)  # a Trainer leaves LOCAL_RANK behind
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return [run(dist.group.WORLD, *arguments, **options)]
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def fit(
    group: dist.ProcessGroup,
    strategy: Any = "kl_shampoo",
    dtype: torch.dtype = torch.float64,
    configure: Callable[[Any], Any] | None = None,
    namespace: str = "lightning.pytorch",
    **options: Any,
) -> Weights:
    """The weights after a fit, whole."""
    pl = pytorch(namespace)
    with launched(group):
        made = module(pl, configure, dtype)
        share = options.get("accumulate_grad_batches", 1)
        trainer(pl, made_strategy(strategy, pl), **options).fit(made, rows(group.size(), group.rank(), share=share))
        return weights_of(made.net)


def made_strategy(strategy: Any, pl: ModuleType) -> Any:
    """A strategy by its name, or (class, options) for the namespace."""
    if isinstance(strategy, str):
        return strategy
    kind, options = strategy
    namespace = "of_lightning" if pl.__name__ == "lightning.pytorch" else "of_pytorch_lightning"
    return getattr(import_module(f"lightning_plugin.namespaces.{namespace}"), kind)(**options)


@cache
def alone(
    dtype: torch.dtype = torch.float64,
    noise: float = 0.0,
    seed: int = 0,
    steps: int = STEPS,
    period: int = STEPS,
    start: Callable[[Any, KLShampoo], None] | None = None,
    change: Callable[[Any, int], None] = lambda optimizer, step: None,
    schedule: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Weights:
    """Plain kl_dist on one process, on the same samples and as AdamW is converted; noise on the gradients if asked.

    `start` may alter model and optimizer before the first step, `change` the gradients of a step.
    """
    model = layers(dtype)
    optimizer = plain(model, **{"matrices": modules.TABLE["Layers"], **options})
    if start is not None:
        start(model, optimizer)
    scheduler = None if schedule is None else schedule(optimizer)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, tokens_of(step % period)).backward()
        for parameter in model.parameters() if noise else ():
            factor = 1 + noise * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad.copy_(parameter.grad.double() * factor)
        change(optimizer, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return weights_of(model)


def plain(model: Any, **options: Any) -> KLShampoo:
    """What AdamW is converted to."""
    rates = BY_RULE if options.keys().isdisjoint(BY_RULE) else {}
    given = {**rates, "weight_decay": DECAY, "adamw_names": ("embedding.weight",), **SMOOTH, **options}
    return KLShampoo(model.named_parameters(), **given)


def train(model: Any, optimizer: Any, steps: int) -> None:
    """Any optimizer's first steps, on one process."""
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, tokens_of(step)).backward()
        optimizer.step()
