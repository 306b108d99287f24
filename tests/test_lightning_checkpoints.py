"""Checkpoints under our strategies: exact at the same number of devices, within rounding at another, or refused."""

import shutil
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from kl_dist import KLShampoo, load_full_state_dict
from tests.corruptions import estrange
from tests.lightning_runs import (
    DECAY,
    LR,
    adamw,
    alone,
    launched,
    made_strategy,
    module,
    on_ranks,
    plain,
    pytorch,
    rows,
    train,
    trainer,
)
from tests.models import deviation, same_bits
from tests.noise import NOISE, float32_limit
from tests.products import product
from tests.sharded import weights_of

HALF = 6  # steps of an epoch; a run is two epochs, and is saved after the first
DOUBLE = 1e-9
LIMITS = {torch.float64: lambda: DOUBLE, torch.float32: partial(float32_limit, "lightning checkpoints")}
FORMATS: dict[str, Any] = {
    "ddp": "kl_shampoo",
    "owners": ("KLShampooStrategy", {"reduce_to_owners": True}),
    "fsdp2 in one file": ("KLShampooFSDP2Strategy", {"save_distributed_checkpoint": False}),
    "fsdp2 distributed": "kl_shampoo_fsdp2",
}
SAME = [(name, name) for name in FORMATS if name != "owners"]
ACROSS = [("ddp", "fsdp2 in one file"), ("fsdp2 in one file", "ddp")]

reference = partial(alone, steps=2 * HALF, period=HALF)

YARDSTICKS = {"lightning checkpoints": lambda seed: reference(torch.float32, NOISE if seed else 0.0, seed)}


def with_option(strategy: Any, **options: Any) -> Any:
    """A strategy of FORMATS with more options."""
    kind, given = (strategy, {}) if isinstance(strategy, str) else strategy
    names = {"kl_shampoo": "KLShampooStrategy", "kl_shampoo_fsdp2": "KLShampooFSDP2Strategy"}
    return (names.get(kind, kind), {**given, **options})


def half(group, strategy: Any, path: str, dtype: torch.dtype = torch.float64):
    """The first epoch, saved at its end."""
    pl = pytorch()
    with launched(group):
        ran = trainer(pl, made_strategy(strategy, pl), max_steps=-1)
        ran.fit(module(pl, dtype=dtype), rows(group.size(), group.rank(), HALF))
        ran.save_checkpoint(path)


def rest(group, strategy: Any, path: str | None, dtype: torch.dtype = torch.float64):
    """The second epoch, or without a checkpoint both."""
    pl = pytorch()
    with launched(group):
        made = module(pl, dtype=dtype)
        ran = trainer(pl, made_strategy(strategy, pl), max_steps=-1, max_epochs=2)
        ran.fit(made, rows(group.size(), group.rank(), HALF), ckpt_path=path)
        assert ran.global_step == 2 * HALF
        return weights_of(made.net)


@pytest.fixture(scope="module")
def saved(worlds, tmp_path_factory):
    """(format, ranks, dtype) -> path of the checkpoint, made once."""

    @cache
    def made(name: str, ranks: int = 2, dtype: torch.dtype = torch.float64) -> str:
        path = str(tmp_path_factory.mktemp("half") / "half.ckpt")
        on_ranks(worlds, ranks, half, FORMATS[name], path, dtype)
        return path

    return made


DTYPES = [torch.float32, pytest.param(torch.float64, marks=pytest.mark.full)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_resumed_run_is_to_the_bit_the_undisturbed_one(worlds, saved, name, dtype):
    resumed = on_ranks(worlds, 2, rest, FORMATS[name], saved(name, 2, dtype), dtype)
    assert same_bits(resumed[0], on_ranks(worlds, 2, rest, FORMATS[name], None, dtype)[0])


@product(**{"before,after": SAME + ACROSS, "saving,loading": [(4, 2), (2, 1), (1, 2)], "dtype": LIMITS})
def test_another_number_of_devices_or_strategy_resumes_within_rounding(
    worlds, saved, before, after, saving, loading, dtype
):
    found = on_ranks(worlds, loading, rest, FORMATS[after], saved(before, saving, dtype), dtype)
    assert deviation(found[0], reference(dtype)) <= LIMITS[dtype]()


# -- what is refused, and the ways out ---------------------------------------------------------------------------------


def half_with_adamw(group, strategy: Any, path: str):
    """An epoch of Lightning's own strategy and AdamW."""
    pl = pytorch()
    with launched(group):
        made = module(pl)
        if strategy == "ddp":
            ran = trainer(pl, strategy, max_steps=-1)
        else:
            made.configure_model = partial(shard_all, made)
            options = {"data_parallel_size": 2, "tensor_parallel_size": 1, **strategy[1]}
            ran = trainer(pl, pl.strategies.ModelParallelStrategy(**options), max_steps=-1)
        ran.fit(made, rows(2, group.rank(), HALF))
        ran.save_checkpoint(path)


def shard_all(made: Any) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not isinstance(made.net, FSDPModule):
        fully_shard(made.net, mesh=made.device_mesh["data_parallel"])


def test_a_strangers_folder_is_refused_and_nothing_of_it_is_run(worlds, saved, tmp_path):
    folder, proof = tmp_path / "half.ckpt", tmp_path / "run"
    shutil.copytree(saved("fsdp2 distributed", 2, torch.float32), folder)
    estrange(folder, proof)
    errors = worlds[2].run_expecting_errors(rest, 2, FORMATS["fsdp2 distributed"], str(folder), torch.float32)
    assert all("posix.mkdir, which torch.distributed.checkpoint does not write" in str(error) for error in errors)
    assert not proof.exists()


OF_ADAMW = {
    "ddp": "ddp",
    "fsdp2 in one file": ("ModelParallelStrategy", {"save_distributed_checkpoint": False}),
    "fsdp2 distributed": ("ModelParallelStrategy", {}),
}


def after_adamw(model: Any, optimizer: KLShampoo) -> None:
    train(model, AdamW(model.parameters(), lr=LR, weight_decay=DECAY), HALF)


@pytest.mark.parametrize("name", OF_ADAMW)
def test_adamws_checkpoint_is_refused_with_the_way_out_which_works(worlds, name, tmp_path):
    path = str(tmp_path / "adamw.ckpt")
    worlds[2].run(half_with_adamw, 2, OF_ADAMW[name], path)
    errors = worlds[2].run_expecting_errors(rest, 2, FORMATS[name], path)
    assert all("optimizer_checkpoint='ignore'" in str(error) for error in errors)
    anew = with_option(FORMATS[name], optimizer_checkpoint="ignore")
    weights = worlds[2].run(rest, 2, anew, path)
    assert deviation(weights[0], alone(steps=HALF, start=after_adamw)) <= DOUBLE


def load_with_adamw(group, path: str):
    pl = pytorch()
    with launched(group):
        ran = trainer(pl, "ddp", max_steps=-1, max_epochs=2)
        ran.fit(module(pl), rows(2, group.rank(), HALF), ckpt_path=path)


def test_adamw_refuses_our_checkpoint_with_words_of_ours(worlds, saved):
    path = saved("ddp")
    errors = worlds[2].run_expecting_errors(load_with_adamw, 2, path)
    assert all("strategy='kl_shampoo'" in str(error) for error in errors)
    content = torch.load(path, weights_only=True)
    kinds = {type(value) for state in content["optimizer_states"][0]["state"].values() for value in state.values()}
    assert kinds == {torch.Tensor, bytes}


@pytest.mark.parametrize("name", ["ddp", "fsdp2 distributed"])
def test_another_methods_checkpoint_is_refused(worlds, saved, name):
    soap = with_option(FORMATS[name], method="soap")
    errors = worlds[2].run_expecting_errors(rest, 2, soap, saved(name))
    assert all("optimizer_checkpoint='ignore'" in str(error) for error in errors)
    says = ["kl_dist.checkpoint.reading.load" in str(error) for error in errors]  # of folders
    assert says == [name == "fsdp2 distributed"] * 2


def after_half(model: Any, optimizer: KLShampoo) -> None:
    train(model, plain(model), HALF)


def with_what_fits(model: Any, optimizer: KLShampoo) -> None:
    """The first half, and of its state what `optimizer` has a place for."""
    before = plain(model)
    train(model, before, HALF)
    before.consolidate_state_dict()
    load_full_state_dict(optimizer, before.state_dict(), strict=False)


@pytest.mark.parametrize("name", ["ddp", "fsdp2 in one file"])
def test_partial_loads_what_fits(worlds, saved, name):
    """Another blocking for the long matrices alone: the others go on."""
    other = {"max_preconditioner_dim": 20}
    strategy = with_option(FORMATS[name], optimizer_checkpoint="partial", **other)
    found = worlds[2].run(rest, 2, strategy, saved(name))[0]
    expected = alone(steps=HALF, start=with_what_fits, **other)
    assert deviation(expected, alone(steps=HALF, start=after_half, **other)) > 1e-3, "something must fit"
    assert deviation(found, expected) <= DOUBLE


def weights_alone(group, path: str):
    pl = pytorch()
    with launched(group):
        ran = trainer(pl, max_steps=-1)
        ran.fit(module(pl, adamw), rows(2, group.rank(), HALF))
        ran.save_checkpoint(path, weights_only=True)


def test_weights_alone_are_refused_but_for_ignore(worlds, tmp_path):
    path = str(tmp_path / "weights.ckpt")
    worlds[2].run(weights_alone, 2, path)
    errors = worlds[2].run_expecting_errors(rest, 2, "kl_shampoo", path)
    assert all("only the model" in str(error) for error in errors)
    anew = ("KLShampooStrategy", {"optimizer_checkpoint": "ignore"})
    assert deviation(worlds[2].run(rest, 2, anew, path)[0], alone(steps=HALF, start=after_half)) <= DOUBLE
