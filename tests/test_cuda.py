"""On a GPU: the same training as on the CPU, alone, on two ranks, by DeepSpeed's engine and by Lightning's Trainer.

These run where there is a GPU. Two ranks share it, by gloo: NCCL wants one for each.
"""

import contextlib
import warnings
from functools import partial

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from kl_dist import KLShampoo, clip_grad_norm_, full_state_dict
from tests.deepspeed_runs import alone as alone_like_deepspeed
from tests.deepspeed_runs import deepspeed_here, fit
from tests.deepspeed_runs import weights_of as weights_of_engine
from tests.lightning_runs import alone as alone_like_lightning
from tests.lightning_runs import launched, made_strategy, module, pytorch, rows, trainer
from tests.models import METHODS, Weights, deviation
from tests.noise import NOISE, float32_limit
from tests.sharded import groups_of, layers, loss_of, tokens_of, weights_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STEPS = 20
DOUBLE = 1e-9


def train(device, dtype=torch.float64, steps=STEPS, noise=0.0, seed=0, state=None, first=0, start=None, **options):
    """(weights, the optimizer)"""
    model = layers(dtype)
    if start is not None:
        model.load_state_dict(start)
    model = model.to(device)
    optimizer = KLShampoo(groups_of(model), **{"lr": 1e-2, "compute_dtype": "float32", **options})
    if state is not None:
        optimizer.load_state_dict(state)
    generator = torch.Generator().manual_seed(seed)
    for step in range(first, steps):
        optimizer.zero_grad()
        loss_of(model, tokens_of(step).to(device)).backward()
        for parameter in model.parameters() if noise else ():
            parameter.grad *= (1 + noise * torch.randn(parameter.shape, generator=generator)).to(device)
        optimizer.step()
    return {name: x.cpu() for name, x in weights_of(model).items()}, optimizer


@pytest.mark.parametrize("method", METHODS)
def test_float64_is_as_on_the_cpu(method):
    """Recipe "paper" begins with eigenvectors of singular factors, which every solver chooses as it likes."""
    options = {"method": method, "precondition_frequency": 2}
    assert deviation(train("cuda", **options)[0], train("cpu", **options)[0]) <= DOUBLE


def on_the_cpu(method: str, seed: int = 0) -> Weights:
    return train("cpu", torch.float32, noise=NOISE if seed else 0.0, seed=seed, method=method)[0]


YARDSTICKS = {f"device {method}": partial(on_the_cpu, method) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_float32_is_as_on_the_cpu(method):
    weights = train("cuda", torch.float32, method=method)[0]
    assert deviation(weights, on_the_cpu(method)) <= float32_limit(f"device {method}")


@pytest.mark.parametrize(("before", "after"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_checkpoint_goes_from_one_device_to_the_other(before, after):
    weights, optimizer = train(before, steps=9)
    state = full_state_dict(optimizer)
    found = train(after, state=state, start=weights | {"tied.weight": weights["odd.weight"]}, first=9)[0]
    assert deviation(found, train("cpu")[0]) <= DOUBLE


def test_a_plain_step_waits_for_the_device_once():
    model = layers(torch.float32).cuda()
    optimizer = KLShampoo(groups_of(model), lr=1e-2, precondition_frequency=100, stagger=False)
    for step in range(3):
        loss_of(model, tokens_of(step).cuda()).backward()
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waited = [str(one.message) + f" {one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
    assert len(waited) == 1, "\n".join(waited)


def test_a_grad_scaler_leaves_out_what_overflows():
    model = layers(torch.float32).cuda()
    optimizer = KLShampoo(groups_of(model), lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, growth_interval=1000)
    losses, skipped = [], 0
    for _step in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = loss_of(model, tokens_of(0).cuda())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(optimizer, 1.0)
        before = weights_of(model)
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        if scaler.get_scale() < scale:
            skipped += 1
            assert all(torch.equal(x, before[name]) for name, x in weights_of(model).items())
        losses.append(loss.item())
    assert skipped > 0 and losses[-1] < 0.5 * losses[0]


# -- two ranks on one GPU ----------------------------------------------------------------------------------------------


def on_two_ranks(group):
    torch.cuda.set_device(0)
    model = layers(torch.float64).cuda()
    wrapped = DistributedDataParallel(model, process_group=group)
    optimizer = KLShampoo(groups_of(model), lr=1e-2, process_group=group)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(wrapped, tokens_of(step).chunk(group.size())[group.rank()].cuda()).backward()
        optimizer.step()
    return {name: x.cpu() for name, x in weights_of(model).items()}


def test_two_ranks_train_as_one(worlds):
    found = worlds[2].run(on_two_ranks, 2, timeout=120)
    assert deviation(found[0], train("cpu")[0]) <= DOUBLE


# -- DeepSpeed and Lightning -------------------------------------------------------------------------------------------

OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}
ALL_OFFLOAD = {"zero": {**OFFLOAD["zero"], "offload_param": {"device": "cpu"}, "sub_group_size": 300}}


@pytest.mark.parametrize(
    ("stage", "more"), [(0, {}), (1, {}), (2, {}), (3, {}), (1, OFFLOAD), (2, OFFLOAD), (3, OFFLOAD), (3, ALL_OFFLOAD)]
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_deepspeeds_stages_and_offload(worlds, ranks, stage, more):
    found = worlds[ranks].run(fit, ranks, stage, device="cuda", timeout=120, **more)
    assert deviation(found[0][0], alone_like_deepspeed()) <= float32_limit("deepspeed kl_shampoo")


LOW = {
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", LOW)
def test_deepspeed_in_low_precision(worlds, name, stage):
    found = worlds[1].run(fit, 1, stage, device="cuda", timeout=120, **LOW[name])
    assert deviation(found[0][0], alone_like_deepspeed()) <= 0.1


def test_deepspeed_leaves_out_what_overflows(worlds):
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 30}}
    found = [worlds[1].run(fit, 1, stage, steps=20, device="cuda", timeout=120, **fp16)[0] for stage in (1, 2, 3)]
    assert all(deviation(weights, found[0][0]) <= 0.01 for weights, _ in found)
    assert deviation(found[0][0], alone_like_deepspeed(steps=20)) > 0.1


def fit_by_lightning(group, strategy, precision: str, dtype: torch.dtype, deepspeed: bool):
    with launched(group), deepspeed_here(group, "cuda") if deepspeed else contextlib.nullcontext() as found:
        pl = pytorch()
        made = module(pl, None, dtype)
        fitted = trainer(pl, made_strategy(strategy, pl), accelerator="gpu", precision=precision)
        fitted.fit(made, rows(1, 0))
        if deepspeed:
            weights = weights_of_engine(found, fitted.strategy.deepspeed_engine)
            fitted.strategy.deepspeed_engine.destroy()
            return {name.removeprefix("net."): x for name, x in weights.items()}, fitted.global_step
        return {name: x.float().cpu() for name, x in weights_of(made.net).items()}, fitted.global_step


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("strategy", ["kl_shampoo", "kl_shampoo_fsdp2"])
def test_lightnings_strategies(worlds, strategy, precision):
    found, steps = worlds[1].run(fit_by_lightning, 1, strategy, precision, torch.float32, False, timeout=120)[0]
    limit = 1e-3 if precision == "32-true" else 0.3
    assert steps == STEPS and deviation(found, alone_like_lightning(torch.float32)) <= limit


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(
    "options",
    [
        {"stage": 1},
        {"stage": 2},
        {"stage": 2, "offload_optimizer": True},
        {"stage": 3},
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    ],
)
def test_lightnings_deepspeed(worlds, options, precision):
    strategy = ("KLShampooDeepSpeedStrategy", {**options, "initial_scale_power": 4})
    found, _ = worlds[1].run(fit_by_lightning, 1, strategy, precision, torch.float32, True, timeout=120)[0]
    limit = 1e-3 if precision == "32-true" else 0.3
    assert deviation(found, alone_like_lightning(torch.float32)) <= limit


def test_sync_batchnorm_trains(worlds):
    assert worlds[1].run(with_batch_norm, 1, timeout=120)[0] > 0


def with_batch_norm(group) -> int:
    with launched(group):
        pl = pytorch()
        made = module(pl, None, torch.float32)
        made.net.norm = torch.nn.BatchNorm1d(12)
        fitted = trainer(pl, "kl_shampoo", accelerator="gpu", sync_batchnorm=True)
        fitted.fit(made, rows(1, 0))
        return int(made.net.norm.num_batches_tracked)
