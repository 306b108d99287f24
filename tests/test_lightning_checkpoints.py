"""Checkpoints under our strategies: exact at the same number of devices, within rounding at another, or refused."""

from functools import cache, partial
from typing import Any

import pytest
import torch

from tests.lightning_runs import adamw, alone, launched, made_strategy, module, pytorch, rows, trainer
from tests.models import deviation, same_bits
from tests.sharded import weights_of

HALF = 10  # steps of an epoch; a run is two epochs, and is saved after the first
DOUBLE = 1e-9
FORMATS: dict[str, Any] = {
    "ddp": "kl_shampoo",
    "owners": ("KLShampooStrategy", {"reduce_to_owners": True}),
    "fsdp2 in one file": ("KLShampooFSDP2Strategy", {"save_distributed_checkpoint": False}),
    "fsdp2 distributed": "kl_shampoo_fsdp2",
}

reference = cache(partial(alone, steps=2 * HALF, period=HALF))


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


@pytest.mark.parametrize("name", FORMATS)
def test_a_resumed_run_is_to_the_bit_the_undisturbed_one(worlds, name, tmp_path):
    path = str(tmp_path / "half.ckpt")
    for dtype in (torch.float64, torch.float32):
        worlds[2].run(half, 2, FORMATS[name], path, dtype)
        resumed = worlds[2].run(rest, 2, FORMATS[name], path, dtype)
        assert same_bits(resumed[0], worlds[2].run(rest, 2, FORMATS[name], None, dtype)[0])


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2)])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "owners"])
def test_another_number_of_devices_resumes_within_rounding(worlds, name, before, after, tmp_path):
    path = str(tmp_path / "half.ckpt")
    worlds[before].run(half, before, FORMATS[name], path)
    found = worlds[after].run(rest, after, FORMATS[name], path)
    assert deviation(found[0], reference()) <= DOUBLE


@pytest.mark.parametrize(("before", "after"), [("ddp", "fsdp2 in one file"), ("fsdp2 in one file", "ddp")])
def test_a_checkpoint_in_one_file_goes_from_ddp_to_fsdp2_and_back(worlds, before, after, tmp_path):
    path = str(tmp_path / "half.ckpt")
    worlds[2].run(half, 2, FORMATS[before], path)
    assert deviation(worlds[2].run(rest, 2, FORMATS[after], path)[0], reference()) <= DOUBLE


@cache
def float32_limit() -> float:
    """Three times what relative noise of 1e-7 on the gradients does to the run."""
    expected = reference(torch.float32)
    return 3 * max(deviation(reference(torch.float32, 1e-7, seed), expected) for seed in range(1, 6))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2)])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "owners"])
def test_in_float32_another_number_of_devices_is_no_more_than_noise(worlds, name, before, after, tmp_path):
    path = str(tmp_path / "half.ckpt")
    worlds[before].run(half, before, FORMATS[name], path, torch.float32)
    found = worlds[after].run(rest, after, FORMATS[name], path, torch.float32)[0]
    assert deviation(found, reference(torch.float32)) <= float32_limit()


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


OF_ADAMW = {
    "ddp": "ddp",
    "fsdp2 in one file": ("ModelParallelStrategy", {"save_distributed_checkpoint": False}),
    "fsdp2 distributed": ("ModelParallelStrategy", {}),
}


@pytest.mark.parametrize("name", OF_ADAMW)
def test_adamws_checkpoint_is_refused_with_the_way_out_which_works(worlds, name, tmp_path):
    path = str(tmp_path / "adamw.ckpt")
    worlds[2].run(half_with_adamw, 2, OF_ADAMW[name], path)
    errors = worlds[2].run_expecting_errors(rest, 2, FORMATS[name], path)
    assert all("optimizer_checkpoint='ignore'" in str(error) for error in errors)
    anew = with_option(FORMATS[name], optimizer_checkpoint="ignore")
    weights = worlds[2].run(rest, 2, anew, path)
    assert same_bits(*weights) and all(x.isfinite().all() for x in weights[0].values())


def load_with_adamw(group, path: str):
    pl = pytorch()
    with launched(group):
        ran = trainer(pl, "ddp", max_steps=-1, max_epochs=2)
        ran.fit(module(pl), rows(2, group.rank(), HALF), ckpt_path=path)


def test_adamw_refuses_our_checkpoint_with_words_of_ours(worlds, tmp_path):
    path = str(tmp_path / "ours.ckpt")
    worlds[2].run(half, 2, "kl_shampoo", path)
    errors = worlds[2].run_expecting_errors(load_with_adamw, 2, path)
    assert all("strategy='kl_shampoo'" in str(error) for error in errors)
    saved = torch.load(path, weights_only=True)
    kinds = {type(value) for state in saved["optimizer_states"][0]["state"].values() for value in state.values()}
    assert kinds == {torch.Tensor, bytes}


@pytest.mark.parametrize("name", ["ddp", "fsdp2 distributed"])
def test_another_methods_checkpoint_is_refused(worlds, name, tmp_path):
    path = str(tmp_path / "soap.ckpt")
    worlds[2].run(half, 2, with_option(FORMATS[name], method="soap"), path)
    errors = worlds[2].run_expecting_errors(rest, 2, FORMATS[name], path)
    assert all("optimizer_checkpoint='ignore'" in str(error) for error in errors)


@pytest.mark.parametrize("name", ["ddp", "fsdp2 in one file"])
def test_partial_loads_what_fits(worlds, name, tmp_path):
    """Another blocking for the long matrices alone: the others go on."""
    path = str(tmp_path / "half.ckpt")
    worlds[2].run(half, 2, FORMATS[name], path)
    other = with_option(FORMATS[name], max_preconditioner_dim=20, optimizer_checkpoint="partial")
    weights = worlds[2].run(rest, 2, other, path)[0]
    assert 1e-6 < deviation(weights, reference()) < 0.3  # 0.47 where nothing is loaded


def test_weights_alone_are_refused_but_for_ignore(worlds, tmp_path):
    path = str(tmp_path / "weights.ckpt")
    worlds[2].run(weights_alone, 2, path)
    errors = worlds[2].run_expecting_errors(rest, 2, "kl_shampoo", path)
    assert all("only the model" in str(error) for error in errors)
    anew = ("KLShampooStrategy", {"optimizer_checkpoint": "ignore"})
    assert deviation(worlds[2].run(rest, 2, anew, path)[0], reference()) < 1


def weights_alone(group, path: str):
    pl = pytorch()
    with launched(group):
        ran = trainer(pl, max_steps=-1)
        ran.fit(module(pl, adamw), rows(2, group.rank(), HALF))
        ran.save_checkpoint(path, weights_only=True)
