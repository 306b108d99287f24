"""Modules that are compiled, or have layers exchanged before a fit, train under our strategies as they are."""

import pytest
import torch
from torch import nn

from tests.lightning_runs import alone, launched, module, pytorch, rows, trainer
from tests.models import deviation
from tests.sharded import weights_of

DOUBLE = 1e-9
FEW = 4  # steps, of what is slow to compile


def compiled(group, strategy: str, wholly: bool):
    pl = pytorch()
    with launched(group):
        made = module(pl)
        made.log = lambda *_, **__: None  # Lightning's cannot be compiled here, under its own strategies either
        ran = trainer(pl, strategy, max_steps=FEW)
        if wholly:
            ran.fit(torch.compile(made, backend="aot_eager"), rows(2, group.rank()))
        else:
            made.net.compile(backend="aot_eager")
            ran.fit(made, rows(2, group.rank()))
        return weights_of(made.net)


@pytest.mark.parametrize(
    ("strategy", "wholly"),
    [("kl_shampoo", True), ("kl_shampoo_fsdp2", False), pytest.param("kl_shampoo", False, marks=pytest.mark.full)],
)
def test_a_compiled_module_trains_alike(worlds, strategy, wholly):
    found = worlds[2].run(compiled, 2, strategy, wholly, timeout=180)
    assert deviation(found[0], alone(steps=FEW)) <= DOUBLE


class Synchronized(nn.BatchNorm1d):
    """Stands for torch's SyncBatchNorm, which DDP refuses on CPUs: a layer of another class with the same weights."""


def normed(group):
    """The kinds of a norm during a fit and after it, and whether its weights moved, with layers synchronised."""
    pl, kinds = pytorch(), []
    made = module(pl, attend=lambda m, _: kinds.append(type(m.net.extra).__name__))

    def apply(self, model):
        model.net.extra = put(Synchronized(12).double(), model.net.extra)
        return model

    def revert(self, model):
        model.net.extra = put(nn.BatchNorm1d(12).double(), model.net.extra)
        return model

    plugin = type("Plugin", (pl.plugins.layer_sync.LayerSync,), {"apply": apply, "revert": revert})()
    made.net.extra = nn.BatchNorm1d(12).double()
    made.net.mix = nn.Sequential(made.net.mix, made.net.extra)
    made.net.extra.register_forward_hook(lambda *_: None)
    with launched(group):
        before = made.net.extra.weight.clone()
        trainer(pl, plugins=[plugin], max_steps=2).fit(made, rows(2, group.rank()))
        return kinds, type(made.net.extra).__name__, not torch.equal(before, made.net.extra.weight)


def put(layer: nn.Module, of: nn.Module) -> nn.Module:
    layer.weight, layer.bias = of.weight, of.bias
    return layer


def test_synchronised_layers_are_put_in_before_the_optimizer_and_taken_out_at_the_end(worlds):
    during, after, moved = worlds[2].run(normed, 2)[0]
    assert set(during) == {"Synchronized"} and after == "BatchNorm1d" and moved
